"""
common/data.py and common/wordproblems.py: the generator's arithmetic redone by hand, files and hub
rows in their real schemas, and the promise that no question is on both sides of a split.
"""
import functools
import json
import random
import re
import sys
import types
from fractions import Fraction

import pytest
from conftest import ROOT

from common.cli import InputError
from common.data import (
    default_questions, is_same_file, load_data, load_questions, read_jsonl, read_questions,
    split_rows)
from common.wordproblems import (
    BOXES, FAMILIAR, NAMES, PLACES, STRUCTURES, THINGS, UNFAMILIAR, WordProblems, calculate,
    draw_numbers, split_of, word_problem)

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --------------------------------------------------------------------------------------------------
# Word problems

GOLDEN = {
    "question": "Hugo has $40 and buys 3 tickets for $4 each. How many dollars does Hugo have "
                "left?",
    "answer": "The tickets cost 3 * 4 = 12 dollars.\nAfter paying Hugo has 40 - 12 = 28 dollars.\n"
              "#### 28"}
WORDS = {"half": 2, "twice": 2}                         # numbers that a question may spell out


def check_solution(row):
    """Redo every line. Its operands are in the question or were computed before. -> lines"""
    question, (*lines, last) = row["question"], row["answer"].split("\n")
    assert question.endswith("?")
    assert not re.search(r"[][{}|]|  | [.,?]", question + row["answer"]), row
    known = {int(number) for number in re.findall(r"\d+", question)}
    known |= {value for word, value in WORDS.items() if word in question}
    for line in lines:
        (a, sign, b, c), = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\b", line)  # exactly one
        assert line.count("=") == 1 and line.endswith(".")
        a, b, c = int(a), int(b), int(c)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign] == c >= 1, line
        assert {a, b} <= known, f"{line!r} uses a number from nowhere; {question!r}"
        known.add(c)
    assert last == f"#### {c}" and max(known) <= 220
    return len(lines)


@pytest.mark.parametrize("structure", STRUCTURES, ids=range(len(STRUCTURES)))
def test_structure_is_solved_correctly(structure):
    problems = [word_problem(structure, random.Random(seed)) for seed in range(300)]
    assert {check_solution(problem) for problem in problems} == {len(structure) - 2}
    assert len({problem["question"] for problem in problems}) > 250
    numbers = {tuple(re.findall(r"\d+", problem["question"])) for problem in problems}
    assert len(numbers) > 80                            # or the answers would be learned by heart
    draws = [draw_numbers(structure[1], random.Random(seed)) for seed in range(3000)]
    splits = [split_of(structure, values) for values in draws if values]
    for split in ("validation", "test"):
        assert 0.005 < splits.count(split) / len(splits) < 0.13


def test_structures_are_many_and_varied():
    assert len(STRUCTURES) == len({structure[0] for structure in STRUCTURES}) >= 40
    assert {len(structure) - 2 for structure in STRUCTURES} == {1, 2, 3, 4}
    rules = [step.split(" = ")[1] for structure in STRUCTURES for step in structure[2:]]
    assert {rule.split(" ")[1] for rule in rules} == {"+", "-", "*", "/"}
    rows = [WordProblems(0)[i] for i in range(4000)]
    words = set(re.findall(r"[A-Za-z]+", " ".join(row["question"] for row in rows)))
    assert set(NAMES) | set(THINGS) <= words


def test_rules_of_a_draw():
    """Results that are not whole or below 1 throw the draw away."""
    assert calculate("a + b", {"a": 3, "b": 4}) == 7 and calculate("a * 3", {"a": 2}) == 6
    assert calculate("a / b", {"a": 12, "b": 4}) == 3
    assert calculate("a / b", {"a": 13, "b": 4}) is None
    assert calculate("a - b", {"a": 4, "b": 4}) is None
    assert calculate("a - b", {"a": 5, "b": 4}) == 1
    assert draw_numbers("a 5-5, b = a - 9", random.Random(0)) is None
    assert draw_numbers("n 2-2, e 3-3, t = n * e", random.Random(0)) == {"n": 2, "e": 3, "t": 6}


