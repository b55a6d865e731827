"""
heads.py and drafting with heads in speculate.py, against transformers' MTP classes and slow loops:
one text at a time, without padding, without a cache, all of it again for every draft.

The last section is about all of speculate.py: what it samples, with mask tokens and with heads, is
distributed as plain sampling is.
"""
import copy
import functools
import itertools
import random

import pytest
import torch
from conftest import (
    TINY_VOCAB, random_prompts, tiny_checkpoint, tiny_config, tiny_model, tokens, write_chunk)
from safetensors.torch import load_file, save_file
from test_sample import outcome, sure_ones

import heads as heads_file
import mtp
import speculate as speculation
from common.cli import InputError
from common.data import encode_rows
from common.files import read_json, write_json
from common.hub import resolve
from common.report import chunks_of
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from heads import (
    Backbone, Drafter, Heads, head_loss, likeliest, load_heads, make_head_batch, save_heads)
from model import Transformer, add_mask_token, save_pretrained
from sample import Strategy, draw, generate, most_likely
from speculate import decode, speculate

MASK = TINY_VOCAB                                   # of models that have a mask token


def random_heads(model, depth, loop=False, seed=0):
    """Every weight is random: a norm at 1 or a bias at 0 would hide that one was forgotten."""
    heads, generator = Heads(model.config, depth, loop), torch.Generator().manual_seed(seed)
    for name, parameter in heads.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 + 0.3 * noise if is_norm else 0.2 * noise
    return heads


def random_rows(*sizes, seed=0):
    """Encoded rows of random ids. `sizes`: (tokens of the prompt, of prompt and answer) each."""
    rng = random.Random(seed)
    return [(prompt, [rng.randrange(3, TINY_VOCAB) for _ in range(length)])
            for prompt, length in sizes]


def slots_in(batch):
    return int((batch.truth != -100).sum())


