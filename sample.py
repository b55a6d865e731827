"""
Decoding: several tokens per forward pass, a fixed or a confidence-adaptive number of them.

    python sample.py --threshold 0.9                            # an unseen word problem, in chunks
    python sample.py --k 3 --compare                            # static k = 3, and k = 1 beside it
    python sample.py --lossless --compare                       # fewer passes, the text of k = 1
    python sample.py "Ava walks 7 km every day. How many km is that in 9 days?"
    python sample.py --model smollm2-135m "Why is the sky blue?"    # a model that knows more
    python sample.py --model out --data questions.jsonl         # many questions, in batches

The model was taught (train.py) to predict the next token at the last real token, as ever, and the
one after that at a mask token that follows, and so on. Two steps of `generate`, k = 3. A token is
*pending* when the pass before has chosen it, but the key/value cache does not hold it yet:

    fed          x     M     M          x pending; M: the mask token, <|mtp|>
    position     c    c+1   c+2         the cache holds c tokens
    predicts     y1    y2    y3         y1 is an ordinary next-token prediction
    confidence  .98   .97   .62         the probability of each most likely token

    fed          y1    y2    M     M    y1 and y2 were kept: now they are pending, fed as themselves
    position    c+1   c+2   c+3   c+4   the cache holds c + 1 tokens: x went in, its two M did not
    predicts           z1    z2    z3

How many are kept:

    static      all k
    adaptive    the longest run, from y1 on, with confidences above the threshold, and y1 in any
                case: at 0.9 that is y1 and y2 (ConfAdapt; paper, section on static vs. adaptive
                decoding)

The cache advances over pending tokens only: what the mask tokens left in it, the next pass
overwrites. So every pass emits 1 to k tokens and feeds at most 2k - 1; the first one feeds the
prompt and k - 1 mask tokens. With k = 1 this is plain decoding, one token per pass, greedy or
(--temperature) sampled. A row ends after the first stop token, which is kept, or at its limit; the
code for that is in common/answers.py. What `--lossless` does is in speculate.py.

Shapes: B rows still decoding, T fed tokens, S places in the cache, V vocabulary.
"""
import functools
from typing import NamedTuple

from common import cli              # before torch: Ctrl-C while that is loading ends quietly

import torch

from adapters import load_adapted
from common.answers import Answers, check_prompts
from common.cli import SWITCH, ArgumentParser, InputError
from common.data import read_questions
from common.files import read_note
from common.hub import default_model, knows_word_problems_alone, resolve
from common.machine import pick_device, pick_dtype
from common.report import ChunkPrinter, chunks_of, shared_text, summary
from common.tokenizer import Tokenizer
from common.wordproblems import STRUCTURES
from heads import load_heads
from model import KVCache, Transformer

# --------------------------------------------------------------------------------------------------
# Which tokens, and how many of them

def most_likely(logits):
    """Each slot's most likely token and its probability: (..., V) -> (...) long and (...) fp32."""
    top, token = logits.max(dim=-1)
    return token, 1 / (logits - top[..., None]).exp().sum(dim=-1)       # faster than by logsumexp


def draw(logits, temperature, top_k, top_p, generator):
    """Tokens at random instead: (B, T, V) -> tokens (B, T) long and their probabilities (B, T).

    Each is drawn from the softmax at `temperature`: from its `top_k` most likely tokens (0: all),
    and of these from the fewest that hold a share of at least `top_p`. The probability that is
    returned is the plain softmax's.
    """
    p = (logits / temperature).softmax(dim=-1)                              # (B, T, V)
    ranked, order = p.sort(dim=-1, descending=True)
    if top_k:
        ranked[..., top_k:] = 0
    before = ranked.cumsum(dim=-1) - ranked                                 # share of likelier ones
    ranked[before >= top_p * ranked.sum(dim=-1, keepdim=True)] = 0
    rank = torch.multinomial(ranked.flatten(0, 1), 1, generator=generator)  # (B * T, 1)
    token = order.gather(-1, rank.view(*order.shape[:2], 1))                # (B, T, 1)
    return token[..., 0], logits.softmax(dim=-1).gather(-1, token)[..., 0]


