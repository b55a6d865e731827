"""
eval_gsm8k.py: lm-eval's scoring rules case by case, the statistics against hand-computed values, and whole runs on a tiny
checkpoint, killed and resumed included, in one process and in two.
"""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, train_briefly

import eval_gsm8k as evaluation
from eval_gsm8k import extract_flexible, extract_strict, gold_of, is_right, normalise, paired_interval, standard_error
from model import Transformer
from pretrained import InputError
from sample import generate
from tokenizer import Tokenizer

CASES = json.loads((Path(__file__).parent / "extract_cases.json").read_text())     # what lm-eval's own filters return


# --- scoring

@pytest.mark.parametrize("case", CASES, ids=range(1, len(CASES) + 1))
def test_twelve_tricky_outputs(case):
    strict, flexible = extract_strict(case["output"], "gsm8k_cot"), extract_flexible(case["output"])
    assert (strict, flexible) == (case["strict"], case["flexible"])
    assert (normalise(strict) == normalise(case["gold"])) == bool(case["strict_ok"])
    assert (normalise(flexible) == normalise(case["gold"])) == bool(case["flexible_ok"])


@pytest.mark.parametrize("text, expected", [
    ("10-5", "-5"), ("1/2", "2"), ("at 6:30", "30"), ("1e3", "3"), ("1 000", "000"), ("25%", "25"), ("-$5", "-$5"),
    ("$-5", "-5"), ("wait...", "..."), ("costs $.", "$."), ("42...", "42..."), ("٣٤", "[invalid]"), ("", "[invalid]"),
    ("1 and 22", "22"), ("The answer is 3.\n\nQuestion: 5", "5")])
def test_flexible_traps(text, expected):
    assert extract_flexible(text) == expected


def test_strict_traps():
    """The first match counts, the phrase is case-sensitive, and gsm8k_cot's last dot eats a digit at the end."""
    assert extract_strict("The answer is 40", "gsm8k_cot") == "4"
    assert extract_strict("The answer is 5", "gsm8k_cot") == "[invalid]" == extract_strict("The answer is $5.", "gsm8k_cot")
    assert extract_strict("The answer is 1. The answer is 2.", "gsm8k_cot") == "1."
    assert extract_strict("so\n#### 1,234\n#### 7") == "1,234" and extract_strict("####5") == "[invalid]"


@pytest.mark.parametrize("text, expected", [
    ("18.", "18"), ("18.00", "18.00"), ("18..", "18."), ("$1,234", "1234"), ("so #### 5", "5"), ("a\n#### b\n#### 7.", "7"),
    ("####5", "####5"), ("Seven", "seven"), ("007", "007")])
def test_normalisation_in_order(text, expected):
    assert normalise(text) == expected


def test_gold_solutions_score_full_marks():
    """Every gold answer of GSM8K's test set is found by flexible-extract in its own solution."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("GSM8K's test.jsonl is not here")
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    golds = [gold_of(row["answer"]) for row in rows]
    assert len(rows) == 1319 and all(re.fullmatch(r"-?\d+", normalise(gold)) for gold in golds)
    assert all(is_right(extract_flexible(row["answer"]), gold) for row, gold in zip(rows, golds))


def test_gold_answers_of_other_data():
    """Rows need no "####"; and two texts without a number are not equal for that."""
    assert gold_of("It is 3, no, 1,200.\n#### 7") == "7" and is_right("1,200", gold_of("It is 3, no, 1,200"))
    prose = gold_of("It rained all day.")
    assert prose == "[invalid]" and not is_right(extract_flexible("It rained all day."), prose)
    assert not is_right("[invalid]", gold_of("#### 7")) and not is_right("...", gold_of("It rained ..."))
    assert gold_of("2 * 4 = 8.\n#### 8\nThe answer is: 8") == "8"                       # MetaMath's form


def test_statistics():
    assert standard_error([1, 0] * 50) == pytest.approx(math.sqrt(0.25 / 99))
    assert standard_error([1] * 870 + [0] * 449) == pytest.approx(0.01305, abs=1e-5)      # the paper's 66.0 +- 1.3
    assert math.isnan(standard_error([1]))
    assert paired_interval([1, 1, 0, 1], [1, 0, 0, 1]) == pytest.approx((0.25, 1.96 * 0.5 / 2))
    assert paired_interval([1, 0, 1], [1, 0, 1]) == (0, 0)            # the same answers: no difference, and no doubt


# --- prompts

def test_prompt_formats(tiny):
    tokenizer = Tokenizer(tiny)
    examples = [{"question": "1 + 1?", "answer": "That is 2.\n#### 2"}]

    def text(style, rows=examples):
        return tokenizer.decode(evaluation.build_prompt(tokenizer, "2 + 2?", rows, style))

    assert text("plain") == "1 + 1?\n\nThat is 2.\n#### 2\n\n2 + 2?\n\n"
    assert text("qa") == "Q: 1 + 1?\nA: That is 2.\nThe answer is 2.\n\nQ: 2 + 2?\nA:"
    assert text("qa-step", []) == "Q: 2 + 2?\nA: Let's think step by step."
    assert text("chat").endswith("user\n1 + 1?\n\nThat is 2.\n#### 2\n\n2 + 2?\nassistant\n")
    assert evaluation.build_prompt(tokenizer, "2?", [], "plain") == tokenizer.prompt("2?", "plain")


def test_log_likelihoods(tiny):
    """Against cross-entropy token by token, each behind its own prefix."""
    model, prompt, tokens = Transformer.from_pretrained(tiny), [5, 6, 7], [20, 30, 2]
    expected = []
    for i, token in enumerate(tokens):
        ids = prompt + tokens[:i]
        n = len(ids)
        logits = model(torch.tensor([ids]), torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())[0, -1]
        expected.append(-F.cross_entropy(logits, torch.tensor(token)).item())
    log_p, greedy = evaluation.log_likelihoods(model, prompt, tokens)
    assert log_p == pytest.approx(expected, rel=1e-4) and not any(greedy)
    best = generate(model, [prompt], 1, max_new_tokens=4)[0].tokens
    assert evaluation.log_likelihoods(model, prompt, best)[1] == [True] * 4
    assert evaluation.log_likelihoods(model, prompt, best, mask_id=best[-1])[1][-1] is False


# --- whole runs

@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two steps of training: it has a mask token and k_max 3, and answers nonsense."""
    return train_briefly(tmp_path_factory.mktemp("trained"), "--model", tiny, "--k", 3, "--seq-len", 160)


def evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *map(str, flags)])
    evaluation.main()


def test_run_and_resume(tiny, trained, tmp_path, monkeypatch, capsys):
    """One run through; then one killed in the middle of a line, and resumed: the same rows, nothing asked twice."""
    settings = ["--model", trained, "--baseline", tiny, "--data", "wordproblems", "--limit", 5, "--batch-size", 2,
                "--max-new-tokens", 12, "--lossless", "--narrow"]
    evaluate(monkeypatch, *settings, "--out", tmp_path / "a")
    lines = (tmp_path / "a" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    names = ["start, k = 1", "static 1", "static 2", "static 3"]
    names += [f"adaptive {threshold}" for threshold in (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)]
    names += ["lossless 3", "lossless 3 narrow"]
    assert [row["strategy"] for row in rows] == [name for name in names for _ in range(5)]
    assert [row["id"] for row in rows] == list(range(5)) * len(names)
    assert all(sum(row["chunks"]) == len(row["tokens"]) <= 12 for row in rows)
    assert capsys.readouterr().out.count("How many") >= 1                       # the prompt is printed ...
    table = {entry["strategy"]: entry for entry in json.loads((tmp_path / "a" / "table.json").read_text())["table"]}
    assert list(table) == names and table["static 1"]["speed_up"] == 1 and table["static 1"]["identical_text"] == 1
    assert table["static 2"]["tokens_per_forward"] > 1.7 and table["static 1"]["difference"] == [0, 0]
    assert table["static 3"]["start_loss"] > 0
    assert table["lossless 3"]["identical_text"] == table["lossless 3 narrow"]["identical_text"] == 1
    plain = [row for row in rows if row["strategy"] == "static 1"]
    tokenizer, model = Tokenizer(trained / "latest"), Transformer.from_pretrained(trained / "latest").eval()
    problems, _ = evaluation.load_questions("wordproblems", 5, 0, 0)
    for row, problem in zip(plain, problems):
        prompt = tokenizer.prompt(problem["question"], "chat")
        assert row["tokens"] == generate(model, [prompt], 1, None, tokenizer.mask_id, tokenizer.stop_ids, 12)[0].tokens
        assert row["gold"] == problem["answer"].split("#### ")[1]
    markdown = (tmp_path / "a" / "table.md").read_text()
    assert markdown.count("\n") == 2 + len(names) and (tmp_path / "a" / "pareto.png").stat().st_size > 5000

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "rows.jsonl").write_text("\n".join(lines[:10]) + "\n" + lines[10][:50])   # in the second batch
    calls, real = [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *args, **more: calls.append(args) or real(*args, **more))
    evaluate(monkeypatch, *settings, "--out", tmp_path / "b", "--resume")
    resumed = [json.loads(line) for line in (tmp_path / "b" / "rows.jsonl").read_text().splitlines()[1:]]
    assert [(row["strategy"], row["id"], row["tokens"]) for row in resumed] == [
        (row["strategy"], row["id"], row["tokens"]) for row in rows]
    assert len(calls) == 3 * len(names) - 5                 # of three batches a strategy, 3 + 2 were whole on disk


