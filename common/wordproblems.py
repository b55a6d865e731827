"""
Word problems: a small world for experiments, made on the spot by a seeded generator.

    from common.wordproblems import WordProblems
    WordProblems(seed=0, split="test")[0]                   # {"question": ..., "answer": ...}

Phrasing is easy to predict and arithmetic is not: confident runs and hard tokens alternate, as in
GSM8K, whose form the answers have. A structure is (question, numbers, step, ...):

    question    {A} {B} {C} people, {x} {y} things, {box} a container, {place};
                [one|another] wording
    numbers     drawn from left to right: "n 2-9" uniformly, "t = n * e" by a rule
    step        "c = a + b: a line of the answer", in which {c} is written out as "3 + 4 = 7"

A draw with a number that is not whole or below 1 is thrown away. Arithmetic is bounded by what a
model of two million parameters can learn: sums and differences mostly below 200, products from the
table up to 12 * 12 or doubled numbers.

The test split asks new numbers of known kinds. Of *kinds* that training has not seen, every sixth
structure is UNFAMILIAR: train on the others (--data wordproblems-familiar), then ask these.

Do not touch a structure's question or the names of its numbers, not even a comma: a hash of them
decides which split a problem belongs to, and trained models would be tested on what they have seen.
"""
import random
import re
import zlib

NAMES = ("Ava Ben Carla Dev Elif Finn Grace Hugo Ines Jamal Kira Liam Mona Noah Olga Paul Rosa Sam "
         "Tara Umar Vera Wen Yara Zoe").split()
THINGS = ("apples marbles stickers books shells pencils coins buttons cards beads stamps stones "
          "cookies ribbons candles flowers balloons lemons toys brushes").split()
BOXES = "bag jar basket crate pack tin".split()
PLACES = ["the market", "school", "the park", "the library", "the fair", "the beach", "the zoo"]

