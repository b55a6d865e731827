"""
adapters.py: text is the start model's to the last bit, whatever was trained; only adapters and the
mask token's row are; the teacher is the same module; and what is saved comes back.
"""
import functools
import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB, log_rows, random_prompts, tiny_checkpoint, train_briefly
from safetensors.torch import load_file, save_file
from test_cli import assert_refused, cli

import adapters
import eval_gsm8k
import sample
import train
from adapters import (
    Adapted, AdaptedLinear, add_adapters, load_adapted, on_disk, start_of, trained_weights)
from common.files import read_json, write_json
from common.records import fingerprint
from common.tokenizer import Tokenizer
from model import Transformer, add_mask_token, run_blocks
from mtp import make_batch, region_loss
from sample import generate, load
from speculate import speculate

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen2", "untied"])
def start(request, tmp_path_factory):
    """A start checkpoint: with and without biases, tied and untied."""
    folder = tmp_path_factory.mktemp(request.param) / "start"
    family = "qwen2" if request.param == "qwen2" else "llama"
    return tiny_checkpoint(folder, family, tied=request.param != "untied")


FLAGS = ["--adapters", 4, "--k", 3, "--steps", 3, "--batch-size", 2, "--seq-len", 96, "--lr", 3e-2,
         "--warmup", 0, "--cooldown", 0, "--eval-every", 0, "--dtype", "fp32"]


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """The --out of three steps: read it, never write to it."""
    return train_briefly(tmp_path_factory.mktemp("trained") / "out", *FLAGS, "--model", start)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_text_is_the_starts_to_the_last_bit(start, trained):
    """In one pass with mask tokens, too: what stands before them does not see them."""
    ours, theirs = load_adapted(trained / "latest"), Transformer.from_pretrained(start)
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    positions = torch.arange(5)[None]
    with torch.no_grad():
        assert any(p.abs().sum() > 0 for name, p in trained_weights(ours).items() if "_B" in name)
        expected = theirs(ids, positions, causal(5))
        assert torch.equal(ours(ids, positions, causal(5))[..., :TINY_VOCAB], expected)
        masks = torch.full((1, 2), TINY_VOCAB)
        longer = torch.cat((ids, masks), dim=1)
        logits = ours(longer, torch.arange(7)[None], causal(7))
        torch.testing.assert_close(logits[:, :5, :TINY_VOCAB], expected)
        # and behind the text the adapters do something
        for layer in ours.modules():
            if isinstance(layer, AdaptedLinear):
                layer.lora_B.zero_()
        plain = ours(longer, torch.arange(7)[None], causal(7))
        assert not torch.allclose(plain[:, 5:], logits[:, 5:])


def test_no_start_weight_changes_by_a_bit(start, tmp_path, monkeypatch):
    """In the module that was trained, and on disk there is none of them."""
    students, make = [], train.load_for_adapters

    def spy(*args):
        students.append(make(*args)[0])
        return students[-1], students[-1]

    monkeypatch.setattr(train, "load_for_adapters", spy)
    out = train_briefly(tmp_path / "out", *FLAGS, "--model", start)
    student, = students
    state = student.state_dict()
    for name, x in load_file(start / "model.safetensors").items():
        own = state[name]
        assert torch.equal(own[:len(x)], x), name
    moved = {name for name, p in trained_weights(student).items()}
    assert moved == {name for name in state if "lora" in name or "mask_row" in name}
    there = load_file(out / "latest" / "adapters" / "adapter_model.safetensors")
    assert set(there) == {on_disk(name) for name in moved}
    assert not (out / "latest" / "model.safetensors").exists()
    assert all(there[on_disk(name)].abs().sum() > 0 for name in moved)


@pytest.mark.parametrize("prompt", range(4))
def test_k1_and_lossless_are_the_start_model(start, trained, prompt):
    prompts = random_prompts(3, seed=prompt)
    plain, tokenizer, _, _ = load(str(start), CPU, torch.float32)
    model, own, note, _ = load(str(trained), CPU, torch.float32)
    tokenizer.stop_ids = own.stop_ids = set()
    texts = [a.tokens for a in generate(plain, tokenizer, prompts, max_new_tokens=20)]
    assert note["k_max"] == 3
    for results in (generate(model, own, prompts, max_new_tokens=20),
                    speculate(model, own, prompts, 3, max_new_tokens=20),
                    speculate(model, own, prompts, 3, max_new_tokens=20, narrow=True)):
        assert [a.tokens for a in results] == texts


