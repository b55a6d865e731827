"""
Decoding speed: ours, beside transformers', with the same weights, questions, threads and machine.

    python -m studies.bench                         # out/latest or tiny-mtp: some minutes
    python -m studies.bench --model smollm2-135m --data gsm8k --batch-size 1 --limit 10
    python -m studies.bench --model out-heads --data questions.jsonl --rounds 20 --batch-size 1

Every contender lives in a process of its own and loads its own copy of the weights. They take
turns, one round each, and another one begins each round (a machine whose speed drifts favours
none), after rounds that do not count. A round is a few questions that eval_gsm8k.py would ask, too,
the next round a few others; in a round all prompts have one length, since transformers would pad.
Timed is what that times: the whole answer, from the prompt to its own end. Ratios are taken round
by round: seconds of k = 1, or of transformers, over one's own for the same questions. Of a
checkpoint with heads, k = 1 is its start model itself, and drafts of 1, 2, ... heads are verified.

Then, for one row: milliseconds per pass by the number of fed tokens, and how near a pass of one
token comes to the time that it takes merely to read weights and cache from memory at the bandwidth
of a plain copy.

OUT/bench.md has the tables, OUT/bench.json every round.
"""
import copy
import multiprocessing
import os
import statistics
import time

import torch
from tqdm import tqdm

from adapters import start_of
from common import cli
from common.cli import ArgumentParser, InputError
from common.data import default_questions, load_questions
from common.files import write_json, write_text
from common.hub import default_model, resolve
from common.machine import dtype_name, machine, peak_memory, pick_device, pick_dtype
from common.tokenizer import Tokenizer
from model import KVCache
from sample import Strategy, load
from speculate import decode
from studies import needs

BASELINE, LOOKUP = "transformers, greedy", "transformers, prompt lookup"
PLAIN = "ours, k = 1"
MEBIBYTE = 2 ** 20
REPEATS = 20                                    # of a pass by itself


# --------------------------------------------------------------------------------------------------
# Contenders. Each answers a batch of prompts to their end and returns (tokens of each row, the stop
# token included; seconds; passes, summed over rows)

def decode_ours(model, tokenizer, heads, prompts, count, strategy):
    results = decode(model, tokenizer, prompts, strategy, heads, max_new_tokens=count)
    return ([result.tokens for result in results], max(result.seconds for result in results),
            sum(result.passes for result in results))


def decode_theirs(model, stop_ids, prompts, count, **settings):
    generation = copy.deepcopy(model.generation_config)
    generation.do_sample, generation.max_new_tokens = False, count
    generation.eos_token_id, generation.pad_token_id = sorted(stop_ids), min(stop_ids)
    for name, value in settings.items():
        setattr(generation, name, value)
    passes = []

    def note_pass(ids, scores, **_):                            # called after every pass
        passes.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    began = time.perf_counter()
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids),
                            generation_config=generation, stopping_criteria=[note_pass])
    rows = [up_to_stop(row, stop_ids) for row in output[:, len(prompts[0]):].tolist()]
    seconds = time.perf_counter() - began
    return rows, seconds, len(passes) if len(rows) == 1 else sum(map(len, rows))


def up_to_stop(tokens, stop_ids):
    """Without the padding behind the first stop token."""
    for n, token in enumerate(tokens, 1):
        if token in stop_ids:
            return tokens[:n]
    return tokens


def answer_all(answer, batches):
    """A round: `answer` is one of the above for each batch. Returns (texts, seconds, passes)."""
    texts, seconds, passes = zip(*map(answer, batches))
    return sum(texts, []), sum(seconds), sum(passes)


