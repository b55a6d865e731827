"""
train.py against slow references: the mask against a double loop, the appended layout against the paper's interleaved
one, the teacher's targets against one region at a time; then whole runs on a tiny model: overfitting, resuming, stopping.
"""
import argparse
import copy
import json
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VOCAB, tiny_checkpoint

import regions
import train as training
from model import Transformer, add_mask_token
from pretrained import InputError
from regions import attention_mask, choose_anchors, make_layout
from train import hard_targets, make_batch, region_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(student with a mask token, teacher without): the same random weights, so nothing is yet learned."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("pair") / "checkpoint", "qwen3", tied=False)
    teacher = Transformer.from_pretrained(folder).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    add_mask_token(student, TINY_VOCAB)
    return student, teacher


def random_rows(seed, shapes=((4, 17), (6, 11), (1, 9))):
    """Encoded rows: (prompt length, random ids of a text of that length)."""
    rng = random.Random(seed)
    return [(prompt, [rng.randrange(3, TINY_VOCAB) for _ in range(length)]) for prompt, length in shapes]


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


@pytest.mark.parametrize("k, offset, stride", [(2, 0, 1), (3, 1, 2), (4, 2, 3), (5, 0, 7), (1, 0, 2)])
def test_mask_against_a_double_loop(k, offset, stride):
    """The rule of the method, spelled out for one query and one key at a time."""
    anchors = choose_anchors([4, 6, 1], [17, 11, 9], offset, stride)
    position, region, bound, _ = make_layout([17, 11, 9], anchors, k)
    mask = attention_mask(position, region, bound)
    for b in range(3):
        for q in range(mask.shape[1]):
            for key in range(mask.shape[2]):
                if region[b, key] == regions.TEXT:
                    limit = position[b, q] if region[b, q] == regions.TEXT else bound[b, q]
                    expected = bool(position[b, key] <= limit)
                elif region[b, key] == regions.PADDING:
                    expected = False
                else:
                    expected = bool(region[b, q] == region[b, key] and position[b, key] <= position[b, q])
                assert mask[b, q, key] == expected, (b, q, key)
    assert mask.any(dim=-1).all()                                   # a query without any key would be NaN


def interleaved(text, anchors, k, mask_id):
    """The paper's layout of the same problems: each region stands right behind its anchor, inside the text.

    Built one token at a time, and its mask one pair at a time, to share nothing with train.py.
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
    ids, position, mask, slots, _ = make_batch([(prompt, text)], k, offset, stride, TINY_VOCAB, 0, CPU)
    with torch.no_grad():
        ours = student(ids, position, mask, at=slots)               # (N, k, V)
    anchors = slots[1][:, 0].tolist()
    tokens, mask = interleaved(text, anchors, k, TINY_VOCAB)
    with torch.no_grad():
        fed, positions = (torch.tensor([[token[i] for token in tokens]]) for i in (0, 1))
        theirs = student(fed, positions, mask)[0]
    where = [(region, position) for _, position, region, _ in tokens]
    for n, anchor in enumerate(anchors):
        places = [where.index((None, anchor))] + [where.index((anchor, anchor + j)) for j in range(1, k)]
        torch.testing.assert_close(ours[n], theirs[places], rtol=0, atol=1e-5)


def test_text_logits_are_the_plain_models(pair):
    """Text never sees a mask, and a row's padding and neighbours never matter."""
    student, _ = pair
    rows = random_rows(2)
    ids, position, mask, _, _ = make_batch(rows, 4, 1, 2, TINY_VOCAB, 0, CPU)
    with torch.no_grad():
        logits = student(ids, position, mask)
        for b, (_, text) in enumerate(rows):
            n = len(text)
            plain = student(torch.tensor([text]), torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())
            torch.testing.assert_close(logits[b, :n], plain[0], rtol=0, atol=1e-5)


# --- objective

