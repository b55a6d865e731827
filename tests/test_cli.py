"""
The command lines. Bad input is one line on stderr and exit code 2, before any work and with nothing
written; good input says what it did, and what it says is checked against what was computed. Nearly
all of it runs in this process.
"""
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_VOCAB, log_rows, signals_kept
from safetensors.torch import load_file
from test_train import WITH_HEADS, fond_of_eight_words

import sample
import speculate
import train as training
from common import data, report
from common.cli import InputError, run
from common.files import read_json, write_json
from common.hub import resolve
from common.tokenizer import MASK_TOKEN, Tokenizer
from common.wordproblems import STRUCTURES, WordProblems
from sample import Strategy
from studies import viewer

# --------------------------------------------------------------------------------------------------
# All scripts and their flags

MACHINE = "device dtype "
STRATEGY = "k threshold "
FLAGS = {
    "train.py":
        "preset model random-init no-random-init data limit prompt-format out resume no-resume "
        "k fixed-k no-fixed-k curriculum stride targets slot1-weight prefix-loss bidirectional "
        "no-bidirectional adapters merge-start no-merge-start "
        "heads loop no-loop extend no-extend kl-weight kl-top draft-vocab keep-gb "
        "lr warmup cooldown beta2 weight-decay clip batch-size micro-batch-size seq-len steps "
        "minutes eval-every eval-prompts max-new-tokens log-every save-every seed fsdp no-fsdp "
        "compile no-compile " + MACHINE,
    "sample.py":
        "data limit prompt-format seed lossless no-lossless narrow no-narrow temperature top-k "
        "top-p max-new-tokens stop ignore-stop no-ignore-stop batch-size compare no-compare model "
        + STRATEGY + MACHINE,
    "eval_gsm8k.py":
        "data limit shots prompt-format stop seed lossless no-lossless narrow no-narrow "
        "max-new-tokens batch-size model baseline out resume no-resume " + STRATEGY + MACHINE,
    "-m common.data": "data limit seed",
    "-m studies.ablate":
        "only model k steps seeds limit out resume no-resume table-only no-table-only processes "
        + MACHINE,
    "-m studies.answers":
        "data limit max-new-tokens prompt-format seed model out resume no-resume batch-size "
        + MACHINE,
    "-m studies.bench":
        "batch-size data limit seed max-new-tokens rounds warmup model out threads " + MACHINE,
    "-m studies.cascade":
        "only model data prompt-format heads steps seeds questions limit max-new-tokens batch-size "
        "out resume no-resume " + MACHINE,
    "-m studies.clash": "k steps limit seeds model out resume no-resume " + MACHINE,
    "-m studies.confidence":
        "data limit threshold max-new-tokens batch-size seed model teacher out " + MACHINE,
    "-m studies.efficiency":
        "model data k batch-size micro-batch-size seq-len seed before compile no-compile steps "
        "rounds out " + MACHINE,
    "-m studies.figures": "out",
    "-m studies.lm_eval_adapter":
        "tasks include limit shots prompt-format seed max-new-tokens batch-size model out "
        + STRATEGY + MACHINE,
    "-m studies.plan":                                      # and train.py's
        "prompt-tokens attention gpus fsdp no-fsdp memory measure no-measure out",
    "-m studies.tables": "out",
    "-m studies.tiny": "out limit vocab-size trained",
    "-m studies.viewer":
        "prompt-format seed max-new-tokens model out json " + STRATEGY + MACHINE,
}


def module_of(script):
    return importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def cli(module, *argv, stream=io.StringIO):
    """Run a module as a script in this process. A traceback is not caught: it fails the test."""
    out, err, code = stream(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        stack.enter_context(signals_kept())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            run(module.main)
        except SystemExit as stopped:
            code = stopped.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def assert_refused(result, message):
    """Exit code 2 and exactly one line, which names the problem."""
    assert result.code == 2, result
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert message in result.err, result.err
    assert "Traceback" not in result.out


def everything_under(*folders):
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def test_no_script_is_missing_here():
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("studies/*.py")]:
        if "\ndef main():" in path.read_text(encoding="utf-8"):
            package = path.parent.name
            at_top = path.parent == ROOT
            found.add(path.name if at_top else f"-m {package}.{path.stem}")
    assert found == set(FLAGS)


@pytest.mark.parametrize("script", FLAGS)
def test_help_names_every_flag(script, monkeypatch):
    """Both ways round: a flag that is new and in no test shows up here as well."""
    result = cli(module_of(script), "--help")
    assert result.code == 0 and result.err == ""
    heads = re.findall(r"^  ((?:-h, )?--.*?)(?:  +.*)?$", result.out, re.MULTILINE)
    found = {flag for head in heads for flag in re.findall(r"--([a-z0-9-]+)", head)}
    assert found == {"help", *FLAGS[script].split()}
    assert f"python {script}" in result.out                         # commands to copy


# --------------------------------------------------------------------------------------------------
# Bad input

QUICK = ("--k", 3, "--batch-size", 2, "--seq-len", 64, "--eval-every", 0, "--eval-prompts", 2,
         "--lr", 2e-4, "--prompt-format", "plain")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A JSONL file of 14 short rows, on which a step takes milliseconds."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}.\n#### {a + 3}"}
            for a in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The --out of a two-step run with k_max = 3: read it, never write to it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    result = cli(training, "--model", tiny, "--data", "wordproblems", "--k", 3, "--steps", 2,
                 "--batch-size", 2, "--seq-len", 200, "--eval-prompts", 2, "--max-new-tokens", 8,
                 "--out", out)
    assert result.code == 0, result
    assert "supervised tokens" in result.out
    assert f"the newest checkpoint is {out / 'step-2'}" in result.out
    return out


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """The --out of a run with two heads, whose drafts are right now and then, and its start: read
    them, never write to them."""
    folder = tmp_path_factory.mktemp("headed")
    start, rows = fond_of_eight_words(folder / "start")
    result = cli(training, "--model", start, "--data", rows, *WITH_HEADS, "--heads", 2,
                 "--eval-every", 0, "--out", folder / "out")
    assert result.code == 0, result
    assert re.search(r"step 1: 8 sequences, 2 heads, \d+ supervised tokens, \d+ tokens read\n",
                     result.out)
    return folder / "out", start


@pytest.fixture(scope="module")
def looped(headed, tmp_path_factory):
    """The same, of one head for two depths and a single step."""
    out = tmp_path_factory.mktemp("looped") / "out"
    start = headed[1]
    assert cli(training, "--model", start, "--data", start / "rows.jsonl", *WITH_HEADS, "--heads",
               2, "--loop", "--steps", 1, "--eval-every", 0, "--out", out).code == 0
    return out