def train(heads, model, rows, steps, lr=4e-3):
    """A few steps on encoded rows, eight of them each. Returns the heads, ready to draft."""
    backbone, rng = Backbone(model, keep_gb=1), random.Random(0)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr)
    for _ in range(steps):
        batch = make_head_batch(rng.sample(rows, 8), heads, "cpu")
        loss, _ = head_loss(heads, backbone, batch, None, slots_in(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads.requires_grad_(False).eval()


def first_heads(heads, depth):
    """The first `depth` heads alone: they are a cascade, too."""
    some = copy.deepcopy(heads)
    some.depth, some.heads = depth, some.heads[:depth]
    return some


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(family, loop) -> (a random model, its folder, four heads): read them only.

    The model has eight words for almost everything, and the heads have seen for a moment what it
    writes: their drafts are wrong most times, but any number of them stands now and then.
    """
    @functools.cache
    def make(family="llama", loop=False):
        folder = tiny_checkpoint(tmp_path_factory.mktemp("start") / "checkpoint", family, seed=3)
        model = Transformer.from_pretrained(folder).eval()
        model.model.embed_tokens.weight.data[10:18] *= 3
        save_pretrained(model, folder)
        prompts = random_prompts(48, seed=11)
        answers = generate(model, tokens(), prompts, max_new_tokens=40)
        rows = [(len(prompt), prompt + answer.tokens) for prompt, answer in zip(prompts, answers)]
        heads = Heads(model.config, 4, loop).initialise(0)
        return model, folder, train(heads, model, rows, steps=20)
    return make


@pytest.fixture
def masked(drafter):
    """A random model with a mask token, of one's own: a Backbone freezes it."""
    return copy.deepcopy(drafter)


# --------------------------------------------------------------------------------------------------
# The slow reference

def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def cascade(heads, model, text, depth=None):
    """States of one text: {(depth, token): (C,)}. Depth 0 is the model's own; all, or up to one."""
    n, ids = len(text), torch.tensor([text])
    with torch.no_grad():
        own = model(ids, torch.arange(n)[None], causal(n), head=False)[0]       # (n, C)
        embedded = model.model.embed_tokens(ids)[0]                             # (n, C)
    states = {(0, j): own[j] for j in range(n)}
    for d in range(1, (depth or heads.depth) + 1):
        there = list(range(d, n))
        if there:
            above = torch.stack([states[d - 1, j - 1] for j in there])
            own = heads.at(d)(embedded[None, there], above[None], torch.tensor([there]),
                              causal(len(there)), heads.frequencies)[0]
            states.update({(d, j): own[j - d] for j in there})
    return states


def candidates(heads, model, never=None):
    """What may be drafted, a list of ids."""
    ids = range(model.config.vocab_size) if heads.draft_ids is None else heads.draft_ids.tolist()
    return [i for i in ids if i != never]


@torch.no_grad()
def slow_drafts(heads, model, text, depth, never=None):
    """Drafts behind a text, and their probabilities: (depth,) lists. All anew for each of them."""
    words = candidates(heads, model, never)
    drafts, sure = [], []
    for d in range(1, depth + 1):
        state = cascade(heads, model, text + drafts, d)[d, len(text) + d - 2]
        p = (model.output_matrix[words] @ state).softmax(dim=-1)
        drafts.append(words[p.argmax()])
        sure.append(p.max().item())
    return drafts, sure


# --------------------------------------------------------------------------------------------------
# The modules

def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def mtp_layer(head, theirs):
    """A Head's weights in transformers' MtpLayer."""
    from transformers.modeling_layers import MtpLayer

    layer = MtpLayer(theirs.config, type(theirs.model.layers[0]), type(theirs.model.norm), 0)
    names = {"block": "mtp_block", "norm": "post_norm"}
    layer.load_state_dict({
        ".".join((names.get(first, first), *rest)): x
        for (first, *rest), x in ((name.split("."), x) for name, x in head.state_dict().items())})
    return layer


def run_mtp_layer(layer, theirs, embedded, states, positions):
    """(B, T, C) twice and (B, T) long -> (B, T, C)."""
    T = embedded.shape[1]
    angles = theirs.model.rotary_emb(embedded, position_ids=positions)
    hidden = torch.zeros(T, T).masked_fill(~causal(T), -torch.inf)[None, None]
    return layer(embedded, states, position_embeddings=angles, attention_mask=hidden,
                 position_ids=positions, past_key_values=None)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_modules_are_those_of_transformers(tmp_path, family):
    """One head, and the cascade; there, each token's state comes from a run that ends with it."""
    folder = tiny_checkpoint(tmp_path, family)
    model, theirs = Transformer.from_pretrained(folder), transformers_model(folder)
    heads, generator = random_heads(model, 3), torch.Generator().manual_seed(1)
    embedded, states = torch.randn(2, 2, 7, 64, generator=generator)
    positions = torch.tensor([[5], [90]]) + torch.arange(7)
    ours = heads.at(1)(embedded, states, positions, causal(7), heads.frequencies)
    layer = mtp_layer(heads.at(1), theirs)
    expected = run_mtp_layer(layer, theirs, embedded, states, positions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    ids = torch.tensor([random_prompts(1, seed=6)[0][:6] for _ in range(2)])
    ids[1] += 1
    T = ids.shape[1]
    states = theirs.model(ids).last_hidden_state                            # (2, T, C)
    embedded = theirs.model.embed_tokens(ids)
    for loop in (False, True):
        heads.loop = loop
        by_depth = heads(embedded, states)
        assert [own.shape for own in by_depth] == [(2, T - d, 64) for d in (1, 2, 3)]
        above = {j: states[:, j] for j in range(T)}
        for d, own in enumerate(by_depth, 1):
            layer, new = mtp_layer(heads.at(d), theirs), {}
            for j in range(d, T):
                upto = torch.stack([above[i - 1] for i in range(d, j + 1)], dim=1)
                new[j] = run_mtp_layer(layer, theirs, embedded[:, d:j + 1], upto,
                                       torch.arange(d, j + 1)[None])[:, -1]
                torch.testing.assert_close(own[:, j - d], new[j], rtol=0, atol=2e-5)
            above = new
        for b, text in enumerate(ids.tolist()):             # and so does the slow reference
            for (d, j), state in cascade(heads, model, text).items():
                if d:
                    torch.testing.assert_close(state, by_depth[d - 1][b, j - d], rtol=0, atol=2e-5)


def test_looped_head_has_the_weights_of_one(masked):
    one, looped, four = (Heads(masked.config, *form) for form in ((1,), (4, True), (4,)))
    sizes = [sum(p.numel() for p in heads.parameters()) for heads in (one, looped, four)]
    assert sizes[0] == sizes[1] == sizes[2] / 4
    assert looped.at(1) is looped.at(4) and four.at(1) is not four.at(4)


def test_initial_weights_are_those_of_the_seed(masked):
    a, b, other = (Heads(masked.config, 2).initialise(seed) for seed in (0, 0, 1))
    for x, same, differs in zip(a.parameters(), b.parameters(), other.parameters()):
        assert torch.equal(x, same) and (x.dim() < 2 or not torch.equal(x, differs))
        assert x.dim() < 2 or 0.018 < x.std() < 0.022


# --------------------------------------------------------------------------------------------------
# What one pass reads

# an answer that goes on, one token, a prompt of one token, two tokens, none; all of them ragged
ROWS = [(5, 12), (3, 4), (1, 9), (7, 9), (4, 4)]


@pytest.mark.parametrize("depth, frozen", [(1, 0), (3, 0), (4, 2), (12, 0)])
def test_slots_one_at_a_time(masked, depth, frozen):
    """From which token does each slot predict which? Of heads that reach beyond a text: none."""
    rows, heads = random_rows(*ROWS), Heads(masked.config, depth)
    heads.freeze(frozen)
    batch = make_head_batch(rows, heads, "cpu")
    assert batch.rows == [tuple(text) for _, text in rows]
    for ids, (_, text) in zip(batch.ids.tolist(), rows):
        assert ids[:len(text)] == text and len(ids) == max(12, depth + 1)
    starts = [(b, i) for b, (prompt, text) in enumerate(rows)
              for i in range(prompt - 1, len(text) - 1)]
    row, token = batch.slots
    assert row.shape == token.shape == batch.truth.shape == (len(starts), depth)
    for n, (b, i) in enumerate(starts):
        text = rows[b][1]
        for d in range(1, depth + 1):
            truth = batch.truth[n, d - 1].item()
            if d <= frozen or i + d + 1 >= len(text):
                assert truth == -100
            else:
                assert (row[n, d - 1], token[n, d - 1]) == (b, i + d)
                assert truth == text[i + d + 1]
    # head 1 of every start is read, whether it has a slot or not: by others, as the same token's
    assert batch.ids[row[:, 0], token[:, 0]].tolist() == [rows[b][1][i + 1] for b, i in starts]
    assert token.max() < max(12, depth + 1) and 0 < slots_in(batch) < batch.truth.numel()


def test_rows_without_any_slot(masked):
    """An answer of one token has nothing to draft: nothing is learnt, and nothing breaks."""
    heads = random_heads(masked, 2)
    for rows in (random_rows((4, 5), (2, 3)), random_rows((4, 4))):
        batch = make_head_batch(rows, heads, "cpu")
        loss, seen = head_loss(heads, Backbone(masked), batch, MASK, 1)
        loss.backward()
        assert loss == 0 and not seen.confidence.any()
        assert all(p.grad is not None and not p.grad.any() for p in heads.at(2).parameters())


# --------------------------------------------------------------------------------------------------
# The backbone's states, kept or not

def states_alone(model, text):
    with torch.no_grad():
        n = len(text)
        return model(torch.tensor([text]), torch.arange(n)[None], causal(n), head=False)[0]


def test_states_are_those_of_each_row_alone(masked, monkeypatch):
    """In any company, from memory or not; a row that is kept is not read again."""
    rows = random_rows((2, 6), (2, 13), (2, 9), (2, 11), seed=4)
    heads, fed = Heads(masked.config, 2), []
    masked.register_forward_pre_hook(lambda module, given: fed.append(len(given[0])))
    never, always = Backbone(masked), Backbone(masked, keep_gb=1)
    for which, new in (((0, 1), 2), ((3,), 1), ((1, 2, 0), 1), ((3, 0), 0), ((2, 2), 0)):
        own = [rows[i] for i in which]
        batch = make_head_batch(own, heads, "cpu")
        for backbone, expected in ((never, [1] * len(own)), (always, [1] * new)):
            fed.clear()
            states = backbone.states(batch)
            assert fed == expected
            assert states.shape == (len(own), max(len(text) for _, text in own), 64)
            for ours, (_, text) in zip(states, own):
                torch.testing.assert_close(ours[:len(text)], states_alone(masked, text),
                                           rtol=1e-5, atol=1e-4)
    assert not never.kept and len(always.kept) == 4


def test_states_keep_to_their_memory(masked):
    """Rows are kept as long as there is room, and no longer; they hold no more than they count."""
    rows = random_rows((2, 6), (2, 13), (2, 9), (2, 3), seed=4)
    heads, limit = Heads(masked.config, 2), 64 * 4 * (6 + 9 + 2)    # bytes: of 6, 9 and 2 tokens
    backbone = Backbone(masked, keep_gb=limit / 1e9)
    for some in (rows[:2], rows[2:], rows, rows[::-1]):
        batch = make_head_batch(some, heads, "cpu")
        expected = [states_alone(masked, text) for text in batch.rows]
        for ours, own in zip(backbone.states(batch), expected):
            torch.testing.assert_close(ours[:len(own)], own, rtol=1e-5, atol=1e-4)
    assert sorted(map(len, backbone.kept)) == [6, 9]                # 13 and 3 did not fit
    # a view would hold on to the padded pass that it was part of
    storage = sum(kept.untyped_storage().nbytes() for kept in backbone.kept.values())
    assert storage == 64 * 4 * (6 + 9) <= limit


def test_row_twice_in_a_batch_takes_room_once(masked):
    rows, heads = random_rows((2, 6), (2, 9), seed=4), Heads(masked.config, 2)
    backbone = Backbone(masked, keep_gb=64 * 4 * (6 + 9 + 1) / 1e9)
    backbone.states(make_head_batch([rows[0], rows[0], rows[1]], heads, "cpu"))
    assert sorted(map(len, backbone.kept)) == [6, 9]


# --------------------------------------------------------------------------------------------------
# The objective

def slow_loss(heads, model, rows, total_slots, ground_truth=False, kl_weight=1.0, kl_top=256):
    """`head_loss`, slot after slot. Returns also each slot's (draft, target, its probability)."""
    matrix, ids = model.output_matrix.detach(), list(range(MASK))           # never the mask token
    words = candidates(heads, model, never=MASK)
    loss, seen = 0.0, []
    for prompt, text in rows:
        states = cascade(heads, model, text)
        for start, d in itertools.product(range(prompt - 1, len(text) - 1),
                                          range(1, heads.depth + 1)):
            token = start + d
            if d <= heads.frozen or token + 1 >= len(text):
                seen.append((-1, -100, 0.0))
                continue
            main = matrix @ states[0, token]                                # (V,)
            target = text[token + 1] if ground_truth else ids[main[ids].argmax()]
            log_p = (matrix[words] @ states[d, token]).log_softmax(dim=-1)
            if target in words:
                loss = loss - log_p[words.index(target)]
            top = main[words].topk(min(kl_top, len(words))).indices
            log_q, among = main[words][top].log_softmax(dim=-1), log_p[top].log_softmax(dim=-1)
            loss = loss + kl_weight * (log_q.exp() * (log_q - among)).sum()
            seen.append((words[log_p.argmax()], target, log_p.max().exp().item()))
    return loss / total_slots, seen


def gradients_of(loss, heads):
    """{name: gradient or None} of the heads' parameters."""
    own = {name: p for name, p in heads.named_parameters() if p.requires_grad}
    return dict(zip(own, torch.autograd.grad(loss, own.values(), allow_unused=True)))


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("form", ["four", "looped", "extended", "draft vocabulary"])
@pytest.mark.parametrize("how", [
    {}, {"ground_truth": True, "kl_weight": 0.3, "kl_top": 4}, {"kl_weight": 0.0},
    {"kl_top": 1000}], ids=str)
def test_loss_one_slot_at_a_time(masked, monkeypatch, form, how):
    """Value, gradients and what was seen; in portions that do not divide the slots."""
    monkeypatch.setattr(heads_file, "CHUNK", 5)
    monkeypatch.setattr(mtp, "CHUNK", 5)
    rows = random_rows(*ROWS)
    if form == "extended":
        heads = random_heads(masked, 2).extend()
        heads.freeze(2)
    else:
        heads = random_heads(masked, 4, loop=form == "looped")
    if form == "draft vocabulary":
        heads.draft_ids = torch.tensor([*range(5, 200, 2), MASK])
    batch = make_head_batch(rows, heads, "cpu")
    total = 3 + slots_in(batch)                             # other passes have three more
    loss, seen = head_loss(heads, Backbone(masked), batch, MASK, total, **how)
    expected, slots = slow_loss(heads, masked, rows, total, **how)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 1
    assert_same_gradients(gradients_of(loss, heads), gradients_of(expected, heads))
    drafts, targets, confidence = map(list, zip(*slots))
    assert seen.rollout.flatten().tolist() == drafts
    assert seen.targets.flatten().tolist() == targets
    assert seen.confidence.flatten().tolist() == pytest.approx(confidence, rel=1e-4)
    if form == "draft vocabulary":                          # else it would test nothing new
        inside = [target in heads.draft_ids for target in targets if target != -100]
        assert 0 < sum(inside) < len(inside)


def test_likeliest_of_the_model(masked):
    """Its most likely tokens, likeliest first, and nothing but them in the distribution."""
    states = states_alone(masked, random_prompts(1, seed=8)[0])
    layer = mtp.output_layer(masked, MASK)
    indices, log_q = likeliest(states, layer, 5)
    p = (states @ masked.output_matrix[:MASK].T).softmax(dim=-1)
    for index, q, own in zip(indices, log_q.exp(), p):
        order = sorted(range(MASK), key=own.tolist().__getitem__, reverse=True)[:5]
        assert index.tolist() == order
        torch.testing.assert_close(q, own[order] / own[order].sum(), rtol=1e-4, atol=1e-6)


def test_only_what_is_to_be_trained_gets_a_gradient(masked):
    """Nothing of the backbone, and of heads extended to four the last two alone."""
    masked.requires_grad_(True)
    heads = random_heads(masked, 2)
    before = copy.deepcopy(heads.state_dict())
    assert heads.extend() is heads and heads.depth == len(heads.heads) == 4
    for d in (1, 2):                                        # copies, of equal weights
        for old, new in zip(heads.at(d).parameters(), heads.at(d + 2).parameters()):
            assert torch.equal(old, new) and old.data_ptr() != new.data_ptr()
    assert all(torch.equal(heads.state_dict()[name], x) for name, x in before.items())
    heads.freeze(2)
    batch = make_head_batch(random_rows(*ROWS), heads, "cpu")
    loss, _ = head_loss(heads, Backbone(masked), batch, MASK, slots_in(batch))
    loss.backward()
    assert all(p.grad is None for p in masked.parameters())
    for d in range(1, 5):
        for p in heads.at(d).parameters():
            assert p.requires_grad == (d > 2)
            assert p.grad is None if d <= 2 else p.grad.abs().sum() > 0


def test_passes_add_up(masked):
    """Rows in any order, and in one pass or in two: the same loss, the same gradients."""
    rows, heads, backbone = random_rows(*ROWS), random_heads(masked, 3), Backbone(masked)
    total = slots_in(make_head_batch(rows, heads, "cpu"))

    def of(*passes):
        loss = sum(head_loss(heads, backbone, make_head_batch(some, heads, "cpu"), MASK, total)[0]
                   for some in passes)
        return loss.item(), gradients_of(loss, heads)

    loss, gradients = of(rows)
    for passes in ([rows[::-1]], [rows[:2], rows[2:]], [[row] for row in rows]):
        other, theirs = of(*passes)
        assert other == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(theirs, gradients)


# --------------------------------------------------------------------------------------------------
# Drafting

@torch.no_grad()
@pytest.mark.parametrize("depth, K, form", [
    (1, 1, ""), (2, 2, ""), (4, 4, ""), (2, 4, ""), (3, 3, "looped"), (3, 3, "draft vocabulary")])
def test_drafts_of_a_loop_without_caches(masked, depth, K, form):
    """Ragged rows, some drafts standing; what stands behind the certain tokens does not matter.

    The masked id is one that would be drafted.
    """
    rng, generator = random.Random(depth), torch.Generator().manual_seed(0)
    heads = random_heads(masked, K, loop=form == "looped")
    if form == "draft vocabulary":
        heads.draft_ids = torch.tensor(sorted(rng.sample(range(MASK), 40)))
    texts = [[rng.randrange(3, TINY_VOCAB) for _ in range(40)] for _ in range(4)]
    favourites = [slow_drafts(heads, masked, text[:n], 1)[0][0] for text in texts for n in (3, 8)]
    never = max(favourites, key=favourites.count)
    own = [states_alone(masked, text) for text in texts]
    drafter = Drafter(heads, masked, 4, capacity=60, never=[never])
    active, done, seen = list(range(4)), [1] * 4, set()
    for count in ([1, 6, 3, 9], *([rng.randint(1, depth + 1) for _ in range(4)] for _ in range(5))):
        W = max(count[i] for i in active) + 1
        states = torch.randn(len(active), W, 64, generator=generator)
        ids = torch.randint(3, TINY_VOCAB, (len(active), W), generator=generator)
        for place, i in enumerate(active):
            new = slice(done[i], done[i] + count[i])
            ids[place, :count[i]] = torch.tensor(texts[i][new])
            states[place, :count[i]] = own[i][done[i] - 1:done[i] - 1 + count[i]]
            done[i] += count[i]
        given = ids.clone()
        drafts, sure = drafter.draft(states, ids, torch.tensor([count[i] for i in active]), depth)
        assert torch.equal(ids, given)                      # the caller's are left as they are
        for place, i in enumerate(active):
            expected, p = slow_drafts(heads, masked, texts[i][:done[i]], depth, never)
            assert drafts[place].tolist() == expected
            assert sure[place].tolist() == pytest.approx(p, rel=1e-3)
            seen.update(expected)
        if len(active) == 4 and max(done) > 12:
            drafter.keep_rows([0, 1, 2, 3])                 # all stay
            drafter.keep_rows([1, 3])
            active = [1, 3]
    assert len(active) == 2 and len(seen) > 3
    if heads.draft_ids is not None:
        assert seen <= set(heads.draft_ids.tolist())


@torch.no_grad()
def slow_speculate(model, heads, prompt, k, threshold, stop_ids, limit):
    """Drafts are checked one by one with plain passes over the whole text, as if they were free."""
    written, chunks, record, drafts = [], [], [], []
    while True:
        fed, new = len(drafts), []
        while not new or drafts and drafts.pop(0) == new[-1]:
            # an ordinary prediction, and one more for each draft that it confirms
            text = prompt + written + new
            p = (model.output_matrix @ states_alone(model, text)[-1]).softmax(dim=-1)
            new.append(p.argmax().item())
        if chunks:
            record.append((fed, len(new) - 1))
        drafts, sure = slow_drafts(heads, model, prompt + written + new, k - 1)
        drafts = drafts[:sure_ones([p.max().item(), *sure], threshold) - 1]
        finish = write_chunk(new, written, chunks, stop_ids, limit)
        if finish:
            return written, chunks, finish, record


@pytest.mark.parametrize("k, threshold, form", [
    (5, None, ""), (5, 0.5, ""), (3, None, ""), (2, 0.7, ""), (5, None, "looped"),
    (5, None, "draft vocabulary")])
def test_passes_of_the_slow_reference(trained, k, threshold, form):
    """Not only the text: the same tokens in each pass, and as many drafts, as many of them right.

    A ragged batch, whose rows end at different passes; also with fewer drafts than there are heads.
    """
    model, _, heads = trained(loop=form == "looped")
    if form == "draft vocabulary":
        heads = copy.deepcopy(heads)
        heads.draft_ids = torch.tensor([*range(10, 15), *range(100, 200)])
    prompts, stop_ids = random_prompts(6, seed=7, longest=8), {12}
    results = speculate(model, tokens(None, stop_ids), prompts, k, threshold, max_new_tokens=16,
                        heads=heads)
    expected = [slow_speculate(model, heads, prompt, k, threshold, stop_ids, 16)
                for prompt in prompts]
    assert [(*own, result.drafts) for own, result in zip(outcome(results), results)] == expected
    assert {result.finish for result in results} == {"stop", "length"}
    record = [pair for result in results for pair in result.drafts]
    if threshold is None:                                   # else it would test little
        assert {fed for fed, _ in record} == {k - 1}
        assert {stood for _, stood in record} >= {0, k - 1}
    else:
        assert {(0, 0), (1, 0), (1, 1)} <= set(record)


@pytest.mark.parametrize("source", ["untrained", "mask token", "trained", "looped", "fused"])
@pytest.mark.parametrize("k, threshold", [(3, None), (5, 0.4)])
def test_text_is_that_of_k_1(trained, masked, source, k, threshold):
    """In a ragged batch, whatever ends its rows; alone, the same drafts; confidences, too."""
    model, _, heads = trained(loop=source == "looped")
    if source == "untrained":
        heads = random_heads(model, 4).requires_grad_(False)
    elif source == "mask token":                            # a model of the other method with heads
        model, heads = masked, random_heads(masked, 4).requires_grad_(False)
    elif source == "fused":                                 # as sample.load has them
        model, heads = copy.deepcopy(model).fuse(), copy.deepcopy(heads).fuse()
    stand_in = tokens(MASK if model is masked else None, [12])
    prompts = random_prompts(9, seed=5)
    free = generate(model, stand_in, prompts, max_new_tokens=25)
    across = stand_in.token_bytes(free[0].tokens[4:6])[1:-1].decode()
    ending = {"max_new_tokens": 25, "stop_strings": [across]}
    plain = generate(model, stand_in, prompts, **ending)
    assert {result.finish for result in plain} == {"stop", "stop string", "length"}
    strategy = Strategy(k, threshold, "heads")
    together = decode(model, stand_in, prompts, strategy, heads, **ending)
    for a, b in zip(together, plain):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)
        assert a.confidences == pytest.approx(b.confidences, abs=1e-4)
    alone = [decode(model, stand_in, [prompt], strategy, heads, **ending)[0] for prompt in prompts]
    assert outcome(together) == outcome(alone)
    assert [result.drafts for result in together] == [result.drafts for result in alone]
    fed, stood = map(sum, zip(*(pair for result in together for pair in result.drafts)))
    if source not in ("untrained", "mask token"):
        assert 0 < stood < fed


def test_stops_and_limits_inside_a_chunk(trained):
    """What would have stood behind a stop, or beyond the limit, is not emitted."""
    model, _, heads = trained()
    prompts, written = random_prompts(12, seed=2), {}
    said = functools.partial(speculate, model, k=5, prompts=prompts, heads=heads)
    free = said(tokens(), max_new_tokens=24,
                on_chunk=lambda row, new: written.setdefault(row, []).append(new))
    assert [written[row] for row in range(12)] == [chunks_of(result) for result in free]

    # --- a token in the middle of a chunk, new there: all ends with it, if it is a stop token
    row, stop, upto = next(
        (row, token, result.tokens[:sum(result.chunks[:n]) + at + 1])
        for row, result in enumerate(free) for n, chunk in enumerate(chunks_of(result))
        for at, token in enumerate(chunk[:-1])
        if token not in result.tokens[:sum(result.chunks[:n]) + at])
    result = said(tokens(None, {stop}), max_new_tokens=24)[row]
    assert (result.tokens, result.finish) == (upto, "stop")
    fed, stood = result.drafts[-1]
    assert result.chunks[-1] < stood + 1                    # the record is of what was verified
    result = said(tokens(), max_new_tokens=24, stop_strings=[f"<{stop}>"])[row]
    assert (result.tokens, result.finish) == (upto, "stop string")

    # --- every limit, exactly
    for limit in (1, 2, 3, 5, 8):
        results = said(tokens(), max_new_tokens=limit)
        assert [r.tokens for r in results] == [r.tokens[:limit] for r in free]
        assert {r.finish for r in results} == {"length"}


def test_context_ends_inside_a_chunk(masked):
    """The model's context is a limit, too; drafts and caches may reach beyond it."""
    heads = random_heads(masked, 4).requires_grad_(False)
    prompts = [random_prompts(1, seed=9)[0][:1] * n for n in (1, 93, 95)]   # of 96 tokens
    plain = generate(masked, tokens(MASK), prompts, max_new_tokens=200)
    ours = speculate(masked, tokens(MASK), prompts, 5, max_new_tokens=200, heads=heads)
    assert [(r.tokens, r.finish) for r in ours] == [(r.tokens, r.finish) for r in plain]
    assert [len(r.tokens) for r in ours] == [95, 3, 1]


def test_threshold_limits_drafts_only(trained):
    model, _, heads = trained()
    prompts, fed, texts = random_prompts(8, seed=2), [], []
    for threshold in (None, 0.3, 0.8, 1.0):
        results = speculate(model, tokens(), prompts, 5, threshold, max_new_tokens=20, heads=heads)
        fed.append(sum(n for result in results for n, _ in result.drafts))
        texts.append([result.tokens for result in results])
    assert fed == sorted(fed, reverse=True) and fed[0] > fed[1] > fed[2] > fed[3] == 0
    assert all(text == texts[0] for text in texts)


def test_decode_asks_heads_only_where_the_strategy_does(trained, masked):
    """k = 1 is plain decoding; and a model may have both, mask tokens and heads."""
    heads, stand_in = random_heads(masked, 2).requires_grad_(False), tokens(MASK)
    prompts, ending = random_prompts(3, seed=3), {"max_new_tokens": 12}
    for strategy, expected in (
            (Strategy(1), generate(masked, stand_in, prompts, 1, **ending)),
            (Strategy(3, None, "wide"), speculate(masked, stand_in, prompts, 3, **ending)),
            (Strategy(3, None, "heads"),
             speculate(masked, stand_in, prompts, 3, heads=heads, **ending))):
        results = decode(masked, stand_in, prompts, strategy, heads, **ending)
        assert [r.tokens for r in results] == [r.tokens for r in expected]
        assert [r.drafts for r in results] == [r.drafts for r in expected]
    model, _, heads = trained()             # without a mask token heads may draft, and nothing else
    assert decode(model, tokens(), prompts, Strategy(3, None, "heads"), heads, **ending)
    with pytest.raises(InputError, match="no mask token"):
        decode(model, tokens(), prompts, Strategy(3, None, "wide"), heads, **ending)


def test_no_draft_is_a_number_of_drafts(trained):
    """k = 1 with heads is k = 1."""
    model, _, heads = trained()
    prompts, ending = random_prompts(3, seed=3), {"max_new_tokens": 6}
    ours = speculate(model, tokens(), prompts, 1, heads=heads, **ending)
    assert outcome(ours) == outcome(generate(model, tokens(), prompts, **ending))


def test_bf16_runs(trained):
    """The dtype of GPUs: its near-ties need not fall alike, so there is no text to compare."""
    model, _, heads = trained()
    model, heads = (copy.deepcopy(own).bfloat16().fuse() for own in (model, heads))
    results = decode(model, tokens(), random_prompts(3, seed=1), Strategy(5, 0.2, "heads"), heads,
                     max_new_tokens=10)
    assert [len(result.tokens) for result in results] == [10] * 3


def test_heads_of_the_tiny_model():
    """The laboratory's model with heads of a few steps, which draft from fifty tokens."""
    folder = resolve("tiny")
    model, tokenizer = Transformer.from_pretrained(folder).eval(), Tokenizer(folder)
    rows = encode_rows([WordProblems(1, "train")[i] for i in range(32)], tokenizer, "plain", 128)
    heads = Heads(model.config, 3).initialise(0)
    counts = torch.bincount(torch.tensor([i for _, ids in rows for i in ids]))
    heads.draft_ids = counts.topk(50).indices.sort().values
    train(heads, model, rows, steps=6)
    prompts = [tokenizer.prompt(WordProblems(1, "test")[i]["question"], "plain") for i in range(5)]
    plain = generate(model, tokenizer, prompts, max_new_tokens=40)
    ours = speculate(model, tokenizer, prompts, 4, max_new_tokens=40, heads=heads)
    assert [(r.tokens, r.finish) for r in ours] == [(r.tokens, r.finish) for r in plain]
    fed, stood = map(sum, zip(*(pair for result in ours for pair in result.drafts)))
    assert 0.1 * fed < stood < fed


def test_real_model_decodes_losslessly(smollm2):
    """SmolLM2 with untrained heads: drafts that are mostly wrong change nothing."""
    tokenizer, model = Tokenizer(smollm2), Transformer.from_pretrained(smollm2).eval()
    heads = Heads(model.config, 2).initialise(0).fuse()
    model.fuse()
    prompts = [tokenizer.prompt(question, "chat")
               for question in ("What is 7 + 5?", "Name three rivers in Europe.")]
    plain = decode(model, tokenizer, prompts, Strategy(1), max_new_tokens=12)
    ours = decode(model, tokenizer, prompts, Strategy(3, None, "heads"), heads, max_new_tokens=12)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]


# --------------------------------------------------------------------------------------------------
# To disk and back

def saved(heads, model, start, folder):
    """`save_heads` into a new folder, with the note that train.py leaves."""
    folder.mkdir()
    model = copy.deepcopy(model)
    model.config.raw["nanomtp"] = {"k_max": heads.depth + 1, "loop": heads.loop}
    save_heads(heads, model, start, folder)
    return folder


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_saved_is_what_is_loaded(tmp_path, family, loop):
    """To the bit. A looped head stands there K times, and is one again."""
    start = tiny_checkpoint(tmp_path / "start", family, tied=loop)
    model = Transformer.from_pretrained(start)
    heads = random_heads(model, 3, loop)
    heads.draft_ids = torch.tensor([4, 9, 17])
    folder = saved(heads, model, start, tmp_path / "out")
    ours, weights = load_heads(folder), load_file(folder / "model.safetensors")
    assert (ours.depth, ours.loop, len(ours.heads)) == (3, loop, 1 if loop else 3)
    assert ours.draft_ids.tolist() == [4, 9, 17]
    assert ours.state_dict().keys() == heads.state_dict().keys()
    for name, x in heads.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x)

    # --- the names that transformers looks for, and nothing else
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    first = "model.layers.0."
    block = {name.removeprefix(first) for name in model.state_dict() if name.startswith(first)}
    expected = {f"model.layers.{2 + d}.{name}" for d in range(3) for name in own | block}
    before = load_file(start / "model.safetensors")
    assert weights.keys() == before.keys() | expected
    assert all(torch.equal(weights[name], x) for name, x in before.items())
    for name in own | block:
        alike = torch.equal(weights["model.layers.2." + name], weights["model.layers.4." + name])
        assert alike == loop
    config, was = read_json(folder / "config.json"), read_json(start / "config.json")
    assert config.pop("num_mtp_layers") == 3
    if family != "llama":
        assert config.pop("mtp_layer_types") == ["full_attention"] * 3
    del config["nanomtp"]
    assert config == was


