"""
Accuracy beside speed: one checkpoint, a list of decoding strategies, the same questions for each.

    python eval_gsm8k.py --data wordproblems                    # out/latest on 200 unseen word problems
    python eval_gsm8k.py --data gsm8k --model out-gsm8k --baseline smollm2-135m --limit 100
    python eval_gsm8k.py --k 1 2 3 --threshold 0.9 0.8 --out results/mine --resume

Scoring follows EleutherAI's lm-eval to the letter (tasks gsm8k and gsm8k_cot, metric exact_match): `extract_flexible`
takes the last number of a text, `extract_strict` what stands behind the agreed phrase; both are compared as strings
after `normalise`. The paper reports flexible-extract (section on experiments), on all 1319 test questions.

Every question becomes a row of OUT/rows.jsonl as soon as its batch is done, so a killed run goes on with --resume. At
the end: OUT/table.md, OUT/table.json and OUT/pareto.png. Always among the strategies is k = 1 of the same checkpoint,
which all others are compared with, question by question; with --baseline also k = 1 of the start checkpoint.

Under torchrun (extras/parallel.py) the processes take turns by whole batches, so no answer depends on how many they are.
A strategy's seconds are still the sum over its batches, as if one process had decoded them all in a row; but processes
that share a CPU slow each other down. "processes" in table.json says how many there were, all numbers if a run was resumed.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data import WordProblems, read_hub, read_jsonl
from extras import parallel
from extras.machine import DTYPES, machine, pick_device, pick_dtype
from extras.report import shared_prefix, speeds
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, read_json, resolve, run, weight_files, write_json
from sample import Generation, default_model, generate, load, strategy, strategy_name

# Prompt formats beside the tokenizer's own two, "plain" and "chat": lm-eval's gsm8k_cot and gsm8k_cot_zeroshot
QA_FORMATS = {"qa": "Q: {question}\nA:", "qa-step": "Q: {question}\nA: Let's think step by step."}
QA_STOPS = ["Q:", "</s>", "<|im_end|>"]


# ----------------------------------------------------------------------------------------------------------------------
# Scoring, lm-eval's rules

STRICT = {"gsm8k": r"#### (\-?[0-9\.\,]+)", "gsm8k_cot": r"The answer is (\-?[0-9\.\,]+)."}     # the last dot: sic
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


def extract_strict(text, task="gsm8k"):
    """The number behind the task's phrase, its first occurrence; "[invalid]" without one."""
    found = re.findall(STRICT[task], text)
    return found[0].strip() if found else "[invalid]"


def extract_flexible(text):
    """The last thing in the text that looks like a number, "..." and "$." included; "[invalid]" without one."""
    found = re.findall(FLEXIBLE, text)
    return next(part for part in found[-1] if part).strip() if found else "[invalid]"


