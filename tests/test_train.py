"""
train.py against slow references: the mask against a double loop, the appended layout against the paper's interleaved
one, losses, targets and gradients against one region at a time; then whole runs on a tiny model: overfitting, logging,
stopping. Resuming is in test_resume.py, more than one process in test_parallel.py.
"""
import argparse
import copy
import json
import random

import pytest
import torch
from conftest import TINY_VOCAB, log_rows, run_train, tiny_checkpoint
from safetensors.torch import load_file

import regions
import train as training
from data import draw_rows, encode_rows, load_data
from model import Transformer, add_mask_token
from pretrained import InputError, read_json
from regions import attention_mask, choose_anchors, make_batch, make_layout
from tokenizer import Tokenizer
from train import behind_stop, draw_k_and_offset, region_loss

CPU, MASK = torch.device("cpu"), TINY_VOCAB
KINDS = ("hard", "soft", "ground-truth")


def make_pair(folder, **overrides):
    """(student with a mask token, teacher): different random weights, so that neither agrees with the other."""
    student = Transformer.from_pretrained(tiny_checkpoint(folder / "student", "qwen3", tied=False, seed=0, **overrides))
    teacher = Transformer.from_pretrained(tiny_checkpoint(folder / "teacher", "qwen3", tied=False, seed=1, **overrides))
    add_mask_token(student, MASK)
    return student, teacher.requires_grad_(False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The mask token is a new row of the student's matrices, which the teacher's do not have."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def padded_pair(tmp_path_factory):
    """Qwen's case: the matrices have rows that the tokenizer does not use, and the mask token is the first of these."""
    student, teacher = make_pair(tmp_path_factory.mktemp("padded"), vocab_size=TINY_VOCAB + 8)
    assert student.config.vocab_size == teacher.config.vocab_size == TINY_VOCAB + 8
    return student, teacher


@pytest.fixture(params=["new row", "free row"])
def either_pair(request, pair, padded_pair):
    return pair if request.param == "new row" else padded_pair


def random_rows(seed, shapes=((4, 17), (6, 11), (1, 9)), end_id=None):
    """Encoded rows: (prompt length, random ids of a text of that length). With `end_id` the second one is not cut."""
    rng = random.Random(seed)
    rows = [(prompt, [rng.randrange(3, TINY_VOCAB) for _ in range(length)]) for prompt, length in shapes]
    if end_id is not None:
        rows[1][1][-1] = end_id
    return rows


# --- layout and mask

def test_layout_is_the_docstring_picture():
    """Text of 8, prompt of 3, k = 3, every third token from the last prompt token on: anchors 2 and 5."""
    position, region, bound, (row, place) = make_layout([8], choose_anchors([3], [8], offset=0, stride=3), k=3)
    assert position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 6, 7]]
    assert region.tolist() == [[regions.TEXT] * 8 + [0, 0, 1, 1]]
    assert bound.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5, 5]]
    assert row.tolist() == [[0] * 3] * 2 and place.tolist() == [[2, 8, 9], [5, 10, 11]]


def test_anchors_reach_from_the_last_prompt_token_to_the_one_before_the_end():
    """Over all offsets each candidate is an anchor exactly once: nothing is trained on twice, nothing never."""
    for stride in (1, 2, 3, 5):
        anchors = sorted(anchor for offset in range(stride)
                         for anchor in make_layout([12], choose_anchors([4], [12], offset, stride), 2)[3][1][:, 0].tolist())
        assert anchors == list(range(3, 11))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k, offset, stride", [(2, 0, 1), (3, 1, 2), (4, 2, 3), (5, 0, 7), (1, 0, 2)])
def test_mask_against_a_double_loop(k, offset, stride, bidirectional):
    """The rule of the method, spelled out for one query and one key at a time."""
    anchors = choose_anchors([4, 6, 1], [17, 11, 9], offset, stride)
    position, region, bound, _ = make_layout([17, 11, 9], anchors, k)
    mask = attention_mask(position, region, bound, bidirectional)
    for b in range(3):
        for q in range(mask.shape[1]):
            for key in range(mask.shape[2]):
                if region[b, key] == regions.TEXT:
                    limit = position[b, q] if region[b, q] == regions.TEXT else bound[b, q]
                    expected = bool(position[b, key] <= limit)
                elif region[b, key] == regions.PADDING:
                    expected = False
                else:
                    later = position[b, key] > position[b, q] and not bidirectional
                    expected = bool(region[b, q] == region[b, key] and not later)
                assert mask[b, q, key] == expected, (b, q, key)
    assert mask.any(dim=-1).all()                                   # a query without any key would be NaN


