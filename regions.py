"""
Regions: many multi-token problems in one sequence, and who sees whom.

    from regions import attention_mask, make_layout
    position, region, bound, slots = make_layout(lengths=[8], anchors=[[2, 5]], k=3)
    mask = attention_mask(position, region, bound)

A *region* is one problem: an *anchor*, the last text token that it sees, and k-1 mask tokens. Its k predictions are read
at its *slots*: slot 1 is the anchor itself, slot j is mask j-1. One pass over a text can serve many regions, since they
do not see each other and the text sees none of them. Training puts a region behind every few tokens of an answer
(train.py); lossless decoding puts one behind every token that it is about to verify (sample.py).

Three coordinates: the *place* of a token is its index among the fed ones, its *position* is where it stands in the text,
and `slots` are the places where predictions are read. Paper, section on training, and its figures 2 to 4: there regions
stand in the middle of the text, here behind it, which is the same computation in another order (a test shows it) and
lets regions overlap.

What a region costs: k-1 more fed tokens, for student and teacher, and k supervised slots for that. A pass feeds
L = T + R(k-1) tokens: 160 tokens of text with an answer of 120, an anchor at every third token (--stride 3) and k = 4 make
160 + 40 * 3 = 280 fed tokens and 160 slots.

Shapes: B sequences, T text tokens (padded), R regions of a sequence, L = T + R(k-1) fed tokens, N regions of the batch,
P text tokens that are trained on as in ordinary language modelling (none, but for the prefix loss).
"""
from typing import NamedTuple

import torch

TEXT, PADDING = -1, -2                  # values of `region` for tokens that belong to none


def choose_anchors(prompt_lengths, lengths, offset, stride):
    """Where training puts its regions: for each of B texts a list of anchors, every `stride`-th from `offset` on.

    From the last token of the prompt, which predicts the answer's first, to the last but one of the text: so slot 1 always
    lies within the text, and later slots may reach past its end.
    """
    return [list(range(prompt - 1 + offset, length - 1, stride)) for prompt, length in zip(prompt_lengths, lengths)]


def make_layout(lengths, anchors, k):
    """Where the masks go: text first, then one region of k-1 masks for every anchor.

        place       0  1  2  3  4  5  6  7 | 8 9 | 10 11        k = 3, anchors 2 and 5
        tokens     x0 x1 x2 x3 x4 x5 x6 x7 | M M |  M  M
        position    0  1  2  3  4  5  6  7 | 3 4 |  6  7        mask j of anchor a stands at a+j, where y_j will stand,
        region      .  .  .  .  .  .  .  . | 0 0 |  1  1        and predicts the token at a+j+1
        bound       0  1  2  3  4  5  6  7 | 2 2 |  5  5        the last text position that a token may see

    With anchors closer than k regions overlap, which does no harm: they do not see each other. A row with fewer regions
    or less text than the others is filled up with padding.

    lengths     B ints: tokens of each text
    anchors     B lists of int: an index into the text for each region
    returns (position, region, bound), each (B, L) long, and slots, a pair of (N, k) long: row and place of the k
    predictions of every region: slot 1 at the anchor, the others at its masks
    """
    B, T, R = len(lengths), max(lengths), max(map(len, anchors))
    position = torch.zeros(B, T + R * (k - 1), dtype=torch.long)
    bound, region = torch.zeros_like(position), torch.full_like(position, PADDING)
    rows, places = [], []
    for b, (length, row_anchors) in enumerate(zip(lengths, anchors)):
        position[b, :length] = bound[b, :length] = torch.arange(length)
        region[b, :length] = TEXT
        for r, anchor in enumerate(row_anchors):
            first = T + r * (k - 1)
            masks = slice(first, first + k - 1)
            position[b, masks] = anchor + torch.arange(1, k)
            bound[b, masks] = anchor
            region[b, masks] = r
            rows.append([b] * k)
            places.append([anchor, *range(first, first + k - 1)])
    slots = (torch.tensor(rows, dtype=torch.long).view(-1, k), torch.tensor(places, dtype=torch.long).view(-1, k))
    return position, region, bound, slots


