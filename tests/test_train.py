"""
train.py: what a step draws; its loss, gradient and log against their definition, one region at a
time; and whole runs on a tiny model: overfitting, presets, clipping, stopping. mtp.py's own tests
are in test_mtp.py, resuming is in test_resume.py, several processes are in test_parallel.py.
"""
import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB, log_rows, run_train
from safetensors.torch import load_file
from test_mtp import assert_same_gradients, gradient, region_by_region

import train as training
from common.cli import InputError
from common.data import draw_rows, encode_rows, load_data
from common.files import read_json
from common.tokenizer import Tokenizer
from model import Transformer, add_mask_token
from mtp import make_batch
from sample import generate
from train import draw_k_and_offset, learning_rate

MASK = TINY_VOCAB


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A JSONL file of 14 short rows, whose answers differ in length."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    answers = [f"{a} and 3 is {a + 3}{a % 4 * ' and on'}.\n#### {a + 3}" for a in range(14)]
    path.write_text("".join(json.dumps({"question": f"{a} + 3", "answer": answer}) + "\n"
                            for a, answer in enumerate(answers)))
    return path


@pytest.fixture(scope="module")
def common(tiny, sums):
    """Flags of a run whose steps take milliseconds. Some of its answers are cut, others are not."""
    return ("--model", tiny, "--data", sums, "--k", 3, "--batch-size", 4, "--seq-len", 32,
            "--warmup", 2, "--cooldown", 0, "--lr", 2e-4, "--eval-every", 0, "--eval-prompts", 2,
            "--prompt-format", "plain", "--dtype", "fp32", "--device", "cpu")


# --------------------------------------------------------------------------------------------------
# What a step draws

def test_draws():
    """k covers 2..k_max evenly, the offset 0..stride-1, each whatever the other."""
    args = argparse.Namespace(seed=0, k=4, stride=3, curriculum=0, fixed_k=False)
    draws = [draw_k_and_offset(step, args) for step in range(900)]
    counts = {pair: draws.count(pair) for pair in set(draws)}
    assert set(counts) == {(k, offset) for k in (2, 3, 4) for offset in (0, 1, 2)}
    assert min(counts.values()) > 65 and max(counts.values()) < 140         # 100 expected

    def drawn_from(first):
        return {draw_k_and_offset(step, args)[0] for step in range(first, first + 60)}

    args.curriculum = 300
    assert [drawn_from(first) for first in (0, 90, 300)] == [{2}, {2, 3}, {2, 3, 4}]
    args.fixed_k = True                                     # the widest, whatever else is drawn
    assert [drawn_from(first) for first in (0, 90, 300)] == [{2}, {3}, {4}]
    args.curriculum = 0
    assert [draw_k_and_offset(step, args) for step in range(900)] == [(4, o) for _, o in draws]
    for args.fixed_k in (False, True):
        args.k = 1
        assert {draw_k_and_offset(step, args) for step in range(60)} == {(1, 0), (1, 1), (1, 2)}


def test_rows_come_once_an_epoch():
    for epoch in range(2):
        seen = [row for step in range(epoch * 5, epoch * 5 + 5)
                for row in draw_rows(range(10), 2, step, seed=1)]
        assert sorted(seen) == list(range(10))
    assert draw_rows(range(10), 2, 0, seed=1) != draw_rows(range(10), 2, 0, seed=2)


