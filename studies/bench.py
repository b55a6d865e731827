"""
Decoding speed: ours, beside transformers', with the same weights, prompts, number of threads and machine, in one run.

    python -m extras.bench                                      # out/latest or the tiny model: under two minutes
    python -m extras.bench --model smollm2-135m --batch-size 1 --out results/bench-smollm2
    python -m extras.bench --model out-gsm8k --prompt-tokens 1024

Every contender lives in a process of its own and loads its own copy of the weights. They take turns, one round each (a
machine whose speed drifts favours none), after rounds that do not count. Timed is decoding only, from the end of the pass
that reads the prompt. Stop tokens are ignored, so all write the same number of tokens; the texts are compared.

Then, for one row: milliseconds per pass by the number of fed tokens, and how near a pass of one token comes to the time
that it takes merely to read weights and cache from memory at the bandwidth of a plain copy. OUT.json holds every round.
"""
import argparse
import copy
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import WordProblems
from extras.machine import DTYPES, machine, pick_device, pick_dtype
from model import KVCache
from pretrained import ArgumentParser, InputError, resolve, run, write_json
from sample import default_model, generate, load, strategy_name

BASELINE, LOOKUP = "transformers, greedy", "transformers, prompt lookup"


# ----------------------------------------------------------------------------------------------------------------------
# Contenders. Each decodes `prompts` and returns (tokens of each row, decoding seconds, tokens in that time, passes)

def decode_ours(model, tokenizer, prompts, count, fixed, k, threshold, lossless):
    results = generate(model, prompts, k, threshold, tokenizer.mask_id, (), count, lossless=lossless, fixed=fixed)
    seconds = max(result.seconds for result in results) - results[0].prompt_seconds
    passes = max(result.passes for result in results)
    return [r.tokens for r in results], seconds, sum(len(r.tokens) - r.chunks[0] for r in results), passes


def decode_theirs(model, prompts, count, **settings):
    stamps, generation = [], copy.deepcopy(model.generation_config)
    generation.do_sample, generation.max_new_tokens = False, count
    generation.eos_token_id = model.config.vocab_size           # an id that never comes; None would mean the model's own
    for name, value in settings.items():
        setattr(generation, name, value)

    def stamp(ids, scores, **_):                                # called after every pass
        stamps.append((time.perf_counter(), ids.shape[1] - len(prompts[0])))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation,
                            stopping_criteria=[stamp])
    tokens = (len(output[0]) - len(prompts[0]) - stamps[0][1]) * len(prompts)
    return output[:, len(prompts[0]):].tolist(), stamps[-1][0] - stamps[0][0], tokens, len(stamps)


