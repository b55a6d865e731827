"""
The transformer against transformers: the same numbers from the same folder, through every way of
calling it.
"""
import copy
import json
import random

import pytest
import torch
from conftest import TINY_VOCAB, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

import model as nanomtp_model
from common.cli import InputError
from common.tokenizer import Tokenizer
from model import (
    Config, KVCache, RMSNorm, Transformer, add_mask_token, rope_frequencies, save_pretrained)

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}             # all three branches by T = 20

FAMILIES = {
    "llama-gqa-tied": tiny_config("llama"),
    "llama-mha-untied": tiny_config("llama", tied=False, num_key_value_heads=4),
    "llama-biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "llama-head-dim": tiny_config("llama", head_dim=32),
    "llama-rope-scaling": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "qwen2-gqa-tied": tiny_config("qwen2"),
    # Qwen2 has no key `attention_bias`: it is not looked at
    "qwen2-mha-untied": tiny_config("qwen2", False, num_key_value_heads=4, attention_bias=True),
    "qwen3-gqa-tied": tiny_config("qwen3"),
    "qwen3-mha-untied": tiny_config("qwen3", False, num_key_value_heads=4, attention_bias=True),
}


def random_ids(*shape, seed=0):
    return torch.randint(0, TINY_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def causal(count):
    return torch.ones(count, count, dtype=torch.bool).tril()


@torch.no_grad()
def full_logits(model, ids):
    """The plain pass: positions 0, 1, 2, ... and a causal mask."""
    return model(ids, torch.arange(ids.shape[1]).expand(ids.shape), causal(ids.shape[1]))


@torch.no_grad()
def reference_logits(model, ids, **arguments):
    return model(input_ids=ids, use_cache=False, **arguments).logits


def reopened(folder, **more):
    """transformers' model of a folder, in fp32 unless `more` says otherwise."""
    settings = {"dtype": torch.float32} | more
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, edit):
    """Rewrite config.json in place: `edit` takes the parsed file and changes it."""
    config = config_of(folder)
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def save_weights(weights, folder):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# --------------------------------------------------------------------------------------------------
# Same logits as transformers

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    reference = tiny_model(tmp_path, FAMILIES[name])
    model = Transformer.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings == ("untied" not in name)
    ids = random_ids(2, 20)
    expected = reference_logits(reference, ids)
    # else 1e-4 would prove little
    assert expected.std() > 0.5 and len(expected.argmax(-1).unique()) > 10
    close(full_logits(model, ids), expected)


@pytest.mark.parametrize("name", ["llama-rope-scaling", "qwen3-gqa-tied"])
def test_any_positions_and_any_mask(name, tmp_path):
    """The method lives from odd positions and odd masks: not only the causal pass is compared."""
    reference = tiny_model(tmp_path, FAMILIES[name])
    model = Transformer.from_pretrained(tmp_path)
    ids, generator = random_ids(2, 20), torch.Generator().manual_seed(1)
    positions = torch.randint(0, 400, (2, 20), generator=generator)     # out of order, repeated
    mask = torch.rand(2, 20, 20, generator=generator) < 0.4
    mask |= torch.eye(20, dtype=torch.bool)
    least = torch.finfo(torch.float32).min
    for ours, theirs in ((mask, mask), (mask[0], mask[:1].expand(2, 20, 20))):
        additive = torch.zeros(2, 1, 20, 20).masked_fill(~theirs[:, None], least)
        expected = reference_logits(reference, ids, position_ids=positions,
                                    attention_mask=additive)
        with torch.no_grad():
            close(model(ids, positions, ours), expected)


def test_both_matrices_present_but_tied_in_config(tmp_path):
    """transformers 5 ties two equal matrices and leaves two different ones apart. So do we."""
    tiny_model(tmp_path, tiny_config("llama", tied=True))
    ids, weights = random_ids(2, 8), load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for lm_head in (embedding.clone(), embedding.roll(1, 0)):
        save_weights(weights | {"lm_head.weight": lm_head}, tmp_path)
        model = Transformer.from_pretrained(tmp_path)
        assert model.config.tie_word_embeddings == torch.equal(lm_head, embedding)
        close(full_logits(model, ids), reference_logits(reopened(tmp_path), ids))
    # ... and once apart, they stay apart through our own save
    save_pretrained(model, tmp_path)
    assert config_of(tmp_path)["tie_word_embeddings"] is False
    again = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(full_logits(again, ids), full_logits(model, ids))


