"""
studies/bench.py on a tiny random model: every contender decodes, texts are compared, and the
arithmetic of the tables. (What it refuses is in test_cli.py.)
"""
import argparse
import itertools
import json
import multiprocessing
import shutil

import pytest
import torch
from conftest import ROOT, train_briefly
from test_cli import cli

from common.cli import InputError
from common.files import read_json
from common.tokenizer import Tokenizer
from model import Transformer
from studies import bench


def raced(model, out, monkeypatch, *flags):
    """bench.json of a short race, with its tables printed."""
    fork = multiprocessing.get_context("fork")          # spawning would import everything anew
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    result = cli(bench, "--model", model, "--max-new-tokens", 8, "--warmup", 1, "--out", out,
                 "--data", "wordproblems", "--dtype", "fp32", "--threads", 1, *flags)
    assert result.code == 0, result
    assert (out / "bench.md").read_text() in result.out
    return read_json(out / "bench.json")


def test_bench(tiny, tmp_path, monkeypatch):
    model = train_briefly(tmp_path / "out", "--model", tiny, "--k", 2)
    record = raced(model, tmp_path / "bench", monkeypatch, "--limit", 4, "--rounds", 2,
                   "--batch-size", 1, 2)
    names = ["transformers, greedy", "transformers, prompt lookup", "ours, k = 1",
             "ours, static 2", "ours, adaptive 0.9", "ours, lossless 2", "ours, lossless 2 narrow"]
    assert list(record["races"]["1"]) == names
    assert list(record["races"]["2"]) == names[:1] + names[2:]      # prompt lookup: one row only
    for race in record["races"].values():
        plain = race["ours, k = 1"]
        for entry in race.values():
            assert len(entry["seconds"]) == len(entry["ratio"]) == 2
            assert entry["peak_mebibytes"] > 50
            assert entry["ratio_to_k1"] == [
                theirs / own for theirs, own in zip(plain["seconds"], entry["seconds"])]
        for name in ("ours, k = 1", "ours, lossless 2", "ours, lossless 2 narrow"):
            # in both rounds the text of transformers
            assert race[name]["greedy_texts"] == race[name]["texts"] == 4
            assert race[name]["tokens"] == plain["tokens"]
        assert race["transformers, greedy"]["tokens_per_pass"] == plain["tokens_per_pass"] == 1
        assert race["ours, static 2"]["tokens_per_pass"] > 1.5
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"]
    assert record["commit"] is not None


def test_bench_of_heads(tiny, tmp_path, monkeypatch):
    """k = 1 of the start, and drafts of one head and of both: all write the text of transformers,
    which knows nothing of heads."""
    model = train_briefly(tmp_path / "out", "--model", tiny, "--heads", 2)
    record = raced(model, tmp_path / "bench", monkeypatch, "--limit", 2, "--rounds", 1,
                   "--batch-size", 2)
    names = ["transformers, greedy", "ours, k = 1", "ours, lossless 2 heads",
             "ours, lossless 3 heads"]
    assert list(record["races"]["2"]) == names
    for name, entry in record["races"]["2"].items():
        assert entry["greedy_texts"] == entry["texts"] == 2, name
        assert entry["tokens_per_pass"] >= 1
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"]     # never a mask token


