"""
A page to play with: how an answer came about, pass by pass, in one HTML file that needs no network.

    python -m studies.viewer                        # an unseen word problem; then open viewer.html
    python -m studies.viewer "How many?" "And how much?" --threshold 0.5 --out two.html
    python -m studies.viewer --model out-gsm8k --k 3            # static k = 3 beside k = 1

Each prompt is answered twice, with k = 1 and with the strategy of --k and --threshold (as in
sample.py). The page shows both answers beside each other, the tokens of one pass in one box, and a
slider replays them. A token tells its confidence, its slot, and what else the model considered
there. Predictions that a pass did not keep are shown while that pass is replayed. With heads these
are the drafts that fell, and of a token that was emitted the page tells whether it was drafted.

Decoding hands out only what it emits, and here the rest is computed anew: `passes_of` lays out all
passes of a finished answer as training does, a text and one region for each pass, and reads them in
a single forward pass; `drafts_of` lets the heads draft again behind each pass. A part of the page
can be linked to: viewer.html#prompt=1&pass=3&run=2&token=5 (each counts from 1; run 2 is the right
column).

Shapes: P passes, L fed tokens, V vocabulary; n tokens of text, K heads, C hidden size.
"""
import codecs
import dataclasses
import itertools
import json
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli
from common.cli import ArgumentParser, printable
from common.data import read_questions
from common.files import write_text
from common.hub import default_model
from common.machine import machine, pick_device, pick_dtype
from common.report import chunks_of, shared_prefix
from heads import Drafter
from mtp import attention_mask, make_layout
from sample import Strategy, choose_strategy, load, sees_both_ways
from speculate import decode
from studies import output_file

TEMPLATE = Path(__file__).with_name("viewer.html")


# --------------------------------------------------------------------------------------------------
# The replay

@torch.inference_mode()
def passes_of(model, prompt, result, k, mask_id, top=5, at_once=32):
    """What each pass of a finished answer predicted: P lists of its k slots, each a list of the
    `top` most likely (id, probability).

    prompt, result   the ids that `generate` was given, and the Answer that it returned
    at_once          passes to replay in one forward pass, which bounds the memory for the logits

    The pass that began behind n tokens of text is a region with its anchor at n - 1. Text sees no
    mask tokens and a region no other, so each slot sees what it saw while decoding: the numbers are
    those of `generate` up to rounding.
    """
    text, passes = prompt + result.tokens, []
    anchors = [n - 1 for n in itertools.accumulate(result.chunks[:-1], initial=len(prompt))]
    for first in range(0, len(anchors), at_once):
        some = anchors[first:first + at_once]
        length = some[-1] + 1                               # nobody here sees the text behind it
        position, region, bound, slots = make_layout([length], [some], k)
        mask = attention_mask(position, region, bound, sees_both_ways(model))       # (1, L, L)
        ids = torch.tensor([text[:length] + [mask_id] * (len(some) * (k - 1))],
                           device=model.device)
        logits = model(ids, position.to(model.device), mask.to(model.device), at=slots)
        logits = logits.float()                                                     # (P, k, V)
        if mask_id is not None:
            logits[..., mask_id] = -torch.inf
        probabilities, best = logits.softmax(dim=-1).topk(top)                      # (P, k, top)
        for tokens, p in zip(best.tolist(), probabilities.tolist()):
            passes.append([list(zip(*slot)) for slot in zip(tokens, p)])
    return passes


