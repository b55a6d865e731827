"""
Multi-token prediction by self-distillation: the method, in one file (arXiv 2602.06019).

    from mtp import make_batch, region_loss
    batch = make_batch(rows, k, offset, stride, tokenizer, device)
    loss, seen = region_loss(student, teacher, batch, tokenizer, total_slots=batch.truth.numel())

The idea. k is the number of tokens that one pass predicts; k = 1 is ordinary language modelling.
Append k - 1 copies of one special token, the mask token M, to a text. The pass that predicts the
next token at the last real token now also predicts one token more at each M:

    position   i       i+1     i+2     i+3
    input      xi      M       M       M            k = 4
    predicts   y1      y2      y3      y4           for positions i+1, i+2, i+3, i+4

Trained on ground truth, each of them would learn what is likely at its position *by itself*, and
the most likely words of several positions need not fit together: where "7 apples" and "5 books"
are both good answers, "7 books" is not. So the student is judged on what it wrote jointly:

    1. rollout   the student reads text and mask tokens and writes y1 .. yk, each the most likely
    2. teacher   a frozen copy of the start checkpoint, an ordinary language model, reads the text
                 with y1 .. y(k-1) instead of the mask tokens: what would *it* have written at each?
    3. loss      cross-entropy of the student's predictions against the teacher's choices

If the student writes 7, the teacher, having read 7, says "apples": slot 2 has one target, and it
fits. Slot 1 starts out as good as the teacher, so slot 2's targets make sense from the start; once
slot 2 has learned, slot 3's do; and so on. No gradient flows through the choice of y1 .. yk, and
the loss uses the very pass that wrote them. No new parameters but the mask token's row, and no
second model at decoding time.

The text is a row of the data set, a question and its answer. It is only context in front of what is
predicted: no label is taken from it (but for ground truth as targets and the prefix loss).

Words. *Prefix*: the real tokens in front of what is predicted (the paper's *prefix loss* trains on
these, too). *Anchor*: the last of them. *Region*: one problem, an anchor and its k - 1 mask tokens.
*Slot*: one of a region's k predictions; slot 1 is read at the anchor, slot j at mask token j - 1.
The *place* of a token is its index among the fed ones, its *position* where it stands in the text.

Shapes: B sequences, T text tokens (padded), R regions of a sequence, L = T + R(k-1) fed tokens,
N regions of the batch, N * k slots, Q any number of slots, P text tokens of the prefix loss,
C hidden size, V vocabulary.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Layout: many problems in one sequence. Each token of a text but the last can be an anchor, and any
# number of regions can share one pass. A region costs k - 1 more fed tokens, of student and teacher
# each, and yields k supervised slots. A text of 160 tokens whose answer has 120, an anchor at every
# third of these and k = 4 make 160 + 40 * 3 = 280 fed tokens and 40 * 4 = 160 slots.
#
# The paper puts each region right after its anchor, between the text. Here all stand at the end of
# the sequence, which is the same computation in another order (a test shows it) and lets regions
# overlap.

TEXT, PADDING = -1, -2                  # values of `region` for tokens that belong to none


def choose_anchors(prompt_lengths, lengths, offset, stride):
    """Where training puts its regions: for each of B texts every `stride`-th token is an anchor.

    The first is `offset` tokens after the last one of the prompt, which predicts the answer's
    first; none comes after the last but one of the text. So slot 1 always lies within the text,
    later slots may reach past it. Returns B lists of int.
    """
    return [list(range(prompt - 1 + offset, length - 1, stride))
            for prompt, length in zip(prompt_lengths, lengths)]


def make_layout(lengths, anchors, k):
    """Where the mask tokens go: text first, then k - 1 of them for every anchor.

        place       0  1  2  3  4  5  6  7 | 8 9 | 10 11        k = 3, anchors 2 and 5
        tokens     x0 x1 x2 x3 x4 x5 x6 x7 | M M |  M  M
        position    0  1  2  3  4  5  6  7 | 3 4 |  6  7        where the teacher reads y1, y2
        region      .  .  .  .  .  .  .  . | 0 0 |  1  1
        bound       0  1  2  3  4  5  6  7 | 2 2 |  5  5        last text position it may see

    With anchors closer than k, regions overlap, which does no harm: they do not see each other. A
    row with fewer regions or less text than the others is filled up with padding.

    lengths     B ints: tokens of each text
    anchors     B lists of int: an index into the text for each region
    returns     position, region, bound, each (B, L) long; and slots, a pair of (N, k) long: row and
                place of each region's k predictions, the first at the anchor
    """
    B, T, R = len(lengths), max(lengths), max(map(len, anchors))
    position = torch.zeros(B, T + R * (k - 1), dtype=torch.long)
    bound, region = torch.zeros_like(position), torch.full_like(position, PADDING)
    rows, places = [], []
    for b, (length, own) in enumerate(zip(lengths, anchors)):
        position[b, :length] = bound[b, :length] = torch.arange(length)
        region[b, :length] = TEXT
        for r, anchor in enumerate(own):
            first = T + r * (k - 1)
            mask_places = slice(first, first + k - 1)
            position[b, mask_places] = anchor + torch.arange(1, k)
            bound[b, mask_places] = anchor
            region[b, mask_places] = r
            rows.append([b] * k)
            places.append([anchor, *range(first, first + k - 1)])
    slots = (torch.tensor(rows, dtype=torch.long).view(-1, k),
             torch.tensor(places, dtype=torch.long).view(-1, k))
    return position, region, bound, slots


def attention_mask(position, region, bound, bidirectional=False):
    """Who sees whom: (B, L) each -> (B, L, L) bool, [b, query, key].

              key  x0 x1 x2 x3 | M3 M4 | M4 M5      k = 3; M4: a mask token at position 4
        x0          #  .  .  . |  .  . |  .  .      the regions of anchor 2 and of anchor 3
        x1          #  #  .  . |  .  . |  .  .
        x2          #  #  #  . |  .  . |  .  .      text: causal, and blind to every mask token, so
        x3          #  #  #  # |  .  . |  .  .      its logits are those of the model without any
        M3          #  #  #  . |  #  . |  .  .
        M4          #  #  #  . |  #  # |  .  .      a mask token: text up to its region's anchor,
        M4          #  #  #  # |  .  . |  #  .      and its region's mask tokens up to itself
        M5          #  #  #  # |  .  . |  #  #

    Nobody sees padding. Padding itself sees x0: softmax over nothing would be NaN.

    bidirectional   mask tokens of a region see each other both ways: M3 sees M4 (an ablation of the
                    paper, for the student only). The anchor is text and stays causal, on purpose,
                    so that k = 1 is untouched; the authors' anchor sees its region as well.
    """
    # `bound` of text is its own position: for text queries this is the ordinary causal mask
    key_is_text = (region == TEXT)[:, None, :]                              # (B, 1, L)
    key_is_mask = (region >= 0)[:, None, :]                                 # (B, 1, L)
    text_before = position[:, None, :] <= bound[:, :, None]                 # (B, L, L)
    same_region = region[:, None, :] == region[:, :, None]                  # (B, L, L)
    not_after = position[:, None, :] <= position[:, :, None]                # (B, L, L)
    earlier_in_region = same_region & (not_after | bidirectional)           # (B, L, L)
    return (key_is_text & text_before) | (key_is_mask & earlier_in_region)


# --------------------------------------------------------------------------------------------------
# What one pass reads

class Batch(NamedTuple):
    ids: torch.Tensor               # (B, L) long: text, with the mask token in all other places
    position: torch.Tensor          # (B, L) long
    mask: torch.Tensor              # (B, L, L) bool: the student's attention mask
    teacher_mask: torch.Tensor      # (B, L, L) bool: the teacher's, causal even if bidirectional
    slots: tuple                    # where predictions are read: row and place, (N, k) long each
    truth: torch.Tensor             # (N, k) long: what the text says there, -100 where nobody knows
    prefix: tuple                   # text tokens of the prefix loss: row and place, (P,) long each
    next_token: torch.Tensor        # (P,) long: what follows them


def make_batch(encoded, k, offset, stride, tokenizer, device, bidirectional=False, prefix=False):
    """Encoded rows -> a Batch on `device`.

    encoded          B pairs (number of tokens of the prompt, ids of prompt and answer)
    offset, stride   where the anchors stand, see `choose_anchors`
    bidirectional    the student's mask tokens of a region see each other both ways
    prefix           for the paper's prefix loss: ordinary next-token training on the answers, too
                     (the authors take all text tokens but anchors, the prompt's included)
    """
    end_id = tokenizer.end_id
    mask_id = end_id if tokenizer.mask_id is None else tokenizer.mask_id    # k = 1: none is fed
    prompts, lengths = [prompt for prompt, _ in encoded], [len(ids) for _, ids in encoded]
    anchors = choose_anchors(prompts, lengths, offset, stride)
    position, region, bound, slots = make_layout(lengths, anchors, k)

    # --- what is fed
    T = max(lengths)
    ids = torch.full_like(position, mask_id)                                # (B, L)
    ids[:, :T] = end_id
    for b, (_, own) in enumerate(encoded):
        ids[b, :len(own)] = torch.tensor(own)
    ids[region == PADDING] = end_id

    # --- what the text says at each slot: the targets where there is no teacher. After a finished
    # answer that is the end token again; after one that was cut at --seq-len nobody knows
    text = torch.full((len(encoded), T + k), end_id)                        # (B, T + k)
    for b, (_, own) in enumerate(encoded):
        text[b, :len(own)] = torch.tensor(own)
        if own[-1] != end_id:
            text[b, len(own):] = -100
    row, place = slots
    truth = text[row, place[:, :1] + torch.arange(1, k + 1)]                # (N, k)

    # --- for the prefix loss: every token of the answers, and what predicts it
    pairs = []
    for b in range(len(encoded) if prefix else 0):
        pairs += [(b, i) for i in range(prompts[b] - 1, lengths[b] - 1)]
    predictors = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(dim=1)    # (P,) each
    next_token = text[predictors[0], predictors[1] + 1]                             # (P,)

    causal = attention_mask(position, region, bound).to(device)             # (B, L, L)
    students = causal
    if bidirectional:
        students = attention_mask(position, region, bound, bidirectional=True).to(device)
    return Batch(
        ids=ids.to(device), position=position.to(device), mask=students, teacher_mask=causal,
        slots=tuple(index.to(device) for index in slots), truth=truth.to(device),
        prefix=tuple(index.to(device) for index in predictors), next_token=next_token.to(device))


# --------------------------------------------------------------------------------------------------
# The output layer. Vocabularies are large, so logits exist for a portion of the slots at a time.

CHUNK = 1024                # slots whose logits exist at once: 1024 * 150k ids * 4 bytes are 0.6 GB


def output_layer(model, mask_id):
    """What turns hidden states into logits: the output matrix (V, C), and a bias (V,) that takes
    the mask token (None: there is none) out of the candidates."""
    matrix = model.output_matrix
    bias = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if mask_id is not None and mask_id < len(matrix):           # the teacher may lack its row
        bias[mask_id] = -1e30       # finite on purpose: 0 * -inf, a p * log p, would be NaN
    return matrix, bias


@torch.no_grad()
def most_likely_of(hidden, layer):
    """Each slot's most likely token and its probability: (Q, C) -> (Q,) long and (Q,) fp32."""
    tokens, probabilities = [], []
    for portion in hidden.split(CHUNK):
        logits = F.linear(portion, *layer).float()                          # (CHUNK, V)
        top, token = logits.max(dim=-1)
        tokens.append(token)
        probabilities.append((top - logits.logsumexp(dim=-1)).exp())
    return torch.cat(tokens), torch.cat(probabilities)


def hard_loss(hidden, layer, targets):
    """Sum of -log p(target), nats: (Q, C) and (Q,) long -> scalar. A target of -100 counts nothing.

    Output layer and cross-entropy in one, in fp32 also under autocast: logits (Q, V) never exist as
    a whole. (`linear_cross_entropy` is new in PyTorch; requirements.txt names the version.)
    """
    matrix, bias = layer
    return F.linear_cross_entropy(
        hidden.float(), matrix.float(), targets, linear_bias=bias.float(), reduction="sum",
        ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK))


