"""
Accuracy beside speed: one checkpoint, a list of decoding strategies, the same questions for each.

    python eval_gsm8k.py --data wordproblems                    # 200 unseen word problems
    python eval_gsm8k.py --data gsm8k --model out-gsm8k --baseline smollm2-135m --limit 100
    python eval_gsm8k.py --k 1 2 3 --threshold 0.9 0.8 --out results/mine --resume

Scoring follows EleutherAI's lm-eval to the letter (common/scoring.py). The paper reports its
flexible-extract on all 1319 test questions of GSM8K.

Always among the strategies is k = 1 of the same checkpoint, which all others are compared with,
question by question; with --baseline also k = 1 of the start checkpoint. Strategies take turns
within each batch of questions, and who begins changes, so that a slow minute of the machine hits
all of them alike. Speed-up is a ratio of seconds for the same questions, k = 1's over one's own, in
each of five rounds (fifths of the batches; of fewer batches, each); the table has the median and
the range.

Every answer becomes a row of OUT/rows.jsonl as soon as its batch is done, so a killed run goes on
with --resume. At the end: OUT/table.md, OUT/table.json and OUT/pareto.png.

Under torchrun (common/parallel.py) the processes take turns by whole batches, so no answer depends
on how many they are. A strategy's seconds are still the sum over its batches, as if one process had
decoded them all in a row; but processes that share a CPU slow each other down.
"""
import json
import statistics
from dataclasses import asdict
from typing import NamedTuple

from common import cli              # before torch: Ctrl-C while that is loading ends quietly

import torch

from common import parallel
from common.answers import Answer, check_prompts
from common.cli import SWITCH, ArgumentParser, InputError
from common.data import default_questions, is_same_file, load_questions
from common.files import read_json, read_note, write_json, write_text
from common.hub import default_model, resolve
from common.machine import machine, pick_device, pick_dtype
from common.progress import Progress
from common.records import compact, fingerprint, json_lines, open_rows, read_rows
from common.report import speeds
from common.scoring import (
    QA_FORMATS, QA_STOPS, build_prompt, extract_flexible, extract_strict, gold_of, is_right,
    paired_interval, standard_error)
from common.tokenizer import Tokenizer
from heads import Heads
from model import Transformer
from sample import Strategy, choose_strategy, load
from speculate import decode

PLAIN = Strategy(k=1)                       # what everything is compared with
START = "start, k = 1"                      # the row of --baseline
ROUNDS = 5                                  # parts of the batches, for the ratios of seconds


# --------------------------------------------------------------------------------------------------
# One batch of questions under one strategy

class Contender(NamedTuple):
    name: str
    model: Transformer
    strategy: Strategy
    heads: Heads | None = None


class Setting(NamedTuple):
    """What is the same for all contenders."""
    tokenizer: Tokenizer
    start: Transformer | None               # --baseline, which also judges every text
    max_new_tokens: int
    stops: list                             # strings that end an answer
    task: str                               # of lm-eval, for the strict extraction


@torch.inference_mode()
def log_likelihoods(model, prompt, tokens, mask_id=None):
    """Of each of `tokens` behind `prompt`: log p(token), nats, and is it the most likely one?

    prompt, tokens   lists of ids; one plain pass over both
    mask_id          id that is never a candidate, or None
    returns two lists, of float and of bool; the second is what studies.confidence asks for
    """
    ids = torch.tensor([prompt + tokens], device=model.device)
    n = ids.shape[1]
    before = torch.arange(len(prompt) - 1, n - 1)                           # each one's predictor
    causal = torch.ones(n, n, dtype=torch.bool, device=model.device).tril()
    positions = torch.arange(n, device=model.device)[None]
    logits = model(ids, positions, causal, at=(torch.zeros_like(before), before)).float()
    if mask_id is not None and mask_id < logits.shape[-1]:
        logits[..., mask_id] = -torch.inf                                   # (tokens, V)
    targets = ids[0, len(prompt):]
    log_p = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
    return log_p.tolist(), (logits.argmax(dim=-1) == targets).tolist()


def score(tokens, tokenizer, gold, stops, task):
    """What was answered, and whether it is right. The text ends at the first stop string."""
    text = tokenizer.decode(tokens)
    for stop in stops:
        text = text.split(stop)[0]
    strict, flexible = extract_strict(text, task), extract_flexible(text)
    return {"text": text, "extracted": flexible, "correct": int(is_right(flexible, gold)),
            "extracted_strict": strict, "correct_strict": int(is_right(strict, gold))}


