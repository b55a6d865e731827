"""
Decoding: several tokens per forward pass, with a fixed or a confidence-adaptive number of them.

    python sample.py "A farmer has 12 cows and buys 5 more. How many cows does she have?" --threshold 0.9
    python sample.py --k 3 --compare                            # static k = 3, then plain greedy decoding beside it
    python sample.py --lossless --compare                       # fewer passes, and the text of plain greedy decoding
    python sample.py --file questions.jsonl --batch-size 8      # many questions, decoded together

`generate` is the only decode loop of this project (paper, section on ConfAdapt); everything else here loads and prints.
One step, k = 3, with one token "pending", that is: chosen by the pass before, but not in the cache yet.

    fed         ... | pending  <|mtp|> <|mtp|>      positions c, c+1, c+2 behind a cache of c tokens
    predicts            y1       y2      y3         y1 is an ordinary next-token prediction
    confidence                  .97     .62         the probability of the most likely token

    static      keep all k.
    adaptive    keep y1, and go on while the confidence is at least the threshold: at 0.9, y1 and y2.
    lossless    emit y1, and keep y2, y3 as drafts: the next pass predicts the token behind every pending one anyway, and
                emits the drafts that it would have written itself, and one token more

Then the cache advances over the pending token only. The masks' keys and values are left behind as garbage that the
next pass overwrites, and what was kept is the next pass's pending tokens. So every pass emits 1 to k tokens and feeds at
most 2k-1, pending ones and k-1 masks; the first one feeds the prompt and k-1 masks, and lossless decoding in its wide
form up to k*k, as it puts masks behind every pending token.

A *slot* of the cache is the place of one token's key and value. Shapes: B rows still decoding, T fed tokens, S cache slots,
V vocabulary.
"""
import argparse
import functools
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import WordProblems, read_jsonl
from extras.machine import DTYPES, pick_device, pick_dtype
from extras.report import ChunkPrinter, chunks_of, shared_prefix, summary
from model import KVCache, Transformer
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, resolve, run
from regions import attention_mask, make_layout
from tokenizer import Tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# The decode loop

@dataclass
class Generation:
    """What one prompt was answered with."""
    tokens: list = field(default_factory=list)          # emitted ids, the stop token included
    confidences: list = field(default_factory=list)     # of each token: its probability at the slot that emitted it
    chunks: list = field(default_factory=list)          # tokens emitted by each pass, after every cut; sum: len(tokens)
    drafts: list = field(default_factory=list)          # lossless: (drafts fed, drafts that stood) of each verifying pass
    finish: str = ""                                    # "stop" (token), "stop string" or "length"
    prompt_seconds: float = 0.0                         # time of the first pass, which also reads the prompt
    seconds: float = 0.0                                # from the start to this row's last token

    @property
    def passes(self):
        return len(self.chunks)

    @property
    def tokens_per_forward(self):
        """Emitted tokens / passes, the prompt's pass included, since it emits tokens too."""
        return len(self.tokens) / self.passes


def accept(confidence, threshold):
    """How many of the k candidates to keep: (B, k) probabilities -> (B,) long, each in 1..k.

    threshold None keeps all (static k). Otherwise slot 1 is kept, an ordinary next-token prediction, and behind it the
    longest run of slots with a confidence of at least `threshold`: 0 keeps all k, anything above 1 keeps one.
    """
    if threshold is None:
        return torch.full_like(confidence[:, 0], confidence.shape[1], dtype=torch.long)
    return 1 + (confidence[:, 1:] >= threshold).long().cumprod(dim=1).sum(dim=1)


def cut(tokens, new, limit, stop_ids, stop_strings, decode):
    """Where a row's new block ends: (tokens to keep of `new`, finish reason or "").

    The limit comes first: a stop token beyond it was never emitted. A stop string may begin in an earlier chunk, so the
    search starts len(stop) - 1 characters before this one.
    """
    new = new[:limit - len(tokens)]
    for n, token in enumerate(new, 1):
        if token in stop_ids:
            return new[:n], "stop"
        if stop_strings:
            before, text = len(decode(tokens)), decode(tokens + new[:n])
            if any(stop in text[max(0, before - len(stop) + 1):] for stop in stop_strings):
                return new[:n], "stop string"
    return new, "length" if len(tokens) + len(new) == limit else ""


