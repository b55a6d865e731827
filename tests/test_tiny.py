"""
The laboratory: the tiny model in checkpoints/tiny, how it was made, and next-token training, which made it.
"""
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import run_train

import train as training
from data import WordProblems, encode_rows
from eval_gsm8k import extract_flexible
from extras import tiny as maker
from model import Transformer
from pretrained import InputError, read_json, resolve
from regions import make_batch
from sample import generate, load
from tokenizer import Tokenizer

FOLDER = resolve("tiny")


def causal(n):
    return torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril()


# --- checkpoints/tiny

def test_size_and_shape():
    model = Transformer.from_pretrained(FOLDER)
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6
    assert Tokenizer(FOLDER).mask_id is None and "nanomtp" not in model.config.raw          # an ordinary model


def test_transformers_and_tokenizers_agree():
    from tokenizers import Tokenizer as Theirs
    from transformers import AutoModelForCausalLM

    ours, tokenizer = Transformer.from_pretrained(FOLDER), Tokenizer(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    theirs = Theirs.from_file(str(FOLDER / "tokenizer.json"))
    texts = ["{question}\n\n{answer}".format(**WordProblems(1, "test")[i]) for i in range(100)]
    texts += ["x  12\n\n 3 naïve 日本 #### $5", "  \t"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and tokenizer.decode(ids) == text
    ids = torch.tensor([tokenizer.encode(texts[0])])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, *causal(ids.shape[1])), model(ids).logits, rtol=0, atol=1e-4)


def test_it_solves_unseen_problems():
    """README says how often, over 3,000; here 100 must do."""
    model, tokenizer = Transformer.from_pretrained(FOLDER).eval(), Tokenizer(FOLDER)
    rows = [WordProblems(5, "test")[i] for i in range(100)]
    prompts = [tokenizer.prompt(row["question"], "plain") for row in rows]
    results = generate(model, prompts, stop_ids=tokenizer.stop_ids, max_new_tokens=120)
    right = sum(extract_flexible(tokenizer.decode(result.tokens)) == row["answer"].split("#### ")[1]
                for result, row in zip(results, rows))
    assert right >= 85 and all(result.finish == "stop" for result in results)


def test_it_learns_to_write_several_tokens_losslessly(tmp_path):
    """A short distillation: lossless decoding writes k = 1's answers, adaptive decoding fewer passes; as in README."""
    run_train("--k", 3, "--steps", 40, "--warmup", 5, "--batch-size", 16, "--eval-every", 0, "--out", tmp_path)
    model, tokenizer, trained = load(tmp_path, torch.device("cpu"), torch.float32)
    prompts = [tokenizer.prompt(WordProblems(6, "test")[i]["question"], "plain") for i in range(32)]

    def texts(k, threshold=None, **more):
        results = generate(model, prompts, k, threshold, tokenizer.mask_id, tokenizer.stop_ids, 80, **more)
        return [r.tokens for r in results], sum(len(r.tokens) for r in results) / sum(r.passes for r in results)

    plain, one = texts(1)
    for form in ("wide", "narrow"):
        tokens, per_forward = texts(3, lossless=form)
        assert tokens == plain and per_forward > 1.2 > one == 1
    assert trained["k_max"] == 3


def test_its_tokenizer_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--out", str(tmp_path)])
    maker.main()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert read_json(tmp_path / name) == read_json(FOLDER / name), name
    made, there = read_json(tmp_path / "config.json"), read_json(FOLDER / "config.json")
    assert made == {key: there[key] for key in made}
    model = read_json(tmp_path / "tokenizer.json")["model"]["vocab"]
    assert all(len(token) == 1 for token in model if any(c.isdigit() for c in token))       # every digit by itself


# --- next-token training: k = 1, ground truth, no teacher

def test_random_weights():
    a, b, c = (Transformer.from_scratch(FOLDER, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)
    block = a.model.layers[0]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 8 ** 0.5, rel=0.02)     # 2 * 4 layers
    assert (block.input_layernorm.weight == 1).all()


def test_k1_with_ground_truth_is_the_ordinary_next_token_loss():
    model, tokenizer = Transformer.from_pretrained(FOLDER), Tokenizer(FOLDER)
    encoded = encode_rows([WordProblems(0)[i] for i in range(3)], tokenizer, "plain", 224)
    batch = make_batch(encoded, 1, 0, 1, None, tokenizer.end_id, torch.device("cpu"), prefix=True)
    loss, prefix, _, targets, _ = training.region_loss(model, None, batch, None, tokenizer.stop_ids, tokenizer.end_id)
    expected, answers = 0.0, []
    for prompt, text in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([text]), *causal(len(text)))[0, prompt - 1:-1]
        expected += F.cross_entropy(logits, torch.tensor(text[prompt:]), reduction="sum").item()
        answers += text[prompt:]
    assert loss.item() == pytest.approx(expected, rel=1e-4) and targets.flatten().tolist() == answers
    assert answers.count(tokenizer.end_id) == 3
    assert prefix.item() == pytest.approx(expected, rel=1e-4)           # the same tokens, asked for by another name


def test_ground_truth_for_several_slots():
    """Slot j's target is the j-th token behind the anchor; behind the text's end the end, behind a cut nothing."""
    whole, short = (2, [10, 11, 12, 13, 14, 2]), (2, [20, 21, 22, 23])              # the second was cut at --seq-len
    batch = make_batch([whole, short], 3, 0, 2, 99, 2, torch.device("cpu"), prefix=True)
    assert batch.slots[1][:, 0].tolist() == [1, 3, 1]
    assert batch.truth.tolist() == [[12, 13, 14], [14, 2, 2], [22, 23, -100]]
    assert batch.next_token.tolist() == [12, 13, 14, 2, 22, 23]


def test_pretraining_from_random_weights(tmp_path):
    """A few steps: it learns, saves an ordinary checkpoint without a mask token, resumes bit-equal, and can be distilled."""
    common = ("--preset", "pretrain-tiny", "--batch-size", 8, "--lr", 3e-3, "--warmup", 2, "--cooldown", 0, "--log-every", 1,
              "--eval-every", 6, "--eval-prompts", 2, "--eval-tokens", 4)
    run_train(*common, "--steps", 6, "--out", tmp_path / "whole")
    run_train(*common, "--steps", 3, "--out", tmp_path / "parts")
    run_train(*common, "--steps", 6, "--out", tmp_path / "parts", "--resume")
    rows = [json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert 6.5 < losses[0] < 7.2 and losses[-1] < losses[0] - 0.5                  # ln 906 = 6.8
    whole, parts = (Transformer.from_pretrained(tmp_path / name / "latest") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert whole.config.vocab_size == 906 and "nanomtp" not in whole.config.raw
    assert read_json(tmp_path / "whole" / "latest" / "tokenizer.json") == read_json(FOLDER / "tokenizer.json")
    assert all("accuracy_k1" in row and "accuracy" not in row for row in rows if row["event"] == "eval")
    run_train("--model", tmp_path / "whole", "--k", 3, "--steps", 1, "--batch-size", 2, "--eval-every", 0,
              "--out", tmp_path / "distilled")
    distilled = Transformer.from_pretrained(tmp_path / "distilled" / "latest")
    assert distilled.config.vocab_size == 907 and distilled.config.raw["nanomtp"]["data"] == "wordproblems"


def test_nothing_to_distil(tmp_path):
    with pytest.raises(InputError, match="ground-truth"):
        run_train("--k", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
