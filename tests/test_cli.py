"""
The command lines. Bad input is one line on stderr and exit code 2, before any work and with nothing written; good input
says what it did, and what it says is checked against what was computed. Nearly all of it runs in this process.
"""
import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_VOCAB, log_rows, signals_kept
from safetensors.torch import load_file

import data
import eval_gsm8k
import pretrained
import sample
import train as training
from extras import report
from tokenizer import MASK_TOKEN, Tokenizer

SCRIPTS = {"train.py": training, "sample.py": sample, "eval_gsm8k.py": eval_gsm8k, "data.py": data,
           "pretrained.py": pretrained}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def cli(module, *argv, stream=io.StringIO):
    """Run `python MODULE.py ARGV` in this process. A traceback is not caught: it fails the test."""
    out, err, code = stream(), io.StringIO(), 0
    quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with pytest.MonkeyPatch.context() as patch, signals_kept(), quiet[0], quiet[1]:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            pretrained.run(module.main)
        except SystemExit as stopped:
            code = stopped.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def assert_refused(result, message):
    """Exit code 2 and one line that names the problem."""
    assert result.code == 2, result
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    assert message in result.err, result.err
    assert "Traceback" not in result.out


def everything_under(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- checkpoints and files to work on

QUICK = ("--k", 3, "--batch-size", 2, "--seq-len", 64, "--eval-every", 0, "--eval-prompts", 2, "--lr", 2e-4,
         "--prompt-format", "plain")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A JSONL file of 14 short rows, on which a step takes milliseconds."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    rows = [{"question": f"{a} + 3", "answer": f"{a} and 3 is {a + 3}.\n#### {a + 3}"} for a in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The --out of a two-step run with k_max = 3: read it, never write to it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    result = cli(training, "--model", tiny, "--data", "wordproblems", "--k", 3, "--steps", 2, "--batch-size", 2,
                 "--seq-len", 200, "--eval-prompts", 2, "--eval-tokens", 8, "--out", out)
    assert result.code == 0, result
    assert "supervised tokens" in result.out and f"the newest checkpoint is {out / 'step-2'}" in result.out
    return out


@pytest.fixture
def tmp(tmp_path, tiny):
    """tmp_path with one of every bad file in it."""
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin1.txt").write_bytes(b"\xe9\n")
    good = json.dumps({"question": "a", "answer": "b"}) + "\n"
    (tmp_path / "broken.jsonl").write_text(good * 2 + '{"question": "a", "answer":\n' + good)
    (tmp_path / "fields.jsonl").write_text(good + '{"text": "a"}\n')
    (tmp_path / "few.jsonl").write_text("".join(good.replace("a", str(i), 1) for i in range(3)))
    shutil.copytree(tiny, tmp_path / "base")                        # a model without a chat template
    settings = pretrained.read_json(tiny / "tokenizer_config.json")
    pretrained.write_json(tmp_path / "base" / "tokenizer_config.json", settings | {"chat_template": None})
    return tmp_path


def steps_kept(out):
    return sorted(path.name for path in out.iterdir() if path.name != "log.jsonl")


# --- help

