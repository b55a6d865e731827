"""
train.py: what a step draws; its loss, gradient and log against their definition, one region, or one
head at one token, at a time; and whole runs on a tiny model: overfitting, presets, clipping,
stopping, and what training with heads leaves behind. mtp.py's and heads.py's own tests are in
test_mtp.py and test_heads.py, resuming is in test_resume.py, several processes are in
test_parallel.py.
"""
import argparse
import json
import re
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB, log_rows, run_train, tiny_checkpoint, train_briefly
from safetensors.torch import load_file, save_file
from test_mtp import assert_same_gradients, gradient, region_by_region

import train as training
from common.cli import InputError
from common.data import draw_rows, encode_rows, load_data
from common.files import read_json, write_json
from common.report import acceptance_by_position
from common.tokenizer import Tokenizer
from heads import Backbone, Drafter, Heads, load_heads
from model import Transformer, add_mask_token, save_pretrained
from mtp import make_batch
from sample import generate, load
from speculate import speculate
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


def fond_of_eight_words(folder, questions=40):
    """A random model in `folder` that writes mostly eight words, and a JSONL file of what it writes
    itself: text that heads learn within a second to draft some of. Returns their paths.
    """
    tokenizer = Tokenizer(tiny_checkpoint(folder, seed=3))
    model = Transformer.from_pretrained(folder).eval()
    with torch.no_grad():
        for word in (" the", " and", " is", " what", " of", " to", " =", " +"):
            model.model.embed_tokens.weight[tokenizer.encode(word)] *= 3        # tied: both ways
    save_pretrained(model, folder)
    asked = [f"{a} + 3" for a in range(questions)]
    prompts = [tokenizer.prompt(question, "plain") for question in asked]
    answers = generate(model, tokenizer, prompts, max_new_tokens=24)
    rows = [{"question": question, "answer": tokenizer.decode(answer.tokens)}
            for question, answer in zip(asked, answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, folder / "rows.jsonl"


# Flags of a run on those rows that ends with drafts of which some stand; --heads is to be added
WITH_HEADS = ("--steps", 40, "--batch-size", 8, "--seq-len", 48, "--warmup", 2, "--cooldown", 10,
              "--lr", 4e-3, "--eval-prompts", 4, "--max-new-tokens", 24,
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
            bidirectional=False, dtype="fp32", heads=None)


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


def head_by_head(heads, model, rows, mask_id, kind, kl_weight, kl_top):
    """The loss of every slot of heads, one after the other, each text read by itself, in nats.

    Returns their sum, and by depth the drafts, their targets and probabilities: 3 lists of K lists.
    """
    loss, drafts, targets, confidence = 0.0, *([[] for _ in range(heads.depth)] for _ in range(3))
    candidates = [i for i in range(model.config.vocab_size) if i != mask_id]
    drafted = candidates if heads.draft_ids is None else heads.draft_ids.tolist()
    matrix = model.output_matrix.detach()
    for prompt, text in rows:
        n, ids = len(text), torch.tensor([text])
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        with torch.no_grad():
            states = model(ids, torch.arange(n)[None], causal, head=False)
        by_depth = heads(model.model.embed_tokens(ids), states)
        for d, own in enumerate(by_depth, 1):
            for j in range(prompt - 1 + d, n - 1):
                log_p = (own[0, j - d] @ matrix[drafted].T).log_softmax(dim=-1)
                writes = candidates[(states[0, j] @ matrix[candidates].T).argmax()]
                target = text[j + 1] if kind == "ground-truth" else writes
                if target in drafted:
                    loss = loss - log_p[drafted.index(target)]
                likely = (states[0, j] @ matrix[drafted].T).topk(min(kl_top, len(drafted)))
                q, p = likely.values.softmax(dim=-1), log_p[likely.indices].softmax(dim=-1)
                loss = loss + kl_weight * (q * (q.log() - p.log())).sum()
                drafts[d - 1].append(drafted[log_p.argmax()])
                targets[d - 1].append(target)
                confidence[d - 1].append(log_p.max().exp().item())
    return loss, drafts, targets, confidence


@pytest.mark.parametrize("settings", [
    {}, dict(loop=True, kl_weight=0.0), dict(targets="ground-truth", kl_weight=0.3, kl_top=7),
    dict(draft_vocab=60, kl_top=20)])
def test_a_step_of_heads_from_its_definition(tiny, sums, settings):
    """In any number of passes: the mean over what all heads say at all tokens of the answers."""
    args = SimpleNamespace(**STEP | dict(heads=3, kl_weight=1.0, kl_top=256, loop=False,
                                         draft_vocab=0) | settings)
    train, tokenizer = load_data(str(sums), 2, 0)[0], Tokenizer(tiny)
    tokenizer.add_mask_token()
    model = Transformer.from_pretrained(tiny)
    add_mask_token(model, MASK)             # as of a checkpoint with both: never a candidate
    with torch.no_grad():
        model.model.embed_tokens.weight[MASK] *= 3
    heads = Heads(model.config, 3, args.loop).initialise(0)
    if args.draft_vocab:
        heads.draft_ids = training.most_frequent_ids(train, tokenizer, args)
    rows = encode_rows(draw_rows(train, 5, 0, 0), tokenizer, "plain", args.seq_len)
    total, drafts, targets, confidence = head_by_head(
        heads, model, rows, MASK, args.targets, args.kl_weight, args.kl_top)
    counts = [len(own) for own in targets]
    assert counts[0] > counts[1] > counts[2] > 20           # later heads have fewer tokens to say
    slopes = gradient(heads, total / sum(counts))

    backbone = Backbone(model, keep_gb=1)                   # its states are read once for all three
    for args.micro_batch_size in (1, 2, 5):
        heads.zero_grad(set_to_none=True)
        k, ours, slots, fed, agreed, sure = training.gradients(
            0, heads, backbone, train, tokenizer, args)
        assert (k, slots) == (3, sum(counts))
        assert ours == pytest.approx(total.item() / slots, rel=1e-5)
        assert agreed == pytest.approx(
            [sum(a == b for a, b in zip(*own)) / len(own[0]) for own in zip(drafts, targets)])
        assert sure == pytest.approx([sum(own) / len(own) for own in confidence], rel=1e-4)
        assert_same_gradients({name: p.grad for name, p in heads.named_parameters()}, slopes)
        assert fed >= sum(len(text) for _, text in rows) and (
            args.micro_batch_size > 1 or fed == sum(len(text) for _, text in rows))


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


@pytest.mark.parametrize("method", ["--k 3", "--heads 2"])
def test_compile(common, tmp_path, monkeypatch, method):
    """The same run, and names in the checkpoint that know nothing of it.

    The passes are traced as always, but then run as they are: generating code takes a minute.
    """
    compiled, compile = [], torch.nn.Module.compile

    def without_code(model, **settings):
        compiled.append((type(model), settings))
        compile(model, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    assert "--k" == common[4]
    common = (*common[:4], *common[6:], *method.split())
    for name in ("compile", "no-compile"):
        run_train(*common, "--steps", 2, f"--{name}", "--out", tmp_path / name)
    torch.compiler.reset()
    student = Heads if "--heads" in method else Transformer
    assert compiled == [(student, {"dynamic": True}), (Transformer, {"dynamic": True})]
    ours, plain = (log_rows(tmp_path / name, "train") for name in ("compile", "no-compile"))
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in plain], rel=1e-4)
    ours, plain = (load_file(tmp_path / name / "latest" / "model.safetensors")
                   for name in ("compile", "no-compile"))
    state = torch.load(tmp_path / "compile" / "latest" / "trainer.pt", weights_only=True)
    heads = load_heads(tmp_path / "compile" / "latest")
    trained = heads.state_dict() if heads else ours
    assert ours.keys() == plain.keys() and trained.keys() == state["optimizer"]["state"].keys()
    assert not any("_orig_mod" in name for name in ours)
    run_train(*common, "--steps", 3, "--resume", "--out", tmp_path / "compile")


# --------------------------------------------------------------------------------------------------
# Whole runs with heads

@pytest.fixture(scope="module")
def fond(tmp_path_factory):
    """A start model and its rows, see fond_of_eight_words."""
    return fond_of_eight_words(tmp_path_factory.mktemp("fond") / "start")


@pytest.fixture(scope="module")
def with_heads(fond, tmp_path_factory):
    """The --out of a run with two heads: read it, never write to it."""
    out = tmp_path_factory.mktemp("heads") / "out"
    run_train("--model", fond[0], "--data", fond[1], *WITH_HEADS, "--heads", 2, "--eval-every", 20,
              "--out", out)
    return out


def saved(folder):
    return load_file(folder / "model.safetensors")


def layers(weights, depth, start_layers=2):
    """The tensors of the head at one depth, by the names they have within it."""
    own = f"model.layers.{start_layers + depth - 1}."
    return {name.removeprefix(own): x for name, x in weights.items() if name.startswith(own)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_start_is_untouched(out, start):
    """All its tensors, bit by bit and in their dtype; whatever else there is belongs to heads."""
    ours, theirs = saved(out / "latest"), saved(start)
    assert same({name: ours[name] for name in theirs}, theirs)
    assert {ours[name].dtype for name in theirs} == {x.dtype for x in theirs.values()}
    depths = read_json(out / "latest" / "config.json")["num_mtp_layers"]
    of_heads = {name for d in range(1, depths + 1) for name in layers(ours, d)}
    assert len(of_heads) == 13 and len(ours) == len(theirs) + depths * 13


def questions_of(out):
    """What a run with heads has evaluated on: (rows, prompts)."""
    start, = log_rows(out, "start")
    _, rows = load_data(start["data"], start["eval_prompts"], start["seed"])
    tokenizer = Tokenizer(out / "latest")
    return rows, [tokenizer.prompt(row["question"], "plain") for row in rows]


def ascii_of(text):
    return "".join(c for c in text if c.isascii())


def test_heads_learn_what_their_model_writes(fond, with_heads):
    """And the model stays what it was: every tensor, and every evaluation's text."""
    steps = log_rows(with_heads, "train")
    losses = [row["loss"] for row in steps]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5]), losses
    for row in steps:
        assert row["k"] == 2 == len(row["agreement"]) == len(row["confidence"])
        assert row["slots"] > 100 and row["gradient_norm"] > 0
    assert min(steps[-1]["agreement"]) > 0.5 > max(steps[0]["agreement"])
    assert_start_is_untouched(with_heads, fond[0])
    note = {"k_max": 3, "heads": 2, "loop": False, "prompt_format": "plain", "data": str(fond[1]),
            "steps": 40}
    config = read_json(with_heads / "latest" / "config.json")
    assert config["nanomtp"] == note and config["num_mtp_layers"] == 2
    assert not (with_heads / "latest" / "draft_vocab.json").exists()
    assert Tokenizer(with_heads / "latest").mask_id is None         # none was added

    # --- evaluations
    model, tokenizer, noted, heads = load(with_heads, "cpu", torch.float32)
    assert noted == note and (heads.depth, heads.loop, heads.draft_ids) == (2, False, None)
    rows, prompts = questions_of(with_heads)
    start = Transformer.from_pretrained(fond[0]).eval()
    texts = [a.tokens for a in generate(start, tokenizer, prompts, max_new_tokens=24)]
    evals = log_rows(with_heads, "eval")
    assert [row["step"] for row in evals] == [0, 20, 40]
    for row in evals:
        assert row["prompts"] == 4 and len(row["acceptance"]) == 2
        assert 1 <= row["tokens_per_forward"] <= 3
        written = re.sub(r"\[\d\||\]", "", row["sample"])
        # a character that is spread over two chunks is none in either
        assert ascii_of(written) == ascii_of(re.sub(r"\]", "", tokenizer.decode(texts[0])))
    assert len({row["accuracy_k1"] for row in evals}) == 1
    answers = speculate(model, tokenizer, prompts, 3, max_new_tokens=24, heads=heads)
    assert [answer.tokens for answer in answers] == texts
    assert evals[-1]["acceptance"] == pytest.approx(acceptance_by_position(answers))
    rate = sum(answer.tokens_per_forward for answer in answers) / 4
    assert evals[-1]["tokens_per_forward"] == pytest.approx(rate)
    assert rate > 1.2 > 1.1 > evals[0]["tokens_per_forward"]


