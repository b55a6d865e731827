"""
Teach a pretrained model to write several tokens per forward pass, by self-distillation.

    python train.py --k 3                               # the tiny model on word problems, a laptop
    python train.py --preset smollm2 --out out-gsm8k                # SmolLM2-135M on GSM8K, a CPU
    python train.py --preset paper --model Qwen/Qwen3-0.6B --out out-qwen               # one GPU
    python train.py --heads 4 --out out-heads           # heads on the tiny model, which stays as is
    python train.py --adapters 64 --lr 3e-3 --steps 2000 --cooldown 800     # mask tokens on it

The method is mtp.py: the student writes k tokens at once, its frozen start checkpoint, the teacher,
says what it would have written at each slot, and cross-entropy pulls the one to the other. This
file is the loop around it. All weights of the student are trained; new is only the mask token's row
of the embedding (and of an untied output matrix), so the result is an ordinary checkpoint. With
--adapters (adapters.py) the model is frozen, and its own teacher.

With --heads it is the second method, heads.py: the start checkpoint is frozen, and what is trained
are heads that draft its text in advance. Rows and steps, log and checkpoints are the same.

The paper's recipe ("Implementation details" and its appendix "Hyperparameters"): lr 1e-5 after 2000
steps of warm-up, batches of 128 sequences, k up to 16, about 100k steps. `--preset paper` has it.

Reading order: settings, what a step draws, one training step, evaluation, the loop.
"""
import functools
import math
import random
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import cli              # before torch: Ctrl-C while that is loading ends quietly

import torch

from adapters import Adapted, add_adapters, load_adapted, save_adapters
from common import parallel
from common.checkpoint import (
    Checkpoints, Log, find_run, hash_of_rows, load_trainer, restore)
from common.cli import SWITCH, ArgumentParser, InputError
from common.data import WORD_PROBLEMS, draw_rows, encode_rows, load_data
from common.files import read_json
from common.hub import DEFAULT_MODEL, knows_word_problems_alone, resolve
from common.machine import (
    DTYPES, StopSignal, cores, dtype_name, keep_freed_memory, machine, peak_memory, pick_device,
    pick_dtype)
from common.progress import Progress
from common.records import fingerprint
from common.report import acceptance_by_position, boxes, shared_text
from common.scoring import extract_flexible, gold_of, is_right
from common.tokenizer import Tokenizer
from heads import Backbone, Heads, head_loss, load_heads, make_head_batch, save_heads
from model import Config, Transformer, add_mask_token, save_pretrained
from mtp import make_batch, region_loss
from sample import generate
from speculate import speculate

# --------------------------------------------------------------------------------------------------
# Settings. A preset holds what differs from the defaults of the flags, which are those of `tiny`.

PRESETS = {
    "tiny": {},
    "smollm2": dict(
        model="smollm2-135m", data="gsm8k", k=4, lr=1e-4, warmup=60,
        batch_size=4, micro_batch_size=4, seq_len=224, steps=600, cooldown=300, eval_every=200,
        eval_prompts=8, max_new_tokens=96, save_every=40),
    # One head's weights at four depths: they learn from each row four times
    "smollm2-heads": dict(
        model="smollm2-135m", data="gsm8k", heads=4, loop=True, draft_vocab=4096, lr=2e-3,
        warmup=40, batch_size=8, micro_batch_size=8, seq_len=256, steps=1500, cooldown=500,
        eval_every=250, eval_prompts=8, max_new_tokens=128, save_every=100),
    # The paper's model, data, k, optimiser and batch. The optimiser is what the paper's text says:
    # PyTorch's AdamW as it comes, and no clipping (the authors' config: betas .9/.95, decay .1).
    # Of the paper's 160 fed tokens 85 are text at k = 16, 155 at k = 2, with 5 regions: one per 17
    # or 31 tokens of text. Here seq_len counts text alone, and the stride is 17 for every k.
    "paper": dict(
        model="Qwen/Qwen3-4B-Instruct-2507", data="metamath", prompt_format="plain", k=16,
        stride=17, lr=1e-5, beta2=0.999, weight_decay=0.01, clip=0, warmup=2000, cooldown=0,
        batch_size=128, micro_batch_size=8, seq_len=160, steps=100_000, eval_every=1000,
        max_new_tokens=128, log_every=10, save_every=1000),
    # How checkpoints/tiny was made: ordinary next-token training from random weights
    "pretrain-tiny": dict(
        random_init=True, targets="ground-truth", k=1, stride=1, lr=3e-3, warmup=100,
        cooldown=2000, batch_size=64, micro_batch_size=32, steps=4000, eval_every=250,
        eval_prompts=100, log_every=10, save_every=250),
}