def interleaved(text, anchors, k, mask_id):
    """The paper's layout of the same problems: each region stands right behind its anchor, inside the text.

    Built one token at a time, and its mask one pair at a time, to share nothing with regions.py.
    """
    tokens = []                                                     # (id, position, region, anchor) in sequence order
    for i, token in enumerate(text):
        tokens.append((token, i, None, i))
        if i in anchors:
            tokens += [(mask_id, i + j, i, i) for j in range(1, k)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (_, q_position, q_region, q_anchor) in enumerate(tokens):
        for key, (_, position, region, _) in enumerate(tokens):
            visible = position <= q_anchor if region is None else region == q_region and position <= q_position
            mask[q, key] = visible
    return tokens, mask


@pytest.mark.parametrize("k, offset, stride", [(2, 0, 2), (3, 1, 3), (4, 2, 5), (4, 0, 1)])
def test_appended_layout_equals_the_interleaved_one(pair, k, offset, stride):
    student, _ = pair
    prompt, text = random_rows(1)[0]
    batch = make_batch([(prompt, text)], k, offset, stride, MASK, 0, CPU)
    with torch.no_grad():
        ours = student(batch.ids, batch.position, batch.mask, at=batch.slots)       # (N, k, V)
    anchors = batch.slots[1][:, 0].tolist()
    tokens, mask = interleaved(text, anchors, k, MASK)
    with torch.no_grad():
        fed, positions = (torch.tensor([[token[i] for token in tokens]]) for i in (0, 1))
        theirs = student(fed, positions, mask)[0]
    where = [(region, position) for _, position, region, _ in tokens]
    for n, anchor in enumerate(anchors):
        places = [where.index((None, anchor))] + [where.index((anchor, anchor + j)) for j in range(1, k)]
        torch.testing.assert_close(ours[n], theirs[places], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_text_logits_are_the_plain_models(pair, bidirectional):
    """Text never sees a mask, and a row's padding and neighbours never matter."""
    student, _ = pair
    rows = random_rows(2)
    batch = make_batch(rows, 4, 1, 2, MASK, 0, CPU, bidirectional)
    with torch.no_grad():
        logits = student(batch.ids, batch.position, batch.mask)
        for b, (_, text) in enumerate(rows):
            n = len(text)
            plain = student(torch.tensor([text]), torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())
            torch.testing.assert_close(logits[b, :n], plain[0], rtol=0, atol=1e-5)


# --- objective

def run_alone(model, ids, sighted=0):
    """One text through the model: (T, candidates) logits, and the candidates, which are all ids but the mask token.

    The mask is the plain causal one, but the last `sighted` tokens see each other both ways.
    """
    n = len(ids)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[n - sighted:, n - sighted:] = True
    logits = model(torch.tensor([ids]), torch.arange(n)[None], seen)[0]
    candidates = [token for token in range(logits.shape[1]) if token != MASK]
    return logits[:, candidates], candidates


def one_region_at_a_time(student, teacher, text, truth, k, stop_ids, end_id, kind="hard", bidirectional=False, slot1=1.0):
    """The region behind the prefix `text`: rollout, targets, confidences and the loss, by passes over this region alone."""
    logits, candidates = run_alone(student, text + [MASK] * (k - 1), k - 1 if bidirectional else 0)
    log_p = logits[-k:].log_softmax(dim=-1)
    rollout = [candidates[i] for i in log_p.argmax(dim=-1).tolist()]
    with torch.no_grad():
        said, heard = run_alone(teacher, text + rollout[:-1])           # always causal
    assert heard == candidates
    targets, loss = [], 0.0
    for j in range(k):
        stopped = any(token in stop_ids for token in rollout[:j])
        p = said[len(text) - 1 + j].softmax(dim=-1)
        targets.append(truth[j] if kind == "ground-truth" else end_id if stopped else candidates[p.argmax().item()])
        weight = slot1 if j == 0 else 1.0
        if kind == "soft" and not stopped:
            loss = loss - weight * (p * log_p[j]).sum()
        elif targets[j] != -100:
            loss = loss - weight * log_p[j, candidates.index(targets[j])]
    return rollout, targets, log_p.max(dim=-1).values.exp().tolist(), loss


def next_token_loss(student, prompt, text):
    """Sum of the ordinary cross-entropy over an answer's tokens."""
    logits, candidates = run_alone(student, text)
    return sum(-logits[i - 1].log_softmax(dim=-1)[candidates.index(text[i])] for i in range(prompt, len(text)))


def region_by_region(student, teacher, rows, k, offset, stride, stop_ids, end_id, **variant):
    """What region_loss should return for a batch of these rows, and the loss over the answers' own tokens."""
    regions = []
    for prompt, text in rows:
        behind = text + [end_id if text[-1] == end_id else -100] * k
        for anchor in range(prompt - 1 + offset, len(text) - 1, stride):
            regions.append(one_region_at_a_time(student, teacher, text[:anchor + 1], behind[anchor + 1:anchor + 1 + k], k,
                                                stop_ids, end_id, **variant))
    rollout, targets, confidence, losses = zip(*regions)
    return list(rollout), list(targets), list(confidence), sum(losses), sum(next_token_loss(student, *row) for row in rows)


def gradient(student, loss):
    """{name: gradient} of every weight of the student."""
    student.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    return gradients


def assert_same_gradients(ours, theirs):
    largest = max(gradient.abs().max() for gradient in theirs.values()).item()
    assert ours.keys() == theirs.keys() and largest > 0
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


STOPS, END = set(range(3, TINY_VOCAB, 3)), 2            # a third of all tokens stop: many rollouts hold one


@pytest.mark.parametrize("k, kind, bidirectional, slot1", [
    *((k, kind, False, 1.0) for k in (2, 4) for kind in KINDS), *((4, kind, True, 1.0) for kind in KINDS),
    (1, "hard", False, 1.0), (1, "soft", False, 1.0), (3, "hard", False, 2.5), (3, "soft", True, 0.0)])
def test_variants_against_one_region_at_a_time(either_pair, k, kind, bidirectional, slot1):
    """Rollout, targets, confidences, both losses and the gradient of each, for new and for free rows of the matrix."""
    student, teacher = either_pair
    rows = random_rows(3, end_id=END)
    batch = make_batch(rows, k, 0, 2, MASK, END, CPU, bidirectional, prefix=True)
    loss, prefix, rollout, targets, confidence = region_loss(
        student, None if kind == "ground-truth" else teacher, batch, MASK, STOPS, END, kind == "soft", slot1)
    our_rollout, our_targets, our_confidence, our_loss, our_prefix = region_by_region(
        student, teacher, rows, k, 0, 2, STOPS, END, kind=kind, bidirectional=bidirectional, slot1=slot1)
    assert rollout.tolist() == our_rollout and targets.tolist() == our_targets
    torch.testing.assert_close(confidence, torch.tensor(our_confidence), rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(our_loss.item(), rel=1e-5)
    assert prefix.item() == pytest.approx(our_prefix.item(), rel=1e-5) and len(batch.next_token) == 13 + 5 + 8
    assert_same_gradients(gradient(student, loss), gradient(student, our_loss))
    assert_same_gradients(gradient(student, prefix), gradient(student, our_prefix))
    assert rollout.max() < (MASK if student.config.vocab_size == MASK + 1 else MASK + 8) and (rollout != MASK).all()
    flat = targets.flatten().tolist()                               # all of it occurs: else nothing is tested
    assert (-100 in flat) == (kind == "ground-truth" and k > 1) and (END in flat or k == 1)
    assert k == 1 or kind == "ground-truth" or behind_stop(rollout, STOPS).any()


def test_bidirectional_is_the_students_alone(pair):
    """It changes what the student writes, but the teacher reads causally: with that mask it would say other things."""
    student, teacher = pair
    rows = random_rows(3)
    causal, both = (make_batch(rows, 4, 0, 2, MASK, END, CPU, bidirectional) for bidirectional in (False, True))
    assert torch.equal(both.teacher_mask, causal.mask) and torch.equal(causal.teacher_mask, causal.mask)
    with torch.no_grad():
        rollouts = [region_loss(student, teacher, batch, MASK, {2}, END)[2] for batch in (causal, both)]
        targets = [region_loss(student, teacher, batch, MASK, {2}, END)[3]
                   for batch in (both, both._replace(teacher_mask=both.mask))]
    assert torch.equal(rollouts[0][:, 0], rollouts[1][:, 0])        # slot 1 is read at the anchor, which is text
    assert not torch.equal(*rollouts) and not torch.equal(*targets)


class Opened:
    """A student that keeps the hidden states of its pass, to look at their gradient."""

    def __init__(self, student):
        self.student, self.output_matrix = student, student.output_matrix

    def __call__(self, *args, **more):
        self.hidden = self.student(*args, **more)
        self.hidden.retain_grad()
        return self.hidden


def test_soft_targets_of_an_equal_teacher(pair):
    """At slot 1 student and teacher read the same text: the loss there is the entropy, which nothing can lower."""
    student, _ = pair
    teacher = copy.deepcopy(student).requires_grad_(False)
    opened, batch = Opened(student), make_batch(random_rows(3), 3, 0, 2, MASK, END, CPU)
    slopes = {}
    for soft in (True, False):
        region_loss(opened, teacher, batch, MASK, {2}, END, soft)[0].backward()
        slopes[soft] = opened.hidden.grad.view(-1, 3, student.config.hidden_size).norm(dim=-1)      # (N, k)
        student.zero_grad(set_to_none=True)
    assert slopes[True][:, 0].max() < 1e-5 < 0.01 < slopes[True][:, 1:].min() and slopes[False][:, 0].min() > 0.01
    batch = make_batch(random_rows(3), 1, 0, 1, MASK, END, CPU)
    with torch.no_grad():
        loss = region_loss(student, teacher, batch, MASK, {2}, END, soft=True)[0].item()
        p = student(batch.ids, batch.position, batch.mask, at=batch.slots)[..., :MASK].softmax(dim=-1)
    assert loss == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_portions_change_nothing(either_pair, kind, monkeypatch):
    """Logits that exist for 3 slots at a time give the loss and the gradient of all at once."""
    student, teacher = either_pair
    batch = make_batch(random_rows(3, end_id=END), 4, 0, 2, MASK, END, CPU, prefix=True)
    assert batch.slots[0].numel() > 30 and batch.slots[0].numel() % 3 and len(batch.next_token) % 3
    results = []
    for chunk in (3, 10_000):
        monkeypatch.setattr(training, "CHUNK", chunk)
        loss, prefix, *rest = region_loss(student, None if kind == "ground-truth" else teacher, batch, MASK, STOPS, END,
                                          kind == "soft")
        results.append((loss.item(), prefix.item(), rest, gradient(student, loss + prefix)))
    (loss, prefix, rest, small), (whole_loss, whole_prefix, whole_rest, whole) = results
    assert (loss, prefix) == pytest.approx((whole_loss, whole_prefix), rel=1e-5)
    assert torch.equal(rest[0], whole_rest[0]) and torch.equal(rest[1], whole_rest[1])
    torch.testing.assert_close(rest[2], whole_rest[2])
    assert_same_gradients(small, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_passes_are_finite_and_close(either_pair, kind):
    """As on a GPU: fp32 weights under autocast, a teacher in bf16. What is no candidate must not become 0 * -inf there."""
    student, teacher = either_pair
    batch = make_batch(random_rows(3), 4, 0, 2, MASK, END, CPU, prefix=True)
    losses = []
    for teacher, dtype in ((teacher, torch.float32), (copy.deepcopy(teacher).bfloat16(), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, prefix, *_ = region_loss(student, None if kind == "ground-truth" else teacher, batch, MASK, {2}, END,
                                           kind == "soft")
        losses.append((loss.item(), prefix.item()))
        assert all(slope.isfinite().all() for slope in gradient(student, loss + prefix).values())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)          # NaN is close to nothing


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_predict(pair, kind):
    """A pass whose offset leaves no anchor: a loss of 0 with a gradient of 0 for every weight, which DDP waits for."""
    student, teacher = pair
    batch = make_batch(random_rows(3), 3, 50, 60, MASK, END, CPU)
    assert batch.slots[0].numel() == 0
    loss, prefix, rollout, targets, confidence = region_loss(student, None if kind == "ground-truth" else teacher, batch,
                                                             MASK, STOPS, END, kind == "soft")
    assert loss.item() == 0 == prefix and rollout.shape == targets.shape == confidence.shape == (0, 3)
    assert all(slope is not None and not slope.any() for slope in gradient(student, loss).values())


def test_gradients_and_candidates(either_pair):
    """The gradient reaches the student alone, also through the mask's own row; the mask token is never chosen."""
    student, teacher = (copy.deepcopy(model) for model in either_pair)
    with torch.no_grad():                                           # make the mask token the favourite everywhere
        for model in (student, teacher):
            if len(model.lm_head.weight) > MASK:                    # a teacher whose matrix did not grow has no such row
                model.lm_head.weight[MASK] = model.lm_head.weight[:MASK].sum(0) * 5
    batch = make_batch(random_rows(4), 3, 0, 2, MASK, END, CPU)
    for soft in (False, True):
        loss, _, rollout, targets, _ = region_loss(student, teacher, batch, MASK, {2}, END, soft)
        assert loss.isfinite() and (rollout != MASK).all() and (targets != MASK).all()
        slopes = gradient(student, loss)
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(slope.isfinite().all() for slope in slopes.values())
        assert slopes["model.embed_tokens.weight"][MASK].abs().sum() > 0 == slopes["lm_head.weight"][MASK].abs().sum()


def test_k1_with_equal_weights_teaches_the_students_own_argmax(pair):
    student, _ = pair
    batch = make_batch(random_rows(6), 1, 0, 1, MASK, END, CPU)
    with torch.no_grad():
        _, _, rollout, targets, _ = region_loss(student, copy.deepcopy(student), batch, MASK, {2}, END)
    assert rollout.tolist() == targets.tolist()


def test_targets_behind_a_stop_token(pair):
    """At the stop token itself the teacher still decides; behind it nothing but the end is right."""
    assert behind_stop(torch.tensor([[5, 1, 7, 8], [5, 6, 7, 1], [3, 1, 5, 5], [5, 6, 7, 8]]), {1, 3}).tolist() == [
        [False, False, True, True], [False] * 4, [False, True, True, True], [False] * 4]
    student, teacher = pair
    batch = make_batch(random_rows(3), 4, 0, 2, MASK, END, CPU)
    with torch.no_grad():
        _, _, rollout, never, _ = region_loss(student, teacher, batch, MASK, {MASK + 99}, END)      # nothing stops
        stop = rollout[0, 1].item()
        _, _, same, targets, _ = region_loss(student, teacher, batch, MASK, {stop}, END)
    assert torch.equal(rollout, same)
    behind = torch.tensor([[stop in row[:j] for j in range(4)] for row in rollout.tolist()])
    assert behind[0].tolist() == [False, False, True, True] and not behind.all(dim=1).any()
    assert (targets[behind] == END).all() and torch.equal(targets[~behind], never[~behind]) and (never[behind] != END).any()


# --- what a step trains on

def test_draws():
    """k covers 2..k_max evenly, the offset 0..stride-1, each whatever the other; rows come once an epoch."""
    args = argparse.Namespace(seed=0, k=4, stride=3, curriculum=0, fixed_k=False)
    draws = [draw_k_and_offset(step, args) for step in range(900)]
    counts = {pair: draws.count(pair) for pair in set(draws)}
    assert set(counts) == {(k, offset) for k in (2, 3, 4) for offset in (0, 1, 2)}
    assert min(counts.values()) > 65 and max(counts.values()) < 140         # 100 expected
    args.curriculum = 300
    drawn = [{draw_k_and_offset(step, args)[0] for step in range(at, at + 60)} for at in (0, 90, 300)]
    assert drawn == [{2}, {2, 3}, {2, 3, 4}]
    args.fixed_k = True                                             # always the widest, whatever else is drawn
    assert [{draw_k_and_offset(step, args)[0] for step in range(at, at + 60)} for at in (0, 90, 300)] == [{2}, {3}, {4}]
    args.curriculum = 0
    assert [draw_k_and_offset(step, args) for step in range(900)] == [(4, offset) for _, offset in draws]
    for args.fixed_k in (False, True):
        args.k = 1
        assert {draw_k_and_offset(step, args) for step in range(60)} == {(1, 0), (1, 1), (1, 2)}
    for epoch in range(2):
        seen = [row for step in range(epoch * 5, epoch * 5 + 5) for row in draw_rows(range(10), 2, step, seed=1)]
        assert sorted(seen) == list(range(10))
    assert draw_rows(range(10), 2, 0, seed=1) != draw_rows(range(10), 2, 0, seed=2)


def test_learning_rate():
    args = argparse.Namespace(lr=1.0, warmup=4, cooldown=5, steps=20)
    rates = [training.learning_rate(step, args) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    args.cooldown = 1000                                            # of a preset, say, with a short run: at most half
    assert training.learning_rate(9, args) == 1.0 and training.learning_rate(19, args) == pytest.approx(0.1)


# --- whole runs

SHORT = ("--data", "wordproblems", "--k", 3, "--batch-size", 4, "--seq-len", 160, "--warmup", 2, "--cooldown", 0,
         "--lr", 2e-4, "--eval-every", 0, "--dtype", "fp32")


def test_overfits_four_rows(tiny, tmp_path):
    """The sanity check that everything above is wired together: four rows are learned at every slot."""
    path = tmp_path / "four.jsonl"
    path.write_text("".join(json.dumps({"question": f"{a} + {b}", "answer": f"{a} and {b} is {a + b}.\n#### {a + b}"}) + "\n"
                            for a, b in ((3, 4), (15, 8), (42, 9), (7, 70), (1, 2))))
    run_train("--model", tiny, "--data", path, "--k", 4, "--overfit", 4, "--batch-size", 4, "--lr", 3e-3,
              "--stride", 1, "--steps", 200, "--cooldown", 80, "--eval-every", 200, "--eval-prompts", 1,
              "--eval-tokens", 16, "--prompt-format", "plain", "--out", tmp_path / "out")
    last = {row["k"]: min(row["agreement"]) for row in log_rows(tmp_path / "out", "train")}     # of each k's last step
    assert set(last) == {2, 3, 4} and min(last.values()) > 0.9, last
    # Decoding shows it for the first chunk, the only one whose prefix was trained on (then the text is the model's own)
    first, final = log_rows(tmp_path / "out", "eval")
    assert first["sample"].startswith("[1|") and final["sample"].startswith("[4|")


def test_prose_is_not_right_for_lack_of_a_number(tiny, tmp_path):
    """Neither the answer nor the model's text holds a number: that they agree in that says nothing."""
    path = tmp_path / "prose.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": "and and and"}) + "\n" for q in ("How?", "Why?", "Who?")))
    run_train("--model", tiny, "--data", path, "--k", 2, "--overfit", 2, "--batch-size", 2, "--lr", 3e-3, "--steps", 30,
              "--cooldown", 0, "--eval-every", 30, "--eval-prompts", 1, "--eval-tokens", 4, "--prompt-format", "plain",
              "--targets", "ground-truth", "--prefix-loss", 1, "--out", tmp_path / "out")
    last = log_rows(tmp_path / "out", "eval")[-1]
    assert "and" in last["sample"] and not any(c.isdigit() for c in last["sample"].replace("[2|", "").replace("[1|", ""))
    assert last["accuracy_k1"] == last["accuracy"] == 0


@pytest.mark.parametrize("flags", [
    ["--targets", "soft", "--bidirectional", "--micro-batch-size", 3], ["--targets", "hard", "--prefix-loss", 0.5],
    ["--targets", "ground-truth", "--prefix-loss", 2, "--micro-batch-size", 1], ["--fixed-k", "--slot1-weight", 3]])
def test_a_steps_loss_from_its_definition(tiny, tmp_path, monkeypatch, flags):
    """The first step's loss as logged: the mean over slots, plus a weight times the mean over the answers' tokens."""
    batches = []
    monkeypatch.setattr(training, "make_batch", lambda *args: batches.append(make_batch(*args)) or batches[-1])
    run_train("--model", tiny, *SHORT, "--steps", 1, "--stride", 9, *flags,
              "--out", tmp_path / "out")
    row, = log_rows(tmp_path / "out", "train")
    start, = log_rows(tmp_path / "out", "start")
    args, tokenizer = argparse.Namespace(**start), Tokenizer(tiny)
    student, teacher = (Transformer.from_pretrained(tiny) for _ in range(2))
    add_mask_token(student, MASK, args.seed)
    k, offset = draw_k_and_offset(0, args)
    rows = encode_rows(draw_rows(load_data("wordproblems", 1, 0)[0], 4, 0, 0), tokenizer, "chat", args.seq_len)
    assert len(rows) == 4 and row["k"] == k == (3 if args.fixed_k else k)
    with torch.no_grad():
        _, targets, _, expected, prefix = region_by_region(
            student, teacher, rows, k, offset, args.stride, tokenizer.stop_ids, tokenizer.end_id, kind=args.targets,
            bidirectional=args.bidirectional, slot1=args.slot1_weight)
    answers = sum(len(text) - prompt for prompt, text in rows)
    assert row["slots"] == k * len(targets)
    mean = expected.item() / row["slots"] + args.prefix_loss * prefix.item() / answers
    assert row["loss"] == pytest.approx(mean, rel=1e-5)
    assert any(len(batch.next_token) for batch in batches) == (args.prefix_loss > 0)    # no work that was not asked for
    saved = read_json(tmp_path / "out" / "latest" / "config.json")["nanomtp"]
    assert saved["bidirectional"] is args.bidirectional and saved["k_max"] == 3


def test_accumulated_gradient_equals_the_whole_batch(tiny, tmp_path):
    """The loss is the mean over all slots of a step, whatever passes they are computed in."""
    for micro in (1, 4):
        run_train("--model", tiny, *SHORT, "--steps", 2, "--micro-batch-size", micro,
                  "--out", tmp_path / str(micro))
    one, four = (log_rows(tmp_path / name, "train") for name in ("1", "4"))
    assert [row["slots"] for row in one] == [row["slots"] for row in four]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in four], rel=1e-4)
    assert [row["gradient_norm"] for row in one] == pytest.approx([row["gradient_norm"] for row in four], rel=1e-3)