@pytest.fixture
def tmp(tmp_path, tiny, monkeypatch):
    """tmp_path with one of every bad file in it, as the current folder."""
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin1.txt").write_bytes(b"\xe9\n")
    good = json.dumps({"question": "a", "answer": "b"}) + "\n"
    (tmp_path / "broken.jsonl").write_text(good * 2 + '{"question": "a", "answer":\n' + good)
    (tmp_path / "fields.jsonl").write_text(good + '{"text": "a"}\n')
    (tmp_path / "few.jsonl").write_text("".join(good.replace("a", str(i), 1) for i in range(3)))
    (tmp_path / "single.jsonl").write_text(good * 3)        # three rows, one question
    (tmp_path / "long.jsonl").write_text(good + good.replace('"a"', '"' + "word " * 600 + '"', 1))
    shutil.copytree(tiny, tmp_path / "base")                # a model without a chat template
    settings = read_json(tiny / "tokenizer_config.json")
    write_json(tmp_path / "base" / "tokenizer_config.json", settings | {"chat_template": None})
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Flags that make a script's case quick, or possible at all; those of the case come behind them
BASE = {
    "train.py": "--model {tiny} --steps 1 --batch-size 1 --out {tmp}/out",
    "sample.py": "--model {trained}",
    "eval_gsm8k.py": "--model {trained} --data {tmp}/few.jsonl --max-new-tokens 2 --out {tmp}/out",
    "-m common.data": "",
    "-m studies.ablate": "--out {tmp}/out",
    "-m studies.answers": "--model {tiny} --data {tmp}/few.jsonl --out {tmp}/rows.jsonl",
    "-m studies.bench": "--model {trained} --out {tmp}/out",
    "-m studies.cascade": "--out {tmp}/out",
    "-m studies.clash": "--out {tmp}/out",
    "-m studies.confidence": "--model {trained} --teacher {tiny} --out {tmp}/out",
    "-m studies.efficiency": "--out {tmp}/out",
    "-m studies.figures": "--out {tmp}/out",
    "-m studies.lm_eval_adapter": "--model {trained} --tasks nosuch",
    "-m studies.plan": "--model {tiny}",
    "-m studies.tables": "--out {tmp}/out",
    "-m studies.tiny": "--out {tmp}/out",
    "-m studies.viewer": "--model {trained} --out {tmp}/page.html",
}

# Flags mean the same everywhere. (flag, value, what the line says), for each script that has it
EVERYWHERE = [
    ("device", "nosuch", "'nosuch'"),
    ("dtype", "fp8", "fp8"),
    ("model", "nosuch", "'nosuch'"),
    ("model", "{tmp}/folder", "is no checkpoint"),
    ("prompt-format", "jinja", "jinja"),
    ("data", "{tmp}/nosuch.jsonl", "cannot read {tmp}/nosuch.jsonl"),
    ("data", "{tmp}/broken.jsonl", "{tmp}/broken.jsonl:3: "),
    ("seed", "x", "--seed"),
    ("limit", "0", "--limit must be at least 1"),
    ("limit", "{tmp}/few.jsonl", "--limit"),
    ("k", "two", "--k"),
    ("threshold", "high", "--threshold"),
    ("batch-size", "0", "--batch-size must be at least 1"),
    ("micro-batch-size", "0", "--micro-batch-size must be at least"),
    ("max-new-tokens", "0", "--max-new-tokens must be at least"),
    ("steps", "0", "--steps must be at least"),
    ("steps", "1e3", "1e3"),
    ("shots", "-1", "--shots must be at least 0"),
    ("out", "{tmp}/file/run.jsonl", "cannot write"),
]

# The same settings as those of the fixture `trained`
AGAIN = ("--model {tiny} --k 3 --steps 4 --batch-size 2 --seq-len 200 --eval-prompts 2 "
         "--max-new-tokens 8 --out {trained} ")