def test_extend_trains_the_copies_alone(fond, with_heads, tmp_path):
    """Two heads become four, which begin as 1, 2, 1, 2; the old ones stay, to the bit."""
    flags = ("--model", with_heads, "--data", fond[1], *WITH_HEADS, "--heads", 4, "--extend",
             "--eval-every", 0)
    for name, steps, lr in (("begun", 1, 1e-12), ("out", 12, 4e-3)):
        run_train(*flags, "--steps", steps, "--warmup", 0, "--lr", lr, "--out", tmp_path / name)
    old, begun, end = (saved(out / "latest") for out in
                       (with_heads, tmp_path / "begun", tmp_path / "out"))
    for new in (begun, end):
        assert same({name: new[name] for name in old}, old)
    for d in (1, 2):
        torch.testing.assert_close(layers(begun, d + 2), layers(old, d), rtol=0, atol=1e-6)
        assert not any(torch.equal(x, layers(old, d)[name])
                       for name, x in layers(end, d + 2).items())
    config = read_json(tmp_path / "out" / "latest" / "config.json")
    assert config["num_mtp_layers"] == 4 and config["nanomtp"] == {
        "k_max": 5, "heads": 4, "loop": False, "prompt_format": "plain", "data": str(fond[1]),
        "steps": 12}
    steps = log_rows(tmp_path / "out", "train")
    for row in steps:                                       # what is not trained has no slots
        assert row["k"] == 4 and row["agreement"][:2] == row["confidence"][:2] == [0, 0]
        assert min(row["confidence"][2:]) > 0
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    state = torch.load(tmp_path / "out" / "latest" / "trainer.pt", weights_only=True)
    moments = {name for name, entry in state["optimizer"]["state"].items()
               if entry["exp_avg"].any()}
    assert {name[:8] for name in moments} == {"heads.2.", "heads.3."}


