"""
Checkpoints of train.py: a run that was stopped, interrupted or killed goes on as if nothing had been, and whatever goes
wrong, the newest checkpoint is whole. Uninterrupted runs are the reference, weights, optimiser and log.
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
import pretrained
import train as training
from model import Transformer
from pretrained import InputError


@pytest.fixture(scope="module")
def common(tiny, tmp_path_factory):
    """Flags of a run whose steps take milliseconds."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}.\n#### {a + 3}"} for a in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--model", tiny, "--data", path, "--k", 3, "--batch-size", 2, "--seq-len", 64, "--eval-every", 0,
            "--eval-prompts", 2, "--warmup", 2, "--cooldown", 0, "--lr", 2e-4, "--prompt-format", "plain")


def trainer(out):
    return torch.load(out / "latest" / "trainer.pt", weights_only=True)


def newest(out):
    """The step of the newest checkpoint, which must be whole: weights that load, and everything needed to go on."""
    state = trainer(out)
    assert state.keys() == {"step", "args", "optimizer", "rng"}
    assert (out / "latest").resolve().name == f"step-{state['step']}"
    assert Transformer.from_pretrained(out / "latest").config.raw["nanomtp"]["steps"] == state["step"]
    return state["step"]


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
    weights = [Transformer.from_pretrained(out / "latest").state_dict() for out in (ours, reference)]
    states = [trainer(out) for out in (ours, reference)]
    assert_equal(*weights)
    assert_equal(*({name: state[name] for name in ("step", "optimizer", "rng")} for state in states))
    logs = [{row["step"]: row | {"minutes": 0, "seconds": 0} for row in log_rows(out, "train") if row["step"] > from_step}
            for out in (ours, reference)]
    assert_equal(*logs)


# --- stopped and resumed

@pytest.mark.parametrize("way", ["steps", "SIGTERM", "Ctrl-C", "minutes"])
def test_resumed_run_is_bit_equal(common, tmp_path, monkeypatch, way):
    """Stopped behind step 7 of 14 and continued. With --steps nothing but a cool-down tells a part from the whole."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*common, "--eval-every", 4, "--eval-tokens", 2, "--save-every", 5)
    variant = {"steps": ["--targets", "soft", "--prefix-loss", 0.5], "SIGTERM": ["--bidirectional", "--cooldown", 5],
               "Ctrl-C": ["--targets", "ground-truth", "--cooldown", 5],
               "minutes": ["--curriculum", 9, "--cooldown", 5]}[way]
    train_briefly(whole, *flags, *variant, "--steps", 14)
    draw, calls = training.draw_rows, []

    def draw_and_stop(*args):
        calls.append(args)
        if way in ("SIGTERM", "Ctrl-C") and len(calls) == 8:            # the first call is the timing pass
            signal.raise_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGINT)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_rows", draw_and_stop)
        if way == "minutes":                                            # a clock that shows how often rows were drawn
            patch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: 60.0 * len(calls)))
        if way == "steps":
            train_briefly(parts, *flags, *variant, "--steps", 7)
        elif way == "minutes":
            train_briefly(parts, *flags, *variant, "--steps", 14, "--minutes", 6.5)
        else:
            with pytest.raises(SystemExit) as stopped:
                train_briefly(parts, *flags, *variant, "--steps", 14)
            assert stopped.value.code == 130 and log_rows(parts, "end")[0]["interrupted"]
    assert newest(parts) == 7 and len(log_rows(parts, "train")) == 7
    train_briefly(parts, *flags, *variant, "--steps", 14, "--resume")
    assert newest(parts) == 14 and log_rows(parts, "resume")[0]["step"] == 7
    assert_same_run(parts, whole)
    assert [row["step"] for row in log_rows(parts, "eval")] == [0, 4, 8, 12]
    start = Transformer.from_pretrained(common[1]).state_dict()
    assert not torch.equal(Transformer.from_pretrained(parts / "latest").state_dict()["model.norm.weight"],
                           start["model.norm.weight"])


def test_what_trainer_pt_holds(common, tmp_path):
    """Loads without running code; the optimiser's state goes by the checkpoint's names; the generators are those of now."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 2)
    state, weights = trainer(out), Transformer.from_pretrained(out / "latest").state_dict()
    assert state["step"] == 2 and state["args"]["lr"] == 2e-4 and state["args"]["targets"] == "hard"
    moments = state["optimizer"]["state"]
    assert {name: entry["exp_avg"].shape for name, entry in moments.items()} == {
        name: weight.shape for name, weight in weights.items()}
    assert all(entry["step"] == 2 and entry["exp_avg_sq"].any() for entry in moments.values())
    groups = {name: group for group in state["optimizer"]["param_groups"] for name in group["params"]}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        name: 0.1 if weight.dim() > 1 else 0.0 for name, weight in weights.items()}
    assert torch.equal(state["rng"]["torch"], torch.get_rng_state()) and state["rng"]["python"] == random.getstate()
    random.random(), torch.rand(1)                                      # whatever happened in between, a resumed run
    train_briefly(out, *common, "--steps", 2, "--resume")               # goes on with the generators of the checkpoint
    assert torch.equal(state["rng"]["torch"], torch.get_rng_state()) and state["rng"]["python"] == random.getstate()