def get_args():
    parser = ArgumentParser(prog="train.py", description=__doc__)
    add = parser.add_argument_group("what to train, on what").add_argument
    add("--preset", choices=PRESETS, default="tiny",
        help="sets the flags below; those that are given win (%(default)s)")
    add("--model", default=DEFAULT_MODEL,
        help="start checkpoint: tiny, smollm2-135m, a folder or a hub id (%(default)s)")
    add("--random-init", action=SWITCH, default=False,
        help="draw the student's weights anew: only config, tokenizer and teacher are --model's")
    add("--data", default="wordproblems",
        help="wordproblems, gsm8k, metamath or a JSONL file (%(default)s)")
    add("--limit", type=int, help="train on the first N rows only (a few: can it learn at all?)")
    cli.add_prompt_format_flag(add, default="chat where the model has a template")
    add("--out", default="out", help="folder for checkpoints and log.jsonl (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on from --out's newest checkpoint")

    group = parser.add_argument_group("multi-token prediction: one of two methods")
    add = group.add_mutually_exclusive_group().add_argument
    add("--k", type=int, default=8,
        help="mask tokens (mtp.py): k_max, the most tokens that a pass will ever write; sample.py "
        "--k says how many of them it does write (%(default)s)")
    add("--heads", type=int, metavar="K",
        help="K heads (heads.py) on the model as it is, which is frozen: its text stays the same")

    add = group.add_argument
    add("--targets", choices=["hard", "soft", "ground-truth"], default="hard",
        help="hard: what the start model would have written; soft: its distribution (heads: see "
        "--kl-weight); ground-truth: the text itself, as in ordinary training (%(default)s)")

    add = parser.add_argument_group("with mask tokens").add_argument
    add("--fixed-k", action=SWITCH, default=False,
        help="each step takes k_max itself, not a k drawn from 2..k_max")
    add("--curriculum", type=int, default=0,
        help="widen k from 2 to k_max over the first N steps (%(default)s: off)")
    add("--stride", type=int, default=3,
        help="an anchor every so many tokens of the answer (%(default)s)")
    add("--slot1-weight", type=cli.number, default=1.0,
        help="of slot 1 in the loss; above 1 the text of k = 1 keeps closer to the start's "
        "(%(default)s)")
    add("--prefix-loss", type=cli.number, default=0.0,
        help="weight of ordinary next-token training on the answers beside the loss, a mean over "
        "their tokens; the authors also count the prompts' (%(default)s)")
    add("--adapters", type=int, metavar="RANK",
        help="freeze the model and train low-rank adapters that act at mask tokens alone "
        "(adapters.py): its text stays the same")
    add("--merge-start", action=SWITCH, default=False,
        help="save the start model's weights beside the adapters: one folder has all")
    add("--bidirectional", action=SWITCH, default=False,
        help="mask tokens of a region see each other both ways; the anchor stays causal, which the "
        "authors' does not")

    add = parser.add_argument_group("with heads").add_argument
    add("--loop", action=SWITCH, default=False, help="one head's weights serve all depths")
    add("--extend", action=SWITCH, default=False,
        help="--model has half as many heads: copy them behind themselves, train the copies only")
    add("--kl-weight", type=cli.number, default=1.0,
        help="of the distance to the model's distribution, beside cross-entropy (%(default)s)")
    add("--kl-top", type=int, default=256,
        help="that distance is among the model's N most likely tokens (%(default)s)")
    add("--draft-vocab", type=int, default=0,
        help="draft only the N most frequent tokens of the rows (%(default)s: any)")
    add("--keep-gb", type=cli.number, default=4.0,
        help="memory for hidden states of rows that come again (%(default)s; 0: read them again)")

    add = parser.add_argument_group("optimisation (AdamW)").add_argument
    add("--lr", type=cli.number, default=1e-3, help="peak learning rate (%(default)s)")
    add("--warmup", type=int, default=20, help="steps of linear warm-up (%(default)s)")
    add("--cooldown", type=int, default=300,
        help="last steps, linearly down to 0; at most half of all (%(default)s)")
    add("--beta2", type=cli.number, default=0.95, help="of AdamW, beside 0.9 (%(default)s)")
    add("--weight-decay", type=cli.number, default=0.1, help="on matrices only (%(default)s)")
    add("--clip", type=cli.number, default=1.0, help="largest gradient norm (%(default)s; 0: any)")
    add("--batch-size", type=int, default=32, help="sequences per step (%(default)s)")
    add("--micro-batch-size", type=int, default=16,
        help="sequences per pass; gradients accumulate (%(default)s)")
    add("--seq-len", type=int, default=224,
        help="longest text, tokens; longer answers are cut (%(default)s)")
    add("--steps", type=int, default=700, help="the schedule follows this number (%(default)s)")
    add("--minutes", type=cli.number,
        help="stop, and save, after so many minutes; the schedule does not change")

    add = parser.add_argument_group("evaluation, logs, machine").add_argument
    add("--eval-every", type=int, default=100,
        help="steps between evaluations on held-out prompts (%(default)s; 0: none)")
    add("--eval-prompts", type=int, default=32,
        help="how many of them, of a file a fifth at most (%(default)s; 0: train on all rows)")
    add("--max-new-tokens", type=int, default=96, help="for each of them (%(default)s)")
    add("--log-every", type=int, default=1,
        help="log.jsonl gets a row about every N-th step (%(default)s)")
    add("--save-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--fsdp", action=SWITCH, default=False,
        help="several GPUs: each holds a share of the models, not all of them")
    add("--compile", action=SWITCH, default=False,
        help="torch.compile: minutes first, faster steps on a GPU")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    parser.set_defaults(**PRESETS[args.preset])
    args = parser.parse_args()                              # once more: flags win over the preset
    check_args(args)
    check_method(args, parser)
    return args