def test_loop_is_saved_as_equal_layers(fond, tmp_path):
    """One head's weights, as many times as there are depths: who reads them knows of no loop."""
    out = tmp_path / "out"
    run_train("--model", fond[0], "--data", fond[1], *WITH_HEADS, "--heads", 3, "--loop",
              "--steps", 20, "--eval-every", 20, "--out", out)
    start, = log_rows(out, "start")
    weights = saved(out / "latest")
    assert start["parameters"] == sum(x.numel() for x in layers(weights, 1).values())
    assert same(layers(weights, 1), layers(weights, 2)) and same(
        layers(weights, 1), layers(weights, 3))
    assert_start_is_untouched(out, fond[0])
    assert read_json(out / "latest" / "config.json")["nanomtp"]["loop"] is True
    heads = load_heads(out / "latest")
    assert (heads.depth, heads.loop, len(heads.heads)) == (3, True, 1)
    steps = log_rows(out, "train")
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and min(steps[-1]["agreement"]) > 0.3
    assert len(log_rows(out, "eval")[-1]["acceptance"]) == 3


def test_draft_vocabulary(fond, tmp_path, monkeypatch):
    """The most frequent tokens of the rows: no other is ever drafted, all may be written."""
    drafts, real = [], Drafter.draft

    def spy(*args):
        drafts.append(real(*args)[0])
        return drafts[-1], torch.ones(drafts[-1].shape)

    monkeypatch.setattr(Drafter, "draft", spy)
    out = tmp_path / "out"
    run_train("--model", fond[0], "--data", fond[1], *WITH_HEADS, "--heads", 2, "--draft-vocab", 6,
              "--eval-every", 40, "--out", out)
    ids = read_json(out / "latest" / "draft_vocab.json")["ids"]
    train, tokenizer = load_data(str(fond[1]), 4, 0)[0], Tokenizer(out / "latest")
    counts = Counter(i for _, text in encode_rows(train, tokenizer, "plain", 48) for i in text)
    assert ids == sorted(set(ids)) and len(ids) == 6
    assert min(counts[i] for i in ids) >= max(counts[i] for i in counts if i not in ids)
    drafted = {i for some in drafts for i in some.flatten().tolist()}
    assert drafted <= set(ids) and len(drafted) > 2
    rows, prompts = questions_of(out)
    model, _, _, heads = load(out, "cpu", torch.float32)
    assert heads.draft_ids.tolist() == ids
    answers = speculate(model, tokenizer, prompts, 3, max_new_tokens=24, heads=heads)
    plain = generate(model, tokenizer, prompts, max_new_tokens=24)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    assert {i for a in plain for i in a.tokens} - set(ids)
    last = log_rows(out, "eval")[-1]
    assert last["acceptance"] == pytest.approx(acceptance_by_position(answers))
    assert 0 < last["acceptance"][0] < 1
    # far more than there are: all that there are
    run_train("--model", fond[0], "--data", fond[1], *WITH_HEADS, "--heads", 2, "--draft-vocab",
              999, "--steps", 1, "--eval-every", 0, "--out", tmp_path / "all")
    assert read_json(tmp_path / "all" / "latest" / "draft_vocab.json")["ids"] == sorted(counts)