STRUCTURES = (
    # --- one step
    ("{A} has {a} {x}. {B} [gives {A}|brings {A}] {b} more. How many {x} does {A} have now?",
     "a 5-90, b 3-60",
     "c = a + b: With the new ones {A} has {c} {x}."),
    ("{A} [had|took] {a} {x} and lost {b} of them [at|on the way to] {place}. "
     "How many {x} does {A} still have?",
     "a 10-120, b 3-90",
     "c = a - b: After the loss {A} still has {c} {x}."),
    ("{A} [buys|carries] {n} {box}s with {e} {x} in each. How many {x} is that?",
     "n 2-12, e 2-12",
     "t = n * e: In all the {box}s there are {t} {x}."),
    ("{A} [shares|divides] {t} {x} equally among {n} friends. How many {x} does each friend get?",
     "n 2-12, e 2-12, t = n * e",
     "g = t / n: Each friend gets {g} {x}."),
    ("{A} has {a} {x} and {B} has {b}. How many more {x} does {A} have[| than {B}]?",
     "a 10-120, b 3-90",
     "c = a - b: {A} has {c} more {x} than {B}."),
    ("There are {a} {x} and {b} {y} on the table. How many things are [on it|there]?",
     "a 5-90, b 5-90",
     "c = a + b: On the table there are {c} things."),
    ("At {place} {x} [cost|sell for] ${p} each. How many dollars do {n} {x} cost?",
     "p 2-12, n 2-12",
     "t = n * p: Together the {x} cost {t} dollars."),
    ("{A} packs {t} {x} into {box}s of {e}. How many {box}s does {A} [fill|need]?",
     "e 2-12, n 2-12, t = n * e",
     "m = t / e: The {x} fill {m} {box}s."),
    ("{A} [walks|runs|rides] {e} km every day. How many km is that in {n} days?",
     "e 2-12, n 2-12",
     "t = n * e: In {n} days {A} covers {t} km."),
    ("{A} is {a} years old. {B} is {b} years older[| than {A}]. How old is {B}?",
     "a 3-60, b 2-40",
     "c = a + b: The age of {B} is {c} years."),
    # --- two steps
    ("{A} has {a} {x}. {B} gives {A} {b} more. Then {A} loses {c} of them at {place}. "
     "How many {x} [are left|does {A} have left]?",
     "a 10-60, b 5-40, c 2-60",
     "s = a + b: After the gift {A} has {s} {x}.",
     "r = s - c: After the loss {A} has {r} {x}."),
    ("{A} buys {n} {box}s with {e} {x} in each and gives {b} {x} to {B}. "
     "How many {x} does {A} keep?",
     "n 2-12, e 2-12, b 1-60",
     "t = n * e: The {box}s hold {t} {x}.",
     "r = t - b: After giving some away {A} keeps {r} {x}."),
    ("{A} [collected|found] {a} {x}. {B} [collected|found] {n} times as many. "
     "How many {x} do they have together?",
     "a 2-12, n 2-12",
     "b = a * n: {B} has {b} {x}.",
     "s = a + b: Together they have {s} {x}."),
    ("{A} has {t} {x}, keeps {b} and shares the rest equally among {n} friends. "
     "How many {x} does each friend get?",
     "n 2-12, e 2-12, b 1-30, r = n * e, t = r + b",
     "s = t - b: There are {s} {x} to share.",
     "g = s / n: So each friend gets {g} {x}."),
    ("At {place} {A} buys {n} {x} for ${p} each and pays with ${m}. "
     "How many dollars of change are due?",
     "n 2-12, p 2-12, m 20-150",
     "t = n * p: The {x} cost {t} dollars.",
     "c = m - t: The change is {c} dollars."),
    ("{A} makes {e} {x} a day for {n} days and already had {b}. How many {x} are there in the end?",
     "e 2-12, n 2-12, b 2-50",
     "t = e * n: In {n} days {A} makes {t} {x}.",
     "s = t + b: In the end there are {s} {x}."),
    ("{A} had {a} {x} and gave half of them to {B}. Later {A} bought {b} more. "
     "How many {x} does {A} have now?",
     "h 3-50, a = h + h, b 3-50",
     "r = a / 2: {A} gave away half and kept {r} {x}.",
     "s = r + b: With the new ones {A} has {s} {x}."),
    ("{A} wants to buy a [bicycle|radio|coat] for ${g}. {A} has ${b} and saves ${e} every week. "
     "How many weeks does it take?",
     "e 2-12, n 2-12, b 5-50, t = e * n, g = t + b",
     "r = g - b: {A} still needs {r} dollars.",
     "w = r / e: Saving that takes {w} weeks."),
    ("{A} read {a} pages on Monday and {b} fewer on Tuesday. "
     "How many pages did {A} read on both days?",
     "a 10-80, b 2-40",
     "t = a - b: On Tuesday {A} read {t} pages.",
     "s = a + t: On both days {A} read {s} pages."),
    ("{A} has {a} {x} and {B} has {b}. They put them together and share [them|all] equally among "
     "{n} [children|friends]. How many {x} does each one get?",
     "n 2-12, e 2-12, b 1-60, t = n * e, a = t - b",
     "s = a + b: Together they have {s} {x}.",
     "g = s / n: Each one gets {g} {x}."),
    ("{A} has {n} {box}s of {e} {x} and {b} loose {x}. How many {x} does {A} have[| in all]?",
     "n 2-12, e 2-12, b 2-50",
     "t = n * e: In the {box}s there are {t} {x}.",
     "s = t + b: With the loose ones that makes {s} {x}."),
    ("{A} had {a} {x}, lost {b} at {place} and gave {c} to {B}. "
     "How many {x} [are left|does {A} have left]?",
     "a 40-150, b 3-60, c 3-60",
     "r = a - b: After the loss {A} has {r} {x}.",
     "s = r - c: After giving some away {A} has {s} {x}."),
    ("A train covers {d} km in {h} hours. "
     "How many km does it cover in {m} hours at the same speed?",
     "h 2-12, e 2-12, m 2-12, d = h * e",
     "r = d / h: In one hour it covers {r} km.",
     "s = r * m: In {m} hours it covers {s} km."),
    ("At {place} {n} {x} cost ${t}. How many dollars do {m} {x} cost?",
     "n 2-12, p 2-12, m 2-12, t = n * p",
     "r = t / n: One of the {x} costs {r} dollars.",
     "s = r * m: So {m} of them cost {s} dollars."),
    ("{n} teams of {e} children and {b} adults go to {place}. How many people go?",
     "n 2-12, e 2-12, b 2-40",
     "t = n * e: There are {t} children.",
     "s = t + b: With the adults there are {s} people."),
    ("A bus has {a} seats. {b} people get on at {place} and {c} at the next stop. "
     "How many seats are [free|empty]?",
     "a 40-120, b 3-60, c 3-60",
     "r = a - b: After the first stop {r} seats are free.",
     "s = r - c: After the next stop {s} seats are free."),
    ("A book has {t} pages. {A} has read {b} and reads {e} pages a day. "
     "How many days does the rest take?",
     "e 2-12, n 2-12, b 5-60, r = e * n, t = r + b",
     "l = t - b: There are {l} pages left.",
     "d = l / e: Reading them takes {d} days."),
    ("One cake needs {e} eggs. {A} has {b} eggs and bakes {n} cakes. How many eggs are missing?",
     "n 2-12, e 2-12, b 1-60",
     "t = n * e: The cakes need {t} eggs.",
     "m = t - b: So {m} eggs are missing."),
    ("{A} has ${a} and buys {n} tickets for ${p} each. How many dollars does {A} have left?",
     "n 2-12, p 2-12, a 20-150",
     "t = n * p: The tickets cost {t} dollars.",
     "r = a - t: After paying {A} has {r} dollars."),
    ("{A} earns ${p} an hour and works {n} hours, then spends ${b} at {place}. "
     "How many dollars are left?",
     "p 2-12, n 2-12, b 2-60",
     "t = p * n: For the work {A} gets {t} dollars.",
     "r = t - b: After {place} there are {r} dollars left."),
    ("[A hall|A room] has {n} rows of {e} chairs, and {b} chairs are empty. "
     "How many people are sitting?",
     "n 2-12, e 2-12, b 1-50",
     "t = n * e: There are {t} chairs.",
     "r = t - b: So {r} people are sitting."),
    ("A garden has 2 sides of {a} m and 2 sides of {b} m. How many m long is the fence around it?",
     "a 3-50, b 3-50",
     "s = a + b: One long and one short side are {s} m.",
     "t = s * 2: All the sides are {t} m."),
    # --- three steps
    ("{A} lays out {x} in {n} rows of {e}. {B} takes {b} away and puts {c} back. "
     "How many {x} are on the table?",
     "n 2-12, e 2-12, b 2-50, c 1-30",
     "t = n * e: The rows hold {t} {x}.",
     "r = t - b: After {B} takes some there are {r} {x}.",
     "s = r + c: With those put back there are {s} {x}."),
    ("{A} sells {n} {x} for ${p} each and {m} {y} for ${q} each. How many dollars does {A} earn?",
     "n 2-12, p 2-9, m 2-12, q 2-9",
     "t = n * p: The {x} bring {t} dollars.",
     "u = m * q: The {y} bring {u} dollars.",
     "s = t + u: Together they bring {s} dollars."),
    ("{A} buys {n} {box}s of {e} {x}, sells {b} {x} and shares the rest equally among {f} friends. "
     "How many {x} does each friend get?",
     "n 2-12, e 2-12, f 2-12, g 1-12, t = n * e, r = f * g, b = t - r",
     "v = n * e: The {box}s hold {v} {x}.",
     "w = v - b: After the sale there are {w} {x}.",
     "z = w / f: So each friend gets {z} {x}."),
    ("{A} walks {a} km to {place} and {b} km back by another way, {n} days a week, and {c} km on "
     "Sunday. How many km is that in a week?",
     "a 1-6, b 1-6, n 2-6, c 2-30",
     "d = a + b: One such day makes {d} km.",
     "w = d * n: In {n} days that makes {w} km.",
     "s = w + c: With Sunday that makes {s} km."),
    ("{A} had {a} {x} and gave half of them to {B}. Then {A} bought {b} more and lost {c}. "
     "How many {x} does {A} have?",
     "h 3-50, a = h + h, b 3-50, c 2-40",
     "r = a / 2: {A} gave away half and kept {r} {x}.",
     "s = r + b: With the new ones {A} has {s} {x}.",
     "l = s - c: After the loss {A} has {l} {x}."),
    ("A tank holds {a} litres. {A} pours in {n} buckets of {e} litres, and {b} litres leak out. "
     "How many litres are missing?",
     "n 2-12, e 2-12, b 2-30, a 40-180",
     "t = n * e: The buckets bring {t} litres.",
     "r = t - b: After the leak {r} litres remain.",
     "m = a - r: So {m} litres are missing."),
    ("{n} hens lay {e} eggs each a day. {A} collects them for {d} days and sells {b} eggs. "
     "How many eggs are left?",
     "n 2-4, e 2-3, d 2-12, b 2-60",
     "t = n * e: In one day there are {t} eggs.",
     "u = t * d: In {d} days there are {u} eggs.",
     "r = u - b: After the sale {r} eggs are left."),
    ("{A} scores {a}, {b} and {c} points in 3 games. How many points is that per game on average?",
     "m 5-40, t = m * 3, a 3-60, b 3-60, u = a + b, c = t - u",
     "s = a + b: The first games bring {s} points.",
     "v = s + c: All the games bring {v} points.",
     "g = v / 3: On average that is {g} points."),
    ("{A} is {a} years old. {B} is {n} times as old as {A}. {C} is {b} years younger than {B}. "
     "How old will {C} be in {c} years?",
     "a 2-12, n 2-8, b 1-40, c 2-20",
     "d = a * n: The age of {B} is {d} years.",
     "e = d - b: The age of {C} is {e} years.",
     "f = e + c: In {c} years that will be {f} years."),
    ("{A} pays for {n} {x} at ${p} each and {m} {y} at ${q} each [at {place}|in a shop]. "
     "How many dollars is that?",
     "n 2-12, p 2-9, m 2-12, q 2-9",
     "t = n * p: The {x} cost {t} dollars.",
     "u = m * q: The {y} cost {u} dollars.",
     "s = t + u: Together they cost {s} dollars."),
    ("{A} had {a} {x}. {B} gave {A} {b}, {C} gave {A} {c}, and {A} lost {d}. "
     "How many {x} does {A} have now?",
     "a 5-60, b 3-50, c 3-50, d 3-60",
     "s = a + b: With those of {B} that makes {s} {x}.",
     "t = s + c: With those of {C} that makes {t} {x}.",
     "r = t - d: After the loss {A} has {r} {x}."),
    # --- four steps
    ("{A} has {a} {x}. {B} has {b} more than {A}. {C} has {c} fewer than {B}. "
     "How many {x} do the three have together?",
     "a 5-50, b 2-30, c 2-40",
     "d = a + b: {B} has {d} {x}.",
     "e = d - c: {C} has {e} {x}.",
     "s = a + d: {A} and {B} have {s} {x}.",
     "t = s + e: All three have {t} {x}."),
    ("{A} buys {n} {x} for ${p} each and {m} {y} for ${q} each and pays with ${a}. "
     "How many dollars of change are due?",
     "n 2-9, p 2-9, m 2-9, q 2-9, a 50-190",
     "t = n * p: The {x} cost {t} dollars.",
     "u = m * q: The {y} cost {u} dollars.",
     "s = t + u: Together they cost {s} dollars.",
     "c = a - s: The change is {c} dollars."),
    ("{n} adults pay ${p} each and {m} children pay ${q} each to enter {place}. They had ${a}. "
     "How many dollars are left?",
     "n 2-9, p 3-12, m 2-9, q 2-9, a 50-190",
     "t = n * p: The adults pay {t} dollars.",
     "u = m * q: The children pay {u} dollars.",
     "s = t + u: Together they pay {s} dollars.",
     "r = a - s: After paying {r} dollars are left."),
    ("{A} bakes {n} trays of {e} cookies and {m} trays of {f} cookies, and gives {b} to {B}. "
     "How many cookies are left?",
     "n 2-12, e 2-9, m 2-12, f 2-9, b 2-60",
     "t = n * e: The first trays hold {t} cookies.",
     "u = m * f: The other trays hold {u} cookies.",
     "s = t + u: Together they hold {s} cookies.",
     "r = s - b: After the gift there are {r} cookies."),
    ("{A} read {a} pages on Monday, {b} more than that on Tuesday and twice as many as on Monday "
     "on Wednesday. How many pages did {A} read[| in all]?",
     "a 5-45, b 2-30",
     "t = a + b: On Tuesday {A} read {t} pages.",
     "w = a * 2: On Wednesday {A} read {w} pages.",
     "s = a + t: On the first days {A} read {s} pages.",
     "u = s + w: On all the days {A} read {u} pages."),
    ("{f} friends buy {n} {x} for ${p} each and {m} {y} for ${q} each and share the cost equally. "
     "How many dollars does each friend pay?",
     "f 2-9, n 2-9, p 2-9, m 2-9, q 2-9, j = n * p, k = m * q, s = j + k, g = s / f",
     "t = n * p: The {x} cost {t} dollars.",
     "u = m * q: The {y} cost {u} dollars.",
     "v = t + u: Together they cost {v} dollars.",
     "d = v / f: So each friend pays {d} dollars."),
)


