"""
Why ground truth as labels fails: one question, two equally good answers, and two ways to learn
several tokens at once.

    python -m studies.clash             # three short trainings of the tiny model, a few minutes

    Ava has 7 apples and 5 books.       "7 apples and 5 books"  or
    What does Ava have?                 "5 books and 7 apples"

The tiny model first learns to answer so, each order half the time (k = 1, ordinary training). From
there it learns to write several tokens per pass, once with the text itself as labels and once from
its teacher. Slot 1 may say 7 or 5, slot 2 may say apples or books. Labels taken from the text teach
each slot what is likely there *by itself*, and nothing says that 7 goes with apples. The teacher
reads what slot 1 has written, so it knows.

Counted over unseen questions: how many first chunks of an answer, all slots greedy, belong
together. OUT/clash.md has the table, OUT/clash.json what was counted.
"""
import json
import random

from common import cli
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import write_json, write_text
from common.hub import DEFAULT_MODEL, resolve
from common.machine import machine, pick_device, pick_dtype
from common.wordproblems import NAMES, THINGS
from heads import load_heads
from sample import generate, load
from studies import keep_settings, run_script
from studies.viewer import passes_of

TARGETS = {"ground truth as labels": "ground-truth", "the teacher": "hard"}
BATCH = 32                      # rows of a training step


def rows_of(seed, count):
    """`count` rows of {"question", "answer", "other"}: the answer in one order, drawn by a coin,
    and in the other."""
    rng, rows = random.Random(f"clash/{seed}"), []
    for _ in range(count):
        name = rng.choice(NAMES)
        (a, b), (x, y) = rng.sample(range(2, 10), 2), rng.sample(THINGS, 2)
        orders = [f"{a} {x} and {b} {y}", f"{b} {y} and {a} {x}"]
        rng.shuffle(orders)
        question = f"{name} has {a} {x} and {b} {y}. What does {name} have?"
        rows.append({"question": question, "answer": orders[0], "other": orders[1]})
    return rows


def measure(folder, rows, k, device, dtype):
    """A dict of: the share of first chunks that begin one of the two answers, the first few chunks,
    what each slot of the first row held likely, and a question with a chunk that fits neither."""
    model, tokenizer, trained, _ = load(folder, device, dtype)
    prompts = [tokenizer.prompt(row["question"], trained["prompt_format"]) for row in rows]
    results = generate(model, tokenizer, prompts, k, max_new_tokens=k)
    chunks = [tokenizer.decode(result.tokens) for result in results]
    good = [row["answer"].startswith(chunk) or row["other"].startswith(chunk)
            for row, chunk in zip(rows, chunks)]
    wrong = None if all(good) else good.index(False)

    (first_pass,) = passes_of(model, prompts[0], results[0], k, tokenizer.mask_id, top=3)
    slots = [[(tokenizer.decode([token]), p) for token, p in slot] for slot in first_pass]
    return {"belong_together": sum(good) / len(good), "chunks": chunks[:8], "slots": slots,
            "a_wrong_one": None if wrong is None else [rows[wrong]["question"], chunks[wrong]]}


def main():
    parser = ArgumentParser(prog="-m studies.clash", description=__doc__)
    add = parser.add_argument
    add("--k", type=int, default=2, help="tokens per pass, fixed (%(default)s)")
    add("--steps", type=int, default=200, help="of each training (%(default)s)")
    add("--limit", type=int, default=200, help="unseen questions (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--model", default=DEFAULT_MODEL, help="start checkpoint (%(default)s)")
    add("--out", default="out-clash", help="folder for runs and results (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, k=2, steps=1, limit=1)
    device = pick_device(args.device)
    if load_heads(resolve(args.model)):                     # before anything is written
        raise InputError(f"{args.model} drafts with heads: this study trains mask tokens, so start "
                         "from what its heads were trained on")
    dtype = pick_dtype(args.dtype, device)
    cli.spare(args.out, args.resume)
    out = cli.output_folder(args.out)
    settings = {name: getattr(args, name) for name in ("k", "steps", "limit", "seed", "model")}
    keep_settings(out, settings)

    # --- as many rows as are read: what comes round again is learned by heart, the coin with it
    rows = rows_of(args.seed, BATCH * args.steps + args.limit + 100)
    rows = list({row["question"]: row for row in rows}.values())
    unseen, seen = rows[:args.limit], rows[args.limit:]
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in seen))

    # --- three trainings, each with its own bar: the start, and from there both ways
    def train(name, *flags):
        print(f"\n=== {name}", flush=True)
        run_script(
            "train.py", "--data", out / "rows.jsonl", "--prompt-format", "plain",
            "--out", out / name, "--resume", "--seed", args.seed, "--steps", args.steps,
            "--stride", 1, "--batch-size", BATCH, "--eval-every", 0, "--eval-prompts", 1,
            "--device", args.device, "--dtype", args.dtype, *flags, what=name)
        return out / name

    start = train("start", "--model", args.model, "--k", 1, "--targets", "ground-truth")
    objectives = {}
    for name, targets in TARGETS.items():
        folder = train(targets, "--model", start, "--k", args.k, "--fixed-k", "--targets", targets)
        objectives[name] = measure(folder, unseen, args.k, device, dtype)

    # --- the table: the first question, and the count over all
    lines = [f"> {unseen[0]['question']}\n",
             "| labels | slot 1 | slot 2 | chunks that belong together |", "|---|---|---|---|"]
    for name, own in objectives.items():
        slots = [", ".join(f"{text.strip()} {p:.2f}" for text, p in slot[:2])
                 for slot in own["slots"]]
        share = f"{own['belong_together']:.0%} of {len(unseen)}"
        lines.append(f"| {name} | {slots[0]} | {slots[1]} | {share} |")
    text = "\n".join(lines) + "\n"
    write_json(out / "clash.json", {**vars(args), **machine(device), "objectives": objectives})
    write_text(out / "clash.md", text)
    print("\n" + text)


if __name__ == "__main__":
    cli.run(main, resumes=True)
