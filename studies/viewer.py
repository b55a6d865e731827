"""
A page to play with: how an answer came about, pass by pass, in one HTML file that needs no network.

    python -m extras.viewer --model out-k8                              # an unseen word problem; then open viewer.html
    python -m extras.viewer "How many?" "And how much?" --threshold 0.5 --out two.html
    python -m extras.viewer --model out-gsm8k --k 3                     # static k = 3 beside k = 1

Each prompt is answered twice, with k = 1 and with the strategy of --k and --threshold (as in sample.py). The page shows both
answers beside each other, the tokens of one pass in one box, and a slider replays them. A token tells its confidence, its
slot, and what else the model considered there. Predictions that a pass did not keep are shown while that pass is replayed.

`generate` hands out only what it emits, and here the rest is computed anew: `passes_of` lays out all passes of a finished
answer as training does, a text and one region of masks for each pass, and reads them in a single forward pass. A part of
the page can be linked to: viewer.html#prompt=1&pass=3&run=2&token=5 (each counts from 1; run 2 is the right column).

Shapes: P passes, L fed tokens, V vocabulary.
"""
import codecs
import itertools
import json
import math
from pathlib import Path

import torch

from data import WordProblems
from extras.machine import DTYPES, machine, pick_device, pick_dtype
from extras.report import chunks_of, printable, shared_prefix
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, run
from regions import attention_mask, make_layout
from sample import default_model, generate, load, strategy, strategy_name

TEMPLATE = Path(__file__).with_name("viewer.html")


@torch.inference_mode()
def passes_of(model, prompt, result, k, mask_id, top=5, at_once=32):
    """What each pass of a finished answer predicted: of each of its k slots the `top` most likely (id, probability).

    prompt, result   the ids that `generate` was given, and the Generation that it returned (not of lossless mode)
    at_once          passes to replay in one forward pass, which bounds the memory for the logits

    The pass that began behind n tokens of text is a region with its anchor at n - 1. Text sees no masks and a region no
    other, so each slot sees what it saw while decoding: the numbers are those of `generate` up to rounding.
    """
    bidirectional = model.config.raw.get("nanomtp", {}).get("bidirectional", False)
    text, passes = prompt + result.tokens, []
    anchors = [n - 1 for n in itertools.accumulate(result.chunks[:-1], initial=len(prompt))]
    for first in range(0, len(anchors), at_once):
        some = anchors[first:first + at_once]
        length = some[-1] + 1                                               # nobody here sees the text behind it
        position, region, bound, slots = make_layout([length], [some], k)
        mask = attention_mask(position, region, bound, bidirectional)       # (1, L, L)
        ids = torch.tensor([text[:length] + [mask_id] * (len(some) * (k - 1))], device=model.device)
        logits = model(ids, position.to(model.device), mask.to(model.device), at=slots).float()        # (P, k, V)
        if mask_id is not None:
            logits[..., mask_id] = -torch.inf
        probabilities, best = logits.softmax(dim=-1).topk(top)              # (P, k, top) each
        passes += [[list(zip(*slot)) for slot in zip(*one)] for one in zip(best.tolist(), probabilities.tolist())]
    return passes


def spell(tokenizer, token):
    """A token by itself: a control token's name, \\xe2 for a byte that is a part of a character."""
    return printable(tokenizer.by_id.get(token, b"id %d" % token).decode("utf-8", errors="backslashreplace"))


