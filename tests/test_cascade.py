"""
studies/cascade.py: what it counts against the Answers themselves, its arithmetic against slow
references, which trainings it asks for, and the whole of it on two steps each.
"""
import importlib
import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_prompts, tiny_tokenizer
from test_cli import assert_refused, cli

from common.files import read_json, write_json
from common.report import acceptance_by_position
from heads import Heads, save_heads
from model import Transformer
from sample import Strategy, load
from speculate import decode
from studies import cascade


# --------------------------------------------------------------------------------------------------
# Counting

ASKED = SimpleNamespace(batch_size=3, max_new_tokens=30)


@pytest.fixture(scope="module")
def counted(tiny, tmp_path_factory):
    """The tiny model's k = 1 texts, and random heads that draft only the tokens most frequent in
    them: some drafts stand by chance."""
    folder = tmp_path_factory.mktemp("heads")
    model, tokenizer, _, _ = load(tiny, "cpu", torch.float32)
    prompts = random_prompts(7, seed=5)
    plain = [own.tokens for own in
             cascade.answer(model, tokenizer, prompts, Strategy(k=1), None, ASKED)]
    frequent = Counter(token for text in plain for token in text).most_common(3)

    def save(name, depth, loop=False):
        backbone = Transformer.from_pretrained(tiny)
        heads = Heads(backbone.config, depth, loop).initialise(seed=1)
        heads.draft_ids = torch.tensor(sorted(token for token, _ in frequent))
        backbone.config.raw["nanomtp"] = {"loop": loop}
        (folder / name).mkdir()
        save_heads(heads, backbone, tiny, folder / name)
        tiny_tokenizer(folder / name)
        return folder / name

    return SimpleNamespace(prompts=prompts, plain=plain, save=save)


def test_counted_as_the_answers_say(counted):
    folder = counted.save("three", 3)
    found = cascade.evaluate(folder, 0, counted.prompts, counted.plain, "cpu", ASKED)
    model, tokenizer, _, heads = load(folder, "cpu", torch.float32)
    answers = decode(model, tokenizer, counted.prompts, Strategy(4, None, "heads"), heads,
                     max_new_tokens=ASKED.max_new_tokens)
    assert cascade.drafts_of(found) == 3
    for own, answer in zip(found, answers, strict=True):
        assert (own["tokens"], own["passes"]) == (len(answer.tokens), len(answer.chunks))
        assert sum(own["stood"]) == len(answer.drafts) == own["passes"] - 1
    assert cascade.measured(found, "tokens per forward")[0] == pytest.approx(
        statistics.fmean(answer.tokens_per_forward for answer in answers))

    shares = acceptance_by_position(answers)
    assert 1 > shares[0] > shares[1] > 0                    # or this test would say little
    passes = [stood for answer in answers for _, stood in answer.drafts]
    for j, share in enumerate(shares, 1):
        assert cascade.measured(found, ("cumulative", j))[0] == pytest.approx(share)
        before = [stood for stood in passes if stood >= j - 1]
        own = cascade.measured(found, ("own", j))
        assert own[0] == pytest.approx(sum(stood >= j for stood in before) / len(before))


def test_repeated_head(counted):
    """One head at every depth is what the same weights, saved three times, draft."""
    one, looped = counted.save("one", 1), counted.save("looped", 3, loop=True)
    repeated, alike, alone = (
        cascade.evaluate(folder, repeat, counted.prompts, counted.plain, "cpu", ASKED)
        for folder, repeat in ((one, 3), (looped, 0), (one, 0)))
    assert repeated == alike
    assert cascade.drafts_of(alone) == 1
    assert sum(sum(q["stood"][2:]) for q in repeated) > 0


def test_another_text_is_noticed(counted):
    other = [list(text) for text in counted.plain]
    other[4][0] += 1
    found = cascade.evaluate(counted.save("wrong", 1), 0, counted.prompts, other, "cpu", ASKED)
    assert [question["same_text"] for question in found] == [True] * 4 + [False] + [True] * 2


