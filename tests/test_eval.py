"""
eval_gsm8k.py: lm-eval's scoring rules case by case, the statistics against hand-computed values,
and whole runs on a tiny checkpoint, killed and resumed included, in one process and in two.
"""
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_two_processes, tokens, train_briefly

import eval_gsm8k as evaluation
from common.cli import InputError
from common.records import compact, keep_compact, read_rows
from common.scoring import (
    INVALID, NO_GOLD, build_prompt, extract_flexible, extract_strict, gold_of, is_right, normalise,
    paired_interval, standard_error)
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from model import Transformer
from sample import generate

HERE = Path(__file__).resolve().parent
CASES = json.loads((HERE / "extract_cases.json").read_text())       # what lm-eval's filters return


# --------------------------------------------------------------------------------------------------
# Scoring

@pytest.mark.parametrize("case", CASES, ids=range(1, len(CASES) + 1))
def test_twelve_tricky_outputs(case):
    strict = extract_strict(case["output"], "gsm8k_cot")
    flexible = extract_flexible(case["output"])
    assert (strict, flexible) == (case["strict"], case["flexible"])
    assert is_right(strict, case["gold"]) == bool(case["strict_ok"])
    assert is_right(flexible, case["gold"]) == bool(case["flexible_ok"])


@pytest.mark.parametrize("text, expected", [
    ("10-5", "-5"), ("1/2", "2"), ("at 6:30", "30"), ("1e3", "3"), ("1 000", "000"), ("25%", "25"),
    ("-$5", "-$5"), ("$-5", "-5"), ("wait...", "..."), ("costs $.", "$."), ("42...", "42..."),
    ("٣٤", INVALID), ("", INVALID), ("1 and 22", "22"), ("The answer is 3.\n\nQuestion: 5", "5")])
def test_flexible_traps(text, expected):
    assert extract_flexible(text) == expected


def test_strict_traps():
    """The first match counts, case matters, and gsm8k_cot's last dot eats a digit at the end."""
    def cot(text):
        return extract_strict(text, "gsm8k_cot")

    assert cot("The answer is 40") == "4" and cot("The answer is 1. The answer is 2.") == "1."
    assert cot("The answer is 5") == INVALID == cot("The answer is $5.") == cot("the answer is 55.")
    assert extract_strict("so\n#### 1,234\n#### 7") == "1,234"
    assert extract_strict("####5") == INVALID


@pytest.mark.parametrize("text, expected", [
    ("18.", "18"), ("18.00", "18.00"), ("18..", "18."), ("$1,234", "1234"), ("so #### 5", "5"),
    ("a\n#### b\n#### 7.", "7"), ("####5", "####5"), ("Seven", "seven"), ("007", "007")])
def test_normalisation_in_order(text, expected):
    assert normalise(text) == expected