def accept(confidence, threshold):
    """How many of the k candidates to keep: (B, k) probabilities -> (B,) long, each in 1..k.

    threshold   None: all of them (static k). Else the run of slots, from slot 1 on, that are above
                it; where slot 1 itself is not, slot 1 alone
    """
    if threshold is None:
        return torch.full_like(confidence[:, 0], confidence.shape[1], dtype=torch.long)
    return (confidence > threshold).long().cumprod(dim=1).sum(dim=1).clamp(min=1)


# --------------------------------------------------------------------------------------------------
# The decode loop

def never_emitted(model, tokenizer, k):
    """Ids that are no candidates, a list: the mask token, if this model has one.

    Raises InputError for k > 1 without it.
    """
    mask_id = tokenizer.mask_id
    has_mask = mask_id is not None and mask_id < model.config.vocab_size
    if k > 1 and not has_mask:
        raise InputError("this checkpoint has no mask token, so it emits one token per pass: train "
                         "it first (train.py)")
    return [mask_id] if has_mask else []


def sees_both_ways(model):
    """Was this checkpoint trained with --bidirectional? train.py notes it in config.json."""
    return model.config.raw.get("nanomtp", {}).get("bidirectional", False)


def mask_for_pass(positions, n_pending, k, S, bidirectional):
    """Who sees whom in one pass: every fed token all of the cache up to itself. (B, T, S) bool.

    positions   (B, T) long: where the fed tokens stand, in the text and in the cache
    n_pending   (B,) long: how many of them are real
    bidirectional   the k - 1 mask tokens behind these also see each other both ways, as in training
    """
    places = torch.arange(S, device=positions.device)
    mask = places <= positions[:, :, None]                                  # (B, T, S)
    if bidirectional:
        first = (positions[:, 0] + n_pending)[:, None]                      # (B, 1) the first one
        among = (places >= first) & (places < first + k - 1)                # (B, S)
        mask = mask | (among[:, None, :] & (positions >= first)[:, :, None])
    return mask


@torch.inference_mode()
def generate(model, tokenizer, prompts, k=1, threshold=None, max_new_tokens=256, stop_strings=(),
             on_chunk=None, choose=most_likely):
    """Decode up to k tokens per pass (paper, section on static vs. adaptive decoding).

    model, tokenizer    a Transformer, and what belongs to it
    prompts             lists of ids; lengths may differ
    k, threshold        at most k tokens a pass; how many of them, see `accept`
    max_new_tokens, stop_strings, on_chunk      see `Answers`
    choose              logits (B, k, V) -> tokens and probabilities (B, k); `draw` is for k = 1
    returns             one Answer per prompt
    Raises InputError for a prompt that does not fit, or k > 1 without a mask token.

    Rows need no padding on the left. Each has its own length in the cache; one with fewer pending
    tokens than others gets more mask tokens *behind* its own k - 1, which nothing before them sees.
    """
    never = never_emitted(model, tokenizer, k)
    filler = never[0] if never else 0               # k = 1: any id will do, since nothing sees it
    answers = Answers(model, tokenizer, prompts, max_new_tokens, stop_strings, on_chunk)
    cache = KVCache(model, len(prompts), answers.longest + 2 * k)   # longest: prompt and answer
    pending = [list(prompt) for prompt in prompts]  # kept, but not in the cache; at first all of it
    bidirectional = sees_both_ways(model)

    while answers.active:                           # numbers of the prompts that still go on
        # --- 1. Feed each row's pending tokens and, behind them, k - 1 mask tokens
        T = max(map(len, pending)) + k - 1
        ids = [tokens + [filler] * (T - len(tokens)) for tokens in pending]
        ids = torch.tensor(ids, device=model.device)                                    # (B, T)
        n_pending = torch.tensor([len(tokens) for tokens in pending], device=model.device)
        positions = cache.next_places(T)                                                # (B, T)
        S = int(cache.length.max()) + T
        mask = mask_for_pass(positions, n_pending, k, S, bidirectional)                 # (B, T, S)

        # --- 2. The k predictions: at the last pending token, and at the k - 1 mask tokens
        row = torch.arange(len(ids), device=model.device)[:, None]                      # (B, 1)
        place = n_pending[:, None] - 1 + torch.arange(k, device=model.device)           # (B, k)
        logits = model(ids, positions, mask, cache, at=(row, place)).float()            # (B, k, V)
        logits[..., never] = -torch.inf
        candidates, confidence = choose(logits)                                         # (B, k)

        # --- 3. Keep all of them, or as many as are sure
        kept = accept(confidence, threshold)                                            # (B,)

        # --- 4. Commit the pending tokens. What the mask tokens left in the cache is overwritten
        cache.advance(n_pending)

        # --- 5. Emit what was kept, cut after the first stop token or at the limit. Rows that end
        # are dropped; for those that go on (`going`: their indices in the batch) it is pending now
        chunks = [tokens[:n] for tokens, n in zip(candidates.tolist(), kept.tolist())]
        going = answers.add(chunks, confidence.tolist())
        cache.keep_rows(going)
        pending = [chunks[i] for i in going]
    return answers.results