def test_resume_of_nothing_starts_anew(common, tmp_path):
    (tmp_path / "out").mkdir()
    result = cli(training, *common, "--steps", 1, "--out", tmp_path / "out", "--resume")
    assert result.code == 0 and f"nothing to resume in {tmp_path / 'out'}: starting anew\n" in result.out
    assert newest(tmp_path / "out") == 1 and log_rows(tmp_path / "out", "start") and not log_rows(tmp_path / "out", "resume")


@pytest.fixture(scope="module")
def one_step(common, tmp_path_factory):
    """The --out of a run of one step: read it, never write to it."""
    return train_briefly(tmp_path_factory.mktemp("one") / "out", *common, "--steps", 1)


@pytest.mark.parametrize("flags, message", [
    ([], "already holds step-1"), (["--resume", "--stride", 2], "--stride 3, not 2"),
    (["--resume", "--targets", "soft"], "--targets hard, not soft"),
    (["--resume", "--bidirectional"], "--bidirectional False, not True"),
    (["--resume", "--fixed-k"], "--fixed-k False, not True"),
    (["--resume", "--prefix-loss", 1], "--prefix-loss 0.0, not 1.0"),
    (["--resume", "--slot1-weight", 2], "--slot1-weight 1.0, not 2.0"), (["--resume", "--batch-size", 3], "--batch-size 2"),
    (["--resume", "--curriculum", 3], "--curriculum 0, not 3"), (["--resume", "--seed", 1], "--seed 0, not 1")])
def test_resume_refuses_other_settings(common, one_step, flags, message):
    """One line, and the earlier run is as it was."""
    before = everything_under(one_step)
    assert_refused(cli(training, *common, "--steps", 2, "--out", one_step, *flags), message)
    assert everything_under(one_step) == before and newest(one_step) == 1


def test_trainer_of_an_older_version(common, tmp_path):
    """What lacks the generators' states was written before parameters had names in it: one line, nothing touched."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 1)
    state = trainer(out)
    del state["rng"]
    torch.save(state, out / "latest" / "trainer.pt")
    before = everything_under(out)
    assert_refused(cli(training, *common, "--steps", 2, "--out", out, "--resume"), "older train.py")
    assert everything_under(out) == before


def test_disk_full_at_the_link(common, tmp_path, monkeypatch):
    """The checkpoint is written, but `latest` cannot be moved: one line, and it still points to the one before."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", no_space)
        result = cli(training, *common, "--steps", 2, "--out", out, "--resume")
    assert result.code == 2 and f"cannot write {out}/latest" in result.err and "Traceback" not in result.err
    assert newest(out) == 1
    assert cli(training, *common, "--steps", 2, "--out", out, "--resume").code == 0 and newest(out) == 2


def test_a_step_saved_again_replaces_the_old_one(common, tmp_path):
    """Killed between the folder and `latest`: refused without --resume; with it, the run's own weights are what stays."""
    out = train_briefly(tmp_path / "out", *common, "--steps", 1, "--seed", 1)
    before = Transformer.from_pretrained(out / "step-1").state_dict()["model.norm.weight"]
    (out / "latest").unlink()
    (out / "step-old").mkdir()                                      # somebody's own folder: not ours to count or delete
    with pytest.raises(InputError, match="already holds"):
        train_briefly(out, *common, "--steps", 1)
    train_briefly(out, *common, "--steps", 1, "--resume")
    after = Transformer.from_pretrained(out / "latest").state_dict()["model.norm.weight"]
    assert not torch.equal(before, after) and (out / "step-old").is_dir()


# --- a disk that refuses