def test_non_finite_loss_names_step_and_checkpoint(tiny, tmp_path, monkeypatch):
    """Nothing is saved of a run that has gone wrong, and what was saved before stays."""
    real, calls = training.region_loss, []

    def poisoned(*args):
        loss, *rest = real(*args)
        calls.append(loss)
        return (loss * float("nan") if len(calls) > 5 else loss), *rest         # the timing pass, four steps, then NaN

    monkeypatch.setattr(training, "region_loss", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run_train("--model", tiny, *SHORT, "--steps", 9, "--save-every", 2, "--out", tmp_path / "out")
    assert "step 5" in stopped.value.code and "step-4" in stopped.value.code
    assert (tmp_path / "out" / "latest").resolve().name == "step-4"


def test_more_refusals(tiny, tmp_path):
    """Settings that would train in silence on what the model does not have, or grow its weights."""
    for flags, words in ((["--seq-len", 5000], "context"), (["--weight-decay", -1], "weight-decay"),
                         (["--lr", "inf"], "--lr"), (["--device", "meta"], "no device")):
        with pytest.raises(InputError, match=words):
            run_train("--model", tiny, *SHORT, *flags, "--out", tmp_path / "out")


def test_compile(tiny, tmp_path, monkeypatch):
    """The same run, and names in the checkpoint that know nothing of it. The passes are traced as always, but then run as
    they are: generating code would take a minute here."""
    compiled, compile = [], Transformer.compile

    def without_code(model, **settings):
        compiled.append(settings)
        compile(model, backend="eager", **settings)

    monkeypatch.setattr(Transformer, "compile", without_code)
    for name in ("compile", "no-compile"):
        run_train("--model", tiny, *SHORT, "--steps", 2, f"--{name}", "--out", tmp_path / name)
    torch.compiler.reset()
    assert compiled == [{"dynamic": True}] * 2                      # student and teacher
    ours, plain = (log_rows(tmp_path / name, "train") for name in ("compile", "no-compile"))
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in plain], rel=1e-4)
    weights = load_file(tmp_path / "compile" / "latest" / "model.safetensors")
    state = torch.load(tmp_path / "compile" / "latest" / "trainer.pt", weights_only=True)
    assert weights.keys() == load_file(tmp_path / "no-compile" / "latest" / "model.safetensors").keys()
    assert weights.keys() == state["optimizer"]["state"].keys() and not any("_orig_mod" in name for name in weights)
    run_train("--model", tiny, *SHORT, "--steps", 3, "--resume", "--out", tmp_path / "compile")
