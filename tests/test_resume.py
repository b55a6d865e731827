"""
Checkpoints of train.py: a run that was stopped, interrupted or killed goes on as if nothing had
been, and whatever goes wrong, the newest checkpoint is whole. Uninterrupted runs are the reference:
weights, optimiser and log.
"""
import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, log_rows, train_briefly
from test_cli import assert_refused, cli, everything_under

import model
import train as training
from common import files
from common import machine as machine_module
from common.cli import InputError
from model import Transformer


@pytest.fixture(scope="module")
def common(tiny, tmp_path_factory):
    """Flags of a run whose steps take milliseconds."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}.\n#### {a + 3}"}
            for a in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--model", tiny, "--data", path, "--k", 3, "--batch-size", 2, "--seq-len", 64,
            "--eval-every", 0, "--eval-prompts", 2, "--warmup", 2, "--cooldown", 0, "--lr", 2e-4,
            "--prompt-format", "plain")


def trainer(out):
    return torch.load(out / "latest" / "trainer.pt", weights_only=True)


def weights(out):
    return files.read_weights(out / "latest")


def newest(out):
    """The step of the newest checkpoint, which must be whole: it loads, and a run can go on."""
    state = trainer(out)
    assert state.keys() == {"step", "args", "inputs", "checkpoints", "optimizer", "rng"}
    assert (out / "latest").resolve().name == f"step-{state['step']}"
    noted = Transformer.from_pretrained(out / "latest").config.raw["nanomtp"]["steps"]
    assert noted == state["step"]
    return noted


def hidden(out):
    return sorted(path.name for path in out.glob(".*"))


def assert_equal(a, b, where=""):
    """Nested dicts and lists (or tuples), tensors bit by bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_run(ours, reference, from_step=0):
    """The newest checkpoints of two runs, and their logs behind `from_step`."""
    def state_and_log(out):
        state = {key: value for key, value in trainer(out).items()
                 if key not in ("args", "checkpoints")}
        rows = {row["step"]: row | {"minutes": 0, "seconds": 0} for row in log_rows(out, "train")}
        return state, [row for step, row in rows.items() if step > from_step]

    assert_equal(weights(ours), weights(reference))
    assert_equal(state_and_log(ours), state_and_log(reference))


# --------------------------------------------------------------------------------------------------
# Stopped and resumed

