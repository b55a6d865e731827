"""extras/bench.py on a tiny random model: every contender decodes, texts are compared, the arithmetic of the tables."""
import json
import multiprocessing
import sys

import pytest
import torch
from conftest import train_briefly

from extras import bench
from model import Transformer
from pretrained import InputError


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Two steps of training with k_max 2."""
    return train_briefly(tmp_path / "out", "--model", tiny, "--k", 2)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
    bench.main()


def test_bench(checkpoint, tmp_path, monkeypatch, capsys):
    fork = multiprocessing.get_context("fork")                      # spawning imports everything anew in each process
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    run(monkeypatch, "--model", checkpoint, "--prompt-tokens", 20, "--max-new-tokens", 8, "--rounds", 2, "--warmup", 0,
        "--batch-size", 1, 2, "--out", tmp_path / "bench", "--dtype", "fp32", "--threads", 1)
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    names = ["transformers, greedy", "transformers, prompt lookup", "ours, static 1", "ours, static 2",
             "ours, adaptive 0.9", "ours, lossless 2", "ours, lossless 2 narrow"]
    assert list(record["races"]["1"]) == names and list(record["races"]["2"]) == names[:1] + names[2:]
    for size, race in record["races"].items():
        assert all(len(e["tokens_per_second"]) == 2 and e["peak_mebibytes"] > 50 for e in race.values())
        for name in ("ours, static 1", "ours, lossless 2", "ours, lossless 2 narrow"):
            assert race[name]["greedy_texts"] == int(size)          # the same text as transformers'
        assert race["ours, static 1"]["tokens_per_pass_and_row"] == 1
        assert race["ours, static 2"]["tokens_per_pass_and_row"] == 2
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"] and record["commit"] is not None
    assert all(e["passes"] == 8 for e in (race["transformers, greedy"], race["ours, static 1"]))   # none stopped early
    assert (tmp_path / "bench" / "bench.md").read_text() in capsys.readouterr().out


def test_refusals(checkpoint, tmp_path, monkeypatch):
    for flags, message in ((["--rounds", 0], "--rounds"), (["--prompt-tokens", 500], "context"),
                           (["--threads", 0], "threads"), (["--batch-size", 1, 0], "--batch-size")):
        with pytest.raises(InputError, match=message):
            run(monkeypatch, "--model", checkpoint, "--out", tmp_path, *flags)


def test_bytes_per_pass(tiny):
    """By hand: every weight once, and for 10 cached tokens keys and values of 2 layers, 2 heads of 16."""
    model = Transformer.from_pretrained(tiny)
    weights = sum(tensor.numel() for tensor in model.parameters())
    assert bench.bytes_per_pass(model, 10) == 4 * (weights + 10 * 2 * 2 * 2 * 16)
    assert bench.bytes_per_pass(model.to(torch.bfloat16), 0) == 2 * weights