def test_shards_equal_one_file(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    tiny_model(one, FAMILIES["qwen3-mha-untied"])
    tiny_model(many, FAMILIES["qwen3-mha-untied"], max_shard_size="50KB")
    assert not (many / "model.safetensors").exists()
    assert len(list(many.glob("model-*.safetensors"))) > 3
    one, many = (Transformer.from_pretrained(folder).state_dict() for folder in (one, many))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_old_rotary_buffers_are_skipped(tmp_path):
    tiny_model(tmp_path, tiny_config())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_weights(weights, tmp_path)
    Transformer.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------
# config.json

@pytest.mark.parametrize("name", [
    "llama-gqa-tied", "llama-rope-scaling", "qwen2-gqa-tied", "qwen3-gqa-tied"])
def test_version_4_config_loads_equally(name, tmp_path):
    tiny_model(tmp_path, FAMILIES[name])
    ids = random_ids(2, 20)
    expected = full_logits(Transformer.from_pretrained(tmp_path), ids)

    def to_version_4(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")

    edit_config(tmp_path, to_version_4)
    assert torch.equal(full_logits(Transformer.from_pretrained(tmp_path), ids), expected)
    close(reference_logits(reopened(tmp_path), ids), expected)

    def to_old_key(config):                             # before `rope_type` it was called `type`
        if config["rope_scaling"]:
            config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")

    edit_config(tmp_path, to_old_key)
    assert torch.equal(full_logits(Transformer.from_pretrained(tmp_path), ids), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_defaults_of_absent_keys(family):
    """A config.json states only what differs from its family's defaults: ours must be the same."""
    stated = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    reference = transformers.AutoConfig.for_model(family, **stated)
    config = Config.from_dict({"model_type": family} | stated)
    assert config.rms_norm_eps == reference.rms_norm_eps == 1e-6
    assert config.rope["rope_theta"] == reference.rope_parameters["rope_theta"] == 10000.0
    assert config.rope["rope_type"] == reference.rope_parameters["rope_type"] == "default"
    assert not config.tie_word_embeddings and not reference.tie_word_embeddings
    assert config.head_dim == (128 if family == "qwen3" else 16)
    with torch.device("meta"):
        models = Transformer(config), transformers.AutoModelForCausalLM.from_config(reference)
    ours, theirs = ({name: tensor.shape for name, tensor in model.state_dict().items()}
                    for model in models)
    assert ours == theirs


def test_absent_key_value_heads_means_one_per_head():
    config = tiny_config("llama")
    del config["num_key_value_heads"]
    assert Config.from_dict(config).num_key_value_heads == 4
    assert Config.from_dict(config | {"num_key_value_heads": None}).num_key_value_heads == 4


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "mistral"),
    ({"model_type": None}, "None"),
    ({"hidden_act": "gelu"}, "silu"),
    ({"use_sliding_window": True}, "sliding"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
])
def test_refused_configs(change, word):
    with pytest.raises(InputError, match=word):
        Config.from_dict(tiny_config("qwen3") | change)


# --------------------------------------------------------------------------------------------------
# Rotary embedding and norm

@pytest.mark.parametrize("head_dim, factor, values", [
    # Llama-3.2-1B
    (64, 32.0, {15: 1.29054801e-3, 16: 4.29556705e-4, 17: 9.70828623e-5, 31: 9.41830720e-8}),
    # Llama-3.1-8B
    (128, 8.0, {29: 2.16657063e-3, 30: 1.37189368e-3, 31: 8.56751460e-4, 32: 5.24846022e-4,
                33: 3.12693650e-4, 34: 1.78507791e-4, 63: 3.06892588e-7}),
])
def test_llama3_frequencies(head_dim, factor, values):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LLAMA3_ROPE | {"rope_theta": 500000.0, "factor": factor,
                          "original_max_position_embeddings": 8192}
    raw = tiny_config("llama", head_dim=head_dim, rope_parameters=rope)
    frequencies = rope_frequencies(Config.from_dict(raw))
    assert frequencies.shape == (head_dim // 2,) and frequencies.dtype == torch.float32
    for index, value in values.items():
        assert frequencies[index].item() == pytest.approx(value, rel=1e-6)
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**settings)).inv_freq
    torch.testing.assert_close(frequencies, reference, rtol=1e-6, atol=0)


def test_rms_norm_in_bf16_bit_for_bit():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(64, 1e-5).bfloat16(), LlamaRMSNorm(64, eps=1e-5).bfloat16()
    ours.weight.data = theirs.weight.data = torch.randn(64, generator=generator).bfloat16()
    x = 3 * torch.randn(200, 64, generator=generator).bfloat16()
    assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), theirs(x))
    # torch's own scales before it casts; the same numbers would mean that this test sees nothing
    assert not torch.equal(ours(x), torch.nn.functional.rms_norm(x, (64,), ours.weight, 1e-5))