FLAGS = {
    "train.py": "preset model random-init no-random-init data prompt-format out resume no-resume cache k fixed-k no-fixed-k "
                "curriculum stride targets slot1-weight prefix-loss bidirectional no-bidirectional lr warmup cooldown "
                "weight-decay clip batch-size micro-batch-size seq-len steps minutes overfit eval-every eval-prompts "
                "eval-tokens log-every save-every seed fsdp no-fsdp compile no-compile device dtype",
    "sample.py": "file limit prompt-format seed k threshold lossless no-lossless narrow no-narrow temperature top-k top-p "
                 "max-new-tokens stop ignore-stop no-ignore-stop batch-size compare no-compare model cache compile "
                 "no-compile device dtype",
    "eval_gsm8k.py": "data limit shots prompt-format stop seed k threshold lossless no-lossless narrow no-narrow "
                     "max-new-tokens batch-size model baseline out resume no-resume cache device dtype",
    "data.py": "data limit seed",
    "pretrained.py": "cache",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    """Both ways round: a flag that is new and in no test shows up here as well."""
    result = cli(SCRIPTS[script], "--help")
    assert result.code == 0 and result.err == ""
    heads = re.findall(r"^  ((?:-h, )?--.*?)(?:  +.*)?$", result.out, re.MULTILINE)     # options without their help
    found = {flag for head in heads for flag in re.findall(r"--([a-z0-9-]+)", head)}
    assert found == {"help", *FLAGS[script].split()}
    assert f"python {script}" in result.out                         # commands to copy


# --- bad input

SAMPLE_BAD = {
    "unknown flag": (["--nosuch"], "--nosuch"),
    "abbreviated flag": (["--thresh", "0.5"], "--thresh"),
    "k beyond k_max": (["--k", "4"], "1 to 3"),
    "k of an untrained model": (["--model", "{tiny}", "--k", "2"], "--k 2"),
    "k 0": (["--k", "0"], "--k 0"),
    "k no number": (["--k", "two"], "two"),
    "threshold no number": (["--threshold", "high"], "high"),
    "batch size 0": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "max-new-tokens 0": (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    "limit 0": (["--limit", "0"], "--limit must be at least 1"),
    "no such model": (["--model", "nosuch"], "'nosuch'"),
    "no such hub model": (["--model", "nosuch/at-all"], "nosuch/at-all"),
    "model is a file": (["--model", "{tmp}/file"], "{tmp}/file"),
    "model is an empty folder": (["--model", "{tmp}/folder"], "is no checkpoint"),
    "no such device": (["--device", "nosuch"], "'nosuch'"),
    "no such dtype": (["--dtype", "fp8"], "fp8"),
    "no such prompt format": (["--prompt-format", "jinja"], "jinja"),
    "chat without a template": (["--model", "{tmp}/base", "--prompt-format", "chat"], "no chat template"),
    "no such file": (["--file", "{tmp}/nosuch.txt"], "cannot read {tmp}/nosuch.txt"),
    "no such JSONL file": (["--file", "{tmp}/nosuch.jsonl"], "cannot read {tmp}/nosuch.jsonl"),
    "file is a folder": (["--file", "{tmp}/folder"], "cannot read {tmp}/folder"),
    "file without a prompt": (["--file", "{tmp}/empty.txt"], "holds no prompts"),
    "empty JSONL file": (["--file", "{tmp}/empty.jsonl"], "holds no rows"),
    "malformed JSONL file": (["--file", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:3: "),
    "file not UTF-8": (["--file", "{tmp}/latin1.txt"], "cannot read {tmp}/latin1.txt"),
    "prompt beyond the context": (["word " * 600], "does not fit the model's context of 512 tokens"),
}


@pytest.mark.parametrize("case", SAMPLE_BAD)
def test_sample_refuses(case, tiny, trained, tmp):
    flags, message = SAMPLE_BAD[case]
    names = dict(tiny=tiny, tmp=tmp)
    assert_refused(cli(sample, "--model", trained, *(flag.format(**names) for flag in flags)), message.format(**names))


TRAIN_BAD = {
    "unknown flag": (["--nosuch", "1"], "--nosuch"),
    "positional argument": (["out"], "out"),
    "k 1": (["--k", "1"], "--k must be at least 2"),
    "stride 0": (["--stride", "0"], "--stride must be at least 1"),
    "batch size 0": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "micro batch size 0": (["--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
    "steps 0": (["--steps", "0"], "--steps must be at least 1"),
    "steps no number": (["--steps", "1e3"], "1e3"),
    "warm-up -1": (["--warmup", "-1"], "--warmup must be at least 0"),
    "cool-down -1": (["--cooldown", "-1"], "--cooldown must be at least 0"),
    "curriculum -1": (["--curriculum", "-1"], "--curriculum must be at least 0"),
    "overfit -1": (["--overfit", "-1"], "--overfit must be at least 0"),
    "log every 0": (["--log-every", "0"], "--log-every must be at least 1"),
    "save every 0": (["--save-every", "0"], "--save-every must be at least 1"),
    "eval every -1": (["--eval-every", "-1"], "--eval-every must be at least 0"),
    "eval prompts 0": (["--eval-prompts", "0"], "--eval-prompts must be at least 1"),
    "eval tokens 0": (["--eval-tokens", "0"], "--eval-tokens must be at least 1"),
    "lr 0": (["--lr", "0"], "--lr"),
    "lr not a number": (["--lr", "nan"], "--lr"),
    "clip 0": (["--clip", "0"], "--clip"),
    "minutes 0": (["--minutes", "0"], "--minutes"),
    "seed no number": (["--seed", "x"], "--seed"),
    "prefix loss -1": (["--prefix-loss", "-1"], "--prefix-loss must be at least 0"),
    "prefix loss not a number": (["--prefix-loss", "nan"], "--prefix-loss must be at least 0"),
    "slot 1 weight -1": (["--slot1-weight", "-1"], "--slot1-weight must be at least 0"),
    "no such targets": (["--targets", "softly"], "softly"),
    "fsdp without torchrun": (["--fsdp"], "torchrun"),
    "no such data": (["--data", "nosuch"], "no data 'nosuch'"),
    "no such JSONL file": (["--data", "{tmp}/nosuch.jsonl"], "cannot read {tmp}/nosuch.jsonl"),
    "JSON cut off": (["--data", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:3: "),
    "JSONL without the fields": (["--data", "{tmp}/fields.jsonl"], "{tmp}/fields.jsonl:2: "),
    "too few rows": (["--data", "{tmp}/few.jsonl", "--eval-prompts", "3"], "3 different questions cannot spare 3"),
    "sequence too short": (["--seq-len", "12"], "no prompt fits --seq-len 12"),
    "sequence of nothing": (["--seq-len", "0"], "--seq-len must be at least"),
    "no such model": (["--model", "nosuch"], "'nosuch'"),
    "model is a file": (["--model", "{tmp}/file"], "{tmp}/file"),
    "model is an empty folder": (["--model", "{tmp}/folder"], "is no checkpoint"),
    "no such device": (["--device", "nosuch"], "'nosuch'"),
    "no such dtype": (["--dtype", "fp16"], "fp16"),
    "chat without a template": (["--model", "{tmp}/base", "--prompt-format", "chat"], "no chat template"),
    "out is a file": (["--out", "{tmp}/file"], "cannot write to {tmp}/file"),
    "out under a file": (["--out", "{tmp}/file/run/out"], "cannot write to {tmp}/file/run/out"),
}


@pytest.mark.parametrize("case", TRAIN_BAD)
def test_train_refuses_and_writes_nothing(case, tiny, tmp):
    flags, message = TRAIN_BAD[case]
    before = everything_under(tmp)
    result = cli(training, "--model", tiny, "--steps", 1, "--batch-size", 1, "--out", tmp / "out",
                 *(flag.format(tmp=tmp) for flag in flags))
    assert_refused(result, message.format(tmp=tmp))
    assert everything_under(tmp) == before


@pytest.mark.parametrize("flags, message", [
    ([], "already holds step-2"), (["--no-resume"], "already holds step-2"),
    (["--resume", "--lr", "2e-4"], "--lr 0.001, not 0.0002"), (["--resume", "--k", "4"], "--k 3, not 4"),
    (["--resume", "--data", "gsm8k.jsonl"], "gsm8k.jsonl"), (["--resume", "--eval-prompts", "3"], "--eval-prompts 2"),
    (["--resume", "--targets", "soft"], "--targets hard, not soft"), (["--resume", "--fixed-k"], "--fixed-k False"),
    (["--resume", "--prompt-format", "plain"], "--prompt-format chat, not plain")])
def test_train_spares_an_earlier_run(flags, message, tiny, trained):
    """Neither written over nor mixed with a run of other settings."""
    before = everything_under(trained)
    result = cli(training, "--model", tiny, "--k", 3, "--steps", 4, "--batch-size", 2, "--seq-len", 200,
                 "--eval-prompts", 2, "--out", trained, *flags)
    assert_refused(result, message)
    assert everything_under(trained) == before


@pytest.mark.parametrize("argv, message", [
    (["nosuch"], "'nosuch'"), ([], "model"), (["a/b/c"], "'a/b/c'"), (["{tmp}/folder"], "is no checkpoint"),
    (["{tmp}/file"], "{tmp}/file"), (["{tmp}", "{tmp}"], "unrecognized"), (["--nosuch", "x"], "--nosuch")])
def test_pretrained_refuses(argv, message, tmp):
    assert_refused(cli(pretrained, *(word.format(tmp=tmp) for word in argv)), message.format(tmp=tmp))


@pytest.mark.parametrize("argv, message", [
    (["--data", "nosuch"], "'nosuch'"), (["--data", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:3: "),
    (["--data", "{tmp}/nosuch.jsonl"], "cannot read"), (["gsm8k"], "unrecognized"), (["--limit", "x"], "--limit")])
def test_data_refuses(argv, message, tmp):
    assert_refused(cli(data, *(word.format(tmp=tmp) for word in argv)), message.format(tmp=tmp))


# --- data.py and pretrained.py at work

def test_data_prints_rows(sums):
    result = cli(data, "--seed", 5, "--limit", 2)
    assert result.code == 0
    for i in range(3):
        row = data.WordProblems(5)[i]
        assert (f"{row['question']}\n\n{row['answer']}\n" in result.out) == (i < 2)
    assert cli(data, "--data", sums, "--limit", 99).out.count("####") == 13        # all but the one held out


def test_pretrained_prints_the_folder(tiny, trained, tmp_path):
    assert cli(pretrained, tiny).out == f"{tiny}\n"
    assert cli(pretrained, trained).out == f"{trained / 'step-2'}\n"                # of a run: its newest checkpoint
    (tmp_path / "smollm2-135m").symlink_to(tiny)                                    # as if it had been fetched before
    assert cli(pretrained, "smollm2-135m", "--cache", tmp_path).out == f"{tmp_path / 'smollm2-135m'}\n"


# --- sample.py at work

@pytest.fixture
def decoded(monkeypatch):
    """Every call of `generate` by sample.py: model, prompts, k, threshold, limit and the Generations."""
    calls, generate = [], sample.generate

    def spy(model, prompts, k, threshold, mask_id, stop_ids, max_new_tokens, *rest, **more):
        results = generate(model, prompts, k, threshold, mask_id, stop_ids, max_new_tokens, *rest, **more)
        calls.append(SimpleNamespace(model=model, prompts=prompts, k=k, threshold=threshold, limit=max_new_tokens,
                                     results=results))
        return results

    monkeypatch.setattr(sample, "generate", spy)
    return calls


def plain(text):
    """Text without what printing may change: half characters, and control characters."""
    return re.sub("[\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f?]", "", text)


def assert_report(out, results, tokenizer):
    """The part of sample.py's output that belongs to one strategy agrees with the Generations it is about."""
    at = 0
    for result in results:
        assert sum(result.chunks) == len(result.tokens)
        answer = re.compile("".join(rf"\[{size}\|(.*?)\]" for size in result.chunks) + "\n", re.DOTALL)
        printed = answer.search(out, at)
        assert printed and plain("".join(printed.groups())) == plain(tokenizer.decode(result.tokens))
        at = printed.end()
    sizes, finishes = Counter(size for r in results for size in r.chunks), Counter(r.finish for r in results)
    tokens, passes = (int(number) for number in re.search(r"^(\d+) tokens in (\d+) passes", out, re.MULTILINE).groups())
    assert tokens == sum(len(r.tokens) for r in results) and passes == sum(sizes.values())
    sizes_line, = re.findall(r"^chunk sizes: (.*)$", out, re.MULTILINE)
    assert {int(size): int(n) for size, n in re.findall(r"(\d+) x (\d+)", sizes_line)} == sizes
    assert sum(size * n for size, n in sizes.items()) == tokens
    finish_line, = re.findall(r"^finished by: (.*)$", out, re.MULTILINE)
    assert dict(pair.split(" x ") for pair in finish_line.split(", ")) == {f: str(n) for f, n in finishes.items()}
    assert "tokens/s" in out


@pytest.mark.parametrize("flags, expected", [
    ([], (3, 0.9)), (["--k", "3"], (3, None)), (["--k", "1"], (1, None)), (["--threshold", "0.5"], (3, 0.5)),
    (["--k", "2", "--threshold", "0"], (2, 0.0))])
def test_sample_reports_what_it_did(flags, expected, trained, decoded):
    result = cli(sample, "How many cows?", "--model", trained, "--max-new-tokens", 17, *flags)
    assert result.code == 0 and result.err == "" and "How many cows?" in result.out
    call, = decoded
    assert (call.k, call.threshold, call.limit) == (*expected, 17)
    assert_report(result.out, call.results, Tokenizer(trained / "latest"))
    answer, = call.results
    assert len(answer.tokens) <= 17 and (answer.finish == "length") == (len(answer.tokens) == 17)
    if expected[1] in (None, 0.0) and answer.finish == "length":    # everything kept: full chunks, the last one cut
        assert answer.chunks == [expected[0]] * (17 // expected[0]) + [17 % expected[0]] * (17 % expected[0] > 0)
    assert "\x1b" not in result.out                                 # not a terminal: no colours


def test_sample_without_training_emits_one_a_pass(tiny, decoded):
    result = cli(sample, "x", "--model", tiny, "--max-new-tokens", 5, "--threshold", 0)
    assert result.code == 0 and "has not been trained" in result.out
    assert decoded[0].k == 1 and set(decoded[0].results[0].chunks) == {1}


def test_sample_compare(trained, decoded):
    """--compare decodes once more with k = 1; what it says about the two is recounted here."""
    result = cli(sample, "one", "two", "--model", trained, "--max-new-tokens", 12, "--k", 3, "--compare")
    ours, ones = decoded
    assert (ours.k, ones.k, ones.threshold) == (3, 1, None) and ours.prompts == ones.prompts
    _, first, second = result.out.split("\n=== ")
    assert_report(first, ours.results, Tokenizer(trained / "latest"))
    assert_report(second, ones.results, Tokenizer(trained / "latest"))
    same = sum(a.tokens == b.tokens for a, b in zip(ours.results, ones.results))
    shared = sum(len(os.path.commonprefix([a.tokens, b.tokens])) for a, b in zip(ours.results, ones.results))
    share = shared / sum(len(b.tokens) for b in ones.results)
    assert f"{same} of 2 answers identical" in second and f"{share:.0%} of k = 1's tokens" in " ".join(second.split())
    assert 0 < share < 1                                            # else the numbers above could be constants
    itself = cli(sample, "one", "--model", trained, "--max-new-tokens", 12, "--k", 1, "--compare").out
    assert "1 of 1 answers identical" in itself and "100%" in itself


def test_sample_several_prompts_files_and_batches(trained, tmp_path, decoded):
    (tmp_path / "more.txt").write_text("third\n\n  \nvierte für dich\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"question": "fifth", "answer": "a"}\n{"prompt": "sixth", "response": "b"}\n')
    common = ("--model", trained, "--max-new-tokens", 4, "--k", 2)
    result = cli(sample, "first", "second", "--file", tmp_path / "more.txt", "--batch-size", 3, *common)
    assert [len(call.prompts) for call in decoded] == [3, 1]
    places = [result.out.index(f"\n{question}\n") for question in ("first", "second", "third", "vierte für dich")]
    assert places == sorted(places)
    assert_report(result.out, [r for call in decoded for r in call.results], Tokenizer(trained / "latest"))
    assert "over 4 prompts" in result.out
    decoded.clear()
    result = cli(sample, "--file", tmp_path / "rows.jsonl", *common)
    assert "\nfifth\n" in result.out and "\nsixth\n" in result.out and len(decoded[0].prompts) == 2
    decoded.clear()
    result = cli(sample, "first", "--file", tmp_path / "rows.jsonl", "--limit", 2, *common)
    assert len(decoded[0].prompts) == 2 and "\nfifth\n" in result.out and "sixth" not in result.out


def test_sample_stops(trained, tmp_path, decoded):
    """Stop tokens and stop strings end an answer where it says so; --ignore-stop does not look at stop tokens."""
    folder = shutil.copytree(trained / "latest", tmp_path / "model")
    common = ("How many?", "--model", folder, "--max-new-tokens", 24, "--k", 2)
    cli(sample, *common)
    free = decoded.pop().results[0]
    assert free.finish == "length"
    # a token in the middle becomes a stop token
    at = next(i for i in range(2, 24) if free.tokens[i] not in free.tokens[:i])
    generation = pretrained.read_json(folder / "generation_config.json")
    pretrained.write_json(folder / "generation_config.json", generation | {"eos_token_id": [2, free.tokens[at]]})
    for flags in ([], ["--no-ignore-stop"], ["--ignore-stop", "--no-ignore-stop"]):
        assert "finished by: stop x 1\n" in cli(sample, *common, *flags).out
        assert decoded.pop().results[0].tokens == free.tokens[:at + 1]
    assert "finished by: length x 1\n" in cli(sample, *common, "--ignore-stop").out
    assert decoded.pop().results[0].tokens == free.tokens
    # the characters of one token and half of the next become a stop string
    tokenizer = Tokenizer(folder)
    texts = [tokenizer.decode([token]) for token in free.tokens]
    legible = [text.isprintable() and "\ufffd" not in text and text != "" for text in texts]
    at = next(i for i in range(3, 22) if legible[i] and legible[i + 1])
    stop = texts[at] + texts[at + 1][:1]
    until = next(n for n in range(1, 25) if stop in tokenizer.decode(free.tokens[:n]))
    result = cli(sample, *common, "--ignore-stop", "--stop", stop)
    assert decoded.pop().results[0].tokens == free.tokens[:until] and "finished by: stop string x 1\n" in result.out


def test_sample_lossless(trained, decoded):
    """The text of --k 1, in either form; --compare says so, and the acceptance is printed with what it means."""
    common = ("What is 3 + 4?", "--model", trained, "--max-new-tokens", 12, "--ignore-stop")
    plain = (cli(sample, *common, "--k", 1), decoded.pop())[1].results[0].tokens
    for flags in (["--lossless"], ["--lossless", "--narrow"], ["--lossless", "--k", 2], ["--lossless", "--threshold", 0.2]):
        result = cli(sample, *common, *flags, "--compare")
        assert result.code == 0 and "1 of 1 answers identical to k = 1" in result.out
        assert decoded.pop().k == 1 and decoded.pop().results[0].tokens == plain
        assert "=== lossless" in result.out and ("(stood / fed): " in result.out or "0.2" in result.out)
    assert ("=== lossless 3 narrow" in cli(sample, *common, "--lossless", "--narrow").out)
    assert_refused(cli(sample, *common, "--lossless", "--temperature", 0.5), "--lossless")
    assert_refused(cli(sample, *common, "--narrow"), "--lossless")
    assert_refused(cli(sample, *common, "--temperature", -1), "--temperature")
    assert_refused(cli(sample, *common, "--top-p", 0), "--top-p")
    assert_refused(cli(sample, *common, "--top-k", -1), "--top-k")


def test_sample_temperature(trained, decoded):
    """Seeded; the share and number of candidates reach the draw."""
    common = ("What is 3 + 4?", "--model", trained, "--max-new-tokens", 20, "--ignore-stop", "--k", 1)

    def tokens(*flags):
        assert cli(sample, *common, *flags).code == 0
        return decoded.pop().results[0].tokens

    hot = tokens("--temperature", 2, "--seed", 1)
    assert hot == tokens("--temperature", 2, "--seed", 1) != tokens("--temperature", 2, "--seed", 2)
    greedy = tokens()
    assert hot != greedy == tokens("--temperature", 2, "--top-k", 1) == tokens("--temperature", 2, "--top-p", 1e-6)


def test_sample_compile(trained, decoded, monkeypatch):
    """The model is compiled once, for passes of one shape; the text stays (here with nothing compiled, to save time)."""
    compiled = []
    monkeypatch.setattr(sample.Transformer, "compile", lambda model, **settings: compiled.append(settings))
    common = ("What is 3 + 4?", "--model", trained, "--max-new-tokens", 12, "--ignore-stop", "--k", 3)
    texts = []
    for flags in (["--no-compile"], ["--compile"]):
        assert cli(sample, *common, *flags).code == 0
        texts.append(decoded.pop().results[0].tokens)
    assert texts[0] == texts[1] and compiled == [{"dynamic": False}]


def test_sample_without_a_prompt_asks_a_word_problem(trained, decoded):
    for seed in (0, 4):
        result = cli(sample, "--model", trained, "--max-new-tokens", 2, "--seed", seed)
        assert f"\n{data.WordProblems(seed, split='validation')[0]['question']}\n" in result.out
    assert decoded[0].prompts != decoded[1].prompts


def test_sample_prompt_format_dtype_and_device(tiny, trained, tmp, decoded):
    """The format is the one of the training; a model without a template gets plain text; a flag overrules both."""
    common = ("x", "--max-new-tokens", 2, "--device", "cpu")
    shutil.copytree(trained / "latest", tmp / "plain")              # it has a template, but was not trained with it
    config = pretrained.read_json(tmp / "plain" / "config.json")
    config["nanomtp"]["prompt_format"] = "plain"
    pretrained.write_json(tmp / "plain" / "config.json", config)
    for folder, flags, style in ((trained, [], "chat"), (tmp / "base", [], "plain"), (tiny, [], "chat"),
                                 (tmp / "plain", [], "plain"), (tmp / "plain", ["--prompt-format", "chat"], "chat"),
                                 (trained, ["--prompt-format", "plain"], "plain")):
        assert cli(sample, *common, "--model", folder, *flags).code == 0
        assert decoded.pop().prompts == [Tokenizer(pretrained.resolve(folder)).prompt("x", style)]
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert cli(sample, *common, "--model", trained, "--dtype", dtype).code == 0
        model = decoded.pop().model
        assert model.output_matrix.dtype == expected and model.device.type == "cpu"


def test_sample_default_model(tiny, trained, tmp_path, monkeypatch, decoded):
    """out/latest of the current folder if there is one, else the tiny model of this repository."""
    monkeypatch.chdir(tmp_path)
    assert sample.default_model() == "tiny"
    assert "has not been trained" in cli(sample, "x", "--max-new-tokens", 1).out
    assert decoded.pop().model.config.hidden_size == 192
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "smollm2-135m").symlink_to(tiny)          # as if it had been fetched before
    for flags in (["--cache", tmp_path / "cache"], []):             # the second time by the environment variable
        assert cli(sample, "x", "--max-new-tokens", 1, "--model", "smollm2-135m", *flags).code == 0
        assert decoded.pop().model.config.vocab_size == TINY_VOCAB  # this cache, and not one that is really there
        monkeypatch.setenv("NANOMTP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()                                      # a run that has saved nothing yet
    assert sample.default_model() == "tiny"
    (tmp_path / "out" / "latest").symlink_to((trained / "latest").resolve())
    assert sample.default_model() == "out/latest"
    assert "has not been trained" not in cli(sample, "x", "--max-new-tokens", 1).out and decoded.pop().k == 3


# --- printing

@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


PAINT = r"\x1b\[48;5;(\d+);38;5;16m"


def test_chunks_are_coloured_on_a_terminal(tiny, terminal):
    tokenizer = Tokenizer(tiny)
    printer = report.ChunkPrinter(tokenizer, terminal)
    chunks = [tokenizer.encode(text) for text in ("in the", "over\n1", " the")]
    for chunk in chunks:
        printer(chunk)
    written = terminal.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", written) == "in the²over\n1⁵ the¹"
    colours = re.findall(PAINT, written)
    assert colours[1] == colours[2] and len({colours[0], colours[1], colours[3]}) == 3  # repainted behind \\n
    assert "\x1b[0m\n" in written and written.endswith("\x1b[0m")   # no colour to the right margin, none left on


@pytest.mark.parametrize("stream, no_color, coloured", [
    (Terminal, None, True), (Terminal, "", True), (Terminal, "1", False), (io.StringIO, None, False)])
def test_when_chunks_are_coloured(tiny, monkeypatch, stream, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    target, tokenizer = stream(), Tokenizer(tiny)
    report.ChunkPrinter(tokenizer, target)(tokenizer.encode(" the"))
    assert ("\x1b" in target.getvalue()) == coloured and (target.getvalue() == "[1| the]") == (not coloured)


def test_terminal_run_is_coloured(trained, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = cli(sample, "x", "--model", trained, "--max-new-tokens", 7, "--k", 3, "--ignore-stop", stream=Terminal)
    assert len(set(re.findall(PAINT, result.out))) == 3 and "[3|" not in result.out    # 3 + 3 + 1 tokens


def test_no_escape_character_of_the_model_reaches_the_terminal(tiny, terminal):
    """A model that writes `ESC ]0;...` or `ESC [2J` must not retitle or clear somebody's terminal."""
    tokenizer = Tokenizer(tiny)
    tokens = tokenizer.encode("a\x1b[2Jb\x1b]0;owned\x07c")
    assert "\x1b" in tokenizer.decode(tokens)                       # so it is the printer that must remove it
    for stream in (terminal, io.StringIO()):
        printer = report.ChunkPrinter(tokenizer, stream)
        for at in range(0, len(tokens), 2):
            printer(tokens[at:at + 2])
        ours_removed = re.sub(PAINT + r"|\x1b\[0m", "", stream.getvalue())
        assert "\x1b" not in ours_removed
        assert re.sub(r"\[\d\||\]|[¹²]", "", ours_removed).replace("[", "").startswith("a?2Jb?")


def test_character_over_two_chunks_is_printed_once_and_whole(tiny, terminal):
    tokenizer = Tokenizer(tiny)
    for text in ("é", "€", "🦉"):
        first, *rest = tokenizer.encode(text)                       # one token per byte
        assert len(rest) == len(text.encode()) - 1
        stream = io.StringIO()
        printer = report.ChunkPrinter(tokenizer, stream)
        printer([first])
        printer(rest)
        assert stream.getvalue() == f"[1|][{len(rest)}|{text}]"
    printer = report.ChunkPrinter(tokenizer, terminal)
    printer([first])
    printer(rest)
    assert terminal.getvalue().count("🦉") == 1 and "\ufffd" not in terminal.getvalue()


# --- train.py at work

def test_train_leaves_a_checkpoint_and_a_log(tiny, trained):
    assert steps_kept(trained) == ["latest", "step-2"] and (trained / "latest").resolve() == trained / "step-2"
    config = pretrained.read_json(trained / "latest" / "config.json")
    assert config["nanomtp"].items() >= {"mask_token_id": TINY_VOCAB, "k_max": 3, "prompt_format": "chat",
                                         "steps": 2}.items()
    assert Tokenizer(trained / "latest").control[MASK_TOKEN] == TINY_VOCAB
    start, = log_rows(trained, "start")
    flags = {flag.replace("-", "_") for flag in FLAGS["train.py"].split() if not flag.startswith("no-")}
    assert flags <= set(start) and start["k"] == 3 and start["seq_len"] == 200 and start["prompt_format"] == "chat"
    assert start["device"].startswith(("cpu", "cuda", "mps")) and start["dtype"] in ("fp32", "bf16")    # not "auto"
    first, = log_rows(trained, "eval")
    assert first["step"] == 0 and first["prompts"] == 2 and re.match(r"\[[123]\|", first["sample"])
    assert log_rows(trained, "train")[-1]["step"] == 2
    end, = log_rows(trained, "end")
    assert end["step"] == 2 and end["interrupted"] is False
    state = torch.load(trained / "latest" / "trainer.pt", weights_only=True)
    assert state["step"] == 2 and state["args"]["model"] == str(tiny) and state["args"]["lr"] == 1e-3


def test_train_schedule(tiny, sums, tmp_path):
    """--lr, --warmup, --cooldown and --steps, by the learning rates in the log."""
    out = tmp_path / "out"
    result = cli(training, "--model", tiny, "--data", sums, *QUICK, "--lr", 0.004, "--warmup", 4, "--cooldown", 2,
                 "--steps", 6, "--log-every", 1, "--out", out)
    assert result.code == 0
    assert [row["lr"] for row in log_rows(out, "train")] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.002])
    assert "Traceback" not in result.err


def test_train_log_eval_and_save_every(tiny, sums, tmp_path):
    out = tmp_path / "out"
    result = cli(training, "--model", tiny, "--data", sums, *QUICK, "--steps", 4, "--log-every", 2, "--eval-every", 2,
                 "--save-every", 1, "--eval-prompts", 3, "--eval-tokens", 5, "--out", out)
    assert result.code == 0
    assert [row["step"] for row in log_rows(out, "train")] == [2, 4]
    evals = log_rows(out, "eval")
    assert [row["step"] for row in evals] == [0, 2, 4] and {row["prompts"] for row in evals} == {3}
    for row in evals:
        assert 1 <= row["tokens_per_forward"] <= 3 and 0 <= row["agreement_with_k1"] <= 1
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["accuracy_k1"] <= 1
        assert re.search(rf"step {row['step']}: .* {row['tokens_per_forward']:.2f} tokens per forward", result.out)
        assert sum(int(size) for size in re.findall(r"\[(\d)\|", row["sample"])) == 5     # --eval-tokens
    assert steps_kept(out) == ["latest", "step-3", "step-4"]        # the last two, of four
    assert (out / "latest").resolve().name == "step-4"


def test_train_resume_goes_on(tiny, sums, tmp_path):
    """Without a run to resume it starts one; with one it goes on, under new limits, and appends to the log."""
    out, common = tmp_path / "out", ("--model", tiny, "--data", sums, *QUICK, "--log-every", 1, "--resume")
    first = cli(training, *common, "--out", out, "--steps", 2)
    assert first.code == 0 and "nothing to resume" in first.out
    again = cli(training, *common, "--out", out, "--steps", 3, "--save-every", 7, "--micro-batch-size", 1)
    assert again.code == 0 and "nothing to resume" not in again.out
    assert [row["step"] for row in log_rows(out, "train")] == [1, 2, 3]
    assert [row["step"] for row in log_rows(out, "start") + log_rows(out, "resume")] == [0, 2]
    assert steps_kept(out) == ["latest", "step-2", "step-3"] and (out / "latest").resolve().name == "step-3"
    before = {path: stamp for path, stamp in everything_under(out).items() if "step-" in path}
    done = cli(training, *common, "--out", out, "--steps", 3)       # nothing left to do
    assert done.code == 0 and {path: s for path, s in everything_under(out).items() if "step-" in path} == before


def test_train_weight_decay_is_for_matrices(tiny, sums, tmp_path):
    """One step with and without: AdamW shrinks a decayed weight w by lr * decay * w, and the rest is the same step."""
    weights = {}
    for decay in (0, 10):
        out = tmp_path / str(decay)
        assert cli(training, "--model", tiny, "--data", sums, *QUICK, "--steps", 1, "--warmup", 0, "--lr", 1e-3,
                   "--weight-decay", decay, "--out", out).code == 0
        weights[decay] = load_file(out / "latest" / "model.safetensors")
    start, moved = load_file(tiny / "model.safetensors"), 0
    for name, was in start.items():
        shrunk = (weights[0][name] - weights[10][name])[:len(was)]  # the embedding has got one more row
        expected = 1e-3 * 10 * was if was.dim() > 1 else torch.zeros_like(was)
        torch.testing.assert_close(shrunk, expected, atol=1e-6, rtol=0)
        moved += not torch.equal(weights[0][name][:len(was)], was)
    assert moved == len(start)


def test_train_clip(tiny, sums, tmp_path, monkeypatch):
    """The log says the norm before clipping; after it no gradient is longer than --clip."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, max_norm):
        parameters = list(parameters)
        norm = clip(parameters, max_norm)
        squares = sum(p.grad.square().sum().item() for p in parameters if p.grad is not None)
        seen.append((norm.item(), math.sqrt(squares)))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for limit in ("0.25", "1e6"):
        seen.clear()
        out = tmp_path / limit
        assert cli(training, "--model", tiny, "--data", sums, *QUICK, "--steps", 2, "--log-every", 1, "--clip", limit,
                   "--out", out).code == 0
        assert [row["gradient_norm"] for row in log_rows(out, "train")] == [norm for norm, _ in seen]
        assert all(norm > 0.25 and after == pytest.approx(min(norm, float(limit)), rel=1e-3) for norm, after in seen)


def test_train_batches(tiny, tmp_path, monkeypatch):
    """--batch-size sequences a step in passes of --micro-batch-size, none longer than --seq-len."""
    make, passes = training.make_batch, []
    monkeypatch.setattr(training, "make_batch", lambda encoded, *rest: passes.append(encoded) or make(encoded, *rest))
    rows = [{"question": "q" * n, "answer": "answer " * n} for n in range(1, 16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(training, "--model", tiny, "--data", tmp_path / "rows.jsonl", *QUICK, "--steps", 2, "--batch-size", 5,
                 "--micro-batch-size", 2, "--seq-len", 40, "--out", tmp_path / "out")
    assert result.code == 0 and re.search(r"of the first 13 rows 0 are left out .* and \d+ answers are cut", result.out)
    assert [len(encoded) for encoded in passes] == [2, 2, 1] * 3    # the timing pass and two steps
    lengths = [len(text) for encoded in passes for _, text in encoded]
    assert max(lengths) == 40 and min(lengths) < 40                 # some were cut, some are short enough


def test_train_stride_k_and_curriculum(tiny, sums, tmp_path):
    """Denser anchors give more supervised slots; --curriculum begins with k = 2 whatever --k says; --fixed-k is always k."""
    logs = {}
    for name, flags in {"dense": ["--stride", 1], "sparse": ["--stride", 5], "wide": ["--k", 8],
                        "grown": ["--k", 8, "--curriculum", 1000], "fixed": ["--k", 8, "--fixed-k"]}.items():
        assert cli(training, "--model", tiny, "--data", sums, *QUICK, *flags, "--steps", 5, "--log-every", 1,
                   "--out", tmp_path / name).code == 0
        logs[name] = log_rows(tmp_path / name, "train")
    for dense, sparse in zip(logs["dense"], logs["sparse"]):        # the layout's draw differs with the stride, k too
        assert dense["slots"] / dense["k"] > 3 * sparse["slots"] / sparse["k"]
    assert max(row["k"] for row in logs["wide"]) > 4 and {row["k"] for row in logs["grown"]} == {2}
    assert {row["k"] for row in logs["fixed"]} == {8}
    for row in logs["dense"] + logs["wide"]:
        assert 2 <= row["k"] <= 8 and row["slots"] % row["k"] == 0
        assert len(row["agreement"]) == len(row["confidence"]) >= row["k"]
    assert pretrained.read_json(tmp_path / "grown" / "latest" / "config.json")["nanomtp"]["k_max"] == 8


def test_train_bidirectional(tiny, sums, tmp_path, decoded, monkeypatch):
    """Trained, evaluated, recorded and, without a word from the user, decoded so; soft targets and prefix loss on top."""
    masks, decoding, generate = [], [], training.generate
    make = training.make_batch
    monkeypatch.setattr(training, "make_batch", lambda *args: masks.append(make(*args)) or masks[-1])
    monkeypatch.setattr(training, "generate", lambda *args, **more: decoding.append(more) or generate(*args, **more))
    out = tmp_path / "out"
    assert cli(training, "--model", tiny, "--data", sums, *QUICK, "--steps", 1, "--eval-every", 1, "--eval-tokens", 3,
               "--fixed-k", "--bidirectional", "--targets", "soft", "--prefix-loss", 1, "--out", out).code == 0
    assert all(not torch.equal(batch.mask, batch.teacher_mask) and len(batch.next_token) for batch in masks)
    assert len(decoding) == 4 and all(more["bidirectional"] is True for more in decoding)
    assert pretrained.read_json(out / "latest" / "config.json")["nanomtp"]["bidirectional"] is True
    assert cli(sample, "x", "--model", out, "--max-new-tokens", 12, "--k", 3, "--ignore-stop").code == 0
    call, = decoded
    ours, = call.results
    both, causal = (generate(call.model, call.prompts, 3, None, TINY_VOCAB, (), 12, bidirectional=way)[0]
                    for way in (True, False))
    assert (ours.tokens, ours.confidences) == (both.tokens, both.confidences) and ours.confidences != causal.confidences


def test_train_overfit(tiny, sums, tmp_path, monkeypatch):
    """--overfit N: N rows, over and over, in an order that follows --seed, and it is those that are evaluated."""
    draw, drawn, seeds = training.draw_rows, [], set()

    def spy(rows, batch_size, step, seed):
        seeds.add(seed)
        drawn.extend(chosen := draw(rows, batch_size, step, seed))
        return chosen

    monkeypatch.setattr(training, "draw_rows", spy)
    assert cli(training, "--model", tiny, "--data", sums, *QUICK, "--overfit", 3, "--steps", 4, "--eval-every", 4,
               "--eval-tokens", 2, "--seed", 4, "--out", tmp_path / "out").code == 0
    assert len(drawn) == 10 and len({row["question"] for row in drawn}) == 3 and seeds == {4}
    assert {row["prompts"] for row in log_rows(tmp_path / "out", "eval")} == {3}


def test_train_minutes_stops_early_and_saves(tiny, sums, tmp_path):
    out = tmp_path / "out"
    result = cli(training, "--model", tiny, "--data", sums, *QUICK, "--steps", 100_000, "--minutes", 0.01,
                 "--warmup", 0, "--cooldown", 50_000, "--log-every", 1, "--out", out)
    end, = log_rows(out, "end")
    assert result.code == 0 and 1 <= end["step"] < 100_000 and end["interrupted"] is False
    assert 0.01 <= end["minutes"] and (out / "latest").resolve().name == f"step-{end['step']}"
    assert {row["lr"] for row in log_rows(out, "train")} == {2e-4}    # the cool-down begins at step 50,000


def test_train_seed_dtype_device_and_formats(tiny, tmp_path, monkeypatch):
    """One seed is one run; another seed or format is another one; bf16 is nearly the same run, saved as fp32."""
    attention, dtypes = torch.nn.functional.scaled_dot_product_attention, set()

    def spy(*args, **more):
        values = attention(*args, **more)
        dtypes.add(values.dtype)
        return values

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    common = ("--data", "wordproblems", "--k", 3, "--batch-size", 2, "--seq-len", 200, "--eval-every", 0, "--steps", 2,
              "--log-every", 1, "--device", "cpu")
    losses = {}
    for name, flags in {"a": ["--dtype", "fp32"], "b": ["--dtype", "fp32"], "seed": ["--dtype", "fp32", "--seed", 1],
                        "bf16": ["--dtype", "bf16"], "plain": ["--dtype", "fp32", "--prompt-format", "plain"]}.items():
        dtypes.clear()
        assert cli(training, "--model", tiny, *common, *flags, "--out", tmp_path / name).code == 0
        assert dtypes == {torch.bfloat16 if name == "bf16" else torch.float32}          # of the student and the teacher
        losses[name] = [row["loss"] for row in log_rows(tmp_path / name, "train")]
    assert losses["a"] == losses["b"] and losses["a"] != losses["seed"] and losses["a"] != losses["plain"]
    assert losses["a"] != losses["bf16"] and losses["a"] == pytest.approx(losses["bf16"], rel=0.1)
    start, = log_rows(tmp_path / "bf16", "start")
    assert start["dtype"] == "bf16" and start["device"].startswith("cpu")
    weights = load_file(tmp_path / "bf16" / "latest" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert pretrained.read_json(tmp_path / "bf16" / "latest" / "config.json")["dtype"] == "float32"
    formats = {name: pretrained.read_json(tmp_path / name / "latest" / "config.json")["nanomtp"]["prompt_format"]
               for name in ("a", "plain")}
    assert formats == {"a": "chat", "plain": "plain"}


def test_train_default_model(sums, tmp_path, monkeypatch):
    """Without --model and --out: the tiny model, and out/ right here, where sample.py looks."""
    monkeypatch.chdir(tmp_path)
    assert cli(training, "--data", sums, *QUICK, "--steps", 1).code == 0
    start, = log_rows(tmp_path / "out", "start")
    assert start["model"] == "tiny" and 1.5e6 < start["parameters"] < 2.5e6
    assert steps_kept(tmp_path / "out") == ["latest", "step-1"] and sample.default_model() == "out/latest"
    assert "[2|" in cli(sample, "1 + 1", "--k", 2, "--max-new-tokens", 2).out


def test_train_presets(monkeypatch):
    """A preset sets defaults, a flag wins over it, and `tiny` is what no preset means."""
    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        return vars(training.get_args())

    assert settings() == settings("--preset", "tiny")
    for name, changes in training.PRESETS.items():
        assert settings("--preset", name) == settings() | changes | {"preset": name}
    assert settings("--preset", "paper")["lr"] == 1e-5 and settings("--preset", "paper", "--lr", 1e-4)["lr"] == 1e-4
    assert settings("--lr", 3e-4, "--preset", "pretrain-tiny", "--no-random-init")["lr"] == 3e-4
    assert settings("--preset", "pretrain-tiny", "--no-random-init")["random_init"] is False


def test_train_from_a_trained_checkpoint(trained, sums, tmp_path):
    """--model may be a run of train.py: its mask token is kept, no second one is added."""
    assert cli(training, "--model", trained, "--data", sums, *QUICK, "--steps", 1, "--out", tmp_path / "out").code == 0
    before, after = (load_file(out / "latest" / "model.safetensors") for out in (trained, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: tensor.shape for n, tensor in before.items()}
    mask = after["model.embed_tokens.weight"][TINY_VOCAB] - before["model.embed_tokens.weight"][TINY_VOCAB]
    assert 0 < mask.abs().max() < 1e-3                              # trained on, not drawn anew


def test_shared_flags_mean_the_same(trained, tiny, sums, tmp_path):
    """What is learned on one script's command line holds for the others."""
    shared = ("--seed", 3, "--device", "cpu", "--dtype", "fp32", "--k", 2, "--batch-size", 2,
              "--prompt-format", "plain", "--cache", tmp_path)
    assert cli(training, "--model", tiny, "--data", sums, "--out", tmp_path / "out", "--steps", 1, "--eval-every", 0,
               "--eval-prompts", 2, "--no-resume", *shared).code == 0
    assert cli(sample, "x", "--model", tmp_path / "out", "--threshold", 0.5, "--max-new-tokens", 2, "--limit", 1,
               *shared).code == 0
    assert cli(data, "--data", sums, "--limit", 1, "--seed", 3).code == 0
    assert cli(pretrained, trained, "--cache", tmp_path).code == 0


# --- true subprocesses: what a shell sees

def shell(*words):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, encoding="utf-8", timeout=900)


def test_shell_sample(trained):
    done = shell("sample.py", "How many?", "--model", trained, "--k", 3, "--max-new-tokens", 7, "--ignore-stop")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    assert done.stdout.count("[3|") >= 2 and "7 tokens in 3 passes: 2.33" in done.stdout
    assert "chunk sizes: 1 x 1, 3 x 2\n" in done.stdout


def test_shell_refusals(tmp_path):
    for words in (["train.py", "--k", "1", "--out", tmp_path / "out"], ["pretrained.py", "nosuch"]):
        done = shell(*words)
        assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_shell_help():
    done = shell("data.py", "--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: data.py")