def one_region_at_a_time(student, teacher, text, k, stop_ids, end_id):
    """Rollout, targets and losses behind the prefix `text`, with plain causal passes and python loops."""
    def run(model, ids):
        n = len(ids)
        logits = model(torch.tensor([ids]), torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril())[0, -k:]
        return logits[:, :TINY_VOCAB]                               # the mask token is not a candidate

    with torch.no_grad():
        logits = run(student, text + [TINY_VOCAB] * (k - 1))
        rollout = logits.argmax(dim=-1).tolist()
        targets = run(teacher, text + rollout[:-1]).argmax(dim=-1).tolist()
    for j in range(k):
        if any(token in stop_ids for token in rollout[:j]):
            targets[j] = end_id
    return rollout, targets, F.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_loss_and_targets_against_one_region_at_a_time(pair, k):
    student, teacher = pair
    stop_ids, end_id = set(range(3, TINY_VOCAB, 3)), 2              # a third of all tokens stop: many rollouts hold one
    rows = random_rows(3)
    ids, position, mask, slots, truth = make_batch(rows, k, 0, 2, TINY_VOCAB, end_id, CPU)
    loss, rollout, targets, confidence = region_loss(
        student, teacher, ids, position, mask, slots, truth, TINY_VOCAB, stop_ids, end_id)
    total, stopped = 0.0, 0
    for n, (row, place) in enumerate(zip(slots[0][:, 0].tolist(), slots[1][:, 0].tolist())):
        y, t, losses = one_region_at_a_time(student, teacher, rows[row][1][:place + 1], k, stop_ids, end_id)
        assert rollout[n].tolist() == y and targets[n].tolist() == t
        total, stopped = total + sum(losses), stopped + (t.count(end_id) if k > 1 else 1)
    assert stopped and abs(loss.item() - total) < 1e-3 * total
    assert ((confidence > 0) & (confidence <= 1)).all()


def test_gradients_and_candidates(pair):
    """The gradient reaches the student alone, also through the mask's own row; the mask token is never chosen."""
    student, teacher = pair
    with torch.no_grad():                                           # make the mask token the favourite everywhere
        student.lm_head.weight[TINY_VOCAB] = student.lm_head.weight[:TINY_VOCAB].sum(0) * 5
    batch = make_batch(random_rows(4), 3, 0, 2, TINY_VOCAB, 2, CPU)
    loss, rollout, targets, _ = region_loss(student, teacher, *batch, TINY_VOCAB, {2}, 2)
    assert loss.isfinite() and rollout.max() < TINY_VOCAB and targets.max() < TINY_VOCAB
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert student.model.embed_tokens.weight.grad[TINY_VOCAB].abs().sum() > 0
    student.zero_grad(set_to_none=True)


def test_free_row_of_a_padded_matrix_is_no_candidate_of_the_teacher(tmp_path):
    """Qwen's case: the teacher's matrix has a row under the mask's id as well."""
    folder = tiny_checkpoint(tmp_path, vocab_size=TINY_VOCAB + 8)
    teacher = Transformer.from_pretrained(folder).requires_grad_(False)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[TINY_VOCAB] = 10.0 * teacher.model.embed_tokens.weight[:TINY_VOCAB].sum(0)
    student = copy.deepcopy(teacher)
    add_mask_token(student, TINY_VOCAB)
    assert student.config.vocab_size == TINY_VOCAB + 8
    batch = make_batch(random_rows(5), 3, 0, 1, TINY_VOCAB, 2, CPU)
    with torch.no_grad():
        _, rollout, targets, _ = region_loss(student, teacher, *batch, TINY_VOCAB, {2}, 2)
    assert (rollout != TINY_VOCAB).all() and (targets != TINY_VOCAB).all()


def test_k1_with_equal_weights_teaches_the_students_own_argmax(pair):
    student, teacher = pair
    batch = make_batch(random_rows(6), 1, 0, 1, TINY_VOCAB, 2, CPU)
    with torch.no_grad():
        _, rollout, targets, _ = region_loss(student, teacher, *batch, TINY_VOCAB, {2}, 2)
    assert rollout.tolist() == targets.tolist()