# --------------------------------------------------------------------------------------------------
# Arithmetic

def some_run(seed, better=0.0, questions=60, drafts=3):
    """A run's questions: a draft stands with a chance that depends on the question."""
    rng, luck, run = random.Random(seed), random.Random("same for all runs"), []
    for _ in range(questions):
        chance, stood = min(1, luck.uniform(0.2, 0.8) + better), [0] * (drafts + 1)
        for _ in range(luck.randint(5, 30)):
            stands = [rng.random() < chance for _ in range(drafts)]
            stood[(stands + [False]).index(False)] += 1
        tokens = 1 + sum((n + 1) * passes for n, passes in enumerate(stood))
        run.append({"tokens": tokens, "passes": 1 + sum(stood), "stood": stood, "same_text": True})
    return run


def slowly(run, measure):
    """A measure, pass by pass."""
    if measure == "tokens per forward":
        return sum(q["tokens"] / q["passes"] for q in run) / len(run)
    kind, j = measure
    passes = [n for q in run for n, times in enumerate(q["stood"]) for _ in range(times)]
    if kind == "own":
        passes = [n for n in passes if n >= j - 1]
    return len([n for n in passes if n >= j]) / len(passes)


def jackknife(n, value):
    """Standard error of value(i), which leaves out question i, over n questions."""
    values = [value(i) for i in range(n)]
    mean = sum(values) / n
    return math.sqrt((n - 1) / n * sum((one - mean) ** 2 for one in values))


def without(run, i):
    return run[:i] + run[i + 1:]


MEASURES = ["tokens per forward", ("cumulative", 1), ("cumulative", 3), ("own", 2), ("own", 3)]


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_values_and_errors(measure):
    run = some_run(1)
    value, pulls = cascade.measured(run, measure)
    assert value == pytest.approx(slowly(run, measure))
    assert sum(pulls) == pytest.approx(0, abs=1e-9)
    mean, error = cascade.pooled([(value, pulls)])
    assert mean == value
    assert error == pytest.approx(jackknife(60, lambda i: slowly(without(run, i), measure)),
                                  rel=0.1)


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_differences_are_paired(measure):
    """Questions differ more from each other than runs do on them."""
    run, other = some_run(1, better=0.1), some_run(2)
    mean, error = cascade.difference([run], [other], measure)
    assert mean == pytest.approx(slowly(run, measure) - slowly(other, measure))

    def both_without(i):
        return slowly(without(run, i), measure) - slowly(without(other, i), measure)

    assert error == pytest.approx(jackknife(60, both_without), rel=0.1)
    assert cascade.difference([run], [run], measure) == (0, 0)
    # over seeds the mean; and the spread between seeds where it is larger
    seeds = [run, run, some_run(3, better=0.2)], [other, some_run(4), some_run(5)]
    each = [slowly(a, measure) - slowly(b, measure) for a, b in zip(*seeds)]
    mean, error = cascade.difference(*seeds, measure)
    assert mean == pytest.approx(statistics.fmean(each))
    assert error >= statistics.stdev(each) / math.sqrt(3) * (1 - 1e-9)


