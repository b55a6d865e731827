"""
The laboratory: the models in checkpoints/, how they were made, and next-token training, which made
the first of them.
"""
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import log_rows, run_train, train_briefly
from safetensors.torch import load_file
from test_cli import cli

from common.data import encode_rows
from common.files import read_json
from common.hub import resolve
from common.scoring import extract_flexible, gold_of
from common.tokenizer import Tokenizer
from common.wordproblems import WordProblems
from model import Transformer
from mtp import make_batch, region_loss
from sample import Strategy, load
from speculate import decode
from studies import tiny as maker

FOLDER = resolve("tiny")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def causal(n):
    return torch.arange(n)[None], torch.ones(n, n, dtype=torch.bool).tril()


def answers(folder, count, *strategies):
    """Unseen problems and, for each Strategy, their Answers; and the tokenizer."""
    model, tokenizer, *_ = load(folder, torch.device("cpu"), torch.float32)
    rows = [WordProblems(5, "test")[i] for i in range(count)]
    prompts = [tokenizer.prompt(row["question"], "plain") for row in rows]
    return rows, tokenizer, [decode(model, tokenizer, prompts, strategy, max_new_tokens=120)
                             for strategy in strategies]


def rate(results):
    return sum(len(result.tokens) for result in results) / sum(r.passes for r in results)


def right(results, rows, tokenizer):
    return sum(extract_flexible(tokenizer.decode(result.tokens)) == gold_of(row["answer"])
               for result, row in zip(results, rows))


# --------------------------------------------------------------------------------------------------
# checkpoints/tiny and tiny-mtp

def test_size_and_shape():
    model = Transformer.from_pretrained(FOLDER)
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert Tokenizer(FOLDER).mask_id is None            # an ordinary model
    assert "nanomtp" not in model.config.raw
    for folder in (FOLDER, resolve("tiny-mtp")):
        assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6


def test_transformers_and_tokenizers_agree():
    from tokenizers import Tokenizer as Theirs
    from transformers import AutoModelForCausalLM

    for folder in (FOLDER, resolve("tiny-mtp")):
        ours, tokenizer = Transformer.from_pretrained(folder), Tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = Theirs.from_file(str(folder / "tokenizer.json"))
        texts = ["{question}\n\n{answer}".format(**WordProblems(1, "test")[i]) for i in range(99)]
        for text in [*texts, "x  12\n\n 3 naïve 日本 #### $5", "  \t"]:
            ids = tokenizer.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text
        ids = torch.tensor([tokenizer.encode(texts[0])])
        with torch.no_grad():
            logits = ours(ids, *causal(ids.shape[1]))
            torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)


def test_tiny_solves_unseen_problems():
    """README says 99.5% of 1,000; here 100 must do."""
    rows, tokenizer, (results,) = answers("tiny", 100, Strategy(1))
    assert right(results, rows, tokenizer) >= 97
    assert all(result.finish == "stop" for result in results)


