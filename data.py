"""
Questions with worked answers, for training and for held-out prompts.

    python data.py                                          # three word problems, as the model sees them
    python data.py --data gsm8k                             # GSM8K's training rows, from the hub
    python data.py --data path/to/train.jsonl               # your own rows

Every source comes out as the same thing, a sequence of {"question": str, "answer": str}:

    wordproblems    made on the spot by a seeded generator, in GSM8K's form; endless, offline, the default
    gsm8k           `openai/gsm8k` on the hub, its train split (7,473 rows)
    metamath        `meta-math/MetaMathQA` on the hub (395,000 rows, rewritten from GSM8K's and MATH's train questions)
    FILE.jsonl      question/answer (GSM8K's own files), prompt/response, or query/response (MetaMath's) per line

Held-out prompts are training rows that are never trained on. Test sets are never touched here: that is what they are
for. MetaMath asks the same original question many times over, so rows are split by original question, not by row.
"""
import functools
import json
import random
import re
import zlib
from pathlib import Path

from pretrained import ArgumentParser, InputError, run

FIELDS = (("question", "answer"), ("prompt", "response"), ("query", "response"))


# ----------------------------------------------------------------------------------------------------------------------
# Word problems. Each structure draws its numbers and names from `rng` and returns (question, lines of the solution,
# answer). Phrasing is easy to predict and arithmetic is not: confident runs and hard tokens alternate, as in GSM8K.

NAMES = ["Ava", "Ben", "Carla", "Dev", "Elif", "Finn", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam", "Mona", "Noah"]
THINGS = ["apples", "marbles", "stickers", "books", "shells", "pencils", "coins", "buttons", "cards", "beads"]
PLACES = ["the market", "school", "the park", "the library", "the fair", "the beach"]


def gain_then_lose(rng, name, other, thing):
    a, b = rng.randint(10, 60), rng.randint(5, 40)
    c = rng.randint(2, a + b - 1)
    return (f"{name} has {a} {thing}. {other} gives {name} {b} more. Then {name} loses {c} of them at "
            f"{rng.choice(PLACES)}. How many {thing} does {name} have left?",
            [f"After the gift {name} has {a} + {b} = {a + b} {thing}.",
             f"After the loss {name} has {a + b} - {c} = {a + b - c} {thing}."], a + b - c)


def boxes_minus(rng, name, other, thing):
    n, each = rng.randint(2, 9), rng.randint(3, 12)
    given = rng.randint(1, n * each - 1)
    return (f"{name} buys {n} boxes with {each} {thing} in each box and gives {given} {thing} to {other}. "
            f"How many {thing} does {name} keep?",
            [f"The boxes hold {n} * {each} = {n * each} {thing}.",
             f"{name} keeps {n * each} - {given} = {n * each - given} {thing}."], n * each - given)


def times_as_many(rng, name, other, thing):
    a, times = rng.randint(3, 20), rng.randint(2, 5)
    return (f"{name} collected {a} {thing}. {other} collected {times} times as many. How many {thing} did they "
            "collect together?",
            [f"{other} collected {a} * {times} = {a * times} {thing}.",
             f"Together they collected {a} + {a * times} = {a + a * times} {thing}."], a + a * times)


def share_equally(rng, name, other, thing):
    friends, each = rng.randint(2, 9), rng.randint(3, 12)
    kept = rng.randint(1, 15)
    total = friends * each + kept
    return (f"{name} has {total} {thing}, keeps {kept} and shares the rest equally among {friends} friends. "
            f"How many {thing} does each friend get?",
            [f"There are {total} - {kept} = {friends * each} {thing} to share.",
             f"Each friend gets {friends * each} / {friends} = {each} {thing}."], each)


def change_from_note(rng, name, other, thing):
    n, price = rng.randint(2, 6), rng.randint(2, 9)
    note = rng.choice([note for note in (20, 50, 100) if note >= n * price])
    return (f"At {rng.choice(PLACES)} {name} buys {n} {thing} for ${price} each and pays with a ${note} note. "
            "How many dollars of change are due?",
            [f"The {thing} cost {n} * {price} = {n * price} dollars.",
             f"The change is {note} - {n * price} = {note - n * price} dollars."], note - n * price)


def daily_rate(rng, name, other, thing):
    rate, days, extra = rng.randint(3, 15), rng.randint(3, 10), rng.randint(2, 30)
    return (f"{name} makes {rate} {thing} a day for {days} days and already had {extra}. "
            f"How many {thing} are there in the end?",
            [f"In {days} days {name} makes {rate} * {days} = {rate * days} {thing}.",
             f"In the end there are {rate * days} + {extra} = {rate * days + extra} {thing}."], rate * days + extra)


def half_then_buy(rng, name, other, thing):
    half, more = rng.randint(5, 40), rng.randint(3, 30)
    return (f"{name} had {2 * half} {thing} and gave half of them to {other}. Later {name} bought {more} more. "
            f"How many {thing} does {name} have now?",
            [f"{name} gave away {2 * half} / 2 = {half} {thing} and had {half} left.",
             f"Now {name} has {half} + {more} = {half + more} {thing}."], half + more)


def savings_goal(rng, name, other, thing):
    weeks, pay, have = rng.randint(3, 9), rng.randint(4, 12), rng.randint(5, 25)
    goal = have + weeks * pay
    return (f"{name} wants to buy a bicycle for ${goal}. {name} has ${have} and saves ${pay} every week. "
            "How many weeks does it take?",
            [f"{name} still needs {goal} - {have} = {weeks * pay} dollars.",
             f"That takes {weeks * pay} / {pay} = {weeks} weeks."], weeks)


def difference(rng, name, other, thing):
    a, fewer = rng.randint(20, 60), rng.randint(2, 15)
    return (f"{name} read {a} pages on Monday and {fewer} fewer on Tuesday. How many pages did {name} read on both "
            "days?",
            [f"On Tuesday {name} read {a} - {fewer} = {a - fewer} pages.",
             f"On both days {name} read {a} + {a - fewer} = {2 * a - fewer} pages."], 2 * a - fewer)


def rows_and_columns(rng, name, other, thing):
    rows, columns, broken = rng.randint(3, 9), rng.randint(3, 9), rng.randint(1, 8)
    total = rows * columns
    return (f"{name} lays out {thing} in {rows} rows of {columns}. {other} takes {broken} away and puts 2 back. "
            f"How many {thing} are on the table?",
            [f"The rows hold {rows} * {columns} = {total} {thing}.",
             f"After {other} takes some there are {total} - {broken} = {total - broken} {thing}.",
             f"With 2 put back there are {total - broken} + 2 = {total - broken + 2} {thing}."], total - broken + 2)


def two_prices(rng, name, other, thing):
    n, p, m, q = rng.randint(2, 6), rng.randint(2, 9), rng.randint(2, 6), rng.randint(2, 9)
    return (f"{name} sells {n} {thing} for ${p} each and {m} cakes for ${q} each. How many dollars does {name} earn?",
            [f"The {thing} bring {n} * {p} = {n * p} dollars.", f"The cakes bring {m} * {q} = {m * q} dollars.",
             f"{name} earns {n * p} + {m * q} = {n * p + m * q} dollars."], n * p + m * q)


def round_trip(rng, name, other, thing):
    there, back, days = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 6)
    return (f"{name} walks {there} km to {rng.choice(PLACES)} and {back} km home by another way, {days} days a week. "
            f"How many km does {name} walk in a week?",
            [f"One day is {there} + {back} = {there + back} km.",
             f"A week is {there + back} * {days} = {(there + back) * days} km."], (there + back) * days)


