"""
studies/bench.py on a tiny random model: every contender decodes, texts are compared, and the
arithmetic of the tables. (What it refuses is in test_cli.py.)
"""
import argparse
import json
import multiprocessing

import torch
from conftest import train_briefly
from test_cli import cli

from common.files import read_json
from common.tokenizer import Tokenizer
from model import Transformer
from studies import bench


def test_bench(tiny, tmp_path, monkeypatch):
    model, out = train_briefly(tmp_path / "out", "--model", tiny, "--k", 2), tmp_path / "bench"
    fork = multiprocessing.get_context("fork")          # spawning would import everything anew
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    result = cli(bench, "--model", model, "--prompt-tokens", 20, "--max-new-tokens", 8,
                 "--rounds", 2, "--warmup", 0, "--batch-size", 1, 2, "--out", out,
                 "--dtype", "fp32", "--threads", 1)
    assert result.code == 0, result
    record = read_json(out / "bench.json")
    names = ["transformers, greedy", "transformers, prompt lookup", "ours, k = 1",
             "ours, static 2", "ours, adaptive 0.9", "ours, lossless 2", "ours, lossless 2 narrow"]
    assert list(record["races"]["1"]) == names
    assert list(record["races"]["2"]) == names[:1] + names[2:]      # prompt lookup: one row only
    for size, race in record["races"].items():
        for entry in race.values():
            assert len(entry["tokens_per_second"]) == 2 and entry["peak_mebibytes"] > 50
        for name in ("ours, k = 1", "ours, lossless 2", "ours, lossless 2 narrow"):
            # in both rounds the text of transformers
            assert race[name]["greedy_texts"] == race[name]["texts"] == 2 * int(size)
            assert len(race[name]["ratio"]) == 2
        assert race["ours, k = 1"]["ratio_to_k1"] == [1, 1]
        for k, name in ((1, "ours, k = 1"), (2, "ours, static 2")):
            assert race[name]["tokens_per_pass_and_row"] == k
        for name in ("transformers, greedy", "ours, k = 1"):        # none stopped early
            assert race[name]["passes"] == 8
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"]
    assert record["commit"] is not None
    assert (out / "bench.md").read_text() in result.out


def test_bench_of_heads(tiny, tmp_path, monkeypatch):
    """k = 1 of the start, and drafts of one head and of both: all write the text of transformers,
    which knows nothing of heads."""
    model, out = train_briefly(tmp_path / "out", "--model", tiny, "--heads", 2), tmp_path / "bench"
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    result = cli(bench, "--model", model, "--prompt-tokens", 20, "--max-new-tokens", 8,
                 "--rounds", 1, "--warmup", 0, "--batch-size", 2, "--out", out, "--dtype", "fp32",
                 "--threads", 1)
    assert result.code == 0, result
    record = read_json(out / "bench.json")
    names = ["transformers, greedy", "ours, k = 1", "ours, lossless 2 heads",
             "ours, lossless 3 heads"]
    assert list(record["races"]["2"]) == names
    for name, entry in record["races"]["2"].items():
        assert entry["greedy_texts"] == entry["texts"] == 2 and entry["passes"] <= 8, name
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"]     # never a mask token


def test_bench_asks_another_question_in_each_round(tiny, tmp_path, monkeypatch):
    """In a batch questions of one length; too few of them are refused before anything runs."""
    model, path = train_briefly(tmp_path / "out", "--model", tiny, "--k", 2), tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": "x" * n, "answer": "1"}) + "\n"
                            for n in (4, 5, 6, 5, 4, 7)))
    tokenizer = Tokenizer(model / "latest")
    args = argparse.Namespace(data=str(path), warmup=1, rounds=1)
    batches = bench.make_batches(args, tokenizer, "plain", 2)
    expected = [[tokenizer.prompt("x" * n, "plain")] * 2 for n in (5, 4)]
    assert batches == expected
    result = cli(bench, "--model", model, "--data", path, "--batch-size", 2, "--rounds", 2,
                 "--out", tmp_path / "bench")
    assert result.code == 2 and "lower --batch-size or --rounds" in result.err

    rounds = {name: [([[n]], 1.0, 4 * n, 5, 2 ** 20) for n in (1, 2)]
              for name in (bench.BASELINE, bench.PLAIN)}
    rounds["x"] = [([[1]], 0.5, 4, 3, 2 ** 20), ([[3]], 0.25, 8, 5, 2 ** 20)]
    entry = bench.summarise(rounds, 1)["x"]
    assert entry["ratio"] == entry["ratio_to_k1"] == [2, 4] and entry["greedy_texts"] == 1
    assert entry["tokens_per_pass_and_row"] == 12 / 6


def test_contenders():
    """Static k, adaptive and lossless; of heads nothing that is not verified."""
    def names(*checkpoint):
        return [name.removeprefix("ours, ") for name in bench.contenders(*checkpoint)]

    assert names(1, None) == ["k = 1"]
    assert names(2, None) == ["k = 1", "static 2", "adaptive 0.9", "lossless 2",
                              "lossless 2 narrow"]
    some_heads = object()
    assert names(4, some_heads) == ["k = 1", "lossless 2 heads", "lossless 3 heads",
                                    "lossless 4 heads"]


def test_bytes_per_pass(tiny):
    """By hand: every weight once, and for 10 cached tokens keys and values of 2 layers, 2 heads of
    16."""
    model = Transformer.from_pretrained(tiny)
    weights = sum(tensor.numel() for tensor in model.parameters())
    assert bench.bytes_per_pass(model, 10) == 4 * (weights + 10 * 2 * 2 * 2 * 16)
    assert bench.bytes_per_pass(model.to(torch.bfloat16), 0) == 2 * weights
