"""
mtp.py against slow references: the attention mask against a double loop, the appended layout
against the paper's interleaved one, and rollout, targets, loss and gradients against one region at
a time, each in passes of its own.
"""
import copy
import random

import pytest
import torch
from conftest import TINY_VOCAB, tiny_checkpoint, tokens

import mtp
from model import Transformer, add_mask_token
from mtp import (
    PADDING, TEXT, attention_mask, behind_stop, choose_anchors, make_batch, make_layout,
    region_loss)

CPU, MASK, END = torch.device("cpu"), TINY_VOCAB, 2
KINDS = ("hard", "soft", "ground-truth")
# A third of all tokens stop, so that many rollouts hold one; and a tokenizer where hardly any does
STOPPING, PLAIN = tokens(MASK, range(3, TINY_VOCAB, 3), END), tokens(MASK, {END}, END)


def make_pair(folder, **overrides):
    """(student with a mask token, teacher): weights of their own, so that neither agrees."""
    student, teacher = (
        Transformer.from_pretrained(tiny_checkpoint(folder / str(seed), "qwen3", False, seed,
                                                    **overrides)) for seed in (0, 1))
    add_mask_token(student, MASK)
    return student, teacher.requires_grad_(False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The mask token is a new row of the student's matrices, which the teacher's do not have."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def padded_pair(tmp_path_factory):
    """Qwen's case: the matrices have rows to spare, and the mask token is the first of these."""
    student, teacher = make_pair(tmp_path_factory.mktemp("padded"), vocab_size=TINY_VOCAB + 8)
    assert student.config.vocab_size == teacher.config.vocab_size == TINY_VOCAB + 8
    return student, teacher


@pytest.fixture(params=["new row", "free row"])
def either_pair(request, pair, padded_pair):
    return pair if request.param == "new row" else padded_pair


def random_rows(seed, whole=False):
    """Three encoded rows, all cut; `whole`: but the second, which ends in an end token."""
    rng = random.Random(seed)
    rows = [(prompt, [rng.randrange(3, TINY_VOCAB) for _ in range(length)])
            for prompt, length in ((4, 17), (6, 11), (1, 9))]
    if whole:
        rows[1][1][-1] = END
    return rows


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


# --------------------------------------------------------------------------------------------------
# Layout and attention mask

def test_layout_is_the_docstrings_picture():
    """Text of 8, prompt of 3, k = 3, every third token from the last prompt token on."""
    anchors = choose_anchors([3], [8], offset=0, stride=3)
    assert anchors == [[2, 5]]
    position, region, bound, (row, place) = make_layout([8], anchors, k=3)
    assert position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 6, 7]]
    assert region.tolist() == [[TEXT] * 8 + [0, 0, 1, 1]]
    assert bound.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5, 5]]
    assert row.tolist() == [[0] * 3] * 2 and place.tolist() == [[2, 8, 9], [5, 10, 11]]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_each_token_is_an_anchor_at_one_offset(stride):
    """From the prompt's last to the last but one: nothing is trained on twice, nothing never."""
    anchors = [anchor for offset in range(stride)
               for anchor in choose_anchors([4], [12], offset, stride)[0]]
    assert sorted(anchors) == list(range(3, 11))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k, offset, stride", [
    (2, 0, 1), (3, 1, 2), (4, 2, 3), (5, 0, 7), (1, 0, 2)])
def test_attention_mask_against_a_double_loop(k, offset, stride, bidirectional):
    """The rule of the method, spelled out for one query and one key at a time."""
    anchors = choose_anchors([4, 6, 1], [17, 11, 9], offset, stride)
    position, region, bound, _ = make_layout([17, 11, 9], anchors, k)
    mask = attention_mask(position, region, bound, bidirectional)
    for b in range(3):
        for q in range(mask.shape[1]):
            for key in range(mask.shape[2]):
                if region[b, key] == TEXT:
                    limit = position[b, q] if region[b, q] == TEXT else bound[b, q]
                    expected = bool(position[b, key] <= limit)
                elif region[b, key] == PADDING:
                    expected = False
                else:
                    later = position[b, key] > position[b, q] and not bidirectional
                    expected = bool(region[b, q] == region[b, key] and not later)
                assert mask[b, q, key] == expected, (b, q, key)
    assert mask.any(dim=-1).all()                           # a query without any key would be NaN


def interleaved(text, anchors, k):
    """The paper's layout of the same problems: each region right behind its anchor, in the text.

    Built one token at a time, and its mask one pair at a time, to share nothing with mtp.py.
    Returns (id, position, region, anchor) of each fed token, and the mask.
    """
    fed = []
    for i, token in enumerate(text):
        fed.append((token, i, None, i))
        if i in anchors:
            fed += [(MASK, i + j, i, i) for j in range(1, k)]
    mask = torch.zeros(len(fed), len(fed), dtype=torch.bool)
    for q, (_, q_position, q_region, q_anchor) in enumerate(fed):
        for key, (_, position, region, _) in enumerate(fed):
            if region is None:
                mask[q, key] = position <= q_anchor
            else:
                mask[q, key] = region == q_region and position <= q_position
    return fed, mask