def test_heads_in_bf16(fond, with_heads, tmp_path):
    """A start checkpoint in bf16 stays that, heads are kept in fp32; and nearly the same is
    learned."""
    start = shutil.copytree(fond[0], tmp_path / "start")
    weights = {name: x.bfloat16() for name, x in saved(start).items()}
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    write_json(start / "config.json", read_json(start / "config.json") | {"dtype": "bfloat16"})
    out = tmp_path / "out"
    run_train("--model", start, "--data", fond[1], *WITH_HEADS, "--heads", 2, "--dtype", "bf16",
              "--steps", 10, "--eval-every", 10, "--max-new-tokens", 4, "--out", out)
    assert_start_is_untouched(out, start)
    heads = layers(saved(out / "latest"), 1) | layers(saved(out / "latest"), 2)
    assert {x.dtype for x in heads.values()} == {torch.float32}
    assert read_json(out / "latest" / "config.json")["dtype"] == "bfloat16"
    ours, theirs = ([row["loss"] for row in log_rows(run, "train")[:5]]
                    for run in (out, with_heads))
    assert ours == pytest.approx(theirs, rel=0.1) and ours != theirs
    model, tokenizer, _, heads = load(out, "cpu", torch.bfloat16)
    answer, = speculate(model, tokenizer, [[5, 6]], 3, max_new_tokens=4, heads=heads)
    assert len(answer.tokens) == 4


