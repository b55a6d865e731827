"""
Several GPUs: what train.py and eval_gsm8k.py need beyond one process. With one GPU, or none, skip
this file.

    torchrun --nproc_per_node=4 train.py --preset paper             # DDP: whole models on each
    torchrun --nproc_per_node=4 train.py --preset paper --fsdp      # FSDP: a share of them on each
    torchrun --nproc_per_node=4 eval_gsm8k.py --data gsm8k          # each answers some questions

torchrun starts N processes ("ranks") that run the same script. All of them draw the same step from
(seed, step): k, offset and rows. Rank r takes every N-th row from the r-th on, so --batch-size is
the number of sequences of all ranks together, nothing is trained on twice, and a run gives the same
curve on any number of ranks. Gradients are averaged in the backward pass, by DDP or FSDP.
Evaluation inside training is the same on every rank (FSDP needs all ranks for every pass).
"""
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.cli import InputError


# --------------------------------------------------------------------------------------------------
# Ranks: who am I, who else is there, and waiting for each other

def rank_and_world():
    """(this process, number of processes), as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other ranks; from here on only rank 0 prints. Nothing to do for one process.

    Returns this rank's own device: on CUDA each has a GPU. InputError if there are too few.
    """
    rank, world = rank_and_world()
    if world == 1:
        return device
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if device.type == "cuda":
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if torch.cuda.device_count() < here:
            raise InputError(f"{here} processes, but {torch.cuda.device_count()} GPUs: lower "
                             "--nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def wait():
    """Until all ranks have come here, for a day at most: one may have far longer answers to write.

    Left to itself torch gives up after 10 minutes on CUDA, 30 on a CPU. Its patience is a group's,
    hence a new group; of gloo, since files are waited for here and no GPU has a part in it.
    """
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def total(tensor):
    """The sum of a tensor over all ranks, in place; all of them must ask."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag, device):
    """Is it so on one of the ranks? All must ask, and all get the same answer."""
    return total(torch.tensor(float(flag), device=device)) > 0


def leave():
    """The end of a run: without it torch complains.

    Gloo's threads need Python's lock to let go of the last tensors that they have summed, and torch
    2.13 holds it while it waits for these threads to end: without a pause first, in which they can
    have it, one run in ten waits for itself forever.
    """
    if dist.is_initialized():
        time.sleep(0.3)
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The model, spread over ranks

def shard(model, dtype):
    """FSDP, in place: each rank keeps a share of every matrix, and gets the others' when a block is
    about to run.

    dtype   of the passes; the shares stay fp32 in the student, for the optimiser
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def replicate(model, device):
    """DDP: a wrapper whose backward pass averages the gradients over ranks."""
    ids = [device.index] if device.type == "cuda" else None
    # the view spares a second copy of all gradients
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


# --------------------------------------------------------------------------------------------------
# A step, spread over ranks

def deal(rows, size):
    """This rank's share of a step's rows, in passes of at most `size`: a list of (rows, weight).

    The weight of a pass's gradient is the number of ranks, which average gradients and do not add
    them up. It is 0 for a pass that only keeps company: a rank that has run out of rows reads one
    again, since FSDP needs all ranks in each pass.
    """
    rank, world = rank_and_world()
    own, most = rows[rank::world], len(rows[::world])           # rank 0 has most
    passes = []
    for first in range(0, most, size):
        some = own[first:first + size]
        passes.append((some, world) if some else (rows[:1], 0))
    return passes


def average_when(model, last):
    """Gradients of several passes add up: DDP talks to the other ranks in the `last` one only.

    FSDP does after each pass, as otherwise every rank would hold gradients of the whole model.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


# --------------------------------------------------------------------------------------------------
# Saving and resuming

def whole_state(model, optimizer):
    """(weights, optimiser state) by parameter name, whole and on the CPU, however they were spread.

    All ranks must call it; on others than rank 0 the result may be empty.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=whole)


def load_optimizer(model, optimizer, state):
    """Put an optimiser state of `whole_state` back, spread as the model is now."""
    whole = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=whole)
