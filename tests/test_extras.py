"""
The scripts around training: ablations, efficiency, confidence, the model's own answers. Their arithmetic against numbers
worked out by hand, and each of them run on something very small.
"""
import json
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_checkpoint, train_briefly

from extras import ablate, answers, clash, confidence, efficiency
from model import Transformer
from pretrained import InputError, read_json
from sample import generate
from tokenizer import Tokenizer


def run_script(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    module.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with k_max = 3, two steps away from the tiny model: it still answers well at k = 1."""
    return train_briefly(tmp_path_factory.mktemp("trained") / "out", "--k", 3, "--lr", 1e-4)


# --- ablations

def strategies(accuracy, per_forward, questions=100, stderr=0.02):
    return {name: {"accuracy": accuracy, "stderr": stderr, "tokens_per_forward": per_forward, "tokens_per_forward_std": 0.5,
                   "questions": questions} for name in ablate.STRATEGIES}


def test_mean_and_error():
    """The runs' own errors where the runs agree, their spread where they do not."""
    mean, error = ablate.mean_and_error([90.0, 90.0], [3.0, 4.0])
    assert (mean, error) == (90.0, 2.5)                                         # sqrt(9 + 16) / 2
    mean, error = ablate.mean_and_error([80.0, 100.0], [3.0, 4.0])
    assert mean == 90.0 and error == pytest.approx(statistics.stdev([80.0, 100.0]) / 2 ** 0.5)
    assert ablate.mean_and_error([7.0], [2.0]) == (7.0, 2.0)


def test_orderings():
    """Each verdict once: the paper's fixed k loses 12.5 points and 0.6 tokens per forward."""
    runs = {"default": [strategies(0.9, 3.0), strategies(0.9, 3.0)], "fixed k": [strategies(0.5, 4.0), strategies(0.5, 4.0)],
            "soft teacher": [strategies(0.91, 2.0)], "curriculum": [strategies(0.9, 3.0)]}
    table = ablate.summarise(runs)
    accuracy, error, per_forward, per_forward_error = table["default"]["adaptive 0.9"]
    assert (accuracy, per_forward) == (90.0, 3.0)
    assert error == pytest.approx(2 / 2 ** 0.5) and per_forward_error == pytest.approx(0.05 / 2 ** 0.5)
    fixed, soft, curriculum = ablate.orderings(table).splitlines()
    assert "-40.0 +- 2.0 points, +1.00" in fixed and "The paper: -12.5 points, -0.6." in fixed
    assert "accuracy holds; in tokens per forward it does not hold" in fixed
    assert "+1.0 +- 2.4 points" in soft and "accuracy is undecided; in tokens per forward it holds" in soft
    assert "The paper has no such run" in curriculum
    assert ablate.markdown(table, runs).count("\n") == 2 + len(runs)


def test_ablation_runs_and_resumes(tmp_path, monkeypatch, capfd):
    """Two variants for two steps; then --resume finds everything there and runs nothing."""
    flags = ("--only", "default", "bidirectional", "--seeds", 1, "--k", 3, "--steps", 2, "--limit", 2, "--out", tmp_path)
    run_script(monkeypatch, ablate, *flags)
    table = read_json(tmp_path / "table.json")
    assert list(table["table"]) == ["default", "bidirectional"] and len(table["runs"]["default"]) == 1
    assert read_json(tmp_path / "bidirectional-0" / "latest" / "config.json")["nanomtp"]["bidirectional"] is True
    text = (tmp_path / "table.md").read_text()
    assert "| bidirectional | 1 |" in text and "- **bidirectional** against the default" in text
    with pytest.raises(InputError, match="add --resume"):
        run_script(monkeypatch, ablate, *flags)
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: pytest.fail("nothing was left to run"))
    monkeypatch.setattr("extras.ablate.machine", lambda device: {})             # it asks git for the commit
    run_script(monkeypatch, ablate, *flags, "--resume")
    assert read_json(tmp_path / "table.json")["table"] == table["table"]
    with pytest.raises(InputError, match="same settings"):
        run_script(monkeypatch, ablate, *flags, "--resume", "--limit", 3)
    with pytest.raises(InputError, match="at least 3"):
        run_script(monkeypatch, ablate, "--k", 2)