def test_what_never_stood_has_no_own_acceptance():
    never = [{"tokens": 3, "passes": 3, "stood": [2, 0, 0]}] * 2
    once = [{"tokens": 4, "passes": 3, "stood": [1, 1, 0]}] * 2
    at_once = [{"tokens": 1, "passes": 1, "stood": [0, 0, 0]}] * 2      # ended in the prompt's pass
    table = cascade.summarise({"never": [never], "both": [never, once], "at once": [at_once]})
    assert table["never"]["cumulative"] == [(0, 0), (0, 0)]
    assert table["never"]["own"] == [(0, 0), None]
    assert table["both"]["cumulative"] == [(0.25, 0.25), (0, 0)]
    assert table["both"]["own"] == [(0.25, 0.25), (0, 0)]   # of draft 2 the second run's alone
    assert table["at once"]["cumulative"] == table["at once"]["own"] == [None, None]
    assert table["at once"]["tokens_per_forward"] == (1, 0)
    args = SimpleNamespace(heads=2, steps=7)
    rows = cascade.markdown(table, {"never": [1], "both": [1, 1], "at once": [1]}, args)
    assert rows.splitlines()[2:] == [
        "| never | 1 | 7 | 1.000 +- 0.000 | 0.0 +- 0.0 (0.0 +- 0.0) | 0.0 +- 0.0 (none) |",
        "| both | 2 | 7 | 1.167 +- 0.167 | 25.0 +- 25.0 (25.0 +- 25.0) | 0.0 +- 0.0 (0.0 +- 0.0) |",
        "| at once | 1 | 7 | 1.000 +- 0.000 | none (none) | none (none) |"]


def test_claims():
    """Each verdict once; which draft is compared; what the paper says nothing about."""
    good, bad = [some_run(1, better=0.3, drafts=4)], [some_run(1, drafts=4)]
    short = [some_run(1, drafts=1)]
    runs = {"one head": short, "one head, no distillation": short, "joint": bad,
            "joint, no distillation": good, "one head, repeated": good,
            "one head, repeated, no distillation": bad, "extension": good}
    found = {(own["variant"], own["against"]): own for own in cascade.claims(runs)}
    assert len(found) == len(cascade.CLAIMS) - 1                        # no "looped, unrolled"
    order = {pair: (own["tokens per forward"]["order"],
                    own.get("cumulative acceptance", {}).get("order"), own["draft"])
             for pair, own in found.items()}
    assert order == {
        ("one head", "one head, no distillation"): ("is undecided", "is undecided", 1),
        ("joint", "joint, no distillation"): ("does not hold", "does not hold", 4),
        ("one head, repeated", "one head, repeated, no distillation"): ("holds", "holds", 3),
        ("one head, repeated", "one head"): (None, None, None),
        ("extension", "one head"): ("holds", None, None),
        ("extension", "joint"): (None, None, 4)}
    joint = cascade.in_words(found["joint", "joint, no distillation"])
    points = 100 * (slowly(bad[0], ("cumulative", 4)) - slowly(good[0], ("cumulative", 4)))
    assert f"cumulative acceptance of draft 4: {points:+.2f} +- " in joint
    assert "45.47% -> 52.96%" in joint
    assert joint.endswith(
        "Its order in tokens per forward does not hold; in acceptance it does not hold.")
    one = cascade.in_words(found["extension", "one head"])
    assert "acceptance" not in one and one.endswith("in tokens per forward holds.")
    assert cascade.in_words(found["extension", "joint"]).endswith("we know no such number.")


# --------------------------------------------------------------------------------------------------
# The trainings

@pytest.fixture
def asked_for(monkeypatch):
    """Flags of each training that is asked for, which then is as good as done."""
    calls = []

    def run_script(script, *flags, what):
        assert script == "train.py"
        flags = list(map(str, flags))
        (Path(flags[flags.index("--out") + 1]) / "step-6").mkdir(parents=True)
        calls.append(flags)

    monkeypatch.setattr(cascade, "run_script", run_script)
    return calls


def value_of(flags, name):
    """What train.py takes: the last one."""
    return [value for flag, value in zip(flags, flags[1:]) if flag == name][-1]