WAYS = {
    "steps": ["--targets", "soft", "--prefix-loss", 0.5],
    "SIGTERM": ["--bidirectional", "--cooldown", 5],
    "Ctrl-C": ["--targets", "ground-truth", "--cooldown", 5],
    "minutes": ["--curriculum", 9, "--cooldown", 5],
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_is_bit_equal(common, tmp_path, monkeypatch, way):
    """Stopped behind step 7 of 14 and continued.

    With --steps nothing but a cool-down tells a part from the whole.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*common, *WAYS[way], "--eval-every", 4, "--max-new-tokens", 2, "--save-every", 5)
    train_briefly(whole, *flags, "--steps", 14)
    draw, calls = training.draw_rows, []

    def draw_and_stop(*args):
        calls.append(args)
        if way in ("SIGTERM", "Ctrl-C") and len(calls) == 7:
            signal.raise_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGINT)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_rows", draw_and_stop)
        if way == "minutes":                        # a clock that shows how often rows were drawn
            clock = SimpleNamespace(perf_counter=lambda: 60.0 * len(calls))
            patch.setattr(machine_module, "time", clock)
        if way == "steps":
            train_briefly(parts, *flags, "--steps", 7)
        elif way == "minutes":
            train_briefly(parts, *flags, "--steps", 14, "--minutes", 6.5)
        else:
            with pytest.raises(SystemExit) as stopped:
                train_briefly(parts, *flags, "--steps", 14)
            assert stopped.value.code == 130 and log_rows(parts, "end")[0]["interrupted"]
            del stopped                             # its traceback holds the run, and so the lock
    assert newest(parts) == 7 and len(log_rows(parts, "train")) == 7
    train_briefly(parts, *flags, "--steps", 14, "--resume")
    assert newest(parts) == 14 and log_rows(parts, "resume")[0]["step"] == 7
    assert_same_run(parts, whole)
    ends = [7] if way == "steps" else []                            # a last evaluation
    assert [row["step"] for row in log_rows(parts, "eval")] == [0, 4, *ends, 8, 12, 14]
    start = Transformer.from_pretrained(common[1]).state_dict()
    assert not torch.equal(weights(parts)["model.norm.weight"], start["model.norm.weight"])


@pytest.fixture(scope="module")
def heads_common(common, tmp_path_factory):
    """The same with heads, but for their number; and answers of many lengths, so that what a text
    is read with, and padded to, is another thing in every step."""
    path = tmp_path_factory.mktemp("rows") / "lengths.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}{a % 5 * ' and again'}."}
            for a in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert common[2] == "--data" and common[4] == "--k"
    return (*common[:3], path, *common[6:])


@pytest.fixture(scope="module")
def two_heads(heads_common, tmp_path_factory):
    """The --out of a run of one step with two heads: read it, never write to it."""
    out = tmp_path_factory.mktemp("two") / "out"
    return train_briefly(out, *heads_common, "--heads", 2, "--steps", 1)


HEADS = {
    "plain": ["--heads", 2],
    "nothing kept": ["--heads", 2, "--keep-gb", 0],
    "a few states kept": ["--heads", 2, "--keep-gb", 2e-5],
    "looped": ["--heads", 3, "--loop", "--targets", "ground-truth"],
    "extended": ["--heads", 4, "--extend"],
    "draft vocabulary": ["--heads", 2, "--draft-vocab", 40, "--kl-weight", 0.5],
}


@pytest.mark.parametrize("kind", HEADS)
def test_resumed_heads_are_bit_equal(heads_common, two_heads, tmp_path, monkeypatch, kind):
    """Stopped behind step 7 of 14 and continued. Rows come again before and after that, when the
    hidden states that were kept are gone; and in other company."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*heads_common, *HEADS[kind], "--eval-every", 4, "--max-new-tokens", 2, "--steps", 14,
             "--save-every", 5, "--batch-size", 4, "--cooldown", 5, "--lr", 2e-3)
    if kind == "extended":
        flags += ("--model", two_heads)
    torch.manual_seed(0)                    # modules are made with random weights before they get
    train_briefly(whole, *flags)            # their own
    draw, calls = training.draw_rows, []

    def draw_and_stop(*args):
        calls.append(args)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_rows", draw_and_stop)
        torch.manual_seed(0)
        with pytest.raises(SystemExit):
            train_briefly(parts, *flags)
    assert newest(parts) == 7 and len(log_rows(parts, "train")) == 7
    stopped = weights(parts)
    train_briefly(parts, *flags, "--resume")
    assert newest(parts) == 14 and log_rows(parts, "resume")[0]["step"] == 7
    assert_same_run(parts, whole)
    for name in ("config.json", "draft_vocab.json"):
        there = [(out / "latest" / name).exists() for out in (parts, whole)]
        assert there == [name == "config.json" or kind == "draft vocabulary"] * 2
        if all(there):
            assert files.read_json(parts / "latest" / name) == files.read_json(
                whole / "latest" / name)
    moved = {name for name, x in weights(parts).items() if not torch.equal(x, stopped[name])}
    trained = {"looped": (2, 3, 4), "extended": (4, 5)}.get(kind, (2, 3))
    assert {name[:15] for name in moved} == {f"model.layers.{i}." for i in trained}


def test_resume_refuses_other_heads(common, heads_common, two_heads, one_step):
    """One line, and the earlier run is as it was. Of two methods one cannot go on with the
    other's."""
    before = everything_under(two_heads, one_step)
    for flags, message in {
            ("--heads", 3): "--heads 2, not 3",
            ("--heads", 2, "--loop"): "--loop False, not True",
            ("--heads", 2, "--kl-weight", 0.5): "--kl-weight 1.0, not 0.5",
            ("--heads", 2, "--kl-top", 5): "--kl-top 256, not 5",
            ("--heads", 2, "--draft-vocab", 9): "--draft-vocab 0, not 9",
            ("--heads", 2, "--targets", "ground-truth"): "--targets hard, not ground-truth",
            ("--heads", 4, "--extend"): "--heads 2, not 4",
            ("--k", 8): "--heads 2, not None"}.items():
        assert_refused(cli(training, *heads_common, *flags, "--steps", 2, "--out", two_heads,
                           "--resume"), f"{two_heads} was trained with {message}")
    assert_refused(cli(training, *heads_common, "--heads", 2, "--steps", 2, "--out", two_heads),
                   "already holds step-1")
    assert_refused(cli(training, *heads_common, "--data", common[3], "--heads", 2, "--steps", 2,
                       "--out", one_step, "--resume"), f"{one_step} was trained without --heads")
    assert everything_under(two_heads, one_step) == before


def generators_are(rng):
    return torch.equal(rng["torch"], torch.get_rng_state()) and rng["python"] == random.getstate()


