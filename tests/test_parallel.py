"""
train.py on two processes, by DDP and by FSDP, against one process with the same flags: the same curve, the same weights,
and checkpoints that go on either way. On CPUs, where gloo takes NCCL's place; everything else is as on GPUs.
"""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_rows, run_train

from data import draw_rows, encode_rows, load_data
from model import Transformer, add_mask_token
from tokenizer import Tokenizer

# Starting two processes takes longer than all runs together. So torchrun starts them once, and they call main() again and
# again, each time meeting at a port of its own. OUT/rank-R.json keeps what a rank was given to read.
SCRIPT = """
import json, os, signal, sys
import train

rank, read, draw, make = int(os.environ["RANK"]), [], train.draw_rows, train.make_batch
train.make_batch = lambda encoded, *rest: read[-1].extend(encoded) or make(encoded, *rest)
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"

def draw_rows(*args):
    read.append([])
    if interrupted and rank == 1 and len(read) == 3:            # the timing pass, step 1, step 2
        signal.raise_signal(signal.SIGTERM)
    return draw(*args)

train.draw_rows = draw_rows
for port, interrupted, *flags in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["train.py", *flags]
    read.clear()
    try:
        train.main()
    except SystemExit as stopped:
        assert interrupted and stopped.code == 130
    json.dump(read, open(f"{flags[-1]}/rank-{rank}.json", "w"))
"""

SPREAD = {"DDP": [], "FSDP": ["--fsdp"]}
VARIANTS = {
    "hard": ["--batch-size", 4, "--micro-batch-size", 1],               # two passes on either rank, added up
    "soft": ["--batch-size", 4, "--micro-batch-size", 2, "--targets", "soft", "--prefix-loss", 0.5, "--bidirectional"],
    "odd": ["--batch-size", 3, "--micro-batch-size", 1],                # two passes on one rank, one on the other
    "one": ["--batch-size", 1, "--targets", "ground-truth", "--prefix-loss", 0.5],      # nothing left for the other rank
    "eval": ["--batch-size", 2, "--eval-every", 2, "--eval-tokens", 6, "--save-every", 2],
}


@pytest.fixture(scope="module")
def common(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}{a % 4 * ' and on'}.\n#### {a + 3}"} for a in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--model", tiny, "--data", path, "--k", 3, "--seq-len", 64, "--eval-every", 0, "--eval-prompts", 2, "--steps", 4,
            "--warmup", 0, "--cooldown", 0, "--lr", 1e-3, "--dtype", "fp32", "--device", "cpu", "--prompt-format", "plain")


