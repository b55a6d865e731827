"""
Is the student right when it is sure? Confidence of what it writes, against what its teacher thinks of it.

    python -m extras.confidence --model out-k8 --teacher tiny --out results/confidence-tiny-k8
    python -m extras.confidence --model out-gsm8k --teacher smollm2-135m --data gsm8k --limit 100 --max-new-tokens 160

Held-out questions are answered at a low threshold, so that tokens of little confidence are kept, too. The teacher, the
start checkpoint, reads every answer in one pass and says of each token whether it is what it would have written there.

    calibration   of the tokens that came with a confidence between 0.9 and 0.95, how many are the teacher's choice? Apart
                  for slot 1, an ordinary next-token prediction, and for the slots behind it, where --threshold decides.
                  A user of --threshold 0.9 gets the bins from 0.9 up
    quality       mean confidence of an answer against its mean loss under the teacher, one point per answer (the paper's
                  appendix on confidence and quality), and their correlation

OUT/confidence.json holds both, and every token and answer; extras.figures draws it.
"""
import json
import math
import statistics
from pathlib import Path

from tqdm import tqdm

from eval_gsm8k import load_questions, log_likelihoods
from extras.machine import DTYPES, machine, pick_device, pick_dtype
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, run, write_json
from sample import default_model, generate, load

EDGES = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]


def calibration(tokens):
    """Tokens of {"confidence", "agrees"} -> one dict per non-empty bin of EDGES: how many, their mean confidence, the share
    that agrees, and its standard error."""
    bins = []
    for low, high in zip(EDGES, EDGES[1:]):
        own = [t for t in tokens if low <= t["confidence"] < high or t["confidence"] >= high == EDGES[-1]]
        if own:
            share = statistics.fmean(t["agrees"] for t in own)
            bins.append({"from": low, "to": high, "tokens": len(own), "agrees": share,
                         "confidence": statistics.fmean(t["confidence"] for t in own),
                         "stderr": math.sqrt(share * (1 - share) / len(own))})
    return bins


def correlations(answers):
    """(Pearson's r, Spearman's rank correlation) of mean confidence and mean loss; NaN where one of them is constant."""
    def ranks(values):                                                      # ties share their mean rank
        order = sorted(values)
        return [order.index(v) + (order.count(v) - 1) / 2 for v in values]

    def pearson(x, y):
        try:
            return statistics.correlation(x, y)
        except statistics.StatisticsError:
            return float("nan")

    confidence, loss = [a["confidence"] for a in answers], [a["loss"] for a in answers]
    return pearson(confidence, loss), pearson(ranks(confidence), ranks(loss))


def main():
    parser = ArgumentParser(prog="-m extras.confidence", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", default="wordproblems", help="wordproblems, gsm8k or a JSONL file (%(default)s)")
    add("--limit", type=int, default=200, help="the first N questions (%(default)s)")
    add("--threshold", type=float, default=0.5, help="of the decoding (%(default)s)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add("--seed", type=int, default=0, help="which word problems (%(default)s)")
    add = parser.add_argument_group("models, files, machine").add_argument
    add("--model", help=f"a trained checkpoint (out/latest if there is one, else {DEFAULT_MODEL})")
    add("--teacher", default=DEFAULT_MODEL, help="the checkpoint that it was trained from (%(default)s)")
    add("--out", default="out-confidence", help="folder for confidence.json (%(default)s)")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast (%(default)s)")
    args = parser.parse_args()
    at_least(args, limit=1, max_new_tokens=1, batch_size=1)
    questions, _ = load_questions(args.data, args.limit, 0, args.seed)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.model = args.model or default_model()
    student, tokenizer, trained = load(args.model, device, dtype, args.cache)
    if trained.get("k_max", 1) < 2:
        raise InputError(f"{args.model} predicts one token per pass: train it first (train.py)")
    teacher = load(args.teacher, device, dtype, args.cache)[0]

    prompts = [tokenizer.prompt(row["question"], trained["prompt_format"]) for row in questions]
    tokens, answers = [], []
    for at in tqdm(range(0, len(prompts), args.batch_size), unit="batch", dynamic_ncols=True):
        results = generate(student, prompts[at:at + args.batch_size], trained["k_max"], args.threshold, tokenizer.mask_id,
                           tokenizer.stop_ids, args.max_new_tokens)
        for question, (prompt, result) in enumerate(zip(prompts[at:], results), at):
            log_p, agrees = log_likelihoods(teacher, prompt, result.tokens, tokenizer.mask_id)
            slots = [slot for size in result.chunks for slot in range(1, size + 1)]
            tokens += [{"question": question, "slot": slot, "confidence": confidence, "agrees": agree}
                       for slot, confidence, agree in zip(slots, result.confidences, agrees)]
            answers.append({"question": question, "confidence": statistics.fmean(result.confidences),
                            "loss": -statistics.fmean(log_p), "tokens_per_forward": result.tokens_per_forward})
    pearson, spearman = correlations(answers)
    record = {**vars(args), **machine(device), "pearson": pearson, "spearman": spearman, "answers": answers,
              "calibration": {"slot 1": calibration([t for t in tokens if t["slot"] == 1]),
                              "slots 2 and up": calibration([t for t in tokens if t["slot"] > 1])}}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "confidence.json", record)
    with open(out / "tokens.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(token) + "\n" for token in tokens)
    for name, bins in record["calibration"].items():
        print(f"\n{name}: confidence, tokens, share that is the teacher's own choice")
        for b in bins:
            print(f"  {b['from']:.2f} to {b['to']:.2f}  {b['tokens']:6d}  {b['agrees']:.3f} +- {b['stderr']:.3f}")
    print(f"\n{len(answers)} answers: mean confidence against mean loss under the teacher, r = {pearson:.2f} (by rank "
          f"{spearman:.2f})\n{out}/confidence.json")


if __name__ == "__main__":
    run(main)