def normalise(text):
    """What exact_match compares: commas and dollar signs out, then all up to "#### ", then one dot at the end."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def gold_of(answer):
    """The number that a worked answer ends with: the line behind "####" (GSM8K, MetaMath), else its last number."""
    return answer.split("####")[-1].strip().split("\n")[0] if "####" in answer else extract_flexible(answer)


def is_right(extracted, gold):
    """exact_match; nothing is right where the gold answer holds no digit."""
    return bool(re.search(r"\d", gold)) and normalise(extracted) == normalise(gold)


def standard_error(hits):
    """Of a mean of 0s and 1s: sqrt(p (1 - p) / (n - 1)); NaN for fewer than two."""
    n, p = len(hits), statistics.fmean(hits)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else float("nan")


def paired_interval(hits, reference):
    """(mean of hits - reference, half width of its 95% interval: 1.96 standard errors) over the same questions."""
    differences = [a - b for a, b in zip(hits, reference)]
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else float("nan")
    return statistics.fmean(differences), half


# ----------------------------------------------------------------------------------------------------------------------
# Questions and prompts

def load_questions(name, limit, shots, seed):
    """(questions, worked examples), lists of {"question", "answer"}. Test splits; the examples come from elsewhere.

    wordproblems: its test split, examples from its training split. gsm8k: the hub's test and train splits. A JSONL file
    has no second split: with --shots its first rows, drawn by `seed`, are the examples and are not asked.
    """
    if name == "wordproblems":
        test, train = WordProblems(seed, "test"), WordProblems(seed, "train")
        return [test[i] for i in range(limit or 200)], [train[i] for i in range(shots)]
    if name == "gsm8k":
        rows, train = read_hub("openai/gsm8k", "main", split="test"), []
        if shots:
            train = random.Random(seed).sample(read_hub("openai/gsm8k", "main"), shots)
    elif Path(name).suffix in (".jsonl", ".json"):
        rows = read_jsonl(name)
        train = random.Random(seed).sample(rows, min(shots, len(rows)))
        rows = [row for row in rows if row not in train]
    else:
        raise InputError(f"no data {name!r}; --data takes wordproblems, gsm8k or a path to a .jsonl file")
    if not rows:
        raise InputError(f"{name} leaves no question to ask")
    return rows[:limit], train


def build_prompt(tokenizer, question, examples, style):
    """Ids of one question behind its worked examples.

    In the Q: A: formats an example ends "The answer is N.", as gsm8k_cot's do; in the others it is the plain row, and
    in "chat" all of it is one user message.
    """
    if style not in QA_FORMATS:
        shots = "".join(f"{row['question']}\n\n{row['answer']}\n\n" for row in examples)
        return tokenizer.prompt(shots + question, style)
    answers = [re.sub(r"#### (.*)$", r"The answer is \1.", row["answer"]) for row in examples]
    shots = "".join(f"Q: {row['question']}\nA: {answer}\n\n" for row, answer in zip(examples, answers))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(shots + QA_FORMATS[style].format(question=question))


# ----------------------------------------------------------------------------------------------------------------------
# One batch of questions under one strategy

@torch.inference_mode()
def log_likelihoods(model, prompt, tokens, mask_id=None):
    """For each of `tokens` behind `prompt`: log p(token), in nats, and whether it is the most likely one. One plain pass.

    prompt, tokens   lists of ids
    mask_id          id that is never a candidate, or None
    returns two lists, of float and of bool
    """
    ids = torch.tensor([prompt + tokens], device=model.device)
    n = ids.shape[1]
    at = (torch.zeros(len(tokens), dtype=torch.long), torch.arange(len(prompt) - 1, n - 1))
    causal = torch.ones(n, n, dtype=torch.bool, device=model.device).tril()
    logits = model(ids, torch.arange(n, device=model.device)[None], causal, at=at).float()     # (tokens, V)
    if mask_id is not None and mask_id < logits.shape[-1]:
        logits[..., mask_id] = -torch.inf
    targets = ids[0, len(prompt):]
    log_p = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
    return log_p.tolist(), (logits.argmax(dim=-1) == targets).tolist()


def score(result, tokenizer, gold, stops, task):
    """The part of a row that says what was answered and whether it is right. Text ends at the first stop string."""
    text = tokenizer.decode(result.tokens)
    for stop in stops:
        text = text.split(stop)[0]
    strict, flexible = extract_strict(text, task), extract_flexible(text)
    return {"text": text, "extracted": flexible, "correct": int(is_right(flexible, gold)),
            "extracted_strict": strict, "correct_strict": int(is_right(strict, gold))}


def as_generation(row):
    """A row's Generation again, for the statistics of extras/report.py."""
    return Generation(tokens=row["tokens"], chunks=row["chunks"], finish=row["finish"], seconds=row["seconds"],
                      prompt_seconds=row["prompt_seconds"])


# ----------------------------------------------------------------------------------------------------------------------
# The table