def draw(logits, temperature, top_k, top_p, generator):
    """One token from (V,) logits: softmax at `temperature`, its `top_k` most likely (0: all), of these the fewest that
    hold a share of at least `top_p` (1: all)."""
    p = (logits / temperature).softmax(dim=-1)
    ranked, order = p.sort(descending=True)
    if top_k:
        ranked[top_k:] = 0
    ranked[1:][ranked.cumsum(dim=-1)[:-1] >= top_p * ranked.sum()] = 0              # the first one always stays
    return order[torch.multinomial(ranked, 1, generator=generator)].item()


@functools.lru_cache
def region_layout(pending, k, bidirectional, device):
    """`pending` tokens and a region behind each of them: positions (1, L) and mask (L, L), as in training."""
    position, region, bound, _ = make_layout([pending], [list(range(pending))], k)
    return position.to(device), attention_mask(position, region, bound, bidirectional)[0].to(device)


def pass_layout(cache, slots, n_pending, longest, k, wide, bidirectional):
    """Where the fed tokens of a pass stand, and which slots of the cache each of them sees.

        2 pending, k = 3    p0 p1 M  M                  position = slot, and the mask is causal
        the same, wide      p0 p1 M  M  M  M            a region behind p0 and one behind p1, as in training: p0's
                            c  +1 +1 +2 +2 +3           masks stand where p1 does and behind it

    cache       knows the committed length of each row
    slots       (S,) long: 0 .. S-1, enough for the longest row and this pass
    n_pending   (B,) long: pending tokens of each row
    longest     room for them, at least the most of any row
    wide        k - 1 masks behind each pending token, not behind the last one only
    returns positions (B, T) long and mask (B, T, S) bool
    """
    if wide:
        position, own = region_layout(longest, k, bidirectional, slots.device)
        place = slots - cache.length[:, None]                           # (B, S) in this pass; below 0: committed
        in_pass = own[:, place.clamp(0, longest * k - 1)].transpose(0, 1) & (place < longest * k)[:, None]
        return cache.length[:, None] + position, in_pass | (place < 0)[:, None]
    positions = cache.next_slots(longest + k - 1)                       # (B, T)
    mask = slots <= positions[:, :, None]                               # (B, T, S)
    if bidirectional:                                                   # but the k - 1 masks behind a row's pending tokens
        first = (cache.length + n_pending)[:, None]                     # (B, 1) slot of the first of them
        among = (slots >= first) & (slots < first + k - 1)              # (B, S)
        mask = mask | (among[:, None, :] & (positions >= first)[:, :, None])
    return positions, mask


def verify(candidates, ids, n_pending, longest, k, wide):
    """Lossless decoding, the check: which pending tokens are what the model itself would have written?

    candidates   (B, L) long: the most likely token at every fed one
    ids          (B, L) long: what was fed: a verified token, n_pending - 1 drafts, and masks
    n_pending    (B,) long: pending tokens of each row
    longest      room for them in `ids`
    returns stood (B,): drafts up to the first wrong one; and chosen (B, k): where the next token and its drafts are read,
    at the last token that stood and the k - 1 masks behind it. Without `wide` only the last pending token has masks,
    so these are worth nothing unless all drafts stood.
    """
    place = torch.arange(1, longest, device=ids.device)                             # of the drafts
    right = (candidates[:, :longest - 1] == ids[:, 1:longest]) & (place < n_pending[:, None])
    stood = right.long().cumprod(dim=1).sum(dim=1)                                  # (B,)
    first_mask = longest + stood * (k - 1) if wide else n_pending
    masks = first_mask[:, None] + torch.arange(k - 1, device=ids.device)
    return stood, torch.cat((stood[:, None], masks), dim=1)