def test_what_each_variant_runs(tmp_path, monkeypatch, capsys):
    """Its own flag on top of the common ones; half of the steps as a curriculum; fewer steps where each takes longer."""
    commands = []
    monkeypatch.setattr(ablate.subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=1))
    for number, (name, (flags, seeds, _)) in enumerate(ablate.VARIANTS.items()):
        with pytest.raises(InputError, match="train.py failed"):
            run_script(monkeypatch, ablate, "--only", name, "--steps", 320, "--out", tmp_path / str(number))
        text = " ".join(commands[-1])
        steps = 200 if name == "dense anchors" else 320
        assert f"--steps {steps} --cooldown {steps // 2} " in text and "--k 4 " in text and seeds in (2, 3)
        assert text.count(" ".join(flags).replace("HALF", "160")) == 1 if flags else True
    assert sum("--curriculum 160" in " ".join(command) for command in commands) == 1


# --- efficiency

def test_weights_of_a_model(tmp_path):
    """Every matrix but the embedding works on every fed token, the output matrix where logits are wanted only."""
    for tied in (True, False):
        folder = tiny_checkpoint(tmp_path / str(tied), "qwen3", tied=tied)
        body, head = efficiency.weights_of(folder)
        model = Transformer.from_pretrained(folder)
        linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
        assert body == sum(m.weight.numel() for m in linear) and head == model.output_matrix.numel()


def test_efficiency_race(tmp_path, monkeypatch):
    """Two contenders, this checkout among them as the older one; the numbers follow from the rounds."""
    own = efficiency.contenders
    monkeypatch.setattr(efficiency, "contenders", lambda args: dict(list(own(args).items())[:2]))
    run_script(monkeypatch, efficiency, "--before", ROOT, "--k", 2, "--batch-size", 2, "--micro-batch-size", 2, "--steps", 3,
               "--rounds", 1, "--out", tmp_path)
    record = read_json(tmp_path / "efficiency.json")
    before, now = record["table"]
    assert (before["name"], now["name"]) == ("before", "now, stride 3")
    (round_,) = record["each_round"]["before"]
    body, head = efficiency.weights_of(ROOT / "checkpoints" / "tiny")
    assert round_["slots"] % 2 == 0 and round_["flop"] == 8 * (body * round_["fed_tokens"] + head * round_["slots"])
    assert before["supervised_share"] == now["supervised_share"] == round_["slots"] / round_["fed_tokens"]
    assert before["utilisation"] == pytest.approx(round_["flop"] / round_["seconds"] / record["matmul_flop_per_second"][0])
    assert 1e8 < before["peak_bytes"] < 1e10
    assert "| before |" in (tmp_path / "efficiency.md").read_text()
    with pytest.raises(InputError, match="no checkout"):
        run_script(monkeypatch, efficiency, "--before", tmp_path)
    with pytest.raises(InputError, match="train.py failed: error: cannot read"):
        run_script(monkeypatch, efficiency, "--data", tmp_path / "absent.jsonl", "--rounds", 1)


# --- confidence

def test_calibration_bins():
    tokens = [{"confidence": c, "agrees": a} for c, a in ((0.2, 0), (0.92, 1), (0.94, 0), (0.95, 1), (1.0, 1), (0.991, 1))]
    bins = confidence.calibration(tokens)
    assert [(b["from"], b["to"], b["tokens"], b["agrees"]) for b in bins] == [
        (0.0, 0.3, 1, 0.0), (0.9, 0.95, 2, 0.5), (0.95, 0.99, 1, 1.0), (0.99, 1.0, 2, 1.0)]
    assert bins[1]["confidence"] == pytest.approx(0.93) and bins[1]["stderr"] == pytest.approx(0.5 / 2 ** 0.5)


def test_correlations():
    points = [{"confidence": c, "loss": x} for c, x in ((0.1, 9.0), (0.2, 4.0), (0.3, 3.0), (0.9, 1.0))]
    pearson, spearman = confidence.correlations(points)
    assert spearman == pytest.approx(-1) and -1 < pearson < -0.5
    assert all(r != r for r in confidence.correlations([{"confidence": 1.0, "loss": x} for x in (1.0, 2.0)]))     # NaN


