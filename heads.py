"""
Multi-token prediction with heads: the second method, in one file (MTP-D, arXiv 2603.23911).

    heads = Heads(model.config, depth=4)
    batch = make_head_batch(rows, heads, device)
    loss, seen = head_loss(heads, Backbone(model), batch, mask_id, total_slots)

mtp.py teaches the model itself to write several tokens. Here the model, the *backbone*, is frozen,
and a cascade of small heads is trained to say in advance what it is going to write. What they say
are drafts, which the backbone verifies (speculate.py), so its text stays what it was, to the bit.

The idea. The backbone's last hidden state at a token, h0[i], is what it chose the next token by,
and now it is known which one that was, y. Both together are enough for one transformer block to
guess the token after y, without a pass of the backbone over y. So head 1 drafts d1. Head 2 does the
same one token further on, with head 1's state in place of the backbone's; and so on:

    position     i          i+1         i+2         i+3
    token        xi         y           d1          d2          (y certain, d1 .. d3 drafts)
    backbone     h0[i]
    head 1           `--->  h1[i+1]
    head 2                      `--->   h2[i+2]
    head 3                                  `--->   h3[i+3]
    predicts     y          d1          d2          d3

    hd[j] = norm( block( eh_proj( [ enorm(E(xj)) ; hnorm(h(d-1)[j-1]) ] ) ) )

[a ; b] is concatenation. The block is an ordinary one, and attends to what its head has computed
for earlier tokens. E is the backbone's embedding; logits are its output matrix times hd.

Training reads a text whose every token is known: all heads run over all of it, head d from token d
on, and the backbone has to read it only once for all of them. The loss of head d at token j:

    -log p(target)                      what the backbone itself writes behind xj, or the text
    kl_weight * KL(q || p)              q: the backbone's distribution there, p: the head's, both of
                                        the backbone's kl_top most likely tokens alone (section 3.2)

*Looped*: one head's weights serve every depth. `extend` copies m trained heads behind themselves,
and only the copies are trained (section 3.3).

Words. *Depth* d: 1 .. K, a head's number. *Slot*: a prediction of one head at one token that has a
target. *Draft vocabulary*: the tokens that may be drafted; the output matrix is most of a draft's
cost on a small model, and few of its rows are needed often.

Shapes: B sequences, T tokens, K depths, N starts of drafting, Q any number of slots,
C hidden size, V vocabulary, n draft vocabulary.
"""
import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.cli import InputError
from common.files import field, read_json, read_note, read_weights, write_json
from model import (
    Block, Config, Fused, KVCache, RMSNorm, fuse, input_major, rope_frequencies, run_blocks,
    save_pretrained)
from mtp import CHUNK, Seen, most_likely_of, output_layer

# --------------------------------------------------------------------------------------------------
# The modules


class Head(nn.Module):
    """One step of the cascade: a token, and the state of the depth above at the token before."""

    def __init__(self, config):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(C, eps), RMSNorm(C, eps)
        self.eh_proj = nn.Linear(2 * C, C, bias=False)
        self.block = Block(config)
        self.norm = RMSNorm(C, eps)

    def forward(self, embedded, states, *where):
        """embedded, states (B, T, C) -> states of this depth (B, T, C).

        `where` is what run_blocks takes beside hidden states: positions, mask, frequencies, cache.
        """
        x = torch.cat((self.enorm(embedded), self.hnorm(states)), dim=-1)       # (B, T, 2C)
        x = self.eh_proj(x)                                                     # (B, T, C)
        x = run_blocks([self.block], x, *where)                                 # (B, T, C)
        return self.norm(x)     # what the next head reads is normed, as what the first one reads is


