"""
studies/plan.py: the arithmetic against what autograd keeps and what tensors take in real steps.
(What it refuses is in test_cli.py.)
"""
import sys

import pytest
import torch
from conftest import tiny_config, tiny_model, train_briefly
from test_cli import cli
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters import Adapted, add_adapters
from common.files import read_json
from common.machine import DTYPES
from heads import Heads
from model import Config, Transformer
from studies import plan

CPU = torch.device("cpu")


def settings(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    return plan.get_args()


# --------------------------------------------------------------------------------------------------
# The estimate

def kept_by_autograd(model, dtype, run):
    """Bytes of the tensors, parameters aside, that autograd keeps of `run()`."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage     # held, so that no other gets the same address
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")):
        assert run().requires_grad
    return sum(storage.nbytes() for storage in found.values())


def of_layers(family):
    """Configs of 3 layers and of 1: what the two keep differs by what 2 layers keep."""
    return [Config.from_dict(tiny_config(family, num_hidden_layers=n)) for n in (3, 1)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype, sharded", [("fp32", False), ("bf16", False), ("bf16", True)])
def test_kept_is_what_autograd_keeps(family, dtype, sharded, monkeypatch):
    """To the byte, of 2 sequences of L tokens. Under FSDP a bf16 pass has weights that are bf16
    themselves."""
    def kept(config, L):
        model = Transformer(config).to(DTYPES[dtype] if sharded else torch.float32)
        ids = torch.zeros(2, L, dtype=torch.long)
        mask = torch.ones(2, L, L, dtype=torch.bool).tril()
        return kept_by_autograd(model, dtype, lambda: model(
            ids, torch.arange(L).expand(2, L), mask, head=False))

    (three, one), args = of_layers(family), settings(monkeypatch)
    a, autocast = DTYPES[dtype].itemsize, dtype == "bf16" and not sharded
    s = 4 if autocast else a
    for L in (20, 75):
        measured = kept(three, L) - kept(one, L)
        if autocast:                                # its copies have a row of their own
            more, fewer = (plan.count_parameters(c, args).matrices for c in (three, one))
            measured -= 2 * (more - fewer)
        assert measured == 2 * 2 * L * sum(plan.kept_by_block(one, L, a, s, autocast, "fused"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["fused", "math"])
def test_kept_by_adapters(family, dtype, attention, monkeypatch):
    """To the byte: 2 sequences of 20 text tokens and `masks` mask tokens."""
    def kept(config, masks):
        model = Adapted(config).to(DTYPES[dtype])
        add_adapters(model, rank=5, mask_id=7)
        ids = torch.tensor([20 * [0] + masks * [7]] * 2)
        positions = torch.cat((torch.arange(20), 3 + torch.arange(masks))).expand(2, -1)
        mask = torch.ones(2, 20 + masks, 20 + masks, dtype=torch.bool).tril()
        with sdpa_kernel({"fused": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[attention]):
            return kept_by_autograd(model, dtype, lambda: model(ids, positions, mask, head=False))

    (three, one), args = of_layers(family), settings(monkeypatch, "--adapters", 5)
    for masks in (9, 40):
        measured = kept(three, masks) - kept(one, masks)
        if dtype == "bf16":
            more, fewer = (plan.count_parameters(c, args).copied for c in (three, one))
            measured -= 2 * (more - fewer)
        sizes, key = plan.kept_by_frozen_block(
            one, 20 + masks, DTYPES[dtype].itemsize, 5, attention)
        assert measured == 2 * 2 * (masks * sum(sizes) + (20 + masks) * key)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kept_by_heads(family, dtype, monkeypatch):
    """To the byte: what a third head keeps of 2 sequences of T tokens, of which it reads T - 3."""
    config = Config.from_dict(tiny_config(family))

    def kept(depth, T):
        heads = Heads(config, depth)
        embedded, states = torch.randn(2, 2, T, config.hidden_size, dtype=DTYPES[dtype])
        return kept_by_autograd(heads, dtype, lambda: heads(embedded, states)[-1])

    a, D = DTYPES[dtype].itemsize, config.head_dim
    for T in (20, 75):
        measured = kept(3, T) - kept(2, T)
        if dtype == "bf16":
            more, fewer = (plan.count_parameters(config, settings(monkeypatch, "--heads", n)).copied
                           for n in (3, 2))
            measured -= 2 * (more - fewer)
        own = sum(plan.kept_by_block(config, T - 3, a, a, dtype == "bf16", "fused"))
        own += plan.kept_around_block(config.hidden_size, a) + 2 * a * D        # cos, sin
        more = a * (T - 3) ** 2 + 2 * 4 * config.hidden_size        # mask; a state that none reads
        assert measured == 2 * (T - 3) * own + more


def test_parameters(tmp_path, monkeypatch):
    """As many as transformers' models have, and as the hub says of the known ones."""
    args = settings(monkeypatch)
    for name, config in (("llama", tiny_config("llama")),
                         ("qwen3", tiny_config("qwen3", tied=False))):
        model = tiny_model(tmp_path / name, config)
        counts = plan.count_parameters(plan.load_config(str(tmp_path / name)), args)
        layers = model.model.layers
        assert counts.model == sum(p.numel() for p in model.parameters())
        assert counts.matrices == sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        assert counts.block == sum(p.numel() for p in layers[0].parameters())
        assert counts[3:] == (0, 0, 0)
    totals = {name: plan.count_parameters(plan.load_config(name), args).model
              for name in plan.KNOWN}
    assert totals == {
        "smollm2-135m": 134_515_008, "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248}


@pytest.mark.parametrize("flags", ["--adapters 5", "--heads 4", "--heads 4 --loop",
                                   "--heads 4 --extend"])
def test_parameters_beside_a_frozen_model(flags, monkeypatch):
    """Those that train.py's optimiser gets; and as many in matrices."""
    args = settings(monkeypatch, "--dtype", "fp32", *flags.split())
    config = Config.from_dict(tiny_config("qwen3"))
    counts = plan.count_parameters(config, args)
    student, _ = plan.load_random(args, config, CPU)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert counts.trained == sum(p.numel() for p in trained)
    assert counts.copied == sum(p.numel() for p in trained if p.dim() == 2)
    frozen = {"--adapters 5": 0, "--heads 4 --extend": counts.trained}.get(flags, 0)
    assert counts.added == counts.trained + frozen
    assert counts.model == plan.count_parameters(config, settings(monkeypatch)).model


# Where the peak is: in the logits of a large vocabulary, in the head's gradient of a wide model, in
# the layers
LOGITS = dict(vocab_size=6000, hidden_size=32, intermediate_size=64)
HEAD = dict(vocab_size=4000, hidden_size=256, intermediate_size=256)
LAYERS = dict(vocab_size=300, hidden_size=96, intermediate_size=320, num_hidden_layers=3)
BLOCK = dict(vocab_size=40, hidden_size=96, intermediate_size=960, num_hidden_layers=1)


@pytest.mark.parametrize("family, tied, config, flags", [
    ("llama", True, LOGITS, "--seq-len 60 --k 4"),
    ("llama", True, LOGITS, "--seq-len 60 --k 4 --targets soft"),
    ("qwen3", False, LOGITS, "--seq-len 100 --k 4 --dtype bf16"),
    ("llama", False, HEAD, "--seq-len 24 --k 3 --stride 6 --dtype bf16"),
    ("llama", True, HEAD, "--seq-len 24 --k 3 --stride 6 --batch-size 2"),  # end of the backward
    ("llama", True, HEAD, "--seq-len 24 --k 3 --stride 6 --prefix-loss 1 --slot1-weight 2"),
    ("llama", True, LAYERS, "--seq-len 90 --k 5"),
    ("llama", True, LAYERS, "--seq-len 90 --k 5 --bidirectional"),
    ("qwen3", True, LAYERS, "--seq-len 60 --k 8 --dtype bf16"),
    ("qwen3", True, LAYERS, "--seq-len 90 --k 8 --attention math"),
    ("llama", True, LAYERS, "--seq-len 200 --k 1 --targets ground-truth"),
])
def test_estimate_is_what_steps_take(family, tied, config, flags, monkeypatch):
    check_steps(family, tied, config, flags, monkeypatch)


@pytest.mark.parametrize("family, tied, config, flags", [
    ("llama", True, LOGITS, "--seq-len 60 --k 4"),
    ("llama", True, LOGITS, "--seq-len 60 --k 4 --targets soft"),
    ("qwen3", False, LOGITS, "--seq-len 100 --k 4 --dtype bf16"),
    ("llama", False, HEAD, "--seq-len 24 --k 3 --stride 6 --dtype bf16"),   # the head in fp32
    ("llama", True, HEAD, "--seq-len 24 --k 3 --stride 6 --batch-size 2"),  # end of the backward
    ("llama", True, LAYERS, "--seq-len 40 --k 2 --stride 10 --adapters 500"),       # the optimiser
    ("llama", True, LAYERS, "--seq-len 90 --k 5 --bidirectional"),
    ("llama", True, LAYERS, "--seq-len 90 --k 5 --dtype bf16"),
    ("qwen3", True, LAYERS, "--seq-len 90 --k 8 --attention math"),
    ("qwen3", True, LAYERS, "--seq-len 200 --k 2 --stride 50"),             # the text
    ("qwen3", True, LAYERS, "--seq-len 200 --k 2 --stride 50 --dtype bf16"),
    ("llama", True, LAYERS, "--seq-len 90 --k 8 --targets ground-truth"),
    ("llama", True, BLOCK, "--seq-len 100 --k 8 --dtype bf16"),
])
def test_estimate_of_adapters(family, tied, config, flags, monkeypatch):
    check_steps(family, tied, config, "--adapters 12 " + flags, monkeypatch)


@pytest.mark.parametrize("family, tied, config, flags", [
    ("llama", True, LOGITS, "--seq-len 60 --heads 3"),
    ("llama", True, LOGITS, "--seq-len 60 --heads 3 --dtype bf16"),
    ("qwen3", False, LOGITS, "--seq-len 100 --heads 3 --dtype bf16 --draft-vocab 2000"),
    ("llama", False, HEAD, "--seq-len 24 --heads 4 --dtype bf16"),          # the optimiser
    ("llama", True, HEAD, "--seq-len 24 --heads 2 --batch-size 2"),         # end of the backward
    ("llama", True, HEAD, "--seq-len 24 --heads 4 --loop"),
    ("llama", True, LAYERS, "--seq-len 90 --heads 4 --loop --kl-weight 0"),
    ("llama", True, LAYERS, "--seq-len 90 --heads 4 --extend --kl-top 20"),
    ("qwen3", True, LAYERS, "--seq-len 200 --heads 6 --dtype bf16 --targets ground-truth"),
    ("qwen3", True, LAYERS, "--seq-len 200 --heads 2 --attention math"),
    ("llama", True, BLOCK, "--seq-len 100 --heads 3 --dtype bf16"),
    ("llama", True, BLOCK, "--seq-len 200 --heads 1 --batch-size 200 --micro-batch-size 1"),
])
def test_estimate_of_heads(family, tied, config, flags, monkeypatch):
    check_steps(family, tied, config, flags, monkeypatch)


def check_steps(family, tied, config, flags, monkeypatch):
    """The estimate is within 3% of what tensors take in two real steps."""
    common = "--batch-size 4 --micro-batch-size 2 --dtype fp32 "
    args = settings(monkeypatch, *(common + flags).split())
    config = Config.from_dict(tiny_config(family, tied, **config))
    counts = plan.count_parameters(config, args)
    estimated = plan.total(plan.estimate(args, config, counts, args.micro_batch_size))
    assert estimated == pytest.approx(plan.most_in_tensors(args, config, CPU), rel=0.03)


def test_by_hand(monkeypatch, tiny):
    """What lies there all the time, for one GPU, two with DDP and two with FSDP; and the shapes."""
    common = "--batch-size", 8, "--micro-batch-size", 3, "--seq-len", 50, "--dtype", "bf16"
    flags = *common, "--k", 4, "--stride", 5
    config = plan.load_config(str(tiny))
    P, matrices, block = plan.count_parameters(config, settings(monkeypatch))[:3]

    def sizes(*more, flags=flags):
        args = settings(monkeypatch, *flags, *more)
        rows = plan.estimate(args, config, plan.count_parameters(config, args), 3)
        return {what: size for size, what, _ in rows}

    # anchors 10, 15, .. 45; 50 + 8 * 3 tokens; 3 * 8 * 4 slots; 8 rows take 3 passes
    args = settings(monkeypatch, *flags, "--prompt-tokens", 11)
    assert plan.shapes(args, 3) == (3, 3, 8, 74, 96, 0)
    assert plan.shapes(args, 100)[:2] == (8, 1)

    one, ddp, fsdp = sizes(), sizes("--gpus", 2), sizes("--gpus", 2, "--fsdp")
    weights, moments = "student's weights, fp32", "AdamW's two moments, fp32"
    teacher, copies = "teacher's weights, bf16", "autocast: bf16 copies of the matrices"
    gradients = "gradients of the passes before, fp32"
    assert [one[what] for what in (weights, moments, teacher, gradients, copies)] == [
        4 * P, 8 * P, 2 * P, 4 * P, 2 * matrices]
    assert [ddp[what] for what in (weights, moments, teacher, gradients, copies)] == [
        4 * P, 8 * P, 2 * P, 4 * P, 2 * matrices]
    assert [fsdp[what] for what in (weights, moments, teacher, gradients)] == [
        2 * P, 4 * P, P, 2 * P]
    assert fsdp["FSDP: what is gathered for now"] == 2 * 2 * 300 * 64 + 10 * block
    assert copies not in fsdp
    assert gradients not in sizes("--micro-batch-size", 4, "--batch-size", 3)

    # one frozen model, and on top what is trained: A and B beside 7 matrices in each of 2 layers;
    # a block and one matrix more for each head, and 4 norms beside the block's 2
    adapters, heads = sizes("--adapters", 5), sizes("--heads", 2, flags=common)
    A = 5 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)) + 64
    of_two = 2 * (block + 2 * 64 * 64 + 3 * 64)
    assert [adapters[what] for what in ("frozen weights, bf16", "adapters, fp32", moments)] == [
        2 * P, 4 * A, 8 * A]
    assert [heads[what] for what in ("frozen weights, bf16", "heads, fp32", moments)] == [
        2 * P, 4 * of_two, 8 * of_two]
    assert adapters["gradients, fp32"] == 4 * A and heads["gradients, fp32"] == 4 * of_two