@torch.inference_mode()
def generate(model, prompts, k=1, threshold=None, mask_id=None, stop_ids=(), max_new_tokens=256, stop_strings=(),
             decode=None, on_chunk=None, lossless=None, temperature=0.0, top_k=0, top_p=1.0, seed=0, fixed=False,
             bidirectional=None):
    """Decode up to k tokens per pass (paper, section on ConfAdapt). Returns one Generation per prompt.

    model           a Transformer
    prompts         list of lists of ids; lengths may differ
    k, threshold    at most k tokens a pass; which of them, see `accept`. k = 1 is plain greedy decoding
    mask_id         id of the mask token; never emitted. Needed for k > 1
    stop_ids        ids that end a row, kept as its last token
    max_new_tokens  limit per row, exact even in the middle of a chunk; also cut at the model's context length
    stop_strings    a row also ends with the token that completes one of these; needs `decode`, ids -> str
    on_chunk        called as on_chunk(row, new ids) after every pass of every row
    lossless        None: what a pass keeps is emitted. "wide" or "narrow": it is a draft, and emitted only when the next
                    pass has verified it. `threshold` then limits what is drafted, and the text is that of k = 1
    temperature     above 0: a pass that keeps one token draws it (see `draw`; `seed` and the row's number decide);
                    longer chunks stay greedy
    fixed           for a compiled model: all passes but the first have one shape (the largest width, the whole cache, rows
                    that are done stay in the batch until all are). The text is the same
    bidirectional   the masks of a region see each other both ways; None: if the checkpoint was trained so
    Raises InputError for an empty prompt, one longer than the context, k > 1 without a mask token, or a temperature in
    lossless mode.

    Rows need no padding on the left. Each has its own committed length in the cache and its own number of pending
    tokens; short ones are filled up with more masks *behind* their own. In a causal model nothing to the left of those
    ever sees them, so a row's answer does not depend on its neighbours.
    """
    context, device = model.config.max_position_embeddings, model.device
    if bidirectional is None:
        bidirectional = model.config.raw.get("nanomtp", {}).get("bidirectional", False)
    if k > 1 and mask_id is None:
        raise InputError("this checkpoint has no mask token, so it emits one token per pass: train it first (train.py)")
    if lossless and temperature > 0:
        raise InputError("lossless decoding reproduces greedy text: it knows no temperature")
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise InputError(f"a prompt of {len(prompt)} tokens does not fit the model's context of {context} tokens")
    results = [Generation() for _ in prompts]
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    pending = [list(prompt) for prompt in prompts]                      # in the first pass, all of the prompt
    committed = [0] * len(prompts)                                      # tokens in the cache: cache.length for the host
    active = list(range(len(prompts)))                                  # rows still decoding, in the cache's order
    filler = 0 if mask_id is None else mask_id                          # k = 1: any id will do, nothing sees it
    generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + row) for row in active] if temperature > 0 else []
    # room for the longest row and for its last pass, which may feed k pending tokens and masks at the very end
    capacity = max(map(len, prompts), default=0) + max(limits, default=0) + k * max(2, k if lossless == "wide" else 0)
    capacity += -capacity % 128 if fixed else 0                         # few sizes, so that few are compiled
    cache = KVCache(model.config, len(prompts), capacity, device, model.model.embed_tokens.weight.dtype)
    all_slots = torch.arange(capacity, device=device)
    start, verifying = time.perf_counter(), False                       # the first pass has nothing to verify
    while active:
        # --- 1. feed the pending tokens and masks: k - 1 behind the last one, or, to verify, behind each ("wide")
        counts = [len(pending[row]) for row in active]
        n_pending = torch.tensor(counts, device=device)                 # (B,)
        wide, steady = verifying and lossless == "wide", fixed and committed[active[0]] > 0
        longest = k if steady else max(counts)
        width = longest * k if wide else longest + k - 1                # T
        reach = capacity if steady else max(committed[row] for row in active) + width
        ids = torch.tensor([pending[row] + [filler] * (width - n) for row, n in zip(active, counts)], device=device)
        positions, mask = pass_layout(cache, all_slots[:reach], n_pending, longest, k, wide, bidirectional)
        # --- 2. candidates and confidences at the last pending token and the k - 1 masks behind it; to verify, everywhere
        rows = torch.arange(len(active), device=device)[:, None]
        at = None if verifying else (rows, n_pending[:, None] - 1 + torch.arange(k, device=device))
        forward = model if steady or not fixed else model.forward       # the prompt's pass has a shape of its own: eager
        logits = forward(ids, positions, mask, cache, at=at).float()    # (B, k or T, V)
        if mask_id is not None:
            logits[..., mask_id] = -torch.inf
        top, candidates = logits.max(dim=-1)                            # (B, k or T) each
        confidence = (top - logits.logsumexp(dim=-1)).exp()
        # --- 3. keep the static or confident prefix of the candidates
        stood = n_pending - 1                                           # drafts that stand: without lossless mode, all
        if verifying:
            plain, sure = candidates, confidence                        # behind every pending token, for step 5
            stood, chosen = verify(candidates, ids, n_pending, longest, k, wide)
            candidates, confidence = candidates[rows, chosen], confidence[rows, chosen]
        kept = accept(confidence, threshold)                            # (B,)
        if verifying and not wide:                                      # a draft fell, and the masks behind it saw it: keep
            kept = torch.where(stood == n_pending - 1, kept, 1)         # no more than the certain next token
        # --- 4. commit the pending tokens that stand, and forget the rest and the masks
        cache.advance((stood + 1) * torch.tensor([not results[row].finish for row in active], device=device))
        # --- 5. cut each row where it ends (the one place where the host waits for the device)
        kept, stood = kept.tolist(), stood.tolist()
        plain, sure = (plain.tolist(), sure.tolist()) if verifying else (None, None)
        candidates, confidence = candidates.tolist(), confidence.tolist()
        now = time.perf_counter() - start
        going = []
        for i, row in enumerate(active):
            if results[row].finish:                                     # only with `fixed`
                continue
            result = results[row]
            committed[row] += stood[i] + 1
            emitted, certain = candidates[i][:kept[i]], confidence[i][:kept[i]]
            pending[row] = emitted
            if verifying:                                               # emitted: the drafts that stood, and the token
                emitted, certain = plain[i][:stood[i] + 1], sure[i][:stood[i] + 1]      # after them: pending[row][0]
                result.drafts.append((counts[i] - 1, stood[i]))
            elif lossless:                                              # first pass: all but the first are drafts
                emitted, certain = emitted[:1], certain[:1]
            elif temperature > 0 and kept[i] == 1:
                emitted = pending[row] = [draw(logits[i, 0], temperature, top_k, top_p, generators[row])]
                certain = logits[i, 0].log_softmax(dim=-1)[emitted].exp().tolist()
            new, result.finish = cut(result.tokens, emitted, limits[row], stop_ids, stop_strings, decode)
            result.tokens += new
            result.confidences += certain[:len(new)]
            result.chunks.append(len(new))
            result.seconds = now
            if result.passes == 1:
                result.prompt_seconds = now
            if not result.finish:
                going.append(i)
            if on_chunk:
                on_chunk(row, new)
        if len(going) < len(active) and not (fixed and going):          # rows that are done leave the batch
            cache.keep_rows(torch.tensor(going, dtype=torch.long, device=device))
            active = [active[i] for i in going]
        verifying = lossless is not None
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Loading, and what `--k` and `--threshold` mean