# --------------------------------------------------------------------------------------------------
# Loading, and what the flags mean

def load(name, device, dtype):
    """For a --model name: (model, ready to decode; tokenizer; train.py's note in config.json, {} if
    it was not trained here; heads of heads.py, or None)."""
    folder = resolve(name)
    if (folder / "adapters" / "adapter_config.json").exists():
        model = load_adapted(folder, dtype, device)
    else:
        model = Transformer.from_pretrained(folder, dtype, device)
    model = model.eval().fuse()
    heads, note = load_heads(folder, dtype, device), read_note(model.config.raw)
    if heads:
        heads.eval().fuse()
        note = note | {"k_max": heads.depth + 1}        # also of heads that were not trained here
    return model, Tokenizer(folder), note, heads


class Strategy(NamedTuple):
    """A way of decoding; `speculate.decode` takes it to the loop that it belongs to."""
    k: int = 1
    threshold: float | None = None
    lossless: str | None = None                     # "wide", "narrow" or "heads": see speculate.py

    @property
    def name(self):
        """As tables and headings call it."""
        if self.lossless:
            form = "" if self.lossless == "wide" else f" {self.lossless}"
            limit = f" at {self.threshold:g}" if self.threshold is not None else ""
            return f"lossless {self.k}{form}{limit}"
        if self.k == 1:
            return "k = 1"
        return f"static {self.k}" if self.threshold is None else f"adaptive {self.threshold:g}"


def choose_strategy(k, threshold, k_max, lossless=None, heads=None):
    """The Strategy that --k and --threshold ask for; either may be None. InputError for k > k_max.

    k alone: static k. threshold alone: adaptive, up to k_max. Both: adaptive, at most k. Neither:
    adaptive 0.9; lossless, where a wrong draft loses nothing, without a threshold. What `heads`
    draft is always verified.
    """
    if heads and k != 1:
        lossless = "heads"
    if k is None and threshold is None and not lossless:
        threshold = 0.9
    if k is not None and not 1 <= k <= k_max:
        raise InputError(f"--k {k}: this checkpoint was trained for 1 to {k_max} tokens per pass")
    k = k or k_max
    return Strategy(k, None if k == 1 else threshold, lossless)


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument_group("what to answer").add_argument
    add("prompt", nargs="*", help="questions (default: an unseen word problem)")
    add("--data", help="more questions: a text file with one per line, or JSONL rows to train on")
    add("--limit", type=int, help="answer only the first N questions")
    cli.add_prompt_format_flag(add)
    add("--seed", type=int, default=0, help="which word problem; with --temperature also which "
        "tokens (%(default)s)")

    add = parser.add_argument_group("decoding").add_argument
    cli.add_strategy_flags(add)
    add("--lossless", action=SWITCH, default=False,
        help="emit only what the next pass has verified: the text of --k 1")
    add("--narrow", action=SWITCH, default=False,
        help="lossless: mask tokens behind the last draft only, not behind each")
    add("--temperature", type=cli.number, default=0.0,
        help="draw tokens from the softmax at this temperature: with --k 1, or, several per pass, "
        "where drafts are verified: --lossless, heads (%(default)s: greedy)")
    add("--top-k", type=int, default=0, help="draw from the k most likely (%(default)s: all)")
    add("--top-p", type=cli.number, default=1.0,
        help="draw from the fewest that hold this share (%(default)s: all)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--stop", action="append", default=[], help="a string that ends an answer; repeatable")
    add("--ignore-stop", action=SWITCH, default=False, help="do not end at stop tokens")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add("--compare", action=SWITCH, default=False,
        help="decode again with k = 1 and say where the answers part")

    add = parser.add_argument_group("model and machine").add_argument
    cli.add_model_flag(add)
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, batch_size=1, max_new_tokens=1, limit=1, temperature=0, top_k=0, top_p=0)
    if not 0 < args.top_p <= 1:
        raise InputError("--top-p must be above 0 and at most 1")
    if args.temperature > 0 and args.compare:
        raise InputError("--compare shows where greedy texts part: leave it out, or --temperature")
    if args.narrow and not args.lossless:
        raise InputError("--narrow is a form of --lossless: give both")
    if "" in args.stop:
        raise InputError("--stop must not be empty")
    return args