UNFAMILIAR = STRUCTURES[3::6]           # one to four steps are among them
FAMILIAR = tuple(one for one in STRUCTURES if one not in UNFAMILIAR)


# --------------------------------------------------------------------------------------------------
# Numbers

def calculate(rule, values):
    """The value of "a + b" (names or numbers; + - * /); None where it is not whole or below 1."""
    left, sign, right = rule.split()
    a = values[left] if left in values else int(left)
    b = values[right] if right in values else int(right)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    whole = sign != "/" or a % b == 0
    return result if whole and result >= 1 else None


def draw_numbers(numbers, rng):
    """One draw of a structure's numbers, {name: int}, or None where a rule gives no such number."""
    values = {}
    for part in numbers.split(", "):
        name, drawn = part.split(" ", 1)
        if drawn.startswith("= "):
            values[name] = calculate(drawn.removeprefix("= "), values)
        else:
            low, high = drawn.split("-")
            values[name] = rng.randint(int(low), int(high))
        if values[name] is None:
            return None
    return values


def split_of(structure, values):
    """The split that a structure with these numbers belongs to, of 20 combinations 1 to validation
    and 1 to test.

    Names, things and wording play no part, nor does the seed: no model is tested on numbers that it
    was trained on in the same kind of problem.
    """
    share = zlib.crc32(f"{structure[0]} {values}".encode()) % 20        # the same on every machine
    return {0: "validation", 1: "test"}.get(share, "train")