@torch.no_grad()
@pytest.mark.parametrize("k, offset, stride", [(2, 0, 2), (3, 1, 3), (4, 2, 5), (4, 0, 1)])
def test_appended_layout_equals_the_interleaved_one(pair, k, offset, stride):
    student, _ = pair
    prompt, text = random_rows(1)[0]
    batch = make_batch([(prompt, text)], k, offset, stride, PLAIN, CPU)
    ours = student(batch.ids, batch.position, batch.mask, at=batch.slots)           # (N, k, V)
    anchors = batch.slots[1][:, 0].tolist()
    fed, mask = interleaved(text, anchors, k)
    ids, positions = (torch.tensor([[token[i] for token in fed]]) for i in (0, 1))
    theirs = student(ids, positions, mask)[0]
    where = [(region, position) for _, position, region, _ in fed]
    for logits, anchor in zip(ours, anchors):
        places = [where.index((None, anchor))]
        places += [where.index((anchor, anchor + j)) for j in range(1, k)]
        torch.testing.assert_close(logits, theirs[places], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
def test_text_logits_are_the_plain_models(pair, bidirectional):
    """Text never sees a mask token, and a row's padding and neighbours never matter."""
    student, _ = pair
    rows = random_rows(2)
    batch = make_batch(rows, 4, 1, 2, PLAIN, CPU, bidirectional)
    logits = student(batch.ids, batch.position, batch.mask)
    for b, (_, text) in enumerate(rows):
        n = len(text)
        plain = student(torch.tensor([text]), torch.arange(n)[None], causal(n))
        torch.testing.assert_close(logits[b, :n], plain[0], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The objective, one region at a time

def run_alone(model, ids, sighted=0):
    """One text through the model: (T, candidates) logits, and the candidates: all ids but MASK.

    Attention is causal, but the last `sighted` tokens see each other both ways.
    """
    n, seen = len(ids), causal(len(ids))
    seen[n - sighted:, n - sighted:] = True
    logits = model(torch.tensor([ids]), torch.arange(n)[None], seen)[0]
    candidates = [token for token in range(logits.shape[1]) if token != MASK]
    return logits[:, candidates], candidates


def one_region(student, teacher, text, truth, k, tokenizer, kind="hard", bidirectional=False,
               slot1=1.0):
    """The region behind the prefix `text`, by passes over it alone.

    Returns its rollout, targets, confidences, lists of k, and the sum of its slots' losses.
    """
    fed = text + [MASK] * (k - 1)
    logits, candidates = run_alone(student, fed, k - 1 if bidirectional else 0)
    log_p = logits[-k:].log_softmax(dim=-1)
    rollout = [candidates[i] for i in log_p.argmax(dim=-1).tolist()]
    with torch.no_grad():
        said, heard = run_alone(teacher, text + rollout[:-1])                   # always causal
    assert heard == candidates
    targets, loss = [], 0.0
    for j in range(k):
        stopped = any(token in tokenizer.stop_ids for token in rollout[:j])
        p = said[len(text) - 1 + j].softmax(dim=-1)
        if kind == "ground-truth":
            targets.append(truth[j])
        else:
            targets.append(tokenizer.end_id if stopped else candidates[p.argmax().item()])
        weight = slot1 if j == 0 else 1.0
        if kind == "soft" and not stopped:
            loss = loss - weight * (p * log_p[j]).sum()
        elif targets[j] != -100:
            loss = loss - weight * log_p[j, candidates.index(targets[j])]
    return rollout, targets, log_p.max(dim=-1).values.exp().tolist(), loss


def next_token_loss(student, prompt, text):
    """Sum of the ordinary cross-entropy over an answer's tokens."""
    logits, candidates = run_alone(student, text)
    return sum(-logits[i - 1].log_softmax(dim=-1)[candidates.index(text[i])]
               for i in range(prompt, len(text)))


def region_by_region(student, teacher, rows, k, offset, stride, tokenizer, **variant):
    """Rollout, targets, confidences of all regions, (N, k); the sum of their losses, and that of
    the answers' own tokens."""
    seen = []
    for prompt, text in rows:
        end_id = tokenizer.end_id
        longer = text + [end_id if text[-1] == end_id else -100] * k
        for anchor in range(prompt - 1 + offset, len(text) - 1, stride):
            truth = longer[anchor + 1:anchor + 1 + k]
            seen.append(one_region(student, teacher, text[:anchor + 1], truth, k, tokenizer,
                                   **variant))
    *seen, losses = zip(*seen)
    return *map(torch.tensor, seen), sum(losses), sum(
        next_token_loss(student, *row) for row in rows)


def gradient(student, loss):
    """{name: gradient} of every weight of the student."""
    student.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    return gradients


def assert_same_gradients(ours, theirs):
    largest = max(gradient.abs().max() for gradient in theirs.values()).item()
    assert ours.keys() == theirs.keys() and largest > 0
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("k, kind, bidirectional, slot1", [
    *((k, kind, False, 1.0) for k in (2, 4) for kind in KINDS),
    *((4, kind, True, 1.0) for kind in KINDS),
    (1, "hard", False, 1.0), (1, "soft", False, 1.0),
    (3, "hard", False, 2.5), (3, "soft", True, 0.0), (3, "ground-truth", False, 2.5)])
def test_against_one_region_at_a_time(either_pair, k, kind, bidirectional, slot1):
    """Rollout, targets, confidences, loss and gradient, for new and free rows of the matrix."""
    student, teacher = either_pair
    rows = random_rows(3, whole=True)
    batch = make_batch(rows, k, 0, 2, STOPPING, CPU, bidirectional, prefix=True)
    loss, seen = region_loss(
        student, None if kind == "ground-truth" else teacher, batch, STOPPING, 7, kind == "soft",
        slot1, prefix_weight=0.5, prefix_tokens=3)
    rollout, targets, confidence, region_sum, prefix_sum = region_by_region(
        student, teacher, rows, k, 0, 2, STOPPING, kind=kind, bidirectional=bidirectional,
        slot1=slot1)
    assert torch.equal(seen.rollout, rollout) and torch.equal(seen.targets, targets)
    torch.testing.assert_close(seen.confidence, confidence, rtol=1e-4, atol=1e-6)
    expected = region_sum / 7 + 0.5 * prefix_sum / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradient(student, loss), gradient(student, expected))
    # all of it occurs, else it would not be tested
    assert len(batch.next_token) == 13 + 5 + 8 and (rollout != MASK).all()
    assert (-100 in targets) == (kind == "ground-truth" and k > 1)
    assert END in targets or k == 1
    assert k == 1 or behind_stop(rollout, STOPPING.stop_ids).any()


def test_bidirectional_is_the_students_alone(pair):
    """The teacher reads causally, else it would say other things; so does the anchor, as text."""
    student, teacher = pair
    one_way, both = (make_batch(random_rows(3), 4, 0, 2, PLAIN, CPU, bidirectional)
                     for bidirectional in (False, True))
    assert torch.equal(both.teacher_mask, one_way.mask)
    assert torch.equal(one_way.teacher_mask, one_way.mask)
    with torch.no_grad():
        causal_seen, seen, wrong = (
            region_loss(student, teacher, batch, PLAIN, 1)[1]
            for batch in (one_way, both, both._replace(teacher_mask=both.mask)))
    assert torch.equal(causal_seen.rollout[:, 0], seen.rollout[:, 0])
    assert not torch.equal(causal_seen.rollout, seen.rollout)
    assert not torch.equal(seen.targets, wrong.targets)


class Opened:
    """A student that keeps the hidden states of its pass, to look at their gradient."""

    def __init__(self, student):
        self.student, self.output_matrix = student, student.output_matrix

    def __call__(self, *args, **more):
        self.hidden = self.student(*args, **more)
        self.hidden.retain_grad()
        return self.hidden


def test_soft_targets_of_an_equal_teacher(pair):
    """At slot 1 both read the same text: the loss there is the entropy, which nothing can lower."""
    student, _ = pair
    teacher = copy.deepcopy(student).requires_grad_(False)
    opened, batch = Opened(student), make_batch(random_rows(3), 3, 0, 2, PLAIN, CPU)
    slopes = {}
    for soft in (True, False):
        region_loss(opened, teacher, batch, PLAIN, 1, soft)[0].backward()
        slopes[soft] = opened.hidden.grad.view(-1, 3, student.config.hidden_size).norm(dim=-1)
        student.zero_grad(set_to_none=True)
    assert slopes[True][:, 0].max() < 1e-5 < 0.01 < slopes[True][:, 1:].min()       # (N, k)
    assert slopes[False][:, 0].min() > 0.01
    batch = make_batch(random_rows(3), 1, 0, 1, PLAIN, CPU)
    with torch.no_grad():
        loss, seen = region_loss(student, teacher, batch, PLAIN, 1, soft=True)
        logits = student(batch.ids, batch.position, batch.mask, at=batch.slots)[..., :MASK]
        p = logits.softmax(dim=-1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    # and with k = 1 the hard targets of an equal teacher are the student's own choices
    assert torch.equal(seen.rollout, seen.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_portions_change_nothing(either_pair, kind, monkeypatch):
    """Logits that exist for 3 slots at a time give the loss and the gradient of all at once."""
    student, teacher = either_pair
    batch = make_batch(random_rows(3, whole=True), 4, 0, 2, STOPPING, CPU, prefix=True)
    slots = batch.slots[0].numel()
    assert slots > 30 and slots % 3 and len(batch.next_token) % 3
    results = []
    for chunk in (3, 10_000):
        monkeypatch.setattr(mtp, "CHUNK", chunk)
        loss, seen = region_loss(
            student, None if kind == "ground-truth" else teacher, batch, STOPPING, slots,
            kind == "soft", prefix_weight=1.0, prefix_tokens=len(batch.next_token))
        results.append((loss.item(), seen, gradient(student, loss)))
    (loss, seen, small), (whole_loss, whole_seen, whole) = results
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert torch.equal(seen.rollout, whole_seen.rollout)
    assert torch.equal(seen.targets, whole_seen.targets)
    torch.testing.assert_close(seen.confidence, whole_seen.confidence)
    assert_same_gradients(small, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_passes_are_finite_and_close(either_pair, kind):
    """As on a GPU: fp32 weights under autocast, a teacher in bf16.

    What is no candidate must not become 0 * -inf there.
    """
    student, teacher = either_pair
    batch, losses = make_batch(random_rows(3), 4, 0, 2, PLAIN, CPU, prefix=True), []
    for teacher, dtype in ((teacher, torch.float32),
                           (copy.deepcopy(teacher).bfloat16(), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = region_loss(
                student, None if kind == "ground-truth" else teacher, batch, PLAIN, 50,
                kind == "soft", prefix_weight=1.0, prefix_tokens=26)
        losses.append(loss.item())
        assert all(slope.isfinite().all() for slope in gradient(student, loss).values())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)          # NaN is close to nothing


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_predict(pair, kind):
    """No anchor at this offset: 0, with a gradient of 0 for every weight, which DDP waits for."""
    student, teacher = pair
    batch = make_batch(random_rows(3), 3, 50, 60, STOPPING, CPU)
    assert batch.slots[0].numel() == 0
    loss, seen = region_loss(student, None if kind == "ground-truth" else teacher, batch, STOPPING,
                             1, kind == "soft")
    assert loss.item() == 0 and all(part.shape == (0, 3) for part in seen)
    slopes = gradient(student, loss).values()
    assert all(slope is not None and not slope.any() for slope in slopes)


def test_mask_token_is_no_candidate(either_pair):
    """Nor does the gradient reach the teacher; it does reach the mask token's own input row."""
    student, teacher = (copy.deepcopy(model) for model in either_pair)
    with torch.no_grad():                                   # its favourite everywhere
        for model in (student, teacher):
            matrix = model.lm_head.weight
            if len(matrix) > MASK:                          # a teacher that lacks the row has none
                matrix[MASK] = matrix[:MASK].sum(0) * 5
    batch = make_batch(random_rows(4), 3, 0, 2, PLAIN, CPU)
    for soft in (False, True):
        loss, seen = region_loss(student, teacher, batch, PLAIN, 50, soft)
        assert loss.isfinite()
        assert (seen.rollout != MASK).all() and (seen.targets != MASK).all()
        slopes = gradient(student, loss)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(slope.isfinite().all() for slope in slopes.values())
        assert slopes["model.embed_tokens.weight"][MASK].any()
        assert not slopes["lm_head.weight"][MASK].any()


def test_targets_behind_a_stop_token(pair):
    """At the stop token itself the teacher still decides; behind it only the end is right."""
    rollout = torch.tensor([[5, 1, 7, 8], [5, 6, 7, 1], [3, 1, 5, 5], [5, 6, 7, 8]])
    assert behind_stop(rollout, {1, 3}).tolist() == [
        [False, False, True, True], [False] * 4, [False, True, True, True], [False] * 4]
    student, teacher = pair
    batch = make_batch(random_rows(3), 4, 0, 2, PLAIN, CPU)
    with torch.no_grad():
        free = region_loss(student, teacher, batch, tokens(MASK), 1)[1]             # nothing stops
        stop = free.rollout[0, 1].item()
        seen = region_loss(student, teacher, batch, tokens(MASK, {stop}), 1)[1]
    assert torch.equal(seen.rollout, free.rollout)
    behind = torch.tensor([[stop in row[:j] for j in range(4)] for row in seen.rollout.tolist()])
    assert behind[0].tolist() == [False, False, True, True] and not behind.all(dim=1).any()
    assert (seen.targets[behind] == END).all() and (free.targets[behind] != END).any()
    assert torch.equal(seen.targets[~behind], free.targets[~behind])
