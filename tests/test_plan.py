"""
studies/plan.py: the arithmetic against what autograd keeps and what tensors take in real steps.
(What it refuses is in test_cli.py.)
"""
import sys

import pytest
import torch
from conftest import tiny_config, tiny_model, train_briefly
from test_cli import assert_refused, cli

from common.files import read_json
from common.machine import DTYPES
from model import Config, Transformer
from studies import plan

CPU = torch.device("cpu")


def settings(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    return plan.get_args()


# --------------------------------------------------------------------------------------------------
# The estimate

def kept_by_autograd(config, L, dtype, sharded):
    """Bytes of the tensors, parameters aside, that a pass of 2 sequences of L tokens keeps."""
    model = Transformer(config).to(DTYPES[dtype] if sharded else torch.float32)
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage     # held, so that no other gets the same address
        return tensor

    ids = torch.zeros(2, L, dtype=torch.long)
    mask = torch.ones(2, L, L, dtype=torch.bool).tril()
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")):
        hidden = model(ids, torch.arange(L).expand(2, L), mask, head=False)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype, sharded", [("fp32", False), ("bf16", False), ("bf16", True)])
def test_kept_is_what_autograd_keeps(family, dtype, sharded):
    """To the byte: models of 3 layers and of 1 differ by 2. Under FSDP a bf16 pass has weights that
    are bf16 themselves."""
    three, one = (Config.from_dict(tiny_config(family, num_hidden_layers=n)) for n in (3, 1))
    copies = 2 * (plan.count_parameters(three)[1] - plan.count_parameters(one)[1])
    a = DTYPES[dtype].itemsize
    for L in (20, 75):
        measured, of_one = (kept_by_autograd(c, L, dtype, sharded) for c in (three, one))
        measured -= of_one
        if dtype == "bf16" and not sharded:         # autocast's copies have a row of their own
            measured -= copies
        assert measured == 2 * 2 * L * sum(plan.kept(one, L, a, a if sharded else 4, "fused"))


def test_parameters(tmp_path):
    """As many as transformers' models have, and as the hub says of the known ones."""
    for name, config in (("llama", tiny_config("llama")),
                         ("qwen3", tiny_config("qwen3", tied=False))):
        model = tiny_model(tmp_path / name, config)
        total, matrices, block = plan.count_parameters(plan.load_config(str(tmp_path / name)))
        layers = model.model.layers
        assert total == sum(p.numel() for p in model.parameters())
        assert matrices == sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        assert block == sum(p.numel() for p in layers[0].parameters())
    totals = {name: plan.count_parameters(plan.load_config(name))[0] for name in plan.KNOWN}
    assert totals == {
        "smollm2-135m": 134_515_008, "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248}


# Where the peak is: in the logits of a large vocabulary, in the head's gradient of a wide model, in
# the layers
LOGITS = dict(vocab_size=6000, hidden_size=32, intermediate_size=64)
HEAD = dict(vocab_size=4000, hidden_size=256, intermediate_size=256)
LAYERS = dict(vocab_size=300, hidden_size=96, intermediate_size=320, num_hidden_layers=3)


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
    common = "--batch-size 4 --micro-batch-size 2 --dtype fp32 "
    args = settings(monkeypatch, *(common + flags).split())
    config = Config.from_dict(tiny_config(family, tied, **config))
    counts = plan.count_parameters(config)
    estimated = plan.total(plan.estimate(args, config, counts, args.micro_batch_size))
    close = 0.1 if args.targets == "ground-truth" else 0.03     # a teacher's work is counted
    assert estimated == pytest.approx(plan.most_in_tensors(args, config, CPU), rel=close)


def test_by_hand(monkeypatch, tiny):
    """What lies there all the time, for one GPU, two with DDP and two with FSDP; and the shapes."""
    flags = ("--batch-size", 8, "--micro-batch-size", 3, "--seq-len", 50, "--k", 4, "--stride", 5,
             "--dtype", "bf16")
    config = plan.load_config(str(tiny))
    P, matrices, block = counts = plan.count_parameters(config)

    def sizes(*more):
        rows = plan.estimate(settings(monkeypatch, *flags, *more), config, counts, 3)
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


# --------------------------------------------------------------------------------------------------
# The script

def test_flags_and_presets_are_those_of_train(monkeypatch):
    args = settings(monkeypatch, "--preset", "paper", "--k", 4)
    assert (args.k, args.stride, args.seq_len) == (4, 17, 160)
    assert (args.prompt_tokens, args.fsdp) == (40, False)


def test_heads_are_not_planned(monkeypatch, tiny, tmp_path):
    """Their training is refused. As a start checkpoint, what has heads counts without them."""
    for method in ("--heads", "--adapters"):
        assert_refused(cli(plan, method, 4), "planned is training of all weights with mask tokens")
    out = train_briefly(tmp_path / "out", "--model", tiny, "--heads", 2)
    config = plan.load_config(str(out))
    assert plan.count_parameters(config) == plan.count_parameters(plan.load_config(str(tiny)))


def test_memory(monkeypatch, tmp_path):
    """The micro-batch that is called the largest fits, one more does not."""
    out = tmp_path / "plan.json"
    flags = ("--preset", "paper", "--model", "Qwen/Qwen3-0.6B", "--dtype", "bf16", "--out", out)
    result = cli(plan, *flags, "--memory", 1, 24, 1000)
    assert result.code == 0, result
    record = read_json(out)
    best = record["largest_micro_batch_size"]
    assert best["1"] == 0 and 1 < best["24"] < 128 and best["1000"] == 128
    assert "1 GB: does not fit, not even --micro-batch-size 1" in result.out
    assert f"24 GB: fits, the largest --micro-batch-size that does: {best['24']}\n" in result.out
    estimated = record["estimated_bytes"]
    assert estimated == pytest.approx(sum(row[0] for row in record["rows"]))
    assert f"{estimated / 1e9:.3f} GB  in all\n" in result.out
    assert {"device", "torch", "commit"} < record.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    args, config = settings(monkeypatch, *flags), plan.load_config("Qwen/Qwen3-0.6B")
    one_more = plan.estimate(args, config, plan.count_parameters(config), best["24"] + 1)
    assert plan.total(one_more) > 24e9 * (1 - plan.SPARE)


def test_measure(monkeypatch, tmp_path):
    """Measured right here: a process of its own would import everything anew."""
    monkeypatch.setattr(plan, "measure_apart", plan.measure)
    result = cli(plan, "--batch-size", 1, "--seq-len", 40, "--k", 3, "--prompt-tokens", 30,
                 "--measure", "--dtype", "fp32", "--device", "cpu", "--out", tmp_path / "plan.json")
    assert result.code == 0, result
    record = read_json(tmp_path / "plan.json")
    measured = record["measured_bytes"]["tensors"]
    assert measured == pytest.approx(record["estimated_bytes"], rel=0.15)
    ratio = record["estimated_bytes"] / measured
    assert f"GB  measured: the estimate is {ratio:.2f} of it\n" in result.out
    assert "GB  by which the process grew" in result.out