def load(name, device, dtype, cache=None, compiled=False):
    """(model, fused for decoding; tokenizer; what config.json says under "nanomtp") for a `--model` name, see resolve()."""
    folder = resolve(name, cache)
    model, tokenizer = Transformer.from_pretrained(folder, dtype, device).eval().fuse(), Tokenizer(folder)
    if compiled:
        model.compile(dynamic=False)                                    # and call generate(..., fixed=True)
    return model, tokenizer, model.config.raw.get("nanomtp", {})


def default_model():
    """out/latest where train.py left one, else the untrained start checkpoint."""
    return "out/latest" if Path("out/latest").is_dir() else DEFAULT_MODEL


def strategy(k, threshold, k_max, lossless=None):
    """(k, threshold) for `generate` from the two flags, either of which may be None. Raises InputError for k > k_max.

    k alone: static k.  threshold alone: adaptive up to k_max.  Both: adaptive, at most k.  Neither: adaptive 0.9, and in
    lossless mode, where a wrong draft costs nothing but its place in the pass, all drafts.
    """
    if k is None and threshold is None and not lossless:
        threshold = 0.9
    if k is not None and not 1 <= k <= k_max:
        raise InputError(f"--k {k}: this checkpoint was trained for 1 to {k_max} tokens per pass")
    return k or k_max, threshold


def strategy_name(k, threshold, lossless=None):
    """How tables and headings call a strategy."""
    if lossless:
        return f"lossless {k}" + (" narrow" if lossless == "narrow" else "") + (f" at {threshold:g}" if threshold else "")
    return f"static {k}" if threshold is None or k == 1 else f"adaptive {threshold:g}"


# ----------------------------------------------------------------------------------------------------------------------
# The script

