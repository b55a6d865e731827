"""
Why ground truth as labels fails: one question, two equally good answers, and two ways to learn
several tokens at once.

    python -m studies.clash             # nine trainings of the tiny model, half an hour

    Ava has 7 apples and 5 books.       "7 apples and 5 books"  or
    What does Ava have?                 "5 books and 7 apples"

The tiny model first learns to answer so, each order half the time (k = 1, ordinary training). From
there it learns to write several tokens per pass, once with the text itself as labels and once from
its teacher; all of it once for each seed. Slot 1 may say 7 or 5, slot 2 may say apples or books.
Labels taken from the text teach each slot what is likely there *by itself*, and nothing says that 7
goes with apples. The teacher reads what slot 1 has written, so it knows.

Counted over unseen questions, the first chunk of each answer, all slots greedy:

    together    it begins one of the two answers
    clash       it does not, but each of its tokens stands there in one or the other: "7 books"
    foreign     a token that stands there in neither: "7 stamps"

OUT/clash.md has the table, OUT/clash.json every chunk.
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
KINDS = ("together", "clash", "foreign")
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


def kind_of(chunk, answers):
    """"together", "clash" or "foreign": see above.

    chunk, answers   a list of token ids, and both answers as such lists
    """
    if any(answer[:len(chunk)] == chunk for answer in answers):
        return "together"
    stands = all(token in tokens for token, *tokens in zip(chunk, *answers))
    return "clash" if stands and all(len(answer) >= len(chunk) for answer in answers) else "foreign"


def measure(folder, rows, k, device, dtype):
    """A dict of: how many first chunks are of which kind, every one of them, and what each slot of
    the first row held likely."""
    model, tokenizer, trained, _ = load(folder, device, dtype)
    prompts = [tokenizer.prompt(row["question"], trained["prompt_format"]) for row in rows]
    results = generate(model, tokenizer, prompts, k, max_new_tokens=k)
    kinds = [kind_of(result.tokens, [tokenizer.response(row[key]) for key in ("answer", "other")])
             for row, result in zip(rows, results)]
    chunks = [{"chunk": tokenizer.decode(result.tokens), "kind": kind}
              for result, kind in zip(results, kinds)]

    (first_pass,) = passes_of(model, prompts[0], results[0], k, tokenizer.mask_id, top=3)
    slots = [[(tokenizer.decode([token]), p) for token, p in slot] for slot in first_pass]
    return {kind: kinds.count(kind) for kind in KINDS} | {"slots": slots, "chunks": chunks}


def trainings(seed, args, out):
    """The start and from there both ways, each with its own bar, in folders of `out`. Returns the
    unseen rows and {labels: folder}."""
    # about as many rows as a training reads: what comes round again and again is learned by heart,
    # the coin with it. (The second trainings, both of them, read the start's rows once more.)
    rows = rows_of(seed, BATCH * args.steps + args.limit + 100)
    rows = list({row["question"]: row for row in rows}.values())
    unseen, seen = rows[:args.limit], rows[args.limit:]
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in seen))

    def train(name, *flags):
        print(f"\n=== seed {seed}, {name}", flush=True)
        run_script(
            "train.py", "--data", out / "rows.jsonl", "--prompt-format", "plain",
            "--out", out / name, "--resume", "--seed", seed, "--steps", args.steps,
            "--stride", 1, "--batch-size", BATCH, "--eval-every", 0, "--eval-prompts", 1,
            "--device", args.device, "--dtype", args.dtype, *flags, what=name)
        return out / name

    start = train("start", "--model", args.model, "--k", 1, "--targets", "ground-truth")
    return unseen, {
        labels: train(targets, "--model", start, "--k", args.k, "--fixed-k", "--targets", targets)
        for labels, targets in TARGETS.items()}


def markdown(seeds):
    """The table: what every seed counted, "3, 5, 4"."""
    lines = [f"| labels | {' | '.join(KINDS)} |", "|" + "---|" * (1 + len(KINDS))]
    for labels in TARGETS:
        counts = [", ".join(str(own["objectives"][labels][kind]) for own in seeds)
                  for kind in KINDS]
        lines.append(f"| {labels} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = ArgumentParser(prog="-m studies.clash", description=__doc__)
    add = parser.add_argument
    add("--k", type=int, default=2, help="tokens per pass, fixed (%(default)s)")
    add("--steps", type=int, default=800, help="of each training (%(default)s)")
    add("--limit", type=int, default=200, help="unseen questions, for each seed (%(default)s)")
    add("--seeds", type=int, default=3, help="how many, from 0 on (%(default)s)")
    add("--model", default=DEFAULT_MODEL, help="start checkpoint (%(default)s)")
    add("--out", default="out-clash", help="folder for runs and results (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, k=2, steps=1, limit=1, seeds=1)
    device = pick_device(args.device)
    if load_heads(resolve(args.model)):                     # before anything is written
        raise InputError(f"{args.model} drafts with heads: this study trains mask tokens, so start "
                         "from what its heads were trained on")
    dtype = pick_dtype(args.dtype, device)
    cli.spare(args.out, args.resume)
    out = cli.output_folder(args.out)
    keep_settings(out, {name: getattr(args, name) for name in ("k", "steps", "limit", "model")})

    seeds = []
    for seed in range(args.seeds):
        unseen, folders = trainings(seed, args, cli.output_folder(out / f"seed-{seed}"))
        seeds.append({"seed": seed, "first_question": unseen[0], "objectives": {
            labels: measure(folder, unseen, args.k, device, dtype)
            for labels, folder in folders.items()}})

    text = (f"{args.k} tokens a chunk; of {args.limit} unseen questions for each of {args.seeds} "
            f"seeds\n\n{markdown(seeds)}")
    write_json(out / "clash.json", {**vars(args), **machine(device), "each_seed": seeds})
    write_text(out / "clash.md", text)
    print("\n" + text)


if __name__ == "__main__":
    cli.run(main, resumes=True)
