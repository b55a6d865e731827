"""
Nothing lost, nothing silent: damaged checkpoints and files, broken configurations, two programs in
one folder, what a terminal must not be told. Each is one line and exit code 2, before anything is
written. The flags of all scripts are in test_cli.py, kills in test_resume.py.
"""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_rows, train_briefly, write_json
from safetensors.torch import load_file, save_file
from test_cli import assert_refused, cli, everything_under

import eval_gsm8k
import sample
import train
from common import answers, checkpoint
from common.cli import Alone, InputError
from common.data import draw_rows
from common.files import field, read_json, read_note, read_weights, weight_files, write_text
from common.report import speeds
from studies import answers as answering
from studies import viewer


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """Of a run whose steps take milliseconds, on a file of its own."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{a} + 3", "answer": f"That is {a + 3}."})
                            + "\n" for a in range(14)))
    return ["--model", tiny, "--data", path, "--k", 3, "--batch-size", 2, "--seq-len", 64,
            "--eval-every", 0, "--eval-prompts", 2, "--warmup", 0, "--cooldown", 0,
            "--prompt-format", "plain", "--save-every", 1]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The --out of a run of four steps, of which the last two are there: read it only."""
    return train_briefly(tmp_path_factory.mktemp("trained") / "out", *flags, "--steps", 4)


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(trained, tmp_path / "out", symlinks=True)


