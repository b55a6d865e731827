"""
Questions with worked answers: to train on, to hold out, to ask.

    python -m common.data                                   # three word problems
    python -m common.data --data gsm8k                      # GSM8K's training rows, from the hub
    python -m common.data --data path/to/train.jsonl        # your own rows

Every source comes out as the same thing, a sequence of {"question": str, "answer": str}:

    wordproblems    made on the spot by a seeded generator, in GSM8K's form; endless, offline
    gsm8k           `openai/gsm8k` on the hub, its train split (7,473 rows)
    metamath        `meta-math/MetaMathQA` on the hub (395,000 rows, rewritten from the training
                    questions of GSM8K and MATH)
    FILE.jsonl      question/answer (GSM8K's own files), prompt/response, or query/response
                    (MetaMath's) per line

Held-out prompts are training rows that are never trained on. MetaMath asks the same original
question many times over, so rows are split by original question, not by row. Test splits are for
evaluation, and `load_questions` alone reads them.
"""
import functools
import json
import random
import re
from pathlib import Path

from common.cli import ArgumentParser, InputError, at_least, run, say
from common.hub import offline_where_out_of_reach, resolve
from common.wordproblems import FAMILIAR, STRUCTURES, UNFAMILIAR, WordProblems

FIELDS = (("question", "answer"), ("prompt", "response"), ("query", "response"))
JSON_LINES = (".jsonl", ".json")


# --------------------------------------------------------------------------------------------------
# Rows from a file or from the hub

def clean_row(row, where):
    """One raw row -> {"question", "answer", "group"}. InputError, naming `where`, if malformed.

    `group` is what must not be split between training and held-out rows: MetaMath's original
    question, else the question itself.
    """
    fields = set(row) if isinstance(row, dict) else set()
    pairs = [pair for pair in FIELDS if fields >= set(pair)]
    if not pairs:
        known = ", ".join("/".join(pair) for pair in FIELDS)
        raise InputError(f"{where}: expected an object with {known}")
    asked, answered = pairs[0]
    question, answer = row[asked], row[answered]
    for text in (question, answer):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: {asked!r} and {answered!r} must be non-empty strings")
    group = row.get("original_question") or question
    if not isinstance(group, str):
        raise InputError(f"{where}: 'original_question' must be a string")
    if answered == "answer":                            # GSM8K marks calculator calls: <<48/2=24>>
        answer = re.sub(r"<<[^<>\n]*>>", "", answer)
    return {"question": question, "answer": answer, "group": group}


