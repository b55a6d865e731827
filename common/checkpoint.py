"""
Checkpoints of training: out/step-N is a Hugging Face folder plus trainer.pt, out/latest points to
the newest, and out/log.jsonl has a row per event.

    python train.py --k 3 --out out-k3 --resume         # goes on from out-k3/latest, bit for bit
    python sample.py --model out-k3                     # reads the folder; so does transformers

A run may be killed at any moment: a folder is written under a hidden name and renamed, so that
out/latest is always whole. SHA256SUMS, written last, tells whether it still is (`sha256sum -c`
reads it, too). "Bit for bit" holds for as many threads, on the same machine.
"""
import hashlib
import json
import os
import random
import re
import shutil

import torch

from common import parallel
from common.cli import Alone, InputError, output_folder, reading, say, writing
from common.files import new_folder

SUMS = "SHA256SUMS"

# Settings that a resumed run may change
MAY_CHANGE = ("resume", "out", "steps", "minutes", "device", "micro_batch_size", "compile", "fsdp",
              "eval_every", "max_new_tokens", "log_every", "save_every", "keep_gb", "merge_start")


# --------------------------------------------------------------------------------------------------
# A run's folder

def find_run(out, resume):
    """Does `out` hold a run to go on with? Raises InputError where one would be overwritten, or
    where it cannot be told which checkpoint is the newest."""
    latest = out / "latest"
    there = sorted(path.name for path in [*out.glob("latest"), *out.glob("step-*")])
    if not resume:
        if there:
            raise InputError(f"{out} already holds {there[-1]}: add --resume to go on, or choose "
                             "another --out")
        if (out / "log.jsonl").exists():
            raise InputError(f"{out} has the log of a run that has saved nothing: it is still "
                             "running, or was stopped before its first checkpoint. Choose another "
                             "--out, or add --resume to start it anew")
        return False
    if not there:
        say(f"nothing to resume in {out}: starting anew")
        return False
    if not latest.is_symlink() or not latest.exists():
        wrong = "is no link" if latest.is_dir() else "points nowhere" if latest.is_symlink() else (
            "is missing, as in a copy that drops links")
        raise InputError(f"{latest} {wrong}, so which checkpoint is the newest? `ln -sfn step-N "
                         f"{latest}` tells (after moving away what is there), or choose another "
                         "--out")
    return True


class Log:
    """out/log.jsonl, appended to without a buffer; ranks other than 0 write nowhere.

    Opening it makes sure that no other program trains into `out`, and deletes what a run that was
    killed while saving, or on a full disk, has left there.
    """

    def __init__(self, out):
        first = parallel.rank_and_world()[0] == 0
        self.path = output_folder(out) / "log.jsonl"
        self.lock = Alone(out) if first else None
        with writing(out):
            self.file = open(self.path if first else os.devnull, "ab", buffering=0)
            for left in [*out.glob(".step-*"), *out.glob(".latest-*")] if first else []:
                left.unlink() if left.is_symlink() else shutil.rmtree(left)
            if first and self.path.is_file():
                whole = self.path.read_bytes().rfind(b"\n") + 1
                self.file.truncate(whole)               # without the half line at its end

    def record(self, event, step, **row):
        with writing(self.path):
            self.file.write((json.dumps({"event": event, "step": step, **row}) + "\n").encode())


# --------------------------------------------------------------------------------------------------
# What a run depends on beside its flags

