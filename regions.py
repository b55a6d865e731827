"""
Regions: many multi-token problems in one sequence, and who sees whom.

    from regions import attention_mask, make_layout
    position, region, bound, slots = make_layout(lengths=[8], anchors=[[2, 5]], k=3)
    mask = attention_mask(position, region, bound)

A *region* is one problem: an *anchor*, the last text token that it sees, and k-1 mask tokens behind it. Training
puts a region behind every few tokens of a text (train.py); lossless decoding puts one behind every token that it is
about to verify (sample.py). Paper, section on training, and its figures 2 to 4: there regions stand in the middle of the
text, here behind it, which is the same computation in another order (a test shows it) and lets regions overlap.

Shapes: B sequences, T text tokens (padded), R regions of a sequence, L = T + R(k-1) fed tokens, N regions of the batch.
"""
import torch

TEXT, PADDING = -1, -2                  # values of `region` for tokens that belong to none


def choose_anchors(prompt_lengths, lengths, offset, stride):
    """Where training puts its regions: for each of B texts a list of anchors, every `stride`-th from `offset` on.

    Candidates are the last token of the prompt up to the token before the text's last: what they predict is there.
    """
    return [list(range(prompt - 1 + offset, length - 1, stride)) for prompt, length in zip(prompt_lengths, lengths)]


def make_layout(lengths, anchors, k):
    """Where the masks go: text first, then one region of k-1 masks for every anchor.

        tokens     x0 x1 x2 x3 x4 x5 x6 x7 | M M | M M          k = 3, anchors 2 and 5
        position    0  1  2  3  4  5  6  7 | 3 4 | 6 7          a mask stands where the token it predicts from would be
        region      .  .  .  .  .  .  .  . | 0 0 | 1 1
        bound       0  1  2  3  4  5  6  7 | 2 2 | 5 5          the last text position that a token may see

    With anchors closer than k regions overlap, which does no harm: they do not see each other.

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

              key  x0 x1 x2 x3 | M3 M4 | M4 M5        k = 3, anchors 2 and 3; masks named by position
        x0          #  .  .  . |  .  . |  .  .
        x1          #  #  .  . |  .  . |  .  .        text: causal, and blind to every mask, so the text's logits
        x2          #  #  #  . |  .  . |  .  .        are those of the plain model
        x3          #  #  #  # |  .  . |  .  .
        M3          #  #  #  . |  #  . |  .  .        a mask: text up to its region's anchor,
        M4          #  #  #  . |  #  # |  .  .        and its own region's masks up to itself
        M4          #  #  #  # |  .  . |  #  .
        M5          #  #  #  # |  .  . |  #  #

    Nobody sees padding. (Padding itself looks at the first token, as a query must look at something.)
    `bidirectional` (an ablation of the paper, for the student only) lets the masks of a region see each other both ways:
    the M3 of the picture sees its M4. The anchor is text and stays causal.
    """
    key_is_text = (region == TEXT)[:, None, :]                                              # (B, 1, L)
    key_is_mask = (region >= 0)[:, None, :]
    text_before = position[:, None, :] <= bound[:, :, None]                                 # (B, L, L)
    same_region = region[:, None, :] == region[:, :, None]
    not_after = position[:, None, :] <= position[:, :, None]
    return (key_is_text & text_before) | (key_is_mask & same_region & (not_after | bidirectional))
