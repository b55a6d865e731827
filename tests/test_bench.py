"""
studies/bench.py on a tiny random model: every contender decodes, texts are compared, and the
arithmetic of the tables. (What it refuses is in test_cli.py.)
"""
import multiprocessing

import torch
from conftest import train_briefly
from test_cli import cli

from common.files import read_json
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
    names = ["transformers, greedy", "transformers, prompt lookup", "ours, static 1",
             "ours, static 2", "ours, adaptive 0.9", "ours, lossless 2", "ours, lossless 2 narrow"]
    assert list(record["races"]["1"]) == names
    assert list(record["races"]["2"]) == names[:1] + names[2:]      # prompt lookup: one row only
    for size, race in record["races"].items():
        for entry in race.values():
            assert len(entry["tokens_per_second"]) == 2 and entry["peak_mebibytes"] > 50
        for name in ("ours, static 1", "ours, lossless 2", "ours, lossless 2 narrow"):
            assert race[name]["greedy_texts"] == int(size)          # the text of transformers
        for k in (1, 2):
            assert race[f"ours, static {k}"]["tokens_per_pass_and_row"] == k
        for name in ("transformers, greedy", "ours, static 1"):     # none stopped early
            assert race[name]["passes"] == 8
    assert list(record["milliseconds_by_width"]) == ["1", "2", "3"]
    assert record["commit"] is not None
    assert (out / "bench.md").read_text() in result.out


def test_bytes_per_pass(tiny):
    """By hand: every weight once, and for 10 cached tokens keys and values of 2 layers, 2 heads of
    16."""
    model = Transformer.from_pretrained(tiny)
    weights = sum(tensor.numel() for tensor in model.parameters())
    assert bench.bytes_per_pass(model, 10) == 4 * (weights + 10 * 2 * 2 * 2 * 16)
    assert bench.bytes_per_pass(model.to(torch.bfloat16), 0) == 2 * weights
