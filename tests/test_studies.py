"""
The studies around training: ablations, the model's own answers, the clash of two good answers,
confidence, efficiency. Their arithmetic against numbers worked out by hand, and each of them run on
something very small. (What they refuse is in test_cli.py.)
"""
import gzip
import importlib
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_checkpoint, train_briefly
from test_cli import assert_refused, cli

from common.cli import InputError
from common.data import load_questions
from common.files import read_json
from common.intervals import half_width, t_quantile
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from model import Transformer
from sample import generate
from studies import ablate, answers, clash, confidence, efficiency


def works(module, *flags):
    """Run a study in this process. Returns what it printed."""
    result = cli(module, *flags)
    assert result.code == 0, result
    return result.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """k_max = 3, two steps away from the tiny model: it still answers well with k = 1."""
    return train_briefly(tmp_path_factory.mktemp("trained") / "out", "--k", 3, "--lr", 1e-4)


@pytest.fixture
def here(monkeypatch):
    """train.py and eval_gsm8k.py, else in processes of their own, run in this one, and briefly."""
    def run_script(script, *flags, what=None, said=None):
        short = ["--max-new-tokens", 8] if script == "eval_gsm8k.py" else []
        works(importlib.import_module(Path(script).stem), *flags, *short)
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(clash, "run_script", run_script)
    monkeypatch.setattr(ablate, "start", run_script)


# --------------------------------------------------------------------------------------------------
# Ablations

def rows_with(hits, tokens, passes):
    """Compact rows, one for each question."""
    return [{"id": i, "correct": hit, "tokens": n, "chunks": [1] * own}
            for i, (hit, n, own) in enumerate(zip(hits, tokens, passes))]


def run_with(rows, steps=300, minutes=4.0):
    """A run with the same rows for all strategies."""
    return {"steps": steps, "minutes": minutes, "rows": dict.fromkeys(ablate.STRATEGIES, rows)}


def test_mean_and_error():
    """The runs' own errors where the runs agree, their spread where they do not."""
    assert ablate.mean_and_error([90.0, 90.0], [3.0, 4.0]) == (90.0, 2.5)       # sqrt(9 + 16) / 2
    mean, error = ablate.mean_and_error([80.0, 100.0], [3.0, 4.0])
    assert mean == 90.0
    assert error == pytest.approx(statistics.stdev([80.0, 100.0]) / 2 ** 0.5)
    assert ablate.mean_and_error([7.0], [2.0]) == (7.0, 2.0)


def test_values_of_a_run():
    """By answers every answer counts once; pooled the long ones count more, each by its pull."""
    accuracy, by_answers, pooled = ablate.values_of(rows_with([1, 0], [40, 10], [10, 10]))
    assert (accuracy, by_answers, pooled) == ([100, 0], [4, 1], [4, 1])
    _, by_answers, pooled = ablate.values_of(rows_with([1, 1], [60, 10], [20, 10]))
    rate = 70 / 30
    assert by_answers == [3, 1] and statistics.fmean(pooled) == pytest.approx(rate)
    assert pooled == pytest.approx([rate + (60 - rate * 20) / 15, rate + (10 - rate * 10) / 15])


def test_summary():
    """Two runs, two questions: means over runs, the larger error; pooled beside by answers."""
    runs = {"default": [run_with(rows_with([1, 1], [60, 10], [20, 10]), minutes=4.21),
                        run_with(rows_with([1, 0], [40, 10], [10, 10]), minutes=6.9)]}
    table = ablate.summarise(runs)
    accuracy, error, rate, rate_error, pooled, _ = table["default"]["adaptive 0.9"]
    assert (accuracy, rate) == (75, 2.25) and pooled == pytest.approx((70 / 30 + 2.5) / 2)
    assert error == pytest.approx(25)               # between runs: 35.4 / sqrt(2); own: 50 / 2
    assert rate_error == pytest.approx(math.hypot(1, 1.5) / 2)
    row = ablate.markdown(table, runs).splitlines()[2]
    cell = " | 75.0 +- 25.0 @ 2.25 +- 0.90 (2.42)" * len(ablate.STRATEGIES)
    assert row == f"| default | 2 | 300 | 4.2, 6.9{cell} | 64.1 @ 3.3 |  |  |"