def soft_loss(hidden, layer, teacher_hidden, teacher_layer, targets, ended):
    """Sum of -sum_v p_T(v) log p_S(v), nats: (Q, C) and the teacher's (Q, C) -> scalar.

    That is KL(p_T || p_S) plus the teacher's entropy, which has no gradient. Where `ended`, (Q,)
    bool, p_T is all on the target. Portions are computed again in the backward pass (`checkpoint`).
    """
    def of_portion(hidden, teacher_hidden, targets, ended):
        p = F.linear(teacher_hidden, *teacher_layer).float().softmax(dim=-1)        # (CHUNK, V)
        p[ended] = F.one_hot(targets[ended], p.shape[1]).to(p.dtype)
        log_p = F.linear(hidden, *layer).float().log_softmax(dim=-1)
        return -(p * log_p[:, :p.shape[1]]).sum()       # the student may have one row more: M's

    portions = zip(*(x.split(CHUNK) for x in (hidden, teacher_hidden, targets, ended)))
    return sum(checkpoint(of_portion, *portion, use_reentrant=False) for portion in portions)


# --------------------------------------------------------------------------------------------------
# The objective

def behind_stop(rollout, stop_ids):
    """(N, k) bool: slots after a stop token of the rollout; the slot that wrote it is not one.

        rollout      five  STOP  three  STOP  six
        behind       no    no    yes    yes   yes

    stop_ids   all tokens that end an answer; the one that training writes is the tokenizer's end_id
    """
    stops = torch.tensor(sorted(stop_ids), device=rollout.device)
    is_stop = torch.isin(rollout, stops).long()
    return is_stop.cumsum(dim=1) - is_stop > 0