def check_args(args):
    """InputError for a value that no training can mean."""
    cli.at_least(args, k=1, stride=1, batch_size=1, micro_batch_size=1, seq_len=8, steps=1, limit=1,
                 log_every=1, save_every=1, eval_prompts=0, max_new_tokens=1, warmup=0, cooldown=0,
                 curriculum=0, eval_every=0, weight_decay=0, prefix_loss=0, slot1_weight=0, clip=0,
                 lr=0, minutes=0, heads=1, kl_weight=0, kl_top=1, draft_vocab=0, keep_gb=0,
                 adapters=1)
    if args.lr == 0 or args.minutes == 0:
        raise InputError("--lr and --minutes must be above 0")
    if not 0 < args.beta2 < 1:
        raise InputError("--beta2 must lie between 0 and 1")
    if args.k == 1 and args.targets != "ground-truth" and not args.heads:
        raise InputError("--k must be at least 2: with k = 1 there is nothing to distil (ordinary "
                         "next-token training is --k 1 --targets ground-truth)")
    if args.stride > args.seq_len:
        raise InputError("--stride above --seq-len leaves nearly all rows without an anchor")
    if args.eval_prompts == 0:
        args.eval_every = 0
    if args.fsdp and not args.heads and parallel.rank_and_world()[1] == 1:
        raise InputError("--fsdp spreads a model over several processes: "
                         "torchrun --nproc_per_node=4 train.py --fsdp ...")