def no_space(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["weights", "trainer.pt", "short weights", "short trainer.pt", "no folder", "log"])
def test_disk_full(common, tmp_path, monkeypatch, what):
    """Behind step 3 the disk takes no more: one line, exit code 2, no half folder, and step 2 can be resumed.

    "short": a true write that ends in the middle, because no file may become longer than a limit.
    """
    out = tmp_path / "out"
    train_briefly(out, *common, "--steps", 2)
    sizes = {name: (out / "latest" / name).stat().st_size for name in ("model.safetensors", "trainer.pt")}
    limits = {"short weights": sizes["model.safetensors"] // 2, "short trainer.pt": sizes["trainer.pt"] - 1000}
    assert sizes["model.safetensors"] < limits["short trainer.pt"]
    flags = (*common, "--steps", 4, "--save-every", 2, "--resume", "--out", out)
    before, draw, calls = resource.getrlimit(resource.RLIMIT_FSIZE), training.draw_rows, []

    def draw_and_fill(*args):
        calls.append(args)
        if len(calls) == 3 and what in limits:                          # the timing pass, step 3, step 4
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[what], before[1]))
        return draw(*args)

    if what == "log":                                                   # Linux has a file on a disk that is always full
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
            patch.setattr(pretrained.tempfile, "mkdtemp", no_space)
        try:
            result = cli(training, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.code == 2, result
    lines = re.findall(r"error: .*\n", result.err)                     # the progress bar is there as well
    assert "Traceback" not in result.err and len(lines) == 1 and f"cannot write {out}" in lines[0].replace(" to ", " ")
    assert hidden(out) == [] and newest(out) == 2 and not (out / "step-4").exists()
    if what == "log":
        (out / "log.jsonl").unlink()
    assert cli(training, *flags).code == 0 and newest(out) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(common, tmp_path):
    (tmp_path / "there").mkdir(mode=0o500)
    for out in (tmp_path / "there", tmp_path / "there" / "out"):
        assert_refused(cli(training, *common, "--steps", 1, "--out", out), f"cannot write to {out}")


# --- killed

# A process that imports train.py once and forks for each line of flags, which is a run: else importing torch would be
# most of the time. Its answer to a line: the run's process id, and how it ended. In place of flags to go on with, a line
# may begin with MODULE.NAME and a number n: the run then kills itself when it calls that function for the n-th time.
NURSERY = """
import importlib, os, random, signal, sys
import model, pretrained, torch._dynamo, train

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
            pretrained.run(train.main)
        except SystemExit as stopped:
            os._exit(stopped.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


def assert_intact(out, save_every, before):
    """What must hold after any kill. Returns the step of the newest checkpoint, 0 if there is none yet."""
    step = newest(out) if (out / "latest").exists() else 0
    rows = log_rows(out, "train") if (out / "log.jsonl").exists() else []       # every line is whole
    assert step >= before and (rows[-1]["step"] if rows else 0) - step <= save_every
    assert len(hidden(out)) <= 2, hidden(out)                           # of the last run that was killed, not of all
    return step


def test_killed_twenty_times(nursery, common, tmp_path):
    """SIGKILL at random moments, from the first line of main to the middle of a step or of a save; then, left alone, the
    run ends with the weights of one that was never disturbed."""
    out, rng, step, reached = tmp_path / "out", random.Random(0), 0, []
    flags = (*common, "--save-every", 2, "--log-every", 1, "--resume", "--out", out)
    for kill in range(20):
        done = logged(out) + rng.randint(1, 7) if kill % 5 else 0       # let it log so many rows (the first is no step); one
        child, begun = begin(nursery, *flags, "--steps", 100_000), time.monotonic()     # in five dies earlier
        while logged(out) < done and time.monotonic() < begun + 60:
            time.sleep(0.002)
        time.sleep(rng.random() * (0.1 if done else 0.4))
        os.kill(child, signal.SIGKILL)
        assert ended(nursery) == -signal.SIGKILL
        step = assert_intact(out, 2, before=step)
        reached.append(step)
    assert len(set(reached)) > 5, reached                               # else it was killed before it did anything
    begin(nursery, *flags, "--steps", step + 3)
    assert ended(nursery) == 0 and newest(out) == step + 3 and hidden(out) == []
    begin(nursery, *common, "--save-every", 1000, "--out", tmp_path / "whole", "--steps", step + 3)
    assert ended(nursery) == 0
    assert_same_run(out, tmp_path / "whole", from_step=step)


@pytest.mark.parametrize("where, count", [
    ("model.save_file", 2), ("torch.save", 1), ("os.fsync", 4), ("pretrained.Path.rename", 2),
    ("pathlib.Path.symlink_to", 1), ("pathlib.Path.replace", 2), ("os.unlink", 3)])
def test_killed_in_the_middle_of_a_save(nursery, common, tmp_path, where, count):
    """At every place of a save where dying could hurt, and at the same place again: what is left is whole, goes on, and
    piles up nowhere."""
    out, step = tmp_path / "out", 0
    flags = (*common, "--save-every", 2, "--log-every", 1, "--resume", "--out", out)
    for again in range(3):
        begin(nursery, *flags, "--steps", 12, suicide=(where, count))
        assert ended(nursery) == (-signal.SIGKILL if again == 0 or step < 12 else 0)
        step = assert_intact(out, 2, before=step)
    begin(nursery, *flags, "--steps", 13)
    assert ended(nursery) == 0 and newest(out) == 13 and hidden(out) == []
    assert len([path for path in out.glob("step-*")]) == 2