def test_confidence_end_to_end(trained, tmp_path, monkeypatch):
    """The teacher's view of the tokens is that of one plain pass per token, and every token is in one bin."""
    run_script(monkeypatch, confidence, "--model", trained, "--limit", 3, "--threshold", 0.1, "--max-new-tokens", 20,
               "--batch-size", 2, "--out", tmp_path)
    record = read_json(tmp_path / "confidence.json")
    tokens = [json.loads(line) for line in open(tmp_path / "tokens.jsonl")]
    assert len(record["answers"]) == 3 and {t["question"] for t in tokens} == {0, 1, 2}
    assert {t["slot"] for t in tokens} >= {1, 2}
    assert sum(b["tokens"] for bins in record["calibration"].values() for b in bins) == len(tokens)
    folder = ROOT / "checkpoints" / "tiny"
    teacher, tokenizer = Transformer.from_pretrained(folder), Tokenizer(trained / "latest")
    question = confidence.load_questions("wordproblems", 1, 0, 0)[0][0]["question"]
    prompt = tokenizer.prompt(question, "plain")
    student = Transformer.from_pretrained(trained / "latest")
    (result,) = generate(student, [prompt], 3, 0.1, tokenizer.mask_id, tokenizer.stop_ids, 20)
    for n, token in enumerate(t for t in tokens if t["question"] == 0):
        ids = torch.tensor([prompt + result.tokens[:n]])
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        with torch.no_grad():
            logits = teacher(ids, torch.arange(ids.shape[1])[None], causal)[0, -1]
        assert token["agrees"] == (logits.argmax().item() == result.tokens[n])
    with pytest.raises(InputError, match="train it first"):
        run_script(monkeypatch, confidence, "--model", "tiny")


# --- the model's own answers

def test_answers(tmp_path, monkeypatch, tiny):
    """Greedy answers to the training rows' questions; --resume goes on behind the last whole line."""
    path = tmp_path / "rows.jsonl"
    flags = ("--data", "wordproblems", "--model", tiny, "--limit", 5, "--max-new-tokens", 8, "--batch-size", 2,
             "--out", path)
    run_script(monkeypatch, answers, *flags)
    rows = [json.loads(line) for line in open(path)]
    tokenizer, model = Tokenizer(tiny), Transformer.from_pretrained(tiny)
    for row in rows:
        (result,) = generate(model, [tokenizer.prompt(row["question"], "chat")], 1, stop_ids=tokenizer.stop_ids,
                             max_new_tokens=8)
        assert row["answer"] == tokenizer.decode([token for token in result.tokens if token not in tokenizer.stop_ids])
    assert len(rows) == 5
    with pytest.raises(InputError, match="add --resume"):
        run_script(monkeypatch, answers, *flags)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:3])[:-4])          # killed while writing the third
    run_script(monkeypatch, answers, *flags, "--resume")
    assert path.read_text() == whole
    with pytest.raises(InputError, match="other questions"):
        run_script(monkeypatch, answers, *flags, "--resume", "--seed", 1)
    with pytest.raises(InputError, match="end in .jsonl"):
        run_script(monkeypatch, answers, "--out", tmp_path / "rows.txt")


# --- why ground truth as labels fails

def test_clash_rows():
    """Both orders of the same two things, each about half the time; numbers and things of a row differ."""
    rows = clash.rows_of(0, 400)
    first = 0
    for row in rows:
        a, x, b, y = row["question"].replace(".", "").split()[2:4] + row["question"].replace(".", "").split()[5:7]
        assert a != b and x != y
        assert {row["answer"], row["other"]} == {f"{a} {x} and {b} {y}", f"{b} {y} and {a} {x}"}
        first += row["answer"].startswith(a)
    assert 160 < first < 240


def test_clash_end_to_end(tmp_path, monkeypatch, capfd):
    """One step of each training; what is counted is what the slots say."""
    run_script(monkeypatch, clash, "--steps", 1, "--limit", 6, "--out", tmp_path / "out")
    record = read_json(tmp_path / "out" / "clash.json")
    assert list(record["objectives"]) == list(clash.TARGETS)
    rows = clash.rows_of(0, 10)
    for own in record["objectives"].values():
        good = [row["answer"].startswith(chunk) or row["other"].startswith(chunk) for row, chunk in zip(rows, own["chunks"])]
        assert own["belong_together"] == pytest.approx(sum(good) / 6)
        assert own["chunks"][0] == "".join(slot[0][0] for slot in own["slots"])
        assert all(1 >= slot[0][1] >= slot[1][1] for slot in own["slots"])
    assert read_json(tmp_path / "out" / "hard" / "latest" / "config.json")["nanomtp"]["k_max"] == 2
    with pytest.raises(InputError, match="add --resume"):
        run_script(monkeypatch, clash, "--out", tmp_path / "out")