def untimed(entry):
    """A row, or a line of the table, without what the clock and the number of processes have a part in."""
    timed = {"seconds", "prompt_seconds", "tokens_per_second", "tokens_per_second_decoding", "speed_up", "processes"}
    return {key: value for key, value in entry.items() if key not in timed}


def test_two_processes(tiny, trained, tmp_path, monkeypatch):
    """Two gloo processes: the rows and the table of one. What a killed run of two left, one finishes, and the reverse."""
    settings = ["--model", trained, "--baseline", tiny, "--data", "wordproblems", "--limit", 7, "--batch-size", 2,
                "--max-new-tokens", 12, "--k", 1, 3, "--threshold", 0.6, "--lossless", "--device", "cpu", "--dtype", "fp32"]

    def in_two(out, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                   ROOT / "eval_gsm8k.py", *settings, "--out", out, *flags]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("the first prompt:") == done.stdout.count("| static 1 |") == 1     # one of the two talks
        assert {path.name for path in out.iterdir()} == {"rows.jsonl", "table.json", "table.md", "pareto.png"}

    def read(out, processes):
        """(lines of rows.jsonl, {strategy and question: row}, table) behind what must hold for any run."""
        table = json.loads((out / "table.json").read_text())
        lines = (out / "rows.jsonl").read_text().splitlines()
        assert json.loads(lines[0]) == table["settings"] and len(lines) == 1 + 5 * 7
        rows = {(row["strategy"], row["id"]): row for row in map(json.loads, lines[1:])}
        assert len(rows) == 5 * 7                                                                   # none is there twice
        assert {row["processes"] for row in rows.values()} == set(processes) and table["processes"] == processes
        return lines, rows, table["table"]

    def same(ours, theirs):
        assert {key: untimed(row) for key, row in ours[1].items()} == {key: untimed(row) for key, row in theirs[1].items()}
        assert [untimed(entry) for entry in ours[2]] == [untimed(entry) for entry in theirs[2]]

    def left_by_killed(lines, out):
        """9 rows, one cut short in which another process has written on, and 3 rows behind that."""
        out.mkdir()
        (out / "rows.jsonl").write_text("\n".join([*lines[:10], lines[10][:50] + lines[14], *lines[15:18]]) + "\n")
        return out

    evaluate(monkeypatch, *settings, "--out", tmp_path / "1")
    one = read(tmp_path / "1", [1])
    in_two(tmp_path / "2")
    two = read(tmp_path / "2", [2])
    same(two, one)
    evaluate(monkeypatch, *settings, "--out", left_by_killed(two[0], tmp_path / "2-1"), "--resume")
    same(read(tmp_path / "2-1", [1, 2]), one)
    in_two(left_by_killed(one[0], tmp_path / "1-2"), "--resume")
    resumed = read(tmp_path / "1-2", [1, 2])
    same(resumed, one)
    kept = {key: row for key, row in resumed[1].items() if row["processes"] == 1}                   # whole batches only
    assert kept == {key: row for key, row in one[1].items() if key in kept}                         # and not asked again
    assert list(kept) == [*(("start, k = 1", i) for i in range(7)), *((name, i) for name in ("static 1", "static 3")
                                                                      for i in range(2))]


def test_refusals(tiny, trained, tmp_path, monkeypatch):
    settings = ["--model", trained, "--data", "wordproblems", "--limit", 2, "--max-new-tokens", 4, "--k", 1]
    evaluate(monkeypatch, *settings, "--out", tmp_path)
    with pytest.raises(InputError, match="add --resume"):
        evaluate(monkeypatch, *settings, "--out", tmp_path)
    with pytest.raises(InputError, match="max_new_tokens 4, not 5"):
        evaluate(monkeypatch, *settings, "--max-new-tokens", 5, "--out", tmp_path, "--resume")
    with pytest.raises(InputError, match="checkpoint"):
        evaluate(monkeypatch, *settings, "--model", tiny, "--out", tmp_path, "--resume")
    for flags, word in ((["--k", 4], "1 to 3"), (["--data", "nosuch"], "no data"), (["--limit", 0], "--limit"),
                        (["--shots", -1], "--shots"), (["--model", "nosuch"], "no folder")):
        with pytest.raises(InputError, match=word):
            evaluate(monkeypatch, *settings, "--out", tmp_path / "other", *flags)