def test_what_trainer_pt_holds(common, tmp_path):
    """It loads without running code; the optimiser's state goes by the checkpoint's names; a
    resumed run has the checkpoint's random number generators, and may change how it is run."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 2)
    state, shapes = trainer(out), {name: weight.shape for name, weight in weights(out).items()}
    assert (state["step"], state["args"]["lr"], state["args"]["targets"]) == (2, 2e-4, "hard")
    moments = state["optimizer"]["state"]
    assert {name: entry["exp_avg"].shape for name, entry in moments.items()} == shapes
    assert all(entry["step"] == 2 and entry["exp_avg_sq"].any() for entry in moments.values())
    decay = {name: group["weight_decay"] for group in state["optimizer"]["param_groups"]
             for name in group["params"]}
    assert decay == {name: 0.1 if len(shape) > 1 else 0.0 for name, shape in shapes.items()}
    assert generators_are(state["rng"])
    random.random(), torch.rand(1)                                  # whatever happens in between
    train_briefly(out, *common, "--steps", 2, "--resume", "--micro-batch-size", 1, "--minutes", 9,
                  "--eval-every", 7, "--max-new-tokens", 3, "--log-every", 2, "--save-every", 5)
    assert generators_are(state["rng"])


def test_resume_of_nothing_starts_anew(common, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = cli(training, *common, "--steps", 1, "--out", out, "--resume")
    assert result.code == 0 and f"nothing to resume in {out}: starting anew\n" in result.out
    assert newest(out) == 1 and log_rows(out, "start") and not log_rows(out, "resume")


def test_log_without_a_checkpoint(common, tmp_path):
    """A run that is on its way, or was killed before it saved anything: nobody else's folder, until
    --resume says that it is to start anew."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"event": "start", "step": 0}\n')
    before = everything_under(tmp_path)
    result = cli(training, *common, "--steps", 1, "--out", out)
    assert_refused(result, f"{out} has the log of a run that has saved nothing")
    assert everything_under(tmp_path) == before and len(log_rows(out, "start")) == 1
    result = cli(training, *common, "--steps", 1, "--out", out, "--resume")
    assert result.code == 0 and f"nothing to resume in {out}: starting anew\n" in result.out
    assert newest(out) == 1 and log_rows(out, "start")[-1]["k"] == 3


@pytest.mark.parametrize("way", ["whole", "minutes", "Ctrl-C"])
def test_last_line_says_how_to_go_on(common, tmp_path, monkeypatch, way):
    """Of a run that is not at its end. The line before says how far it is."""
    out, draw, calls = tmp_path / "out", training.draw_rows, []

    def draw_and_stop(*args):
        calls.append(args)
        if way == "Ctrl-C" and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(training, "draw_rows", draw_and_stop)
    clock = SimpleNamespace(perf_counter=lambda: 60.0 * len(calls))
    monkeypatch.setattr(machine_module, "time", clock)
    minutes = ["--minutes", 1.5] if way == "minutes" else []
    result = cli(training, *common, "--steps", 3, "--out", out, *minutes)
    assert result.code == (130 if way == "Ctrl-C" else 0)
    done = 3 if way == "whole" else 2
    *_, before, last = result.out.splitlines()
    said = f"{done} of 3 steps; the newest checkpoint is {out / f'step-{done}'} "
    assert (last if way == "whole" else before).startswith(said)
    if way != "whole":
        assert last == "to go on: the same command with --resume"
        result = cli(training, *common, "--steps", 3, "--out", out, "--resume")
        assert result.code == 0 and "to go on" not in result.out and newest(out) == 3


@pytest.fixture(scope="module")
def one_step(common, tmp_path_factory):
    """The --out of a run of one step: read it, never write to it."""
    return train_briefly(tmp_path_factory.mktemp("one") / "out", *common, "--steps", 1)


@pytest.mark.parametrize("flags, message", [
    ([], "already holds step-1"),
    (["--resume", "--stride", 2], "--stride 3, not 2"),
    (["--resume", "--targets", "soft"], "--targets hard, not soft"),
    (["--resume", "--bidirectional"], "--bidirectional False, not True"),
    (["--resume", "--fixed-k"], "--fixed-k False, not True"),
    (["--resume", "--prefix-loss", 1], "--prefix-loss 0.0, not 1.0"),
    (["--resume", "--slot1-weight", 2], "--slot1-weight 1.0, not 2.0"),
    (["--resume", "--batch-size", 3], "--batch-size 2, not 3"),
    (["--resume", "--limit", 5], "trained without --limit"),
    (["--resume", "--beta2", 0.9], "--beta2 0.95, not 0.9"),
    (["--resume", "--clip", 0], "--clip 1.0, not 0.0"),
    (["--resume", "--curriculum", 3], "--curriculum 0, not 3"),
    (["--resume", "--seed", 1], "--seed 0, not 1")])