def test_word_problems_depend_on_seed_and_index_alone():
    first = [WordProblems(7)[i] for i in range(50)]
    again = [WordProblems(7)[i] for i in reversed(range(50))]
    assert again[::-1] == first                         # no state between calls
    others = [WordProblems(8)[i] for i in range(50)]
    assert sum(a == b for a, b in zip(first, others)) <= 1
    assert len({row["question"] for row in first}) >= 45


def test_word_problem_is_the_same_on_every_machine():
    """A golden row. If it changes, every seed means other data: no old result can be repeated."""
    assert WordProblems(0, split="validation")[0] == GOLDEN


def test_no_numbers_are_in_two_splits():
    """Not only questions differ: no structure meets the same numbers in two splits, ever."""
    words = "|".join([*NAMES, *THINGS, *PLACES, *(f"{box}s?" for box in BOXES)])
    kinds = {}
    for split in ("train", "validation", "test"):
        rows = [WordProblems(seed, split)[i] for seed in (0, 1) for i in range(3000)]
        kinds[split] = {re.sub(words, "_", row["question"]) for row in rows}    # numbers are left
        assert len(kinds[split]) > 800
    assert not kinds["train"] & kinds["validation"] and not kinds["train"] & kinds["test"]
    assert not kinds["validation"] & kinds["test"]


def test_unfamiliar_kinds():
    """What is trained on and what is asked have no kind in common, and together they are all."""
    assert len(UNFAMILIAR) >= 8 and not set(FAMILIAR) & set(UNFAMILIAR)
    assert set(FAMILIAR) | set(UNFAMILIAR) == set(STRUCTURES)
    assert {len(steps) for _, _, *steps in UNFAMILIAR} == {1, 2, 3, 4}
    train, held_out = load_data("wordproblems-familiar", held_out=300, seed=0)
    trained = {kind_of(train[i]) for i in range(3000)} | {kind_of(row) for row in held_out}
    asked = {kind_of(row) for row in load_questions("wordproblems-unfamiliar", 400, 0, 0)[0]}
    assert asked == {one[0] for one in UNFAMILIAR} and trained == {one[0] for one in FAMILIAR}
    familiar, _ = load_questions("wordproblems-familiar", 300, 0, seed=0)
    assert {kind_of(row) for row in familiar} <= {one[0] for one in FAMILIAR}
    assert familiar == [WordProblems(0, "test", FAMILIAR)[i] for i in range(300)]


def kind_of(row):
    """The question of the structure that a problem was made from, found by its words."""
    def pattern(question):
        parts = re.split(r"(\{\w+\}|\[.*?\])", question)          # names and choices, text between
        parts = [f"(?:{part[1:-1]})" if part.startswith("[") else
                 part if part.startswith("{") else re.escape(part) for part in parts]
        return re.sub(r"\{\w+\}", r"(?:\\w+|the \\w+)", "".join(parts))

    (found,) = [one[0] for one in STRUCTURES if re.fullmatch(pattern(one[0]), row["question"])]
    return found


def test_what_a_checkpoint_is_asked(tiny):
    """Word problems are for what was trained on them, gsm8k for all else."""
    assert default_questions("tiny", {}) == "wordproblems"
    for data, asked in (("wordproblems", "wordproblems"), ("rows.jsonl", "gsm8k"),
                        ("wordproblems-familiar", "wordproblems"), (None, "gsm8k")):
        trained = {} if data is None else {"data": data}
        assert default_questions(str(tiny), trained) == asked


def test_validation_is_there_to_ask():
    questions, _ = load_questions("wordproblems-validation", 5, 0, seed=3)
    assert questions == [WordProblems(3, "validation")[i] for i in range(5)]
    for name in ("wordproblems-validation", "wordproblems-unfamiliar"):
        with pytest.raises(InputError, match=f"{name} is there to ask: train on wordproblems or "):
            load_data(name, held_out=1, seed=0)


def test_load_word_problems():
    train, held_out = load_data("wordproblems", 12, seed=3)
    assert train[0] == WordProblems(3)[0] and len(train) > 10_000
    assert held_out == [WordProblems(3, split="validation")[i] for i in range(12)]
    questions, examples = load_questions("wordproblems", 5, 2, seed=3)
    assert questions == [WordProblems(3, "test")[i] for i in range(5)]
    assert examples == [WordProblems(3, "train")[i] for i in range(2)]


