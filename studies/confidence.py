"""
Is the student right when it is sure? Confidence of what it writes, against what its teacher thinks
of it.

    python -m studies.confidence --model out-k8 --teacher tiny --out results/confidence-tiny-k8
    python -m studies.confidence --model out-gsm8k --teacher smollm2-135m --data gsm8k --limit 100

Held-out questions are answered at a low threshold, so that tokens of little confidence are kept,
too. The teacher, the start checkpoint, reads every answer in one pass and says of each token
whether it is what it would have written there.

    tokens    of those that came with a confidence between, say, 0.9 and 0.95: what confidence did
              they have on average (*said*), and which share is the teacher's own choice (*right*)?
              Apart for slot 1, an ordinary next-token prediction, and for the slots behind it. A
              user of --threshold 0.9 gets the bins from 0.9 up
    answers   mean confidence of an answer against its mean loss under the teacher, a point per
              answer, and their correlation

OUT/confidence.json holds both, OUT/tokens.jsonl every token; studies.figures draws them.
"""
import json
import math
import statistics

from tqdm import tqdm

from common import cli
from common.cli import ArgumentParser, InputError
from common.data import load_questions
from common.files import write_json, write_text
from common.hub import DEFAULT_MODEL, default_model
from common.machine import machine, pick_device, pick_dtype
from eval_gsm8k import log_likelihoods
from sample import generate, load

EDGES = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]


def calibration(tokens):
    """Tokens of {"confidence", "agrees"} -> a dict for each of EDGES' bins that is not empty: how
    many, their mean confidence, the share that agrees, and its standard error."""
    bins = []
    for low, high in zip(EDGES, EDGES[1:]):
        last = high == EDGES[-1]                                # it holds its upper edge, too
        own = [t for t in tokens if low <= t["confidence"] and (t["confidence"] < high or last)]
        if own:
            share = statistics.fmean(t["agrees"] for t in own)
            bins.append({"from": low, "to": high, "tokens": len(own), "agrees": share,
                         "confidence": statistics.fmean(t["confidence"] for t in own),
                         "stderr": share_error(share, len(own))})
    return bins


def joined(bins):
    """Several bins as one."""
    n = sum(b["tokens"] for b in bins)
    mean = {key: sum(b["tokens"] * b[key] for b in bins) / n for key in ("agrees", "confidence")}
    return {"from": bins[0]["from"], "to": bins[-1]["to"], "tokens": n, **mean,
            "stderr": share_error(mean["agrees"], n)}


def share_error(share, n):
    """Standard error of a share of `n` tokens, counted as independent."""
    return math.sqrt(share * (1 - share) / n)


def ranks(values):
    """The rank of each value, from 0; ties share their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def pearson(x, y):
    """Correlation of two lists; NaN where one of them is constant."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return float("nan")


def correlations(answers):
    """(Pearson's r, Spearman's rank correlation) of mean confidence and mean loss."""
    confidence, loss = [a["confidence"] for a in answers], [a["loss"] for a in answers]
    return pearson(confidence, loss), pearson(ranks(confidence), ranks(loss))


def judge(number, prompt, result, teacher, mask_id):
    """The teacher's view of one answer, that to question `number`: its tokens, a list of dicts, and
    a dict for the answer as a whole."""
    log_p, agrees = log_likelihoods(teacher, prompt, result.tokens, mask_id)
    slots = [slot for size in result.chunks for slot in range(1, size + 1)]
    tokens = [{"question": number, "slot": slot, "confidence": confidence, "agrees": agree}
              for slot, confidence, agree in zip(slots, result.confidences, agrees)]
    answer = {"question": number, "confidence": statistics.fmean(result.confidences),
              "loss": -statistics.fmean(log_p), "tokens_per_forward": result.tokens_per_forward}
    return tokens, answer


def main():
    parser = ArgumentParser(prog="-m studies.confidence", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", default="wordproblems", help="wordproblems, gsm8k or a JSONL file (%(default)s)")
    add("--limit", type=int, default=200, help="the first N questions (%(default)s)")
    add("--threshold", type=cli.number, default=0.5, help="of the decoding (%(default)s)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add("--seed", type=int, default=0, help="which word problems (%(default)s)")
    add = parser.add_argument_group("models, files, machine").add_argument
    cli.add_model_flag(add)
    add("--teacher", default=DEFAULT_MODEL,
        help="the checkpoint that it was trained from (%(default)s)")
    add("--out", default="out-confidence",
        help="folder for confidence.json and tokens.jsonl (%(default)s)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, limit=1, max_new_tokens=1, batch_size=1, threshold=0)

    # --- questions and models
    questions, _ = load_questions(args.data, args.limit, 0, args.seed)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.model = args.model or default_model()
    student, tokenizer, trained, heads = load(args.model, device, dtype)
    if heads:
        raise InputError(f"{args.model} drafts with heads, and what it emits is its start model's "
                         "own: this study is about mask tokens")
    k_max = trained.get("k_max", 1)
    if k_max < 2:
        raise InputError(f"{args.model} predicts one token per pass: train it first (train.py)")
    teacher = load(args.teacher, device, dtype)[0]
    prompts = [tokenizer.prompt(row["question"], trained["prompt_format"]) for row in questions]
    out = cli.output_folder(args.out)

    # --- answer, and judge
    tokens, answers = [], []
    with tqdm(total=len(prompts), unit="answer", dynamic_ncols=True) as bar:
        for first in range(0, len(prompts), args.batch_size):
            some = prompts[first:first + args.batch_size]
            results = generate(student, tokenizer, some, k_max, args.threshold,
                               args.max_new_tokens)
            for number, (prompt, result) in enumerate(zip(some, results), first):
                own, answer = judge(number, prompt, result, teacher, tokenizer.mask_id)
                tokens += own
                answers.append(answer)
            bar.update(len(some))

    # --- what came out
    r, by_rank = correlations(answers)
    slots = {"slot 1": calibration([t for t in tokens if t["slot"] == 1]),
             "slots 2 and up": calibration([t for t in tokens if t["slot"] > 1])}
    write_json(out / "confidence.json", {
        **vars(args), **machine(device), "pearson": r, "spearman": by_rank, "answers": answers,
        "calibration": slots})
    write_text(out / "tokens.jsonl", "".join(json.dumps(token) + "\n" for token in tokens))
    for name, bins in slots.items():
        print(f"\n{name:<14}  tokens   said   right (the teacher's own choice)")
        for b in bins:
            print(f"  {b['from']:.2f} to {b['to']:.2f}  {b['tokens']:6d}  {b['confidence']:.3f}  "
                  f"{b['agrees']:.3f} +- {b['stderr']:.3f}")
    print(f"\n{len(answers)} answers: mean confidence against mean loss under the teacher, r = "
          f"{r:.2f} (by rank {by_rank:.2f})\n{out}/confidence.json, tokens.jsonl")


if __name__ == "__main__":
    cli.run(main)