def contender(pipe, name, strategy, args):
    """What runs in a contender's process: load, then answer whatever prompts come.

    strategy   one of ours, or None: transformers
    Sends (texts, seconds, passes, peak memory in bytes) of a round, or a string: why there is none.
    """
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        count = args.max_new_tokens
        if strategy is None:
            from transformers import AutoModelForCausalLM

            folder = resolve(args.model)
            stop_ids = Tokenizer(folder).stop_ids
            if (folder / "adapters" / "adapter_config.json").exists():
                folder = start_of(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model = model.to(device).eval()
            settings = {"prompt_lookup_num_tokens": 10} if name == LOOKUP else {}
        else:
            model, tokenizer, _, heads = load(args.model, device, dtype)

        def answer(prompts):
            if strategy is None:
                return decode_theirs(model, stop_ids, prompts, count, **settings)
            return decode_ours(model, tokenizer, heads, prompts, count, strategy)

        pipe.send("ready")
        while (batches := pipe.recv()) != "stop":
            pipe.send((*answer_all(answer, batches), peak_memory(device) * 1e9))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def race(strategies, args, rounds):
    """{name: list of rounds} for one batch size, all contenders in turns.

    rounds   lists of batches of prompts
    """
    context, processes = multiprocessing.get_context("spawn"), {}
    for name, strategy in strategies.items():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=contender, args=(theirs, name, strategy, args), daemon=True)
        process.start()
        theirs.close()                                  # or its death would not be noticed here
        processes[name] = (process, ours)

    def reply(name, batches=None):
        """What a contender answers, to `batches` or by itself; InputError with why it does not."""
        pipe = processes[name][1]
        try:
            if batches is not None:
                pipe.send(batches)
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = "its process died (out of memory?)"
        if isinstance(answer, str) and answer != "ready":
            raise InputError(f"{name} failed: {answer}")
        return answer

    for name in strategies:
        reply(name)

    came, names = {name: [] for name in strategies}, list(strategies)
    turns = rounds[:1] * args.warmup + rounds
    with tqdm(total=len(turns) * len(names), unit="round", desc=f"batch {len(rounds[0][0])}",
              dynamic_ncols=True) as bar:
        for turn, batches in enumerate(turns):
            begins = turn % len(names)
            for name in names[begins:] + names[:begins]:
                texts, seconds, *_ = answer = reply(name, batches)
                if turn >= args.warmup:
                    came[name].append(answer)
                bar.update()
                bar.set_postfix_str(f"{name}: {sum(map(len, texts)) / seconds:.1f} new tokens/s")
    for process, pipe in processes.values():
        pipe.send("stop")
        process.join()
    return came


# --------------------------------------------------------------------------------------------------
# Tables

def summarise(rounds):
    """What `race` returned -> {name: numbers for table and record}."""
    entries = {}
    for name, runs in rounds.items():
        texts = [text for run in runs for text in run[0]]
        greedy = [text for run in rounds[BASELINE] for text in run[0]]
        seconds = [run[1] for run in runs]
        entries[name] = {
            "seconds": seconds,
            "tokens": [sum(map(len, run[0])) for run in runs],
            "tokens_per_pass": sum(map(len, texts)) / sum(run[2] for run in runs),
            "greedy_texts": sum(text == theirs for text, theirs in zip(texts, greedy)),
            "texts": len(texts),
            "peak_mebibytes": max(run[3] for run in runs) / MEBIBYTE,
        }
        entries[name]["tokens_per_second"] = [
            tokens / taken for tokens, taken in zip(entries[name]["tokens"], seconds)]
    for entry in entries.values():
        for ratio, name in (("ratio", BASELINE), ("ratio_to_k1", PLAIN)):
            entry[ratio] = [theirs / own for own, theirs in zip(
                entry["seconds"], entries[name]["seconds"])]
    return entries


