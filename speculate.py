"""
Draft and verify: fewer passes, and exactly the text that the same checkpoint writes with k = 1.

    python sample.py --lossless --compare                       # the same text, in fewer passes
    python sample.py --lossless --narrow --compare              # narrower passes, for a CPU
    python eval_gsm8k.py --data wordproblems --lossless --narrow
    python sample.py --model out-heads --compare        # trained with --heads: drafts by heads.py

sample.py emits what the mask tokens predict. Here it is only a *draft*: the next pass reads it as
text, and so computes anyway what the model itself would have written instead. Drafts stand up to
the first one that differs, and after the last that stands the model's own next token is certain.
(For the paper this is future work; verifying drafts in one pass is speculative decoding, Leviathan
et al. 2023, arXiv 2211.17192.)

    one step, k = 3; t is certain, d1 and d2 are drafts that the pass before has left

    fed          t      d1     d2  |  M  M  |  M  M  |  M  M        wide: a region of k - 1 mask
    predicts    e1      e2     e3  | behind t behind d1 behind d2   tokens behind each of them

    d1 = e1, d2 != e2:  d1 stands, and e2 is certain; emitted are d1 and e2. The mask tokens behind
    d1 have guessed, without seeing d2 or e2, what follows e2: in the next pass e2 is t, and these
    guesses are d1 and d2.

*Wide* has fresh drafts whatever stands, at up to k * k tokens a pass. *Narrow* puts mask tokens
behind the last draft alone, up to 2k - 1 tokens a pass: where any draft falls, these have read it,
and the next pass has none to verify.

*Heads* need no mask tokens: they draft after the pass, from the hidden states of what stands, k - 1
drafts behind the newest certain token (heads.py). A pass is up to k tokens, and the text is that of
the model that they were trained beside, which they leave as it was.

The committed length advances over t and the standing drafts only. A drafted stop token ends nothing
until it is verified. The text is that of k = 1 up to near-ties between kernels of different widths.

*Sampling* loses nothing either. Speculative sampling keeps a draft x with probability p(x), p being
the model's distribution in its place, and where it refuses draws from p without x (Leviathan et
al.; for a draft that was not itself drawn). That is: draw y from p, and keep the draft if it is y,
else y is what comes there. So the loop stays as it is; `choose` draws instead of taking the most
likely token.

Shapes: B rows still decoding, W room for certain tokens and drafts, D room for drafts, R regions,
T = W + R(k-1) fed tokens, S places in the cache, V vocabulary.
"""
import torch
import torch.nn.functional as F

from common.answers import Answers
from heads import Drafter
from model import KVCache
from mtp import PADDING, TEXT, attention_mask
from sample import accept, generate, most_likely, never_emitted, sees_both_ways


def decode(model, tokenizer, prompts, strategy, heads=None, **ending):
    """`generate` or `speculate`, as a sample.Strategy wants it. Returns one Answer per prompt.

    heads   a heads.Heads, of a model that has some
    """
    if not strategy.lossless:
        return generate(model, tokenizer, prompts, strategy.k, strategy.threshold, **ending)
    return speculate(model, tokenizer, prompts, strategy.k, strategy.threshold,
                     narrow=strategy.lossless == "narrow",
                     heads=heads if strategy.lossless == "heads" else None, **ending)


def lay_out(committed, n_text, anchors, W, k, bidirectional):
    """Where the fed tokens stand, and who sees whom: a region for each anchor, as in training.

    committed   (B,) long: tokens in each row's cache
    n_text      (B,) long: real tokens (certain and drafts) that each row feeds, at most W
    anchors     (B, R) long: places of the fed tokens that regions belong to
    returns     positions (B, T) long, and the attention mask (B, T, S) bool, S = most committed + T

    The cache gets the fed tokens in the order in which they are fed, real ones first, so a mask
    token's place in it is not its position: the region of the first anchor overlaps the drafts.
    """
    B, R = anchors.shape
    place = torch.arange(W, device=anchors.device).expand(B, W)
    behind = torch.arange(1, k, device=anchors.device)
    position = torch.cat((place, (anchors[:, :, None] + behind).flatten(1)), dim=1)     # (B, T)
    bound = torch.cat((place, anchors.repeat_interleave(k - 1, dim=1)), dim=1)
    text = torch.where(place < n_text[:, None], TEXT, PADDING)                          # (B, W)
    owner = torch.arange(R, device=anchors.device).repeat_interleave(k - 1).expand(B, -1)
    region = torch.cat((text, owner), dim=1)                                            # (B, T)
    among_fed = attention_mask(position, region, bound, bidirectional)                  # (B, T, T)

    # Which fed token lies in each place of the cache? Below 0: committed before, all see it. T and
    # above: nothing is there yet, none sees it. Between: who sees it, `among_fed` says
    T, S = position.shape[1], int(committed.max()) + position.shape[1]
    fed_token = torch.arange(S, device=anchors.device) - committed[:, None]             # (B, S)
    key = fed_token.clamp(0, T - 1)[:, None].expand(B, T, S)
    mask = among_fed.gather(2, key) & (fed_token < T)[:, None]
    return committed[:, None] + position, mask | (fed_token < 0)[:, None]


def verify(drafts, n_drafts, predicted):
    """How many drafts stand: those before the first that the model would not have written.

    drafts      (B, D) long, and n_drafts (B,) long: how many of them are real
    predicted   (B, D + 1) long: the model's own token in each draft's place, and the one after
    returns     (B,) long
    """
    real = torch.arange(drafts.shape[1], device=drafts.device) < n_drafts[:, None]
    return ((drafts == predicted[:, :-1]) & real).long().cumprod(dim=1).sum(dim=1)