def free_ports(count):
    """Numbers of ports that nobody listens at."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def runs(common, tmp_path_factory):
    """A folder of runs: one/VARIANT, DDP/VARIANT, FSDP/VARIANT; DDP/stopped; and WAY/resumed and one/after-WAY, two steps
    of "soft" in one way and two in the other. Behind it, what the two processes printed."""
    root, jobs = tmp_path_factory.mktemp("runs"), []
    halves = (*common, *VARIANTS["soft"], "--save-every", 2)
    for way, spread in SPREAD.items():
        jobs += [(False, *common, *flags, *spread, "--out", root / way / name) for name, flags in VARIANTS.items()]
        jobs += [(False, *halves, *spread, "--resume", "--out", root / way / "resumed"),
                 (False, *halves, *spread, "--steps", 2, "--out", root / "one" / f"after-{way}")]
    jobs.append((True, *common, *VARIANTS["hard"], "--out", root / "DDP" / "stopped"))
    jobs = [[port, interrupted, *map(str, flags)] for port, (interrupted, *flags) in zip(free_ports(len(jobs)), jobs)]
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "script.py").write_text(SCRIPT)
    for name, flags in VARIANTS.items():
        run_train(*common, *flags, "--out", root / "one" / name)
    for way in SPREAD:
        run_train(*halves, "--steps", 2, "--out", root / way / "resumed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, root / "script.py", root / "jobs.json"], capture_output=True, text=True, timeout=300,
                          cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]
    for way in SPREAD:
        run_train(*halves, "--resume", "--out", root / "one" / f"after-{way}")
    return root, done.stdout


def weights(folder):
    """All weights as one vector."""
    return torch.cat([weight.flatten() for weight in Transformer.from_pretrained(folder).state_dict().values()])


def assert_same_run(ours, theirs, common):
    """Loss, gradient norm and all that is logged of a step, to 1e-5; the weights, measured by how far they have moved."""
    assert len(log_rows(ours, "train")) == len(log_rows(theirs, "train")) == 4
    for a, b in zip(log_rows(ours, "train"), log_rows(theirs, "train")):
        assert (a["step"], a["k"], a["slots"], a["lr"]) == (b["step"], b["k"], b["slots"], b["lr"])
        assert (a["loss"], a["gradient_norm"]) == pytest.approx((b["loss"], b["gradient_norm"]), rel=1e-5)
        assert a["agreement"] == pytest.approx(b["agreement"])
        assert a["confidence"] == pytest.approx(b["confidence"], rel=1e-5)
        assert b["gradient_norm"] > 1                                   # so it is clipped
    start = Transformer.from_pretrained(common[1])
    add_mask_token(start, Tokenizer(common[1]).free_id)
    start = torch.cat([weight.flatten() for weight in start.state_dict().values()])
    end, expected = weights(ours / "latest"), weights(theirs / "latest")
    assert (end - expected).norm() < 1e-3 * (expected - start).norm()
    moments = [torch.load(out / "latest" / "trainer.pt", weights_only=True)["optimizer"] for out in (ours, theirs)]
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    for name, entry in moments[0]["state"].items():
        assert entry["step"] == moments[1]["state"][name]["step"] == 4
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = moments[1]["state"][name][moment]
            assert (entry[moment] - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", SPREAD)
def test_two_processes_are_one(runs, common, way, variant):
    root, _ = runs
    assert_same_run(root / way / variant, root / "one" / variant, common)
    for ours, theirs in zip(log_rows(root / way / variant, "eval"), log_rows(root / "one" / variant, "eval"), strict=True):
        assert variant == "eval" and {**ours, "minutes": 0} == {**theirs, "minutes": 0}         # text and all


@pytest.mark.parametrize("way", SPREAD)
def test_rows_are_shared_out(runs, common, tiny, way):
    """In each step every row is read by one rank; where they do not suffice, a rank reads one for nothing."""
    root, _ = runs
    train, _ = load_data(str(common[3]), 2, 0)
    for variant, batch_size in (("hard", 4), ("odd", 3), ("one", 1)):
        ranks = [json.loads((root / way / variant / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1]) == 5                      # the timing pass and four steps
        for step, (first, second) in enumerate(zip(*ranks), -1):
            drawn = encode_rows(draw_rows(train, batch_size, max(step, 0), 0), Tokenizer(tiny), "plain", 64)
            expected = sorted([prompt, text] for prompt, text in drawn)
            assert len(expected) == batch_size and len(first) == len(second) == (batch_size + 1) // 2
            assert sorted(first + second[:batch_size // 2]) == expected


@pytest.mark.parametrize("way", SPREAD)
def test_checkpoints_go_on_with_another_number_of_processes(runs, common, way):
    """Two steps on one process and two on two, and the reverse, are four on one."""
    root, _ = runs
    for name, processes in ((f"{way}/resumed", [1, 2]), (f"one/after-{way}", [2, 1])):
        starts = log_rows(root / name, "start") + log_rows(root / name, "resume")
        assert [(row["step"], row["processes"], row["fsdp"]) for row in starts] == [
            (step, count, count == 2 and way == "FSDP") for step, count in zip((0, 2), processes)]
        assert_same_run(root / name, root / "one" / "soft", common)


def test_one_rank_stops_all(runs):
    """A signal that reaches one of them: both finish the step, one saves."""
    root, _ = runs
    out = root / "DDP" / "stopped"
    assert [row["step"] for row in log_rows(out, "train")] == [1, 2] and (out / "latest").resolve().name == "step-2"
    assert len(json.loads((out / "rank-0.json").read_text())) == len(json.loads((out / "rank-1.json").read_text())) == 3


def test_one_of_them_talks(runs):
    root, printed = runs
    assert printed.count("first step: ") == printed.count("; the newest checkpoint is ") == 2 * (len(VARIANTS) + 2) + 1
    for way in SPREAD:
        assert sorted(path.name for path in (root / way / "hard").iterdir()) == [
            "latest", "log.jsonl", "rank-0.json", "rank-1.json", "step-4"]