# --------------------------------------------------------------------------------------------------
# JSONL

def test_gsm8k_rows(tmp_path):
    """Calculator calls go, everything else stays as it is, the last line above all."""
    path = write_rows(tmp_path / "rows.jsonl", [
        {"question": "How many clips?",
         "answer": "Half is 48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72 < 80.\n#### 72"},
        {"question": "x << y >> z?", "answer": "No call here, 1 < 2.\n#### 1,000"}])
    rows = read_jsonl(path)
    assert [row["answer"] for row in rows] == [
        "Half is 48/2 = 24.\n48+24 = 72 < 80.\n#### 72", "No call here, 1 < 2.\n#### 1,000"]
    assert rows[1]["question"] == "x << y >> z?"        # a question is never rewritten


def test_other_schemas(tmp_path):
    """prompt/response and query/response; in those `<<...>>` is text, not a calculator call."""
    metamath = {"type": "GSM_Rephrased", "query": "What is twice four?",
                "original_question": "What is 2 * 4?",
                "response": "2 * 4 = 8.\n#### 8\nThe answer is: 8"}
    path = write_rows(tmp_path / "rows.jsonl", [
        {"prompt": "Say <<x>>", "response": "<<x>>", "id": 5}, metamath,
        metamath | {"original_question": ""}])
    plain, meta, orphan = read_jsonl(path)
    assert (plain["question"], plain["answer"]) == ("Say <<x>>", "<<x>>")
    assert (meta["question"], meta["answer"]) == (metamath["query"], metamath["response"])
    assert plain["group"] == "Say <<x>>" and meta["group"] == "What is 2 * 4?"
    assert orphan["group"] == "What is twice four?"


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"question": "a", "answer": "b"}\n   \n\n{"question": "é", "answer": "ü"}',
                    encoding="utf-8")
    assert [row["question"] for row in read_jsonl(path)] == ["a", "é"]
    path.write_text('\n{"question": "a", "answer": "b"}\n\n{"question": "a"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:4: ")):
        read_jsonl(path)


@pytest.mark.parametrize("line", [
    '{"question": "a", "answer": "b"',
    "not json",
    "[1, 2]",
    '"question answer"',
    "null",
    "{}",
    '{"question": "a"}',
    '{"question": "a", "response": "b"}',
    '{"question": "a", "answer": ""}',
    '{"question": " \\n", "answer": "b"}',
    '{"question": 1, "answer": "b"}',
    '{"question": "a", "answer": null}',
    '{"question": "a", "answer": ["b"]}',
    '{"query": "a", "response": "b", "original_question": 5}',
])
def test_malformed_row_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_data(str(path), 1, seed=0)
    assert str(refused.value).startswith(f"{path}:2: ") and "\n" not in str(refused.value)


def test_unusable_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "latin1.jsonl").write_bytes(b'{"question": "\xe9", "answer": "b"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in [("empty", "holds no rows"), ("blank", "holds no rows"),
                          ("missing", "cannot read"), ("latin1", "cannot read"),
                          ("folder", "cannot read")]:
        path = str(tmp_path / f"{name}.jsonl")
        with pytest.raises(InputError, match=message) as refused:
            load_data(path, 1, seed=0)
        assert path in str(refused.value)
    for name in ("nosuch", "GSM8K", "", str(tmp_path), str(tmp_path / "rows.csv")):
        with pytest.raises(InputError, match="no data .*wordproblems, gsm8k"):
            load_data(name, 1, seed=0)
        with pytest.raises(InputError, match="no data .*wordproblems, gsm8k"):
            load_questions(name, 1, 0, seed=0)


# --------------------------------------------------------------------------------------------------
# Questions to ask

def test_examples_of_a_file_are_not_asked(tmp_path):
    """A JSONL file has no second split: worked examples are drawn from it by the seed."""
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    drawn = set()
    for seed in range(4):
        questions, examples = load_questions(path, None, 3, seed)
        names = [row["question"] for row in questions + examples]
        assert len(questions) == 5 and sorted(names) == [f"q{i}" for i in range(8)]
        assert load_questions(path, 2, 3, seed) == (questions[:2], examples)
        drawn.add(names[5])
    assert len(drawn) > 1
    with pytest.raises(InputError, match="leaves no question"):
        load_questions(path, None, 8, seed=0)