@torch.inference_mode()
def speculate(model, tokenizer, prompts, k, threshold=None, narrow=False, max_new_tokens=256,
              stop_strings=(), on_chunk=None, choose=most_likely, heads=None):
    """Decode losslessly, up to k tokens per pass. Arguments and errors are `sample.generate`'s, but

    threshold   limits what is drafted, by `sample.accept`: where slot 1 was unsure, though it is
                certain here, nothing. What is emitted it does not change
    narrow      mask tokens behind the last draft only, see the top of this file
    choose      how the model's own tokens are chosen; what is emitted is distributed as with k = 1
    heads       a heads.Heads: drafts are its, and no mask token is fed
    returns     one Answer per prompt, with `drafts`, (fed, stood) of each verifying pass
    """
    heads = heads if k > 1 else None
    never = never_emitted(model, tokenizer, 1 if heads else k)
    filler = never[0] if never else 0               # for a shorter row: nothing in front sees it
    answers = Answers(model, tokenizer, prompts, max_new_tokens, stop_strings, on_chunk)
    capacity = answers.longest + k * k + k
    cache = KVCache(model, len(prompts), capacity)
    drafter = heads and Drafter(heads, model, len(prompts), capacity, never)
    certain = [list(prompt) for prompt in prompts]  # not in the cache yet; after that one token
    drafts = [[] for _ in prompts]
    bidirectional, device = sees_both_ways(model), model.device

    while answers.active:
        # --- 1. Feed the certain tokens, the drafts, and regions of mask tokens
        text = [sure + guessed for sure, guessed in zip(certain, drafts)]
        n_text = torch.tensor([len(own) for own in text], device=device)                # (B,)
        n_drafts = torch.tensor([len(own) for own in drafts], device=device)            # (B,)
        W, D = max(map(len, text)), max(map(len, drafts))
        last_certain = (n_text - n_drafts - 1)[:, None]                                 # (B, 1)
        read = last_certain + torch.arange(D + 1, device=device)                        # (B, D + 1)
        anchors = n_text[:, None] - 1 if narrow else read                               # (B, R)
        if heads:
            anchors = read[:, :0]                                                       # R = 0
        n_masks = anchors.shape[1] * (k - 1)
        ids = [own + [filler] * (W - len(own) + n_masks) for own in text]
        ids = torch.tensor(ids, device=device)                                          # (B, T)
        positions, mask = lay_out(cache.length, n_text, anchors, W, k, bidirectional)

        # --- 2. The model's own tokens, at the last certain token and at each draft; and what the
        # mask tokens guess
        hidden = model(ids, positions, mask, cache, head=False)                         # (B, T, C)
        row = torch.arange(len(ids), device=device)[:, None]
        places = torch.cat((read, W + torch.arange(n_masks, device=device).expand(len(ids), -1)), 1)
        logits = model.logits(hidden[row, places]).float()
        logits[..., never] = -torch.inf                                 # (B, D + 1 + R(k-1), V)
        predicted, confidence = choose(logits[:, :D + 1])                               # (B, D + 1)

        # --- 3. Verify: drafts up to the first wrong one stand, and the token after them is certain
        fed_drafts = ids.gather(1, read[:, 1:])                                         # (B, D)
        stood = verify(fed_drafts, n_drafts, predicted)                                 # (B,)
        newest = predicted.gather(1, stood[:, None])                                    # (B, 1)

        # --- 4. Commit what stands. Wrong drafts and mask tokens are overwritten
        count = n_text - n_drafts + stood                                               # (B,)
        cache.advance(count)

        # --- 5. Draft what may follow the newest token: (B, k - 1), and how sure each draft is
        if heads:           # by the hidden states of what stands, each beside the token after it
            following = F.pad(ids[:, 1:W], (0, 1)).scatter(1, count[:, None] - 1, newest)
            ahead, sure = drafter.draft(hidden[:, :W], following, count, k - 1)
        else:               # by what the mask tokens behind the last token that stands have guessed
            region = torch.zeros_like(stood) if narrow else stood
            slots = region[:, None] * (k - 1) + torch.arange(k - 1, device=device)
            ahead, sure = (x.gather(1, slots) for x in most_likely(logits[:, D + 1:]))
        kept = accept(torch.cat((confidence.gather(1, stood[:, None]), sure), dim=1), threshold)
        if narrow:          # its one region has read all drafts: if one fell, draft nothing
            kept = torch.where(stood == n_drafts, kept, 1)

        # --- 6. Emit the standing drafts and the newest token; rows that end here are dropped
        n_stood = stood.tolist()
        for i, fed, n in zip(answers.active, n_drafts.tolist(), n_stood):
            if answers.results[i].passes:                       # the first pass has none to verify
                answers.results[i].drafts.append((fed, n))
        chunks = [own[:n + 1] for own, n in zip(predicted.tolist(), n_stood)]
        going = answers.add(chunks, confidence.tolist())
        cache.keep_rows(going)
        if heads:
            drafter.keep_rows(going)
        ahead = [own[:n - 1] for own, n in zip(ahead.tolist(), kept.tolist())]
        certain, drafts = [chunks[i][-1:] for i in going], [ahead[i] for i in going]
    return answers.results