def answer_all(decode, questions, prompts, tokenizer, batch_size, boxed):
    """Decode and print all questions, a single one as it comes. Returns their Answers.

    decode   (prompts of a batch, on_chunk) -> their Answers
    boxed    show which tokens came together
    """
    batches = []
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        printer = ChunkPrinter(tokenizer, boxed=boxed) if len(prompts) == 1 else None
        if printer:
            cli.say(f"\n{questions[0]}\n")
        results = decode(prompts[batch], printer and (lambda row, new: printer(new)))
        for question, result in zip(questions[batch], results):
            if not printer:
                cli.say(f"\n{question}\n")
                each = ChunkPrinter(tokenizer, boxed=boxed)
                for chunk in chunks_of(result):
                    each(chunk)
            print()
        batches.append(results)
    print("\n" + summary(batches))
    return [result for batch in batches for result in batch]


def main():
    from speculate import decode        # here, since it imports this file

    args = get_args()
    questions = read_questions(args.prompt, args.data, args.seed, example=7)[:args.limit]
    device = pick_device(args.device)
    name = args.model or default_model()
    model, tokenizer, trained, heads = load(name, device, pick_dtype(args.dtype, device))
    after = f" after {trained['steps']} steps" if "steps" in trained else ""
    cli.say(f"{name}{after}, k_max {trained.get('k_max', 1)}")
    if not args.prompt and not args.data:
        print(f"an unseen word problem (another one: --seed {args.seed + 1})")
    elif knows_word_problems_alone(tokenizer):
        print(f"note: this model knows {len(STRUCTURES)} kinds of word problems, in their own "
              "words (python -m common.data shows some). If yours is none of them, expect "
              "nonsense; --model smollm2-135m knows more, if not much")
    if not trained:
        print("note: this model has not been trained for several tokens per pass, so each pass "
              "emits one (train.py)")
    if args.ignore_stop:
        tokenizer.stop_ids = set()
    lossless = args.lossless and ("narrow" if args.narrow else "wide") or None
    strategy = choose_strategy(args.k, args.threshold, trained.get("k_max", 1), lossless, heads)
    if args.temperature > 0 and strategy.k > 1 and not strategy.lossless:
        raise InputError("--temperature draws several tokens per pass only where they are "
                         "verified: add --lossless, or --k 1")
    if args.narrow and heads:
        raise InputError("--narrow is about mask tokens, and this checkpoint drafts with heads: "
                         "leave it out")
    style = args.prompt_format or trained.get("prompt_format") or tokenizer.default_format
    prompts = [tokenizer.prompt(question, style) for question in questions]
    check_prompts(prompts, model)
    ending = {"max_new_tokens": args.max_new_tokens, "stop_strings": args.stop}
    sampling = {}
    if args.temperature > 0:
        generator = torch.Generator(device).manual_seed(args.seed)
        sampling["choose"] = functools.partial(
            draw, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=generator)

    def show(strategy, **more):
        # a few tokens that are not shown: the first passes of a process are slow
        decode(model, tokenizer, prompts[:1], strategy, heads, max_new_tokens=2 * strategy.k)
        print("\n=== " + strategy.name)
        return answer_all(
            lambda some, on_chunk: decode(
                model, tokenizer, some, strategy, heads, **ending, **more, on_chunk=on_chunk),
            questions, prompts, tokenizer, args.batch_size, boxed=strategy.k > 1)

    ours = show(strategy, **sampling)
    if args.compare:
        plain = show(Strategy(k=1))
        ours, plain = ([result.tokens for result in results] for results in (ours, plain))
        same, shared = sum(a == b for a, b in zip(ours, plain)), shared_text(ours, plain)
        print(f"\n{same} of {len(plain)} answers identical to k = 1; {shared:.0%} of k = 1's "
              "tokens come before the first difference (for speed, compare many answers: "
              "eval_gsm8k.py)")


if __name__ == "__main__":
    cli.run(main)