def test_resume_refuses_other_settings(common, one_step, flags, message):
    """One line, and the earlier run is as it was."""
    before = everything_under(one_step)
    assert_refused(cli(training, *common, "--steps", 2, "--out", one_step, *flags), message)
    assert everything_under(one_step) == before and newest(one_step) == 1


def test_checkpoint_of_an_older_version(common, tmp_path):
    """It has no sums, among other things: one line, no change."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 1)
    (out / "latest" / "SHA256SUMS").unlink()
    before = everything_under(out)
    result = cli(training, *common, "--steps", 2, "--out", out, "--resume")
    assert_refused(result, "older train.py")
    assert everything_under(out) == before


def test_a_step_saved_again_replaces_the_old_one(common, tmp_path):
    """Killed between the folder and `latest`: refused without --resume, else the new one stays."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 2, "--save-every", 1)
    (out / "latest").unlink()
    (out / "latest").symlink_to("step-1")
    spoilt = out / "step-2" / "model.safetensors"
    before = spoilt.read_bytes()
    spoilt.write_bytes(b"")
    with pytest.raises(InputError, match="already holds"):
        train_briefly(out, *common, "--steps", 2)
    train_briefly(out, *common, "--steps", 2, "--resume")
    assert spoilt.read_bytes() == before and newest(out) == 2


# --------------------------------------------------------------------------------------------------
# A disk that refuses

def no_space(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_at_the_link(common, tmp_path, monkeypatch):
    """The checkpoint is written, but `latest` cannot move: one line, and it points where it did."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 1)
    flags = (*common, "--steps", 2, "--out", out, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", no_space)
        result = cli(training, *flags)
    assert result.code == 2 and "Traceback" not in result.err
    assert f"cannot write to {out}/latest" in result.err
    assert newest(out) == 1
    assert cli(training, *flags).code == 0 and newest(out) == 2


@pytest.mark.parametrize("what", [
    "weights", "trainer.pt", "short weights", "short trainer.pt", "no folder", "log"])
def test_disk_full(common, tmp_path, monkeypatch, what):
    """Behind step 3 the disk takes no more: one line, no half folder, and step 2 can be resumed.

    "short": a true write that ends in the middle, since no file may become longer than a limit.
    """
    out = train_briefly(tmp_path / "out", *common, "--steps", 2)
    sizes = {name: (out / "latest" / name).stat().st_size
             for name in ("model.safetensors", "trainer.pt")}
    limits = {"short weights": sizes["model.safetensors"] // 2,
              "short trainer.pt": sizes["trainer.pt"] - 1000}
    assert sizes["model.safetensors"] < limits["short trainer.pt"]
    flags = (*common, "--steps", 4, "--save-every", 2, "--resume", "--out", out)
    before, draw, calls = resource.getrlimit(resource.RLIMIT_FSIZE), training.draw_rows, []

    def draw_and_fill(*args):
        calls.append(args)
        if len(calls) == 2 and what in limits:                      # steps 3 and 4 draw rows
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[what], before[1]))
        return draw(*args)

    if what == "log":                           # Linux has a file on a disk that is always full
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        (out / "log.jsonl").unlink()
        (out / "log.jsonl").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_rows", draw_and_fill)
        if what == "weights":
            patch.setattr(model, "save_file", no_space)
        elif what == "trainer.pt":
            patch.setattr(torch, "save", no_space)
        elif what == "no folder":
            patch.setattr(files.tempfile, "mkdtemp", no_space)
        try:
            result = cli(training, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.code == 2 and "Traceback" not in result.err, result
    line, = re.findall(r"error: .*\n", result.err)                  # beside the progress bar
    assert f"cannot write {out}" in line.replace(" to ", " ")
    assert hidden(out) == [] and newest(out) == 2 and not (out / "step-4").exists()
    if what == "log":
        (out / "log.jsonl").unlink()
    assert cli(training, *flags).code == 0 and newest(out) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(common, tmp_path):
    there = tmp_path / "there"
    there.mkdir(mode=0o500)
    for out in (there, there / "out"):
        result = cli(training, *common, "--steps", 1, "--out", out)
        assert_refused(result, f"cannot write to {out}")


# --------------------------------------------------------------------------------------------------
# Killed

# A process that imports train.py once and forks for each line of flags, which is a run: else most
# of the time would go into importing torch. Its answer to a line: the run's process id, and how it
# ended. A line begins with MODULE.NAME and a number n, or with two empty fields: the run kills
# itself when it calls that function for the n-th time.
NURSERY = """
import importlib, os, random, signal, sys
import torch._dynamo, train
from common import cli

for line in sys.stdin:
    flags = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        random.seed(0)                  # a fork gets a seed of its own
        if flags[0]:
            *path, name = flags[0].split(".")
            owner, left = importlib.import_module(path[0]), [int(flags[1])]
            for part in path[1:]:
                owner = getattr(owner, part)
            real = getattr(owner, name)
            def fatal(*args, **more):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)
            setattr(owner, name, fatal)
        sys.stdout = open(os.devnull, "w")
        sys.argv = ["train.py", *flags[2:]]
        try:
            cli.run(train.main)
        except SystemExit as stopped:
            os._exit(stopped.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True)
    yield process
    process.stdin.close()
    process.wait()