def sign(folder):
    """Write SHA256SUMS again, as if what is there had been written by us."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                   if path.is_file() and path.name != checkpoint.SUMS)
    (folder / checkpoint.SUMS).write_text(
        "".join(f"{checkpoint.hash_of_file(folder / name)}  {name}\n" for name in names))


def resume(flags, out, *more):
    return cli(train, *flags, "--steps", 6, "--out", out, "--resume", *more)


# --------------------------------------------------------------------------------------------------
# A run knows its checkpoints

@pytest.mark.parametrize("what, message", [
    ("missing", "latest is missing"), ("dangling", "latest points nowhere"),
    ("a folder", "latest is no link")])
def test_latest_that_does_not_tell(flags, out, what, message):
    """As a copy that drops or follows links leaves it: nothing starts anew, nothing is pruned."""
    latest = out / "latest"
    latest.unlink()
    if what == "dangling":
        latest.symlink_to("step-7")
    if what == "a folder":
        shutil.copytree(out / "step-4", latest)
    before = sorted(os.listdir(out))
    assert_refused(resume(flags, out), message)
    assert sorted(os.listdir(out)) == before
    if what != "a folder":
        assert_refused(cli(train, *flags, "--out", out), "already holds step-4")
        latest.unlink(missing_ok=True)
        latest.symlink_to("step-4")                         # as the line says
        assert resume(flags, out).code == 0


def test_pruning_deletes_what_the_run_wrote_and_nothing_else(flags, out):
    for name in ("step-1", "step-99", "step-old"):          # somebody else's
        (out / name).mkdir()
    result = resume(flags, out)
    assert result.code == 0 and f"the newest checkpoint is {out}/step-6 " in result.out
    assert sorted(path.name for path in out.glob("step-*")) == [
        "step-1", "step-5", "step-6", "step-99", "step-old"]
    assert (out / "latest").resolve().name == "step-6"
    state = torch.load(out / "latest" / "trainer.pt", weights_only=True)
    assert state["checkpoints"] == ["step-4", "step-5", "step-6"]


def test_an_older_checkpoint_goes_on_when_latest_points_to_it(flags, trained, out):
    """What stands behind it is written again, and the same."""
    (out / "latest").unlink()
    (out / "latest").symlink_to("step-3")
    assert cli(train, *flags, "--steps", 4, "--out", out, "--resume").code == 0
    ours, theirs = (read_weights(folder / "step-4") for folder in (out, trained))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints

@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
def test_one_flipped_bit_is_told_from_a_good_file(flags, out, name):
    path = out / "latest" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = everything_under(out)
    assert_refused(resume(flags, out), f"{name} is not what was written")
    assert everything_under(out) == before


def test_checkpoints_without_sums_or_a_file(flags, out):
    (out / "latest" / "trainer.pt").unlink()
    assert_refused(resume(flags, out), "trainer.pt is not what was written")
    (out / "latest" / checkpoint.SUMS).unlink()
    assert_refused(resume(flags, out), f"has no {checkpoint.SUMS}")


def of_first(state):
    return next(iter(state["optimizer"]["state"].values()))


def other_shape(state):
    entry = of_first(state)
    entry["exp_avg"] = entry["exp_avg"].flatten()[:-1]


def other_names(state):
    moments = state["optimizer"]["state"]
    moments["another"] = moments.pop(next(iter(moments)))


DAMAGE = {
    "no step": (lambda state: state.pop("step"), "'step'"),
    "step -1": (lambda state: state.update(step=-1), "step is -1"),
    "step 4.0": (lambda state: state.update(step=4.0), "step is 4.0"),
    "no args": (lambda state: state.pop("args"), "'args'"),
    "args of numbers": (lambda state: state.update(args=3), "trainer.pt is damaged"),
    "no inputs": (lambda state: state.pop("inputs"), "'inputs'"),
    "a checkpoint elsewhere": (lambda state: state.update(checkpoints=["../x"]), "../x"),
    "no optimizer": (lambda state: state.pop("optimizer"), "'optimizer'"),
    "no groups": (lambda state: state["optimizer"].pop("param_groups"), "param_groups"),
    "no moments": (lambda state: of_first(state).pop("exp_avg_sq"), "'exp_avg_sq'"),
    "another shape": (other_shape, "exp_avg of"),
    "another dtype": (lambda state: of_first(state).update(
        exp_avg=of_first(state)["exp_avg"].half()), "exp_avg of"),
    "infinite": (lambda state: of_first(state)["exp_avg_sq"].fill_(math.inf), "exp_avg_sq of"),
    "other names": (other_names, "other parameters"),
    "no generators": (lambda state: state.pop("rng"), "'rng'"),
    "a short generator": (lambda state: state["rng"].update(torch=torch.zeros(3)), "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_trainer_that_does_not_fit(flags, out, what):
    """Whole by its checksum, and yet no state of this run."""
    damage, message = DAMAGE[what]
    path = out / "latest" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    sign(out / "step-4")
    before = everything_under(out)
    assert_refused(resume(flags, out), message)
    assert everything_under(out) == before


def test_no_pickle_runs_and_no_line_advises_it(flags, out, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": 4, "x": Runs()}, out / "latest" / "trainer.pt")
    sign(out / "step-4")
    result = resume(flags, out)
    assert_refused(result, "holds more than tensors")
    assert "weights_only" not in result.err and not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# The same names, other inputs

def test_resume_with_other_rows_under_the_same_name(flags, out, tmp_path):
    path = tmp_path / "moved.jsonl"
    shutil.copy(flags[3], path)
    here = [*flags[:3], path, *flags[4:]]
    own = train_briefly(tmp_path / "own", *here, "--steps", 1)
    path.write_text(path.read_text().replace("That is 9.", "That is 8."))
    before = everything_under(own)
    assert_refused(resume(here, own), "was trained on other data")
    assert everything_under(own) == before


def test_resume_with_other_start_weights_under_the_same_name(flags, tiny, tmp_path):
    start = shutil.copytree(tiny, tmp_path / "start")
    here = ["--model", start, *flags[2:]]
    own = train_briefly(tmp_path / "own", *here, "--steps", 1)
    weights = load_file(start / "model.safetensors")
    weights["model.norm.weight"] *= 1.001
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    assert_refused(resume(here, own), "was trained on other start weights")


# --------------------------------------------------------------------------------------------------
# Two programs, one folder

HOLD = "import sys, time, common.cli as c; a = c.Alone(sys.argv[1]); print(1, flush=True)"


@pytest.fixture
def holder():
    """holder(path): another program that holds a folder or file; killed at the end."""
    started = []

    def start(path):
        script = HOLD + "; time.sleep(99)"
        started.append(subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT,
                                        stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"1\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_program_is_refused_until_the_first_is_killed(flags, out, trained, tmp_path,
                                                              holder):
    rows, file = tmp_path / "eval", tmp_path / "own.jsonl"
    rows.mkdir()
    file.touch()
    asked = ["--model", trained, "--data", flags[3], "--limit", 2, "--max-new-tokens", 2, "--k", 2]
    runs = [
        (out, lambda: resume(flags, out)),
        (rows, lambda: cli(eval_gsm8k, *asked, "--out", rows)),
        (file, lambda: cli(answering, "--model", flags[1], "--data", flags[3], "--limit", 2,
                           "--max-new-tokens", 2, "--out", file, "--resume"))]
    for path, run in runs:
        process, before = holder(path), everything_under(path)
        assert_refused(run(), f"another program is writing to {path}")
        assert everything_under(path) == before
        process.kill()
        process.wait()
        assert run().code == 0
    assert len(log_rows(out, "train")) == 6


def test_a_lock_goes_with_its_object(tmp_path):
    first = Alone(tmp_path)
    with pytest.raises(InputError, match="another program"):
        Alone(tmp_path)
    del first
    with Alone(tmp_path):
        pass
    Alone(tmp_path)


# --------------------------------------------------------------------------------------------------
# Over-long questions: before anything is answered

def test_over_long_questions_are_named_before_anything_is_answered(trained, tiny, tmp_path):
    path, own = tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    questions = ["short"] * 4 + ["word " * 600]
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    message = "question 5 has 1"
    result = cli(sample, "--model", trained, "--data", path, "--batch-size", 1)
    assert_refused(result, message)
    assert "short" not in result.out
    assert_refused(cli(eval_gsm8k, "--model", trained, "--data", path, "--out", tmp_path / "e"),
                   message)
    assert_refused(cli(answering, "--model", tiny, "--data", path, "--out", own), message)
    assert not own.exists() and not (tmp_path / "e").exists()


# --------------------------------------------------------------------------------------------------
# The terminal

ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def assert_quiet(result):
    """Nothing in it moves a cursor or titles a window; progress bars move up at most."""
    for text in (result.out, result.err.replace("\x1b[A", "")):
        assert "\x1b" not in text and "\x07" not in text


def test_no_text_from_outside_commands_the_terminal(trained, tiny, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{ESCAPE}{a}", "answer": f"{ESCAPE} 1"}) + "\n"
                            for a in range(6)))
    asked = ["--max-new-tokens", 2]
    for result in (
            cli(sample, ESCAPE, "--model", trained, *asked),
            cli(sample, "--data", path, "--model", trained, *asked),
            cli(eval_gsm8k, "--data", path, "--model", trained, "--k", 2, *asked, "--out",
                tmp_path / "eval"),
            cli(train, *flags[:3], path, *flags[4:], "--steps", 1, "--out",
                tmp_path / f"out{ESCAPE}")):
        assert result.code == 0, result
        assert_quiet(result)
    for result in (
            cli(sample, "--model", f"no{ESCAPE}"), cli(sample, "--data", f"no{ESCAPE}.txt"),
            cli(sample, f"--{ESCAPE}"), cli(train, "--preset", ESCAPE)):
        assert result.code == 2
        assert_quiet(result)


def test_no_name_of_a_tensor_commands_the_terminal(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {f"a{ESCAPE}": torch.zeros(1)}, folder / "model.safetensors")
    result = cli(sample, "--model", folder)
    assert_refused(result, "a?]0;owned??[2J")
    assert_quiet(result)


# --------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_the_folder_are_not_read(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})
    with pytest.raises(InputError, match="outside"):
        weight_files(folder)
    assert_refused(cli(sample, "--model", folder), "outside")


def test_out_is_no_device_and_has_a_name(trained, flags, tmp_path):
    """A pipe stands for a device: renaming a file over it would take its place."""
    pipe = tmp_path / "page.html"
    os.mkfifo(pipe)
    assert_refused(cli(viewer, "x", "--model", trained, "--out", pipe), "no regular file")
    with pytest.raises(InputError, match="no regular file"):
        write_text(pipe, "x")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    for module, *more in ((train, *flags), (eval_gsm8k, "--model", trained, "--data", flags[3]),
                          (viewer, "x", "--model", trained)):
        assert cli(module, *more, "--out", "").code == 2


def test_half_a_line_of_a_full_disk_is_mended_before_the_next(flags, out):
    with open(out / "log.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    assert resume(flags, out).code == 0
    assert [row["step"] for row in log_rows(out, "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"question": "x"}', "[" * 50_000])
def test_damaged_answers_are_named(flags, tmp_path, line):
    path = tmp_path / "own.jsonl"
    run = ["--model", flags[1], "--data", flags[3], "--limit", 5, "--max-new-tokens", 2,
           "--batch-size", 1, "--out", path]
    assert cli(answering, *run).code == 0
    lines = path.read_text().splitlines()
    damaged = "\n".join([*lines[:2], line, *lines[3:]]) + "\n"
    path.write_text(damaged)
    result = cli(answering, *run, "--resume")
    assert_refused(result, "other questions")
    assert f"{path}:3 is damaged" in result.out and path.read_text() == damaged


# --------------------------------------------------------------------------------------------------
# Broken configurations and weights

CONFIG = {
    "vocab_size": [None, "300", 0, -1, 299, 10 ** 12, 300.5, [300]],
    "hidden_size": [0, -64, "64", 65, {}],
    "intermediate_size": [0, "x", 1.5],
    "num_hidden_layers": [0, -1, "2", 10 ** 9],
    "num_attention_heads": [0, "4", 10 ** 9],
    "num_key_value_heads": [3, -1, "2", 1.0],
    "head_dim": [0, 15, "16"],
    "rms_norm_eps": ["1e-5", -1, [], float("nan")],
    "max_position_embeddings": [0, -5, "512", 1e9],
    "tie_word_embeddings": ["true", 1, []],
    "attention_bias": ["false", 0],
    "mlp_bias": [3],
    "rope_theta": [],
    "model_type": [None, 7, ["llama"]],
    "num_mtp_layers": ["1", -1, 1.5, 10 ** 9],
    "nanomtp": [
        [], "x", {"k_max": 0}, {"k_max": -3}, {"k_max": "8"}, {"k_max": 10 ** 9},
        {"k_max": 3, "mask_token_id": 7}, {"k_max": 3, "mask_token_id": "7"},
        {"k_max": 3, "bidirectional": "no"}, {"k_max": 3, "prompt_format": "jinja"},
        {"k_max": 3, "prompt_format": 3}],
    "rope_parameters": [
        [], "x", {"rope_theta": 0}, {"rope_theta": -1}, {"rope_theta": "x"}, {"rope_type": 3},
        {"rope_type": "yarn"}, {"rope_type": "llama3"},
        {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4,
         "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
         "original_max_position_embeddings": 64}],
}


@pytest.mark.parametrize("key, value", [(key, value) for key in CONFIG for value in CONFIG[key]])
def test_broken_configurations(tiny, tmp_path, key, value):
    """Each is one line, when a model is decoded and when it is trained, and leaves nothing."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {key: value})
    assert cli(sample, "x", "--model", folder, "--max-new-tokens", 2).code == 2
    result = cli(train, "--model", folder, "--steps", 1, "--out", tmp_path / "out")
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": NaN', "[" * 50_000, '{"a":' * 50_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json"])
def test_files_that_are_no_json(tiny, tmp_path, name, text):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / name).write_text(text)
    assert_refused(cli(sample, "--model", folder), name)