@torch.inference_mode()
def drafts_of(model, heads, prompt, result, mask_id):
    """The drafts that each pass of a finished answer was fed: P lists of (id, probability). The
    first one is empty.

    What is drafted depends on certain tokens alone, and these the answer has. So the drafts are
    those of `speculate` up to rounding.
    """
    text = torch.tensor([prompt + result.tokens], device=model.device)              # (1, n)
    n = text.shape[1]
    positions = torch.arange(n, device=model.device)[None]
    causal = torch.ones(1, n, n, dtype=torch.bool, device=model.device).tril()
    states = model(text, positions, causal, head=False)                             # (1, n, C)
    drafter = Drafter(heads, model, 1, n + heads.depth, [] if mask_id is None else [mask_id])
    # behind each pass but the last: the tokens from `begin` on are new to the heads
    begin, passes = 0, [[]]
    ends = itertools.accumulate(result.chunks, initial=len(prompt) - 1)
    for end, (fed, _) in zip(itertools.islice(ends, 1, None), result.drafts):
        count = torch.tensor([end - begin], device=model.device)
        drafts, p = drafter.draft(                                                  # (1, K) each
            states[:, begin:end], text[:, begin + 1:end + 1], count, heads.depth)
        passes.append(list(zip(drafts[0].tolist(), p[0].tolist()))[:fed])
        begin = end
    return passes


def spell(tokenizer, token):
    """A token by itself: a control token's name, \\xe2 for a byte that is a part of a character."""
    name = tokenizer.by_id.get(token, b"id %d" % token)
    return printable(name.decode("utf-8", errors="backslashreplace"))