def middle(values, digits):
    """Median (least to most) of a list."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(
        statistics.median(values), min(values), max(values), d=digits)


def race_table(entries, size):
    """Markdown; of each contender medians (and ranges) over rounds."""
    lines = [f"| batch {size} | times our k = 1 | times transformers | new tokens/s "
             "| tokens written, of k = 1's | tokens per pass | greedy text | peak MiB |",
             "|" + "---|" * 8]
    written = sum(entries[PLAIN]["tokens"])
    for name, e in entries.items():
        digits = 0 if min(e["tokens_per_second"]) >= 100 else 1
        cells = [
            name,
            middle(e["ratio_to_k1"], 2),
            middle(e["ratio"], 2),
            middle(e["tokens_per_second"], digits),
            f"{sum(e['tokens']) / written:.0%}",
            f"{e['tokens_per_pass']:.2f}",
            f"{e['greedy_texts']} of {e['texts']}",
            f"{e['peak_mebibytes']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def width_table(times):
    rows = {"fed tokens": [str(width) for width in times],
            "ms per pass": [f"{value:.2f}" for value in times.values()],
            "times one token": [f"{value / times[1]:.2f}" for value in times.values()]}
    lines = ["| " + " | ".join([head, *cells]) + " |" for head, cells in rows.items()]
    lines.insert(1, "|" + "---|" * (len(times) + 1))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# A pass by itself

@torch.inference_mode()
def milliseconds_by_width(model, context, widths, repeats):
    """{fed tokens: median milliseconds} of a pass behind `context` cached tokens, one row."""
    cache = KVCache(model, 1, context + max(widths))
    cache.length += context
    times = {width: [] for width in widths}
    for _ in range(repeats + 2):
        for width in widths:                                    # in turns here too
            positions = cache.next_places(width)                                    # (1, T)
            places = torch.arange(context + width, device=model.device)             # (S,)
            mask = places <= positions[:, :, None]                                  # (1, T, S)
            ids = torch.full((1, width), 5, device=model.device)
            began = time.perf_counter()
            # tolist: the host waits for the device, as it does in decoding
            model(ids, positions, mask, cache).argmax(dim=-1).tolist()
            times[width].append(1000 * (time.perf_counter() - began))
    return {width: statistics.median(taken[2:]) for width, taken in times.items()}


def copy_bandwidth(device, megabytes=256):
    """Bytes per second of a large copy, read and write counted: the median of ten."""
    source = torch.ones(megabytes * MEBIBYTE // 4, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(12):
        began = time.perf_counter()
        target.copy_(source)
        target[-1].item()
        rates.append(2 * source.nbytes / (time.perf_counter() - began))
    return statistics.median(rates[2:])


def bytes_per_pass(model, context):
    """What a pass of one row must read: every weight once (of an untied input table next to
    nothing), and the cache."""
    c, size = model.config, model.model.embed_tokens.weight.element_size()
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not c.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    cached = 2 * c.num_hidden_layers * context * c.num_key_value_heads * c.head_dim
    return size * (weights + cached)


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    parser = ArgumentParser(prog="-m studies.bench", description=__doc__)
    add = parser.add_argument_group("the race").add_argument
    add("--data", help="whose questions: wordproblems, gsm8k or a JSONL file (what eval_gsm8k.py "
        "asks the checkpoint)")
    add("--limit", type=int, default=40, help="questions in all (%(default)s)")
    add("--rounds", type=int, default=5, help="that they are dealt to (%(default)s)")
    add("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    add("--batch-size", type=int, nargs="+", default=[1, 8],
        help="questions decoded together, one or several (1 8)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--seed", type=int, default=0, help="which word problems (%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    cli.add_model_flag(add)
    add("--out", default="out-bench", help="folder for bench.json and bench.md (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's own choice)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, limit=1, batch_size=1, max_new_tokens=2, rounds=1, warmup=0, threads=1)
    if args.limit > 1000:
        raise InputError(f"--limit {args.limit} is more than a race needs: at most 1000")
    if args.limit % args.rounds:
        raise InputError(f"--limit {args.limit} must be a multiple of --rounds {args.rounds}")
    for size in args.batch_size:
        if args.limit // args.rounds % size:
            raise InputError(f"a round of {args.limit // args.rounds} questions (--limit / "
                             f"--rounds) is no multiple of --batch-size {size}")
    return args


def make_rounds(args, tokenizer, style):
    """What rounds ask: lists of prompts of one length. InputError where --data has too few."""
    size, rounds, alike = args.limit // args.rounds, [], {}
    for row in load_questions(args.data, 100 * size * args.rounds, 0, args.seed)[0]:
        prompt = tokenizer.prompt(row["question"], style)
        some = alike.setdefault(len(prompt), [])
        some.append(prompt)
        if len(some) == size:
            rounds.append(alike.pop(len(prompt)))
        if len(rounds) == args.rounds:
            return rounds
    raise InputError(f"{args.data} has {len(rounds)} times {size} questions with as many tokens, "
                     f"{args.rounds} rounds need one each: lower --limit or --rounds")


def in_batches(prompts, size):
    return [prompts[first:first + size] for first in range(0, len(prompts), size)]


def contenders(k_max, heads):
    """{name: Strategy} of ours, as far as the checkpoint goes: static k, adaptive and lossless; of
    a checkpoint with heads, whose drafts are always verified, k = 1 and lossless k."""
    if heads:
        strategies = [Strategy(1)] + [Strategy(k, None, "heads") for k in range(2, k_max + 1)]
    else:
        strategies = [Strategy(k) for k in range(1, k_max + 1)]
    if k_max > 1 and not heads:
        strategies += [Strategy(k_max, 0.9), Strategy(k_max, None, "wide"),
                       Strategy(k_max, None, "narrow")]
    return {f"ours, {strategy.name}": strategy for strategy in strategies}


def main():
    args = get_args()
    needs("transformers")
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())    # of the contenders, too
    args.model = args.model or default_model()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, trained, heads = load(args.model, device, dtype)
    k_max = trained.get("k_max", 1)
    args.data = args.data or default_questions(args.model, trained)
    style = trained.get("prompt_format") or tokenizer.default_format
    rounds = make_rounds(args, tokenizer, style)
    longest = max(len(prompts[0]) for prompts in rounds)
    if longest + args.max_new_tokens >= model.config.max_position_embeddings:
        raise InputError(f"{longest + args.max_new_tokens} tokens do not fit the model's context "
                         f"of {model.config.max_position_embeddings}: lower --max-new-tokens")
    out = cli.output_folder(args.out)

    # --- the race
    races, tables = {}, []
    for size in args.batch_size:
        theirs = {BASELINE: None}
        if size == 1:                                   # assisted decoding is for one row
            theirs[LOOKUP] = None
        dealt = [in_batches(prompts, size) for prompts in rounds]
        races[size] = summarise(race(theirs | contenders(k_max, heads), args, dealt))
        tables.append(race_table(races[size], size))

    # --- one pass by itself, as wide as decoding gets: with heads, a certain token and the drafts
    widths = list(range(1, k_max + 1))
    if not heads:
        widths = list(range(1, 2 * k_max)) + [k_max ** 2] * (k_max > 2)
    times = milliseconds_by_width(model, longest, widths, REPEATS)
    bandwidth, read = copy_bandwidth(device), bytes_per_pass(model, longest)
    share = read / bandwidth / (times[1] / 1000)

    record = {"races": races, "milliseconds_by_width": times, "context": longest,
              "repeats": REPEATS, "copy_bytes_per_second": bandwidth,
              "share_of_bandwidth_limit": share, **vars(args), **machine(device)}
    head = (f"{args.model}, {dtype_name(dtype)}; {args.limit} questions of {args.data} in "
            f"{args.rounds} rounds, in turns, {args.max_new_tokens} new tokens at most; median "
            f"(range) of the rounds; {record['device']}, torch {record['torch']}, commit "
            f"{record['commit']}")
    passes = f"a pass by itself, behind {longest} cached tokens, median of {REPEATS}:"
    end = (f"A pass of one token reads {read / 1e6:.0f} MB of weights and cache; at the "
           f"{bandwidth / 1e9:.1f} GB/s of a plain copy that is {share:.0%} of the time it takes."
           "\n")
    text = "\n\n".join([head, *tables, passes, width_table(times), end])
    print(text)
    write_json(out / "bench.json", record)
    write_text(out / "bench.md", text)


if __name__ == "__main__":
    cli.run(main)