def in_model(described, key, value):
    described["model"][key] = value


TOKENIZERS = {
    "no model": lambda t: t.pop("model"),
    "a list as model": lambda t: t.update(model=[]),
    "no vocabulary": lambda t: t["model"].pop("vocab"),
    "a list as vocabulary": lambda t: in_model(t, "vocab", []),
    "ids of text": lambda t: in_model(t, "vocab", {name: str(i) for name, i in
                                                   t["model"]["vocab"].items()}),
    "an id twice": lambda t: t["model"]["vocab"].update({"a": 50, "b": 50}),
    "an id beyond the embedding": lambda t: t["model"]["vocab"].update({"a": 4000}),
    "a negative id": lambda t: t["model"]["vocab"].update({"a": -4}),
    "merges of numbers": lambda t: in_model(t, "merges", [1, 2]),
    "merges that are a number": lambda t: in_model(t, "merges", 7),
    "added tokens without names": lambda t: t.update(added_tokens=[{"id": 0}]),
    "added tokens that are a number": lambda t: t.update(added_tokens=3),
    "a pre-tokenizer of text": lambda t: t.update(pre_tokenizer="x"),
    "a normalizer of text": lambda t: t.update(normalizer="NFC"),
    "a post-processor of text": lambda t: t.update(post_processor="x"),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_broken_tokenizers(tiny, tmp_path, what):
    folder = shutil.copytree(tiny, tmp_path / "model")
    described = read_json(folder / "tokenizer.json")
    TOKENIZERS[what](described)
    write_json(folder / "tokenizer.json", described)
    assert_refused(cli(sample, "--model", folder), "tokenizer.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(tiny, tmp_path, value):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(cli(sample, "--model", folder), "up_proj.weight holds infinite numbers or NaN")


def test_field():
    raw = {"i": 3, "f": 2.5, "n": None, "b": True}
    assert field(raw, "i", int) == 3 and field(raw, "i", float) == 3.0
    assert field(raw, "n", int, 7) == field(raw, "absent", int, 7) == 7
    for name, kind, bounds in (("b", int, {}), ("f", int, {}), ("i", int, {"least": 4, "most": 9}),
                               ("n", int, {}), ("i", str, {}), ("i", bool, {})):
        with pytest.raises(InputError, match=name):
            field(raw, name, kind, **bounds)
    assert read_note({}) == {} and read_note({"nanomtp": {"k_max": 2}}) == {"k_max": 2}


# --------------------------------------------------------------------------------------------------
# Flags that cannot be meant: refused before a file is made, never a hang

FLAGS = [
    (train, "--batch-size 1000000000", "at most"), (train, "--eval-prompts 1000000000", "at most"),
    (train, "--micro-batch-size 1000000000", "at most"), (train, "--seq-len 1000000000", "at most"),
    (train, "--k 1000000000", "at most"), (train, "--k 600", "beyond the model's context of 512"),
    (train, "--heads 600", "beyond the model's context of 512"),
    (train, "--seq-len 513", "beyond the model's context of 512"),
    (train, "--stride 1000", "leaves nearly all rows without an anchor"),
    (train, "--seed -1", "--seed must be at least 0"), (train, "--seed 1e3", "--seed"),
    (train, "--seed 99999999999999999999999", "--seed must be at most"),
    (train, "--lr=-inf", "no finite number"), (train, "--minutes nan", "no finite number"),
    (train, "--beta2 nan", "no finite number"), (train, "--data ''", "--data is empty"),
    (train, "--model ''", "--model is empty"), (train, "--model ' '", "--model is empty"),
    (sample, "--temperature inf --k 1", "no finite number"),
    (sample, "--top-p nan --k 1", "no finite number"),
    (sample, "--batch-size 1000000000", "at most"), (sample, "--k 1000000000", "1 to 3"),
    (eval_gsm8k, "--threshold inf", "no finite number"),
    (eval_gsm8k, "--shots 1000000000", "at most"),
    (eval_gsm8k, "--data wordproblems --limit 1000000000", "word problems are too many"),
]


@pytest.mark.parametrize("module, line, message", FLAGS, ids=[line for _, line, _ in FLAGS])
def test_flags_that_cannot_be_meant(trained, tiny, tmp_path, monkeypatch, module, line, message):
    monkeypatch.chdir(tmp_path)
    base = ["--model", tiny if module is train else trained]
    result = cli(module, *base, *shlex.split(line))
    assert_refused(result, message)
    assert list(tmp_path.iterdir()) == []


def test_an_error_has_a_line_of_its_own_behind_a_bar(flags, out, monkeypatch):
    """The bar's line is ended first."""
    def full(*args):
        raise InputError("the disk is full")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
    result = resume(flags, out)
    assert result.code == 2 and re.search(r"\n\s*error: the disk is full\n$", result.err)


# --------------------------------------------------------------------------------------------------
# Faults that tests once let live

def test_adamw_has_the_betas_that_were_asked_for(flags, tmp_path):
    out = train_briefly(tmp_path / "out", *flags, "--steps", 1, "--beta2", 0.9)
    state = torch.load(out / "latest" / "trainer.pt", weights_only=True)
    assert {tuple(group["betas"]) for group in state["optimizer"]["param_groups"]} == {(0.9, 0.9)}


def test_every_epoch_has_an_order_of_its_own():
    rows = [f"row {i}" for i in range(20)]
    epochs = [draw_rows(rows, 20, step, seed=0) for step in range(3)]
    assert all(sorted(epoch) == sorted(rows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_time_of_a_batch_is_that_of_its_slowest_row():
    batch = [answers.Answer(tokens=[1] * 4, chunks=[2, 2], seconds=seconds, prompt_seconds=0.5)
             for seconds in (1.0, 2.5, 1.5)]
    whole, decoding = speeds([batch])
    assert whole == 12 / 2.5 and decoding == 6 / 2.0