def test_what_each_variant_trains(tmp_path, asked_for):
    args = SimpleNamespace(
        out=tmp_path, steps=6, heads=8, model="tiny", data="wordproblems", prompt_format="chat",
        device="cpu", dtype="fp32", more=["--kl-weight", "0.5", "--draft-vocab", "99"])
    folders = {name: cascade.train(name, 2, args) for name in cascade.TRAININGS}
    by_out = {str(Path(value_of(flags, "--out")).relative_to(tmp_path)): flags
              for flags in asked_for}
    common = {"--seed": "2", "--steps": "6", "--cooldown": "3", "--eval-every": "0",
              "--save-every": "6", "--data": "wordproblems",
              "--prompt-format": "chat"}
    for flags in asked_for:
        assert "--resume" in flags
        assert common == {name: value_of(flags, name) for name in common}
        # what is extended has its draft vocabulary already
        assert value_of(flags, "--draft-vocab") == ("0" if "--extend" in flags else "99")
    read = {out: (value_of(flags, "--heads"), value_of(flags, "--kl-weight"), "--loop" in flags,
                  "--extend" in flags, value_of(flags, "--model"))
            for out, flags in by_out.items()}
    assert read == {
        "one-head-2": ("1", "0.5", False, False, "tiny"),
        "one-head-no-distillation-2": ("1", "0", False, False, "tiny"),
        "joint-2": ("8", "0.5", False, False, "tiny"),
        "joint-no-distillation-2": ("8", "0", False, False, "tiny"),
        "looped-unrolled-2": ("8", "0.5", True, False, "tiny"),
        "extension-2/2-heads": ("2", "0.5", False, True, str(folders["one head"])),
        "extension-2/4-heads":
            ("4", "0.5", False, True, str(tmp_path / "extension-2" / "2-heads" / "step-6")),
        "extension-2/8-heads":
            ("8", "0.5", False, True, str(tmp_path / "extension-2" / "4-heads" / "step-6"))}
    assert len(asked_for) == len(read)                      # "one head" serves two variants
    assert folders["extension"] == tmp_path / "extension-2" / "8-heads" / "step-6"
    assert cascade.steps_of("extension", args) == 24 and cascade.steps_of("joint", args) == 6


# --------------------------------------------------------------------------------------------------
# The whole

@pytest.fixture
def here(monkeypatch):
    """train.py, else in processes of its own, runs in this one."""
    def run_script(script, *flags, what):
        result = cli(importlib.import_module(Path(script).stem), *flags)
        assert result.code == 0, result

    monkeypatch.setattr(cascade, "run_script", run_script)


