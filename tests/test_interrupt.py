"""
Ctrl-C, from the first moment of a script on: common/__init__.py while torch is being loaded, and
cli.run behind that.
"""
import os
import runpy
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, signals_kept
from test_cli import FLAGS, cli, module_of

import sample
import speculate
from common import cli as common_cli
from common import data

# Prints what Ctrl-C would do
SAY = """
import signal
meanings = {signal.SIG_IGN: "ignored", signal.SIG_DFL: "the end",
            signal.default_int_handler: "KeyboardInterrupt"}
print(meanings[signal.getsignal(signal.SIGINT)], flush=True)
"""


def environment(*folders):
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)),
                         "PYTHONDONTWRITEBYTECODE": "1"}


def at_a_terminal():
    """A process that pytest starts may ignore Ctrl-C, where pytest itself was told to."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def answer_of(command, folder, before=at_a_terminal):
    """What a process that is quick prints."""
    done = subprocess.run(command, cwd=ROOT, env=environment(folder, ROOT), preexec_fn=before,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


# --------------------------------------------------------------------------------------------------
# While torch is loading

@pytest.mark.parametrize("script", sorted(set(FLAGS) - {"-m common.data"}))     # it needs no torch
def test_while_torch_is_loading(script, tmp_path):
    """One that takes forever, in place of the real one: no page of traceback, no line at all."""
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(99)\n"
    (tmp_path / "torch.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, *script.split()], cwd=ROOT, env=environment(tmp_path), text=True,
        preexec_fn=at_a_terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("script", ["sample.py", "-m studies.plan"])
def test_who_ignores_it_goes_on_ignoring(script, tmp_path):
    """`nohup`, or `&` in a script: Ctrl-C is meant for others."""
    (tmp_path / "torch.py").write_text(
        SAY + "import os, sys\nos.kill(os.getpid(), signal.SIGINT)\nprint('alive')\nsys.exit()\n")
    assert answer_of([sys.executable, *script.split()], tmp_path, deaf) == "ignored\nalive\n"
    said = answer_of([sys.executable, "-c", "import common\n" + SAY], tmp_path, deaf)
    assert said == "ignored\n"


def test_a_program_that_imports_us_is_left_alone(tmp_path):
    """Its Ctrl-C stays its own: a notebook's, a test's, that of the harness around our adapter."""
    program = "import common.cli, common.data\n" + SAY
    (tmp_path / "program.py").write_text(program)
    for words in (["-c", program], [tmp_path / "program.py"]):
        assert answer_of([sys.executable, *map(str, words)], tmp_path) == "KeyboardInterrupt\n"


@pytest.mark.parametrize("before, inside", [
    (signal.SIG_DFL, signal.default_int_handler),               # what common/__init__.py leaves
    (signal.default_int_handler, signal.default_int_handler),
    (signal.SIG_IGN, signal.SIG_IGN)])
def test_run_takes_over(before, inside):
    handlers = []
    with signals_kept():
        signal.signal(signal.SIGINT, before)
        common_cli.run(lambda: handlers.append(signal.getsignal(signal.SIGINT)))
    assert handlers == [inside]


# --------------------------------------------------------------------------------------------------
# In the middle of the work

def interrupted(real, calls):
    """`real`, but Ctrl-C comes with the call of this number."""
    left = [calls]

    def call(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args, **more)

    return call


def as_script(script, *flags):
    """Run a file as its own program, `cli.run` and all, in this process. Returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code
    return 0


# script: what Ctrl-C comes in the middle of, at which call; how many --resume makes; and flags
WORK = {
    "eval_gsm8k.py": (speculate, "decode", 7, 4, [          # two warm up, two for each batch
        "--model", "tiny-mtp", "--k", 2, "--limit", 6, "--batch-size", 2, "--max-new-tokens", 4]),
    "train.py": (data, "draw_rows", 3, 2, [
        "--k", 2, "--steps", 4, "--batch-size", 2, "--save-every", 1, "--eval-every", 0]),
    "studies/answers.py": (sample, "generate", 2, 2, [
        "--data", "wordproblems", "--limit", 6, "--batch-size", 2, "--max-new-tokens", 4]),
}


@pytest.mark.parametrize("script", WORK)
def test_interrupted_work_says_how_it_goes_on(script, tmp_path, monkeypatch, capsys):
    """Behind the progress bar, on a line of its own. And so it does: nothing is done twice."""
    module, name, calls, left, flags = WORK[script]
    out = tmp_path / ("rows.jsonl" if "answers" in script else "out")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted(getattr(module, name), calls))
        assert as_script(script, *flags, "--out", out) == 130
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "stopped; if anything was saved, the same command with --resume goes on from it"
    again, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **more: again.append(1) or real(*args, **more))
    assert as_script(script, *flags, "--out", out, "--resume") == 0 and len(again) == left


def test_without_resume_nothing_is_said(monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(speculate, "decode", stop)
    result = cli(module_of("sample.py"), "x", "--model", "tiny-mtp")
    assert result.code == 130 and result.err == ""