def test_bf16_keeps_rope_in_fp32(tmp_path):
    tiny_model(tmp_path, tiny_config("llama", max_position_embeddings=16384))
    ids, positions = random_ids(4, 16), torch.arange(0, 16000, 1000).expand(4, 16)
    exact = Transformer.from_pretrained(tmp_path)
    expected = rope_frequencies(exact.config)
    assert not torch.equal(expected.bfloat16().float(), expected)

    @torch.no_grad()
    def error(model):
        difference = model(ids, positions, causal(16)).float() - exact(ids, positions, causal(16))
        return difference.square().mean()

    for model in (Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16),
                  Transformer.from_pretrained(tmp_path).to(torch.bfloat16)):
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        kept = error(model)
        assert model.frequencies.dtype == torch.float32
        assert torch.equal(model.frequencies, expected)
        # what rounding them would do: over thousands of tokens, angles are off by whole turns
        model.frequencies = expected.bfloat16().float()
        assert kept < error(model) / 100


# --------------------------------------------------------------------------------------------------
# Parts of a pass: `at`, and the cache

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen3 (GQA, q/k norm, untied): every part of the forward pass. Not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, tiny_config("qwen3", tied=False))
    return Transformer.from_pretrained(folder).eval()


@torch.no_grad()
def test_at_returns_the_same_logits(model):
    ids = random_ids(2, 20)
    everywhere = full_logits(model, ids)
    rows, columns = torch.tensor([1, 0, 0, 1]), torch.tensor([3, 19, 0, 3])
    chosen = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.3
    positions = torch.arange(20).expand(2, 20)
    for index, count in (((rows, columns), 4), ((slice(None), -1), 2), (chosen, chosen.sum())):
        logits = model(ids, positions, causal(20), at=index)
        assert logits.shape == (count, TINY_VOCAB)
        close(logits, everywhere[index], atol=1e-5)
        hidden = model(ids, positions, causal(20), at=index, head=False)
        close(hidden @ model.output_matrix.T, logits, atol=1e-5)


@torch.no_grad()
def cached_pass(model, ids, cache):
    """A pass behind each row's committed text: query t sees the places up to length + t."""
    count = ids.shape[1]
    positions = cache.length[:, None] + torch.arange(count)                         # (B, T)
    mask = torch.arange(int(cache.length.max()) + count) <= positions[..., None]    # (B, T, S)
    return model(ids, positions, mask, cache)


def random_sizes(seed):
    """Of chunks that make up some 12 tokens."""
    rng = random.Random(seed)
    parts = "".join(rng.choice("xx-") for _ in range(24)).split("-")
    return [len(part) for part in parts if part]


@pytest.mark.parametrize("sizes", [
    [24], [1] * 24, [23, 1], [1, 23], *(random_sizes(seed) for seed in range(4))])