def read_jsonl(path):
    """All rows of a JSONL file, cleaned; blank lines are skipped.

    Raises InputError with file and line number.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}:{number}: not JSON ({error})") from None
                rows.append(clean_row(row, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def is_same_file(name, other):
    """Do two --data values (either may be None) name the same JSONL file?"""
    names = (name, other)
    return (all(one is not None and Path(one).suffix in JSON_LINES for one in names)
            and Path(name).resolve() == Path(other).resolve())


def read_hub(repository, *config, split="train"):
    """All rows of one split of a hub data set, cleaned. InputError if the hub is out of reach."""
    offline_where_out_of_reach()
    from datasets import load_dataset               # slow to import, and seldom needed

    try:
        rows = load_dataset(repository, *config, split=split)
    except Exception as error:                      # offline is any of half a dozen classes
        raise InputError(f"cannot fetch {repository} from the hub ({type(error).__name__}); "
                         "offline, use --data wordproblems or give --data a JSONL file") from None
    return [clean_row(row, f"{repository} row {i}") for i, row in enumerate(rows)]


# --data: the kinds of word problems, and the split that is asked. Validation is for whoever still
# has something to choose, such as a threshold
WORD_PROBLEMS = {
    "wordproblems": (STRUCTURES, "test"),
    "wordproblems-validation": (STRUCTURES, "validation"),
    "wordproblems-familiar": (FAMILIAR, "test"),
    "wordproblems-unfamiliar": (UNFAMILIAR, "test"),
}
TO_TRAIN_ON = ("wordproblems", "wordproblems-familiar")


def word_problems(problems, count):
    """The first `count` of WordProblems, a list. InputError for more than can be meant."""
    if count > 10 ** 5:
        raise InputError(f"{count} word problems are too many: at most {10 ** 5}")
    return [problems[i] for i in range(count)]


# --------------------------------------------------------------------------------------------------
# Rows to train on, and others held out

def split_rows(rows, held_out, seed):
    """(train rows, `held_out` held-out rows, but a fifth of all at most), no group on both sides.

    Of a held-out group one row is asked, its first. The choice depends on the seed alone.
    """
    first_of = {}
    for row in rows:
        first_of.setdefault(row["group"], row)
    groups = sorted(first_of)                       # not in the order of the rows
    random.Random(f"held-out/{seed}").shuffle(groups)
    if held_out and len(groups) == 1:
        raise InputError("a single question cannot be trained on and held out: add rows, or "
                         "--eval-prompts 0 to train without evaluation")
    chosen = groups[:min(held_out, max(1, len(groups) // 5))]
    kept_back = set(chosen)
    train = [row for row in rows if row["group"] not in kept_back]
    return train, [first_of[group] for group in chosen]


def load_data(name, held_out, seed):
    """(train, held-out) for `--data NAME`: two sequences of rows, the second of length `held_out`,
    of a file a fifth at most.

    Raises InputError for an unknown name, a malformed row, or a hub that cannot be reached.
    """
    if name in TO_TRAIN_ON:
        kinds, _ = WORD_PROBLEMS[name]
        held_back = WordProblems(seed, "validation", kinds)
        return WordProblems(seed, "train", kinds), word_problems(held_back, held_out)
    if name in WORD_PROBLEMS:
        raise InputError(f"{name} is there to ask: train on {' or '.join(TO_TRAIN_ON)}")
    if name == "gsm8k":
        rows = read_hub("openai/gsm8k", "main")
    elif name == "metamath":
        rows = read_hub("meta-math/MetaMathQA")
    elif Path(name).suffix in JSON_LINES:
        rows = read_jsonl(name)
    else:
        raise InputError(f"no data {name!r}; --data takes wordproblems, gsm8k, metamath or a path "
                         "to a .jsonl file")
    return split_rows(rows, held_out, seed)


# --------------------------------------------------------------------------------------------------
# Questions to ask: test splits, or what a user typed

def default_questions(model, trained):
    """--data for a checkpoint where none is given: word problems for what was trained on them.

    model     as --model has it
    trained   what training noted in the checkpoint's config.json
    """
    on_problems = trained.get("data") in WORD_PROBLEMS or resolve(model) == resolve("tiny")
    return "wordproblems" if on_problems else "gsm8k"


def load_questions(name, limit, shots, seed):
    """(questions, worked examples) for --data, two lists of rows. Examples come from elsewhere.

    wordproblems: its test split (-validation: that), examples from its training split. gsm8k: the
    hub's test and train splits. A JSONL file has no second split: `shots` of its rows, drawn by
    `seed`, are the examples and are not asked.
    """
    if name in WORD_PROBLEMS:
        kinds, split = WORD_PROBLEMS[name]
        return (word_problems(WordProblems(seed, split, kinds), limit or 200),
                word_problems(WordProblems(seed, "train", kinds), shots))
    if name == "gsm8k":
        rows, examples = read_hub("openai/gsm8k", "main", split="test"), []
        if shots:
            examples = random.Random(seed).sample(read_hub("openai/gsm8k", "main"), shots)
    elif Path(name).suffix in JSON_LINES:
        rows = read_jsonl(name)
        examples = random.Random(seed).sample(rows, min(shots, len(rows)))
        rows = [row for row in rows if row not in examples]
    else:
        raise InputError(f"no data {name!r}; --data takes wordproblems, gsm8k or a path to a "
                         ".jsonl file")
    if not rows:
        raise InputError(f"{name} leaves no question to ask")
    return rows[:limit], examples


def read_questions(typed, path, seed, example=0):
    """Questions, a list of str: the typed ones, then the file's, else one unseen word problem.

    example   its number: sample.py shows another one than the viewer, and training shows neither
    """
    questions = list(typed)
    if path and Path(path).suffix in JSON_LINES:
        questions += [row["question"] for row in read_jsonl(path)]
    elif path:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        questions += [line for line in lines if line.strip()]
    elif not questions:
        problems = WordProblems(seed, split="validation")       # training shows the first ones
        questions = [problems[len(problems) // 2 + example]["question"]]
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


# --------------------------------------------------------------------------------------------------
# What a training step reads. It follows from (seed, step) alone: a resumed run sees what it would
# have seen.

@functools.lru_cache(maxsize=2)                     # a step may end one epoch and begin the next
def epoch_order(rows, seed, epoch):
    """A shuffled list of 0..rows-1, another one for each epoch."""
    order = list(range(rows))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def draw_rows(train, batch_size, step, seed):
    """The rows of step `step` (from 0): each row once per epoch, in a new order every epoch."""
    rows = []
    for drawn in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(drawn, len(train))
        rows.append(train[epoch_order(len(train), seed, epoch)[i]])
    return rows


def encode_rows(rows, tokenizer, style, seq_len):
    """Rows -> pairs (number of tokens of the prompt, ids of prompt + answer + end).

    Cut at `seq_len` tokens; a row whose prompt alone is that long is left out.
    """
    encoded = []
    for row in rows:
        prompt = tokenizer.prompt(row["question"], style)
        if len(prompt) < seq_len:
            ids = prompt + tokenizer.response(row["answer"])
            encoded.append((len(prompt), ids[:seq_len]))
    return encoded


# --------------------------------------------------------------------------------------------------

def main():
    parser = ArgumentParser(prog="-m common.data", description=__doc__)
    add = parser.add_argument
    add("--data", default="wordproblems",
        help="wordproblems, gsm8k, metamath or a JSONL file (%(default)s)")
    add("--limit", type=int, default=3, help="rows to print (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    at_least(args, limit=1)
    train, _ = load_data(args.data, held_out=0, seed=args.seed)
    for i in range(min(args.limit, len(train))):
        say(f"--- {i}\n{train[i]['question']}\n\n{train[i]['answer']}\n")


if __name__ == "__main__":
    run(main)