def test_tiny_mtp_writes_several_tokens_per_pass():
    """What README opens with: fewer passes, adaptively and losslessly."""
    weights = load_file(resolve("tiny-mtp") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    drafting = Strategy(8, None, "wide"), Strategy(8, None, "narrow")
    rows, tokenizer, results = answers("tiny-mtp", 24, Strategy(1), Strategy(8, 0.9), *drafting)
    plain, adaptive, wide, narrow = results
    assert right(plain, rows, tokenizer) >= 22 and right(adaptive, rows, tokenizer) >= 20
    assert rate(plain) == 1 and rate(adaptive) > 5.5 and rate(wide) > rate(narrow) > 4.5
    for results in (wide, narrow):
        assert [result.tokens for result in results] == [result.tokens for result in plain]


def test_a_short_training_is_enough_for_a_start(tmp_path):
    """25 steps: lossless decoding writes the answers of k = 1 in fewer passes."""
    run_train("--k", 3, "--steps", 25, "--warmup", 3, "--batch-size", 8, "--seq-len", 160,
              "--eval-every", 0, "--out", tmp_path)
    strategies = Strategy(1), Strategy(3, None, "wide"), Strategy(3, None, "narrow")
    _, _, (plain, wide, narrow) = answers(tmp_path, 16, *strategies)
    assert rate(wide) > 1.25 and rate(narrow) > 1.1
    for results in (wide, narrow):
        assert [result.tokens for result in results] == [result.tokens for result in plain]


# --------------------------------------------------------------------------------------------------
# How they were made

def test_the_start_can_be_made_again(tmp_path):
    result = cli(maker, "--out", tmp_path)
    assert result.code == 0, result
    for name in TOKENIZER_FILES:
        assert read_json(tmp_path / name) == read_json(FOLDER / name), name
    made, there = read_json(tmp_path / "config.json"), read_json(FOLDER / "config.json")
    assert made == {key: there[key] for key in made}
    vocabulary = read_json(tmp_path / "tokenizer.json")["model"]["vocab"]
    assert all(len(token) == 1 for token in vocabulary if any(c.isdigit() for c in token))


def test_the_trained_one_is_a_run_in_bf16(tiny, tmp_path):
    run = train_briefly(tmp_path / "run", "--model", tiny, "--k", 2)
    result = cli(maker, "--trained", run, "--out", tmp_path / "made")
    assert result.code == 0 and "k_max 2, 2 steps" in result.out, result
    made, latest = tmp_path / "made", run / "latest"
    assert {file.name for file in made.iterdir()} == {
        file.name for file in latest.iterdir()} - {"trainer.pt", "SHA256SUMS"}
    for name in TOKENIZER_FILES:
        assert read_json(made / name) == read_json(latest / name)
    config = read_json(latest / "config.json")
    assert read_json(made / "config.json") == config | {"dtype": "bfloat16"}
    whole, rounded = (load_file(folder / "model.safetensors") for folder in (latest, made))
    assert whole.keys() == rounded.keys()
    for name, tensor in rounded.items():
        assert torch.equal(tensor, whole[name].bfloat16())


def test_of_heads_the_start_is_not_rounded(tiny, tmp_path):
    run = train_briefly(tmp_path / "run", "--model", tiny, "--heads", 2, "--draft-vocab", 50)
    result = cli(maker, "--trained", run, "--out", tmp_path / "made")
    assert result.code == 0 and "k_max 3, 2 steps" in result.out, result
    made, latest = tmp_path / "made", run / "latest"
    assert {file.name for file in made.iterdir()} == {
        file.name for file in latest.iterdir()} - {"trainer.pt", "SHA256SUMS"}
    for name in ("config.json", "draft_vocab.json", *TOKENIZER_FILES):
        assert read_json(made / name) == read_json(latest / name)
    start, whole, rounded = (
        load_file(folder / "model.safetensors") for folder in (tiny, latest, made))
    assert whole.keys() == rounded.keys() > start.keys()
    for name, tensor in rounded.items():
        expected = start[name] if name in start else whole[name].bfloat16()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


# --------------------------------------------------------------------------------------------------
# Next-token training: k = 1, ground truth, no teacher

def test_random_weights():
    a, b, c = (Transformer.from_scratch(FOLDER, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)
    block, deviation = a.model.layers[0], 0.02 / 8 ** 0.5           # 2 * 4 layers
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert (block.input_layernorm.weight == 1).all()


def test_k1_with_ground_truth_is_the_ordinary_next_token_loss():
    model, tokenizer = Transformer.from_pretrained(FOLDER), Tokenizer(FOLDER)
    encoded = encode_rows([WordProblems(0)[i] for i in range(3)], tokenizer, "plain", 224)
    batch = make_batch(encoded, 1, 0, 1, tokenizer, torch.device("cpu"), prefix=True)
    loss, seen = region_loss(model, None, batch, tokenizer, 10)
    both, _ = region_loss(model, None, batch, tokenizer, 10, prefix_weight=2.0, prefix_tokens=5)
    expected, tokens = 0.0, []
    for prompt, text in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([text]), *causal(len(text)))[0, prompt - 1:-1]
        expected += F.cross_entropy(logits, torch.tensor(text[prompt:]), reduction="sum").item()
        tokens += text[prompt:]
    assert loss.item() == pytest.approx(expected / 10, rel=1e-4)
    assert seen.targets.flatten().tolist() == tokens and tokens.count(tokenizer.end_id) == 3
    # the prefix loss is about the same tokens, by another name
    assert both.item() == pytest.approx(expected / 10 + 2 * expected / 5, rel=1e-4)


def test_pretraining_from_random_weights(tmp_path):
    """A few steps: it learns, saves an ordinary checkpoint, resumes bit-equal, can be distilled."""
    common = ("--preset", "pretrain-tiny", "--batch-size", 8, "--lr", 3e-3, "--warmup", 2,
              "--cooldown", 0, "--log-every", 1, "--eval-every", 6, "--eval-prompts", 2,
              "--max-new-tokens", 4)
    run_train(*common, "--steps", 6, "--save-every", 3, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "step-3", tmp_path / "parts" / "step-3")
    (tmp_path / "parts" / "latest").symlink_to("step-3")
    run_train(*common, "--steps", 6, "--out", tmp_path / "parts", "--resume")
    losses = [row["loss"] for row in log_rows(tmp_path / "whole", "train")]
    assert 6.5 < losses[0] < 7.2 and losses[-1] < losses[0] - 0.5       # ln 906 = 6.8
    whole, parts = (Transformer.from_pretrained(tmp_path / name / "latest")
                    for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    assert whole.config.vocab_size == 906 and "nanomtp" not in whole.config.raw
    latest = tmp_path / "whole" / "latest"
    assert read_json(latest / "tokenizer.json") == read_json(FOLDER / "tokenizer.json")
    for row in log_rows(tmp_path / "whole", "eval"):
        assert "accuracy_k1" in row and "accuracy" not in row
    train_briefly(tmp_path / "distilled", "--model", tmp_path / "whole", "--k", 3)
    distilled = Transformer.from_pretrained(tmp_path / "distilled" / "latest")
    assert distilled.config.vocab_size == 907
    assert distilled.config.raw["nanomtp"]["data"] == "wordproblems"