def read_questions(args):
    """The questions to answer: the positional ones, then --file's, else one unseen word problem."""
    questions = list(args.prompt)
    if args.file and Path(args.file).suffix in (".jsonl", ".json"):
        questions += [row["question"] for row in read_jsonl(args.file)]
    elif args.file:
        try:
            questions += [line for line in Path(args.file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {args.file}: {error}") from None
    if not questions and not args.file:
        questions = [WordProblems(args.seed, split="validation")[0]["question"]]
    if not questions:
        raise InputError(f"{args.file} holds no prompts")
    return questions[:args.limit]


def main():
    parser, flag = ArgumentParser(prog="sample.py", description=__doc__), argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to answer").add_argument
    add("prompt", nargs="*", help="questions (default: an unseen word problem)")
    add("--file", help="more questions: a text file with one per line, or JSONL rows as for training")
    add("--limit", type=int, help="answer only the first N questions")
    add("--prompt-format", choices=["plain", "chat"], help="default: what the checkpoint was trained with")
    add("--seed", type=int, default=0, help="which word problem, without a prompt (%(default)s)")
    add = parser.add_argument_group("decoding").add_argument
    add("--k", type=int, help="most tokens per pass; alone: static k, all of them kept; 1: plain decoding")
    add("--threshold", type=float, help="adaptive: keep tokens of at least this confidence, at most the checkpoint's "
        "k_max or --k (0.9 where --k is not given)")
    add("--lossless", action=flag, default=False, help="emit only what the next pass has verified: the text of --k 1")
    add("--narrow", action=flag, default=False, help="lossless: masks behind the last pending token only, not behind each")
    add("--temperature", type=float, default=0.0, help="above 0: draw the tokens that come alone (%(default)s: greedy)")
    add("--top-k", type=int, default=0, help="draw from the k most likely (%(default)s: all)")
    add("--top-p", type=float, default=1.0, help="draw from the fewest that hold this share (%(default)s: all)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--stop", action="append", default=[], help="a string that ends an answer; may be given several times")
    add("--ignore-stop", action=flag, default=False, help="do not end at stop tokens")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add("--compare", action=flag, default=False, help="decode again with k = 1 and say where the answers part")
    add = parser.add_argument_group("model and machine").add_argument
    add("--model", help=f"tiny, smollm2-135m, a folder or a hub id (out/latest if there is one, else {DEFAULT_MODEL})")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--compile", action=flag, default=False, help="torch.compile: seconds to minutes first, faster passes then")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast (%(default)s)")
    args = parser.parse_args()
    at_least(args, batch_size=1, max_new_tokens=1, limit=1)
    if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise InputError("--temperature and --top-k must be at least 0, --top-p above 0 and at most 1")
    if args.lossless and args.temperature > 0:
        raise InputError("--lossless reproduces greedy text: it knows no --temperature")
    if args.narrow and not args.lossless:
        raise InputError("--narrow is a form of --lossless: give both")
    if "" in args.stop:
        raise InputError("--stop must not be empty")
    questions = read_questions(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, trained = load(args.model or default_model(), device, dtype, args.cache, args.compile)
    if not trained:
        print("note: this model has not been trained for several tokens per pass, so each pass emits one (train.py)")
    lossless = args.lossless and ("narrow" if args.narrow else "wide")
    k, threshold = strategy(args.k, args.threshold, trained.get("k_max", 1), lossless)
    style = args.prompt_format or trained.get("prompt_format") or ("chat" if tokenizer.chat else "plain")
    prompts = [tokenizer.prompt(question, style) for question in questions]

    def answer_all(k, threshold, **more):
        """Decode all questions and print the answers; returns the Generations. A single answer is printed as it comes."""
        print("\n=== " + strategy_name(k, threshold, more.get("lossless")))
        batches, live = [], len(prompts) == 1
        for at in range(0, len(prompts), args.batch_size):
            printers = [ChunkPrinter(tokenizer) for _ in prompts[at:at + args.batch_size]]
            if live:
                print(f"\n{questions[0]}\n")
            batches.append(generate(
                model, prompts[at:at + args.batch_size], k, threshold, tokenizer.mask_id,
                () if args.ignore_stop else tokenizer.stop_ids, args.max_new_tokens, args.stop, tokenizer.decode,
                on_chunk=(lambda row, new, printers=printers: printers[row](new)) if live else None,
                fixed=args.compile, **more))
            for question, result, printer in zip(questions[at:], batches[-1], printers):
                if not live:
                    print(f"\n{question}\n")
                    for chunk in chunks_of(result):
                        printer(chunk)
                print()
        print("\n" + summary(batches))
        return [result for batch in batches for result in batch]

    ours = answer_all(k, threshold, lossless=lossless or None, temperature=args.temperature, top_k=args.top_k,
                      top_p=args.top_p, seed=args.seed)
    if args.compare:
        plain = answer_all(1, None)
        same = sum(a.tokens == b.tokens for a, b in zip(ours, plain))
        shared = sum(shared_prefix(a.tokens, b.tokens) for a, b in zip(ours, plain))
        print(f"\n{same} of {len(plain)} answers identical to k = 1; {shared / sum(len(b.tokens) for b in plain):.0%} of "
              "k = 1's tokens come before the first difference")


if __name__ == "__main__":
    run(main)