@pytest.mark.parametrize("k, threshold", [(2, None), (3, None), (3, 0.02)])
def test_fused_decoding_is_that_of_the_modules(trained, k, threshold):
    """`model.fuse` joins adapters as it joins matrices."""
    slow = load_adapted(trained / "latest").eval()
    fast, tokenizer, _, _ = load(str(trained), CPU, torch.float32)
    prompts = random_prompts(4, seed=9)
    ways = [generate(model, tokenizer, prompts, k, threshold, max_new_tokens=16)
            for model in (slow, fast)]
    assert [a.tokens for a in ways[0]] == [a.tokens for a in ways[1]]
    assert [a.chunks for a in ways[0]] == [a.chunks for a in ways[1]]


def test_adapters_are_what_a_dense_reference_computes(start):
    """B A x at mask tokens, by hand; training starts from the start model."""
    model = Transformer.from_pretrained(start)
    add_mask_token(model, TINY_VOCAB)
    add_adapters(model, 4, TINY_VOCAB, seed=1)
    layer = model.model.layers[0].mlp.up_proj
    assert not layer.lora_B.any() and layer.lora_A.any()
    with torch.no_grad():
        layer.lora_B.normal_()
        ids = torch.tensor([[3, TINY_VOCAB, 5], [TINY_VOCAB, TINY_VOCAB, 8]])
        model.model.embed_tokens(ids)
        x = torch.randn(2, 3, 64)
        delta = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
        by_hand = (ids == TINY_VOCAB)[..., None] * (x @ (layer.lora_B @ layer.lora_A).T)
        torch.testing.assert_close(delta, by_hand, rtol=1e-4, atol=1e-4)