def begin(nursery, *flags, suicide=("", "")):
    """Start a run; returns its process id. `ended` waits for it."""
    nursery.stdin.write("\t".join(map(str, (*suicide, *flags))) + "\n")
    nursery.stdin.flush()
    return int(nursery.stdout.readline())


def ended(nursery):
    return int(nursery.stdout.readline())


def logged(out):
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def assert_intact(out, save_every, before):
    """What must hold after any kill. Returns the step of the newest checkpoint, 0 without one."""
    step = newest(out) if (out / "latest").exists() else 0
    rows = log_rows(out, "train") if logged(out) else []            # every line is whole
    assert step >= before and (rows[-1]["step"] if rows else 0) - step <= save_every
    assert len(hidden(out)) <= 2, hidden(out)           # of the last killed run, not of all
    return step


def test_killed_twenty_times(nursery, common, tmp_path):
    """SIGKILL at random moments, from the first line of main to the middle of a step or of a save.

    Then, left alone, the run ends with the weights of one that was never disturbed.
    """
    out, rng, step, reached = tmp_path / "out", random.Random(0), 0, []
    flags = (*common, "--save-every", 2, "--log-every", 1, "--resume", "--out", out)
    for kill in range(20):
        # let it log so many rows (the first is no step); one in five dies earlier
        done = logged(out) + rng.randint(1, 7) if kill % 5 else 0
        child, begun = begin(nursery, *flags, "--steps", 100_000), time.monotonic()
        while logged(out) < done and time.monotonic() < begun + 60:
            time.sleep(0.002)
        time.sleep(rng.random() * (0.1 if done else 0.4))
        os.kill(child, signal.SIGKILL)
        assert ended(nursery) == -signal.SIGKILL
        step = assert_intact(out, 2, before=step)
        reached.append(step)
    assert len(set(reached)) > 5, reached               # else it was killed before it did anything
    begin(nursery, *flags, "--steps", step + 3)
    assert ended(nursery) == 0 and newest(out) == step + 3 and hidden(out) == []
    whole = tmp_path / "whole"
    begin(nursery, *common, "--save-every", 1000, "--out", whole, "--steps", step + 3)
    assert ended(nursery) == 0
    assert_same_run(out, whole, from_step=step)


# A save writes config.json, weights, three files of the tokenizer, trainer.pt, and then the link.
# Each JSON file and the link get their name by `replace`, behind which JSON files call `unlink`.
@pytest.mark.parametrize("where, count", [
    ("model.save_file", 2), ("torch.save", 1), ("os.fsync", 4), ("pathlib.Path.rename", 2),
    ("pathlib.Path.symlink_to", 1),
    ("pathlib.Path.replace", 3),                        # a file of the first save
    ("pathlib.Path.replace", 10),                       # the link of the second
    ("os.unlink", 15)])                                 # in the third, which deletes the first
def test_killed_in_the_middle_of_a_save(nursery, common, tmp_path, where, count):
    """At every place of a save where dying could hurt, and at the same place again: what is left is
    whole, goes on, and piles up nowhere."""
    out, step = tmp_path / "out", 0
    flags = (*common, "--save-every", 2, "--log-every", 1, "--resume", "--out", out)
    for again in range(3):
        begin(nursery, *flags, "--steps", 12, suicide=(where, count))
        assert ended(nursery) == (-signal.SIGKILL if again == 0 or step < 12 else 0)
        step = assert_intact(out, 2, before=step)
        if (where, count, again) == ("pathlib.Path.replace", 10, 0):
            assert step == 2 and (out / "step-4").is_dir()
        if (where, again) == ("os.unlink", 0):
            assert step == 6 and (out / "step-2").is_dir()
    begin(nursery, *flags, "--steps", 13)
    assert ended(nursery) == 0 and newest(out) == 13 and hidden(out) == []
    assert len(list(out.glob("step-*"))) == 2
