"""
Checkpoints of training: out/step-N is a Hugging Face folder plus trainer.pt, out/latest points to the newest.

    python train.py --k 3 --out out-k3 --resume                 # goes on from out-k3/latest, bit for bit
    python sample.py --model out-k3                             # reads the same folder, and so does transformers

A run may be killed at any moment: a folder is written under a hidden name and renamed, so that out/latest is always whole.
"""
import os
import random
import shutil

import torch

from extras import parallel
from model import save_pretrained
from pretrained import InputError, new_folder

MAY_CHANGE = ("resume", "out", "cache", "steps", "minutes", "device", "micro_batch_size", "compile", "fsdp", "eval_every",
              "eval_tokens", "log_every", "save_every")                         # between a run and its resumption


def find_run(out, resume):
    """Does `out` hold a run to go on with? Raises InputError where one would be overwritten."""
    there = sorted(path.resolve().name for path in [*out.glob("latest"), *out.glob("step-*")])
    if there and not resume:
        raise InputError(f"{out} already holds {there[-1]}: add --resume to go on, or choose another --out")
    if resume and not (out / "latest").exists():
        print(f"nothing to resume in {out}: starting anew")
    return resume and (out / "latest").exists()


def open_log(out):
    """out/log.jsonl, open to append bytes without a buffer (ranks other than 0 get one that goes nowhere). What a run that
    was killed while saving has left in `out` is deleted."""
    rank, _ = parallel.rank_and_world()
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl" if rank == 0 else os.devnull, "ab", buffering=0)
        for left in [*out.glob(".step-*"), *out.glob(".latest-*")] if rank == 0 else []:
            left.unlink() if left.is_symlink() else shutil.rmtree(left)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    return log


def save_checkpoint(out, step, student, optimizer, tokenizer, args, mask_id):
    """Write out/step-N whole or not at all, point out/latest to it, keep the last two. Returns its path.

    All ranks call it, rank 0 writes. What a step reads follows from (seed, step), so `step` is also the position in the
    data; random number generators are kept all the same, for whoever adds dropout.
    """
    folder = out / f"step-{step}"
    weights, optimizer_state = parallel.whole_state(student, optimizer)
    if parallel.rank_and_world()[0] > 0:
        return folder
    with new_folder(folder) as temporary:
        save_pretrained(student, temporary, args.k > 1 and {
            "mask_token_id": mask_id, "k_max": args.k, "bidirectional": args.bidirectional,
            "prompt_format": args.prompt_format, "data": args.data, "steps": step}, weights)
        tokenizer.save(temporary, mask_id)
        rng = {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        try:
            torch.save({"step": step, "args": vars(args), "optimizer": optimizer_state, "rng": rng},
                       temporary / "trainer.pt")
        except RuntimeError:                                            # how torch's writer reports a short write
            raise OSError("the optimizer's state could not be written whole; is the disk full?") from None
    try:
        link = out / f".latest-{os.getpid()}"
        link.symlink_to(folder.name)
        link.replace(out / "latest")
    except OSError as error:
        raise InputError(f"cannot write {out}/latest: {error.strerror}") from None
    steps = [path for path in out.glob("step-*") if path.name[5:].isdigit()]
    for old in sorted(steps, key=lambda path: int(path.name[5:]))[:-2]:
        shutil.rmtree(old)
    return folder


def load_trainer(out, args):
    """trainer.pt of the newest checkpoint. Raises InputError where the run was started with other settings."""
    try:
        state = torch.load(out / "latest" / "trainer.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        raise InputError(f"cannot resume from {out}/latest: {error}") from None
    if "rng" not in state:
        raise InputError(f"{out}/latest was written by an older train.py, which kept less: start anew with another --out")
    for name, was in state["args"].items():
        if name not in MAY_CHANGE and getattr(args, name, was) != was:
            raise InputError(f"{out} was trained with --{name.replace('_', '-')} {was}, not {getattr(args, name)}: "
                             "resume with the same settings, or start anew with another --out")
    return state


def restore(state, student, optimizer):
    """Put back what `load_trainer` has read: the random number generators' state and the optimiser's, which is then gone
    from `state`: it is twice as large as the model."""
    parallel.load_optimizer(student, optimizer, state.pop("optimizer"))
    random.setstate(state["rng"]["python"])
    torch.set_rng_state(state["rng"]["torch"])
    if len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