def test_any_split_into_cached_chunks(model, sizes):
    ids = random_ids(2, sum(sizes))
    cache, logits, start = KVCache(model, 2, 40), [], 0
    for size in sizes:
        logits.append(cached_pass(model, ids[:, start:start + size], cache))
        assert cache.length.tolist() == [start, start]              # a pass alone commits nothing
        cache.advance(torch.tensor([size, size]))
        start += size
    close(torch.cat(logits, 1), full_logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rows_at_different_lengths_and_rejected_tokens(model, seed):
    """Each pass keeps a random number of tokens per row; the rest must leave no trace."""
    rng, rows, total = random.Random(seed), 3, 20
    ids, generator = random_ids(rows, total, seed=seed), torch.Generator().manual_seed(100 + seed)
    cache, logits = KVCache(model, rows, 40), torch.full((rows, total, TINY_VOCAB), torch.nan)
    lengths_seen = set()
    while cache.length.min() < total:
        count, length = rng.randint(1, 6), cache.length.tolist()
        keep = [rng.randint(0, min(count, total - length[row])) for row in range(rows)]
        fed = torch.randint(0, TINY_VOCAB, (rows, count), generator=generator)
        for row, (first, kept) in enumerate(zip(length, keep)):
            fed[row, :kept] = ids[row, first:first + kept]
        out = cached_pass(model, fed, cache)
        for row, (first, kept) in enumerate(zip(length, keep)):
            logits[row, first:first + kept] = out[row, :kept]
        cache.advance(torch.tensor(keep))
        lengths_seen.add(tuple(cache.length.tolist()))
    assert any(len(set(lengths)) == rows for lengths in lengths_seen)   # at different places
    close(logits, full_logits(model, ids), atol=2e-5)


def test_keep_rows(model):
    """The middle row is done; the others swap places."""
    ids, cache = random_ids(3, 16), KVCache(model, 3, 40)
    cached_pass(model, ids[:, :10], cache)
    cache.advance(torch.tensor([10, 4, 7]))
    cache.keep_rows([2, 0])
    assert cache.length.tolist() == [7, 10]
    logits = cached_pass(model, torch.stack([ids[2, 7:13], ids[0, 10:16]]), cache)
    expected = full_logits(model, ids)
    close(logits, torch.stack([expected[2, 7:13], expected[0, 10:16]]), atol=2e-5)


@torch.no_grad()
def test_mask_tokens_behind_the_text_change_nothing(model):
    """The text cannot see what is fed behind it, however much that sees of the text and itself."""
    text, behind = random_ids(2, 12), torch.full((2, 5), TINY_VOCAB - 1)
    mask, positions = causal(17), torch.arange(17).expand(2, 17)
    mask[12:, 12:] = True
    logits = model(torch.cat((text, behind), 1), positions, mask)
    other = model(torch.cat((text, random_ids(2, 5, seed=9)), 1), positions, mask)
    assert not torch.allclose(logits[:, 12:], other[:, 12:], atol=0.1)      # they do matter
    close(logits[:, :12], full_logits(model, text), atol=1e-5)
    assert torch.equal(logits[:, :12], other[:, :12])   # the same shapes: not even the last bit


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_model_computes_the_same_and_is_not_saved(family, tmp_path, monkeypatch):
    """Biases (qwen2) and per-head norms (qwen3) included, in other orders in memory: for a row or
    two, for a few, and for many."""
    tiny_model(tmp_path, tiny_config(family))
    model, widths = Transformer.from_pretrained(tmp_path), (1, 2, 3, 12, 32, 33)
    texts = [random_ids(2, width) for width in widths] + [random_ids(1, width) for width in widths]
    expected = [full_logits(model, ids) for ids in texts]
    assert copy.deepcopy(model).fuse().packed_output is None                # too small
    monkeypatch.setattr(nanomtp_model, "PACK_FROM", 0)
    fused = model.fuse()
    assert fused.packed_output is not None
    assert fused.model.layers[0].mlp.down_proj.packed is not None
    for ids, logits in zip(texts, expected):
        close(full_logits(fused, ids), logits)
    half = Transformer.from_pretrained(tmp_path, torch.bfloat16).fuse()     # only fp32 is packed
    assert half.packed_output is None and half.model.layers[0].mlp.down_proj.packed is None
    names = {name for name, _ in fused.named_parameters()}
    assert "model.layers.0.self_attn.qkv_proj.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    assert fused.model.layers[0].mlp.down_proj.weight.t().is_contiguous()
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    with pytest.raises(InputError, match="fused"):
        save_pretrained(fused, tmp_path)


# --------------------------------------------------------------------------------------------------
# The mask token's rows

def model_with_known_rows(folder, tied, free_rows):
    """A tiny model whose used rows have a mean and a spread of their own in every dimension, and
    whose free rows are absurd. Returns it, the means and the spreads, (C,) each."""
    tiny_model(folder, tiny_config("llama", tied, vocab_size=TINY_VOCAB + free_rows))
    model = Transformer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    mean, spread = 10.0 * torch.arange(64), 0.1 * (1 + torch.arange(64) % 7)
    for table in [model.model.embed_tokens] + ([] if tied else [model.lm_head]):
        noise = torch.randn(table.weight.shape, generator=generator)
        table.weight.data[:] = mean + spread * noise
        table.weight.data[TINY_VOCAB:] = 1e6
    return model, mean, spread


@pytest.mark.parametrize("free_rows", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_add_mask_token(tmp_path, tied, free_rows):
    model, mean, spread = model_with_known_rows(tmp_path, tied, free_rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_mask_token(model, TINY_VOCAB, seed=5)
    size = TINY_VOCAB + max(free_rows, 1)               # a free row is used, else one is added
    assert model.config.vocab_size == size
    tables = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name not in tables:
            assert torch.equal(tensor, before[name])
            continue
        assert tensor.shape == (size, 64) and tensor.dtype == torch.float32
        assert torch.equal(tensor[:TINY_VOCAB], before[name][:TINY_VOCAB])
        assert torch.equal(tensor[TINY_VOCAB + 1:], before[name][TINY_VOCAB + 1:])
        # 64 draws, standardised: mean within 4 standard errors, spread near 1, none far out
        z = (tensor[TINY_VOCAB] - mean) / spread
        assert z.mean().abs() < 0.5 and 0.65 < z.std() < 1.35 and z.abs().max() < 4.5
    if not tied:
        assert not torch.equal(after[tables[0]][TINY_VOCAB], after[tables[1]][TINY_VOCAB])
    assert full_logits(model, torch.full((1, 4), TINY_VOCAB)).shape == (1, 4, size)


def test_add_mask_token_is_seeded(tmp_path):
    rows = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, _, _ = model_with_known_rows(tmp_path, False, 0)
        torch.manual_seed(noise)                                # the global state must not matter
        add_mask_token(model, TINY_VOCAB, seed=seed)
        rows.append([table.weight[-1].detach() for table in (
            model.model.embed_tokens, model.lm_head)])
    assert all(map(torch.equal, rows[0], rows[1]))
    assert not any(map(torch.equal, rows[0], rows[2]))


def test_add_mask_token_leaves_other_logits_alone(tmp_path):
    tiny_model(tmp_path, tiny_config("qwen2"))
    model, ids = Transformer.from_pretrained(tmp_path), random_ids(2, 12)
    before = full_logits(model, ids)
    add_mask_token(model, TINY_VOCAB)
    close(full_logits(model, ids)[..., :TINY_VOCAB], before, atol=1e-5)


@pytest.mark.parametrize("mask_id", [0, -1, TINY_VOCAB + 1])
def test_add_mask_token_refuses(model, mask_id):
    with pytest.raises(InputError, match=str(mask_id)):
        add_mask_token(model, mask_id)


# --------------------------------------------------------------------------------------------------
# Saving and loading

@pytest.mark.parametrize("name", [
    "llama-biases", "llama-rope-scaling", "qwen2-mha-untied", "qwen3-gqa-tied"])
def test_saved_model_opens_in_transformers(name, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    tiny_model(old, FAMILIES[name])
    new.mkdir()
    model = Transformer.from_pretrained(old)
    add_mask_token(model, TINY_VOCAB)
    note = {"mask_token_id": TINY_VOCAB, "k_max": 5, "prompt_format": "plain", "steps": 12}
    model.config.raw["nanomtp"] = note
    save_pretrained(model, new)

    reference, loading = reopened(new, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[kind]
    ids = torch.cat((random_ids(2, 15), torch.full((2, 3), TINY_VOCAB)), 1)     # mask tokens too
    close(full_logits(model, ids), reference_logits(reference, ids))

    again = Transformer.from_pretrained(new)
    assert torch.equal(full_logits(again, ids), full_logits(model, ids))
    assert again.config.raw["nanomtp"] == reference.config.nanomtp == note
    # a second save keeps what the folder said, and weights that are given are the ones written
    other = {key: 2 * tensor for key, tensor in again.state_dict().items()}
    save_pretrained(again, old, other)
    assert config_of(old) == config_of(new)
    for key, tensor in Transformer.from_pretrained(old).state_dict().items():
        assert torch.equal(tensor, other[key])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_on_disk_and_in_memory(tmp_path, key):
    """Saved in the model's dtype, under the key that was there; loaded in the one asked for."""
    tiny_model(tmp_path, tiny_config())
    edit_config(tmp_path, lambda config: config.update({key: config.pop("dtype")}))
    exact = Transformer.from_pretrained(tmp_path).state_dict()
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path)
    config, on_disk = config_of(tmp_path), load_file(tmp_path / "model.safetensors")
    assert config[key] == "bfloat16" and len({"dtype", "torch_dtype"} & config.keys()) == 1
    assert "nanomtp" not in config
    theirs = reopened(tmp_path, dtype="auto").state_dict()
    in_fp32 = Transformer.from_pretrained(tmp_path).state_dict()        # what train.py starts from
    in_bf16 = Transformer.from_pretrained(tmp_path, torch.bfloat16).state_dict()
    assert on_disk.keys() == exact.keys() == in_fp32.keys() == theirs.keys() - {"lm_head.weight"}
    for name, tensor in exact.items():
        rounded = tensor.bfloat16()
        assert in_fp32[name].dtype == torch.float32
        for saved in (on_disk[name], theirs[name], in_bf16[name]):
            assert saved.dtype == torch.bfloat16 and torch.equal(saved, rounded)
        assert torch.equal(in_fp32[name], rounded.float())


def test_real_model_computes_the_same(smollm2):
    """What it writes is compared, and read, in test_sample.py."""
    ids = torch.tensor([Tokenizer(smollm2).prompt("What is 7 + 5?", "chat")])
    ours = full_logits(Transformer.from_pretrained(smollm2), ids)
    close(ours, reference_logits(reopened(smollm2), ids), atol=1e-3)