# --------------------------------------------------------------------------------------------------
# Words

def write_answer(steps, values, words):
    """The answer's lines, the last one "#### N", or None where a number is not whole or below 1."""
    lines, known = [], dict(values)
    for step in steps:
        calculation, line = step.split(": ", 1)
        name, rule = calculation.split(" = ")
        known[name] = calculate(rule, known)
        if known[name] is None:
            return None
        a, sign, b = rule.split()
        written = f"{known.get(a, a)} {sign} {known.get(b, b)} = {known[name]}"
        lines.append(line.format(**words | values | {name: written}))
    return [*lines, f"#### {known[name]}"]


def word_problem(structure, rng, split=None):
    """One problem of a structure, {"question", "answer"}; `rng` is a random.Random.

    Drawn again until its numbers are good and belong to `split` (None: any). The order of the draws
    decides what a seed gives.
    """
    question, numbers, *steps = structure
    while True:
        values = draw_numbers(numbers, rng)
        if values is None or split not in (None, split_of(structure, values)):
            continue
        words = dict(zip("ABC", rng.sample(NAMES, 3)))
        words |= dict(zip("xy", rng.sample(THINGS, 2)))
        words |= {"box": rng.choice(BOXES), "place": rng.choice(PLACES)}
        lines = write_answer(steps, values, words)
        if lines is None:
            continue
        wording = re.sub(r"\[(.*?)\]", lambda found: rng.choice(found[1].split("|")), question)
        return {"question": wording.format(**words, **values), "answer": "\n".join(lines)}


class WordProblems:
    """Row i of an endless table, the same for the same seed on every machine.

    split        "train", "validation" or "test"; see `split_of`
    structures   the kinds of problems

    >>> WordProblems(0, "validation")[0]["question"]
    'Hugo has $40 and buys 3 tickets for $4 each. How many dollars does Hugo have left?'
    >>> print(WordProblems(0, "validation")[0]["answer"])
    The tickets cost 3 * 4 = 12 dollars.
    After paying Hugo has 40 - 12 = 28 dollars.
    #### 28
    """

    def __init__(self, seed, split="train", structures=STRUCTURES):
        assert split in ("train", "validation", "test"), split
        self.seed, self.split, self.structures = seed, split, structures

    def __len__(self):
        return 1_000_000            # what counts as an epoch; rows are made when asked for

    def __getitem__(self, i):
        rng = random.Random(f"{self.split}/{self.seed}/{i}")
        return word_problem(rng.choice(self.structures), rng, self.split)