def test_differences_by_hand():
    """Question by question, seed by seed; each interval at the level that all of them ask for."""
    base = rows_with([1, 1, 0, 1], [20] * 4, [10] * 4)
    own = [rows_with([0, 1, 0, 1], [30] * 4, [10] * 4), rows_with([0, 0, 0, 1], [34] * 4, [10] * 4)]
    runs = {"default": [run_with(base)] * 3, "fixed k": [run_with(rows) for rows in own],
            "curriculum": [run_with(base)] * 2}
    found, level = ablate.differences(runs)
    assert level == pytest.approx(1 - 0.05 / 4)                 # two variants, two measures
    mean, half, by_seed = found["fixed k"]["points"]
    assert by_seed == [-25, -50] and mean == -37.5              # by question: -100, -50, 0, 0
    assert half == pytest.approx(math.hypot(
        t_quantile(level, 1) * 12.5, half_width([-100, -50, 0, 0], level)))
    mean, half, by_seed = found["fixed k"]["tokens per forward"]
    assert by_seed == pytest.approx([1, 1.4]) and mean == pytest.approx(1.2)
    assert half == pytest.approx(t_quantile(level, 1) * 0.2)    # questions do not differ
    assert found["curriculum"]["points"] == (0, 0, [0, 0])
    one, _ = ablate.differences({name: own[:1] for name, own in runs.items()})
    assert one["fixed k"]["points"] == (-25, math.inf, [-25])


def test_orderings():
    """Each verdict once: the paper's fixed k loses 12.5 points and 0.6 tokens per forward."""
    def runs_with(hits, tokens):
        """Five seeds and 100 questions; seed 4 has one hit more, and a token more per answer."""
        return [run_with(rows_with([1] * (hits + (seed == 4)) + [0] * (100 - hits - (seed == 4)),
                                   [tokens + (seed == 4)] * 100, [10] * 100)) for seed in range(5)]

    flat = [run_with(rows_with([1] * 90 + [0] * 10, [30] * 100, [10] * 100))] * 5
    runs = {"default": flat, "fixed k": runs_with(50, 40), "soft teacher": runs_with(90, 20),
            "curriculum": runs_with(90, 30)}
    table = ablate.summarise(runs)
    note, lines = ablate.orderings(runs).split("\n\n")
    fixed, soft, curriculum = lines.splitlines()
    assert "an interval of 99.17%" in note and "so that all 6 hold together" in note
    assert "With two seeds it reaches 76 standard errors" in note and "with five 4.9:" in note
    assert "-39.8 +- " in fixed and "points (-40.0, -40.0, -40.0, -40.0, -39.0), +1.02" in fixed
    assert "The paper: -12.5 points, -0.6." in fixed
    assert "accuracy holds; in tokens per forward it does not hold" in fixed
    assert "accuracy is undecided; in tokens per forward it holds" in soft
    assert curriculum.endswith("no such run. Undecided: points and tokens per forward.")
    rows = ablate.markdown(table, runs).splitlines()
    assert len(rows) == 2 + len(runs)
    assert rows[3].endswith("| 51.6 @ 2.7 | holds | does not hold |")
    assert rows[5].startswith("| curriculum | 5 |") and rows[5].endswith("|  |  |  |")


