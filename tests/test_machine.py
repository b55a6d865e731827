"""
common/machine.py: how many threads compute beside other programs. Nothing here is really busy: what
the clocks of a machine show is made up.
"""
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB, random_prompts, run_train, tokens

import train as training
from common import answers
from common import machine as machine_module
from common.machine import Cores
from sample import generate


@pytest.fixture
def threads():
    """Two threads in this process, for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch, threads):
    """A machine of two cores. machine.free(1.0): a second in which so many cores were idle or ours.
    Returns how many threads there are after the look that follows."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    fake = SimpleNamespace(now=0.0, idle=700.0, own=9.0, asked=0)
    clock = SimpleNamespace(perf_counter=lambda: fake.now)
    there = SimpleNamespace(exists=lambda: True)                # /proc/stat, on a Mac too
    monkeypatch.setattr(machine_module, "time", clock)
    monkeypatch.setattr(machine_module, "Path", lambda path: there)

    def clocks(self):
        fake.asked += 1
        return fake.now, fake.idle, fake.own

    monkeypatch.setattr(Cores, "clocks", clocks)
    cores = Cores()

    def free(count, seconds=1.0, **wait):
        fake.now += seconds
        fake.idle += 0.25 * count * seconds
        fake.own += 0.75 * count * seconds
        cores.look(**wait)
        return torch.get_num_threads()

    fake.free, fake.cores = free, cores
    return fake


def test_beside_a_busy_program(machine, capsys):
    """It computes with what is left, and says so once; when the other program has ended, with all
    again, but not at its every pause."""
    assert machine.free(2.0) == 2 and capsys.readouterr().err == ""
    assert machine.free(1.0) == 1
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith("note: other programs") and "computing with 1 of 2 threads" in note
    assert [machine.free(count) for count in (2, 2, 1, 2, 2)] == [1] * 5    # never three in a row
    assert [machine.free(count) for count in (1, 2, 2, 2, 2)] == [1, 1, 1, 2, 2]
    assert machine.free(1.0) == 1                               # it comes back: nothing new to say
    assert capsys.readouterr() == ("", "")


def test_what_counts_as_a_free_core(machine):
    """Most of one: our own threads wait for each other now and then, and clocks are rough."""
    assert machine.free(1.7) == 2 and machine.free(1.3) == 1
    assert [machine.free(1.5) for _ in range(4)] == [1] * 4
    assert [machine.free(1.7) for _ in range(3)] == [1, 1, 2]


def test_neither_below_one_nor_above_the_start(machine):
    assert machine.free(0.0) == 1 and machine.free(0.0) == 1
    assert [machine.free(64.0) for _ in range(9)][-1] == 2


def test_it_looks_about_once_a_second(machine):
    """A look costs a tenth of a millisecond, a pass of the tiny model few of them."""
    assert machine.asked == 1                                   # the start, which it compares with
    assert machine.free(0.0, seconds=0.9) == 2 and machine.asked == 1
    assert machine.free(0.0, seconds=0.2) == 1 and machine.asked == 2
    assert [machine.free(2.0, seconds=0.3, wait=0.2) for _ in range(3)] == [1, 1, 2]
    assert machine.free(0.0, seconds=0.1, wait=0.2) == 2


@pytest.mark.parametrize("why", ["OMP_NUM_THREADS", "no /proc/stat"])
def test_settled(machine, monkeypatch, why):
    """Who gave a number of threads gets it; without /proc/stat nobody knows who is busy."""
    if why == "OMP_NUM_THREADS":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    else:
        there_is_none = SimpleNamespace(exists=lambda: False)
        monkeypatch.setattr(machine_module, "Path", lambda path: there_is_none)
    asked, cores = machine.asked, Cores()
    for _ in range(3):
        machine.now += 5                                        # in which no core was free
        cores.look()
    assert torch.get_num_threads() == 2 and machine.asked == asked


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_the_clocks():
    """Each goes forward, and this process's work is its own."""
    cores = Cores()
    began, idle, own = cores.clocks()
    while cores.clocks()[2] < own + 0.05:
        pass
    now, later, worked = cores.clocks()
    assert now > began and later >= idle and 0.05 <= worked - own <= 1.5 * (now - began)


def test_decoding_looks(drafter, monkeypatch):
    """Before the first pass, if it is a while ago, and after every pass."""
    looks = []
    monkeypatch.setattr(answers, "cores", SimpleNamespace(look=lambda wait=1.0: looks.append(wait)))
    result, = generate(drafter, tokens(TINY_VOCAB), random_prompts(1, seed=6), 3, max_new_tokens=9,
                       on_chunk=lambda row, new: looks.append("a pass"))
    assert result.passes == 3 and looks == [0.2] + ["a pass", 1.0] * 3


def test_training_looks(tiny, tmp_path, monkeypatch):
    """Before its log says how many threads there are, and before every step."""
    events, draw = [], training.draw_rows
    cores = SimpleNamespace(look=lambda **wait: events.append("a look" if not wait else wait))
    monkeypatch.setattr(training, "cores", cores)
    monkeypatch.setattr(training, "draw_rows", lambda *way: events.append("a step") or draw(*way))
    run_train("--model", tiny, "--k", 2, "--steps", 3, "--batch-size", 2, "--seq-len", 200,
              "--eval-every", 0, "--out", tmp_path / "out")
    assert events == [{"wait": 0}] + ["a look", "a step"] * 3