def test_heads_on_ground_truth(tiny, sums, tmp_path):
    """Rows that their model would never write, which it leaves to the distillation to say."""
    flags = ("--model", tiny, "--data", sums, *WITH_HEADS, "--heads", 2, "--limit", 4,
             "--batch-size", 4, "--eval-every", 0)
    for name, more in (("text", ["--kl-weight", 0]), ("both", [])):
        run_train(*flags, "--targets", "ground-truth", *more, "--out", tmp_path / name)
    text, both = (log_rows(tmp_path / name, "train")[-1] for name in ("text", "both"))
    assert min(text["agreement"]) > 0.9 and text["loss"] < both["loss"] / 3
    run_train(*flags, "--kl-weight", 0, "--steps", 1, "--out", tmp_path / "hard")
    first, other = (log_rows(tmp_path / name, "train")[0] for name in ("text", "hard"))
    assert first["slots"] == other["slots"] and first["loss"] != other["loss"]
    assert_start_is_untouched(tmp_path / "text", tiny)


def test_texts_shorter_than_the_cascade(tiny, tmp_path):
    """The last heads have no token there, and even the first few to learn from."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"question": "a" * n, "answer": "b"}) + "\n"
                            for n in range(1, 5)))
    run_train("--model", tiny, "--data", path, *WITH_HEADS, "--heads", 14, "--steps", 3,
              "--batch-size", 2, "--eval-every", 3, "--eval-prompts", 1, "--max-new-tokens", 3,
              "--out", tmp_path / "out")
    for row in log_rows(tmp_path / "out", "train"):
        assert row["slots"] == 2 and row["agreement"][1:] == [0] * 13 and row["loss"] > 0
    assert log_rows(tmp_path / "out", "eval")[-1]["tokens_per_forward"] >= 1


def test_one_method_after_the_other(fond, with_heads, tmp_path):
    """Heads on a model with a mask token, and a mask token for a model with heads, which lose
    their meaning then."""
    common = ("--model", fond[0], "--data", fond[1], "--seq-len", 48, "--prompt-format", "plain",
              "--device", "cpu", "--dtype", "fp32")
    masks = train_briefly(tmp_path / "masks", *common, "--k", 3, "--bidirectional")
    both = train_briefly(tmp_path / "both", *common, "--heads", 2, "--model", masks / "latest",
                         "--eval-every", 2, "--eval-prompts", 2, "--max-new-tokens", 5)
    assert_start_is_untouched(both, masks / "latest")
    model, tokenizer, note, heads = load(both, "cpu", torch.float32)
    assert tokenizer.mask_id == MASK == model.config.vocab_size - 1
    assert note["k_max"] == 3 and note["heads"] == 2 and "bidirectional" not in note
    assert heads.depth == 2
    after = train_briefly(tmp_path / "after", *common, "--k", 4, "--model", with_heads)
    model, tokenizer, note, heads = load(after, "cpu", torch.float32)
    assert note["k_max"] == 4 and "heads" not in note and heads is None
    assert len(generate(model, tokenizer, [[5]], 4, max_new_tokens=5)[0].tokens) == 5
