"""
The transformer against transformers: the same numbers from the same folder, through every way of calling it.
"""
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY_VOCAB, tiny_checkpoint, tiny_config, tiny_model
from model import Config, KVCache, RMSNorm, Transformer, add_mask_token, rope_frequencies, save_pretrained
from pretrained import InputError

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}       # 32: all three branches by T = 20

FAMILIES = {
    "llama-gqa-tied": tiny_config("llama"),
    "llama-mha-untied": tiny_config("llama", tied=False, num_key_value_heads=4),
    "llama-biases": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "llama-head-dim": tiny_config("llama", head_dim=32),
    "llama-rope-scaling": tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "qwen2-gqa-tied": tiny_config("qwen2"),
    "qwen2-mha-untied": tiny_config("qwen2", tied=False, num_key_value_heads=4, attention_bias=True),   # no such key
    "qwen3-gqa-tied": tiny_config("qwen3"),
    "qwen3-mha-untied": tiny_config("qwen3", tied=False, num_key_value_heads=4, attention_bias=True),
}


def tokens(*shape, seed=0):
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


def edit_config(folder, edit):
    """Rewrite config.json in place: `edit` takes the parsed file and changes it."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------------------------------------------
# Same logits as transformers

@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    reference = tiny_model(tmp_path, FAMILIES[name])
    model = Transformer.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings == ("untied" not in name)
    ids = tokens(2, 20)
    expected = reference_logits(reference, ids)
    assert expected.std() > 0.5 and len(expected.argmax(-1).unique()) > 10      # else 1e-4 would prove little
    torch.testing.assert_close(full_logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-rope-scaling", "qwen3-gqa-tied"])
def test_any_positions_and_any_mask(name, tmp_path):
    """The method lives from odd positions and odd masks, so those are compared too, not only the causal pass."""
    reference = tiny_model(tmp_path, FAMILIES[name])
    model = Transformer.from_pretrained(tmp_path)
    ids, generator = tokens(2, 20), torch.Generator().manual_seed(1)
    positions = torch.randint(0, 400, (2, 20), generator=generator)             # out of order, with repeats
    mask = (torch.rand(2, 20, 20, generator=generator) < 0.4) | torch.eye(20, dtype=torch.bool)
    additive = torch.zeros(2, 1, 20, 20).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    expected = reference_logits(reference, ids, position_ids=positions, attention_mask=additive)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, positions, mask), expected, atol=1e-4, rtol=0)
        shared = additive[:1].expand(2, 1, 20, 20)                              # one (T, S) mask for all rows
        expected = reference_logits(reference, ids, position_ids=positions, attention_mask=shared)
        torch.testing.assert_close(model(ids, positions, mask[0]), expected, atol=1e-4, rtol=0)


def test_both_matrices_present_but_tied_in_config(tmp_path):
    """transformers 5 ties two equal matrices and leaves two different ones apart. So do we."""
    tiny_model(tmp_path, tiny_config("llama", tied=True))
    ids, weights = tokens(2, 8), load_file(tmp_path / "model.safetensors")
    for lm_head in (weights["model.embed_tokens.weight"].clone(), weights["model.embed_tokens.weight"].roll(1, 0)):
        save_file(weights | {"lm_head.weight": lm_head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        model = Transformer.from_pretrained(tmp_path)
        assert model.config.tie_word_embeddings == torch.equal(lm_head, weights["model.embed_tokens.weight"])
        torch.testing.assert_close(full_logits(model, ids), reference_logits(reference, ids), atol=1e-4, rtol=0)
    # ... and once apart, they stay apart through our own save
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(full_logits(Transformer.from_pretrained(tmp_path), ids), full_logits(model, ids))


def test_shards_equal_one_file(tmp_path):
    config = FAMILIES["qwen3-mha-untied"]
    for name, save in (("one", {}), ("many", {"max_shard_size": "50KB"})):
        tiny_model(tmp_path / name, config, **save)
    assert (tmp_path / "one" / "model.safetensors").exists() and not (tmp_path / "many" / "model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_old_rotary_buffers_are_skipped(tmp_path):
    tiny_model(tmp_path, tiny_config())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    Transformer.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# config.json

@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-rope-scaling", "qwen2-gqa-tied", "qwen3-gqa-tied"])
def test_version_4_config_loads_equally(name, tmp_path):
    tiny_model(tmp_path, FAMILIES[name])
    ids = tokens(2, 20)
    expected = full_logits(Transformer.from_pretrained(tmp_path), ids)

    def to_version_4(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")

    edit_config(tmp_path, to_version_4)
    assert torch.equal(full_logits(Transformer.from_pretrained(tmp_path), ids), expected)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(reference_logits(reference, ids), expected, atol=1e-4, rtol=0)

    def to_old_key(config):                                     # before `rope_type` it was called `type`
        if config["rope_scaling"]:
            config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")

    edit_config(tmp_path, to_old_key)
    assert torch.equal(full_logits(Transformer.from_pretrained(tmp_path), ids), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_defaults_of_absent_keys(family):
    """A config.json states only what differs from its family's defaults: ours must be transformers' defaults."""
    stated = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}
    reference = transformers.AutoConfig.for_model(family, **stated)
    config = Config.from_dict({"model_type": family} | stated)
    assert config.rms_norm_eps == reference.rms_norm_eps == 1e-6
    assert config.rope["rope_theta"] == reference.rope_parameters["rope_theta"] == 10000.0
    assert config.rope["rope_type"] == reference.rope_parameters["rope_type"] == "default"
    assert not config.tie_word_embeddings and not reference.tie_word_embeddings
    with torch.device("meta"):
        ours, theirs = Transformer(config), transformers.AutoModelForCausalLM.from_config(reference)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert config.head_dim == (128 if family == "qwen3" else 16)


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


# ----------------------------------------------------------------------------------------------------------------------
# Rotary embedding and norm

def rope_config(head_dim, factor):
    return Config.from_dict(tiny_config("llama", head_dim=head_dim, rope_parameters=LLAMA3_ROPE | {
        "rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}))


@pytest.mark.parametrize("head_dim, factor, values", [
    # Llama-3.2-1B
    (64, 32.0, {15: 1.29054801e-3, 16: 4.29556705e-4, 17: 9.70828623e-5, 31: 9.41830720e-8}),
    # Llama-3.1-8B
    (128, 8.0, {29: 2.16657063e-3, 30: 1.37189368e-3, 31: 8.56751460e-4, 32: 5.24846022e-4, 33: 3.12693650e-4,
                34: 1.78507791e-4, 63: 3.06892588e-7}),
])
def test_llama3_frequencies(head_dim, factor, values):
    config = rope_config(head_dim, factor)
    frequencies = rope_frequencies(config)
    assert frequencies.shape == (head_dim // 2,) and frequencies.dtype == torch.float32
    for index, value in values.items():
        assert frequencies[index].item() == pytest.approx(value, rel=1e-6)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    settings = {key: value for key, value in config.raw.items() if key != "model_type"}
    reference = LlamaRotaryEmbedding(transformers.LlamaConfig(**settings)).inv_freq
    torch.testing.assert_close(frequencies, reference, rtol=1e-6, atol=0)


def test_rms_norm_in_bf16_bit_for_bit():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(64, 1e-5).bfloat16(), LlamaRMSNorm(64, eps=1e-5).bfloat16()
    ours.weight.data = theirs.weight.data = torch.randn(64, generator=generator).bfloat16()
    x = 3 * torch.randn(200, 64, generator=generator).bfloat16()
    assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), theirs(x))
    # torch's own rms_norm scales before it casts; the same numbers would mean that this test sees nothing
    assert not torch.equal(ours(x), torch.nn.functional.rms_norm(x, (64,), ours.weight, 1e-5))


def test_bf16_keeps_rope_in_fp32(tmp_path):
    tiny_model(tmp_path, tiny_config("llama", max_position_embeddings=16384))
    ids, positions, mask = tokens(4, 16), torch.arange(0, 16000, 1000).expand(4, 16), causal(16)
    exact = Transformer.from_pretrained(tmp_path)
    expected = rope_frequencies(exact.config)
    assert not torch.equal(expected.bfloat16().float(), expected)
    for model in (Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16),
                  Transformer.from_pretrained(tmp_path).to(torch.bfloat16)):
        with torch.no_grad():
            target = exact(ids, positions, mask)
            error = (model(ids, positions, mask).float() - target).square().mean()
            assert model.model.embed_tokens.weight.dtype == torch.bfloat16
            assert model.frequencies.dtype == torch.float32 and torch.equal(model.frequencies, expected)
            # what rounding them would do: over thousands of tokens, angles are off by whole turns
            model.frequencies = expected.bfloat16().float()
            rounded = (model(ids, positions, mask).float() - target).square().mean()
        assert error < rounded / 100


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a pass: `at`, and the cache

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen3 (GQA, q/k norm, untied): every part of the forward pass is in it. Not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, tiny_config("qwen3", tied=False))
    return Transformer.from_pretrained(folder).eval()


def test_at_returns_the_same_logits(model):
    ids = tokens(2, 20)
    everywhere = full_logits(model, ids)
    rows, columns = torch.tensor([1, 0, 0, 1]), torch.tensor([3, 19, 0, 3])
    chosen = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.3
    for at, shape in (((rows, columns), (4, TINY_VOCAB)),
                      ((slice(None), -1), (2, TINY_VOCAB)),
                      (chosen, (int(chosen.sum()), TINY_VOCAB))):
        with torch.no_grad():
            logits = model(ids, torch.arange(20).expand(2, 20), causal(20), at=at)
        assert logits.shape == shape
        torch.testing.assert_close(logits, everywhere[at], atol=1e-5, rtol=0)


def cached_pass(model, ids, cache):
    """One pass behind each row's committed text: key slot s is visible to query t iff s <= length + t."""
    count = ids.shape[1]
    positions = cache.length[:, None] + torch.arange(count)                         # (B, T)
    mask = torch.arange(int(cache.length.max()) + count) <= positions[..., None]    # (B, T, S)
    with torch.no_grad():
        return model(ids, positions, mask, cache)


