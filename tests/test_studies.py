"""
The studies around training: ablations, the model's own answers, the clash of two good answers,
confidence, efficiency. Their arithmetic against numbers worked out by hand, and each of them run on
something very small. (What they refuse is in test_cli.py.)
"""
import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_checkpoint, train_briefly
from test_cli import assert_refused, cli

from common.data import load_questions
from common.files import read_json
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
    def run_script(script, *flags, what):
        short = ["--max-new-tokens", 8] if script == "eval_gsm8k.py" else []
        works(importlib.import_module(Path(script).stem), *flags, *short)

    for module in (ablate, clash):
        monkeypatch.setattr(module, "run_script", run_script)


# --------------------------------------------------------------------------------------------------
# Ablations

def entries(accuracy, per_forward, questions=100, stderr=0.02):
    """A run's entries, the same for all strategies."""
    return {name: {"accuracy": accuracy, "stderr": stderr, "tokens_per_forward": per_forward,
                   "tokens_per_forward_std": 0.5, "questions": questions}
            for name in ablate.STRATEGIES}


def test_mean_and_error():
    """The runs' own errors where the runs agree, their spread where they do not."""
    assert ablate.mean_and_error([90.0, 90.0], [3.0, 4.0]) == (90.0, 2.5)       # sqrt(9 + 16) / 2
    mean, error = ablate.mean_and_error([80.0, 100.0], [3.0, 4.0])
    assert mean == 90.0
    assert error == pytest.approx(statistics.stdev([80.0, 100.0]) / 2 ** 0.5)
    assert ablate.mean_and_error([7.0], [2.0]) == (7.0, 2.0)


def test_orderings():
    """Each verdict once: the paper's fixed k loses 12.5 points and 0.6 tokens per forward."""
    runs = {"default": [entries(0.9, 3.0)] * 2, "fixed k": [entries(0.5, 4.0)] * 2,
            "soft teacher": [entries(0.91, 2.0)], "curriculum": [entries(0.9, 3.0)]}
    table = ablate.summarise(runs)
    accuracy, error, per_forward, per_forward_error = table["default"]["adaptive 0.9"]
    assert (accuracy, per_forward) == (90.0, 3.0)
    assert error == pytest.approx(2 / 2 ** 0.5)
    assert per_forward_error == pytest.approx(0.05 / 2 ** 0.5)
    fixed, soft, curriculum = ablate.orderings(table).splitlines()
    assert "-40.0 +- 2.0 points, +1.00" in fixed and "The paper: -12.5 points, -0.6." in fixed
    assert "accuracy holds; in tokens per forward it does not hold" in fixed
    assert "+1.0 +- 2.4 points" in soft
    assert "accuracy is undecided; in tokens per forward it holds" in soft
    assert "The paper has no such run" in curriculum
    rows = ablate.markdown(table, runs).splitlines()
    assert len(rows) == 2 + len(runs)
    assert rows[3].endswith("| 51.6 @ 2.7 | holds | does not hold |")
    assert rows[5].startswith("| curriculum | 1 |") and rows[5].endswith("|  |  |  |")


def test_ablation_runs_and_resumes(tmp_path, here, monkeypatch):
    """Two variants for two steps; then --resume finds everything there and runs nothing."""
    flags = ("--only", "default", "bidirectional", "--seeds", 1, "--k", 3, "--steps", 2,
             "--limit", 2, "--out", tmp_path)
    works(ablate, *flags)
    table = read_json(tmp_path / "table.json")
    assert list(table["table"]) == ["default", "bidirectional"]
    assert len(table["runs"]["default"]) == 1
    config = read_json(tmp_path / "bidirectional-0" / "latest" / "config.json")
    assert config["nanomtp"]["bidirectional"] is True
    text = (tmp_path / "table.md").read_text()
    assert "| bidirectional | 1 |" in text
    assert "- **bidirectional** against the default" in text
    assert "Not quite the paper's bidirectional" in text
    assert_refused(cli(ablate, *flags), "add --resume")
    monkeypatch.setattr(ablate, "run_script", lambda *_, **__: pytest.fail("nothing was left"))
    works(ablate, *flags, "--resume")
    assert read_json(tmp_path / "table.json")["table"] == table["table"]
    assert_refused(cli(ablate, *flags, "--resume", "--limit", 3), "same settings")


def test_what_each_variant_runs(tmp_path, monkeypatch):
    """Its own flag on top of the common ones; half of the steps as a curriculum; fewer steps where
    each takes longer."""
    commands = []

    def refuse(command):
        commands.append(" ".join(command[2:]))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(ablate.subprocess, "run", refuse)
    for number, (name, (flags, seeds, _)) in enumerate(ablate.VARIANTS.items()):
        result = cli(ablate, "--only", name, "--steps", 320, "--out", tmp_path / str(number))
        assert_refused(result, "train.py failed")
        steps = 200 if name == "dense anchors" else 320
        assert f"--steps {steps} --cooldown {steps // 2} " in commands[-1]
        assert "--k 4 " in commands[-1] and seeds in (2, 3)
        own = " ".join(flags).replace("HALF", "160")
        assert not own or commands[-1].count(own) == 1
    assert sum("--curriculum 160" in command for command in commands) == 1
    assert len(commands) == len(set(commands)) == len(ablate.VARIANTS)


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
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3])[:-4])  # killed in the third line
    works(answers, *flags, "--resume")
    assert path.read_text() == whole
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


def test_clash_end_to_end(tmp_path, here):
    """One step of each training; what is counted is what the slots say."""
    out = tmp_path / "out"
    works(clash, "--steps", 1, "--limit", 6, "--out", out)
    record = read_json(out / "clash.json")
    assert list(record["objectives"]) == list(clash.TARGETS)
    rows = clash.rows_of(0, 6)
    for own in record["objectives"].values():
        good = [row["answer"].startswith(chunk) or row["other"].startswith(chunk)
                for row, chunk in zip(rows, own["chunks"])]
        assert own["belong_together"] == pytest.approx(sum(good) / 6)
        assert own["chunks"][0] == "".join(slot[0][0] for slot in own["slots"])
        for (_, best), (_, second), _ in own["slots"]:
            assert 1 >= best >= second
    assert read_json(out / "hard" / "latest" / "config.json")["nanomtp"]["k_max"] == 2
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