def summarise(rows):
    """{strategy: list of rows} -> one dict per strategy, in order. Compared with "static 1", which must be there."""
    table, plain = [], rows["static 1"]
    for name, own in rows.items():
        generations, batches = [as_generation(row) for row in own], {}
        for row, generation in zip(own, generations):
            batches.setdefault(row["batch"], []).append(generation)
        hits, tokens = [row["correct"] for row in own], sum(len(row["tokens"]) for row in own)
        per_forward = [g.tokens_per_forward for g in generations]
        whole, decode = speeds(list(batches.values()))
        entry = {"strategy": name, "questions": len(own), "accuracy": statistics.fmean(hits), "stderr": standard_error(hits),
                 "accuracy_strict": statistics.fmean(row["correct_strict"] for row in own),
                 "tokens_per_forward": statistics.fmean(per_forward),
                 "tokens_per_forward_std": statistics.stdev(per_forward) if len(own) > 1 else float("nan"),
                 "tokens_per_second": whole, "tokens_per_second_decoding": decode,
                 "seconds": sum(max(g.seconds for g in batch) for batch in batches.values()),
                 "cut_off": statistics.fmean(row["finish"] == "length" for row in own)}
        if name != "start, k = 1":
            shared = sum(shared_prefix(a["tokens"], b["tokens"]) for a, b in zip(own, plain))
            entry |= {"difference": paired_interval(hits, [row["correct"] for row in plain]),
                      "identical_text": statistics.fmean(a["tokens"] == b["tokens"] for a, b in zip(own, plain)),
                      "shared_prefix": shared / sum(len(row["tokens"]) for row in plain)}
        if own[0]["start_loss"] is not None:
            entry["start_loss"] = sum(row["start_loss"] for row in own) / tokens
        table.append(entry)
    reference = next(entry["seconds"] for entry in table if entry["strategy"] == "static 1")
    for entry in table:
        entry["speed_up"] = reference / entry["seconds"]
    return table


def markdown(table):
    """The table for people. Accuracy in percent +- standard error; the difference with its paired 95% interval."""
    lines = ["| decoding | accuracy | vs k = 1 | tokens per forward | tokens/s (decoding) | time vs k = 1 | cut off "
             "| same text | before first difference | loss under start |", "|" + "---|" * 10]
    for e in table:
        difference = "{:+.1f} +- {:.1f}".format(*(100 * x for x in e["difference"])) if "difference" in e else ""
        lines.append(
            f"| {e['strategy']} | {100 * e['accuracy']:.1f} +- {100 * e['stderr']:.1f} | {difference} | "
            f"{e['tokens_per_forward']:.2f} +- {e['tokens_per_forward_std']:.2f} | {e['tokens_per_second']:.1f} "
            f"({e['tokens_per_second_decoding']:.1f}) | {e['speed_up']:.2f}x | {100 * e['cut_off']:.0f}% | "
            + (f"{100 * e['identical_text']:.0f}% | {100 * e['shared_prefix']:.0f}%" if "identical_text" in e else " | ")
            + (f" | {e['start_loss']:.3f} |" if "start_loss" in e else " | |"))
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Rows on disk