def test_learning_rate():
    args = argparse.Namespace(lr=1.0, warmup=4, cooldown=5, steps=20)
    rates = [learning_rate(step, args) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    args.cooldown = 1000                        # of a preset, say, with a short run: at most half
    assert learning_rate(9, args) == 1.0 and learning_rate(19, args) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------
# A step

STEP = dict(seed=0, k=4, fixed_k=False, curriculum=0, stride=3, batch_size=5, seq_len=32,
            prompt_format="plain", targets="hard", slot1_weight=1.0, prefix_loss=0.0,
            bidirectional=False, dtype="fp32")


@pytest.mark.parametrize("settings", [
    dict(prefix_loss=0.5), dict(targets="soft", bidirectional=True, fixed_k=True),
    dict(targets="ground-truth", stride=1), dict(targets="ground-truth", prefix_loss=2.0),
    dict(fixed_k=True, slot1_weight=3.0)])
def test_a_step_from_its_definition(tiny, sums, monkeypatch, settings):
    """In any number of passes: the mean over the step's slots, and a weight times the mean over the
    answers' tokens. What a cut text does not know is in no mean, in those of the log neither.
    """
    args = SimpleNamespace(**STEP | settings)
    train, tokenizer = load_data(str(sums), 2, 0)[0], Tokenizer(tiny)
    tokenizer.add_mask_token()
    student, teacher = Transformer.from_pretrained(tiny), Transformer.from_pretrained(tiny)
    add_mask_token(student, MASK)
    with torch.no_grad():                                   # else slot 1 agrees from the first
        teacher.model.norm.weight[::2] *= -1
    k, offset = draw_k_and_offset(0, args)
    rows = encode_rows(draw_rows(train, 5, 0, 0), tokenizer, "plain", args.seq_len)
    cut = sum(text[-1] != tokenizer.end_id for _, text in rows)
    assert len(rows) == 5 and 0 < cut < 5
    rollout, targets, confidence, region_sum, prefix_sum = region_by_region(
        student, teacher, rows, k, offset, args.stride, tokenizer, kind=args.targets,
        bidirectional=args.bidirectional, slot1=args.slot1_weight)
    known = targets != -100                                                         # (N, k)
    assert known.all() == (args.targets != "ground-truth")
    answers = sum(len(text) - prompt for prompt, text in rows)
    loss = region_sum / known.sum() + args.prefix_loss * prefix_sum / answers
    slopes = gradient(student, loss)
    agreement = [(rollout == targets)[known[:, j], j].float().mean().item() for j in range(k)]
    confidence = [confidence[known[:, j], j].mean().item() for j in range(k)]

    batches = []

    def spy(*args, **more):
        batches.append(make_batch(*args, **more))
        return batches[-1]

    monkeypatch.setattr(training, "make_batch", spy)
    for args.micro_batch_size in (1, 2, 5):
        batches.clear()
        student.zero_grad(set_to_none=True)
        if args.targets == "ground-truth":
            teacher = None
        drawn, ours, slots, fed, agreed, sure = training.gradients(
            0, student, teacher, train, tokenizer, args)
        assert (drawn, slots) == (k, known.sum())
        assert ours == pytest.approx(loss.item(), rel=1e-5)
        assert agreed == pytest.approx(agreement)
        assert sure == pytest.approx(confidence, rel=1e-4)
        assert fed == sum(batch.ids.numel() for batch in batches)
        assert len(batches) == -(-5 // args.micro_batch_size)
        # no work that was not asked for
        assert any(len(batch.next_token) for batch in batches) == (args.prefix_loss > 0)
        assert_same_gradients({name: p.grad for name, p in student.named_parameters()}, slopes)


def test_a_step_is_computed_once_and_logged(common, sums, tmp_path, monkeypatch):
    """log.jsonl has what the step returned; config.json, what decoding needs to know.

    And each step draws its rows, once, from the first five.
    """
    steps, drawn_from, real = [], [], training.training_step

    def step_spy(step, *rest):
        steps.append((step, real(step, *rest)))
        return steps[-1][1]

    def rows_spy(train, *rest):
        drawn_from.append(train)
        return draw_rows(train, *rest)

    monkeypatch.setattr(training, "training_step", step_spy)
    monkeypatch.setattr(training, "draw_rows", rows_spy)
    out = tmp_path / "out"
    run_train(*common, "--steps", 4, "--limit", 5, "--bidirectional", "--log-every", 2,
              "--out", out)
    assert [number for number, _ in steps] == [0, 1, 2, 3]
    assert drawn_from == [load_data(str(sums), 2, 0)[0][:5]] * 4
    for row, (number, step) in zip(log_rows(out, "train"), steps[1::2], strict=True):
        assert row.pop("event") == "train" and row.pop("minutes") >= 0
        assert row == {"step": number + 1} | step._asdict() and step.lr == 2e-4
    assert read_json(out / "latest" / "config.json")["nanomtp"] == {
        "mask_token_id": MASK, "k_max": 3, "bidirectional": True, "prompt_format": "plain",
        "data": str(sums), "steps": 4}


# --------------------------------------------------------------------------------------------------
# Whole runs

def test_overfits_four_rows(tiny, tmp_path):
    """The sanity check that everything is wired together: four rows are learned at every slot."""
    path, pairs = tmp_path / "six.jsonl", ((3, 4), (15, 8), (42, 9), (7, 70), (1, 2), (2, 7))
    path.write_text("".join(
        json.dumps({"question": f"{a} + {b}", "answer": f"{a} and {b} is {a + b}.\n#### {a + b}"})
        + "\n" for a, b in pairs))
    out = tmp_path / "out"
    run_train("--model", tiny, "--data", path, "--k", 4, "--limit", 4, "--batch-size", 4,
              "--lr", 3e-3, "--stride", 1, "--steps", 150, "--cooldown", 60, "--eval-every", 0,
              "--eval-prompts", 1, "--prompt-format", "plain", "--out", out)
    last = {row["k"]: min(row["agreement"]) for row in log_rows(out, "train")}
    assert set(last) == {2, 3, 4} and min(last.values()) > 0.9, last        # of each k's last step
    # Decoding shows it in the first chunk, the only one whose prefix was trained on: behind that
    # the text is the model's own
    model, tokenizer = Transformer.from_pretrained(out / "latest"), Tokenizer(out / "latest")
    for row in load_data(str(path), 1, 0)[0][:4]:
        prompt = tokenizer.prompt(row["question"], "plain")
        answer, = generate(model, tokenizer, [prompt], 4, 0.5, 4)
        assert answer.chunks == [4]


def test_prose_is_not_right_for_lack_of_a_number(tiny, tmp_path):
    """Neither the answer nor the model's text holds one: that they agree in that says nothing."""
    path = tmp_path / "prose.jsonl"
    path.write_text("".join(json.dumps({"question": question, "answer": "and and and"}) + "\n"
                            for question in ("How?", "Why?", "Who?")))
    run_train("--model", tiny, "--data", path, "--k", 2, "--batch-size", 2, "--lr", 3e-3,
              "--steps", 30, "--cooldown", 0, "--eval-every", 30, "--eval-prompts", 1,
              "--max-new-tokens", 4, "--prompt-format", "plain", "--targets", "ground-truth",
              "--prefix-loss", 1, "--out", tmp_path / "out")
    last = log_rows(tmp_path / "out", "eval")[-1]
    written = last["sample"].replace("[2|", "").replace("[1|", "")
    assert "and" in written and not any(c.isdigit() for c in written)
    assert last["accuracy_k1"] == last["accuracy"] == 0


def settings_of(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    return training.get_args()


def test_presets(monkeypatch):
    """Flags win over the preset, this over the defaults; `paper` has the paper's optimiser."""
    paper = settings_of(monkeypatch, "--preset", "paper", "--steps", "7")
    assert (paper.lr, paper.beta2, paper.weight_decay, paper.clip) == (1e-5, 0.999, 0.01, 0)
    assert (paper.k, paper.batch_size, paper.warmup, paper.cooldown) == (16, 128, 2000, 0)
    assert paper.steps == 7 and paper.targets == "hard" and not paper.fixed_k
    tiny = settings_of(monkeypatch)
    assert (tiny.beta2, tiny.weight_decay, tiny.clip, tiny.preset) == (0.95, 0.1, 1.0, "tiny")


def test_optimiser_and_clipping(common, tmp_path):
    """AdamW as the flags have it. Behind one step its first moment is a tenth of the gradient."""
    norms = {}
    for clip in (0, 0.01):
        out = tmp_path / str(clip)
        run_train("--preset", "paper", *common, "--steps", 1, "--micro-batch-size", 4,
                  "--clip", clip, "--log-every", 1, "--out", out)
        logged, = log_rows(out, "train")
        optimizer = torch.load(out / "latest" / "trainer.pt", weights_only=True)["optimizer"]
        moments = [entry["exp_avg"] for entry in optimizer["state"].values()]
        norms[clip] = 10 * torch.cat([moment.flatten() for moment in moments]).norm().item()
        decays = [group["weight_decay"] for group in optimizer["param_groups"]]
        assert decays == [0.01, 0.0]                                    # matrices, norms
        assert {group["betas"] for group in optimizer["param_groups"]} == {(0.9, 0.999)}
        assert logged["gradient_norm"] > 1                              # before it is clipped
    assert norms[0] == pytest.approx(logged["gradient_norm"], rel=1e-4)
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_non_finite_loss_names_step_and_checkpoint(common, tmp_path, monkeypatch):
    """Nothing is saved of a run that has gone wrong, and what was saved before stays."""
    real, calls = training.region_loss, []

    def poisoned(*args, **more):
        loss, seen = real(*args, **more)
        calls.append(loss)
        return loss * float("nan") if len(calls) == 5 else loss, seen

    monkeypatch.setattr(training, "region_loss", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run_train(*common, "--steps", 9, "--save-every", 2, "--out", tmp_path / "out")
    assert "step 5" in stopped.value.code and "step-4" in stopped.value.code
    assert (tmp_path / "out" / "latest").resolve().name == "step-4"


def test_refusals(common, tmp_path):
    """Settings that would train in silence on what the model does not have, or grow its weights."""
    for flags, words in (
            (["--seq-len", 5000], "context"), (["--weight-decay", -1], "weight-decay"),
            (["--lr", "inf"], "--lr"), (["--clip", -1], "--clip"), (["--beta2", 1], "--beta2"),
            (["--limit", 0], "--limit"), (["--device", "meta"], "no device")):
        with pytest.raises(InputError, match=words):
            run_train(*common, *flags, "--out", tmp_path / "out")


def test_compile(common, tmp_path, monkeypatch):
    """The same run, and names in the checkpoint that know nothing of it.

    The passes are traced as always, but then run as they are: generating code takes a minute.
    """
    compiled, compile = [], Transformer.compile

    def without_code(model, **settings):
        compiled.append(settings)
        compile(model, backend="eager", **settings)

    monkeypatch.setattr(Transformer, "compile", without_code)
    for name in ("compile", "no-compile"):
        run_train(*common, "--steps", 2, f"--{name}", "--out", tmp_path / name)
    torch.compiler.reset()
    assert compiled == [{"dynamic": True}] * 2                              # student and teacher
    ours, plain = (log_rows(tmp_path / name, "train") for name in ("compile", "no-compile"))
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in plain], rel=1e-4)
    ours, plain = (load_file(tmp_path / name / "latest" / "model.safetensors")
                   for name in ("compile", "no-compile"))
    state = torch.load(tmp_path / "compile" / "latest" / "trainer.pt", weights_only=True)
    assert ours.keys() == plain.keys() == state["optimizer"]["state"].keys()
    assert not any("_orig_mod" in name for name in ours)
    run_train(*common, "--steps", 3, "--resume", "--out", tmp_path / "compile")