# --------------------------------------------------------------------------------------------------
# The script

def test_attention(monkeypatch):
    """On CUDA keys and values are kept for every query head."""
    config = Config.from_dict(tiny_config("llama"))         # 4 query heads, 2 of keys and values
    H, G, D = 4, 2, 16
    query, key = plan.kept_by_attention(config, 50, 2, "fused")
    assert plan.kept_by_attention(config, 50, 2, "repeated") == (query, key * H // G)
    assert key == 2 * 2 * G * D
    assert settings(monkeypatch, "--device", "cpu").attention == "fused"


def test_flags_and_presets_are_those_of_train(monkeypatch):
    args = settings(monkeypatch, "--preset", "paper", "--k", 4)
    assert (args.k, args.stride, args.seq_len) == (4, 17, 160)
    assert (args.prompt_tokens, args.fsdp) == (40, False)


def test_heads_of_the_start_do_not_count(monkeypatch, tiny, tmp_path):
    """As a start checkpoint, what has heads counts without them."""
    out = train_briefly(tmp_path / "out", "--model", tiny, "--heads", 2)
    args = settings(monkeypatch)
    with_heads, without = (plan.load_config(str(folder)) for folder in (out, tiny))
    assert plan.count_parameters(with_heads, args) == plan.count_parameters(without, args)


@pytest.mark.parametrize("method", ["", "--adapters 64", "--heads 4"])
def test_memory(method, monkeypatch, tmp_path):
    """The micro-batch that is called the largest fits, one more does not."""
    out = tmp_path / "plan.json"
    flags = ("--preset", "paper", "--model", "Qwen/Qwen3-0.6B", "--dtype", "bf16", "--out", out,
             *method.split())
    result = cli(plan, *flags, "--memory", 1, 10, 1000)
    assert result.code == 0, result
    record = read_json(out)
    best = record["largest_micro_batch_size"]
    assert best["1"] == 0 and best["1000"] == 128
    assert "1 GB: does not fit, not even --micro-batch-size 1" in result.out
    args, config = settings(monkeypatch, *flags), plan.load_config("Qwen/Qwen3-0.6B")
    counts = plan.count_parameters(config, args)
    if method:                              # with all weights, 10 GB is too little
        assert 8 <= best["10"] < 128
        assert f"10 GB: fits, the largest --micro-batch-size that does: {best['10']}" in result.out
    for size, fits in ((best["10"], True), (best["10"] + 1, False)):
        rows = plan.estimate(args, config, counts, max(1, size))
        assert (plan.total(rows) <= 10e9 * (1 - plan.SPARE)) == (fits and size > 0)
    estimated = record["estimated_bytes"]
    assert estimated == pytest.approx(sum(row[0] for row in record["rows"]))
    assert f"{estimated / 1e9:.3f} GB  in all\n" in result.out
    assert ("--keep-gb" in result.out) == ("--heads" in method)
    assert {"device", "torch", "commit"} < record.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("method", ["--k 3", "--k 3 --adapters 4", "--heads 2 --draft-vocab 100"])
def test_measure(method, monkeypatch, tmp_path):
    """Measured right here: a process of its own would import everything anew."""
    monkeypatch.setattr(plan, "measure_apart", plan.measure)
    result = cli(plan, "--batch-size", 1, "--seq-len", 40, "--prompt-tokens", 30, "--measure",
                 "--dtype", "fp32", "--device", "cpu", "--out", tmp_path / "plan.json",
                 *method.split())
    assert result.code == 0, result
    record = read_json(tmp_path / "plan.json")
    measured = record["measured_bytes"]["tensors"]
    assert measured == pytest.approx(record["estimated_bytes"], rel=0.15)
    ratio = record["estimated_bytes"] / measured
    assert f"GB  measured: the estimate is {ratio:.2f} of it\n" in result.out
    assert "GB  by which the process grew" in result.out