def new_cache(model, rows, capacity=40):
    return KVCache(model.config, rows, capacity, "cpu", torch.float32)


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [23, 1], [1, 23]] + [
    [len(part) for part in "".join(random.Random(seed).choice("xx-") for _ in range(24)).split("-") if part]
    for seed in range(4)])
def test_any_split_into_cached_chunks(model, sizes):
    ids = tokens(2, sum(sizes))
    cache, logits, start = new_cache(model, 2), [], 0
    for size in sizes:
        logits.append(cached_pass(model, ids[:, start:start + size], cache))
        assert cache.length.tolist() == [start, start]          # a pass alone commits nothing
        cache.advance(torch.tensor([size, size]))
        start += size
    torch.testing.assert_close(torch.cat(logits, 1), full_logits(model, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_rows_at_different_lengths_and_rejected_tokens(model, seed):
    """Each pass keeps a random number of tokens per row; the rest is garbage that must leave no trace."""
    rng, rows, total = random.Random(seed), 3, 20
    ids, generator = tokens(rows, total, seed=seed), torch.Generator().manual_seed(100 + seed)
    cache, logits = new_cache(model, rows), torch.full((rows, total, TINY_VOCAB), torch.nan)
    lengths_seen = set()
    while cache.length.min() < total:
        count = rng.randint(1, 6)
        length = cache.length.tolist()
        keep = [rng.randint(0, min(count, total - length[row])) for row in range(rows)]
        fed = torch.randint(0, TINY_VOCAB, (rows, count), generator=generator)
        for row in range(rows):
            fed[row, :keep[row]] = ids[row, length[row]:length[row] + keep[row]]
        out = cached_pass(model, fed, cache)
        for row in range(rows):
            logits[row, length[row]:length[row] + keep[row]] = out[row, :keep[row]]
        cache.advance(torch.tensor(keep))
        lengths_seen.add(tuple(cache.length.tolist()))
    assert any(len(set(lengths)) == rows for lengths in lengths_seen)       # rows really were at different places
    torch.testing.assert_close(logits, full_logits(model, ids), atol=2e-5, rtol=0)


def test_keep_rows(model):
    ids = tokens(3, 16)
    cache = new_cache(model, 3)
    cached_pass(model, ids[:, :10], cache)
    cache.advance(torch.tensor([10, 4, 7]))
    rows, lengths = torch.tensor([2, 0]), [7, 10]                           # the middle row is done; others swap places
    cache.keep_rows(rows)
    assert cache.length.tolist() == lengths
    fed = torch.stack([ids[2, 7:13], ids[0, 10:16]])
    logits = cached_pass(model, fed, cache)
    expected = full_logits(model, ids)
    torch.testing.assert_close(logits[0], expected[2, 7:13], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1], expected[0, 10:16], atol=2e-5, rtol=0)


def test_mask_tokens_behind_the_text_change_nothing(model):
    """The text cannot see what is fed behind it, however much the mask tokens see of the text and of each other."""
    text, masks = tokens(2, 12), torch.full((2, 5), TINY_VOCAB - 1)
    mask = causal(17)
    mask[12:, 12:] = True
    positions = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        logits = model(torch.cat((text, masks), 1), positions, mask)
        other = model(torch.cat((text, tokens(2, 5, seed=9)), 1), positions, mask)
    assert not torch.allclose(logits[:, 12:], other[:, 12:], atol=0.1)      # the mask tokens themselves do matter
    torch.testing.assert_close(logits[:, :12], full_logits(model, text), atol=1e-5, rtol=0)
    assert torch.equal(logits[:, :12], other[:, :12])                       # same shapes: not even the last bit


# ----------------------------------------------------------------------------------------------------------------------
# The mask token's rows

def model_with_known_rows(tmp_path, tied, free_rows):
    """A tiny model whose used rows have another mean and spread in every dimension, and whose free rows are absurd."""
    tiny_model(tmp_path, tiny_config("llama", tied, vocab_size=TINY_VOCAB + free_rows))
    model = Transformer.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    mean, spread = 10.0 * torch.arange(64), 0.1 * (1 + torch.arange(64) % 7)
    for table in [model.model.embed_tokens] + ([] if tied else [model.lm_head]):
        table.weight.data[:] = mean + spread * torch.randn(table.weight.shape, generator=generator)
        table.weight.data[TINY_VOCAB:] = 1e6
    return model, mean, spread


@pytest.mark.parametrize("free_rows", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_add_mask_token(tmp_path, tied, free_rows):
    model, mean, spread = model_with_known_rows(tmp_path, tied, free_rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_mask_token(model, TINY_VOCAB, seed=5)
    size = TINY_VOCAB + max(free_rows, 1)                                   # a free row is used, else one is added
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
        # 64 draws, standardised per dimension: mean within 4 standard errors, spread near 1, none far out
        z = (tensor[TINY_VOCAB] - mean) / spread
        assert z.mean().abs() < 0.5 and 0.65 < z.std() < 1.35 and z.abs().max() < 4.5
    if not tied:
        assert not torch.equal(after[tables[0]][TINY_VOCAB], after[tables[1]][TINY_VOCAB])
    with torch.no_grad():
        assert full_logits(model, torch.full((1, 4), TINY_VOCAB)).shape == (1, 4, size)


def test_add_mask_token_is_seeded(tmp_path):
    rows = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, _, _ = model_with_known_rows(tmp_path, False, 0)
        torch.manual_seed(noise)                                            # torch's global state must not matter
        add_mask_token(model, TINY_VOCAB, seed=seed)
        rows.append((model.model.embed_tokens.weight[-1].detach(), model.lm_head.weight[-1].detach()))
    assert all(map(torch.equal, rows[0], rows[1]))
    assert not any(map(torch.equal, rows[0], rows[2]))


def test_add_mask_token_leaves_other_logits_alone(tmp_path):
    tiny_model(tmp_path, tiny_config("qwen2"))
    model = Transformer.from_pretrained(tmp_path)
    ids = tokens(2, 12)
    before = full_logits(model, ids)
    add_mask_token(model, TINY_VOCAB)
    torch.testing.assert_close(full_logits(model, ids)[..., :TINY_VOCAB], before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask_id", [0, -1, TINY_VOCAB + 1])
def test_add_mask_token_refuses(tmp_path, mask_id):
    tiny_model(tmp_path, tiny_config())
    with pytest.raises(InputError, match=str(mask_id)):
        add_mask_token(Transformer.from_pretrained(tmp_path), mask_id)


# ----------------------------------------------------------------------------------------------------------------------
# Saving

@pytest.mark.parametrize("name", ["llama-biases", "llama-rope-scaling", "qwen2-mha-untied", "qwen3-gqa-tied"])
def test_saved_model_opens_in_transformers(name, tmp_path):
    tiny_model(tmp_path / "old", FAMILIES[name])
    model = Transformer.from_pretrained(tmp_path / "old")
    add_mask_token(model, TINY_VOCAB)
    (tmp_path / "new").mkdir()
    extra = {"mask_token_id": TINY_VOCAB, "k_max": 5, "prompt_format": "plain", "bidirectional": True, "steps": 12}
    save_pretrained(model, tmp_path / "new", extra)

    reference, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ids = torch.cat((tokens(2, 15), torch.full((2, 3), TINY_VOCAB)), 1)     # mask tokens too
    torch.testing.assert_close(full_logits(model, ids), reference_logits(reference, ids), atol=1e-4, rtol=0)

    again = Transformer.from_pretrained(tmp_path / "new")
    assert torch.equal(full_logits(again, ids), full_logits(model, ids))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["nanomtp"] == extra
    assert again.config.raw["nanomtp"] == reference.config.nanomtp == extra
    assert "nanomtp" not in model.config.raw                                # the model in memory is not rewritten
    # a second save, now without the argument, keeps what the folder said
    save_pretrained(again, tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["nanomtp"] == extra


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_saved_dtype(tmp_path, key):
    tiny_model(tmp_path, tiny_config())
    edit_config(tmp_path, lambda config: config.update({key: config.pop("dtype")}))
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[key] == "bfloat16" and len({"dtype", "torch_dtype"} & config.keys()) == 1
    assert "nanomtp" not in config
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reference.dtype == torch.bfloat16
    expected = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# The real SmolLM2

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 4,", "Water boils at",
           "Question: Tom has 3 apples and buys 12 more. How many?\n\n"]


@torch.no_grad()
def greedy(model, ids, count, stop):
    """The slowest honest greedy loop: one token per pass, cache and all."""
    cache, fed, out = new_cache(model, 1, len(ids) + count), ids, []
    while len(out) < count and stop not in out:
        logits = cached_pass(model, torch.tensor([fed]), cache)
        cache.advance(torch.tensor([len(fed)]))
        fed = [int(logits[0, -1].argmax())]
        out += fed
    return out


def test_smollm2_greedy_text_is_token_identical(smollm2):
    from tokenizer import Tokenizer
    tokenizer, model = Tokenizer(smollm2), Transformer.from_pretrained(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    texts = []
    for ids in [tokenizer.encode(prompt) for prompt in PROMPTS] + [tokenizer.prompt("What is 7 + 5?", "chat")]:
        expected = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                      do_sample=False, max_new_tokens=24)[0, len(ids):].tolist()
        ours = greedy(model, ids, 24, stop=2)
        assert ours == expected
        texts.append(tokenizer.decode(ours))
    # both sides read our conversion of the weights: only sense in the text shows that the conversion itself is right
    assert "Paris" in texts[0] and "12" in texts[-1]
    with torch.no_grad():
        torch.testing.assert_close(full_logits(model, torch.tensor([ids])),
                                   reference_logits(reference, torch.tensor([ids])), atol=1e-3, rtol=0)


# --- fused for decoding

@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_model_computes_the_same_and_is_not_saved(family, tmp_path):
    """Biases (qwen2) and per-head norms (qwen3) included; the other order in memory changes no number's place."""
    model = Transformer.from_pretrained(tiny_checkpoint(tmp_path, family))
    n, ids = 12, torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    positions, mask = torch.arange(n).expand(2, n), torch.ones(n, n, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(ids, positions, mask)
        fused = model.fuse()
        torch.testing.assert_close(fused(ids, positions, mask), expected, rtol=0, atol=1e-4)
    names = {name for name, _ in fused.named_parameters()}
    assert "model.layers.0.self_attn.qkv_proj.weight" in names and "model.layers.0.self_attn.q_proj.weight" not in names
    assert fused.model.layers[0].mlp.down_proj.weight.t().is_contiguous()
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    with pytest.raises(InputError, match="fused"):
        save_pretrained(fused, tmp_path)