def test_typed_questions_and_files_of_them(tmp_path):
    """Typed ones first, then the file's: lines of a text file, questions of a JSONL file."""
    text = tmp_path / "more.txt"
    text.write_text("third\n\n  \nvierte für dich\n", encoding="utf-8")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "fifth", "answer": "a"},
                                                {"prompt": "sixth", "response": "b"}])
    assert read_questions(["first"], str(text), 0) == ["first", "third", "vierte für dich"]
    assert read_questions([], rows, 0) == ["fifth", "sixth"]
    for seed, example in ((0, 0), (4, 0), (0, 7)):              # training shows the first ones
        unseen = WordProblems(seed, "validation")
        wanted = unseen[len(unseen) // 2 + example]["question"]
        assert read_questions([], None, seed, example) == [wanted]
    text.write_text("\n")
    with pytest.raises(InputError, match="holds no questions"):
        read_questions([], str(text), 0)


# --------------------------------------------------------------------------------------------------
# Training rows and held-out rows

def grouped(groups=30, each=3):
    """Rows of MetaMath's kind: every original question asked `each` times."""
    return [{"question": f"{g} in words {i}", "answer": "x", "group": f"original {g}"}
            for i in range(each) for g in range(groups)]


def test_split_keeps_groups_whole():
    for seed in range(5):
        train, held_out = split_rows(grouped(), 6, seed)
        kept_back = {row["group"] for row in held_out}
        assert len(held_out) == 6 == len(kept_back)             # six different questions
        assert len(train) == 24 * 3                             # their siblings are gone as well
        assert not {row["group"] for row in train} & kept_back
        assert all(row in grouped() for row in train + held_out)


def test_split_depends_on_the_seed_and_not_on_the_order():
    """Sorting or shuffling a file must not move a held-out question into training."""
    def kept_back(rows, seed):
        return [row["group"] for row in split_rows(rows, 6, seed)[1]]

    rows = grouped()
    shuffled = random.Random(1).sample(rows, len(rows))
    assert split_rows(rows, 6, seed=0) == split_rows(rows, 6, seed=0)
    assert kept_back(shuffled, 0) == kept_back(rows, 0)
    assert len({tuple(kept_back(rows, seed)) for seed in range(5)}) == 5


def test_duplicates_of_a_question_stay_together(tmp_path):
    rows = [{"question": f"q{i % 20}", "answer": f"answer {i}"} for i in range(60)]
    train, held_out = load_data(write_rows(tmp_path / "rows.jsonl", rows), 4, seed=0)
    assert len(held_out) == 4 and len(train) == 48
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}


@pytest.mark.parametrize("questions, wanted, held_out", [
    (2, 1, 1), (2, 9, 1), (4, 2, 1), (9, 100, 1),               # one at least
    (10, 1, 1), (10, 2, 2), (10, 3, 2), (14, 32, 2), (15, 32, 3), (1000, 32, 32),
    (1, 0, 0), (10, 0, 0)])                                     # or none, where none is wanted
def test_at_most_a_fifth_is_held_out(questions, wanted, held_out):
    """Of the questions, however many rows they have."""
    rows = grouped(questions, each=3)
    train, others = split_rows(rows, wanted, seed=0)
    assert len(others) == held_out and len(train) == 3 * (questions - held_out)


def test_a_single_question():
    for rows in (grouped(groups=1, each=1), grouped(groups=1, each=9)):
        with pytest.raises(InputError, match="a single question .*add rows, or --eval-prompts 0"):
            split_rows(rows, 1, seed=0)
        assert split_rows(rows, 0, seed=0) == (rows, [])        # it can be trained on alone