def test_texts_end_where_they_end(monkeypatch, tmp_path):
    """The tiny model stops: so do its texts in transformers, alone and padded in a batch."""
    model = tmp_path / "tiny-mtp"
    shutil.copytree(ROOT / "checkpoints" / "tiny-mtp", model)
    record = raced(model, tmp_path / "bench", monkeypatch, "--limit", 4, "--rounds", 2,
                   "--batch-size", 1, 2, "--max-new-tokens", 150)
    for race in record["races"].values():
        for name in {"transformers, greedy", "transformers, prompt lookup", "ours, k = 1",
                     "ours, lossless 8 narrow"} & race.keys():
            assert race[name]["greedy_texts"] == 4 and sum(race[name]["tokens"]) < 4 * 100
            assert race[name]["tokens"] == race["ours, k = 1"]["tokens"]
        assert race["ours, lossless 8 narrow"]["tokens_per_pass"] > 3
    assert 1 < record["races"]["1"]["transformers, prompt lookup"]["tokens_per_pass"] < 8
    # the same questions, whatever the batch
    assert (record["races"]["1"]["ours, k = 1"]["tokens"]
            == record["races"]["2"]["ours, k = 1"]["tokens"])
    assert bench.up_to_stop([5, 2, 7, 2], {2}) == [5, 2] and bench.up_to_stop([5], {2}) == [5]


def test_rounds(tiny, tmp_path):
    """In a round questions of one length; too few of them are refused before anything runs."""
    model, path = train_briefly(tmp_path / "out", "--model", tiny, "--k", 2), tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": "x" * n, "answer": "1"}) + "\n"
                            for n in (4, 5, 6, 5, 4, 7)))
    tokenizer = Tokenizer(model / "latest")
    args = argparse.Namespace(data=str(path), limit=4, rounds=2, seed=0)
    expected = [[tokenizer.prompt("x" * n, "plain")] * 2 for n in (5, 4)]
    assert bench.make_rounds(args, tokenizer, "plain") == expected
    assert bench.in_batches([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    result = cli(bench, "--model", model, "--data", path, "--batch-size", 1, "--limit", 6,
                 "--rounds", 3, "--out", tmp_path / "bench")
    assert result.code == 2 and "lower --limit or --rounds" in result.err


def begin_in_turn(pipe, name, strategy, args):
    """A contender that notes when it is asked; "dies" does so in its second round."""
    pipe.send("ready")
    for turn in itertools.count():
        batches = pipe.recv()
        if batches == "stop" or name == "dies" and turn:
            return
        with open(args.log, "a") as file:
            file.write(name)
        pipe.send(([[1]], 1.0, 1, 2 ** 20))


def test_another_contender_begins_each_round(tmp_path, monkeypatch):
    """And one that dies in the middle is an error, first or last, and no hang."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(bench, "contender", begin_in_turn)
    args = argparse.Namespace(warmup=1, log=tmp_path / "log")
    rounds = [[[[5]]]] * 3
    came = bench.race(dict.fromkeys("abc"), args, rounds)
    assert args.log.read_text() == "abc" "bca" "cab" "abc"
    assert {name: len(own) for name, own in came.items()} == {"a": 3, "b": 3, "c": 3}
    for names in (("dies", "a"), ("a", "dies")):
        with pytest.raises(InputError, match="dies failed: its process died"):
            bench.race(dict.fromkeys(names), args, rounds)


def test_ratios_are_of_the_same_round():
    def run(texts, seconds, passes):
        return texts, seconds, passes, 2 ** 20

    rounds = {name: [run([[1, 2, 3, 4]], 1.0, 4), run([[1, 2, 3, 4, 5, 6, 7, 8]], 4.0, 8)]
              for name in (bench.BASELINE, bench.PLAIN)}
    rounds["x"] = [run([[1, 2, 3, 4]], 0.5, 2), run([[1, 2, 3, 4]], 1.0, 2)]
    entry = bench.summarise(rounds)["x"]
    assert entry["ratio"] == entry["ratio_to_k1"] == [2, 4]
    assert (entry["greedy_texts"], entry["texts"]) == (1, 2)
    assert entry["tokens_per_pass"] == 2 and entry["tokens_per_second"] == [8, 4]
    assert bench.race_table(bench.summarise(rounds), 1).splitlines()[-1] == (
        "| x | 3.00 (2.00 to 4.00) | 3.00 (2.00 to 4.00) | 6.0 (4.0 to 8.0) | 67% | 2.00 | 1 of 2 "
        "| 1 |")


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