def test_what_is_kept_of_a_run(tmp_path):
    """Steps and minutes from the log, where a step may stand twice or not at all; rows by number
    of the question, whatever the order of batches."""
    log = [{"event": "start", "step": 0}, {"event": "train", "step": 1, "seconds": 9.0},
           {"event": "resume", "step": 0}, {"event": "train", "step": 1, "seconds": 1.0},
           {"event": "train", "step": 3, "seconds": 2.0}, {"event": "end", "step": 4}]
    rows = [{"id": batch + i, "strategy": "k = 1", "batch": batch, "batch_rows": 2,
             "tokens": [batch, i], "chunks": [1, 1], "finish": "stop", "seconds": 1.0,
             "prompt_seconds": 0.5, "correct": 1, "correct_strict": 1, "start_loss": None,
             "text": "one"} for batch in (2, 0) for i in (0, 1)]
    for name, lines in (("log.jsonl", log), ("rows.jsonl", [{"seed": 0}, *rows])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ablate.keep(tmp_path)
    run = ablate.read_run(tmp_path)
    assert run["steps"] == 3 and run["minutes"] == pytest.approx(1.5 * 3 / 60)
    assert [row["id"] for row in run["rows"]["k = 1"]] == [0, 1, 2, 3]
    assert gzip.decompress((tmp_path / "log.jsonl.gz").read_bytes()) == (
        tmp_path / "log.jsonl").read_bytes()


def test_ablation_runs_and_resumes(tmp_path, here, monkeypatch):
    """Two variants for two steps; then --resume finds everything there and runs nothing, and the
    table alone comes from what is kept in a repository."""
    flags = ("--only", "default", "bidirectional", "--seeds", 1, "--k", 3, "--steps", 2,
             "--limit", 2, "--out", tmp_path)
    works(ablate, *flags)
    table = read_json(tmp_path / "table.json")
    assert list(table["table"]) == ["default", "bidirectional"]
    config = read_json(tmp_path / "bidirectional-0" / "latest" / "config.json")
    assert config["nanomtp"]["bidirectional"] is True
    for name, own in table["table"].items():                    # what eval_gsm8k.py says as well
        for entry in read_json(tmp_path / f"{name}-0" / "table.json")["table"]:
            accuracy, error, rate, rate_error, pooled, _ = own[entry["strategy"]]
            assert [accuracy, error, rate, rate_error, pooled] == pytest.approx([
                100 * entry["accuracy"], 100 * entry["stderr"], entry["tokens_per_forward"],
                entry["tokens_per_forward_std"] / 2 ** 0.5, entry["tokens_per_forward_pooled"]])
    text = (tmp_path / "table.md").read_text()
    assert "| bidirectional | 1 | 2 |" in text
    assert "- **bidirectional** against the default" in text and "+- inf points" in text
    assert "Not quite the paper's bidirectional" in text
    assert_refused(cli(ablate, *flags), "add --resume")
    monkeypatch.setattr(ablate, "start", lambda *_, **__: pytest.fail("nothing was left"))
    works(ablate, *flags, "--resume")
    assert read_json(tmp_path / "table.json")["table"] == table["table"]
    assert_refused(cli(ablate, *flags, "--resume", "--limit", 3), "same settings")
    for name in ("rows.jsonl", "log.jsonl", "latest", "table.md"):
        (tmp_path / "default-0" / name).unlink()
    works(ablate, "--out", tmp_path, "--table-only")
    assert (tmp_path / "table.md").read_text() == text
    nothing = cli(ablate, "--out", tmp_path, "--table-only", "--only", "curriculum")
    assert_refused(nothing, "holds no whole run")


def test_what_each_variant_runs(tmp_path, monkeypatch):
    """Its own flag on top of the common ones; half of the steps as a curriculum; more or fewer
    steps where each is quicker or slower."""
    commands = []

    def refuse(*command, said=None):
        commands.append(" ".join(map(str, command)))
        return SimpleNamespace(poll=lambda: 2, terminate=lambda: None, wait=lambda: None)

    monkeypatch.setattr(ablate, "start", refuse)
    for number, (name, (flags, seeds, _)) in enumerate(ablate.VARIANTS.items()):
        result = cli(ablate, "--only", name, "--steps", 300, "--out", tmp_path / str(number))
        assert_refused(result, f"'{name}', seed 0, failed, see above; --resume")
        steps = {"dense anchors": 171, "sparse anchors": 384}.get(name, 300)
        assert f"--steps {steps} --cooldown {steps // 2} " in commands[-1]
        assert "--k 4 " in commands[-1]
        assert seeds == (5 if name in ("default", "fixed k", "soft teacher", "ground truth") else 2)
        own = " ".join(flags).replace("HALF", "150")
        assert not own or commands[-1].count(own) == 1
    assert sum("--curriculum 150" in command for command in commands) == 1
    assert len(commands) == len(set(commands)) == len(ablate.VARIANTS)


# A stand-in for train.py: it says what it has, and ends as it is told, or only when it is asked to
STAND_IN = """
import os, pathlib, signal, sys, time
name, way = sys.argv[1:]
def stop(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print(name, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
pathlib.Path(name + ".began").touch()
while way == "wait" and not pathlib.Path("enough").exists():
    time.sleep(0.02)
sys.exit(3 if way == "fail" else 0)
"""


@pytest.fixture
def side_by_side(tmp_path, monkeypatch):
    """finish() for two runs at a time of the stand-in: a function of {run: how it ends}."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    kept, children, popen = [], [], ablate.subprocess.Popen

    def next_command(name, seed, args):
        if (tmp_path / f"{name}.ended").exists():
            return None
        (tmp_path / f"{name}.ended").touch()
        return ["stand_in.py", name, args.ways[name]]

    def remember(*command, **how):
        children.append(popen(*command, **how))
        return children[-1]

    monkeypatch.setattr(ablate, "next_command", next_command)
    monkeypatch.setattr(ablate, "keep", kept.append)
    monkeypatch.setattr(ablate.subprocess, "Popen", remember)

    def finish(ways):
        args = SimpleNamespace(out=tmp_path, processes=2, ways=ways)
        try:
            ablate.finish([(name, 0) for name in ways], args)
        finally:
            assert all(child.poll() is not None for child in children)      # nobody is left behind
        return [path.name for path in kept]

    return finish


def when_begun(monkeypatch, names, then):
    """Call `then` in place of a nap as soon as all of `names` have begun."""
    nap = ablate.time.sleep

    def sleep(seconds):
        nap(seconds)
        if all(Path(f"{name}.began").exists() for name in names):
            then()

    monkeypatch.setattr(ablate, "time", SimpleNamespace(sleep=sleep))


def test_two_runs_beside_each_other(side_by_side, monkeypatch):
    """The first waits until the second, and then the third, have begun; one thread each; what they
    say is in a file for each."""
    when_begun(monkeypatch, "abc", Path("enough").touch)
    assert sorted(side_by_side({"a": "wait", "b": "end", "c": "end"})) == ["a-0", "b-0", "c-0"]
    for name in "abc":
        assert Path(f"{name}-0.txt").read_text() == f"{name} threads 1\n"


def test_one_failure_ends_the_others(side_by_side):
    with pytest.raises(InputError, match=r"'b', seed 0, failed, see .*b-0.txt; --resume"):
        side_by_side({"a": "wait", "b": "fail", "c": "end"})
    assert not Path("c.began").exists()


def test_ctrl_c_ends_both(side_by_side, monkeypatch):
    """Each is asked once, and saves."""
    def interrupt():
        raise KeyboardInterrupt

    when_begun(monkeypatch, "ab", interrupt)
    with pytest.raises(KeyboardInterrupt):
        side_by_side({"a": "wait", "b": "wait", "c": "end"})
    for name in "ab":
        assert Path(f"{name}-0.txt").read_text() == f"{name} threads 1\nsaved\n"
    assert not Path("c.began").exists()


# --------------------------------------------------------------------------------------------------
# The model's own answers

def test_answers(tmp_path, tiny):
    """Greedy answers to the questions of the first training rows, by the lengths of their prompts;
    --resume goes on behind whole lines."""
    path = tmp_path / "rows.jsonl"
    flags = ("--data", "wordproblems", "--model", tiny, "--limit", 5, "--max-new-tokens", 8,
             "--batch-size", 2, "--out", path)
    works(answers, *flags)
    rows = [json.loads(line) for line in open(path)]
    tokenizer, model = Tokenizer(tiny), Transformer.from_pretrained(tiny)
    asked = [row["question"] for row in rows]
    assert sorted(asked) == sorted(WordProblems(0)[i]["question"] for i in range(5))
    prompts = [tokenizer.prompt(question, "chat") for question in asked]
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    for row, prompt in zip(rows, prompts):
        result, = generate(model, tokenizer, [prompt], max_new_tokens=8)
        written = [token for token in result.tokens if token not in tokenizer.stop_ids]
        assert row["answer"] == tokenizer.decode(written)
    (piece,) = read_json(tmp_path / "rows.json")["pieces"]
    assert piece["rows"] == 5 and piece["minutes"] > 0 and piece["commit"] and piece["command"]
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3])[:-4])  # killed in the third line
    works(answers, *flags, "--resume")
    assert path.read_text() == whole
    pieces = read_json(tmp_path / "rows.json")["pieces"]
    assert [own["rows"] for own in pieces] == [5, 3]            # a whole line is kept, of any batch
    for other in (("--max-new-tokens", 9), ("--prompt-format", "plain")):
        assert_refused(cli(answers, *flags, "--resume", *other), "rows were made with")
    path.unlink()                                               # what is not ours is not replaced
    assert_refused(cli(answers, *flags), "rows.json exists")
    (tmp_path / "rows.json").write_text("{}")
    assert_refused(cli(answers, *flags, "--resume"), "rows.json is damaged")
    (tmp_path / "rows.json").unlink()
    works(answers, *flags)
    for other in (("--seed", 1), ("--limit", 40)):              # more rows: another order
        assert_refused(cli(answers, *flags, "--resume", *other), "other questions")
    assert path.read_text() == whole


def test_answers_of_one_length_keep_their_order(tmp_path, tiny):
    """Nor does the text of a question decide: what is resumed has the order that it began with."""
    rows, path = tmp_path / "rows.jsonl", tmp_path / "own.jsonl"
    questions = ["sss", "a", "bb", "ttt", "aaa", "zz", "q?"]
    rows.write_text("".join(json.dumps({"question": question, "answer": "1"}) + "\n"
                            for question in questions))
    works(answers, "--data", rows, "--model", tiny, "--max-new-tokens", 2, "--out", path,
          "--prompt-format", "plain")
    expected = sorted(questions, key=len)                       # all of them: none is held out
    assert [json.loads(line)["question"] for line in open(path)] == expected != sorted(expected)


# --------------------------------------------------------------------------------------------------
# Why ground truth as labels fails

def test_clash_rows():
    """Both orders of the same things, each about half the time; numbers and things differ."""
    first = 0
    for row in clash.rows_of(0, 400):
        _, _, a, x, _, b, y, *_ = row["question"].replace(".", "").split()
        assert a != b and x != y
        assert {row["answer"], row["other"]} == {f"{a} {x} and {b} {y}", f"{b} {y} and {a} {x}"}
        first += row["answer"].startswith(a)
    assert 160 < first < 240


def test_what_a_clash_is():
    """7 apples and 5 books, or the other way round; "books" is of two tokens."""
    answers = [[7, 20, 1, 5, 30, 31], [5, 30, 31, 1, 7, 20]]
    assert clash.kind_of([7, 20], answers) == clash.kind_of([5, 30], answers) == "together"
    assert clash.kind_of([5, 30, 31, 1], answers) == "together"
    assert clash.kind_of([7, 30], answers) == clash.kind_of([5, 20], answers) == "clash"
    assert clash.kind_of([7, 30, 31], answers) == "clash"
    assert clash.kind_of([7, 40], answers) == clash.kind_of([8, 30], answers) == "foreign"
    assert clash.kind_of([7, 31], answers) == "foreign"         # it stands elsewhere


def test_clash_end_to_end(tmp_path, here):
    """One step of each training; what is counted is what the slots say."""
    out = tmp_path / "out"
    works(clash, "--steps", 1, "--limit", 6, "--seeds", 2, "--out", out)
    record = read_json(out / "clash.json")
    assert [own["seed"] for own in record["each_seed"]] == [0, 1]
    for seed, whole in enumerate(record["each_seed"]):
        rows = clash.rows_of(seed, 6)
        assert whole["first_question"] == rows[0] and list(whole["objectives"]) == list(
            clash.TARGETS)
        for own in whole["objectives"].values():
            kinds = [chunk["kind"] for chunk in own["chunks"]]
            assert {kind: own[kind] for kind in clash.KINDS} == {
                kind: kinds.count(kind) for kind in clash.KINDS}
            begins = [row["answer"].startswith(chunk["chunk"])
                      or row["other"].startswith(chunk["chunk"])
                      for row, chunk in zip(rows, own["chunks"])]
            assert [kind == "together" for kind in kinds] == begins and len(begins) == 6
            assert own["chunks"][0]["chunk"] == "".join(slot[0][0] for slot in own["slots"])
            for (_, best), (_, second), _ in own["slots"]:
                assert 1 >= best >= second
    trained = out / "seed-1" / "hard" / "latest"
    assert read_json(trained / "config.json")["nanomtp"]["k_max"] == 2
    assert "| the teacher |" in (out / "clash.md").read_text()
    assert_refused(cli(clash, "--out", out), "add --resume")
    assert_refused(cli(clash, "--out", out, "--resume", "--limit", 7), "same settings")


# --------------------------------------------------------------------------------------------------
# Confidence

def test_calibration_bins():
    tokens = [{"confidence": c, "agrees": a} for c, a in (
        (0.2, 0), (0.92, 1), (0.94, 0), (0.95, 1), (1.0, 1), (0.991, 1))]
    bins = confidence.calibration(tokens)
    assert [(b["from"], b["to"], b["tokens"], b["agrees"]) for b in bins] == [
        (0.0, 0.3, 1, 0.0), (0.9, 0.95, 2, 0.5), (0.95, 0.99, 1, 1.0), (0.99, 1.0, 2, 1.0)]
    assert bins[1]["confidence"] == pytest.approx(0.93)
    assert bins[1]["stderr"] == pytest.approx(0.5 / 2 ** 0.5)


def test_correlations():
    def points(*pairs):
        return [{"confidence": c, "loss": x} for c, x in pairs]

    r, by_rank = confidence.correlations(points((0.1, 9.0), (0.2, 4.0), (0.3, 3.0), (0.9, 1.0)))
    assert by_rank == pytest.approx(-1) and -1 < r < -0.5
    constant = confidence.correlations(points((1.0, 1.0), (1.0, 2.0)))
    assert all(r != r for r in constant)                        # NaN


def test_confidence_end_to_end(trained, tmp_path):
    """What the teacher says of a token is what a plain pass says; every token is in one bin."""
    works(confidence, "--model", trained, "--limit", 3, "--threshold", 0.1,
          "--max-new-tokens", 20, "--batch-size", 2, "--out", tmp_path)
    record = read_json(tmp_path / "confidence.json")
    tokens = [json.loads(line) for line in open(tmp_path / "tokens.jsonl")]
    assert len(record["answers"]) == 3 and {t["question"] for t in tokens} == {0, 1, 2}
    assert {t["slot"] for t in tokens} >= {1, 2}
    assert sum(b["tokens"] for bins in record["calibration"].values() for b in bins) == len(tokens)

    tokenizer = Tokenizer(trained / "latest")
    (question,), _ = load_questions("wordproblems", 1, 0, 0)
    prompt = tokenizer.prompt(question["question"], "plain")
    student = Transformer.from_pretrained(trained / "latest")
    result, = generate(student, tokenizer, [prompt], 3, 0.1, max_new_tokens=20)
    teacher = Transformer.from_pretrained(ROOT / "checkpoints" / "tiny")
    ids = torch.tensor([prompt + result.tokens])
    n = ids.shape[1]
    with torch.no_grad():
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        choices = teacher(ids, torch.arange(n)[None], causal)[0, len(prompt) - 1:-1].argmax(-1)
    own = [t for t in tokens if t["question"] == 0]
    assert [t["agrees"] for t in own] == (choices == ids[0, len(prompt):]).tolist()
    assert [t["confidence"] for t in own] == pytest.approx(result.confidences, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Both are about mask tokens

def test_heads_are_refused(tmp_path, tiny):
    out, none = train_briefly(tmp_path / "out", "--model", tiny, "--heads", 2), tmp_path / "none"
    for module in (confidence, clash):
        result = cli(module, "--model", out, "--limit", 1, "--out", none)
        assert_refused(result, f"{out} drafts with heads")
    assert not none.exists()


# --------------------------------------------------------------------------------------------------
# Efficiency

def test_weights_of_a_model(tmp_path):
    """Every matrix but the embedding meets every fed token, the output matrix some of them."""
    for tied in (True, False):
        folder = tiny_checkpoint(tmp_path / str(tied), "qwen3", tied=tied)
        body, head = efficiency.weights_of(folder)
        model = Transformer.from_pretrained(folder)
        linear = [module.weight.numel() for name, module in model.named_modules()
                  if isinstance(module, torch.nn.Linear) and name != "lm_head"]
        assert body == sum(linear) and head == model.output_matrix.numel()


def test_efficiency_race(tmp_path, monkeypatch):
    """This checkout as the older one, and it alone; the numbers follow from its rounds."""
    contenders = efficiency.contenders

    def one(args):
        assert list(contenders(args))[:2] == ["before", "now, stride 3"]
        return {"before": contenders(args)["before"]}

    monkeypatch.setattr(efficiency, "contenders", one)
    monkeypatch.setattr(efficiency, "matmul_rate", lambda *_: 1e10)     # it takes seconds
    works(efficiency, "--before", ROOT, "--k", 2, "--batch-size", 2, "--micro-batch-size", 2,
          "--steps", 3, "--rounds", 1, "--out", tmp_path)
    record = read_json(tmp_path / "efficiency.json")
    (before,), (own,) = record["table"], record["each_round"]["before"]
    body, head = efficiency.weights_of(ROOT / "checkpoints" / "tiny")
    assert own["slots"] % 2 == 0
    assert own["flop"] == 8 * (body * own["fed_tokens"] + head * own["slots"])
    assert before["supervised_share"] == own["slots"] / own["fed_tokens"]
    assert before["utilisation"] == pytest.approx(own["flop"] / own["seconds"] / 1e10)
    assert 1e8 < before["peak_bytes"] < 1e10
    assert "| before |" in (tmp_path / "efficiency.md").read_text()


def test_efficiency_says_why_train_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "matmul_rate", lambda *_: 1e10)
    (tmp_path / "train.py").write_text("import sys\nsys.exit('error: cannot read it')\n")
    result = cli(efficiency, "--before", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2
    assert f"{tmp_path / 'train.py'} failed: error: cannot read it" in result.err