STRUCTURES = (gain_then_lose, boxes_minus, times_as_many, share_equally, change_from_note, daily_rate, half_then_buy,
              savings_goal, difference, rows_and_columns, two_prices, round_trip)


def split_of(question):
    """The split that a question belongs to, whatever the seed: a checksum deals 1 in 20 to validation, 1 to test."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(question.encode()) % 20, "train")


class WordProblems:
    """Row i of an endless table, the same for the same seed on every machine: `WordProblems(seed)[i]`.

    split   "train", "validation" or "test". No question is in two of them: one drawn for the wrong split is drawn anew.
    """

    def __init__(self, seed, split="train"):
        assert split in ("train", "validation", "test"), split
        self.seed, self.split = seed, split

    def __len__(self):
        return 1_000_000                # what counts as an epoch; rows are made when asked for, none is stored

    def __getitem__(self, i):
        rng = random.Random(f"{self.split}/{self.seed}/{i}")
        while True:
            name, other = rng.sample(NAMES, 2)
            question, lines, answer = rng.choice(STRUCTURES)(rng, name, other, rng.choice(THINGS))
            if split_of(question) == self.split:
                return {"question": question, "answer": "\n".join([*lines, f"#### {answer}"])}


# ----------------------------------------------------------------------------------------------------------------------
# Rows from a file or from the hub

def clean_row(row, where):
    """One raw row -> {"question", "answer", "group"}. Raises InputError, naming `where`, for a malformed one.

    GSM8K marks calculator calls as <<48/2=24>>: they are removed. `group` is what must not be split between training
    and held-out rows: MetaMath's original question, else the question itself.
    """
    if isinstance(row, dict):
        for question, answer in FIELDS:
            if question in row and answer in row:
                texts = row[question], row[answer]
                if not all(isinstance(text, str) and text.strip() for text in texts):
                    raise InputError(f"{where}: {question!r} and {answer!r} must be non-empty strings")
                group = row.get("original_question") or texts[0]
                if not isinstance(group, str):
                    raise InputError(f"{where}: 'original_question' must be a string")
                answer = re.sub(r"<<[^<>\n]*>>", "", texts[1]) if answer == "answer" else texts[1]
                return {"question": texts[0], "answer": answer, "group": group}
    raise InputError(f"{where}: expected an object with " + ", ".join("/".join(pair) for pair in FIELDS))


def read_jsonl(path):
    """All rows of a JSONL file, cleaned. Raises InputError with file and line number; blank lines are skipped."""
    rows = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise InputError(f"{path}:{number}: not JSON ({error})") from None
                    rows.append(clean_row(row, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def read_hub(repository, *config, split="train"):
    """All rows of one split of a hub data set, cleaned. Raises InputError where the hub cannot be reached."""
    from datasets import load_dataset

    try:
        rows = load_dataset(repository, *config, split=split)
    except Exception as error:          # offline shows up as any of half a dozen classes
        raise InputError(f"cannot fetch {repository} from the hub ({type(error).__name__}); offline, use "
                         "--data wordproblems or give --data a JSONL file") from None
    return [clean_row(row, f"{repository} row {i}") for i, row in enumerate(rows)]


def split_rows(rows, held_out, seed):
    """(train rows, `held_out` held-out rows), no group on both sides; the choice depends on the seed alone."""
    groups = sorted({row["group"] for row in rows})
    random.Random(f"held-out/{seed}").shuffle(groups)
    first_of = {}
    for row in rows:
        first_of.setdefault(row["group"], row)
    chosen = groups[:held_out]
    if len(chosen) == len(groups):
        raise InputError(f"{len(groups)} different questions cannot spare {held_out} held-out prompts: add rows")
    kept_back = set(chosen)
    return [row for row in rows if row["group"] not in kept_back], [first_of[group] for group in chosen]


def load_data(name, held_out, seed):
    """(train, held-out) for `--data NAME`: two sequences of {"question", "answer"}, the second of length `held_out`.

    Raises InputError for an unknown name, a malformed row, or a hub that cannot be reached.
    """
    if name == "wordproblems":
        validation = WordProblems(seed, split="validation")
        return WordProblems(seed), [validation[i] for i in range(held_out)]
    if name == "gsm8k":
        rows = read_hub("openai/gsm8k", "main")
    elif name == "metamath":
        rows = read_hub("meta-math/MetaMathQA")
    elif Path(name).suffix in (".jsonl", ".json"):
        rows = read_jsonl(name)
    else:
        raise InputError(f"no data {name!r}; --data takes wordproblems, gsm8k, metamath or a path to a .jsonl file")
    return split_rows(rows, held_out, seed)


# ----------------------------------------------------------------------------------------------------------------------
# What a training step reads. It follows from (seed, step) alone, so a resumed run sees what it would have seen.

@functools.lru_cache(maxsize=2)
def epoch_order(rows, seed, epoch):
    """A shuffled list of 0..rows-1, another one for each epoch."""
    order = list(range(rows))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def draw_rows(train, batch_size, step, seed):
    """The rows of step `step` (from 0): each row once per epoch, in a new order every epoch."""
    chosen = range(step * batch_size, (step + 1) * batch_size)
    return [train[epoch_order(len(train), seed, i // len(train))[i % len(train)]] for i in chosen]


def encode_rows(rows, tokenizer, style, seq_len):
    """[(prompt length, ids of prompt + answer + end)], cut at seq_len; a prompt that is too long is left out."""
    prompts = [tokenizer.prompt(row["question"], style) for row in rows]
    return [(len(prompt), (prompt + tokenizer.response(row["answer"]))[:seq_len])
            for row, prompt in zip(rows, prompts) if len(prompt) < seq_len]


# ----------------------------------------------------------------------------------------------------------------------

def main():
    parser = ArgumentParser(prog="data.py", description=__doc__)
    parser.add_argument("--data", default="wordproblems", help="wordproblems, gsm8k, metamath or a JSONL file")
    parser.add_argument("--limit", type=int, default=3, help="rows to print (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    train, _ = load_data(args.data, held_out=1, seed=args.seed)
    for i in range(min(args.limit, len(train))):
        print(f"--- {i}\n{train[i]['question']}\n\n{train[i]['answer']}\n")


if __name__ == "__main__":
    run(main)