def test_runs_and_resumes(tmp_path, here, monkeypatch):
    flags = ("--steps", 2, "--heads", 2, "--seeds", 1, "--limit", 2, "--max-new-tokens", 12,
             "--out", tmp_path)
    more = ("--", "--batch-size", 2, "--draft-vocab", 200)
    result = cli(cascade, *flags, *more)
    assert result.code == 0, result
    record = read_json(tmp_path / "table.json")
    assert list(record["table"]) == list(record["runs"]) == cascade.VARIANTS
    assert record["settings"]["more"] == ["--batch-size", "2", "--draft-vocab", "200"]
    for name, own in record["table"].items():
        drafts = 1 if name in ("one head", "one head, no distillation") else 2
        assert len(own["cumulative"]) == len(own["own"]) == drafts
        (run,) = record["runs"][name]
        assert run == {"seed": 0, **own}                    # with one seed it is the mean
    assert len(record["claims"]) == len(cascade.CLAIMS)

    # the heads are those that the variants promise
    configs = {path.parent.parent.relative_to(tmp_path).as_posix(): read_json(path)
               for path in tmp_path.glob("**/step-2/config.json")}
    assert {name: config["num_mtp_layers"] for name, config in configs.items()} == {
        "one-head-0": 1, "one-head-no-distillation-0": 1, "joint-0": 2,
        "joint-no-distillation-0": 2, "looped-unrolled-0": 2, "extension-0/2-heads": 2}
    vocabularies = [read_json(path)["ids"] for path in tmp_path.glob("*/**/draft_vocab.json")]
    assert len(vocabularies) >= 6 and all(len(ids) == 200 for ids in vocabularies)
    # each saw --more; cross-entropy alone is the smaller loss
    first = {}
    for log in tmp_path.glob("**/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert rows[0]["batch_size"] == 2
        first[log.parent.name] = next(row["loss"] for row in rows if row["event"] == "train")
    assert first["one-head-no-distillation-0"] < first["one-head-0"]
    assert first["joint-no-distillation-0"] < first["joint-0"]

    text = (tmp_path / "table.md").read_text()
    assert "| extension | 1 | 4 |" in text and "| one head, repeated | 1 | 2 |" in text
    assert text.count("\n- **") == len(cascade.CLAIMS)

    # what is there is not done again; what is missing of it is
    assert_refused(cli(cascade, *flags, *more), "add --resume")
    assert_refused(cli(cascade, *flags, "--resume"), "same settings")
    monkeypatch.setattr(cascade, "run_script", lambda *_, **__: pytest.fail("nothing was left"))
    (tmp_path / "extension-0.json").unlink()
    result = cli(cascade, *flags, "--resume", *more)
    assert result.code == 0, result
    again = read_json(tmp_path / "table.json")
    assert all(again[key] == record[key] for key in ("table", "claims", "runs"))
    # an edited text of k = 1 is noticed
    texts = read_json(tmp_path / "k1.json")["tokens"]
    write_json(tmp_path / "k1.json", {"tokens": [texts[0][1:], *texts[1:]]})
    (tmp_path / "joint-0.json").unlink()
    assert cli(cascade, *flags, "--resume", *more).code == 0
    assert "\n15 of 16 answers are those of k = 1" in (tmp_path / "table.md").read_text()


# --------------------------------------------------------------------------------------------------
# What it refuses

@pytest.mark.parametrize("flags, message", [
    ("--heads 3", "--heads 3: extension doubles one head"),
    ("--heads 1", "--heads must be at least 2"),
    ("--seeds 0", "--seeds must be at least 1"),
    ("--limit 1", "ask at least two"),
    ("--only nosuch", "nosuch"),
    ("--data rows.jsonl", "--data rows.jsonl has no unseen questions: add --questions FILE"),
    ("--data rows.jsonl --questions ./rows.jsonl", "is what is trained on"),
    ("--data rows.jsonl --questions nosuch.txt", "cannot read nosuch.txt"),
    ("--data rows.jsonl --questions long.txt", "does not fit the model's context of 512 tokens"),
    ("stray", "'stray': what follows -- are flags of train.py"),
    ("-- --steps 4", "--steps behind --"),
    ("-- --lr 1e-3 --seed=4", "--seed=4 behind --"),
])
def test_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "long.txt").write_text("short\n" + "word " * 600 + "\n")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(cli(cascade, "--model", ROOT / "checkpoints" / "tiny", "--out", tmp_path / "out",
                       *flags.split()), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_any_number_of_heads_without_extension(tmp_path, asked_for, monkeypatch):
    """And questions of a file, of which only --limit are asked."""
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    asked = []

    def evaluate(folder, repeat, prompts, plain, device, args):
        asked.append((folder.parent.name, repeat, len(prompts), len(plain)))
        return some_run(1, drafts=3, questions=2)

    monkeypatch.setattr(cascade, "evaluate", evaluate)
    result = cli(cascade, "--heads", 3, "--steps", 6, "--seeds", 2, "--limit", 2,
                 "--max-new-tokens", 2, "--questions", tmp_path / "few.txt",
                 "--out", tmp_path / "out", "--only", "joint", "one head, repeated")
    assert result.code == 0, result
    assert asked == [("joint-0", 0, 2, 2), ("one-head-0", 3, 2, 2),
                     ("joint-1", 0, 2, 2), ("one-head-1", 3, 2, 2)]
    assert [value_of(flags, "--heads") for flags in asked_for] == ["3", "1", "3", "1"]
