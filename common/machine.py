"""
Where a program computes, in what dtype, and what its log says about that.

    from common.machine import machine, pick_device, pick_dtype
    device = pick_device("auto")                # CUDA, else Apple silicon, else the CPU
    dtype = pick_dtype("auto", device)          # bf16 where that is faster
    machine(device)                             # what the logs in results/ say of their machine
"""
import ctypes
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --------------------------------------------------------------------------------------------------
# What is asked for

def pick_device(name="auto"):
    """torch.device for `--device`; "auto" is CUDA, else Apple silicon, else the CPU.

    Raises InputError where this machine has no such device.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        return torch.empty(0, device=name).device               # "cuda" -> cuda:0, if it works
    except (RuntimeError, AssertionError):
        raise InputError(f"no device {name!r} on this machine (try --device auto)") from None


def pick_dtype(name, device):
    """torch.dtype for `--dtype`: "auto" is bf16 where matrices multiply faster in it, else fp32.

    That is CUDA GPUs that support it and CPUs with AMX. A CPU that merely has bf16 instructions
    (AVX-512) was measured at 0.7x the fp32 rate.
    """
    if name == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported()
        amx = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
        name = "bf16" if cuda or amx else "fp32"
    return DTYPES[name]


def dtype_name(dtype):
    """What --dtype calls a torch.dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)


# --------------------------------------------------------------------------------------------------
# Other programs on the same cores

class Cores:
    """Computes with as many threads as there are cores that no other program keeps busy.

    The threads of a product wait for each other, some hundred times a pass. Where another program
    holds one's core, all of them wait until the system gives it back: two threads beside one busy
    program write a twentieth of what one thread does (results/busy). So decoding and training look
    about once a second, and change the number of threads. Linux only; OMP_NUM_THREADS settles it.
    """

    def __init__(self):
        self.settled = "OMP_NUM_THREADS" in os.environ or not Path("/proc/stat").exists()
        self.most, self.free_looks, self.told = None, 0, False
        self.began, self.idle, self.own = (0.0, 0.0, 0.0) if self.settled else self.clocks()

    def clocks(self):
        """Seconds on the clock, of idleness of all our cores, and of this process's work."""
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = map(str.split, Path("/proc/stat").read_text().splitlines())
        ticks = sum(int(line[4]) + int(line[5])                 # idle, and waiting for the disk
                    for line in lines if line and line[0] in ours)
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()

    def look(self, wait=1.0):
        """Change the number of threads if it should; does nothing within `wait` seconds."""
        if self.settled or time.perf_counter() - self.began < wait:
            return
        now, idle, own = self.clocks()
        free = (idle - self.idle + own - self.own) / (now - self.began)     # cores: idle, or ours
        self.began, self.idle, self.own = now, idle, own
        threads, self.most = torch.get_num_threads(), self.most or torch.get_num_threads()
        fitting = max(1, min(self.most, int(free + 0.4)))
        self.free_looks = self.free_looks + 1 if fitting > threads else 0
        if fitting < threads or self.free_looks == 3:           # not at every pause of the others
            torch.set_num_threads(fitting)
            self.free_looks = 0
        if fitting < threads and not self.told:
            self.told = True
            tqdm.write(f"note: other programs keep this machine busy: computing with {fitting} of "
                       f"{self.most} threads, which is faster than waiting for their cores",
                       file=sys.stderr)


cores = Cores()


# --------------------------------------------------------------------------------------------------
# Memory

def keep_freed_memory():
    """Tell glibc to keep what is freed.

    Else every large tensor's memory goes back to the system and comes back page by page, filled
    with zeros: up to a tenth of a training step of SmolLM2-135M on two cores
    (results/efficiency-smollm2).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:                                             # no glibc: macOS
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4        # malloc.h
    libc.mallopt(M_MMAP_MAX, 0)                                 # large tensors on the heap, too
    libc.mallopt(M_TRIM_THRESHOLD, -1)                          # never give back its end
    libc.mallopt(M_TOP_PAD, 2 ** 28)                            # bytes by which it grows


def peak_memory(device):
    """Most memory that this process has held, in GB (10^9 bytes).

    On a GPU it is what torch allocated there, else resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024              # bytes; Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------------------------
# What the log says

def output_of(*command):
    """What a command prints, run in the repository; "" where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def machine(device):
    """Where and how a program runs: a dict of strings (device, torch, python, commit, command)."""
    # --- the processor
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line for line in output_of("lscpu").splitlines() if "Model name" in line]
        cpu = models[0].split(":", 1)[1].strip() if models else ""
        name = f"{cpu}, {torch.get_num_threads()} threads"

    # --- the command, named as it is called, without its folder
    script = Path(sys.argv[0])
    called = f"-m studies.{script.stem}" if script.parent.name == "studies" else script.name
    command = ["python", called, *map(shlex.quote, sys.argv[1:])]

    return {"device": f"{device.type}: {name}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": output_of("git", "describe", "--always", "--dirty"),
            "command": " ".join(command)}


# --------------------------------------------------------------------------------------------------
# Stopping in good order

class StopSignal:
    """Is it time to stop? After so many minutes (None: never), Ctrl-C or SIGTERM.

    A first signal is only noted, so that a step can be finished and saved; a second one stops the
    program at once.
    """

    def __init__(self, minutes=None):
        self.limit, self.began, self.interrupted = minutes, time.perf_counter(), False
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        tqdm.write("stopping after this step (again to stop at once) ...")

    @property
    def minutes(self):
        """Since the beginning."""
        return round((time.perf_counter() - self.began) / 60, 3)

    @property
    def asked(self):
        return self.interrupted or (self.limit is not None and self.minutes >= self.limit)