def check_method(args, parser):
    """Flags of the other method, which would do nothing, are InputErrors."""
    others = ["loop", "extend", "kl_weight", "kl_top", "draft_vocab", "keep_gb"]
    if args.heads:
        others = ["adapters", "fixed_k", "curriculum", "stride", "slot1_weight", "prefix_loss",
                  "bidirectional", "fsdp"]
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            method = "mask tokens" if args.heads else "heads"
            raise InputError(f"--{name.replace('_', '-')} belongs to training with {method}: "
                             + ("leave it out, or --heads" if args.heads else "add --heads K"))
    if args.heads and args.k != parser.get_default("k"):
        raise InputError("--k trains mask tokens, and this preset heads: leave one out")
    if args.heads and args.random_init:                     # of the preset pretrain-tiny, too
        raise InputError("--random-init leaves heads no model to learn from: leave out --heads")
    if args.adapters and (args.k == 1 or args.random_init or args.prefix_loss
                          or args.slot1_weight != 1):
        raise InputError("--adapters leaves the text as it is: it goes with --k above 1, and not "
                         "with --random-init, --prefix-loss or --slot1-weight")
    if args.merge_start and not args.adapters:
        raise InputError("--merge-start belongs to --adapters RANK: what else is trained is saved "
                         "whole anyway")
    if args.extend and (args.loop or args.draft_vocab):
        raise InputError("--extend copies heads as they are: leave out --loop and --draft-vocab")
    if args.heads and args.targets == "soft":
        raise InputError("--targets soft: with --heads the model's distribution is --kl-weight")


# --------------------------------------------------------------------------------------------------
# What changes from step to step, each drawn from (seed, step) alone: a resumed run draws the same

def draw_k_and_offset(step, args):
    """k uniform in 2..k_max, and the anchors' offset uniform in 0..stride-1, independently.

    With --curriculum N the widest k grows from 2 to k_max over the first N steps. With --fixed-k it
    is always the widest; one is drawn all the same, so that the offsets are those without the flag.
    """
    rng = random.Random(f"layout/{args.seed}/{step}")
    grown = min(1.0, step / args.curriculum) if args.curriculum else 1.0
    widest = 2 + round(grown * (args.k - 2)) if args.k > 1 else 1
    k = rng.randint(min(2, widest), widest)
    return widest if args.fixed_k else k, rng.randrange(args.stride)