def test_targets_behind_a_stop_token():
    """At the stop token itself the teacher still decides; behind it nothing but the end is right."""
    logits = F.one_hot(torch.tensor([[5, 6, 7, 8]]), 10).float()
    assert hard_targets(logits, torch.tensor([[5, 1, 7, 8]]), {1, 3}, end_id=2).tolist() == [[5, 6, 2, 2]]
    assert hard_targets(logits, torch.tensor([[5, 6, 7, 1]]), {1, 3}, end_id=2).tolist() == [[5, 6, 7, 8]]


# --- what a step trains on

def test_draws():
    """k covers 2..k_max evenly, the offset 0..stride-1, each whatever the other; rows come once an epoch."""
    args = argparse.Namespace(seed=0, k=4, stride=3, curriculum=0)
    draws = [training.draw_k_and_offset(step, args) for step in range(900)]
    counts = {pair: draws.count(pair) for pair in set(draws)}
    assert set(counts) == {(k, offset) for k in (2, 3, 4) for offset in (0, 1, 2)}
    assert min(counts.values()) > 65 and max(counts.values()) < 140         # 100 expected
    args.curriculum = 300
    widest = [max(training.draw_k_and_offset(step, args)[0] for step in range(at, at + 60)) for at in (0, 90, 300)]
    assert widest == [2, 3, 4]
    for epoch in range(2):
        seen = [row for step in range(epoch * 5, epoch * 5 + 5) for row in training.draw_rows(range(10), 2, step, seed=1)]
        assert sorted(seen) == list(range(10))
    assert training.draw_rows(range(10), 2, 0, seed=1) != training.draw_rows(range(10), 2, 0, seed=2)


def test_learning_rate():
    args = argparse.Namespace(lr=1.0, warmup=4, cooldown=5, steps=20)
    rates = [training.learning_rate(step, args) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    args.cooldown = 1000                                            # of a preset, say, with a short run: at most half
    assert training.learning_rate(9, args) == 1.0 and training.learning_rate(19, args) == pytest.approx(0.1)


# --- whole runs

def run_train(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    training.main()


def log_rows(out, event):
    return [row for row in map(json.loads, open(out / "log.jsonl")) if row["event"] == event]


SHORT = ("--data", "wordproblems", "--k", 3, "--batch-size", 4, "--seq-len", 160, "--warmup", 2, "--cooldown", 0,
         "--lr", 2e-4, "--eval-every", 0)


def test_overfits_four_rows(tiny, tmp_path, monkeypatch):
    """The sanity check that everything above is wired together: four rows are learned at every slot."""
    path = tmp_path / "four.jsonl"
    path.write_text("".join(json.dumps({"question": f"{a} + {b}", "answer": f"{a} and {b} is {a + b}.\n#### {a + b}"}) + "\n"
                            for a, b in ((3, 4), (15, 8), (42, 9), (7, 70), (1, 2))))
    run_train(monkeypatch, "--model", tiny, "--data", path, "--k", 4, "--overfit", 4, "--batch-size", 4, "--lr", 3e-3,
              "--stride", 1, "--steps", 200, "--cooldown", 80, "--eval-every", 200, "--eval-prompts", 1,
              "--eval-tokens", 16, "--prompt-format", "plain", "--out", tmp_path / "out")
    last = {row["k"]: min(row["agreement"]) for row in log_rows(tmp_path / "out", "train")}     # of each k's last step
    assert set(last) == {2, 3, 4} and min(last.values()) > 0.9, last
    # Decoding shows it for the first chunk, the only one whose prefix was trained on (then the text is the model's own)
    first, final = log_rows(tmp_path / "out", "eval")
    assert first["sample"].startswith("[1|") and final["sample"].startswith("[4|")


def test_resumed_run_is_bit_equal(tiny, tmp_path, monkeypatch):
    """Stopped at step 3 of 6 (by --steps of the first part: nothing but a cool-down depends on it) and continued."""
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 6, "--out", tmp_path / "whole")
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 3, "--out", tmp_path / "parts")
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 6, "--out", tmp_path / "parts", "--resume")
    whole, parts = (Transformer.from_pretrained(tmp_path / name / "latest").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["model.embed_tokens.weight"][:TINY_VOCAB],
                           Transformer.from_pretrained(tiny).state_dict()["model.embed_tokens.weight"])
    assert (tmp_path / "parts" / "latest").resolve().name == "step-6"