def test_plain_model_in_the_folder_is_the_start(tmp_path):
    """For us, and for transformers, which need not know of heads. bf16 files stay what they are."""
    start = tiny_checkpoint(tmp_path / "start", "qwen3", tied=False)
    weights = load_file(start / "model.safetensors")
    save_file({name: x.bfloat16() for name, x in weights.items()}, start / "model.safetensors",
              metadata={"format": "pt"})
    write_json(start / "config.json", read_json(start / "config.json") | {"dtype": "bfloat16"})
    model = Transformer.from_pretrained(start)
    heads = random_heads(model, 2)
    folder = saved(heads, model, start, tmp_path / "out")
    on_disk = load_file(folder / "model.safetensors")
    for name, x in load_file(start / "model.safetensors").items():
        assert on_disk[name].dtype == torch.bfloat16 and torch.equal(on_disk[name], x)
    again = Transformer.from_pretrained(folder)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    assert load_heads(start) is None and load_heads(folder).depth == 2
    plain, theirs = transformers_model(start), transformers_model(folder)
    assert type(plain) is type(theirs)
    assert plain.state_dict().keys() == theirs.state_dict().keys()
    for name, x in plain.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], x)
    # heads on a folder that has other ones: the old ones are gone
    fewer = saved(random_heads(again, 1), again, folder, tmp_path / "fewer")
    assert load_heads(fewer).depth == 1
    assert not any(name.startswith("model.layers.3.") for name in load_file(
        fewer / "model.safetensors"))