def test_is_same_file(tmp_path, monkeypatch):
    """Two names of one JSONL file; of a data set that has splits there is no such file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    for name in ("rows.jsonl", "./rows.jsonl", str(tmp_path / "rows.jsonl"), "link.jsonl"):
        assert is_same_file(name, "rows.jsonl") and is_same_file("rows.jsonl", name)
    for name in ("other.jsonl", "sub/rows.jsonl", "gsm8k", None):
        assert not is_same_file(name, "rows.jsonl") and not is_same_file("rows.jsonl", name)
    for name in ("gsm8k", "wordproblems", None):
        assert not is_same_file(name, name)


# --------------------------------------------------------------------------------------------------
# The hub

@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets`: answers with `.rows`, or raises them; `.asked` keeps requests."""
    fake = types.ModuleType("datasets")
    fake.rows, fake.asked = [], []

    def load_dataset(path, name=None, *, split=None):
        fake.asked.append((path, name, split))
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return fake.rows

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_hub_gsm8k(hub):
    """Training takes the train split alone; questions are the test split's."""
    hub.rows = [{"question": f"q{i}?", "answer": f"1+{i} = <<1+{i}={1 + i}>>{1 + i}\n#### {1 + i}"}
                for i in range(11)]
    train, held_out = load_data("gsm8k", 2, seed=0)
    assert hub.asked == [("openai/gsm8k", "main", "train")]
    assert (len(train), len(held_out)) == (9, 2)
    for row in train + held_out:
        i = int(row["question"][1:-1])
        assert row["answer"] == f"1+{i} = {1 + i}\n#### {1 + i}"
    hub.asked.clear()
    questions, examples = load_questions("gsm8k", 4, 3, seed=0)
    assert hub.asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert (len(questions), len(examples)) == (4, 3)


def test_hub_is_looked_for_before_its_library_asks(hub, monkeypatch):
    look = functools.partial(hub.asked.append, "there?")
    monkeypatch.setattr("common.data.offline_where_out_of_reach", look)
    hub.rows = [{"question": "a", "answer": "1"}]
    load_questions("gsm8k", 1, 0, seed=0)
    assert hub.asked == ["there?", ("openai/gsm8k", "main", "test")]


def test_hub_metamath(hub):
    hub.rows = [{"type": kind, "query": f"{kind} q{i}", "original_question": f"q{i}",
                 "response": f"The answer is: {i}"}
                for kind in ("MATH_AnsAug", "GSM_Rephrased") for i in range(15)]
    train, held_out = load_data("metamath", 3, seed=0)
    assert hub.asked == [("meta-math/MetaMathQA", None, "train")]
    assert (len(train), len(held_out)) == (24, 3)
    kept_back = {row["question"].split()[1] for row in held_out}
    assert not kept_back & {row["question"].split()[1] for row in train}


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), ValueError("no config"),
                                   OSError("disk"), RuntimeError("the library's own")])
@pytest.mark.parametrize("name", ["gsm8k", "metamath"])
def test_hub_out_of_reach_is_one_line(hub, name, error):
    hub.rows = error
    with pytest.raises(InputError, match="cannot fetch .*--data wordproblems") as refused:
        load_data(name, 2, seed=0)
    assert "\n" not in str(refused.value) and type(error).__name__ in str(refused.value)


def test_hub_row_that_is_malformed(hub):
    hub.rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}]
    with pytest.raises(InputError, match="openai/gsm8k row 1: "):
        load_data("gsm8k", 1, seed=0)


# --------------------------------------------------------------------------------------------------
# The real thing

def strip_calls(text):
    """`<<...>>` out of a text, by partition and not by regex."""
    kept = ""
    while "<<" in text:
        before, _, rest = text.partition("<<")
        kept, text = kept + before, rest.partition(">>")[2]
    return kept + text


def test_real_gsm8k_file():
    if not GSM8K.exists():
        pytest.skip("no GSM8K file beside the repository (../shared/data/gsm8k/train.jsonl)")
    raw = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    answers = {row["question"]: strip_calls(row["answer"]) for row in raw}
    assert len(raw) == len(answers) == 7473             # none twice: rows in and out can be counted
    train, held_out = load_data(str(GSM8K), 100, seed=0)
    assert (len(train), len(held_out)) == (7373, 100)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    for row in train + held_out:
        assert "<<" not in row["answer"] and row["answer"] == answers[row["question"]]
        assert row["answer"].split("\n")[-1].startswith("#### ")