def gradients_of(model, batch, forward, tokenizer, dtype):
    """Loss and gradients of one pass, with `forward` as the model's forward pass."""
    model.zero_grad()
    call = functools.partial(forward, model)
    call.output_matrix = model.output_matrix
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, seen = region_loss(call, call, batch, tokenizer, batch.truth.numel())
    loss.backward()
    return loss.item(), seen, {name: p.grad for name, p in trained_weights(model).items()}


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reading_the_text_once_changes_nothing(start, k, dtype, bidirectional):
    """Against the plain Transformer's forward, which reads all of it twice and with gradient: rows
    of different lengths, with padding in text and regions."""
    model = add_adapters(Adapted.from_pretrained(start, dtype), 4, TINY_VOCAB - 1)
    with torch.no_grad():
        for name, p in trained_weights(model).items():
            if name.endswith("lora_B"):
                p.normal_(std=0.1)
    tokenizer = SimpleNamespace(mask_id=TINY_VOCAB - 1, stop_ids={2}, end_id=2)
    rng = random.Random(k)
    rows = [(n // 2, [rng.randrange(3, TINY_VOCAB - 1) for _ in range(n)]) for n in (9, 22, 14)]
    batch = make_batch(rows, k, 1, 2, tokenizer, CPU, bidirectional)
    loss, seen, own = gradients_of(model, batch, Adapted.forward, tokenizer, dtype)
    plain, seen_plain, expected = gradients_of(model, batch, Transformer.forward, tokenizer, dtype)
    close = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.1, atol=2e-2)
    assert loss == pytest.approx(plain, rel=1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        assert torch.equal(seen.rollout, seen_plain.rollout)
        assert torch.equal(seen.targets, seen_plain.targets)
    assert own.keys() == expected.keys()
    for name in own:
        assert own[name].abs().max() > 0
        torch.testing.assert_close(own[name], expected[name], **close)


def test_the_text_is_read_once_for_both(start, monkeypatch):
    """And anew in every pass of a student, also where it is the same one: under FSDP all ranks need
    the same passes, whatever they read. Who reads another text without gradient gets a plain pass.
    """
    model = add_adapters(Adapted.from_pretrained(start), 4, TINY_VOCAB - 1)
    tokenizer = SimpleNamespace(mask_id=TINY_VOCAB - 1, stop_ids={2}, end_id=2)
    passes = []

    def spy(blocks, x, *rest, **more):
        passes.append((x.shape[1], torch.is_grad_enabled()))
        return run_blocks(blocks, x, *rest, **more)

    monkeypatch.setattr(adapters, "run_blocks", spy)
    for text in ([5] * 12, [6] * 12, [6] * 12):
        batch = make_batch([(6, text)], 3, 0, 2, tokenizer, CPU)
        region_loss(model, model, batch, tokenizer, 1)
    regions = batch.ids.shape[1] - 12
    both = [(regions, True), (regions, False)]              # student and teacher
    assert passes == [(12, False), *both] * 3
    batch = make_batch([(6, [7] * 12)], 3, 0, 2, tokenizer, CPU)
    with torch.no_grad():
        ours = model(batch.ids, batch.position, batch.mask)
        plain = Transformer.forward(model, batch.ids, batch.position, batch.mask)
    assert torch.equal(ours, plain) and len(passes) == 9


def test_slot_1_agrees_always_and_the_others_learn(tmp_path, tiny):
    """Slot 1 is the teacher, which is the student. Three rows, over and over."""
    out = train_briefly(tmp_path / "out", "--model", tiny, *FLAGS, "--steps", 60, "--limit", 3,
                        "--lr", 1e-2, "--adapters", 16, "--batch-size", 3)
    rows = log_rows(out, "train")
    assert all(row["agreement"][0] == 1 for row in rows)
    early, late = rows[:5], rows[-5:]
    assert sum(row["loss"] for row in late) < 0.8 * sum(row["loss"] for row in early)


def test_resumed_is_bit_equal(start, tmp_path):
    whole = train_briefly(tmp_path / "whole", *FLAGS, "--model", start, "--steps", 6)
    parts = train_briefly(tmp_path / "parts", *FLAGS, "--model", start, "--steps", 3)
    train_briefly(parts, *FLAGS, "--model", start, "--steps", 6, "--resume", "--merge-start")
    assert (parts / "latest" / "model.safetensors").exists()        # it may be wanted later
    ours, theirs = (load_file(out / "latest" / "adapters" / "adapter_model.safetensors")
                    for out in (parts, whole))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert [row["loss"] for row in log_rows(parts, "train")] == [
        row["loss"] for row in log_rows(whole, "train")]


def test_the_folder(start, trained):
    """PEFT's names, the start's name and hash, and a tokenizer with the mask token."""
    described = read_json(trained / "latest" / "adapters" / "adapter_config.json")
    assert described["peft_type"] == "LORA" and described["r"] == described["lora_alpha"] == 4
    assert described["base_model_name_or_path"] == str(start)
    assert described["alora_invocation_tokens"] == [TINY_VOCAB]         # PEFT leaves text alone
    names = set(load_file(trained / "latest" / "adapters" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.embed_tokens.mask_row" in names
    assert len(names) == 2 * 7 * 2 + 1
    assert Tokenizer(trained / "latest").mask_id == TINY_VOCAB


def test_merge_start_writes_a_whole_folder(start, trained, tmp_path):
    """The start's weight file to the byte; it needs the start no longer; the adapters are those of
    the same training without the flag. Other adapters make another fingerprint."""
    moved = shutil.copytree(start, tmp_path / "start")
    out = train_briefly(tmp_path / "out", *FLAGS, "--model", moved, "--merge-start")
    whole = out / "latest"
    shutil.rmtree(moved)
    assert ((whole / "model.safetensors").read_bytes()
            == (start / "model.safetensors").read_bytes())
    config = read_json(whole / "config.json")
    assert config["vocab_size"] == TINY_VOCAB
    assert "pard_token" not in config       # engines that look for it know no adapters
    name = "adapters/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (trained / "latest" / name).read_bytes()
    prompts = random_prompts(3, seed=1)
    answers = []
    for folder in (whole, trained / "latest"):
        model, tokenizer, note, _ = load(str(folder), CPU, torch.float32)
        assert note["adapters"] == 4
        answers.append([answer.tokens for answer in generate(
            model, tokenizer, prompts, 3, 0.1, max_new_tokens=20)])
    assert answers[0] == answers[1]

    assert (start_of(trained / "latest"), start_of(whole)) == (start, whole)    # for transformers
    assert fingerprint(whole) != fingerprint(trained / "latest") != fingerprint(start)
    weights = load_file(whole / name)
    weights["base_model.model.model.embed_tokens.mask_row"] += 1
    before = fingerprint(whole)
    save_file(weights, whole / name)
    assert fingerprint(whole) != before


def test_merge_start_of_shards(tmp_path):
    from transformers import AutoModelForCausalLM

    single = tiny_checkpoint(tmp_path / "single", "llama")
    sharded = shutil.copytree(single, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(sharded, max_shard_size="40KB")
    out = train_briefly(tmp_path / "out", *FLAGS, "--model", sharded, "--merge-start")
    written = sorted(file.name for file in (out / "latest").glob("*model*"))
    assert written == sorted(file.name for file in sharded.glob("*model*")) and len(written) > 2
    load_adapted(out / "latest")


def test_what_does_not_belong_together_is_refused(start, trained, tmp_path):
    folder = shutil.copytree(trained / "latest", tmp_path / "adapters")
    moved = shutil.copytree(start, tmp_path / "moved")
    where = folder / "adapters" / "adapter_config.json"
    described = read_json(where)

    def refused(message, **changes):
        write_json(where, described | changes)
        assert_refused(cli(sample, "x", "--model", folder), message)

    refused("no folder", base_model_name_or_path=str(tmp_path / "nosuch"))
    refused("not between", r=0)
    refused("adapter_config.json", r="4")
    refused("adapter_config.json lacks", base_model_name_or_path=None)
    refused("is not of shape", r=5)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    refused("was trained on another", base_model_name_or_path=str(moved))
    write_json(where, described)
    own = load_file(folder / "adapters" / "adapter_model.safetensors")
    name = next(iter(own))
    own[name][0] = float("nan")
    save_file(own, folder / "adapters" / "adapter_model.safetensors")
    assert_refused(cli(sample, "x", "--model", folder), "not finite")
    own.pop(name)
    save_file(own, folder / "adapters" / "adapter_model.safetensors")
    assert_refused(cli(sample, "x", "--model", folder), "adapter_model.safetensors is damaged")


def test_adapters_are_no_start(trained, tmp_path):
    result = cli(train, "--model", trained, "--out", tmp_path / "out")
    assert_refused(result, "holds adapters: give --model their start checkpoint")


@pytest.mark.parametrize("flags", [
    ["--k", 1, "--targets", "ground-truth"], ["--random-init"], ["--prefix-loss", 1],
    ["--slot1-weight", 2]])
def test_flags_that_do_not_go_with_it(tiny, tmp_path, flags):
    result = cli(train, "--model", tiny, "--adapters", 4, *flags, "--out", tmp_path / "out")
    assert_refused(result, "--adapters leaves the text as it is")
    assert_refused(cli(train, "--model", tiny, "--adapters", 4, "--heads", 2), "--adapters belongs")
    assert_refused(cli(train, "--model", tiny, "--merge-start"), "--merge-start belongs to")


@pytest.mark.parametrize("method", [["--adapters", "4"], ["--heads", "2"]])
def test_no_preset_stands_in_the_way(monkeypatch, method):
    """No flag is refused that nobody typed."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "smollm2", *method])
    args = train.get_args()
    assert args.model == "smollm2-135m" and (args.adapters or args.heads)


def test_evaluation_beside_the_start(start, trained, tmp_path):
    """k = 1 is the baseline: the same answers, the same loss."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{a} + 3", "answer": f"{a + 3}"}) + "\n"
                            for a in range(4)))
    out = tmp_path / "eval"
    result = cli(eval_gsm8k, "--model", trained, "--baseline", start, "--data", path, "--k", 2,
                 "--lossless", "--max-new-tokens", 8, "--out", out)
    assert result.code == 0, result
    table = {entry["strategy"]: entry for entry in json.loads(
        (out / "table.json").read_text())["table"]}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()[1:]]
    by_name = {name: [row["tokens"] for row in rows if row["strategy"] == name] for name in table}
    assert by_name["start, k = 1"] == by_name["k = 1"] == by_name["lossless 3"]