def test_weights_from_elsewhere_are_saved(tmp_path, tiny):
    """Several GPUs hand over the trained weights; the module may then hold others."""
    model = Transformer.from_pretrained(tiny)
    stale, fresh = random_heads(model, 2), random_heads(model, 2, seed=1)
    save_heads(stale, model, tiny, tmp_path, fresh.state_dict())
    for name, x in load_heads(tmp_path).state_dict().items():
        assert torch.equal(x, fresh.state_dict()[name])


def drop(name):
    return lambda weights, config: weights.pop(name)


def reshape(name):
    return lambda weights, config: weights.update({name: weights[name][:-1].clone()})


@pytest.mark.parametrize("damage, message", [
    (drop("model.layers.3.eh_proj.weight"), "head 2 lacks eh_proj.weight"),
    (drop("model.layers.2.mlp.up_proj.weight"), "head 1 lacks block.mlp.up_proj.weight"),
    (reshape("model.layers.2.shared_head.norm.weight"), "head 1 .* norm.weight"),
    (lambda weights, config: config.update(num_mtp_layers=3), "head 3 lacks"),
])
def test_damaged_folders_are_input_errors(tmp_path, tiny, damage, message):
    model = Transformer.from_pretrained(tiny)
    folder = saved(random_heads(model, 2), model, tiny, tmp_path / "out")
    weights, config = load_file(folder / "model.safetensors"), read_json(folder / "config.json")
    damage(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    with pytest.raises(InputError, match=message):
        load_heads(folder)


@pytest.mark.parametrize("content", [{}, {"ids": []}, {"ids": [5, TINY_VOCAB]}, {"ids": [-1]},
                                     {"ids": "5"}, {"ids": [1.5]}, {"ids": [[5]]}], ids=str)
def test_damaged_draft_vocabulary_is_an_input_error(tmp_path, tiny, content):
    model = Transformer.from_pretrained(tiny)
    folder = saved(random_heads(model, 1), model, tiny, tmp_path / "out")
    write_json(folder / "draft_vocab.json", content)
    with pytest.raises(InputError, match="draft_vocab.json"):
        load_heads(folder)


def their_drafting(folder, depth):
    """transformers' model of a folder, told which layers are heads; and a list that its passes fill
    """
    theirs, passes = transformers_model(folder), []
    first = theirs.config.num_hidden_layers
    theirs._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{layer}\..*" for layer in range(first, first + depth)]
    theirs.model.register_forward_hook(lambda *_: passes.append(1))
    return theirs, passes


@pytest.mark.parametrize("family, loop, depth", [
    ("llama", False, 1), ("llama", False, 2), ("llama", False, 4), ("llama", True, 4),
    ("qwen3", False, 1), ("qwen3", False, 2), ("qwen3", False, 4), ("qwen3", True, 4)])
def test_transformers_drafts_with_the_folder(trained, tmp_path, family, loop, depth):
    """The same text in as many passes of the model, the prompt's among them; also where a stop
    token, or the limit, falls into a chunk.

    A prompt of fewer tokens than there are heads is an error there (5.23.0).
    """
    model, start, heads = trained(family, loop)
    if loop:
        heads = copy.deepcopy(heads)
        heads.depth = depth
    else:
        heads = first_heads(heads, depth)
    theirs, passes = their_drafting(saved(heads, model, start, tmp_path / "out"), depth)
    stood = []
    for prompt in [p for p in random_prompts(12, seed=2) if len(p) >= depth][:3]:
        ours, = speculate(model, tokens(None, {12}), [prompt], depth + 1, max_new_tokens=22,
                          heads=heads)
        passes.clear()
        text = theirs.generate(torch.tensor([prompt]), use_mtp=True, do_sample=False,
                               max_new_tokens=22, eos_token_id=12, pad_token_id=2)
        assert text[0, len(prompt):].tolist() == ours.tokens
        assert len(passes) == ours.passes
        stood += [n for _, n in ours.drafts]
    assert {0, depth} <= set(stood)                         # else anything would agree


# --------------------------------------------------------------------------------------------------
# Sampling without loss

WORDS, LENGTH = 6, 3                # of the little model, its mask token aside; and of its texts


@pytest.fixture(scope="module")
def gambler(tmp_path_factory):
    """(a model of six words and a mask token, two heads). Every third draft stands."""
    folder = tmp_path_factory.mktemp("gambler")
    tiny_model(folder, tiny_config(vocab_size=WORDS, hidden_size=32, num_hidden_layers=1,
                                   bos_token_id=None, eos_token_id=None, pad_token_id=None), seed=1)
    model = Transformer.from_pretrained(folder).eval()
    add_mask_token(model, WORDS)
    return model, random_heads(model, 2).requires_grad_(False)


def exact(model, prompt, temperature, top_k, top_p):
    """The probability of every text of LENGTH tokens: {ids: p}. Written down, not drawn."""
    texts = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, share in texts.items():
            logits = model.output_matrix[:WORDS] @ states_alone(model, prompt + list(text))[-1]
            p = dict(enumerate((logits / temperature).double().softmax(dim=-1).tolist()))
            ranked = sorted(p, key=p.get, reverse=True)[:top_k or None]
            kept, needed = [], top_p * sum(p[word] for word in ranked)
            for word in ranked:
                if sum(p[other] for other in kept) < needed:
                    kept.append(word)
            total = sum(p[word] for word in kept)
            longer |= {(*text, word): share * p[word] / total for word in kept}
        texts = longer
    return texts


def surprise(samples, probabilities):
    """Pearson's chi-square of drawn texts, over the value that one sample in 10^5 exceeds.

    Texts that are expected less than five times count as one. A text that cannot be is infinite.
    """
    seen = {text: 0 for text in probabilities}
    for text in samples:
        if text not in seen:
            return float("inf")
        seen[text] += 1
    cells, rare = [], [0, 0.0]
    for text, p in probabilities.items():
        expected = p * len(samples)
        if expected >= 5:
            cells.append((seen[text], expected))
        else:
            rare = [rare[0] + seen[text], rare[1] + expected]
    if rare[1] >= 5:
        cells.append(rare)
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)                              # Wilson and Hilferty's approximation
    return statistic / (freedom * (1 - spread + 4.265 * spread ** 0.5) ** 3)