def test_accumulated_gradient_equals_the_whole_batch(tiny, tmp_path, monkeypatch):
    """The loss is the mean over all slots of a step, whatever passes they are computed in."""
    for micro in (1, 4):
        run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 2, "--micro-batch-size", micro,
                  "--out", tmp_path / str(micro))
    one, four = (log_rows(tmp_path / name, "train") for name in ("1", "4"))
    assert [row["slots"] for row in one] == [row["slots"] for row in four]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in four], rel=1e-4)
    assert [row["gradient_norm"] for row in one] == pytest.approx([row["gradient_norm"] for row in four], rel=1e-3)


def test_interrupt_saves(tiny, tmp_path, monkeypatch):
    """Ctrl-C lets the step finish, saves it and exits with 130; --resume goes on from there."""
    import signal
    draw, calls = training.draw_rows, []

    def draw_and_interrupt(*args):
        calls.append(args)
        if len(calls) == 3:                                         # 1: the timing pass, 2: step 1, 3: step 2
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(training, "draw_rows", draw_and_interrupt)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 9, "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert stopped.value.code == 130 and (tmp_path / "out" / "latest").resolve().name == "step-2"
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 3, "--out", tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "latest").resolve().name == "step-3"


def test_non_finite_loss_names_step_and_checkpoint(tiny, tmp_path, monkeypatch):
    """Nothing is saved of a run that has gone wrong, and what was saved before stays."""
    real, calls = training.region_loss, []

    def poisoned(*args):
        loss, *rest = real(*args)
        calls.append(loss)
        return (loss * float("nan") if len(calls) > 5 else loss), *rest         # the timing pass, four steps, then NaN

    monkeypatch.setattr(training, "region_loss", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 9, "--save-every", 2, "--out", tmp_path / "out")
    assert "step 5" in stopped.value.code and "step-4" in stopped.value.code
    assert (tmp_path / "out" / "latest").resolve().name == "step-4"


def test_resume_refuses_other_settings(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 1, "--out", out)
    with pytest.raises(InputError, match="--stride 3, not 2"):
        run_train(monkeypatch, "--model", tiny, *SHORT, "--stride", 2, "--steps", 2, "--out", out, "--resume")
    with pytest.raises(InputError, match="already holds step-1"):
        run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 2, "--out", out)
    assert (out / "latest").resolve().name == "step-1"


def test_more_refusals(tiny, tmp_path, monkeypatch):
    """Settings that would train in silence on what the model does not have, or grow its weights."""
    for flags, words in ((["--seq-len", 5000], "context"), (["--weight-decay", -1], "weight-decay"),
                         (["--lr", "inf"], "--lr"), (["--device", "meta"], "no device")):
        with pytest.raises(InputError, match=words):
            run_train(monkeypatch, "--model", tiny, *SHORT, *flags, "--out", tmp_path / "out")


def test_a_step_saved_again_replaces_the_old_one(tiny, tmp_path, monkeypatch):
    """Killed between the folder and `latest`: refused without --resume; with it, the run's own weights are what stays."""
    out = tmp_path / "out"
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 1, "--seed", 1, "--out", out)
    before = Transformer.from_pretrained(out / "step-1").state_dict()["model.norm.weight"]
    (out / "latest").unlink()
    (out / "step-old").mkdir()                                      # somebody's own folder: not ours to count or delete
    with pytest.raises(InputError, match="already holds"):
        run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 1, "--out", out)
    run_train(monkeypatch, "--model", tiny, *SHORT, "--steps", 1, "--out", out, "--resume")
    after = Transformer.from_pretrained(out / "latest").state_dict()["model.norm.weight"]
    assert not torch.equal(before, after) and (out / "step-old").is_dir()