def texts(tokenizer, tokens):
    """What each token adds to the text. Of the tokens that share a character the last one shows it, the others "..."."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    added = [utf8.decode(tokenizer.token_bytes([token]), final=n == len(tokens)) for n, token in enumerate(tokens, 1)]
    return [printable(text) or (spell(tokenizer, token) if token in tokenizer.hidden_ids else "\u2026")
            for text, token in zip(added, tokens)]


def replay(tokenizer, result, passes):
    """What the page needs of each pass: how many of its slots were kept, and all slots, the unkept ones included."""
    shown, sure = iter(texts(tokenizer, result.tokens)), iter(result.confidences)
    record = []
    for chunk, slots in zip(chunks_of(result), passes):
        entries = []
        for slot, best in enumerate(slots):
            token = chunk[slot] if slot < len(chunk) else best[0][0]
            name, rank = spell(tokenizer, token), [i for i, _ in best].index(token) + 1 if token in dict(best) else None
            text, p = (next(shown), next(sure)) if slot < len(chunk) else (name, best[0][1])
            entries.append({"text": text, "name": name, "p": round(p, 6), "rank": rank,
                            "top": [[spell(tokenizer, i), round(q, 6)] for i, q in best]})
        record.append({"kept": len(chunk), "slots": entries})
    return record


def page(data):
    """The HTML file. In a script element the only dangerous character is "<" (</script>, <!--): JSON can do without it."""
    return TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))


def main():
    parser = ArgumentParser(prog="-m extras.viewer", description=__doc__)
    add = parser.add_argument_group("what to answer, and how").add_argument
    add("prompt", nargs="*", help="questions (default: an unseen word problem)")
    add("--prompt-format", choices=["plain", "chat"], help="default: what the checkpoint was trained with")
    add("--seed", type=int, default=0, help="which word problem, without a prompt (%(default)s)")
    add("--k", type=int, help="most tokens per pass; alone: static k, all of them kept")
    add("--threshold", type=float, help="adaptive: keep tokens of at least this confidence, at most the checkpoint's "
        "k_max or --k (0.9 where --k is not given)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    add("--model", help=f"tiny, smollm2-135m, a folder or a hub id (out/latest if there is one, else {DEFAULT_MODEL})")
    add("--out", default="viewer.html", help="file to write (%(default)s)")
    add("--json", help="a file for what the page shows, as JSON (a page is drawn from it again by `page`)")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast (%(default)s)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise InputError("--max-new-tokens must be at least 1")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise InputError(f"--threshold {args.threshold} is no probability")
    out = Path(args.out)
    for path in (out, *([Path(args.json)] if args.json else [])):
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"cannot write {path}: " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}"))
    args.model = args.model or default_model()
    device = pick_device(args.device)
    model, tokenizer, trained = load(args.model, device, pick_dtype(args.dtype, device), args.cache)
    if not trained:
        print("note: this model has not been trained for several tokens per pass, so k = 1 stands alone (train.py)")
    k, threshold = strategy(args.k, args.threshold, trained.get("k_max", 1))
    style = args.prompt_format or trained.get("prompt_format") or ("chat" if tokenizer.chat else "plain")
    questions = args.prompt or [WordProblems(args.seed, split="validation")[0]["question"]]
    prompts = [tokenizer.prompt(question, style) for question in questions]

    # --- decode with each strategy, then replay
    entries = [{"text": question, "runs": []} for question in questions]
    plain = None
    for k, threshold in [(1, None), (k, threshold)][:1 if k == 1 else 2]:
        name = "k = 1" if k == 1 else strategy_name(k, threshold)
        results = generate(model, prompts, k, threshold, tokenizer.mask_id, tokenizer.stop_ids, args.max_new_tokens)
        plain, others = plain or results, 0
        for entry, prompt, result, reference in zip(entries, prompts, results, plain):
            passes = replay(tokenizer, result, passes_of(model, prompt, result, k, tokenizer.mask_id))
            others += sum(slot["rank"] != 1 for one in passes for slot in one["slots"])
            note = f"parts from k = 1 at token {shared_prefix(result.tokens, reference.tokens) + 1}"
            if result.tokens == reference.tokens:
                note = "plain greedy decoding" if k == 1 else "the same text as k = 1"
            entry["runs"].append({"name": name, "note": note, "k": k, "threshold": threshold, "passes": passes})
        tokens, count = sum(len(r.tokens) for r in results), sum(r.passes for r in results)
        print(f"{name}: {tokens} tokens in {count} passes, {tokens / count:.2f} tokens per forward")
        if others:
            print(f"note: {others} tokens come second in the replay, which rounds differently: near-ties")

    # --- a page under its final name is whole
    data = {"model": Path(args.model).name, "prompts": entries}
    for path, text in ((args.json, json.dumps({**machine(device), **data}) + "\n"), (out, page(data))):
        if path is None:
            continue
        temporary = Path(path).with_name(f".{Path(path).name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    print(f"{out}: open it in a browser")


if __name__ == "__main__":
    run(main)