FORMS = ["wide", "narrow", "heads"]
SAMPLING = [(0.8, 0, 1.0), (1.0, 4, 0.85)]                  # temperature, top_k, top_p


def sample_texts(gambler, form, temperature, top_k, top_p, count=3000):
    """As many texts behind one prompt, a batch; and which share of the drafts stood."""
    model, heads = gambler
    choose = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p,
                               generator=torch.Generator().manual_seed(5))
    results = decode(model, tokens(WORDS), [[3, 1, 4]] * count, Strategy(3, None, form), heads,
                     max_new_tokens=LENGTH, choose=choose)
    fed, stood = map(sum, zip(*(pair for result in results for pair in result.drafts)))
    return [tuple(result.tokens) for result in results], stood / fed


@pytest.mark.parametrize("how", SAMPLING, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_sampling_without_loss(gambler, form, how):
    """Whole texts, so tokens behind standing and behind fallen drafts, and behind which ones."""
    samples, stood = sample_texts(gambler, form, *how)
    probabilities = exact(gambler[0], [3, 1, 4], *how)
    assert sum(probabilities.values()) == pytest.approx(1) and len(probabilities) > 20
    assert 0.2 < stood < 0.8
    assert surprise(samples, probabilities) < 1
    assert surprise(samples, exact(gambler[0], [3, 1, 4], how[0] + 0.25, *how[1:])) > 1


@pytest.mark.parametrize("form", FORMS)
def test_a_biased_rule_is_found_out(gambler, form, monkeypatch):
    """Three rules that look right, and are not, do not pass for plain sampling."""
    how = SAMPLING[0]
    probabilities = exact(gambler[0], [3, 1, 4], *how)

    # --- every draft stands, and so the token behind it was drawn behind another text
    with monkeypatch.context() as patch:
        patch.setattr(speculation, "verify", lambda drafts, n_drafts, predicted: n_drafts)
        assert surprise(sample_texts(gambler, form, *how)[0], probabilities) > 2

    # --- a refused draft may stand by a second draw; and greedy text is no sample
    def twice(drafts, n_drafts, predicted):
        lucky = torch.rand(drafts.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        predicted[:, :-1] = torch.where(lucky, drafts, predicted[:, :-1])
        return verify(drafts, n_drafts, predicted)

    verify = speculation.verify
    with monkeypatch.context() as patch:
        patch.setattr(speculation, "verify", twice)
        assert surprise(sample_texts(gambler, form, *how)[0], probabilities) > 2
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.draw", lambda logits, **_: most_likely(logits))
        assert surprise(sample_texts(gambler, form, *how)[0], probabilities) > 2
