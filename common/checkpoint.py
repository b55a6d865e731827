"""
Checkpoints of training: out/step-N is a Hugging Face folder plus trainer.pt, out/latest points to
the newest, and out/log.jsonl has a row per event.

    python train.py --k 3 --out out-k3 --resume         # goes on from out-k3/latest, bit for bit
    python sample.py --model out-k3                     # reads the folder; so does transformers

A run may be killed at any moment: a folder is written under a hidden name and renamed, so that
out/latest is always whole.
"""
import json
import os
import random
import shutil

import torch

from common import parallel
from common.cli import InputError, output_folder, writing
from common.files import new_folder

# Settings that a resumed run may change
MAY_CHANGE = ("resume", "out", "steps", "minutes", "device", "micro_batch_size", "compile", "fsdp",
              "eval_every", "max_new_tokens", "log_every", "save_every", "keep_gb")


def find_run(out, resume):
    """Does `out` hold a run to go on with? Raises InputError where one would be overwritten."""
    there = sorted(path.resolve().name for path in [*out.glob("latest"), *out.glob("step-*")])
    if there and not resume:
        raise InputError(f"{out} already holds {there[-1]}: add --resume to go on, or choose "
                         "another --out")
    if not there and not resume and (out / "log.jsonl").exists():
        raise InputError(f"{out} has the log of a run that has saved nothing: it is still running, "
                         "or was stopped before its first checkpoint. Choose another --out, or add "
                         "--resume to start it anew")
    if resume and not (out / "latest").exists():
        print(f"nothing to resume in {out}: starting anew")
    return resume and (out / "latest").exists()


class Log:
    """out/log.jsonl, appended to without a buffer; ranks other than 0 write nowhere.

    Opening it also deletes what a run that was killed while saving has left in `out`.
    """

    def __init__(self, out):
        first = parallel.rank_and_world()[0] == 0
        self.path = output_folder(out) / "log.jsonl"
        with writing(out):
            self.file = open(self.path if first else os.devnull, "ab", buffering=0)
            for left in [*out.glob(".step-*"), *out.glob(".latest-*")] if first else []:
                left.unlink() if left.is_symlink() else shutil.rmtree(left)

    def record(self, event, step, **row):
        with writing(self.path):
            self.file.write((json.dumps({"event": event, "step": step, **row}) + "\n").encode())


def save_checkpoint(out, step, save, student, optimizer, tokenizer, args):
    """Write out/step-N whole or not at all, point out/latest to it, keep the last two. Returns it.

    save    (folder, weights): writes config and weights of the student, as its method stores them

    All ranks call it, rank 0 writes. What a step reads follows from (seed, step), so `step` is also
    the position in the data; the state of random number generators is kept all the same, for
    whoever adds dropout.
    """
    folder = out / f"step-{step}"
    weights, optimizer_state = parallel.whole_state(student, optimizer)
    if parallel.rank_and_world()[0] > 0:
        return folder
    rng = {"python": random.getstate(), "torch": torch.get_rng_state(),
           "cuda": torch.cuda.get_rng_state_all()}
    state = {"step": step, "args": vars(args), "optimizer": optimizer_state, "rng": rng}
    with new_folder(folder) as temporary:
        if "nanomtp" in student.config.raw:
            student.config.raw["nanomtp"]["steps"] = step
        save(temporary, weights)
        tokenizer.save(temporary)
        try:
            torch.save(state, temporary / "trainer.pt")
        except RuntimeError:                            # how torch's writer reports a short write
            raise OSError("the optimizer's state could not be written whole; is the disk "
                          "full?") from None
    with writing(out / "latest"):
        link = out / f".latest-{os.getpid()}"
        link.symlink_to(folder.name)
        link.replace(out / "latest")
    steps = [path for path in out.glob("step-*") if path.name[5:].isdigit()]
    for old in sorted(steps, key=lambda path: int(path.name[5:]))[:-2]:
        shutil.rmtree(old)
    return folder


def load_trainer(out, args):
    """trainer.pt of the newest checkpoint. InputError where the run had other settings."""
    try:
        state = torch.load(out / "latest" / "trainer.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        raise InputError(f"cannot resume from {out}/latest: {error}") from None
    if "rng" not in state:
        raise InputError(f"{out}/latest was written by an older train.py, which kept less: start "
                         "anew with another --out")
    for name, was in ({"heads": None} | state["args"]).items():     # older runs knew no heads
        now = getattr(args, name, was)
        if name not in MAY_CHANGE and now != was:
            flag = f"--{name.replace('_', '-')}"
            had = f"without {flag}" if was is None else f"with {flag} {was}, not {now}"
            raise InputError(f"{out} was trained {had}: resume with the same settings, or start "
                             "anew with another --out")
    return state


def restore(state, student, optimizer):
    """Put back what `load_trainer` has read. Returns the step to go on from.

    The optimiser's state is taken out of `state`: it is twice as large as the model.
    """
    parallel.load_optimizer(student, optimizer, state.pop("optimizer"))
    random.setstate(state["rng"]["python"])
    torch.set_rng_state(state["rng"]["torch"])
    if len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    return state["step"]