class Seen(NamedTuple):
    """What a pass saw, for the log: nothing here has a gradient."""
    rollout: torch.Tensor           # (N, k) long: what the student wrote
    targets: torch.Tensor           # (N, k) long: the most likely targets; -100 where unknown
    confidence: torch.Tensor        # (N, k) fp32: the student's probability of what it wrote


def region_loss(student, teacher, batch, tokenizer, total_slots, soft=False, slot1_weight=1.0,
                prefix_weight=0.0, prefix_tokens=1):
    """One pass of student and teacher over a Batch -> the loss, in nats, and what was Seen.

    teacher         the frozen start checkpoint; None: the targets are the batch's `truth`
    total_slots     number of slots of the whole training step, of all passes and ranks. The loss of
                    a pass is its share of the step's mean: shares add up to it
    soft            the targets are the teacher's distributions, not its most likely tokens
    slot1_weight    of slot 1 in the sum; above 1 k = 1 stays nearer the start (not in the paper)
    prefix_weight   of the mean loss over the step's `prefix_tokens` next tokens of the text (an
                    ablation of the paper)
    """
    mask_id = tokenizer.mask_id
    row, place = batch.slots                                                # (N, k) each
    N, k = row.shape

    # --- 1. Rollout: one pass, and what the student writes at each slot, y1 .. yk
    read_at = (torch.cat((row.flatten(), batch.prefix[0])),
               torch.cat((place.flatten(), batch.prefix[1])))
    hidden = student(batch.ids, batch.position, batch.mask, at=read_at, head=False)
    hidden, prefix_hidden = hidden.split((N * k, len(batch.next_token)))    # (N * k, C), (P, C)
    layer = output_layer(getattr(student, "module", student), mask_id)      # DDP wraps the model
    rollout, confidence = (x.view(N, k) for x in most_likely_of(hidden.detach(), layer))

    # --- 2. Targets: what the teacher would have written at slot j after the student's y1 .. y(j-1)
    targets, ended = batch.truth, torch.zeros_like(rollout, dtype=torch.bool)
    if teacher is not None:
        ids = batch.ids.clone()
        ids[row[:, 1:], place[:, 1:]] = rollout[:, :-1]         # y1 .. y(k-1) for the mask tokens
        with torch.no_grad():
            teacher_hidden = teacher(ids, batch.position, batch.teacher_mask, at=batch.slots,
                                     head=False).flatten(0, 1)              # (N * k, C)
        teacher_layer = output_layer(teacher, mask_id)
        targets = most_likely_of(teacher_hidden, teacher_layer)[0].view(N, k)
        # Slots after a stop token of the rollout get the end token, also where the stop came too
        # early: all they learn is that nothing follows. Whether to stop is taught at the slot that
        # wrote it, whose target is the teacher's, as anywhere
        ended = behind_stop(rollout, tokenizer.stop_ids)
        targets = targets.masked_fill(ended, tokenizer.end_id)

    # --- 3. Loss: this pass's share of the mean over all slots of the step
    def sum_over(which):                                        # bool (N * k,), or slice(None): all
        if soft and teacher is not None:
            return soft_loss(hidden[which], layer, teacher_hidden[which], teacher_layer,
                             targets.flatten()[which], ended.flatten()[which])
        return hard_loss(hidden[which], layer, targets.flatten()[which])

    loss = sum_over(slice(None)) / total_slots
    if slot1_weight != 1:
        is_slot1 = torch.arange(N * k, device=row.device) % k == 0
        loss = loss + (slot1_weight - 1) * sum_over(is_slot1) / total_slots
    if len(batch.next_token):
        prefix_loss = hard_loss(prefix_hidden, layer, batch.next_token)
        loss = loss + prefix_weight * prefix_loss / prefix_tokens
    return loss, Seen(rollout, targets, confidence)