def texts(tokenizer, tokens):
    """What each token adds to the text. Of the tokens that share a character the last one shows it,
    the others "..."."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    shown = []
    for n, token in enumerate(tokens, 1):
        text = printable(utf8.decode(tokenizer.token_bytes([token]), final=n == len(tokens)))
        if not text:
            text = spell(tokenizer, token) if token in tokenizer.hidden_ids else "\u2026"
        shown.append(text)
    return shown


def entry(tokenizer, token, p, best, text=None):
    """What the page needs of a slot: its token, and what else was considered there."""
    name, ids = spell(tokenizer, token), [i for i, _ in best]
    return {"text": name if text is None else text, "name": name, "p": round(p, 6),
            "rank": ids.index(token) + 1 if token in ids else None,
            "top": [[spell(tokenizer, i), round(q, 6)] for i, q in best]}


def replay(tokenizer, result, passes):
    """What the page needs of each pass: how many of its slots were kept, and all slots, the unkept
    ones included."""
    shown, sure = iter(texts(tokenizer, result.tokens)), iter(result.confidences)
    record = []
    for chunk, slots in zip(chunks_of(result), passes):
        entries = []
        for slot, best in enumerate(slots):
            if slot < len(chunk):
                entries.append(entry(tokenizer, chunk[slot], next(sure), best, next(shown)))
            else:
                entries.append(entry(tokenizer, *best[0], best))
        record.append({"kept": len(chunk), "slots": entries})
    return record


def replay_drafts(tokenizer, result, considered, drafts):
    """The same of decoding with heads: what each pass emitted, and behind it the drafts that fell.
    Slots also say what they are and why they were kept or not.

    considered   for each token of the answer, what the model found most likely there
    drafts       what `drafts_of` returns
    """
    shown, record, n = texts(tokenizer, result.tokens), [], 0       # n: tokens that are done
    stood_by_pass = [0] + [stood for _, stood in result.drafts]     # the first pass reads none
    for chunk, fed, stood in zip(chunks_of(result), drafts, stood_by_pass):
        entries = []
        for place, token in enumerate(chunk):
            role, why = "the model's own token", "an ordinary next-token prediction"
            if place < stood:
                role = f"draft {place + 1}"
                why = (f"drafted with confidence {fed[place][1]:.3f}, and the model itself would "
                       "have written it here")
            slot = entry(tokenizer, token, result.confidences[n], considered[n], shown[n])
            entries.append(slot | {"role": role, "why": why})
            n += 1
        emitted = min(stood, len(chunk))                            # of the drafts
        for number, (token, p) in enumerate(fed[emitted:], emitted + 1):
            if len(chunk) <= stood:
                why, best = "not kept: it stands behind the end of the answer", []
            elif number == stood + 1:
                why = "fell: in its place the model itself writes what this pass ends with"
                best = considered[n - 1]
            else:
                why, best = f"fell: it stands behind draft {stood + 1}, which is wrong", []
            slot = entry(tokenizer, token, p, best)
            entries.append(slot | {"role": f"draft {number}", "why": why})
        record.append({"kept": len(chunk), "slots": entries})
    return record


def story(model, heads, tokenizer, prompt, result, way):
    """What the page needs of a finished answer: a list of its passes. `way` is its Strategy."""
    mask_id = tokenizer.mask_id
    if not way.lossless:
        return replay(tokenizer, result, passes_of(model, prompt, result, way.k, mask_id))
    one_by_one = dataclasses.replace(result, chunks=[1] * len(result.tokens))
    considered = [slots[0] for slots in passes_of(model, prompt, one_by_one, 1, mask_id)]
    drafts = drafts_of(model, heads, prompt, result, mask_id)
    return replay_drafts(tokenizer, result, considered, drafts)


def page(data):
    """The HTML file. In a script element the only dangerous character is "<" (</script>, <!--):
    JSON can do without it."""
    text = json.dumps(data).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    parser = ArgumentParser(prog="-m studies.viewer", description=__doc__)
    add = parser.add_argument_group("what to answer, and how").add_argument
    add("prompt", nargs="*", help="questions (default: an unseen word problem)")
    cli.add_prompt_format_flag(add)
    add("--seed", type=int, default=0, help="which word problem, without a prompt (%(default)s)")
    cli.add_strategy_flags(add)
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    cli.add_model_flag(add)
    add("--out", default="viewer.html", help="file to write (%(default)s)")
    add("--json", help="a file for what the page shows, as JSON (studies.figures draws it again)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, max_new_tokens=1)
    for path in (args.out, args.json):
        if path is not None:
            output_file(path)
    return args


def main():
    args = get_args()
    args.model = args.model or default_model()
    device = pick_device(args.device)
    model, tokenizer, trained, heads = load(args.model, device, pick_dtype(args.dtype, device))
    if not trained:
        print("note: this model has not been trained for several tokens per pass, so k = 1 stands "
              "alone (train.py)")
    strategy = choose_strategy(args.k, args.threshold, trained.get("k_max", 1), heads=heads)
    style = args.prompt_format or trained.get("prompt_format") or tokenizer.default_format
    questions = read_questions(args.prompt, None, args.seed, example=4)
    prompts = [tokenizer.prompt(question, style) for question in questions]

    # --- decode with each strategy, then replay
    entries = [{"text": question, "runs": []} for question in questions]
    plain = None
    for way in [Strategy(k=1)] + [strategy] * (strategy.k > 1):
        with tqdm(desc=way.name, unit="token", dynamic_ncols=True, leave=False, delay=1,
                  disable=None) as bar:
            results = decode(
                model, tokenizer, prompts, way, heads, max_new_tokens=args.max_new_tokens,
                on_chunk=lambda row, new: bar.update(len(new)))
        plain, others = plain or results, 0
        for entry, prompt, result, reference in zip(entries, prompts, results, plain):
            passes = story(model, heads, tokenizer, prompt, result, way)
            others += sum(slot["rank"] != 1 for one in passes
                          for slot in one["slots"][:one["kept"]])
            if result.tokens == reference.tokens:
                note = "plain greedy decoding" if way.k == 1 else "the same text as k = 1"
            else:
                shared = shared_prefix(result.tokens, reference.tokens)
                note = f"parts from k = 1 at token {shared + 1}"
            entry["runs"].append({"name": way.name, "note": note, "k": way.k,
                                  "threshold": way.threshold, "passes": passes})
        tokens, count = sum(len(r.tokens) for r in results), sum(r.passes for r in results)
        print(f"{way.name}: {tokens} tokens in {count} passes, {tokens / count:.2f} tokens per "
              "forward")
        if others:
            print(f"note: {others} tokens come second in the replay, which rounds differently: "
                  "near-ties")

    # --- the page, and what it shows
    name = args.model.removesuffix("/").removesuffix("/latest")         # of a run, its own name
    data = {"model": Path(name).name, "prompts": entries}
    if args.json:
        write_text(args.json, json.dumps({**machine(device), **data}) + "\n")
    write_text(args.out, page(data))
    cli.say(f"{args.out}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