def hash_of_rows(rows, most=1000):
    """Tells data apart: a hash over number and text of the rows; of an endless source the first."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(len(rows) if isinstance(rows, list) else most):
        digest.update(json.dumps(rows[i], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def hash_of_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Saving

class Checkpoints:
    """What a run has saved: the newest two of its checkpoints are kept, and no others touched.

    inputs  {name: hash} of what the run depends on beside its flags; see `load_trainer`
    names   of what is there already, oldest first: `trainer.pt` lists them for a resumed run
    """

    def __init__(self, out, args, inputs, names=()):
        self.out, self.args, self.inputs, self.names = out, args, inputs, list(names)

    @property
    def newest(self):
        """A Path, or None."""
        return self.out / self.names[-1] if self.names else None

    def save(self, step, save, student, optimizer, tokenizer):
        """Write out/step-N whole or not at all, and point out/latest to it.

        save    (folder, weights): writes config and weights of the student, as its method stores
                them

        All ranks call it, rank 0 writes. What a step reads follows from (seed, step), so `step` is
        also the position in the data; the state of random number generators is kept all the same,
        for whoever adds dropout.
        """
        weights, optimizer_state = parallel.whole_state(student, optimizer)
        self.names.append(f"step-{step}")
        if parallel.rank_and_world()[0] > 0:
            return
        rng = {"python": random.getstate(), "torch": torch.get_rng_state(),
               "cuda": torch.cuda.get_rng_state_all()}
        state = {"step": step, "args": vars(self.args), "inputs": self.inputs,
                 "checkpoints": self.names, "optimizer": optimizer_state, "rng": rng}
        is_first = not (self.out / "latest").exists()
        if is_first:            # the link comes first, so that there is no folder without it
            self.point_to_newest()
        with new_folder(self.newest) as temporary:
            if "nanomtp" in student.config.raw:
                student.config.raw["nanomtp"]["steps"] = step
            save(temporary, weights)
            tokenizer.save(temporary)
            try:
                torch.save(state, temporary / "trainer.pt")
            except RuntimeError:                        # how torch's writer reports a short write
                raise OSError("the optimizer's state could not be written whole; is the disk "
                              "full?") from None
            names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*")
                           if path.is_file())
            sums = "".join(f"{hash_of_file(temporary / name)}  {name}\n" for name in names)
            (temporary / SUMS).write_text(sums)
        if not is_first:
            self.point_to_newest()
        for old in self.names[:-2]:
            shutil.rmtree(self.out / old, ignore_errors=True)
        del self.names[:-2]

    def point_to_newest(self):
        """out/latest, in one step: it is the old link or the new one."""
        with writing(self.out / "latest"):
            link = self.out / f".latest-{os.getpid()}"
            link.symlink_to(self.newest.name)
            link.replace(self.out / "latest")


# --------------------------------------------------------------------------------------------------
# Resuming

def check_sums(folder):
    """InputError where a file of a checkpoint is not what was written."""
    with reading(folder / SUMS):
        text = (folder / SUMS).read_text() if (folder / SUMS).exists() else ""
        sums = [line.split("  ", 1) for line in text.splitlines()]
        if not sums:
            raise InputError(f"{folder} has no {SUMS}: an older train.py wrote it, or a part is "
                             "missing. Start anew with another --out")
        for digest, name in sums:
            file = folder / name
            if ".." in file.parts or not file.is_file() or hash_of_file(file) != digest:
                raise InputError(f"{file} is not what was written (a damaged disk or copy?): point "
                                 f"{folder.parent}/latest to an older checkpoint, or start anew "
                                 "with another --out")


def load_trainer(out, args, inputs):
    """trainer.pt of the newest checkpoint, a dict. InputError where it is damaged, or where the run
    had other settings, data or start weights (`inputs`, as in `Checkpoints`)."""
    folder = (out / "latest").resolve()
    check_sums(folder)
    path = folder / "trainer.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:                       # torch would advise to load it anyway, which runs code
        raise InputError(f"cannot resume from {path}: it is damaged, or holds more than tensors "
                         "and numbers") from None
    with reading(path):
        if type(state["step"]) is not int or state["step"] < 0:
            raise InputError(f"{path}: step is {state['step']!r}")
        if not all(re.fullmatch(r"step-\d+", name) for name in state["checkpoints"]):
            raise InputError(f"{path}: checkpoints are {state['checkpoints']!r}")
        for name, was in ({"heads": None} | state["args"]).items():     # the method comes first
            now = getattr(args, name, was)
            if name not in MAY_CHANGE and now != was:
                flag = f"--{name.replace('_', '-')}"
                had = f"without {flag}" if was is None else f"with {flag} {was}, not {now}"
                raise InputError(f"{out} was trained {had}: resume with the same settings, or "
                                 "start anew with another --out")
        for name, was in state["inputs"].items():
            if inputs[name] != was:
                raise InputError(f"{out} was trained on other {name}, under the same name: put "
                                 "them back, or start anew with another --out")
    return state


def check_optimizer(state, model):
    """InputError unless an optimiser's state fits the model's parameters: names, shapes, dtypes,
    and finite numbers. (torch would hand another shape to native code, which crashes.)"""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state.keys() != wanted.keys():
        raise InputError("the optimizer's state in trainer.pt is of other parameters: "
                         f"{sorted(map(str, state.keys() ^ wanted.keys()))[:3]}")
    for name, p in wanted.items():
        for key, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())):
            x = state[name][key]
            if x.shape != shape or x.dtype != torch.float32 or not x.isfinite().all():
                raise InputError(f"{key} of {name} in trainer.pt has another shape or dtype, or is "
                                 "not finite")


def restore(state, student, optimizer):
    """Put back what `load_trainer` has read.

    The optimiser's state is taken out of `state`: it is twice as large as the model.
    """
    with reading("trainer.pt"):
        saved = state.pop("optimizer")
        check_optimizer(saved["state"], student)
        parallel.load_optimizer(student, optimizer, saved)
        random.setstate(state["rng"]["python"])
        torch.set_rng_state(state["rng"]["torch"])
        if len(state["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