def fingerprint(folder):
    """Tells checkpoints apart: a hash over names, sizes and the first and last megabyte of the weight files."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as handle:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + handle.read(2 ** 20))
            handle.seek(-min(2 ** 20, file.stat().st_size), os.SEEK_END)
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def read_rows(path):
    """{(strategy, batch): its rows} of the whole batches in `path`. The first line is not a row: it holds the settings."""
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            row = json.loads(line)
        except ValueError:                                              # the line that a killed run was writing
            continue
        kept.setdefault((row["strategy"], row["batch"]), []).append(row)
    return {key: batch for key, batch in kept.items() if len(batch) == batch[0]["batch_rows"]}


def open_rows(path, settings, resume):
    """The file of rows, with the whole batches that an earlier run left in it, open to append more: one for all processes.

    Raises InputError if the file exists without --resume, or holds other settings.
    """
    kept = {}
    if path.exists():
        if not resume:
            raise InputError(f"{path} exists: add --resume to go on, or choose another --out")
        with open(path, encoding="utf-8") as file:
            was = json.loads(file.readline() or "{}")
        changed = [key for key in settings if was.get(key) != settings[key]]
        if changed:
            raise InputError(f"{path} was made with {changed[0]} {was.get(changed[0])}, not {settings[changed[0]]}: "
                             "choose another --out")
        kept = read_rows(path)
    # Every process writes the new file: where the disk refuses, all of them stop, and none waits for the others
    temporary = path.with_suffix(f".tmp{parallel.rank_and_world()[0]}")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in [settings, *(row for batch in kept.values() for row in batch)]:
            file.write(json.dumps(row) + "\n")
    parallel.wait()                                                     # until all have looked whether there is an old one
    temporary.replace(path)
    parallel.wait()                                                     # what is appended now is not replaced
    # A batch fits this buffer and goes out as one write behind what is there: no other process gets between its rows
    return open(path, "a", buffering=2 ** 26, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------

def get_args():
    parser = ArgumentParser(prog="eval_gsm8k.py", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", help="gsm8k (hub, test split), wordproblems (unseen ones) or a JSONL file (gsm8k; wordproblems for the "
        "tiny model and what was trained on them)")
    add("--limit", type=int, help="only the first N questions (all; 200 word problems)")
    add("--shots", type=int, default=0, help="worked examples in front of each question (%(default)s)")
    add("--prompt-format", choices=["plain", "chat", *QA_FORMATS], help="default: what the checkpoint was trained with")
    add("--stop", action="append", help="a string that ends an answer; may be given several times (none; in the qa "
        "formats: " + " ".join(QA_STOPS) + ")")
    add("--seed", type=int, default=0, help="which word problems, which examples (%(default)s)")
    add = parser.add_argument_group("decoding strategies").add_argument
    add("--k", type=int, nargs="+", help="static k, one or several (1 to 5, up to k_max, where --threshold is absent too)")
    add("--threshold", type=float, nargs="+", help="adaptive, one or several (0.99 0.95 0.9 0.8 0.7 0.6)")
    add("--lossless", action=argparse.BooleanOptionalAction, default=False, help="also lossless decoding, up to k_max")
    add("--narrow", action=argparse.BooleanOptionalAction, default=False, help="also its narrow form")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add = parser.add_argument_group("models, files, machine").add_argument
    add("--model", help=f"a trained checkpoint (out/latest if there is one, else {DEFAULT_MODEL})")
    add("--baseline", help="the start checkpoint: its own k = 1, and the loss of every text under it")
    add("--out", default="out-eval", help="folder for rows, table and plot (%(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with what is in --out")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast (%(default)s)")
    args = parser.parse_args()
    at_least(args, limit=1, max_new_tokens=1, batch_size=1, shots=0)
    if "" in (args.stop or []):
        raise InputError("--stop must not be empty")
    return args


def main():
    args = get_args()
    device = parallel.join(pick_device(args.device))
    rank, world = parallel.rank_and_world()
    dtype = pick_dtype(args.dtype, device)
    name = args.model or default_model()
    trained = read_json(resolve(name, args.cache) / "config.json").get("nanomtp", {})
    if args.data is None:
        args.data = "wordproblems" if "wordproblems" == trained.get("data") or name == DEFAULT_MODEL else "gsm8k"
    questions, examples = load_questions(args.data, args.limit, args.shots, args.seed)
    model, tokenizer, _ = load(name, device, dtype, args.cache)
    k_max = trained.get("k_max", 1)
    style = args.prompt_format or trained.get("prompt_format") or ("chat" if tokenizer.chat else "plain")
    stops = args.stop if args.stop is not None else QA_STOPS if style in QA_FORMATS else []
    task = "gsm8k_cot" if style in QA_FORMATS else "gsm8k"
    prompts = [build_prompt(tokenizer, row["question"], examples, style) for row in questions]
    golds = [gold_of(row["answer"]) for row in questions]
    prose = sum(not is_right(gold, gold) for gold in golds)
    if prose:
        print(f"note: {prose} of {len(golds)} gold answers hold no number, and never count as right. What such rows tell is "
              "in the columns on their text: the same as with k = 1, and its loss under --baseline")

    # --- strategies: (name, model, k, threshold); k = 1 always comes first, all others are compared with it
    ks, thresholds = args.k or [], args.threshold or []
    if not ks and not thresholds:
        ks = range(1, min(5, k_max) + 1)
        thresholds = [0.99, 0.95, 0.9, 0.8, 0.7, 0.6] if k_max > 1 else []
    ways = [(1, None, None)] + [(*strategy(k, None, k_max), None) for k in ks if k != 1]
    ways += [(*strategy(None, threshold, k_max), None) for threshold in thresholds]
    ways += [(k_max, None, form) for form, wanted in (("wide", args.lossless), ("narrow", args.narrow)) if wanted]
    plan = [(strategy_name(*way), model, *way) for way in dict.fromkeys(ways)]
    start = load(args.baseline, device, dtype, args.cache)[0] if args.baseline else None
    if start is not None:
        plan.insert(0, ("start, k = 1", start, 1, None, None))

    settings = {"checkpoint": fingerprint(resolve(name, args.cache)), "data": args.data, "questions": len(questions),
                "shots": args.shots, "prompt_format": style, "stop": stops, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "dtype": str(dtype).split(".")[1],
                "baseline": fingerprint(resolve(args.baseline, args.cache)) if args.baseline else None}
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open_rows(out / "rows.jsonl", settings, args.resume)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    print(f"{len(questions)} questions, {len(plan)} strategies; the first prompt:\n\n{tokenizer.decode(prompts[0])}\n")

    # --- ask everything; with N processes it is each one's turn at every N-th batch
    turns = [(*way, at) for way in plan for at in range(0, len(prompts), args.batch_size)]
    done, rows = read_rows(out / "rows.jsonl"), {strategy: [] for strategy, *_ in plan}
    mine = sum(len(prompts[at:at + args.batch_size]) for *_, at in turns[rank::world])
    bar = tqdm(total=mine, unit="answer", dynamic_ncols=True, disable=rank > 0)
    for strategy_, writer, k, threshold, lossless, at in turns[rank::world]:
        batch = done.get((strategy_, at))
        if batch is None:
            some = prompts[at:at + args.batch_size]
            mask_id = None if writer is start else tokenizer.mask_id            # the start's matrix may lack its row
            results = generate(writer, some, k, threshold, mask_id, tokenizer.stop_ids,
                               args.max_new_tokens, stops, tokenizer.decode, lossless=lossless)
            batch = [{"id": at + i, "strategy": strategy_, "batch": at, "batch_rows": len(some), "processes": world,
                      **{key: value for key, value in asdict(result).items() if key != "confidences"},
                      **score(result, tokenizer, golds[at + i], stops, task), "gold": golds[at + i],
                      "start_loss": start and -sum(log_likelihoods(start, some[i], result.tokens)[0])}
                     for i, result in enumerate(results)]
            file.write("".join(json.dumps(row) + "\n" for row in batch))
            file.flush()
        rows[strategy_] += batch
        bar.update(len(batch))
        hits, all_rows = [row["correct"] for row in rows[strategy_]], rows[strategy_]
        per_forward = statistics.fmean(len(row["tokens"]) / len(row["chunks"]) for row in all_rows)
        bar.set_postfix_str(f"{strategy_}: {statistics.fmean(hits):.1%} right, {per_forward:.2f} tokens per forward")
    bar.close()
    file.close()

    parallel.wait()                                                             # until all rows are on disk
    if rank == 0:
        done = read_rows(out / "rows.jsonl")
        rows = {name: [row for at in range(0, len(prompts), args.batch_size) for row in done[name, at]] for name in rows}
        table = summarise(rows)
        processes = sorted({row.get("processes", 1) for batch in done.values() for row in batch})
        write_json(out / "table.json", {"settings": settings, **machine(device), "processes": processes, "table": table})
        (out / "table.md").write_text(markdown(table), encoding="utf-8")
        from extras.figures import pareto_plot  # matplotlib takes a second to load
        pareto_plot(table).savefig(out / "pareto.png", dpi=150)
        print(f"\n{markdown(table)}\n{out}/table.md, table.json, pareto.png, rows.jsonl")
    parallel.leave()


if __name__ == "__main__":
    run(main)