def attention_mask(position, region, bound, bidirectional=False):
    """Who sees whom: (B, L) each -> (B, L, L) bool, [b, query, key].

              key  x0 x1 x2 x3 | A1 A2 | B1 B2        k = 3; masks A1 A2 of anchor 2 stand at positions 3 and 4,
        x0          #  .  .  . |  .  . |  .  .        B1 B2 of anchor 3 at 4 and 5
        x1          #  #  .  . |  .  . |  .  .
        x2          #  #  #  . |  .  . |  .  .        text: causal, and blind to every mask. So its logits are those of
        x3          #  #  #  # |  .  . |  .  .        the same model that is fed no masks at all
        A1          #  #  #  . |  #  . |  .  .
        A2          #  #  #  . |  #  # |  .  .        a mask: text up to its region's anchor, and its own region's masks
        B1          #  #  #  # |  .  . |  #  .        up to itself
        B2          #  #  #  # |  .  . |  #  #

    Nobody sees padding. (Padding itself looks at the first token, as a query must look at something.)
    `bidirectional` (an ablation of the paper, for the student only) lets the masks of a region see each other both ways:
    the A1 of the picture sees A2. The anchor is text and stays causal.
    """
    # `bound` of text is its own position: for text queries this is the ordinary causal mask
    key_is_text = (region == TEXT)[:, None, :]                                              # (B, 1, L)
    key_is_mask = (region >= 0)[:, None, :]
    text_before = position[:, None, :] <= bound[:, :, None]                                 # (B, L, L)
    same_region = region[:, None, :] == region[:, :, None]
    not_after = position[:, None, :] <= position[:, :, None]
    return (key_is_text & text_before) | (key_is_mask & same_region & (not_after | bidirectional))


class Batch(NamedTuple):
    ids: torch.Tensor               # (B, L) long: text, with the mask token in every other place
    position: torch.Tensor          # (B, L) long
    mask: torch.Tensor              # (B, L, L) bool: the student's attention
    teacher_mask: torch.Tensor      # (B, L, L) bool: the teacher's, causal inside the regions in any case
    slots: tuple                    # where the predictions are read: row and place, (N, k) long each
    truth: torch.Tensor             # (N, k) long: what the text says there; -100 where it was cut and nobody knows
    prefix: tuple                   # text tokens whose successor is trained on too: row and place, (P,) long each
    next_token: torch.Tensor        # (P,) long: these successors


def make_batch(encoded, k, offset, stride, mask_id, end_id, device, bidirectional=False, prefix=False):
    """Encoded rows -> a Batch on `device`.

    encoded          B pairs (number of tokens of the prompt, ids of prompt and answer)
    offset, stride   an anchor at every `stride`-th token of the answer, the first one `offset` tokens in
    bidirectional    the student's masks of a region see each other both ways
    prefix           the answers' own tokens are to be trained on too
    """
    prompts, lengths = [prompt for prompt, _ in encoded], [len(ids) for _, ids in encoded]
    position, region, bound, slots = make_layout(lengths, choose_anchors(prompts, lengths, offset, stride), k)
    # padded with end tokens, so that the last slots of a region that reaches past the end have a truth as well
    text = torch.full((len(encoded), max(lengths) + k), end_id)                             # (B, T + k)
    for b, (_, own) in enumerate(encoded):
        text[b, :len(own)] = torch.tensor(own)
        if own[-1] != end_id:                                               # cut at --seq-len: nobody knows what follows
            text[b, len(own):] = -100
    row, place = slots
    truth = text[row, place[:, :1] + 1 + torch.arange(k)]                   # (N, k): the anchor's successors
    ids = torch.full_like(position, end_id if mask_id is None else mask_id)
    ids[:, :max(lengths)] = text[:, :max(lengths)].clamp(min=0)
    ids[region == PADDING] = end_id
    answers = [(b, i) for b in range(len(encoded) if prefix else 0) for i in range(prompts[b] - 1, lengths[b] - 1)]
    answers = torch.tensor(answers, dtype=torch.long).view(-1, 2).unbind(dim=1)             # row and place, (P,) each
    mask = attention_mask(position, region, bound).to(device)
    student_mask = attention_mask(position, region, bound, bidirectional).to(device) if bidirectional else mask
    slots, answers = (tuple(index.to(device) for index in pair) for pair in (slots, answers))
    return Batch(ids.to(device), position.to(device), student_mask, mask, slots, truth.to(device), answers,
                 text.to(device)[answers[0], answers[1] + 1])