def learning_rate(step, args):
    """Linear warm-up, constant, linear cool-down over the last --cooldown steps; `step` from 0."""
    up = (step + 1) / max(1, args.warmup)
    down = (args.steps - step) / max(1, min(args.cooldown, args.steps // 2))
    return args.lr * min(1.0, up, down)


# --------------------------------------------------------------------------------------------------
# One training step

class Step(NamedTuple):
    """What the log says of a step. Per slot, or head: lists of k floats."""
    k: int                          # slots of a region, or heads
    loss: float                     # nats: what is minimised
    slots: int                      # supervised tokens
    fed_tokens: int                 # by student and teacher each
    agreement: list                 # per slot: how often the student's token is the target
    confidence: list                # per slot: its mean probability of what it wrote
    lr: float
    gradient_norm: float            # before clipping
    seconds: float


def slots_of(batch, teacher, args):
    """(supervised slots, tokens of the prefix loss) of a batch: two ints."""
    known = int((batch.truth != -100).sum())
    if args.heads:
        return known, 0
    # without a teacher, a slot counts where the text goes on
    return batch.truth.numel() if teacher else known, len(batch.next_token)


def gradients(step, student, teacher, train, tokenizer, args):
    """Add up the gradient of step `step`, whose loss is a mean over all its slots, on all ranks.

    Neither the number of passes nor that of ranks changes what is computed. Returns what Step has
    up to `confidence`.
    """
    # --- 1. Every rank draws the same k, offset and rows, and takes its share of these, in passes.
    # `deal` gives each pass a weight: the number of ranks, since DDP and FSDP average gradients
    # over ranks and we want the sum; or 0, where a rank has run out of rows and reads one again,
    # since FSDP needs all ranks in each pass.
    device = next(student.parameters()).device
    k, offset = draw_k_and_offset(step, args)
    k = args.heads or k                                     # all heads, in every step
    rows = draw_rows(train, args.batch_size, step, args.seed)
    # prompts that are too long are left out, answers are cut
    encoded = encode_rows(rows, tokenizer, args.prompt_format, args.seq_len)
    encoded.sort(key=lambda row: len(row[1]))               # alike lengths share a pass
    passes = []
    for share, weight in parallel.deal(encoded, args.micro_batch_size):
        if args.heads:
            batch = make_head_batch(share, getattr(student, "module", student), device)
        else:
            batch = make_batch(share, k, offset, args.stride, tokenizer, device,
                               args.bidirectional, prefix=args.prefix_loss > 0)
        passes.append((batch, weight))

    # --- 2. The loss is a mean over the whole step, so count first: its slots, and the tokens of
    # the prefix loss
    counts = torch.zeros(2, dtype=torch.long)
    for batch, weight in passes:
        counts += torch.tensor(slots_of(batch, teacher, args)) * (weight > 0)
    total_slots, prefix_tokens = parallel.total(counts.to(device)).clamp(min=1).tolist()

    # --- 3. Forward and backward, pass by pass
    loss_and_fed, per_slot = torch.zeros(2), torch.zeros(3, k)
    for n, (batch, weight) in enumerate(passes, 1):
        parallel.average_when(student, last=n == len(passes))       # DDP: in the last pass only
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            if args.heads:
                loss, seen = head_loss(
                    student, teacher, batch, tokenizer.mask_id, total_slots,
                    ground_truth=args.targets == "ground-truth", kl_weight=args.kl_weight,
                    kl_top=args.kl_top)
            else:
                loss, seen = region_loss(
                    student, teacher, batch, tokenizer, total_slots, soft=args.targets == "soft",
                    slot1_weight=args.slot1_weight, prefix_weight=args.prefix_loss,
                    prefix_tokens=prefix_tokens)
        (weight * loss).backward()
        if weight:
            loss_and_fed += torch.tensor([loss.item(), batch.ids.numel()])
            has_target = seen.targets != -100                                       # (N, k)
            agrees = seen.rollout == seen.targets
            confidence = has_target * seen.confidence
            per_slot += torch.stack((has_target, agrees, confidence)).sum(dim=1).cpu()

    # --- 4. Add up over ranks, for the log
    loss, fed = parallel.total(loss_and_fed.to(device)).tolist()
    count, agreed, confidence = parallel.total(per_slot.to(device)).cpu()               # (k,) each
    return (k, loss, int(count.sum()), int(fed), (agreed / count.clamp(min=1)).tolist(),
            (confidence / count.clamp(min=1)).tolist())


def training_step(step, student, teacher, optimizer, train, tokenizer, args):
    """One step: gradients, clipping, AdamW. Returns a Step.

    Raises FloatingPointError, before the weights move, where loss or gradient are not finite.
    """
    began = time.perf_counter()
    lr = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    k, loss, *counted = gradients(step, student, teacher, train, tokenizer, args)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
    norm = (norm.full_tensor() if args.fsdp else norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(k, loss, *counted, lr, norm, time.perf_counter() - began)


def arithmetic(step, done, args):
    """What a Step was made of, in words."""
    agreement = ("\nagreement: how often a token is the start model's, at {} 1, 2 and the last of "
                 "a step\n")
    if args.heads:
        return (f"step {step}: {args.batch_size} sequences, {done.k} heads, {done.slots} "
                f"supervised tokens, {done.fed_tokens} tokens read" + agreement.format("heads"))
    regions = done.slots / done.k / args.batch_size
    return (f"step {step}, k = {done.k}: {args.batch_size} sequences * {regions:.1f} regions * "
            f"{done.k} slots = {done.slots} supervised tokens, {done.fed_tokens} tokens fed"
            + agreement.format("slots"))


def progress(done):
    """The numbers that matter, in a line of 80 columns: of slots (or heads) 1, 2 and the last."""
    shares = " ".join(f"{done.agreement[slot - 1]:.0%}"
                      for slot in sorted({1, min(2, done.k), done.k}))
    return f"k {done.k}, loss {done.loss:.2f}, agreement {shares}"


# --------------------------------------------------------------------------------------------------
# Evaluation on held-out prompts: several tokens per pass? And still the text that k = 1 writes?

def evaluate(student, teacher, tokenizer, rows, args):
    """Answer held-out rows with k = 1 and with several tokens per pass. A dict for the log.

    Mask tokens: at threshold 0.9, for k_max > 1. Heads: draft and verify, which writes what k = 1
    writes.
    """
    model = teacher.model if args.heads else student
    prompts = [tokenizer.prompt(row["question"], args.prompt_format) for row in rows]
    golds = [gold_of(row["answer"]) for row in rows]

    def answer(decode, *way, **more):
        # FSDP gathers no weights in inference mode: take the function from under its decorator
        decode = torch.no_grad()(decode.__wrapped__) if args.fsdp else decode
        results = decode(model, tokenizer, prompts, *way, max_new_tokens=args.max_new_tokens,
                         **more)
        texts = [tokenizer.decode(result.tokens) for result in results]
        hits = [is_right(extract_flexible(text), gold) for text, gold in zip(texts, golds)]
        return results, sum(hits) / len(hits)

    report = {"prompts": len(prompts)}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        if args.heads:
            chunked, report["accuracy_k1"] = answer(speculate, args.heads + 1, heads=student)
            report["acceptance"] = acceptance_by_position(chunked)      # of draft 1, 2, ...
        else:
            plain, report["accuracy_k1"] = answer(generate)
            if args.k == 1:
                return report
            chunked, report["accuracy"] = answer(generate, args.k, 0.9)
            # share of k = 1's tokens before the first difference
            report["agreement_with_k1"] = shared_text([a.tokens for a in chunked],
                                                      [a.tokens for a in plain])
    rates = [result.tokens_per_forward for result in chunked]
    report["tokens_per_forward"] = sum(rates) / len(rates)
    report["question"], report["sample"] = rows[0]["question"], boxes(tokenizer, chunked[0])
    return report


def in_words(step, report):
    """An evaluation, for people."""
    line = (f"step {step}: {report['accuracy_k1']:.0%} of {report['prompts']} held-out problems "
            "right with k = 1")
    if "accuracy" in report:
        line += (f"; at threshold 0.9 {report['accuracy']:.0%}, {report['tokens_per_forward']:.2f} "
                 f"tokens per forward, {report['agreement_with_k1']:.0%} of the text before the "
                 "first difference from k = 1")
    if "acceptance" in report:
        stood = ", ".join(f"{share:.0%}" for share in report["acceptance"])
        line += (f"; the same text at {report['tokens_per_forward']:.2f} tokens per forward; draft "
                 f"1, 2, ... stood in {stood}")
    if "sample" in report:
        line += f"\n{cli.printable(report['question'])}\n{report['sample']}"
    return line + "\n"


# --------------------------------------------------------------------------------------------------
# Training

def check_lengths(train, tokenizer, start, args):
    """Does --seq-len suit model and data? Looks at the first 100 rows; InputError if none fits."""
    context = Config.from_dict(read_json(start / "config.json")).max_position_embeddings
    if args.seq_len > context:
        raise InputError(f"--seq-len {args.seq_len} is beyond the model's context of {context} "
                         "tokens")
    if max(args.k, args.heads or 0) >= context:
        raise InputError(f"--k or --heads is beyond the model's context of {context} tokens")
    some = [train[i] for i in range(min(100, len(train)))]
    fitting = encode_rows(some, tokenizer, args.prompt_format, args.seq_len)
    if not fitting:
        raise InputError(f"no prompt fits --seq-len {args.seq_len}: raise it")
    cut = sum(ids[-1] != tokenizer.end_id for _, ids in fitting)
    if cut or len(fitting) < len(some):
        print(f"note: with --seq-len {args.seq_len}, of the first {len(some)} rows "
              f"{len(some) - len(fitting)} are left out (the prompt is too long) and {cut} answers "
              "are cut")


def load_models(start, folder, tokenizer, args, device):
    """(student, teacher): the student as it is in `folder`, in fp32; the teacher is the start.

    Only the student gets the mask token. Ground truth as targets needs no teacher, and with k = 1
    there is no mask token either: that is ordinary language modelling.
    """
    if args.random_init and folder == start:
        student = Transformer.from_scratch(start, args.seed, device)
    else:
        student = Transformer.from_pretrained(folder, torch.float32, device)
    teacher = None
    if args.targets != "ground-truth":
        teacher = Transformer.from_pretrained(start, DTYPES[args.dtype], device)
        teacher.requires_grad_(False)
    for name in ("num_mtp_layers", "mtp_layer_types"):      # the start's heads, if any, stay behind
        student.config.raw.pop(name, None)
    if args.k > 1:
        fresh = tokenizer.mask_id is None                   # the start checkpoint has none
        tokenizer.add_mask_token()
        if fresh and folder == start:
            add_mask_token(student, tokenizer.mask_id, args.seed)
        note_for_masks(student.config.raw, tokenizer, args)
    return student, teacher


def load_for_adapters(start, folder, tokenizer, args, device):
    """(student, teacher): one model, which is both; adapters as they are in `folder`, in fp32."""
    dtype, fresh = DTYPES[args.dtype], tokenizer.mask_id is None
    tokenizer.add_mask_token()
    if folder == start:
        student = Adapted.from_pretrained(start, dtype, device)
        if fresh:
            add_mask_token(student, tokenizer.mask_id, args.seed)
        add_adapters(student, args.adapters, tokenizer.mask_id, args.seed)
    else:
        student = load_adapted(folder, dtype, device)
    note_for_masks(student.config.raw, tokenizer, args)
    return student, student if args.targets != "ground-truth" else None


def note_for_masks(raw, tokenizer, args):
    """Write into a config.json, a dict, what it tells who decodes."""
    raw["nanomtp"] = {
        "mask_token_id": tokenizer.mask_id, "k_max": args.k, "bidirectional": args.bidirectional,
        "prompt_format": args.prompt_format, "data": args.data}
    if args.adapters:                   # a rank; in the folder adapters/ beside this
        raw["nanomtp"]["adapters"] = args.adapters
    elif not args.bidirectional:        # what vLLM and TensorRT-LLM call it, which draft causally
        raw["pard_token"] = tokenizer.mask_id


def load_for_heads(start, folder, train, tokenizer, args, device):
    """(heads, the frozen Backbone that they are for): heads as they are in `folder`, in fp32."""
    model = Transformer.from_pretrained(start, DTYPES[args.dtype], device)
    heads = load_heads(folder, torch.float32, device)
    if args.extend:
        trained = load_heads(start)
        if trained is None or trained.loop or 2 * trained.depth != args.heads:
            has = "a looped head" if trained and trained.loop else (
                f"{trained.depth} heads" if trained else "no heads")
            raise InputError(f"--extend --heads {args.heads} needs a --model with half as many "
                             f"heads, not looped; {args.model} has {has}")
        heads = heads if folder != start else heads.extend()
        heads.freeze(args.heads // 2)
    elif folder == start:
        heads = Heads(model.config, args.heads, args.loop).initialise(args.seed).to(device)
        if args.draft_vocab:
            heads.draft_ids = most_frequent_ids(train, tokenizer, args)
    heads.config = model.config                             # one config.json for both
    heads.config.raw["nanomtp"] = {                         # a note in config.json for who decodes
        "k_max": args.heads + 1, "heads": args.heads, "loop": args.loop,
        "prompt_format": args.prompt_format, "data": args.data}
    comes_again = args.steps * args.batch_size > len(train)
    return heads, Backbone(model, args.keep_gb if comes_again else 0)


def most_frequent_ids(train, tokenizer, args, rows=10_000):
    """The draft vocabulary, (n,) long: the --draft-vocab most frequent tokens of the first rows."""
    some = [train[i] for i in range(min(rows, len(train)))]
    counts = Counter()
    for _, ids in encode_rows(some, tokenizer, args.prompt_format, args.seq_len):
        counts.update(ids)
    return torch.tensor(sorted(token for token, _ in counts.most_common(args.draft_vocab)))


def spread(student, teacher, args, device):
    """FSDP, torch.compile, DDP, where asked for. Returns what to call instead of the student."""
    frozen = teacher.model if args.heads else teacher           # a Backbone holds a Transformer
    models = {model: None for model in (student, frozen) if model is not None}      # each once
    for model in models:
        if args.fsdp:
            parallel.shard(model, DTYPES[args.dtype])
        if args.compile:                        # in place: parameters keep the checkpoint's names
            model.compile(dynamic=True)
    if parallel.rank_and_world()[1] > 1 and not args.fsdp:
        return parallel.replicate(student, device)
    return student


def make_optimizer(model, args):
    """AdamW, with weight decay on matrices and none on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, args.beta2), fused=True)


def main():
    args = get_args()
    out = Path(args.out)
    resuming = find_run(out, args.resume)                   # refuses what would overwrite a run
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    device = parallel.join(pick_device(args.device))        # from here on only rank 0 says anything
    rank, world = parallel.rank_and_world()
    args.dtype = dtype_name(pick_dtype(args.dtype, device))

    # --- data and tokens
    start = resolve(args.model)
    if (start / "adapters" / "adapter_config.json").exists():
        raise InputError(f"{args.model} holds adapters: give --model their start checkpoint")
    tokenizer = Tokenizer(start)
    args.prompt_format = args.prompt_format or tokenizer.default_format
    train, held_out = load_data(args.data, args.eval_prompts, args.seed)
    if args.limit:
        train = [train[i] for i in range(min(args.limit, len(train)))]
    cli.say(f"{args.data}: {len(train):,} rows to train on, {len(held_out)} questions held out")
    check_lengths(train, tokenizer, start, args)
    if args.data not in WORD_PROBLEMS and knows_word_problems_alone(tokenizer):
        cli.say(f"note: {args.model} knows word problems alone, and self-distillation teaches it "
                "no more: for rows of your own take --model smollm2-135m, or your checkpoint")
    inputs = {"data": hash_of_rows(train)}                  # beside the flags; the same on --resume
    if not args.random_init:
        inputs["start weights"] = fingerprint(start)

    # --- student, frozen teacher, optimiser; nothing is written before all of it fits
    state = load_trainer(out, args, inputs) if resuming else {"step": 0, "checkpoints": []}
    folder = out / "latest" if resuming else start
    if args.heads:
        student, teacher = load_for_heads(start, folder, train, tokenizer, args, device)
        save = functools.partial(save_heads, student, teacher.model, start)
    elif args.adapters:
        student, teacher = load_for_adapters(start, folder, tokenizer, args, device)
        save = functools.partial(save_adapters, student, start, args.model, args.merge_start)
    else:
        student, teacher = load_models(start, folder, tokenizer, args, device)
        save = functools.partial(save_pretrained, student)
    cores.look(wait=0)                                      # fewer threads beside other programs
    settings = {"parameters": sum(p.numel() for p in student.parameters()), **vars(args),
                "processes": world, **machine(device)}
    wrapped = spread(student, teacher, args, device)
    optimizer = make_optimizer(student, args)
    if resuming:
        restore(state, student, optimizer)
        cli.say(f"going on from {out}/step-{state['step']}")
    step, checkpoints = state["step"], Checkpoints(out, args, inputs, state["checkpoints"])
    log = Log(out)                                          # from here on `out` is ours alone
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    cli.say(textwrap.fill(listed, 100, break_on_hyphens=False, break_long_words=False) + "\n")
    log.record("resume" if resuming else "start", step, **settings)

    # --- the loop, until Ctrl-C or the time is up; all ranks stop after the same step
    first, stop = step, StopSignal(args.minutes)
    bar = Progress(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while True:
        due = args.eval_every and (step % args.eval_every == 0 or step == args.steps)
        if due and (step > first or step == 0):
            with bar.aside(args.eval_every):
                report = evaluate(student, teacher, tokenizer, held_out, args)
            bar.write(in_words(step, report))
            log.record("eval", step, minutes=stop.minutes, **report)
        if step > first and step % args.save_every == 0:
            checkpoints.save(step, save, student, optimizer, tokenizer)
        if step == args.steps or parallel.any_rank(stop.asked, device):
            break
        cores.look()
        try:
            done = training_step(step, wrapped, teacher, optimizer, train, tokenizer, args)
        except FloatingPointError as error:
            bar.close()
            sys.exit(f"step {step + 1}: {error}; stopped. The last good checkpoint is "
                     f"{checkpoints.newest or 'none'} (try a lower --lr)")
        step += 1
        if step == first + 1:
            bar.write(arithmetic(step, done, args))
        bar.update()
        bar.lap(left=args.steps - step)
        bar.say(progress(done))
        if step % args.log_every == 0:
            log.record("train", step, minutes=stop.minutes, **done._asdict())
    bar.close()

    # --- the end: nothing is lost
    if step > first and step % args.save_every:
        checkpoints.save(step, save, student, optimizer, tokenizer)
    log.record("end", step, minutes=stop.minutes, interrupted=stop.interrupted,
               peak_memory_gb=peak_memory(device))
    saved = checkpoints.newest
    newest = f"the newest checkpoint is {saved} (python sample.py --model {out})"
    cli.say(f"{step} of {args.steps} steps; " + (newest if saved else "nothing is saved"))
    if step < args.steps:
        print("to go on: the same command with --resume")
    parallel.leave()
    if stop.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, resumes=True)
