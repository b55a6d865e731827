"""
Why ground truth as labels fails: one question, two equally good answers, and two ways to learn several tokens at once.

    python -m extras.clash                                      # three short trainings of the tiny model, a few minutes

    Ava has 7 apples and 5 books. What does Ava have?           "7 apples and 5 books"  or  "5 books and 7 apples"

The tiny model first learns to answer so, each order half the time (k = 1, ordinary training). From there it learns to
write several tokens per pass, once with the text itself as labels and once from its teacher. Slot 1 may say 7 or 5, slot
2 may say apples or books. Labels taken from the text teach each slot what is likely there *by itself*, and nothing
says that 7 goes with apples. The teacher reads what slot 1 has written, so it knows.

Counted over unseen questions: how many first chunks of an answer, all slots greedy, belong together. OUT/clash.md.
"""
import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import torch

from data import NAMES, THINGS
from extras.machine import machine
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, run, write_json
from sample import generate, load

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"ground truth as labels": "ground-truth", "the teacher": "hard"}


def rows_of(seed, count):
    """`count` rows of {"question", "answer", "other"}: the answer in one order, drawn by a coin, and in the other."""
    rng, rows = random.Random(f"clash/{seed}"), []
    for _ in range(count):
        name, (a, b), (x, y) = rng.choice(NAMES), rng.sample(range(2, 10), 2), rng.sample(THINGS, 2)
        orders = [f"{a} {x} and {b} {y}", f"{b} {y} and {a} {x}"]
        rng.shuffle(orders)
        rows.append({"question": f"{name} has {a} {x} and {b} {y}. What does {name} have?", "answer": orders[0],
                     "other": orders[1]})
    return rows


@torch.inference_mode()
def distributions(model, prompt, k, mask_id, tokenizer, top=3):
    """What every slot of the first pass holds possible: k lists of (text, probability), the most likely first."""
    ids = torch.tensor([prompt + [mask_id] * (k - 1)])
    n = ids.shape[1]
    logits = model(ids, torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())[0, -k:]
    logits[:, mask_id] = -torch.inf
    p, tokens = logits.softmax(dim=-1).topk(top)
    return [[(tokenizer.decode([t]), q) for t, q in zip(*pair)] for pair in zip(tokens.tolist(), p.tolist())]


def measure(folder, rows, k):
    """Over rows: the share of first chunks that begin one of the two answers, and the slots of the first row."""
    model, tokenizer, trained = load(str(folder), torch.device("cpu"), torch.float32)
    prompts = [tokenizer.prompt(row["question"], trained["prompt_format"]) for row in rows]
    results = generate(model, prompts, k, None, tokenizer.mask_id, tokenizer.stop_ids, max_new_tokens=k)
    chunks = [tokenizer.decode(result.tokens) for result in results]
    good = [row["answer"].startswith(chunk) or row["other"].startswith(chunk) for row, chunk in zip(rows, chunks)]
    wrong = next((number for number, ok in enumerate(good) if not ok), 0)
    return {"belong_together": sum(good) / len(good), "chunks": chunks[:8],
            "slots": distributions(model, prompts[0], k, tokenizer.mask_id, tokenizer),
            "a_wrong_one": None if all(good) else [rows[wrong]["question"], chunks[wrong]]}


def main():
    parser = ArgumentParser(prog="-m extras.clash", description=__doc__)
    parser.add_argument("--k", type=int, default=2, help="tokens per pass, fixed (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (%(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="unseen questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="(%(default)s)")
    parser.add_argument("--out", default="out-clash", help="folder for the runs and what came out (%(default)s)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with what is in --out")
    args = parser.parse_args()
    at_least(args, k=2, steps=1, limit=1)
    out = Path(args.out)
    if out.exists() and not args.resume:
        raise InputError(f"{out} exists: add --resume to go on, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    # as many rows as are read: what comes round again is learned by heart, the coin with it
    rows = list({row["question"]: row for row in rows_of(args.seed, 32 * args.steps + args.limit + 100)}.values())
    unseen, seen = rows[:args.limit], rows[args.limit:]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seen), encoding="utf-8")

    def train(name, *flags):
        command = [sys.executable, str(ROOT / "train.py"), "--data", str(out / "rows.jsonl"), "--prompt-format", "plain",
                   "--out", str(out / name), "--seed", str(args.seed), "--steps", str(args.steps), "--stride", "1",
                   "--batch-size", "32", "--eval-every", "0", "--eval-prompts", "1", "--resume", *flags]
        if subprocess.run(command).returncode:
            raise InputError(f"train.py failed for {name}, see above")
        return out / name / "latest"

    start = train("start", "--model", args.model, "--k", "1", "--targets", "ground-truth")
    record = {**vars(args), **machine(torch.device("cpu")), "objectives": {}}
    lines = [f"> {unseen[0]['question']}\n", "| labels | slot 1 | slot 2 | chunks that belong together |",
             "|---|---|---|---|"]
    for name, targets in TARGETS.items():
        own = measure(train(targets, "--model", str(start), "--k", str(args.k), "--fixed-k", "--targets", targets), unseen,
                      args.k)
        record["objectives"][name] = own
        slots = [", ".join(f"{text.strip()} {p:.2f}" for text, p in slot[:2]) for slot in own["slots"]]
        lines.append(f"| {name} | {slots[0]} | {slots[1]} | {own['belong_together']:.0%} of {len(unseen)} |")
    text = "\n".join(lines) + "\n"
    write_json(out / "clash.json", record)
    (out / "clash.md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