REFUSED = {
    "train.py": [
        ("out", "out"),                                             # it takes no arguments
        ("--preset nosuch", "nosuch"),
        ("--k 1", "--k must be at least 2"),
        ("--stride 0", "--stride must be at least 1"),
        ("--warmup -1", "--warmup must be at least 0"),
        ("--cooldown -1", "--cooldown must be at least 0"),
        ("--curriculum -1", "--curriculum must be at least 0"),
        ("--log-every 0", "--log-every must be at least 1"),
        ("--save-every 0", "--save-every must be at least 1"),
        ("--eval-every -1", "--eval-every must be at least 0"),
        ("--eval-prompts -1", "--eval-prompts must be at least 0"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr: 'inf' is no finite number"),
        ("--beta2 1", "--beta2"),
        ("--clip -1", "--clip must be at least 0"),
        ("--clip inf", "--clip: 'inf' is no finite number"),
        ("--weight-decay -1", "--weight-decay must be at least 0"),
        ("--minutes 0", "--minutes"),
        ("--prefix-loss -1", "--prefix-loss must be at least 0"),
        ("--prefix-loss nan", "--prefix-loss: 'nan' is no finite number"),
        ("--slot1-weight -1", "--slot1-weight must be at least 0"),
        ("--targets softly", "softly"),
        # one of two methods, and none of the other's flags
        ("--k 3 --heads 2", "--heads: not allowed with argument --k"),
        ("--heads 2 --k 3 --preset smollm2", "--k: not allowed with argument --heads"),
        ("--preset smollm2-heads --k 3", "--k trains mask tokens, and this preset heads"),
        ("--loop", "--loop belongs to training with heads: add --heads K"),
        ("--extend", "--extend belongs to training with heads"),
        ("--kl-weight 0", "--kl-weight belongs to training with heads"),
        ("--kl-top 5", "--kl-top belongs to training with heads"),
        ("--draft-vocab 5", "--draft-vocab belongs to training with heads"),
        ("--keep-gb 1", "--keep-gb belongs to training with heads"),
        ("--heads 2 --bidirectional", "--bidirectional belongs to training with mask tokens"),
        ("--heads 2 --fixed-k", "--fixed-k belongs to training with mask tokens"),
        ("--heads 2 --prefix-loss 1", "--prefix-loss belongs to training with mask tokens"),
        ("--heads 2 --slot1-weight 2", "--slot1-weight belongs to training with mask tokens"),
        ("--heads 2 --curriculum 5", "--curriculum belongs to training with mask tokens"),
        ("--heads 2 --stride 1", "--stride belongs to training with mask tokens"),
        ("--heads 2 --fsdp", "--fsdp belongs to training with mask tokens"),
        ("--heads 2 --random-init", "--random-init"),
        ("--heads 2 --preset pretrain-tiny", "--random-init"),
        ("--heads 2 --targets soft", "--targets soft: with --heads the model's distribution is"),
        ("--heads 0", "--heads must be at least 1"),
        ("--heads two", "--heads"),
        ("--heads 2 --kl-weight -1", "--kl-weight must be at least 0"),
        ("--heads 2 --kl-weight nan", "--kl-weight: 'nan' is no finite number"),
        ("--heads 2 --kl-weight inf", "--kl-weight: 'inf' is no finite number"),
        ("--heads 2 --kl-top 0", "--kl-top must be at least 1"),
        ("--heads 2 --draft-vocab -1", "--draft-vocab must be at least 0"),
        ("--heads 2 --keep-gb -1", "--keep-gb must be at least 0"),
        ("--heads 2 --keep-gb nan", "--keep-gb: 'nan' is no finite number"),
        ("--heads 4 --extend", "half as many heads, not looped; {tiny} has no heads"),
        ("--heads 6 --extend --model {headed}", "{headed} has 2 heads"),
        ("--heads 2 --extend --model {headed}", "{headed} has 2 heads"),
        ("--heads 4 --extend --model {looped}", "{looped} has a looped head"),
        ("--heads 4 --extend --loop --model {headed}", "leave out --loop"),
        ("--heads 4 --extend --draft-vocab 9 --model {headed}", "leave out --loop and --draft-v"),
        ("--fsdp", "torchrun"),
        ("--device meta", "no device"),
        ("--data nosuch", "no data 'nosuch'"),
        ("--data {tmp}/fields.jsonl", "{tmp}/fields.jsonl:2: "),
        ("--data {tmp}/single.jsonl", "a single question cannot be trained on and held out: add "
         "rows, or --eval-prompts 0"),
        ("--seq-len 12", "no prompt fits --seq-len 12"),
        ("--seq-len 0", "--seq-len must be at least"),
        ("--seq-len 600", "beyond the model's context of 512 tokens"),
        ("--model {tmp}/file", "{tmp}/file"),
        ("--model {tmp}/base --prompt-format chat", "no chat template"),
        ("--out {tmp}/file", "cannot write to {tmp}/file"),
        # an earlier run is neither written over nor mixed with one of other settings
        (AGAIN, "already holds step-2"),
        (AGAIN + "--no-resume", "already holds step-2"),
        (AGAIN + "--resume --lr 2e-4", "--lr 0.001, not 0.0002"),
        (AGAIN + "--resume --k 4", "--k 3, not 4"),
        (AGAIN + "--resume --data gsm8k.jsonl", "gsm8k.jsonl"),
        (AGAIN + "--resume --eval-prompts 3", "--eval-prompts 2"),
        (AGAIN + "--resume --prompt-format plain", "--prompt-format chat, not plain"),
    ],
    "sample.py": [
        ("--thresh 0.5", "--thresh"),                               # no abbreviations
        ("--k 4", "1 to 3"),
        ("--k 0", "--k 0"),
        ("--threshold nan", "--threshold: 'nan' is no finite number"),
        ("--model {tiny} --k 2", "--k 2"),
        ("--model {tmp}/file", "{tmp}/file"),
        ("--model nosuch/at-all", "nosuch/at-all"),
        ("--model {tmp}/base --prompt-format chat", "no chat template"),
        ("--data {tmp}/nosuch.txt", "cannot read {tmp}/nosuch.txt"),
        ("--data {tmp}/folder", "cannot read {tmp}/folder"),
        ("--data {tmp}/latin1.txt", "cannot read {tmp}/latin1.txt"),
        ("--data {tmp}/empty.txt", "holds no questions"),
        ("--data {tmp}/empty.jsonl", "holds no rows"),
        ("--data {tmp}/long.jsonl", "does not fit the model's context of 512 tokens"),
        ("--temperature 0.5", "--k 1"),
        ("--temperature 0.5 --threshold 0.9", "--k 1"),
        ("--temperature 0.5 --k 3", "add --lossless, or --k 1"),
        ("--temperature 0.5 --k 1 --compare", "--compare"),
        ("--temperature 0.5 --lossless --compare", "--compare"),
        ("--temperature 0.5 --compare --model {headed}", "--compare"),
        ("--temperature -1 --k 1", "--temperature"),
        ("--temperature nan --k 1", "--temperature"),
        ("--top-p 0", "--top-p"),
        ("--top-k -1", "--top-k"),
        ("--narrow", "--lossless"),
        ("--narrow --model {headed}", "--lossless"),
        ("--narrow --lossless --model {headed}", "drafts with heads"),
        ("--k 4 --model {headed}", "1 to 3"),
        ("--k 0 --model {headed}", "--k 0"),
        ("--threshold nan --model {headed}", "--threshold: 'nan' is no finite number"),
        ("--stop ''", "--stop must not be empty"),
    ],
    "eval_gsm8k.py": [
        ("--k 2 4", "1 to 3"),
        ("--k 2 4 --model {headed}", "1 to 3"),
        ("--narrow --model {headed}", "drafts with heads"),
        ("--k 0", "--k 0"),
        ("--threshold 0.9 nan", "--threshold: 'nan' is no finite number"),
        ("--model {tiny} --k 2", "--k 2"),
        ("--data nosuch", "no data 'nosuch'"),
        ("--data {tmp}/few.jsonl --shots 3", "leaves no question"),
        ("--data {tmp}/long.jsonl", "does not fit the model's context of 512 tokens"),
        ("--baseline nosuch", "'nosuch'"),
        ("--stop ''", "--stop must not be empty"),
        ("--model {tmp}/base --prompt-format chat", "no chat template"),
    ],
    "-m common.data": [
        ("gsm8k", "gsm8k"),                                         # it takes no arguments
        ("--data nosuch", "no data 'nosuch'"),
    ],
    "-m studies.ablate": [
        ("--k 2", "--k must be at least 3"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--processes 0", "--processes must be at least 1"),
        ("--only nosuch", "nosuch"),
        ("--out {trained}", "add --resume"),
        ("--table-only", "holds no whole run"),
    ],
    "-m studies.answers": [
        ("--out {tmp}/rows.txt", "end in .jsonl"),
        ("--out {tmp}/few.jsonl", "add --resume"),
        ("--out {tmp}/few.jsonl --resume --data wordproblems --limit 3", "other questions"),
        ("--data {tmp}/long.jsonl", "does not fit the model's context of 512 tokens"),
        ("--model {tmp}/base --prompt-format chat", "no chat template"),
    ],
    "-m studies.bench": [
        ("--rounds 0", "--rounds must be at least 1"),
        ("--batch-size 1 0", "--batch-size must be at least 1"),
        ("--limit 0", "--limit must be at least 1"),
        ("--limit 7", "--limit 7 must be a multiple of --rounds 5"),
        ("--batch-size 1 3", "a round of 8 questions"),
        ("--max-new-tokens 500 --data wordproblems", "do not fit the model's context of 512"),
        ("--warmup -1", "--warmup must be at least 0"),
        ("--threads 0", "--threads must be at least 1"),
    ],
    "-m studies.cascade": [
        ("--heads 1", "--heads must be at least 2"),
        ("--heads 3", "give a power of two"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--limit 1", "at least two"),
        ("--data {tmp}/few.jsonl", "add --questions"),
        ("--only nosuch", "nosuch"),
        ("-- --k 4", "--k behind --"),
    ],
    "-m studies.clash": [
        ("--k 1", "--k must be at least 2"),
        ("--model {headed}", "drafts with heads"),
        ("--out {trained}", "add --resume"),
    ],
    "-m studies.confidence": [
        ("--model {tiny}", "train it first"),
        ("--model {headed}", "drafts with heads"),
        ("--threshold -1", "--threshold must be at least 0"),
        ("--teacher nosuch", "'nosuch'"),
    ],
    "-m studies.efficiency": [
        ("--before {tmp}/folder", "no checkout"),
        ("--k 1", "--k must be at least 2"),
    ],
    "-m studies.figures": [],
    "-m studies.lm_eval_adapter": [
        ("", "nosuch"),                                             # no such task
        ("--k 4", "1 to 3"),
    ],
    "-m studies.plan": [
        ("--model nosuch", "no folder 'nosuch'"),
        ("--model no/such", "no/such"),
        ("--gpus 0", "--gpus"),
        ("--memory 0", "--memory"),
        ("--memory nan", "--memory"),
        ("--fsdp", "several GPUs"),
        ("--gpus 2 --measure", "--measure"),
        ("--prompt-tokens 224", "--prompt-tokens"),
        ("--prompt-tokens 0", "--prompt-tokens"),
        ("--k 0", "--k"),
        ("--heads 2 --adapters 4", "--adapters belongs to training with mask tokens"),
        ("--adapters 4 --prefix-loss 1", "--prefix-loss"),
        ("--adapters 4 --gpus 2 --fsdp", "leave it out with"),
        ("--heads 2 --gpus 2 --fsdp", "leave it out with"),
        ("--heads 2 --targets soft", "--kl-weight"),
        ("--heads 3 --extend", "must be even"),
        ("--loop", "add --heads K"),
        ("--seq-len 600", "context"),
        ("--attention flash", "flash"),
        ("--attention repeated --measure --device cpu", "--attention repeated is what CUDA does"),
        ("--micro-batch-size 0", "--micro-batch-size"),
        ("--out {tmp}", "{tmp}"),
    ],
    "-m studies.tables": [],
    "-m studies.tiny": [
        ("--vocab-size 100", "--vocab-size must be at least"),
        ("--trained {tiny}", "not been trained"),
        ("--trained nosuch", "'nosuch'"),
    ],
    "-m studies.viewer": [
        ("--k 4", "1 to 3"),
        ("--k 0", "--k 0"),
        ("--threshold nan", "--threshold: 'nan' is no finite number"),
        ("--out {tmp}", "it is a folder"),
        ("--json {tmp}/no/page.json", "no folder {tmp}/no"),
        ("'{long}'", "does not fit the model's context of 512 tokens"),
    ],
}


def cases():
    for script, own in REFUSED.items():
        known = set(FLAGS[script].split())
        if script == "-m studies.efficiency":
            known -= {"data"}                               # train.py will say what is wrong
        common = [(f"--{flag} {value}", said) for flag, value, said in EVERYWHERE if flag in known]
        for flags, message in [("--nosuch 1", "--nosuch"), *common, *own]:
            yield pytest.param(script, flags, message, id=f"{script} {flags}")


@pytest.mark.parametrize("script, flags, message", list(cases()))
def test_refused(script, flags, message, tiny, trained, headed, looped, tmp):
    names = {"tiny": tiny, "trained": trained, "headed": headed[0], "looped": looped, "tmp": tmp,
             "long": "word " * 600}
    argv = [word.format(**names) for word in shlex.split(f"{BASE[script]} {flags}")]
    before = everything_under(tmp, trained, headed[0], looped)
    assert_refused(cli(module_of(script), *argv), message.format(**names))
    assert everything_under(tmp, trained, headed[0], looped) == before


def test_exit_codes(capsys, monkeypatch):
    def fail(error):
        raise error

    two_lines = InputError("two\n  lines")
    stopped = "stopped; if anything was saved, the same command with --resume goes on from it\n"
    for error, code, resumes, said in (
            (two_lines, 2, False, "error: two lines\n"), (two_lines, 2, True, "error: two lines\n"),
            (KeyboardInterrupt(), 130, False, ""), (KeyboardInterrupt(), 130, True, stopped)):
        with pytest.raises(SystemExit) as caught:
            run(functools.partial(fail, error), resumes)
        assert caught.value.code == code and capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")                         # of several processes one says it
    monkeypatch.setattr("common.cli.time.sleep", lambda seconds: None)
    for error in (two_lines, KeyboardInterrupt()):
        with pytest.raises(SystemExit):
            run(functools.partial(fail, error), resumes=True)
        assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):                  # a bug keeps its traceback
        run(lambda: 1 / 0)
    assert run(lambda: None) is None


# --------------------------------------------------------------------------------------------------
# common.data and sample.py at work

def test_data_prints_rows(sums):
    result = cli(data, "--seed", 5, "--limit", 2)
    assert result.code == 0
    for i in range(3):
        row = WordProblems(5)[i]
        assert (f"{row['question']}\n\n{row['answer']}\n" in result.out) == (i < 2)
    whole = cli(data, "--data", sums, "--limit", 99).out
    assert whole.count("####") == 14                        # nothing is held out


@pytest.fixture
def decoded(monkeypatch):
    """What sample.py decodes: model, prompts, strategy, limits and Answers of every batch."""
    calls, decode = [], speculate.decode

    def spy(model, tokenizer, prompts, strategy, heads=None, **ending):
        results = decode(model, tokenizer, prompts, strategy, heads, **ending)
        if "on_chunk" in ending:                            # else it only warms up, shown to nobody
            calls.append(SimpleNamespace(model=model, prompts=prompts, strategy=strategy,
                                         heads=heads, ending=ending, results=results))
        return results

    monkeypatch.setattr(speculate, "decode", spy)
    return calls


def plain(text):
    """Text without what printing may change: half characters, and control characters."""
    return re.sub("[\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f?]", "", text)


def visible(tokens, tokenizer):
    """The text of tokens, control tokens by their names."""
    names = {i: name.encode() for name, i in tokenizer.control.items()}
    written = b"".join(names.get(token, tokenizer.token_bytes([token])) for token in tokens)
    return written.decode("utf-8", "replace")


def assert_report(out, results, tokenizer, boxed=True):
    """What sample.py printed of one strategy agrees with the Answers that it is about. Of k = 1 it
    prints the text alone, not `boxed` token by token."""
    end, bare = 0, plain(out)
    for result in results:
        assert sum(result.chunks) == len(result.tokens)
        text = plain(visible(result.tokens, tokenizer))
        if boxed:
            chunks = "".join(rf"\[{size}\|(.*?)\]" for size in result.chunks) + "\n"
            printed = re.compile(chunks, re.DOTALL).search(out, end)
            assert printed and plain("".join(printed.groups())) == text
            end = printed.end()
        else:
            assert text and "[1|" not in out
            end = bare.index(f"\n\n{text}\n", end) + len(text)
    sizes = Counter(size for r in results for size in r.chunks)
    finishes = Counter(r.finish for r in results)
    said = re.search(r"^(\d+) tokens in (\d+) passes", out, re.MULTILINE)
    assert int(said[1]) == sum(len(r.tokens) for r in results)
    assert int(said[2]) == sum(sizes.values())
    line, = re.findall(r"^chunk sizes: (.*)$", out, re.MULTILINE)
    assert line == ", ".join(f"{size} x {sizes[size]}" for size in sorted(sizes))
    line, = re.findall(r"^finished by: (.*)$", out, re.MULTILINE)
    assert line == ", ".join(f"{finish} x {finishes[finish]}" for finish in sorted(finishes))
    assert "tokens/s" in out


@pytest.mark.parametrize("flags, expected", [
    ("", Strategy(3, 0.9)),
    ("--k 3", Strategy(3)),
    ("--k 1", Strategy(1)),
    ("--threshold 0.5", Strategy(3, 0.5)),
    ("--k 2 --threshold 0", Strategy(2, 0.0)),
])
def test_sample_reports_what_it_did(flags, expected, trained, decoded):
    result = cli(sample, "How many cows?", "--model", trained, "--max-new-tokens", 17,
                 *flags.split())
    assert result.code == 0 and result.err == "" and "How many cows?" in result.out
    call, = decoded
    assert call.strategy == expected and call.ending["max_new_tokens"] == 17
    assert f"=== {expected.name}\n" in result.out
    assert_report(result.out, call.results, Tokenizer(trained / "latest"), boxed=expected.k > 1)
    answer, = call.results
    assert len(answer.tokens) <= 17
    assert (answer.finish == "length") == (len(answer.tokens) == 17)
    if not expected.threshold and answer.finish == "length":    # full chunks, the last one cut
        whole, rest = divmod(17, expected.k)
        assert answer.chunks == [expected.k] * whole + [rest] * (rest > 0)
    assert "\x1b" not in result.out                             # not a terminal: no colours


def test_sample_without_training_emits_one_a_pass(tiny, decoded):
    result = cli(sample, "x", "--model", tiny, "--max-new-tokens", 5, "--threshold", 0)
    assert result.code == 0 and "has not been trained" in result.out
    assert decoded[0].strategy.k == 1 and set(decoded[0].results[0].chunks) == {1}


def test_sample_compare(trained, decoded):
    """--compare decodes once more with k = 1; what it says about the two is recounted here."""
    common = ("--model", trained, "--max-new-tokens", 12, "--compare")
    result = cli(sample, "one", "two", *common, "--k", 3)
    ours, ones = decoded
    assert ours.strategy == Strategy(3) and ones.strategy == Strategy(1)
    assert ours.prompts == ones.prompts
    _, first, second = result.out.split("\n=== ")
    assert_report(first, ours.results, Tokenizer(trained / "latest"))
    assert_report(second, ones.results, Tokenizer(trained / "latest"), boxed=False)
    pairs = [(a.tokens, b.tokens) for a, b in zip(ours.results, ones.results)]
    share = sum(len(os.path.commonprefix(pair)) for pair in pairs) / sum(len(b) for _, b in pairs)
    assert f"{sum(a == b for a, b in pairs)} of 2 answers identical" in second
    assert f"{share:.0%} of k = 1's tokens" in second
    assert 0 < share < 1                                        # else they could be constants
    itself = cli(sample, "one", *common, "--k", 1).out
    assert "1 of 1 answers identical" in itself and "100%" in itself


def test_sample_several_questions(trained, tmp_path, decoded):
    """Typed ones and those of --data, a text file or JSONL; in batches, in order, up to --limit."""
    text, rows = tmp_path / "more.txt", tmp_path / "rows.jsonl"
    text.write_text("third\n\n  \nvierte für dich\n", encoding="utf-8")
    rows.write_text('{"question": "fifth", "answer": "a"}\n'
                    '{"prompt": "sixth", "response": "b"}\n')
    common = ("--model", trained, "--max-new-tokens", 4, "--k", 2)
    result = cli(sample, "first", "second", "--data", text, "--batch-size", 3, *common)
    assert [len(call.prompts) for call in decoded] == [3, 1]
    questions = ("first", "second", "third", "vierte für dich")
    places = [result.out.index(f"\n{question}\n") for question in questions]
    assert places == sorted(places)
    answers = [answer for call in decoded for answer in call.results]
    assert_report(result.out, answers, Tokenizer(trained / "latest"))
    assert "over 4 prompts" in result.out
    decoded.clear()
    result = cli(sample, "first", "--data", rows, "--limit", 2, *common)
    assert len(decoded[0].prompts) == 2
    assert "\nfirst\n" in result.out and "\nfifth\n" in result.out and "sixth" not in result.out


def test_sample_stops(trained, tmp_path, decoded):
    """Stop tokens and stop strings end an answer; --ignore-stop does not look at stop tokens."""
    folder = shutil.copytree(trained / "latest", tmp_path / "model")
    common = ("How many?", "--model", folder, "--max-new-tokens", 24, "--k", 2)
    cli(sample, *common)
    free = decoded.pop().results[0]
    assert free.finish == "length"
    # a token in the middle becomes a stop token
    middle = next(i for i in range(2, 24) if free.tokens[i] not in free.tokens[:i])
    generation = read_json(folder / "generation_config.json")
    write_json(folder / "generation_config.json",
               generation | {"eos_token_id": [2, free.tokens[middle]]})
    for flags in ([], ["--ignore-stop", "--no-ignore-stop"]):
        assert "finished by: stop x 1\n" in cli(sample, *common, *flags).out
        assert decoded.pop().results[0].tokens == free.tokens[:middle + 1]
    assert "finished by: length x 1\n" in cli(sample, *common, "--ignore-stop").out
    assert decoded.pop().results[0].tokens == free.tokens
    # the characters of one token and half of the next become a stop string
    tokenizer = Tokenizer(folder)
    texts = [tokenizer.decode([token]) for token in free.tokens]
    legible = [text.isprintable() and "\ufffd" not in text and text != "" for text in texts]
    first = next(i for i in range(3, 22) if legible[i] and legible[i + 1])
    stop = texts[first] + texts[first + 1][:1]
    until = next(n for n in range(1, 25) if stop in tokenizer.decode(free.tokens[:n]))
    result = cli(sample, *common, "--ignore-stop", "--stop", stop)
    assert decoded.pop().results[0].tokens == free.tokens[:until]
    assert "finished by: stop string x 1\n" in result.out


@pytest.mark.parametrize("flags, expected", [
    ("", Strategy(3, None, "wide")),
    ("--narrow", Strategy(3, None, "narrow")),
    ("--k 2", Strategy(2, None, "wide")),
    ("--threshold 0.2", Strategy(3, 0.2, "wide")),
])
def test_sample_lossless(flags, expected, trained, decoded):
    """The text of --k 1, in every form; --compare says so, and acceptance is printed."""
    result = cli(sample, "What is 3 + 4?", "--model", trained, "--max-new-tokens", 12,
                 "--ignore-stop", "--compare", "--lossless", *flags.split())
    ours, ones = decoded
    assert result.code == 0 and "1 of 1 answers identical to k = 1" in result.out
    assert ours.strategy == expected and ones.strategy == Strategy(1)
    assert ours.results[0].tokens == ones.results[0].tokens
    assert f"=== {expected.name}\n" in result.out
    fed = any(fed for fed, _ in ours.results[0].drafts)
    assert ("(stood / fed): " in result.out) == fed and (fed or expected.threshold)


@pytest.mark.parametrize("way, lossless", [
    ("trained --k 1", None),
    ("trained --lossless", "wide"),
    ("trained --lossless --narrow", "narrow"),
    ("trained --lossless --k 1", "wide"),
    ("headed", "heads"),
    ("headed --k 2 --lossless", "heads"),
])
def test_sample_temperature(trained, headed, decoded, way, lossless):
    """Seeded; the share and number of candidates reach the draw. With one of them what is drawn is
    the greedy text, however it was drafted."""
    folder, *flags = way.split()
    common = ("What is 3 + 4?", "--model", trained if folder == "trained" else headed[0],
              "--max-new-tokens", 20, "--ignore-stop")

    def tokens(*more):
        assert cli(sample, *common, *more).code == 0
        return decoded[-1].results[0].tokens

    hot = tokens(*flags, "--temperature", 2, "--seed", 1)
    assert decoded[-1].strategy.lossless == lossless
    assert hot == tokens(*flags, "--temperature", 2, "--seed", 1)
    assert hot != tokens(*flags, "--temperature", 2, "--seed", 2)
    greedy = tokens("--k", 1)
    assert hot != greedy == tokens(*flags, "--temperature", 2, "--top-k", 1)
    assert greedy == tokens(*flags, "--temperature", 2, "--top-p", 1e-6)


@pytest.mark.parametrize("flags, expected", [
    ("", Strategy(3, None, "heads")),
    ("--lossless", Strategy(3, None, "heads")),                     # they always are
    ("--k 2", Strategy(2, None, "heads")),
    ("--threshold 0.2", Strategy(3, 0.2, "heads")),
    ("--k 1", Strategy(1)),
])
def test_sample_with_heads(headed, decoded, flags, expected):
    """Chunks, how many drafts stood, and the text of the model that the heads were trained for."""
    out, start = headed
    result = cli(sample, "7 + 3", "11 + 3", "--model", out, "--max-new-tokens", 24, "--compare",
                 "--ignore-stop", *flags.split())
    assert result.code == 0 and result.err == "" and "k_max 3\n" in result.out
    assert "has not been trained" not in result.out
    ours, ones = decoded
    assert ours.strategy == expected and ones.strategy == Strategy(1)
    assert f"=== {expected.name}\n" in result.out
    _, first, second = result.out.split("\n=== ")
    assert_report(first, ours.results, Tokenizer(out / "latest"), boxed=expected.k > 1)
    assert "2 of 2 answers identical to k = 1; 100% of k = 1's tokens" in second
    sizes = {size for answer in ours.results for size in answer.chunks}
    assert sizes == ({1} if flags == "--k 1" else {1, 2} if flags == "--k 2" else {1, 2, 3})
    shares = [f"{share:.0%}" for share in report.acceptance_by_position(ours.results)]
    line = "acceptance of draft 1, 2, ... (stood / fed): " + ", ".join(shares)
    assert (line + "\n" in first) == bool(shares) and len(shares) == expected.k - 1
    cli(sample, "7 + 3", "11 + 3", "--model", start, "--max-new-tokens", 24, "--ignore-stop",
        "--prompt-format", "plain")
    assert decoded[-1].heads is None
    assert [a.tokens for a in decoded[-1].results] == [a.tokens for a in ours.results]


@pytest.mark.parametrize("model, knows", [
    ("tiny-mtp", True), ("tiny", True), ("own rows", True),
    ("trained", False), ("headed", False), ("none of ours", False)])
def test_sample_says_what_a_tiny_model_knows(model, knows, tiny, trained, headed, sums, tmp_path):
    """To who types a question of another kind, also after training on other rows, which says the
    same; of other models nothing is known."""
    folder = {"trained": trained, "headed": headed[0], "none of ours": tiny}.get(model, model)
    if model == "own rows":
        folder = tmp_path / "out"
        result = cli(training, "--data", sums, *QUICK, "--steps", 1, "--out", folder)
        assert "note: tiny knows word problems alone" in result.out
    result = cli(sample, "Why is the sky blue?", "--model", folder, "--max-new-tokens", 1)
    assert result.code == 0
    notes = re.findall(r"note: this model knows .*", result.out)
    assert len(notes) == knows and "--seed" not in result.out
    for note in notes:
        assert f"knows {len(STRUCTURES)} kinds of word problems" in note
        assert "--model smollm2-135m" in note


def test_sample_without_a_prompt(tmp_path):
    """An unseen problem, another one for each --seed, which the line names; neither one that
    training asks when it evaluates nor the viewer's."""
    shown, few = [], ("--model", "tiny-mtp", "--max-new-tokens", 1)
    for seed in (0, 5):
        result = cli(sample, *few, "--seed", seed)
        assert f"an unseen word problem (another one: --seed {seed + 1})\n" in result.out
        assert "note: this model knows" not in result.out           # it is of a kind that it knows
        question = re.search(r"=== .*\n\n(.*)\n\n", result.out)[1]
        cli(viewer, *few, "--seed", seed, "--out", tmp_path / "page.html", "--json",
            tmp_path / "page.json")
        theirs, = read_json(tmp_path / "page.json")["prompts"]
        _, asked = data.load_data("wordproblems", 1000, seed)       # training's default: 32
        assert not {question, theirs["text"]} & {row["question"] for row in asked}
        shown += [question, theirs["text"]]
    assert len(set(shown)) == 4


def test_sample_prompt_format_dtype_and_device(tiny, trained, tmp, decoded):
    """The format is the training's; without a template it is plain; a flag overrules both."""
    common = ("x", "--max-new-tokens", 2, "--device", "cpu")
    plainly = tmp / "plain"             # it has a template, but was not trained with it
    shutil.copytree(trained / "latest", plainly)
    config = read_json(plainly / "config.json")
    config["nanomtp"]["prompt_format"] = "plain"
    write_json(plainly / "config.json", config)
    for folder, flag, style in [(trained, None, "chat"), (tmp / "base", None, "plain"),
                                (tiny, None, "chat"), (plainly, None, "plain"),
                                (plainly, "chat", "chat"), (trained, "plain", "plain")]:
        flags = ["--prompt-format", flag] if flag else []
        assert cli(sample, *common, "--model", folder, *flags).code == 0
        assert decoded.pop().prompts == [Tokenizer(resolve(folder)).prompt("x", style)]
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert cli(sample, *common, "--model", trained, "--dtype", dtype).code == 0
        model = decoded.pop().model
        assert model.output_matrix.dtype == expected and model.device.type == "cpu"


@pytest.mark.parametrize("script, flags", [
    ("sample.py", ["x"]),
    ("eval_gsm8k.py", ["--data", "{sums}", "--limit", 1, "--k", 1]),
    ("-m studies.viewer", ["x"]),
])
def test_default_model(script, flags, trained, sums, tmp_path, monkeypatch):
    """out/latest of the current folder if there is one, else tiny-mtp of this repository."""
    module, names = module_of(script), []
    load = module.load
    monkeypatch.setattr(module, "load", lambda name, *rest: names.append(name) or load(name, *rest))
    monkeypatch.chdir(tmp_path)
    flags = [str(flag).format(sums=sums) for flag in flags] + ["--max-new-tokens", 1]
    assert cli(module, *flags).code == 0
    (tmp_path / "out").mkdir()                                      # nothing is saved there yet
    again = ["--resume"] if script == "eval_gsm8k.py" else []
    assert cli(module, *flags, *again).code == 0
    (tmp_path / "out" / "latest").symlink_to((trained / "latest").resolve())
    again = ["--out", "another"] if script == "eval_gsm8k.py" else []
    assert cli(module, *flags, *again).code == 0
    assert names == ["tiny-mtp", "tiny-mtp", "out/latest"]


# --------------------------------------------------------------------------------------------------
# Printing

@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


PAINT = r"\x1b\[48;5;(\d+);38;5;16m"
BADGE = re.escape(report.BADGE) + r"(\d+)\|"           # how many tokens, before their paint


def print_chunks(chunks, tokenizer, stream, boxed=True):
    printer = report.ChunkPrinter(tokenizer, stream, boxed)
    for chunk in chunks:
        printer(chunk)
    return stream.getvalue()


def test_chunks_are_coloured_on_a_terminal(tiny, terminal):
    tokenizer = Tokenizer(tiny)
    chunks = [tokenizer.encode(text) for text in ("in the", "over\n1", " the")]
    written = print_chunks(chunks, tokenizer, terminal)
    assert re.sub(r"\x1b\[[\d;]*m", "", written) == "2|in the5|over\n11| the"
    assert [badge for badge, _ in re.findall(BADGE + PAINT, written)] == ["2", "5", "1"]
    assert written.startswith(report.BADGE) and not re.match(PAINT, report.BADGE)
    first, second, same, third = re.findall(PAINT, written)
    assert second == same and len({first, second, third}) == 3      # repainted behind the newline
    assert "\x1b[0m\n" in written and written.endswith("\x1b[0m")   # no colour to the right margin


@pytest.mark.parametrize("stream, no_color, coloured", [
    (Terminal, None, True), (Terminal, "", True), (Terminal, "1", False),
    (io.StringIO, None, False)])
def test_when_chunks_are_coloured(tiny, monkeypatch, stream, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    tokenizer = Tokenizer(tiny)
    written = print_chunks([tokenizer.encode(" the")], tokenizer, stream())
    assert ("\x1b" in written) == coloured and (written == "[1| the]") == (not coloured)


def test_terminal_run_is_coloured(trained, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = cli(sample, "x", "--model", trained, "--max-new-tokens", 7, "--k", 3, "--ignore-stop",
                 stream=Terminal)
    assert len(set(re.findall(PAINT, result.out))) == 3 and "[3|" not in result.out
    assert re.findall(BADGE, result.out) == ["3", "3", "1"]
    result = cli(sample, "x", "--model", trained, "--max-new-tokens", 7, "--k", 1, stream=Terminal)
    assert result.code == 0 and "\x1b" not in result.out            # k = 1: a text to read


def test_control_tokens_are_shown_by_name(tiny, terminal):
    """The end of an answer is a token of its chunk, so that counts and what is seen agree."""
    tokenizer = Tokenizer(tiny)
    chunks = [tokenizer.encode("in the"), [*tokenizer.encode(" the"), tokenizer.end_id]]
    boxes = "[2|in the][2| the<|im_end|>]"
    assert print_chunks(chunks, tokenizer, io.StringIO()) == boxes
    answer = SimpleNamespace(tokens=sum(chunks, []), chunks=[2, 2])
    assert report.boxes(tokenizer, answer) == boxes
    for stream in (io.StringIO(), terminal):
        assert print_chunks(chunks, tokenizer, stream, boxed=False) == "in the the<|im_end|>"
    assert tokenizer.decode(answer.tokens) == "in the the"          # it is no part of the text


def test_no_escape_character_of_the_model_reaches_the_terminal(tiny, terminal):
    """A model that writes `ESC ]0;...` or `ESC [2J` must not retitle or clear a terminal."""
    tokenizer = Tokenizer(tiny)
    tokens = tokenizer.encode("a\x1b[2Jb\x1b]0;owned\x07c")
    assert "\x1b" in tokenizer.decode(tokens)                       # the printer must remove it
    pairs = [tokens[first:first + 2] for first in range(0, len(tokens), 2)]
    for stream in (terminal, io.StringIO()):
        written = print_chunks(pairs, tokenizer, stream)
        text = re.sub(rf"{PAINT}|{BADGE}|\x1b\[0m", "", written)    # without our own commands
        assert "\x1b" not in text
        assert re.sub(r"\[\d\||\]", "", text).replace("[", "").startswith("a?2Jb?")


def test_character_over_two_chunks_is_printed_once_and_whole(tiny, terminal):
    tokenizer = Tokenizer(tiny)
    for text in ("é", "€", "🦉"):
        first, *rest = tokenizer.encode(text)                       # one token per byte
        assert len(rest) == len(text.encode()) - 1
        written = print_chunks([[first], rest], tokenizer, io.StringIO())
        assert written == f"[1|][{len(rest)}|{text}]"
    written = print_chunks([[first], rest], tokenizer, terminal)
    assert written.count("🦉") == 1 and "\ufffd" not in written


# --------------------------------------------------------------------------------------------------
# train.py at work

def steps_kept(out):
    return sorted(path.name for path in out.iterdir() if path.name != "log.jsonl")


def train_on(sums, tiny, out, *flags):
    """A run of train.py on the short rows, one row in the log for each step."""
    result = cli(training, "--model", tiny, "--data", sums, *QUICK, "--out", out, *flags)
    assert result.code == 0, result
    return result


def test_train_leaves_a_checkpoint_and_a_log(tiny, trained):
    assert steps_kept(trained) == ["latest", "step-2"]
    assert (trained / "latest").resolve() == trained / "step-2"
    config = read_json(trained / "latest" / "config.json")
    assert config["nanomtp"] == {
        "mask_token_id": TINY_VOCAB, "k_max": 3, "bidirectional": False, "prompt_format": "chat",
        "data": "wordproblems", "steps": 2}
    assert Tokenizer(trained / "latest").control[MASK_TOKEN] == TINY_VOCAB
    start, = log_rows(trained, "start")
    flags = {flag.replace("-", "_") for flag in FLAGS["train.py"].split() if flag[:3] != "no-"}
    assert flags <= set(start)
    assert start["k"] == 3 and start["seq_len"] == 200 and start["prompt_format"] == "chat"
    assert start["device"].startswith(("cpu", "cuda", "mps"))
    assert start["dtype"] in ("fp32", "bf16")                       # not "auto"
    evals = log_rows(trained, "eval")
    assert [row["step"] for row in evals] == [0, 2]         # before it begins, and of what came out
    for row in evals:
        assert row["prompts"] == 2 and re.match(r"\[[123]\|", row["sample"])
    assert [row["step"] for row in log_rows(trained, "train")] == [1, 2]
    end, = log_rows(trained, "end")
    assert end["step"] == 2 and end["interrupted"] is False
    state = torch.load(trained / "latest" / "trainer.pt", weights_only=True)
    assert state["step"] == 2 and state["args"]["model"] == str(tiny)


def test_train_schedule_logs_evaluations_and_checkpoints(tiny, sums, tmp_path):
    """--lr, --warmup, --cooldown, --steps and all that happens every so many of them."""
    out = tmp_path / "out"
    result = train_on(
        sums, tiny, out, "--lr", 0.004, "--warmup", 4, "--cooldown", 2, "--steps", 6,
        "--log-every", 2, "--eval-every", 3, "--save-every", 1, "--eval-prompts", 3,
        "--max-new-tokens", 5)
    assert f"{sums}: 12 rows to train on, 2 questions held out\n" in result.out     # of 14, not 3
    rows = log_rows(out, "train")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["lr"] for row in rows] == pytest.approx([0.002, 0.004, 0.002])
    evals = log_rows(out, "eval")
    assert [row["step"] for row in evals] == [0, 3, 6]
    for row in evals:
        rate = row["tokens_per_forward"]
        assert row["prompts"] == 2 and 1 <= rate <= 3
        assert all(0 <= row[key] <= 1 for key in ("accuracy", "accuracy_k1", "agreement_with_k1"))
        assert re.search(rf"step {row['step']}: .* {rate:.2f} tokens per forward", result.out)
        assert sum(map(int, re.findall(r"\[(\d)\|", row["sample"]))) == 5       # its limit
    assert steps_kept(out) == ["latest", "step-5", "step-6"]        # the last two, of six
    assert (out / "latest").resolve().name == "step-6"


def test_train_resume_goes_on(tiny, sums, tmp_path):
    """It starts a run where there is none; else it goes on, under new limits, in the same log."""
    out = tmp_path / "out"
    first = train_on(sums, tiny, out, "--resume", "--steps", 2)
    assert "nothing to resume" in first.out
    again = train_on(sums, tiny, out, "--resume", "--steps", 3, "--save-every", 7,
                     "--micro-batch-size", 1)
    assert "nothing to resume" not in again.out
    assert [row["step"] for row in log_rows(out, "train")] == [1, 2, 3]
    begun = log_rows(out, "start") + log_rows(out, "resume")
    assert [row["step"] for row in begun] == [0, 2]
    assert steps_kept(out) == ["latest", "step-2", "step-3"]
    assert (out / "latest").resolve().name == "step-3"
    before = everything_under(out / "step-2", out / "step-3")
    train_on(sums, tiny, out, "--resume", "--steps", 3)             # nothing left to do
    assert everything_under(out / "step-2", out / "step-3") == before


def test_train_batches(tiny, tmp_path, monkeypatch):
    """--batch-size sequences a step, each computed once, in passes of --micro-batch-size, none
    longer than --seq-len."""
    make, passes = training.make_batch, []

    def spy(encoded, *rest, **more):
        passes.append([len(ids) for _, ids in encoded])
        return make(encoded, *rest, **more)

    monkeypatch.setattr(training, "make_batch", spy)
    rows = [{"question": "q" * n, "answer": "answer " * n} for n in range(1, 16)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train_on(path, tiny, tmp_path / "out", "--steps", 2, "--batch-size", 5,
                      "--micro-batch-size", 2, "--seq-len", 40)
    assert re.search(r"of the first 13 rows 0 are left out .* and \d+ answers are cut", result.out)
    assert [len(lengths) for lengths in passes] == [2, 2, 1] * 2
    lengths = [length for own in passes for length in own]
    assert max(lengths) == 40 and min(lengths) < 40         # some were cut, some are short enough


def test_train_stride_k_and_curriculum(tiny, sums, tmp_path):
    """Denser anchors give more slots; a curriculum begins with k = 2; --fixed-k is always k_max."""
    logs = {}
    for name, flags in {"dense": ["--stride", 1, "--k", 8], "sparse": ["--stride", 5, "--k", 8],
                        "grown": ["--k", 8, "--curriculum", 1000],
                        "fixed": ["--k", 8, "--fixed-k"]}.items():
        train_on(sums, tiny, tmp_path / name, "--steps", 4, *flags)
        logs[name] = log_rows(tmp_path / name, "train")
    for dense, sparse in zip(logs["dense"], logs["sparse"]):
        assert dense["slots"] / dense["k"] > 3 * sparse["slots"] / sparse["k"]
    assert max(row["k"] for row in logs["dense"]) > 4
    assert {row["k"] for row in logs["grown"]} == {2}
    assert {row["k"] for row in logs["fixed"]} == {8}
    for row in logs["dense"] + logs["sparse"]:
        assert 2 <= row["k"] <= 8 and row["slots"] % row["k"] == 0
        assert len(row["agreement"]) == len(row["confidence"]) == row["k"]
    grown = read_json(tmp_path / "grown" / "latest" / "config.json")
    assert grown["nanomtp"]["k_max"] == 8


def test_train_bidirectional(tiny, sums, tmp_path, decoded, monkeypatch):
    """Trained, evaluated and, without a word from the user, decoded so; with soft targets and
    prefix loss on top."""
    make, batches = training.make_batch, []
    mask_for_pass, ways = sample.mask_for_pass, []

    def spy_on_batches(*args, **more):
        batches.append(make(*args, **more))
        return batches[-1]

    def spy_on_passes(positions, n_pending, k, S, bidirectional):
        ways.append(bidirectional)
        return mask_for_pass(positions, n_pending, k, S, bidirectional)

    monkeypatch.setattr(training, "make_batch", spy_on_batches)
    monkeypatch.setattr(sample, "mask_for_pass", spy_on_passes)
    out = tmp_path / "out"
    train_on(sums, tiny, out, "--steps", 1, "--eval-every", 1, "--max-new-tokens", 3, "--fixed-k",
             "--bidirectional", "--targets", "soft", "--prefix-loss", 1)
    for batch in batches:
        assert not torch.equal(batch.mask, batch.teacher_mask) and len(batch.next_token)
    assert ways and all(ways)
    assert read_json(out / "latest" / "config.json")["nanomtp"]["bidirectional"] is True
    ways.clear()
    assert cli(sample, "x", "--model", out, "--max-new-tokens", 12, "--k", 3,
               "--ignore-stop").code == 0
    assert ways and all(ways)
    call, = decoded
    call.model.config.raw["nanomtp"]["bidirectional"] = False
    tokenizer = Tokenizer(out / "latest")
    tokenizer.stop_ids = set()
    causal, = sample.generate(call.model, tokenizer, call.prompts, 3, max_new_tokens=12)
    assert call.results[0].confidences != causal.confidences


def test_train_limit(tiny, sums, tmp_path, monkeypatch):
    """--limit N: the first N rows alone, over and over; what is held out is no part of them."""
    draw, drawn = training.draw_rows, []

    def spy(rows, *rest):
        chosen = draw(rows, *rest)
        drawn.extend(row["question"] for row in chosen)
        return chosen

    monkeypatch.setattr(training, "draw_rows", spy)
    result = train_on(sums, tiny, tmp_path / "out", "--limit", 3, "--steps", 4, "--seed", 4)
    assert f"{sums}: 3 rows to train on, 2 questions held out\n" in result.out
    first, _ = data.load_data(str(sums), 2, seed=4)
    assert len(drawn) == 8 and set(drawn) == {row["question"] for row in first[:3]}
    train_on(sums, tiny, tmp_path / "all", "--limit", 99, "--steps", 1)     # as many as there are


def test_train_on_all_rows(tiny, sums, tmp_path, monkeypatch):
    """--eval-prompts 0: nothing is held out, so that --eval-every finds nothing to ask."""
    monkeypatch.setattr(training, "evaluate", lambda *_: pytest.fail("there is nothing to ask"))
    result = train_on(sums, tiny, tmp_path / "out", "--eval-prompts", 0, "--eval-every", 1,
                      "--steps", 2)
    assert f"{sums}: 14 rows to train on, 0 questions held out\n" in result.out
    assert len(log_rows(tmp_path / "out", "train")) == 2 and not log_rows(tmp_path / "out", "eval")


def test_train_minutes_stops_early_and_saves(tiny, sums, tmp_path):
    out = tmp_path / "out"
    result = train_on(sums, tiny, out, "--steps", 100_000, "--minutes", 0.01, "--warmup", 0,
                      "--cooldown", 50_000)
    end, = log_rows(out, "end")
    assert f"\n{end['step']} of 100000 steps; the newest" in result.out
    assert result.out.endswith("\nto go on: the same command with --resume\n")
    assert 1 <= end["step"] < 100_000 and end["interrupted"] is False and end["minutes"] >= 0.01
    assert (out / "latest").resolve().name == f"step-{end['step']}"
    assert {row["lr"] for row in log_rows(out, "train")} == {2e-4}      # not cooling down yet


def test_train_seed_dtype_and_format(tiny, tmp_path, monkeypatch):
    """One seed is one run, another seed or format another; bf16 is nearly it, saved as fp32."""
    attention, dtypes = torch.nn.functional.scaled_dot_product_attention, set()

    def spy(*args, **more):
        values = attention(*args, **more)
        dtypes.add(values.dtype)
        return values

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    losses, notes = {}, {}
    for name, flags in {"a": [], "b": [], "seed": ["--seed", 1], "bf16": ["--dtype", "bf16"],
                        "plain": ["--prompt-format", "plain"]}.items():
        dtypes.clear()
        result = cli(training, "--model", tiny, "--data", "wordproblems", "--k", 3, "--steps", 2,
                     "--batch-size", 2, "--seq-len", 200, "--eval-every", 0, "--device", "cpu",
                     "--dtype", "fp32", *flags, "--out", tmp_path / name)
        assert result.code == 0
        # of the student and the teacher
        assert dtypes == {torch.bfloat16 if name == "bf16" else torch.float32}
        losses[name] = [row["loss"] for row in log_rows(tmp_path / name, "train")]
        notes[name] = read_json(tmp_path / name / "latest" / "config.json")
    assert losses["a"] == losses["b"]
    assert all(losses["a"] != losses[name] for name in ("seed", "bf16", "plain"))
    assert losses["a"] == pytest.approx(losses["bf16"], rel=0.1)
    start, = log_rows(tmp_path / "bf16", "start")
    assert start["dtype"] == "bf16" and start["device"].startswith("cpu")
    weights = load_file(tmp_path / "bf16" / "latest" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert notes["bf16"]["dtype"] == "float32"
    assert notes["a"]["nanomtp"]["prompt_format"] == "chat"
    assert notes["plain"]["nanomtp"]["prompt_format"] == "plain"


def test_train_default_model(sums, tmp_path, monkeypatch):
    """Without --model and --out: the tiny model, and out/ right here, where sample.py looks."""
    monkeypatch.chdir(tmp_path)
    assert cli(training, "--data", sums, *QUICK, "--steps", 1).code == 0
    start, = log_rows(tmp_path / "out", "start")
    assert start["model"] == "tiny" and 1.5e6 < start["parameters"] < 2.5e6
    assert steps_kept(tmp_path / "out") == ["latest", "step-1"]
    assert "[2|" in cli(sample, "1 + 1", "--k", 2, "--max-new-tokens", 2).out


def test_train_presets(monkeypatch):
    """A preset sets defaults, a flag wins over it, and `tiny` is what no preset means."""
    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        return vars(training.get_args())

    assert settings() == settings("--preset", "tiny")
    for name, changes in training.PRESETS.items():
        assert settings("--preset", name) == settings() | changes | {"preset": name}
    assert settings("--preset", "paper", "--lr", 1e-4)["lr"] == 1e-4
    mixed = settings("--lr", 3e-4, "--preset", "pretrain-tiny", "--no-random-init")
    assert mixed["lr"] == 3e-4 and mixed["random_init"] is False


def test_train_from_a_trained_checkpoint(trained, sums, tmp_path):
    """--model may be a run of train.py: its mask token is kept, no second one is added."""
    train_on(sums, trained, tmp_path / "out", "--steps", 1)
    before, after = (load_file(out / "latest" / "model.safetensors")
                     for out in (trained, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()}
    name = "model.embed_tokens.weight"
    moved = after[name][TINY_VOCAB] - before[name][TINY_VOCAB]
    assert 0 < moved.abs().max() < 1e-3                             # trained on, not drawn anew


# --------------------------------------------------------------------------------------------------
# True subprocesses: what a shell sees

def shell(*words):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=900)


def test_shell(trained, tmp_path):
    done = shell("sample.py", "How many?", "--model", trained, "--k", 3, "--max-new-tokens", 7,
                 "--ignore-stop")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    assert done.stdout.count("[3|") >= 2 and "7 tokens in 3 passes: 2.33" in done.stdout
    assert "chunk sizes: 1 x 1, 3 x 2\n" in done.stdout
    done = shell("train.py", "--k", "1", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    done = shell("-m", "common.data", "--limit", 1)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("####") == 1