def contender(pipe, name, way, args, prompts):
    """What runs in a contender's process: load, then decode whenever told to. Sends a result, or a string: why not."""
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        if way is None:
            import transformers
            model = transformers.AutoModelForCausalLM.from_pretrained(
                resolve(args.model, args.cache), dtype=dtype).to(device).eval()
            settings = {"prompt_lookup_num_tokens": 10} if name == LOOKUP else {}

            def decode():
                return decode_theirs(model, prompts, args.max_new_tokens, **settings)
        else:
            model, tokenizer, _ = load(args.model, device, dtype, args.cache, args.compile)

            def decode():
                return decode_ours(model, tokenizer, prompts, args.max_new_tokens, args.compile, *way)
        pipe.send("ready")
        while pipe.recv() == "go":
            pipe.send((*decode(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def race(ways, args, prompts):
    """{name: list of rounds} for one batch size, all contenders in turns."""
    context, processes = multiprocessing.get_context("spawn"), {}
    for name, way in ways.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=contender, args=(theirs, name, way, args, prompts), daemon=True)
        process.start()
        processes[name] = (process, ours)
    for name, (_, pipe) in processes.items():
        try:
            answer = pipe.recv()
        except EOFError:
            answer = "its process died"
        if answer != "ready":
            raise InputError(f"{name} could not start: {answer}")
    rounds = {name: [] for name in ways}
    bar = tqdm(total=(args.warmup + args.rounds) * len(ways), unit="round", desc=f"batch {len(prompts)}")
    for turn in range(args.warmup + args.rounds):
        for name, (_, pipe) in processes.items():
            pipe.send("go")
            answer = pipe.recv()
            if isinstance(answer, str):
                raise InputError(f"{name} failed: {answer}")
            if turn >= args.warmup:
                rounds[name].append(answer)
            bar.update()
            bar.set_postfix_str(f"{name}: {answer[2] / answer[1]:.1f} tokens/s")
    bar.close()
    for process, pipe in processes.values():
        pipe.send("stop")
        process.join()
    return rounds


def summarise(rounds, size):
    """What `race` returned for a batch of `size` rows -> {name: numbers for the table and the record}."""
    greedy = rounds[BASELINE][0][0]
    entries = {}
    for name, runs in rounds.items():
        texts, _, tokens, passes, peak = runs[0]
        entries[name] = {"passes": passes, "tokens_per_second": [tokens / seconds for _, seconds, tokens, *_ in runs],
                         "tokens_per_pass_and_row": tokens / size / (passes - 1) if passes > 1 else float("nan"),
                         "greedy_texts": sum(a == b for a, b in zip(texts, greedy)), "peak_mebibytes": peak}
    baseline = statistics.median(entries[BASELINE]["tokens_per_second"])
    for entry in entries.values():
        entry["ratio"] = statistics.median(entry["tokens_per_second"]) / baseline
    return entries


def race_table(entries, size):
    lines = [f"batch {size}\n", "| decoding only | tokens/s, median | range | vs transformers | tokens per pass and row | "
             "greedy text | peak MiB |", "|" + "---|" * 7]
    for name, e in entries.items():
        rates = e["tokens_per_second"]
        lines.append(f"| {name} | {statistics.median(rates):.1f} | {min(rates):.1f} - {max(rates):.1f} | {e['ratio']:.2f} | "
                     f"{e['tokens_per_pass_and_row']:.2f} | {e['greedy_texts']} of {size} | {e['peak_mebibytes']:.0f} |")
    return "\n".join(lines)


def width_table(times):
    return "\n".join(["| fed tokens | " + " | ".join(map(str, times)) + " |", "|" + "---|" * (len(times) + 1),
                      "| ms per pass | " + " | ".join(f"{value:.2f}" for value in times.values()) + " |",
                      "| times one token | " + " | ".join(f"{value / times[1]:.2f}" for value in times.values()) + " |"])


# ----------------------------------------------------------------------------------------------------------------------
# A pass by itself

@torch.inference_mode()
def milliseconds_by_width(model, context, widths, repeats):
    """{fed tokens: median milliseconds} of a pass behind `context` cached tokens, one row."""
    cache = KVCache(model.config, 1, context + max(widths), model.device, model.model.embed_tokens.weight.dtype)
    cache.length += context
    times = {width: [] for width in widths}
    for _ in range(repeats + 2):
        for width in widths:                                    # in turns here too
            slots = torch.arange(context + width, device=model.device)
            positions = cache.next_slots(width)
            ids, mask = torch.full((1, width), 5, device=model.device), slots <= positions[:, :, None]
            began = time.perf_counter()
            model(ids, positions, mask, cache).argmax(dim=-1).tolist()              # the host waits, as decoding does
            times[width].append(1000 * (time.perf_counter() - began))
    return {width: statistics.median(list_[2:]) for width, list_ in times.items()}


def copy_bandwidth(device, megabytes=256):
    """Bytes per second of a large copy, read and write counted: the median of ten."""
    source = torch.ones(megabytes * 2 ** 18, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(12):
        began = time.perf_counter()
        target.copy_(source)
        target[-1].item()
        rates.append(2 * source.numel() * 4 / (time.perf_counter() - began))
    return statistics.median(rates[2:])


def bytes_per_pass(model, context):
    """What a pass of one row must read: every weight once (of an untied input table next to nothing), and the cache."""
    c, size = model.config, model.model.embed_tokens.weight.element_size()
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not c.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    return size * (weights + 2 * c.num_hidden_layers * context * c.num_key_value_heads * c.head_dim)


# ----------------------------------------------------------------------------------------------------------------------

def main():
    parser = ArgumentParser(prog="-m extras.bench", description=__doc__)
    add = parser.add_argument
    add("--model", help="tiny, smollm2-135m, a folder or a hub id (out/latest if there is one, else tiny)")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--batch-size", type=int, nargs="+", default=[1, 8], help="prompts decoded together, one or several (1 8)")
    add("--prompt-tokens", type=int, default=128, help="(%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    add("--rounds", type=int, default=5, help="counted rounds (%(default)s)")
    add("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's own choice)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile, ours only: the round that "
        "does not count compiles (%(default)s)")
    add("--out", default="out-bench", help="folder for bench.json and bench.md (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="(%(default)s)")
    args = parser.parse_args()
    if min(args.rounds, args.prompt_tokens, *args.batch_size) < 1 or args.max_new_tokens < 2 or args.warmup < 0:
        raise InputError("--rounds, --prompt-tokens and --batch-size must be at least 1, --max-new-tokens at least 2")
    if args.threads is not None and args.threads < 1:
        raise InputError("--threads must be at least 1")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.model = args.model or default_model()
    device = pick_device(args.device)
    model, tokenizer, trained = load(args.model, device, pick_dtype(args.dtype, device), args.cache)
    k_max, context = trained.get("k_max", 1), args.prompt_tokens + args.max_new_tokens
    if context >= model.config.max_position_embeddings:
        raise InputError(f"{context} tokens do not fit the model's context of {model.config.max_position_embeddings}")

    # --- prompts of equal length: solved word problems, and the beginning of one more solution
    prompts = []
    for row in range(max(args.batch_size)):
        problems = (WordProblems(row, "validation")[i] for i in range(args.prompt_tokens // 20 + 2))
        ids = tokenizer.encode("\n\n".join("{question}\n\n{answer}".format(**problem) for problem in problems))
        prompts.append(ids[:args.prompt_tokens])

    # --- the race, and one pass by itself
    ways = [(1, None, None), *((k, None, None) for k in range(2, k_max + 1))]
    if k_max > 1:
        ways += [(k_max, 0.9, None), (k_max, None, "wide"), (k_max, None, "narrow")]
    ours, races, tables = {f"ours, {strategy_name(*way)}": way for way in ways}, {}, []
    for size in args.batch_size:
        theirs = {BASELINE: None} | ({LOOKUP: None} if size == 1 else {})           # assisted decoding is for one row
        races[size] = summarise(race(theirs | ours, args, prompts[:size]), size)
        tables.append(race_table(races[size], size))
    widths = list(range(1, 2 * k_max)) + [k_max ** 2] * (k_max > 2)
    times, bandwidth = milliseconds_by_width(model, args.prompt_tokens, widths, 20), copy_bandwidth(device)
    read = bytes_per_pass(model, args.prompt_tokens)
    share = read / bandwidth / (times[1] / 1000)
    record = {"races": races, "milliseconds_by_width": times, "copy_bytes_per_second": bandwidth,
              "share_of_bandwidth_limit": share, **vars(args), **machine(device)}
    head = (f"{args.model}, {str(model.output_matrix.dtype).removeprefix('torch.')}, {args.prompt_tokens} prompt tokens, "
            f"{args.max_new_tokens} new, {args.rounds} rounds in turns; {record['device']}, torch {record['torch']}, "
            f"commit {record['commit']}")
    text = "\n\n".join([head, *tables, width_table(times), (
        f"A pass of one token reads {read / 1e6:.0f} MB of weights and cache; at the {bandwidth / 1e9:.1f} GB/s of a plain "
        f"copy that is {share:.0%} of the time it takes.\n")])
    print(text)
    write_json(out / "bench.json", record)
    (out / "bench.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
