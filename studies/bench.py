"""
Decoding speed: ours, beside transformers', with the same weights, prompts, threads and machine.

    python -m studies.bench                         # out/latest or tiny-mtp: under two minutes
    python -m studies.bench --model smollm2-135m --batch-size 1 --out results/bench-smollm2
    python -m studies.bench --model out-gsm8k --prompt-tokens 1024
    python -m studies.bench --model out-heads --data questions.jsonl --rounds 20

Every contender lives in a process of its own and loads its own copy of the weights. They take
turns, one round each (a machine whose speed drifts favours none), after rounds that do not count;
ratios are taken round by round. All rounds have the same prompts, solved word problems, or with
--data each its own: questions in the checkpoint's format (in a batch: of one length). Timed is
decoding only, from the end of the pass that reads the prompt. Stop tokens are ignored, so all write
the same number of tokens; the texts are compared. Of a checkpoint with heads, k = 1 is its start
model itself, and drafts of 1, 2, ... heads are verified.

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
from common.data import load_questions
from common.files import write_json, write_text
from common.hub import default_model, resolve
from common.machine import dtype_name, machine, peak_memory, pick_device, pick_dtype
from common.wordproblems import WordProblems
from model import KVCache
from sample import Strategy, load
from speculate import decode
from studies import needs

BASELINE, LOOKUP = "transformers, greedy", "transformers, prompt lookup"
PLAIN = "ours, k = 1"
MEBIBYTE = 2 ** 20


# --------------------------------------------------------------------------------------------------
# Contenders. Each decodes `prompts`, `count` new tokens for each, and returns (tokens of each row,
# decoding seconds, tokens in that time, passes)

def decode_ours(model, tokenizer, heads, prompts, count, strategy):
    results = decode(model, tokenizer, prompts, strategy, heads, max_new_tokens=count)
    seconds = max(result.seconds for result in results) - results[0].prompt_seconds
    tokens = sum(len(result.tokens) - result.chunks[0] for result in results)
    passes = max(result.passes for result in results)
    return [result.tokens for result in results], seconds, tokens, passes


def decode_theirs(model, prompts, count, **settings):
    stamps, generation = [], copy.deepcopy(model.generation_config)
    generation.do_sample, generation.max_new_tokens = False, count
    # an id that never comes; None would mean the model's own
    generation.eos_token_id = model.config.vocab_size
    for name, value in settings.items():
        setattr(generation, name, value)
    length = len(prompts[0])

    def stamp(ids, scores, **_):                                # called after every pass
        stamps.append((time.perf_counter(), ids.shape[1] - length))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids),
                            generation_config=generation, stopping_criteria=[stamp])
    (began, first), (ended, _) = stamps[0], stamps[-1]
    tokens = (output.shape[1] - length - first) * len(prompts)
    return output[:, length:].tolist(), ended - began, tokens, len(stamps)


def contender(pipe, name, strategy, args):
    """What runs in a contender's process: load, then decode whatever prompts come.

    strategy   one of ours, or None: transformers
    Sends a round's result and peak memory (bytes), or a string: why there is none.
    """
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        if strategy is None:
            from transformers import AutoModelForCausalLM

            folder = resolve(args.model)
            if (folder / "adapters" / "adapter_config.json").exists():
                folder = start_of(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model = model.to(device).eval()
            settings = {"prompt_lookup_num_tokens": 10} if name == LOOKUP else {}
        else:
            model, tokenizer, _, heads = load(args.model, device, dtype)
            tokenizer.stop_ids = set()
        pipe.send("ready")
        while (prompts := pipe.recv()) != "stop":
            if strategy is None:
                result = decode_theirs(model, prompts, args.max_new_tokens, **settings)
            else:
                result = decode_ours(
                    model, tokenizer, heads, prompts, args.max_new_tokens, strategy)
            pipe.send((*result, peak_memory(device) * 1e9))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def race(strategies, args, batches):
    """{name: list of rounds} for one batch size, all contenders in turns.

    batches   lists of prompts: a round decodes one of them, the next round the next
    """
    context, processes = multiprocessing.get_context("spawn"), {}
    for name, strategy in strategies.items():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=contender, args=(theirs, name, strategy, args), daemon=True)
        process.start()
        processes[name] = (process, ours)
    for name, (_, pipe) in processes.items():
        try:
            answer = pipe.recv()
        except EOFError:
            answer = "its process died"
        if answer != "ready":
            raise InputError(f"{name} could not start: {answer}")

    rounds = {name: [] for name in strategies}
    turns = args.warmup + args.rounds
    with tqdm(total=turns * len(strategies), unit="round", desc=f"batch {len(batches[0])}",
              dynamic_ncols=True) as bar:
        for turn in range(turns):
            for name, (_, pipe) in processes.items():
                pipe.send(batches[turn % len(batches)])
                answer = pipe.recv()
                if isinstance(answer, str):
                    raise InputError(f"{name} failed: {answer}")
                if turn >= args.warmup:
                    rounds[name].append(answer)
                _, seconds, tokens, *_ = answer
                bar.update()
                bar.set_postfix_str(f"{name}: {tokens / seconds:.1f} new tokens/s")
    for process, pipe in processes.values():
        pipe.send("stop")
        process.join()
    return rounds


# --------------------------------------------------------------------------------------------------
# Tables

def summarise(rounds, size):
    """What `race` returned for batches of `size` rows -> {name: numbers for table and record}."""
    entries = {}
    for name, runs in rounds.items():
        passes = sum(n - 1 for _, _, _, n, _ in runs)           # that of the prompt is not timed
        same = [text == greedy for run, base in zip(runs, rounds[BASELINE])
                for text, greedy in zip(run[0], base[0])]
        entries[name] = {
            "passes": runs[0][3],
            "tokens_per_second": [tokens / seconds for _, seconds, tokens, *_ in runs],
            "tokens_per_pass_and_row":
                sum(run[2] for run in runs) / size / passes if passes else float("nan"),
            "greedy_texts": sum(same),
            "texts": len(same),
            "peak_mebibytes": runs[0][4] / MEBIBYTE,
        }
    for entry in entries.values():
        for ratio, name in (("ratio", BASELINE), ("ratio_to_k1", PLAIN)):
            base = entries[name]["tokens_per_second"]
            entry[ratio] = [own / theirs for own, theirs in zip(entry["tokens_per_second"], base)]
    return entries


def middle(values, digits):
    """Median (least - most) of a list."""
    return "{:.{d}f} ({:.{d}f} - {:.{d}f})".format(
        statistics.median(values), min(values), max(values), d=digits)


def race_table(entries, size):
    lines = [f"batch {size}; median (range) over rounds\n",
             "| decoding only | new tokens/s | times transformers | times our k = 1 "
             "| tokens per pass and row | greedy text | peak MiB |", "|" + "---|" * 7]
    for name, e in entries.items():
        cells = [
            name,
            middle(e["tokens_per_second"], 1),
            middle(e["ratio"], 2),
            middle(e["ratio_to_k1"], 2),
            f"{e['tokens_per_pass_and_row']:.2f}",
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
    add("--batch-size", type=int, nargs="+", default=[1, 8],
        help="prompts decoded together, one or several (1 8)")
    add("--data", help="ask the questions of a JSONL file, or gsm8k, instead")
    add("--prompt-tokens", type=int, default=128, help="without --data (%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    add("--rounds", type=int, default=5, help="that count (%(default)s)")
    add("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    cli.add_model_flag(add)
    add("--out", default="out-bench", help="folder for bench.json and bench.md (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's own choice)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, batch_size=1, prompt_tokens=1, max_new_tokens=2, rounds=1, warmup=0,
                 threads=1)
    return args


def make_prompts(tokenizer, count, length):
    """`count` prompts of `length` tokens: solved word problems, the last of them cut off."""
    prompts = []
    for row in range(count):
        problems = WordProblems(row, "validation")
        text = "\n\n".join("{question}\n\n{answer}".format(**problems[i])
                           for i in range(length // 20 + 2))
        prompts.append(tokenizer.encode(text)[:length])
    return prompts


def make_batches(args, tokenizer, style, size):
    """What rounds decode: lists of `size` prompts. InputError where --data has too few."""
    if args.data is None:
        return [make_prompts(tokenizer, size, args.prompt_tokens)]
    wanted, batches, alike = args.warmup + args.rounds, [], {}
    for row in load_questions(args.data, None, 0, seed=0)[0]:
        prompt = tokenizer.prompt(row["question"], style)
        some = alike.setdefault(len(prompt), [])                # no padding, so of one length
        some.append(prompt)
        if len(some) == size:
            batches.append(alike.pop(len(prompt)))
        if len(batches) == wanted:
            return batches
    raise InputError(f"{args.data} has {len(batches)} batches of {size} questions with as many "
                     f"tokens, {wanted} rounds need one each: lower --batch-size or --rounds")


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
    style = trained.get("prompt_format") or tokenizer.default_format
    sizes = {size: make_batches(args, tokenizer, style, size) for size in args.batch_size}
    longest = max(len(prompt) for batches in sizes.values() for some in batches for prompt in some)
    total = longest + args.max_new_tokens
    if total >= model.config.max_position_embeddings:
        raise InputError(f"{total} tokens do not fit the model's context of "
                         f"{model.config.max_position_embeddings}")
    out = cli.output_folder(args.out)

    # --- the race
    races, tables = {}, []
    for size, batches in sizes.items():
        theirs = {BASELINE: None}
        if size == 1:                                   # assisted decoding is for one row
            theirs[LOOKUP] = None
        rounds = race(theirs | contenders(k_max, heads), args, batches)
        races[size] = summarise(rounds, size)
        tables.append(race_table(races[size], size))

    # --- one pass by itself, as wide as decoding gets: with heads, a certain token and the drafts
    widths = list(range(1, k_max + 1))
    if not heads:
        widths = list(range(1, 2 * k_max)) + [k_max ** 2] * (k_max > 2)
    times = milliseconds_by_width(model, args.prompt_tokens, widths, repeats=20)
    bandwidth, read = copy_bandwidth(device), bytes_per_pass(model, args.prompt_tokens)
    share = read / bandwidth / (times[1] / 1000)

    record = {"races": races, "milliseconds_by_width": times, "copy_bytes_per_second": bandwidth,
              "share_of_bandwidth_limit": share, **vars(args), **machine(device)}
    asked = args.data or f"{args.prompt_tokens} prompt tokens"
    head = (f"{args.model}, {dtype_name(dtype)}, {asked}, "
            f"{args.max_new_tokens} new, {args.rounds} rounds in turns; {record['device']}, torch "
            f"{record['torch']}, commit {record['commit']}")
    end = (f"A pass of one token reads {read / 1e6:.0f} MB of weights and cache; at the "
           f"{bandwidth / 1e9:.1f} GB/s of a plain copy that is {share:.0%} of the time it takes."
           "\n")
    text = "\n\n".join([head, *tables, width_table(times), end])
    print(text)
    write_json(out / "bench.json", record)
    write_text(out / "bench.md", text)


if __name__ == "__main__":
    cli.run(main)
