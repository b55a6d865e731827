"""
train.py on two processes, by DDP and by FSDP, against one process with the same flags: the same
curve, the same weights, and checkpoints that go on either way. On CPUs, where gloo takes NCCL's
place; everything else is as on GPUs.
"""
import json

import pytest
import torch
from conftest import in_two_processes, log_rows, run_train

from adapters import Adapted, add_adapters, load_adapted
from common import parallel
from common.data import draw_rows, encode_rows, load_data
from common.hub import resolve
from common.tokenizer import Tokenizer
from heads import Heads, load_heads
from model import Transformer, add_mask_token


@pytest.mark.parametrize("count, size, world", [
    (8, 4, 1), (7, 2, 1), (8, 4, 2), (7, 2, 2), (5, 1, 4), (1, 3, 4), (9, 2, 3)])
def test_deal(monkeypatch, count, size, world):
    """Every row goes to one rank, and no rank makes more passes than another."""
    rows, shares = [f"row {i}" for i in range(count)], []
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(parallel.deal(rows, size))
    passes = -(-count // world)                                     # rows of the rank with most ...
    passes = -(-passes // size)                                     # ... in portions
    assert {len(share) for share in shares} == {passes}
    dealt = [row for share in shares for some, weight in share if weight for row in some]
    assert sorted(dealt) == sorted(rows)
    for rank, share in enumerate(shares):
        own = [row for some, weight in share if weight for row in some]
        assert own == rows[rank::world]
        for some, weight in share:
            assert 1 <= len(some) <= size
            # gradients of ranks are averaged: the weight makes it a sum. 0: read for company only
            assert weight == world or (weight, some) == (0, rows[:1])


# --------------------------------------------------------------------------------------------------
# Runs

# OUT/rank-R.json keeps what a rank was given to read
SCRIPT = """
import json, os, signal, sys
import train

rank, read, draw = int(os.environ["RANK"]), [], train.draw_rows

def spy_on(make):
    def make_batch(encoded, *rest, **more):
        read[-1].extend(encoded)
        return make(encoded, *rest, **more)
    return make_batch

def draw_rows(*args):
    read.append([])
    if interrupted and rank == 1 and len(read) == 2:                    # in the second step
        signal.raise_signal(signal.SIGTERM)
    return draw(*args)

train.draw_rows = draw_rows
train.make_batch, train.make_head_batch = map(spy_on, (train.make_batch, train.make_head_batch))

def job(flags):
    global interrupted
    sys.argv = ["train.py", *flags]
    interrupted = flags[-1].endswith("stopped")
    try:
        train.main()
    except SystemExit as stopped:
        assert interrupted and stopped.code == 130
    json.dump(read, open(f"{flags[-1]}/rank-{rank}.json", "w"))
"""

SPREAD = {"DDP": [], "FSDP": ["--fsdp"]}
MASKS = {
    # two passes on either rank, added up
    "hard": ["--batch-size", 4, "--micro-batch-size", 1],
    "soft": ["--batch-size", 4, "--micro-batch-size", 2, "--targets", "soft",
             "--prefix-loss", 0.5, "--bidirectional"],
    # two passes on one rank, one on the other
    "odd": ["--batch-size", 3, "--micro-batch-size", 1],
    # nothing left for the other rank; and some of what is to be predicted was cut off
    "one": ["--batch-size", 1, "--targets", "ground-truth", "--prefix-loss", 0.5],
    "cut": ["--batch-size", 4, "--micro-batch-size", 1, "--targets", "ground-truth",
            "--seq-len", 30, "--stride", 1],
    "eval": ["--batch-size", 2, "--eval-every", 2, "--max-new-tokens", 6, "--save-every", 2],
    # a text is read once, without gradient, and regions apart; the other rank has fewer, or none
    "adapters": ["--adapters", 4, "--batch-size", 3, "--micro-batch-size", 1, "--stride", 9,
                 "--eval-every", 2, "--max-new-tokens", 6],
}
HEADS = {                                   # by DDP alone
    "heads": ["--heads", 3, "--batch-size", 4, "--micro-batch-size", 1],
    "looped": ["--heads", 2, "--loop", "--draft-vocab", 50, "--batch-size", 3,
               "--micro-batch-size", 1, "--eval-every", 2, "--max-new-tokens", 6],
    # two frozen, two to be trained; nothing left for the other rank, and not all states are kept
    "extended": ["--heads", 4, "--extend", "--batch-size", 1, "--keep-gb", 3e-5,
                 "--targets", "ground-truth"],
}
VARIANTS = {name: ["--k", 3, *flags] for name, flags in MASKS.items()} | HEADS
RUNS = [(way, name) for way in SPREAD for name in VARIANTS if way == "DDP" or name in MASKS]
HALVED = ("soft", "adapters", "looped")                 # go on with another number of processes


@pytest.fixture(scope="module")
def common(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    answers = [f"{a} and 3 is {a + 3}{a % 4 * ' and on'}.\n#### {a + 3}" for a in range(40)]
    path.write_text("".join(json.dumps({"question": f"{a} + 3", "answer": answer}) + "\n"
                            for a, answer in enumerate(answers)))
    return ("--model", tiny, "--data", path, "--seq-len", 64, "--eval-every", 0,
            "--eval-prompts", 2, "--steps", 4, "--warmup", 0, "--cooldown", 0, "--lr", 1e-3,
            "--dtype", "fp32", "--device", "cpu", "--prompt-format", "plain")


@pytest.fixture(scope="module")
def runs(common, tmp_path_factory):
    """A folder of runs, and what the two processes printed.

    one/VARIANT, DDP/VARIANT, FSDP/VARIANT; DDP/stopped; and WAY/resumed-VARIANT and
    one/VARIANT-after-WAY, two steps in one way and two in the other.
    """
    root, jobs = tmp_path_factory.mktemp("runs"), []
    run_train(*common, "--heads", 2, "--steps", 1, "--out", root / "two-heads")
    everything = {name: (*common, *flags) for name, flags in VARIANTS.items()}
    everything["extended"] += ("--model", root / "two-heads")
    for way, name in RUNS:
        flags = (*everything[name], *SPREAD[way])
        jobs.append((*flags, "--out", root / way / name))
        if name in HALVED:
            jobs.append((*flags, "--resume", "--out", root / way / f"resumed-{name}"))
            jobs.append((*flags, "--steps", 2, "--out", root / "one" / f"{name}-after-{way}"))
    jobs.append((*everything["hard"], "--out", root / "DDP" / "stopped"))
    for name, flags in everything.items():
        run_train(*flags, "--out", root / "one" / name)
    halves = [(way, name) for way, name in RUNS if name in HALVED]
    for way, name in halves:
        run_train(*everything[name], "--steps", 2, "--out", root / way / f"resumed-{name}")
    printed = in_two_processes(SCRIPT, jobs, root)
    for way, name in halves:
        run_train(*everything[name], "--resume", "--out", root / "one" / f"{name}-after-{way}")
    return root, printed


def flat_weights(model):
    """All weights as one vector."""
    return torch.cat([weight.flatten() for weight in model.state_dict().values()])


def at_the_start(out):
    """What a run has trained, as it was before: a Transformer, Adapted or Heads."""
    args, = log_rows(out, "start")
    start = resolve(args["model"])
    model = Transformer.from_pretrained(start)
    if args["adapters"]:
        model, mask_id = Adapted.from_pretrained(start), Tokenizer(start).free_id
        add_mask_token(model, mask_id)
        return add_adapters(model, args["adapters"], mask_id)
    if args["heads"] is None:
        add_mask_token(model, Tokenizer(start).free_id)
        return model
    if args["extend"]:
        return load_heads(start).extend()
    return Heads(model.config, args["heads"], args["loop"]).initialise(args["seed"])


def at_the_end(out):
    """The same as it is now."""
    latest = out / "latest"
    if (latest / "adapters").exists():
        return load_adapted(latest)
    return load_heads(latest) or Transformer.from_pretrained(latest)


def assert_same_run(ours, theirs):
    """All that is logged of a step, to 1e-5; the weights, measured by how far they have moved."""
    rows, expected_rows = log_rows(ours, "train"), log_rows(theirs, "train")
    assert len(rows) == len(expected_rows) == 4
    for a, b in zip(rows, expected_rows):
        assert [a[key] for key in ("step", "k", "slots", "lr")] == [
            b[key] for key in ("step", "k", "slots", "lr")]
        for key in ("loss", "gradient_norm", "confidence"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
        assert a["agreement"] == pytest.approx(b["agreement"])
        assert b["gradient_norm"] > 1                               # so it is clipped
    start, end, expected = map(
        flat_weights, (at_the_start(theirs), at_the_end(ours), at_the_end(theirs)))
    assert (end - expected).norm() < 1e-3 * (expected - start).norm()
    ours, theirs = (
        torch.load(out / "latest" / "trainer.pt", weights_only=True)["optimizer"]["state"]
        for out in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, entry in ours.items():
        assert entry["step"] == theirs[name]["step"] == 4
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = theirs[name][moment]
            assert (entry[moment] - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("way, variant", RUNS)
def test_two_processes_are_one(runs, way, variant):
    root, _ = runs
    assert_same_run(root / way / variant, root / "one" / variant)
    evals, expected = (log_rows(root / name / variant, "eval") for name in (way, "one"))
    assert len(evals) == len(expected) == (
        3 if variant in ("eval", "adapters", "looped") else 0)
    for ours, theirs in zip(evals, expected):                       # text and all
        assert ours | {"minutes": 0} == theirs | {"minutes": 0}


def test_some_truth_is_unknown(runs, common, tiny):
    """Else the "cut" runs would say nothing about slots that count in no mean."""
    root, _ = runs
    train, _ = load_data(str(common[3]), 2, 0)
    for row in log_rows(root / "one" / "cut", "train"):
        drawn = draw_rows(train, 4, row["step"] - 1, 0)
        encoded = encode_rows(drawn, Tokenizer(tiny), "plain", 30)
        regions = sum(len(ids) - prompt for prompt, ids in encoded)
        assert 0 < row["slots"] < regions * row["k"]


@pytest.mark.parametrize("way", SPREAD)
def test_rows_are_shared_out(runs, common, tiny, way):
    """Every row is read by one rank; where they do not suffice, a rank reads one for nothing."""
    root, _ = runs
    train, _ = load_data(str(common[3]), 2, 0)
    sizes = {"hard": 4, "odd": 3, "one": 1}
    if way == "DDP":
        sizes |= {"heads": 4, "looped": 3, "extended": 1}
    for variant, batch_size in sizes.items():
        ranks = [json.loads((root / way / variant / f"rank-{rank}.json").read_text())
                 for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1]) == 4                  # a step reads once
        for step, (first, second) in enumerate(zip(*ranks)):
            drawn = draw_rows(train, batch_size, step, 0)
            encoded = encode_rows(drawn, Tokenizer(tiny), "plain", 64)
            assert len(first) == len(second) == (batch_size + 1) // 2
            read = sorted(first + second[:batch_size // 2])
            assert read == sorted([prompt, ids] for prompt, ids in encoded)


@pytest.mark.parametrize("way, variant", [run for run in RUNS if run[1] in HALVED])
def test_checkpoints_go_on_with_another_number_of_processes(runs, way, variant):
    """Two steps on one process and two on two, and the reverse, are four on one."""
    root, _ = runs
    for name, processes in ((f"{way}/resumed-{variant}", [1, 2]),
                            (f"one/{variant}-after-{way}", [2, 1])):
        starts = log_rows(root / name, "start") + log_rows(root / name, "resume")
        assert [(row["step"], row["processes"], row["fsdp"]) for row in starts] == [
            (step, count, count == 2 and way == "FSDP") for step, count in zip((0, 2), processes)]
        assert_same_run(root / name, root / "one" / variant)


def test_one_rank_stops_all(runs):
    """A signal that reaches one of them: both finish the step, one saves."""
    root, _ = runs
    out = root / "DDP" / "stopped"
    assert [row["step"] for row in log_rows(out, "train")] == [1, 2]
    assert (out / "latest").resolve().name == "step-2"
    for rank in (0, 1):
        assert len(json.loads((out / f"rank-{rank}.json").read_text())) == 2


def test_one_of_them_talks(runs):
    root, printed = runs
    count = len(RUNS) + 2 * sum(name in HALVED for _, name in RUNS) + 1
    assert printed.count(" supervised tokens, ") == count
    assert printed.count("; the newest checkpoint is ") == count
    for way in SPREAD:
        assert sorted(path.name for path in (root / way / "hard").iterdir()) == [
            "latest", "log.jsonl", "rank-0.json", "rank-1.json", "step-4"]