def test_is_right_is_lm_evals_exact_match():
    """For any two strings, those without a digit included."""
    pytest.importorskip("lm_eval", reason="lm-eval is in requirements-dev.txt")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    texts = ["18", "18.", "18..", "$18", "1,8", "so #### 18", "a\n#### b\n#### 18.", "####18",
             "Seven", "seven.", "SEVEN", "...", "..", "$", "$.", "", INVALID, "[Invalid]", NO_GOLD]
    for extracted, gold in itertools.product(texts, texts):
        theirs = exact_match_hf_evaluate(
            predictions=[extracted], references=[gold], ignore_case=True, ignore_punctuation=False,
            regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"])["exact_match"]
        assert is_right(extracted, gold) == bool(theirs), (extracted, gold)


def test_gold_answers():
    """Behind "####", else the last number. Nothing is right where there is neither."""
    assert gold_of("It is 3, no, 1,200.\n#### 7") == "7"
    assert gold_of("2 * 4 = 8.\n#### 8\nThe answer is: 8") == "8"               # MetaMath's form
    assert is_right("1,200", gold_of("It is 3, no, 1,200"))
    assert gold_of("so\n#### seven") == "seven" and is_right("Seven", "seven")
    prose = ("It rained all day.", "It rained ...", "For $.", "")
    assert [gold_of(answer) for answer in prose] == [NO_GOLD] * 4
    answers = (*prose, "42", "#### 42", "The answer is 42.", NO_GOLD)
    for answer, task in itertools.product(answers, ("gsm8k", "gsm8k_cot")):
        assert not is_right(extract_flexible(answer), NO_GOLD)
        assert not is_right(extract_strict(answer, task), NO_GOLD)
    assert not is_right(INVALID, gold_of("#### 7"))


def test_gold_solutions_score_full_marks():
    """Every gold answer of GSM8K's test set is found by flexible-extract in its own solution."""
    path = HERE.parents[1] / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("GSM8K's test.jsonl is not here")
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    golds = [gold_of(row["answer"]) for row in rows]
    assert len(rows) == 1319 and all(re.fullmatch(r"-?\d+", normalise(gold)) for gold in golds)
    assert all(is_right(extract_flexible(row["answer"]), gold) for row, gold in zip(rows, golds))


def test_a_text_ends_at_the_first_stop_string(tiny):
    tokenizer = Tokenizer(tiny)
    ids = tokenizer.encode("#### 4. The answer is 4.\n\nQ: 5? #### 5") + [tokenizer.end_id]
    assert evaluation.score(ids, tokenizer, "4", ["</s>", "Q:"], "gsm8k_cot") == {
        "text": "#### 4. The answer is 4.\n\n", "extracted": "4.", "correct": 1,
        "extracted_strict": "4", "correct_strict": 1}
    scored = evaluation.score(ids, tokenizer, "4", [], "gsm8k")
    assert (scored["extracted"], scored["correct"]) == ("5", 0)
    assert (scored["extracted_strict"], scored["correct_strict"]) == ("4.", 1)


def test_statistics():
    assert standard_error([1, 0] * 50) == pytest.approx(math.sqrt(0.25 / 99))
    # the paper's 66.0 +- 1.3
    assert standard_error([1] * 870 + [0] * 449) == pytest.approx(0.01305, abs=1e-5)
    assert math.isnan(standard_error([1]))
    expected = pytest.approx((0.25, 1.96 * 0.5 / 2))
    assert paired_interval([1, 1, 0, 1], [1, 0, 0, 1]) == expected
    # the same answers: no difference, and no doubt
    assert paired_interval([1, 0, 1], [1, 0, 1]) == (0, 0)


def test_who_writes_less_than_k1_is_named():
    """A strategy whose answers end early is fast for that."""
    table = [{"strategy": "k = 1", "tokens": 100}, {"strategy": "static 2", "tokens": 95},
             {"strategy": "static 5", "tokens": 30}, {"strategy": "adaptive 0.6", "tokens": 140}]
    lines = evaluation.length_notes(table).splitlines()
    assert [line.split(" wrote ")[1][:4] for line in lines] == ["30% ", "140%"]
    assert [line.split(" wrote ")[0] for line in lines] == ["note: static 5", "note: adaptive 0.6"]


def test_summary_by_hand():
    """Two questions in one batch: a table of three rows, and what of it people see."""
    def rows(texts, chunks, seconds, correct, losses):
        return [{"id": i, "batch": 0, "tokens": text, "chunks": chunk, "finish": finish,
                 "seconds": second, "prompt_seconds": seconds[1] / 2, "correct": hit,
                 "correct_strict": 0, "start_loss": loss}
                for i, (text, chunk, finish, second, hit, loss) in enumerate(zip(
                    texts, chunks, ("stop", "length"), seconds, correct, losses))]

    plain = rows([[1, 2, 3, 4], [5, 6]], [[1] * 4, [1] * 2], [4.0, 2.0], [1, 0], [2.0, 1.0])
    static = rows([[1, 2, 9, 4], [5, 6]], [[2, 2], [2]], [2.0, 1.0], [1, 1], [4.0, 2.0])
    table = evaluation.summarise({
        evaluation.START: plain, "k = 1": plain, "static 2": static})
    start, one, two = table
    assert [entry["strategy"] for entry in table] == ["start, k = 1", "k = 1", "static 2"]
    assert start["difference"] == (0, 0) and start["identical_text"] == start["shared_prefix"] == 1
    assert one["difference"] == (0, 0) and one["speed_up"] == 1.0
    assert two["difference"] == pytest.approx((0.5, 1.96 * 0.5))
    assert (two["accuracy"], two["accuracy_strict"], two["questions"]) == (1.0, 0, 2)
    assert (two["tokens_per_second"], two["seconds"]) == (3.0, 2.0)
    assert two["tokens_per_second_decoding"] == pytest.approx(2 / 1.5)
    assert (two["tokens_per_forward"], two["tokens_per_forward_pooled"]) == (2, 6 / 3)
    assert evaluation.markdown(table).splitlines() == [
        "| decoding | accuracy | vs k = 1 | tokens per forward (pooled) "
        "| new tokens/s (after the prompt) | speed-up (rounds) "
        "| cut off | same text | before first difference | loss under start |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| start, k = 1 | 50.0 +- 50.0 | +0.0 +- 0.0 | 1.00 +- 0.00 (1.00) | 1.5 (1.3) "
        "| 1.00x (1.00 to 1.00) | 50% | 100% | 100% | 0.500 |",
        "| k = 1 | 50.0 +- 50.0 | +0.0 +- 0.0 | 1.00 +- 0.00 (1.00) | 1.5 (1.3) "
        "| 1.00x (1.00 to 1.00) | 50% | 100% | 100% | 0.500 |",
        "| static 2 | 100.0 +- 0.0 | +50.0 +- 98.0 | 2.00 +- 0.00 (2.00) | 3.0 (1.3) "
        "| 2.00x (2.00 to 2.00) | 50% | 50% | 67% | 1.000 |"]


def test_speed_up_is_of_the_same_round():
    """k = 1 is slow in the first half, as the machine then is: no strategy gains by it."""
    def row(batch, seconds):
        return {"id": batch, "batch": batch, "tokens": [1, 2], "chunks": [1, 1], "finish": "stop",
                "seconds": seconds, "prompt_seconds": 0.0, "correct": 1, "correct_strict": 1,
                "start_loss": None}

    slow = [3.0, 3.0, 3.0, 1.0, 1.0, 1.0]
    plain = [row(2 * n, seconds) for n, seconds in enumerate(slow)]
    half = [row(2 * n, seconds / 2) for n, seconds in enumerate(slow)]
    late = [row(2 * n, 1.0) for n in range(6)]
    table = evaluation.summarise({"k = 1": plain, "half": half, "late": late})
    assert table[1]["speed_ups"] == [2] * evaluation.ROUNDS and table[1]["speed_up"] == 2
    assert table[2]["speed_ups"] == [3, 3, 3, 1, 1] and table[2]["speed_up"] == 3
    assert table[2]["seconds"] == 6                         # of all, which is no ratio of medians
    few = evaluation.summarise({"k = 1": plain[:2], "half": half[:2]})
    assert few[1]["speed_ups"] == [2, 2]
    with pytest.raises(AssertionError):                     # other questions beside each other
        evaluation.summarise({"k = 1": plain[:2], "half": half[1::-1]})


def test_a_compact_row():
    """Counts, a hash that tells texts apart, and the prefix with k = 1; nothing to read."""
    plain = {"tokens": [1, 2, 3], "chunks": [1, 1, 1], "text": "a b c", "gold": "3", "correct": 1}
    own = plain | {"tokens": [1, 2, 4], "chunks": [2, 1], "text": "a b d", "correct": 0}
    short = compact(own, plain)
    assert short == {"tokens": 3, "chunks": [2, 1], "correct": 0, "hash": short["hash"],
                     "shared_prefix": 2}
    assert len(short["hash"]) == 8 and short["hash"] != compact(plain, plain)["hash"]
    assert compact(short, compact(plain, plain)) is short


# --------------------------------------------------------------------------------------------------
# Prompts and likelihoods

def test_prompt_formats(tiny):
    tokenizer = Tokenizer(tiny)
    examples = [{"question": "1 + 1?", "answer": "That is 2.\n#### 2"}]

    def text(style, rows=examples):
        return tokenizer.decode(build_prompt(tokenizer, "2 + 2?", rows, style))

    assert text("plain") == "1 + 1?\n\nThat is 2.\n#### 2\n\n2 + 2?\n\n"
    assert text("qa") == "Q: 1 + 1?\nA: That is 2.\nThe answer is 2.\n\nQ: 2 + 2?\nA:"
    assert text("qa-step", []) == "Q: 2 + 2?\nA: Let's think step by step."
    assert text("chat").endswith(
        "user\n1 + 1?\n\nThat is 2.\n#### 2\n\n2 + 2?\nassistant\n")
    assert build_prompt(tokenizer, "2?", [], "plain") == tokenizer.prompt("2?", "plain")


@torch.no_grad()
def test_log_likelihoods(tiny):
    """Against cross-entropy token by token, each behind its own prefix."""
    model, prompt, answer = Transformer.from_pretrained(tiny), [5, 6, 7], [20, 30, 2]
    expected = []
    for i, token in enumerate(answer):
        ids = prompt + answer[:i]
        n = len(ids)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        logits = model(torch.tensor([ids]), torch.arange(n)[None], causal)[0, -1]
        expected.append(-F.cross_entropy(logits, torch.tensor(token)).item())
    log_p, greedy = evaluation.log_likelihoods(model, prompt, answer)
    assert log_p == pytest.approx(expected, rel=1e-4) and not any(greedy)
    best = generate(model, tokens(), [prompt], 1, max_new_tokens=4)[0].tokens
    assert evaluation.log_likelihoods(model, prompt, best)[1] == [True] * 4
    assert evaluation.log_likelihoods(model, prompt, best, mask_id=best[-1])[1][-1] is False


# --------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two steps of training: it has a mask token and k_max 3, and answers nonsense."""
    out = tmp_path_factory.mktemp("trained")
    return train_briefly(out, "--model", tiny, "--k", 3, "--seq-len", 160)


def evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval_gsm8k.py", *map(str, flags)])
    evaluation.main()


def rows_of(out):
    """Lines of rows.jsonl, the settings first; and the rows, parsed."""
    lines = (out / "rows.jsonl").read_text().splitlines()
    return lines, [json.loads(line) for line in lines[1:]]


def test_run_and_resume(tiny, trained, tmp_path, monkeypatch, capsys):
    """One run through; then one killed in the middle of a line, and resumed: the same rows."""
    a, b = tmp_path / "a", tmp_path / "b"
    settings = ["--model", trained, "--baseline", tiny, "--data", "wordproblems", "--limit", 5,
                "--batch-size", 2, "--max-new-tokens", 12, "--lossless", "--narrow"]
    evaluate(monkeypatch, *settings, "--out", a)
    lines, rows = rows_of(a)
    names = ["start, k = 1", "k = 1", "static 2", "static 3"]
    names += [f"adaptive {threshold}" for threshold in (0.99, 0.95, 0.9, 0.8, 0.7, 0.6)]
    names += ["lossless 3", "lossless 3 narrow"]
    # strategies take turns within each batch of questions, and another one begins
    order = [(name, batch) for n, batch in enumerate(((0, 1), (2, 3), (4,)))
             for name in names[n:] + names[:n]]
    assert [(row["strategy"], row["id"]) for row in rows] == [
        (name, i) for name, batch in order for i in batch]
    assert all(row["batch"] == row["id"] // 2 * 2 for row in rows)
    assert all(sum(row["chunks"]) == len(row["tokens"]) <= 12 for row in rows)
    assert capsys.readouterr().out.count("How many") >= 1               # the prompt is printed

    entries = json.loads((a / "table.json").read_text())["table"]
    table = {entry["strategy"]: entry for entry in entries}
    assert list(table) == names
    assert table["k = 1"]["speed_up"] == table["k = 1"]["identical_text"] == 1
    assert table["static 2"]["tokens_per_forward"] > 1.7
    assert table["static 3"]["start_loss"] > 0
    assert table["lossless 3"]["identical_text"] == 1
    assert table["lossless 3 narrow"]["identical_text"] == 1
    conditions, text = (a / "table.md").read_text().split("\n\n", maxsplit=1)
    assert text == f"{evaluation.markdown(entries)}\n{evaluation.LEGEND}"
    assert conditions.startswith(f"{trained}, wordproblems, 5 questions in batches of 2; cpu: ")
    assert (a / "pareto.png").stat().st_size > 5000

    folder = trained / "latest"
    tokenizer, model = Tokenizer(folder), Transformer.from_pretrained(folder).eval()
    problems = WordProblems(0, "test")
    for row in rows:
        if row["strategy"] == "k = 1":
            problem = problems[row["id"]]
            prompt = tokenizer.prompt(problem["question"], "chat")
            answer, = generate(model, tokenizer, [prompt], 1, max_new_tokens=12)
            assert row["tokens"] == answer.tokens
            assert row["gold"] == problem["answer"].split("#### ")[1]

    # without texts: the same table, to the bit
    keep_compact(a / "rows.jsonl", "k = 1")
    kept = {}
    for (name, _), batch in read_rows(a / "rows.jsonl.gz").items():
        kept.setdefault(name, []).extend(batch)
    assert all("text" not in row for own in kept.values() for row in own)
    assert json.loads(json.dumps(evaluation.summarise(kept))) == entries
    packed = (a / "rows.jsonl.gz").read_bytes()
    keep_compact(a / "rows.jsonl", "k = 1")
    assert (a / "rows.jsonl.gz").read_bytes() == packed             # no date in it
    (a / "rows.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_rows(a / "rows.jsonl.gz")

    b.mkdir()
    (b / "rows.jsonl").write_text("\n".join(lines[:10]) + "\n" + lines[10][:50])
    asked, real = [], evaluation.ask

    def spy(contender, prompts, golds, first, setting):
        asked.append((contender.name, first))
        return real(contender, prompts, golds, first, setting)

    monkeypatch.setattr(evaluation, "ask", spy)
    evaluate(monkeypatch, *settings, "--out", b, "--resume")
    _, resumed = rows_of(b)
    assert [(row["strategy"], row["id"], row["tokens"]) for row in resumed] == [
        (row["strategy"], row["id"], row["tokens"]) for row in rows]
    # four batches were whole on disk, of two rows each
    assert asked == [(name, batch[0]) for name, batch in order][4:]


def test_passes_that_do_not_count(trained, tmp_path, monkeypatch):
    """Every strategy writes a few tokens before any is timed: no row tells of them."""
    calls, decode = [], evaluation.decode

    def spy(model, tokenizer, prompts, strategy, *rest, **more):
        results = decode(model, tokenizer, prompts, strategy, *rest, **more)
        calls.append((strategy.name, prompts, [result.tokens for result in results]))
        return results

    monkeypatch.setattr(evaluation, "decode", spy)
    evaluate(monkeypatch, "--model", trained, "--limit", 3, "--batch-size", 2, "--k", 2,
             "--max-new-tokens", 20, "--out", tmp_path / "out")
    warm, counted = calls[:2], calls[2:]
    assert [name for name, *_ in calls] == ["k = 1", "static 2"] * 2 + ["static 2", "k = 1"]
    for _, prompts, (text,) in warm:
        assert prompts == counted[0][1][:1] and 0 < len(text) <= 16
    rows = rows_of(tmp_path / "out")[1]
    written = [(name, text) for name, _, texts in counted for text in texts]
    assert [(row["strategy"], row["tokens"]) for row in rows] == written
    assert max(len(text) for _, text in written) > 16       # else a row could tell of such a pass


def test_a_file_that_it_was_trained_on(tiny, tmp_path, monkeypatch, capsys):
    """However it is named, the note says so; of another file, even a copy, and of the data set that
    has a test split it says nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "copy.jsonl"):
        (tmp_path / name).write_text("".join(
            json.dumps({"question": f"{a} + 3", "answer": f"#### {a + 3}"}) + "\n"
            for a in range(9)))
    model = train_briefly(tmp_path / "model", "--model", tiny, "--k", 2, "--data", "rows.jsonl")
    for number, (data, noted) in enumerate({
            "rows.jsonl": True, tmp_path / "rows.jsonl": True, "copy.jsonl": False,
            "wordproblems": False}.items()):
        capsys.readouterr()
        evaluate(monkeypatch, "--model", model, "--data", data, "--limit", 1, "--k", 1,
                 "--max-new-tokens", 1, "--out", tmp_path / str(number))
        note = f"note: {model} was trained on this very file"
        assert (note in capsys.readouterr().out) == noted, data


def test_heads(tmp_path, monkeypatch):
    """k = 1 is the start's own text, and what heads draft for it is verified: the same rows, fewer
    passes. Of --k and --threshold each is another way to draft."""
    trained = train_briefly(
        tmp_path / "run", "--heads", 3, "--steps", 8, "--batch-size", 8, "--lr", 5e-3, "--warmup",
        2, "--cooldown", 0)
    settings = ["--model", trained, "--limit", 5, "--batch-size", 2, "--max-new-tokens", 30]
    evaluate(monkeypatch, *settings, "--baseline", "tiny", "--out", tmp_path / "a")
    start, plain, ours = table = json.loads((tmp_path / "a" / "table.json").read_text())["table"]
    assert [entry["strategy"] for entry in table] == [
        "start, k = 1", "k = 1", "lossless 4 heads"]
    assert plain["identical_text"] == ours["identical_text"] == ours["shared_prefix"] == 1
    assert plain["tokens_per_forward"] == 1 and ours["tokens_per_forward"] > 1.3
    assert start["accuracy"] == plain["accuracy"] == ours["accuracy"]
    assert start["start_loss"] == plain["start_loss"] == ours["start_loss"]
    texts = {}
    for row in rows_of(tmp_path / "a")[1]:
        texts.setdefault(row["strategy"], []).append(row["tokens"])
        verifying = len(row["chunks"]) - 1 if row["strategy"] == "lossless 4 heads" else 0
        assert len(row["drafts"]) == verifying
    assert texts["start, k = 1"] == texts["k = 1"] == texts["lossless 4 heads"]

    evaluate(monkeypatch, *settings, "--k", 1, 2, "--threshold", 0.5, "--out", tmp_path / "b")
    table = json.loads((tmp_path / "b" / "table.json").read_text())["table"]
    rates = {entry["strategy"]: entry["tokens_per_forward"] for entry in table}
    assert list(rates) == [
        "k = 1", "lossless 2 heads", "lossless 4 heads at 0.5", "lossless 4 heads"]
    assert all(entry["identical_text"] == 1 for entry in table)
    one, two, unsure, four = rates.values()
    assert one == 1 < two <= four == ours["tokens_per_forward"] and 1 < unsure <= four
    with pytest.raises(InputError, match="1 to 4"):
        evaluate(monkeypatch, *settings, "--k", 5, "--out", tmp_path / "c")


TIMED = {"seconds", "prompt_seconds", "tokens_per_second", "tokens_per_second_decoding",
         "speed_up", "speed_ups", "processes"}


def untimed(entry):
    """A row, or one of the table, without what clock and number of processes have a part in."""
    return {key: value for key, value in entry.items() if key not in TIMED}


SCRIPT = """
import sys
import eval_gsm8k

def job(flags):
    sys.argv = ["eval_gsm8k.py", *flags]
    eval_gsm8k.main()
"""


def test_two_processes(tiny, trained, tmp_path, monkeypatch):
    """Two gloo processes: the rows and the table of one.

    What a killed run of two has left, one finishes, and the reverse.
    """
    settings = ["--model", trained, "--baseline", tiny, "--data", "wordproblems", "--limit", 7,
                "--batch-size", 2, "--max-new-tokens", 12, "--k", 1, 3, "--threshold", 0.6,
                "--lossless", "--device", "cpu", "--dtype", "fp32"]
    names = ["start, k = 1", "k = 1", "static 3", "adaptive 0.6", "lossless 3"]

    def read(out, processes):
        """(lines of rows.jsonl, {strategy and question: row}, table), and what holds for any."""
        assert {path.name for path in out.iterdir()} == {
            "rows.jsonl", "table.json", "table.md", "pareto.png"}
        table = json.loads((out / "table.json").read_text())
        lines, rows = rows_of(out)
        header = json.loads(lines[0])
        assert {key: header[key] for key in table["settings"]} == table["settings"]
        assert header["pieces"] == table["pieces"]
        assert [piece["commit"] for piece in table["pieces"]] == [table["commit"]] * len(processes)
        assert table["processes"] == processes
        by_key = {(row["strategy"], row["id"]): row for row in rows}
        assert len(rows) == len(by_key) == 5 * 7                        # none is there twice
        assert {row["processes"] for row in rows} == set(processes)
        return lines, by_key, table["table"]

    def same(ours, theirs):
        assert {key: untimed(row) for key, row in ours[1].items()} == {
            key: untimed(row) for key, row in theirs[1].items()}
        assert [untimed(entry) for entry in ours[2]] == [untimed(entry) for entry in theirs[2]]

    def left_by_killed(lines, out):
        """9 rows, one cut short in which another process has written on, 3 rows behind that."""
        out.mkdir()
        left = [*lines[:10], lines[10][:50] + lines[14], *lines[15:18]]
        (out / "rows.jsonl").write_text("\n".join(left) + "\n")
        return "--resume", "--out", out

    evaluate(monkeypatch, *settings, "--out", tmp_path / "1")
    one = read(tmp_path / "1", [1])
    printed = in_two_processes(SCRIPT, [
        (*settings, "--out", tmp_path / "2"),
        (*settings, *left_by_killed(one[0], tmp_path / "1-2"))], tmp_path)
    for words in ("the first prompt:", "| k = 1 |"):                 # one of the two talks
        assert printed.count(words) == 2
    two = read(tmp_path / "2", [2])
    same(two, one)
    resumed = read(tmp_path / "1-2", [1, 2])
    same(resumed, one)
    # whole batches were kept, and are not asked again
    kept = {key: row for key, row in resumed[1].items() if row["processes"] == 1}
    assert kept == {key: row for key, row in one[1].items() if key in kept}
    whole = [(name, i) for name in names[:4] for i in (0, 1)]
    whole += [("adaptive 0.6", 2), ("adaptive 0.6", 3)]             # k = 1 has begun here
    assert sorted(kept) == sorted(whole)
    evaluate(monkeypatch, *settings, *left_by_killed(two[0], tmp_path / "2-1"))
    same(read(tmp_path / "2-1", [1, 2]), one)


def test_refusals(tiny, trained, tmp_path, monkeypatch):
    settings = ["--model", trained, "--data", "wordproblems", "--limit", 2, "--max-new-tokens", 4,
                "--k", 1]
    evaluate(monkeypatch, *settings, "--out", tmp_path)
    for flags, words in (([], "add --resume"),
                         (["--max-new-tokens", 5, "--resume"], "max_new_tokens 4, not 5"),
                         (["--model", tiny, "--resume"], "checkpoint")):
        with pytest.raises(InputError, match=words):
            evaluate(monkeypatch, *settings, "--out", tmp_path, *flags)
    for flags, words in ((["--k", 4], "1 to 3"), (["--data", "nosuch"], "no data"),
                         (["--limit", 0], "--limit"), (["--shots", -1], "--shots"),
                         (["--model", "nosuch"], "no folder")):
        with pytest.raises(InputError, match=words):
            evaluate(monkeypatch, *settings, "--out", tmp_path / "other", *flags)
    assert not (tmp_path / "other").exists()