class Heads(nn.Module):
    """K heads for a backbone of `config`. `heads[d - 1]` is head d; a looped one has but one."""

    def __init__(self, config, depth, loop=False):
        super().__init__()
        self.config, self.depth, self.loop = config, depth, loop
        self.heads = nn.ModuleList(Head(config) for _ in range(1 if loop else depth))
        self.frozen = 0                 # the first so many are not trained: see `extend`
        self.draft_ids = None           # (n,) long: the draft vocabulary; None: all tokens
        self.frequencies = rope_frequencies(config)         # not a buffer: see Transformer

    def at(self, depth):
        """The head of depth 1 .. K."""
        return self.heads[0 if self.loop else depth - 1]

    def to_token(self, index):
        """Indices into the draft vocabulary -> ids."""
        return index if self.draft_ids is None else self.draft_ids.to(index.device)[index]

    def to_draft(self, ids):
        """Ids -> indices into the draft vocabulary; -100 where it lacks them, or they are -100."""
        if self.draft_ids is None:
            return ids
        index = torch.full((self.config.vocab_size + 1,), -100, device=ids.device)
        index[self.draft_ids] = torch.arange(len(self.draft_ids), device=ids.device)
        return index[ids.clamp(min=-1)]             # the last of them is that of -100

    def initialise(self, seed):
        """Random weights, as in GPT-2; `Transformer.from_scratch` says how. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
        return self

    def extend(self):
        """m heads -> 2m, in place: copies of the trained ones behind them, heads m+1 .. 2m, begin
        with the weights of head 1 .. m (section 3.3). Returns self."""
        self.heads.extend(copy.deepcopy(head) for head in list(self.heads))
        self.depth *= 2
        return self

    def freeze(self, count):
        """Train only what is behind the first `count` heads."""
        self.frozen = count
        self.heads[:count].requires_grad_(False)

    def fuse(self):
        """Prepare for decoding, as `Transformer.fuse` does. In place; returns self."""
        fuse([head.block for head in self.heads])
        for head in self.heads:
            head.eh_proj = Fused(head.eh_proj)
        return self.requires_grad_(False)

    def forward(self, embedded, states):
        """All depths over whole texts, for training.

        embedded    (B, T, C): the tokens' embeddings
        states      (B, T, C): the backbone's last hidden states, after its final norm
        returns     K tensors: of depth d (B, T - d, C), states at tokens d .. T - 1
        """
        B, T, _ = embedded.shape
        self.frequencies = self.frequencies.to(embedded.device)
        position = torch.arange(T, device=embedded.device).expand(B, T)
        causal = torch.ones(T, T, dtype=torch.bool, device=embedded.device).tril()
        by_depth = []
        for d in range(1, self.depth + 1):
            # Without a token in front of it, or a depth above it, there is nothing to read: head d
            # begins at token d. Padding stands behind all text, where nobody looks
            with torch.set_grad_enabled(torch.is_grad_enabled() and d > self.frozen):
                states = self.at(d)(embedded[:, d:], states[:, :-1],            # (B, T - d, C)
                                    position[:, d:], causal[d:, d:], self.frequencies)
            by_depth.append(states)
        return by_depth


def draft_layer(heads, backbone, mask_id):
    """The output layer of drafts: matrix (n, C) and bias (n,); see `mtp.output_layer`."""
    matrix, bias = output_layer(backbone, mask_id)
    if heads.draft_ids is None:
        return matrix, bias
    ids = heads.draft_ids.to(matrix.device)
    return matrix[ids], bias[ids]


# --------------------------------------------------------------------------------------------------
# What one pass reads


class HeadBatch(NamedTuple):
    rows: list                      # B tuples of ids: the texts, prompt and answer
    ids: torch.Tensor               # (B, T) long, padded at the end
    slots: tuple                    # row and token that each slot is read at, (N, K) long each
    truth: torch.Tensor             # (N, K) long: the text's next token; -100: no slot


def make_head_batch(encoded, heads, device):
    """Encoded rows -> a HeadBatch on `device`. `encoded` is that of `mtp.make_batch`.

    Decoding drafts from each token of an answer on, and from the last one of the prompt. So does
    training: from token i head d has a slot at token i + d, if a token of the text follows there.
    """
    rows = [tuple(ids) for _, ids in encoded]
    T = max(heads.depth + 1, *map(len, rows))       # so that even the last head has a token
    text = torch.full((len(rows), T + heads.depth + 1), -100)
    for b, own in enumerate(rows):
        text[b, :len(own)] = torch.tensor(own)
    starts = [(b, i) for b, (prompt, own) in enumerate(encoded)
              for i in range(prompt - 1, len(own) - 1)]
    row, start = torch.tensor(starts, dtype=torch.long).view(-1, 2).unbind(dim=1)       # (N,) each
    row = row[:, None].expand(-1, heads.depth)                                  # (N, K)
    token = start[:, None] + torch.arange(1, heads.depth + 1)                   # (N, K)
    truth = text[row, token + 1]                                                # (N, K)
    truth[:, :heads.frozen] = -100
    return HeadBatch(rows, text[:, :T].clamp(min=0).to(device),
                     (row.to(device), token.clamp(max=T - 1).to(device)), truth.to(device))


class Backbone:
    """The frozen model. What it makes of a text is the same in every epoch, so it may be kept.

    model       a Transformer
    keep_gb     how much memory the kept states may take, 10^9 bytes; 0: none
    """

    def __init__(self, model, keep_gb=0.0):
        self.model = model.requires_grad_(False).eval()
        self.room, self.kept = keep_gb * 1e9, {}

    @torch.no_grad()
    def states(self, batch):
        """Last hidden states of a HeadBatch's texts, (B, T, C).

        Each text is read by itself. What is kept of it must not depend on what else was in the
        batch: a resumed run, which has kept nothing, would differ in the last bit.
        """
        device, T = batch.ids.device, batch.ids.shape[1]
        states = []
        for row in batch.rows:
            own = self.kept.get(row)
            if own is None:
                ids = torch.tensor([row], device=device)                        # (1, own T)
                positions = torch.arange(len(row), device=device)[None]
                causal = torch.ones(len(row), len(row), dtype=torch.bool, device=device).tril()
                own = self.model(ids, positions, causal, head=False)[0]         # (own T, C)
                if self.room >= own.nbytes:
                    self.kept[row] = own.cpu()
                    self.room -= own.nbytes
            states.append(F.pad(own.to(device), (0, 0, 0, T - len(row))))       # (T, C)
        return torch.stack(states)                                              # (B, T, C)


# --------------------------------------------------------------------------------------------------
# The objective


def likeliest(states, layer, count):
    """The backbone's `count` most likely tokens and their distribution among themselves.

    states (Q, C) -> indices into the draft vocabulary (Q, count) long, log-probabilities (Q, count)
    """
    indices, log_q = [], []
    for portion in states.split(CHUNK):
        logits, index = F.linear(portion, *layer).float().topk(min(count, len(layer[0])))
        indices.append(index)
        log_q.append(logits.log_softmax(dim=-1))
    return torch.cat(indices), torch.cat(log_q)


def head_loss(heads, backbone, batch, mask_id, total_slots, ground_truth=False, kl_weight=1.0,
              kl_top=256):
    """One pass of all heads over a HeadBatch -> the loss, in nats, and what was `mtp.Seen`.

    heads           Heads, or what DDP wraps them in
    backbone        a Backbone
    mask_id         id that is never a candidate, or None
    total_slots     number of slots of the whole training step. The loss of a pass is its share of
                    the step's mean
    ground_truth    targets are the text itself, not what the backbone would have written
    kl_weight       of the distillation term; 0: cross-entropy alone
    kl_top          how many of the backbone's most likely tokens that term compares
    """
    own = getattr(heads, "module", heads)                                       # DDP wraps them
    layer = draft_layer(own, backbone.model, mask_id)                           # (n, C), (n,)
    row, token = batch.slots                                                    # (N, K) each
    N, K = row.shape

    # --- 1. The backbone reads the texts: what does it write behind each token, and how likely
    # does it find what? Asked at head 1's slots; head d's from start n is where head 1 is from
    # start n + d - 1
    states = backbone.states(batch)                                             # (B, T, C)
    asked = states[row[:, 0], token[:, 0]]                                      # (N, C)
    same = torch.arange(N, device=row.device)[:, None] + torch.arange(K, device=row.device)
    same = same.clamp(max=N - 1)                                                # (N, K)
    index, log_q = likeliest(asked, layer, kl_top)                              # (N, kl_top) each
    targets = batch.truth
    if not ground_truth:
        choices = most_likely_of(asked, output_layer(backbone.model, mask_id))[0]       # (N,)
        targets = choices[same].masked_fill(batch.truth == -100, -100)          # (N, K)

    # --- 2. Every head reads them, behind the one above it
    embedded = backbone.model.model.embed_tokens(batch.ids)                     # (B, T, C)
    by_depth = heads(embedded, states)                                  # K times (B, T - d, C)

    # --- 3. Loss, depth by depth, and in portions, since vocabularies are large
    def of_portion(hidden, targets, index, log_q):
        """(Q, C), (Q,), (Q, kl_top) twice -> the loss, a sum; most likely drafts, probabilities"""
        log_p = F.linear(hidden, *layer).float().log_softmax(dim=-1)            # (Q, n)
        loss = F.nll_loss(log_p, targets, ignore_index=-100, reduction="sum")
        if kl_weight:
            among = log_p.gather(1, index).log_softmax(dim=-1)                  # (Q, kl_top)
            loss = loss + kl_weight * F.kl_div(among, log_q, reduction="sum", log_target=True)
        best = log_p.detach().max(dim=-1)
        return loss, best.indices, best.values.exp()

    loss = 0.0 * by_depth[-1].sum()             # a pass without any slot has a gradient too
    drafts = torch.full_like(targets, -1)
    confidence = torch.zeros(targets.shape, device=targets.device)
    for d, hidden in enumerate(by_depth, 1):
        n = (targets[:, d - 1] != -100).nonzero()[:, 0]                         # (Q,): its slots
        if not len(n):
            continue
        inputs = (hidden[row[n, d - 1], token[n, d - 1] - d],                   # (Q, C)
                  own.to_draft(targets[n, d - 1]),                              # (Q,)
                  index[same[n, d - 1]], log_q[same[n, d - 1]])                 # (Q, kl_top) each
        parts = [checkpoint(of_portion, *portion, use_reentrant=False)
                 for portion in zip(*(x.split(CHUNK) for x in inputs))]
        loss = loss + sum(part[0] for part in parts) / total_slots
        drafts[n, d - 1] = own.to_token(torch.cat([part[1] for part in parts]))
        confidence[n, d - 1] = torch.cat([part[2] for part in parts])
    return loss, Seen(drafts, targets, confidence)


# --------------------------------------------------------------------------------------------------
# Drafting


class Drafter:
    """Heads at work in `speculate`: a key/value cache for each depth, and drafts on demand.

    A head's cache holds what it computed at certain tokens; what it left at drafts, which the
    backbone may refuse, the next round overwrites. So all depths have the same committed length.
    """

    def __init__(self, heads, backbone, batch_size, capacity, never):
        """never   ids that are no candidates; the others as in KVCache"""
        self.heads, self.backbone = heads, backbone
        matrix, bias = draft_layer(heads, backbone, never[0] if never else None)
        self.layer = input_major(matrix), bias              # for products of few rows, see `fuse`
        self.cache = KVCache(backbone, batch_size, capacity, heads.depth)
        self.cache.length += 1                  # no head is ever fed the first token
        # by depth, its state at the last certain token, which the next depth reads first
        shape = (batch_size, backbone.config.hidden_size)
        self.carried = [self.layer[0].new_zeros(shape) for _ in range(heads.depth)]

    def draft(self, states, tokens, count, depth):
        """Drafts behind tokens that have just become certain (heads.md, section 4).

        states      (B, W, C): the backbone's, each one token in front of the token at its side
        tokens      (B, W) long
        count       (B,) long: how many of the W are certain; what is behind them does not matter
        depth       how many drafts, at most K
        returns     drafts (B, depth) long, and their probabilities (B, depth)
        """
        heads, cache = self.heads, self.cache
        heads.frequencies = heads.frequencies.to(tokens.device)
        W, row = int(count.max()), torch.arange(len(tokens), device=tokens.device)
        states, tokens = states[:, :W], F.pad(tokens[:, :W], (0, depth))        # room for drafts
        drafts, confidence = [], []
        for d in range(1, depth + 1):
            # --- 1. The certain tokens, and the drafts of the depths above
            T = W + d - 1
            positions = cache.next_places(T)                                    # (B, T)
            places = torch.arange(int(cache.length.max()) + T, device=tokens.device)        # (S,)
            # head d begins at token d; before it queries see themselves, as softmax over nothing
            # would be NaN
            mask = (places >= d) & (places <= positions[:, :, None])            # (B, T, S)
            mask = mask | (places == positions[:, :, None])
            embedded = self.backbone.model.embed_tokens(tokens[:, :T])          # (B, T, C)
            out = heads.at(d)(embedded, states, positions, mask, heads.frequencies, cache, d - 1)

            # --- 2. A draft behind the last of them
            last = count + d - 2                                                # (B,)
            logits = F.linear(out[row, last], *self.layer).float()              # (B, n)
            top, best = logits.max(dim=-1)
            drafts.append(heads.to_token(best))
            confidence.append(1 / (logits - top[:, None]).exp().sum(dim=-1))
            tokens[row, last + 1] = drafts[-1]

            # --- 3. The next depth reads these states one token later
            states = torch.cat((self.carried[d - 1][:, None], out), dim=1)      # (B, T + 1, C)
            self.carried[d - 1] = out[row, count - 1]                           # (B, C)
        cache.advance(count)
        return torch.stack(drafts, dim=1), torch.stack(confidence, dim=1)

    def keep_rows(self, rows):
        """Drop all batch rows but `rows`, a list."""
        self.cache.keep_rows(rows)
        self.carried = [carried[rows] for carried in self.carried]


# --------------------------------------------------------------------------------------------------
# To disk and back, as transformers has it: head d is layer N + d - 1 of a model of N layers


def name_on_disk(name, depth, config):
    """`eh_proj.weight` of a Head -> `model.layers.33.eh_proj.weight`, at depth 4 of N = 30."""
    if name.startswith("norm."):
        name = "shared_head." + name
    return f"model.layers.{config.num_hidden_layers + depth - 1}." + name.removeprefix("block.")


def save_heads(heads, backbone, start, folder, weights=None):
    """Write the start checkpoint, its weights as they are, with the heads behind its last layer.

    backbone    the Transformer that was read from the folder `start`
    weights     {name: tensor} of the heads, where they are not to be taken from themselves

    A looped head is written K times, so that who reads the folder need not know of loops. A draft
    vocabulary is the list of its ids, draft_vocab.json.
    """
    weights = heads.state_dict() if weights is None else weights
    expected = backbone.state_dict().keys()
    everything = {name: x for name, x in read_weights(start).items() if name in expected}
    for d in range(1, heads.depth + 1):
        own = f"heads.{0 if heads.loop else d - 1}."
        for name, x in weights.items():
            if name.startswith(own):
                everything[name_on_disk(name.removeprefix(own), d, heads.config)] = x.clone()

    raw = backbone.config.raw
    raw["num_mtp_layers"] = heads.depth                         # transformers' name for it
    if raw["model_type"].startswith("qwen"):
        raw["mtp_layer_types"] = ["full_attention"] * heads.depth
    save_pretrained(backbone, folder, everything)
    if heads.draft_ids is not None:
        write_json(Path(folder) / "draft_vocab.json", {"ids": heads.draft_ids.tolist()})


def load_heads(folder, dtype=torch.float32, device="cpu"):
    """Heads of a Hugging Face folder, or None where it has none. InputError for a damaged one."""
    raw = read_json(Path(folder) / "config.json")
    depth = field(raw, "num_mtp_layers", int, 0, least=0, most=1000)
    if depth == 0:
        return None
    loop = read_note(raw).get("loop", False)
    heads, weights = Heads(Config.from_dict(raw), depth, loop), read_weights(folder)
    for d, head in enumerate(heads.heads, 1):
        own = {}
        for name, x in head.state_dict().items():
            there = weights.get(name_on_disk(name, d, heads.config), torch.empty(0))
            if there.shape != x.shape:
                raise InputError(f"{folder}: head {d} lacks {name}, or its shape is not "
                                 f"{tuple(x.shape)}")
            own[name] = there
        head.load_state_dict(own)
    drafted = Path(folder) / "draft_vocab.json"
    if drafted.exists():
        ids, V = read_json(drafted).get("ids"), heads.config.vocab_size
        if not isinstance(ids, list) or not ids or not all(
                type(token) is int and 0 <= token < V for token in ids):
            raise InputError(f"{drafted} holds no list of token ids below {V}")
        heads.draft_ids = torch.tensor(ids)
    return heads.to(device, dtype)
