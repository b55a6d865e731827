"""
Decoding speed: ours, beside transformers', with the same weights, prompts, threads and machine.

    python -m studies.bench                         # out/latest or tiny-mtp: under two minutes
    python -m studies.bench --model smollm2-135m --batch-size 1 --out results/bench-smollm2
    python -m studies.bench --model out-gsm8k --prompt-tokens 1024

Every contender lives in a process of its own and loads its own copy of the weights. They take
turns, one round each (a machine whose speed drifts favours none), after rounds that do not count.
Timed is decoding only, from the end of the pass that reads the prompt. Stop tokens are ignored, so
all write the same number of tokens; the texts are compared.

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

from common import cli
from common.cli import ArgumentParser, InputError
from common.files import write_json, write_text
from common.hub import default_model, resolve
from common.machine import dtype_name, machine, peak_memory, pick_device, pick_dtype
from common.wordproblems import WordProblems
from model import KVCache
from sample import Strategy, load
from speculate import decode
from studies import needs

BASELINE, LOOKUP = "transformers, greedy", "transformers, prompt lookup"
MEBIBYTE = 2 ** 20


# --------------------------------------------------------------------------------------------------
# Contenders. Each decodes `prompts`, `count` new tokens for each, and returns (tokens of each row,
# decoding seconds, tokens in that time, passes)

def decode_ours(model, tokenizer, prompts, count, strategy):
    results = decode(model, tokenizer, prompts, strategy, max_new_tokens=count)
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


def contender(pipe, name, strategy, args, prompts):
    """What runs in a contender's process: load, then decode whenever told to.

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

            model = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=dtype)
            model = model.to(device).eval()
            settings = {"prompt_lookup_num_tokens": 10} if name == LOOKUP else {}
        else:
            model, tokenizer, _, heads = load(args.model, device, dtype)
            tokenizer.stop_ids = set()
        pipe.send("ready")
        while pipe.recv() == "go":
            if strategy is None:
                result = decode_theirs(model, prompts, args.max_new_tokens, **settings)
            else:
                result = decode_ours(model, tokenizer, prompts, args.max_new_tokens, strategy)
            pipe.send((*result, peak_memory(device) * 1e9))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def race(strategies, args, prompts):
    """{name: list of rounds} for one batch size, all contenders in turns."""
    context, processes = multiprocessing.get_context("spawn"), {}
    for name, strategy in strategies.items():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=contender, args=(theirs, name, strategy, args, prompts), daemon=True)
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
    with tqdm(total=turns * len(strategies), unit="round", desc=f"batch {len(prompts)}",
              dynamic_ncols=True) as bar:
        for turn in range(turns):
            for name, (_, pipe) in processes.items():
                pipe.send("go")
                answer = pipe.recv()
                if isinstance(answer, str):
                    raise InputError(f"{name} failed: {answer}")
                if turn >= args.warmup:
                    rounds[name].append(answer)
                _, seconds, tokens, *_ = answer
                bar.update()
                bar.set_postfix_str(f"{name}: {tokens / seconds:.1f} tokens/s")
    for process, pipe in processes.values():
        pipe.send("stop")
        process.join()
    return rounds


# --------------------------------------------------------------------------------------------------
# Tables

def summarise(rounds, size):
    """What `race` returned for a batch of `size` rows -> {name: numbers for table and record}."""
    greedy = rounds[BASELINE][0][0]
    entries = {}
    for name, runs in rounds.items():
        texts, _, tokens, passes, peak = runs[0]
        per_pass = tokens / size / (passes - 1) if passes > 1 else float("nan")
        entries[name] = {
            "passes": passes,
            "tokens_per_second": [tokens / seconds for _, seconds, tokens, *_ in runs],
            "tokens_per_pass_and_row": per_pass,
            "greedy_texts": sum(a == b for a, b in zip(texts, greedy)),
            "peak_mebibytes": peak / MEBIBYTE,
        }
    baseline = statistics.median(entries[BASELINE]["tokens_per_second"])
    for entry in entries.values():
        entry["ratio"] = statistics.median(entry["tokens_per_second"]) / baseline
    return entries


def race_table(entries, size):
    lines = [f"batch {size}\n",
             "| decoding only | tokens/s, median | range | vs transformers "
             "| tokens per pass and row | greedy text | peak MiB |", "|" + "---|" * 7]
    for name, e in entries.items():
        rates = e["tokens_per_second"]
        cells = [
            name,
            f"{statistics.median(rates):.1f}",
            f"{min(rates):.1f} - {max(rates):.1f}",
            f"{e['ratio']:.2f}",
            f"{e['tokens_per_pass_and_row']:.2f}",
            f"{e['greedy_texts']} of {size}",
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
    add("--prompt-tokens", type=int, default=128, help="(%(default)s)")
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


def contenders(k_max):
    """{name: Strategy} of ours: static k, adaptive and lossless, as far as the checkpoint goes."""
    strategies = [Strategy(k) for k in range(1, k_max + 1)]
    if k_max > 1:
        strategies += [Strategy(k_max, 0.9), Strategy(k_max, None, "wide"),
                       Strategy(k_max, None, "narrow")]
    return {f"ours, {strategy.name}": strategy for strategy in strategies}


def main():
    args = get_args()
    needs("transformers")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)       # of the contenders
    args.model = args.model or default_model()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, trained = load(args.model, device, dtype)
    k_max, total = trained.get("k_max", 1), args.prompt_tokens + args.max_new_tokens
    if total >= model.config.max_position_embeddings:
        raise InputError(f"{total} tokens do not fit the model's context of "
                         f"{model.config.max_position_embeddings}")
    out = cli.output_folder(args.out)

    # --- the race
    prompts = make_prompts(tokenizer, max(args.batch_size), args.prompt_tokens)
    races, tables = {}, []
    for size in args.batch_size:
        theirs = {BASELINE: None}
        if size == 1:                                   # assisted decoding is for one row
            theirs[LOOKUP] = None
        rounds = race(theirs | contenders(k_max), args, prompts[:size])
        races[size] = summarise(rounds, size)
        tables.append(race_table(races[size], size))

    # --- one pass by itself, as wide as decoding gets
    widths = list(range(1, 2 * k_max)) + [k_max ** 2] * (k_max > 2)
    times = milliseconds_by_width(model, args.prompt_tokens, widths, repeats=20)
    bandwidth, read = copy_bandwidth(device), bytes_per_pass(model, args.prompt_tokens)
    share = read / bandwidth / (times[1] / 1000)

    record = {"races": races, "milliseconds_by_width": times, "copy_bytes_per_second": bandwidth,
              "share_of_bandwidth_limit": share, **vars(args), **machine(device)}
    head = (f"{args.model}, {dtype_name(dtype)}, {args.prompt_tokens} prompt tokens, "
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
