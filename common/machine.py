"""
Where a program computes, in what dtype, and what its log says about that.

    from common.machine import machine, pick_device, pick_dtype
    device = pick_device("auto")                                # CUDA, else Apple silicon, else the CPU
    dtype = pick_dtype("auto", device)                          # bf16 where that is faster
    machine(device)                                             # what the logs in results/ say of their machine
"""
import ctypes
import platform
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name="auto"):
    """torch.device for `--device`: "auto" is CUDA, else Apple silicon, else CPU. Raises InputError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"no device {name!r} on this machine (try --device auto)") from None


def pick_dtype(name, device):
    """torch.dtype for `--dtype`: "auto" is bf16 where matrices multiply faster in it, else fp32.

    That is CUDA GPUs that support it and CPUs with AMX. A CPU that merely has bf16 instructions (AVX-512) was measured
    at 0.7x the fp32 rate.
    """
    if name == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported()
        amx = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
        name = "bf16" if cuda or amx else "fp32"
    return DTYPES[name]


def keep_freed_memory():
    """Tell glibc to keep what is freed. Else every large tensor's memory goes back to the system and comes back page by
    page, filled with zeros: up to a tenth of a training step of SmolLM2-135M on two cores (results/efficiency-smollm2)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:                                                         # no glibc: macOS
        return
    for option, value in ((-4, 0), (-1, -1), (-2, 2 ** 28)):                # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(option, value)


def peak_memory(device):
    """Most memory that this process has held, in GB: on a GPU what torch allocated there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def machine(device):
    """Where and how a program runs, for its log: a dict of strings (device, torch, python, commit, command)."""
    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""

    script = Path(sys.argv[0])                                              # named as it is called, without its folder
    script = f"-m studies.{script.stem}" if script.parent.name == "studies" else script.name
    cpu = next((line.split(":", 1)[1].strip() for line in said("lscpu").splitlines() if "Model name" in line), "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    return {"device": f"{device.type}: {name}", "torch": torch.__version__, "python": platform.python_version(),
            "commit": said("git", "describe", "--always", "--dirty"),
            "command": " ".join(["python", script, *map(shlex.quote, sys.argv[1:])])}


class Interrupt:
    """Ctrl-C and SIGTERM: the first is noted in `asked`, the second stops the program at once."""

    def __init__(self, message):
        self.asked, self.message = False, message
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, signum, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write(self.message)
