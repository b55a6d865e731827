"""
Decoding speed, ours beside transformers': the same weights, prompt, number of threads and machine, in one run.

    python -m extras.bench                                      # SmolLM2-135M, fp32, 128 prompt tokens, 64 new
    python -m extras.bench --model out --rounds 5

Both decode greedily, one token per pass, in turns (so that a machine whose speed drifts favours neither), after a
round that is not counted. Timed is decoding only: from the first new token to the last, stamped by the same clock in a
callback after every token. Stop tokens are ignored, so both write the same number of tokens; the texts are compared.
Writes OUT.json, with every round in it, and OUT.md.
"""
import copy
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import WordProblems
from model import DTYPES, machine, pick_device, pick_dtype
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, resolve, run, write_json
from sample import generate, load


def decode_ours(model, mask_id, prompt, count):
    """(tokens, seconds from the first new token to the last) of our k = 1."""
    stamps = []
    result, = generate(model, [prompt], 1, None, mask_id, (), count, on_chunk=lambda *_: stamps.append(time.perf_counter()))
    return result.tokens, stamps[-1] - stamps[0]


def decode_theirs(model, prompt, count):
    """The same of transformers' greedy generate, with its own cache and defaults."""
    stamps, settings = [], copy.deepcopy(model.generation_config)
    settings.eos_token_id, settings.do_sample, settings.max_new_tokens = None, False, count

    def stamp(ids, scores, **_):
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                            stopping_criteria=[stamp])
    return output[0, len(prompt):].tolist(), stamps[-1] - stamps[0]


def main():
    parser = ArgumentParser(prog="bench.py", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (%(default)s)")
    parser.add_argument("--out", default="results/bench", help="writes OUT.json and OUT.md (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="(%(default)s)")
    args = parser.parse_args()
    if min(args.rounds, args.prompt_tokens) < 1 or args.max_new_tokens < 2:
        raise InputError("--rounds and --prompt-tokens must be at least 1, --max-new-tokens at least 2")
    try:
        import transformers
    except ImportError:
        raise InputError("the baseline needs transformers: pip install -r requirements-dev.txt") from None
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, _ = load(args.model, device, dtype, args.cache)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        resolve(args.model, args.cache), dtype=dtype).to(device).eval()
    text = "\n\n".join(WordProblems(0, "validation")[i]["question"] for i in range(args.prompt_tokens // 20 + 1))
    prompt = tokenizer.encode(text)[:args.prompt_tokens]
    contenders = {"nanoMTP, k = 1": lambda: decode_ours(model, tokenizer.mask_id, prompt, args.max_new_tokens),
                  "transformers, greedy": lambda: decode_theirs(theirs, prompt, args.max_new_tokens)}
    rates, texts = {name: [] for name in contenders}, {}
    for counted in tqdm([False] + [True] * args.rounds, desc="rounds"):
        for name, decode in contenders.items():
            texts[name], seconds = decode()
            if counted:
                rates[name].append((args.max_new_tokens - 1) / seconds)
    ours, baseline = (statistics.median(rates[name]) for name in contenders)
    summary = {"ratio_of_medians": ours / baseline, "texts_identical": len(set(map(tuple, texts.values()))) == 1,
               "tokens_per_second": rates, "transformers": transformers.__version__, **vars(args), **machine(device)}
    rows = "".join(f"| {name} | {statistics.median(rate):.1f} | {min(rate):.1f} - {max(rate):.1f} | "
                   f"{statistics.median(rate) / baseline:.2f} |\n" for name, rate in rates.items())
    table = (f"{args.model}, {args.dtype}, batch 1, {args.prompt_tokens} prompt tokens, {args.max_new_tokens} new, "
             f"{args.rounds} rounds in turns; {summary['device']}, torch {summary['torch']}, transformers "
             f"{transformers.__version__}, commit {summary['commit']}\n\n"
             "| decoding only | tokens/s, median | range | ratio |\n"
             f"|---|---|---|---|\n{rows}\nTexts identical: {'yes' if summary['texts_identical'] else 'no'}.\n")
    print(table)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{args.out}.json", summary)
    Path(f"{args.out}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run(main)