def ask(contender, prompts, golds, first, setting):
    """Answer a batch of questions, the first of which has number `first`: a row for each."""
    tokenizer, start = setting.tokenizer, setting.start
    results = decode(contender.model, tokenizer, prompts, contender.strategy, contender.heads,
                     max_new_tokens=setting.max_new_tokens, stop_strings=setting.stops)
    rows = []
    for i, (prompt, gold, result) in enumerate(zip(prompts, golds, results)):
        row = {"id": first + i, "strategy": contender.name, "batch": first,
               "batch_rows": len(prompts), "processes": parallel.rank_and_world()[1]}
        row |= {key: value for key, value in asdict(result).items() if key != "confidences"}
        row |= score(result.tokens, tokenizer, gold, setting.stops, setting.task) | {"gold": gold}
        row["start_loss"] = start and -sum(log_likelihoods(start, prompt, result.tokens)[0])
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# The table

def as_answer(row):
    """A compact row's Answer again, for the statistics of common/report.py: as many tokens, and
    none of them known."""
    keys = ("chunks", "finish", "seconds", "prompt_seconds")
    return Answer(tokens=range(row["tokens"]), **{key: row[key] for key in keys})


def seconds_by_round(batches):
    """Seconds of each of ROUNDS parts of the batches (of every batch, where there are fewer).

    batches   lists of Answers that were decoded together, in the order in which they were
    """
    seconds = [max(answer.seconds for answer in batch) for batch in batches]
    n, rounds = len(batches), min(ROUNDS, len(batches))
    return [sum(seconds[part * n // rounds:(part + 1) * n // rounds]) for part in range(rounds)]


def summarise(rows):
    """{strategy: list of rows} -> one dict per strategy, in order, compared with k = 1's rows.

    Rows are those of rows.jsonl or, all of them, of rows.jsonl.gz (common/records.py): it makes no
    difference. Each list has the same questions in the same order.
    """
    for own in rows.values():
        assert [row["id"] for row in own] == [row["id"] for row in rows[PLAIN.name]]
    rows = {name: [compact(row, plain) for row, plain in zip(own, rows[PLAIN.name])]
            for name, own in rows.items()}
    table, plain = [], rows[PLAIN.name]
    plain_hits, rounds = [row["correct"] for row in plain], {}
    for name, own in rows.items():
        answers = [as_answer(row) for row in own]
        batches = {}
        for row, answer in zip(own, answers):
            batches.setdefault(row["batch"], []).append(answer)
        hits, tokens = [row["correct"] for row in own], sum(row["tokens"] for row in own)
        rates = [answer.tokens_per_forward for answer in answers]
        whole, decoding = speeds(list(batches.values()))
        rounds[name] = seconds_by_round([batches[first] for first in sorted(batches)])
        entry = {
            "strategy": name,
            "questions": len(own),
            "accuracy": statistics.fmean(hits),
            "stderr": standard_error(hits),
            "accuracy_strict": statistics.fmean(row["correct_strict"] for row in own),
            "tokens_per_forward": statistics.fmean(rates),
            "tokens_per_forward_pooled": tokens / sum(answer.passes for answer in answers),
            "tokens": tokens,
            "tokens_per_forward_std": statistics.stdev(rates) if len(own) > 1 else float("nan"),
            "tokens_per_second": whole,
            "tokens_per_second_decoding": decoding,
            "seconds": sum(rounds[name]),
            "cut_off": statistics.fmean(row["finish"] == "length" for row in own),
            "difference": paired_interval(hits, plain_hits),
            "identical_text": statistics.fmean(
                row["hash"] == base["hash"] for row, base in zip(own, plain)),
            "shared_prefix": sum(row["shared_prefix"] for row in own) / sum(
                row["tokens"] for row in plain),
        }
        if own[0]["start_loss"] is not None:
            entry["start_loss"] = sum(row["start_loss"] for row in own) / tokens
        table.append(entry)
    for entry in table:
        entry["speed_ups"] = [theirs / own for theirs, own in zip(
            rounds[PLAIN.name], rounds[entry["strategy"]])]
        entry["speed_up"] = statistics.median(entry["speed_ups"])
    return table


LEGEND = """\
accuracy: percent +- standard error; vs k = 1: paired difference +- 95% interval; tokens per
forward: mean +- standard deviation over questions, in brackets pooled (all tokens / all passes);
tokens/s: of what is written, in brackets without the prompt's pass; speed-up: seconds of k = 1 /
own seconds for the same questions, all answers to their end, median (range) of rounds; cut off:
answers that reached --max-new-tokens; same text: as k = 1's; before first difference: share of k =
1's tokens; loss under start: of the text, nats per token, where --baseline names it.
"""


def length_notes(table):
    """A line for each strategy that writes far more or less than k = 1: its time tells little."""
    plain = next(entry["tokens"] for entry in table if entry["strategy"] == PLAIN.name)
    return "".join(
        f"note: {entry['strategy']} wrote {entry['tokens'] / plain:.0%} of k = 1's tokens, so its "
        "speed-up is not that of the decoding\n"
        for entry in table if not 0.9 < entry["tokens"] / plain < 1.1)


def markdown(table):
    """The table for people, as LEGEND has it."""
    lines = ["| decoding | accuracy | vs k = 1 | tokens per forward (pooled) "
             "| new tokens/s (after the prompt) | speed-up (rounds) | cut off | same text "
             "| before first difference | loss under start |",
             "|" + "---|" * 10]
    for e in table:
        cells = [
            e["strategy"],
            f"{100 * e['accuracy']:.1f} +- {100 * e['stderr']:.1f}",
            "{:+.1f} +- {:.1f}".format(*(100 * x for x in e["difference"])),
            "{:.2f} +- {:.2f} ({:.2f})".format(
                e["tokens_per_forward"], e["tokens_per_forward_std"],
                e["tokens_per_forward_pooled"]),
            f"{e['tokens_per_second']:.1f} ({e['tokens_per_second_decoding']:.1f})",
            f"{e['speed_up']:.2f}x ({min(e['speed_ups']):.2f} to {max(e['speed_ups']):.2f})",
            f"{e['cut_off']:.0%}",
            f"{e['identical_text']:.0%}",
            f"{e['shared_prefix']:.0%}",
            f"{e['start_loss']:.3f}" if "start_loss" in e else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(name, out, names, firsts, settings, device):
    """Make table and plot from the rows on disk, and print the table.

    names    of the contenders, in order; firsts   numbers of the batches' first questions
    """
    done = read_rows(out / "rows.jsonl")
    table = summarise({way: [row for first in firsts for row in done[way, first]]
                       for way in names})
    processes = sorted({row.get("processes", 1) for batch in done.values() for row in batch})
    pieces = next(json_lines(out / "rows.jsonl", {"pieces"}))["pieces"]
    write_json(out / "table.json", {"model": name, "settings": settings, **machine(device),
                                    "pieces": pieces, "processes": processes, "table": table})
    asked = f"{name}, {settings['data']}, {settings['questions']} questions"
    text = (f"{asked} in batches of {settings['batch_size']}; {machine(device)['device']}, "
            f"{settings['dtype']}\n\n{markdown(table)}\n{LEGEND}{length_notes(table)}")
    write_text(out / "table.md", text)
    from common.plots import pareto_plot                # here: matplotlib takes a second to load
    with cli.writing(out):
        pareto_plot(table, asked).savefig(out / "pareto.png", dpi=150)
    cli.say(f"\n{text}\n{out}/table.md, table.json, pareto.png, rows.jsonl")


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    parser = ArgumentParser(prog="eval_gsm8k.py", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", help="gsm8k (hub, test split), wordproblems (unseen ones) or a JSONL file "
        "(gsm8k; wordproblems for what was trained on them). To choose a threshold by: "
        "wordproblems-validation")
    add("--limit", type=int, help="only the first N questions (all; 200 word problems)")
    add("--shots", type=int, default=0, help="worked examples before each question (%(default)s)")
    cli.add_prompt_format_flag(add, *QA_FORMATS)
    add("--stop", action="append", help="a string that ends an answer; repeatable (none; in the qa "
        "formats: " + " ".join(QA_STOPS) + ")")
    add("--seed", type=int, default=0, help="which problems, which examples (%(default)s)")

    add = parser.add_argument_group("decoding strategies").add_argument
    add("--k", type=int, nargs="+",
        help="static k, one or several (1 to 5, up to k_max, where --threshold is absent too)")
    add("--threshold", type=cli.number, nargs="+",
        help="adaptive, one or several (0.99 0.95 0.9 0.8 0.7 0.6)")
    add("--lossless", action=SWITCH, default=False, help="also lossless decoding, up to k_max")
    add("--narrow", action=SWITCH, default=False, help="also its narrow form")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")

    add = parser.add_argument_group("models, files, machine").add_argument
    cli.add_model_flag(add)
    add("--baseline", help="the start checkpoint: its own k = 1, and every text's loss under it")
    add("--out", default="out-eval", help="folder for rows, table and plot (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, limit=1, max_new_tokens=1, batch_size=1, shots=0)
    if "" in (args.stop or []):
        raise InputError("--stop must not be empty")
    return args


def strategies(args, k_max, heads):
    """What to compare, k = 1 first: a list of different Strategies."""
    ks, thresholds = args.k or [], args.threshold or []
    if heads:                               # their drafts are always verified
        ways = [PLAIN] + [choose_strategy(k, None, k_max, heads=heads) for k in ks if k != 1]
        ways += [choose_strategy(None, threshold, k_max, heads=heads) for threshold in thresholds]
        return list(dict.fromkeys(ways + [choose_strategy(None, None, k_max, heads=heads)]))
    if not ks and not thresholds:
        ks = range(1, min(5, k_max) + 1)
        thresholds = [0.99, 0.95, 0.9, 0.8, 0.7, 0.6] if k_max > 1 else []
    ways = [PLAIN] + [choose_strategy(k, None, k_max) for k in ks if k != 1]
    ways += [choose_strategy(None, threshold, k_max) for threshold in thresholds]
    ways += [Strategy(k_max, None, "wide")] * args.lossless
    ways += [Strategy(k_max, None, "narrow")] * args.narrow
    return list(dict.fromkeys(ways))


def main():
    args = get_args()
    device = parallel.join(pick_device(args.device))
    rank, world = parallel.rank_and_world()
    dtype = pick_dtype(args.dtype, device)

    # --- the questions
    name = args.model or default_model()
    trained = read_note(read_json(resolve(name) / "config.json"))
    args.data = args.data or default_questions(name, trained)
    if is_same_file(args.data, trained.get("data")):
        cli.say(f"note: {name} was trained on this very file, all but a few held-out rows: what "
                "follows says little about questions that it has not seen")
    questions, examples = load_questions(args.data, args.limit, args.shots, args.seed)
    model, tokenizer, trained, heads = load(name, device, dtype)
    if heads and args.narrow:
        raise InputError("--narrow is about mask tokens, and this checkpoint drafts with heads: "
                         "leave it out")
    style = args.prompt_format or trained.get("prompt_format") or tokenizer.default_format
    is_qa = style in QA_FORMATS
    stops = args.stop if args.stop is not None else QA_STOPS if is_qa else []
    prompts = [build_prompt(tokenizer, row["question"], examples, style) for row in questions]
    check_prompts(prompts, model)
    golds = [gold_of(row["answer"]) for row in questions]
    prose = sum(not any(c.isdigit() for c in gold) for gold in golds)
    if prose:
        print(f"note: {prose} of {len(golds)} gold answers hold no number, and never count as "
              "right. What such rows tell is in the columns on their text: the same as with k = 1, "
              "and its loss under --baseline")

    # --- the contenders
    start = load(args.baseline, device, dtype)[0] if args.baseline else None
    ways = strategies(args, trained.get("k_max", 1), heads)
    contenders = [Contender(way.name, model, way, heads) for way in ways]
    if start is not None:
        contenders.insert(0, Contender(START, start, PLAIN))
    task = "gsm8k_cot" if is_qa else "gsm8k"
    setting = Setting(tokenizer, start, args.max_new_tokens, stops, task)

    # --- the file of rows: a run that was killed goes on, one with other settings is refused
    settings = {
        "checkpoint": fingerprint(resolve(name)), "data": args.data, "questions": len(questions),
        "shots": args.shots, "prompt_format": style, "stop": stops, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": fingerprint(resolve(args.baseline)) if args.baseline else None,
    }
    out = cli.output_folder(args.out)
    with cli.writing(out):
        file = open_rows(out / "rows.jsonl", settings, machine(device), args.resume)
    done = read_rows(out / "rows.jsonl")
    cli.say(f"{name}, k_max {trained.get('k_max', 1)}: {len(questions)} questions, "
            f"{len(contenders)} strategies; the first prompt:\n\n"
            f"{tokenizer.decode(prompts[0]).strip()}\n")

    # --- a few tokens that do not count: the first passes of a process are slow
    for contender in contenders:
        decode(contender.model, tokenizer, prompts[:1], contender.strategy, contender.heads,
               max_new_tokens=16)

    # --- ask: all strategies about one batch, then about the next, beginning with another one;
    # --- every N-th batch is one rank's
    firsts = range(0, len(prompts), args.batch_size)
    mine = sum(len(prompts[first:first + args.batch_size]) for first in firsts[rank::world])
    total, hits = mine * len(contenders), []
    with file, Progress(total=total, unit="answer", disable=rank > 0) as bar:
        for number, first in enumerate(firsts[rank::world], 1):
            batch, is_done = slice(first, first + args.batch_size), True
            begins = first // args.batch_size % len(contenders)
            for contender in contenders[begins:] + contenders[:begins]:
                rows = done.get((contender.name, first))
                if rows is None:
                    is_done = False
                    rows = ask(contender, prompts[batch], golds[batch], first, setting)
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
                    file.flush()
                bar.update(len(rows))
                if contender.name == PLAIN.name:
                    hits += [row["correct"] for row in rows]
            bar.lap(left=len(firsts[rank::world]) - number, counts=not is_done)
            bar.say(f"{PLAIN.name}: {statistics.fmean(hits):.1%} of {len(hits)} right")

    # --- the table, once all rows are on disk
    parallel.wait()
    if rank == 0:
        report(name, out, names=[contender.name for contender in contenders], firsts=firsts,
               settings=settings, device=device)
    parallel.leave()


if __name__ == "__main__":
    cli.run(main, resumes=True)
