"""
Teach a pretrained model to write several tokens per forward pass, by self-distillation (arXiv 2602.06019).

    python train.py --k 3                                       # the tiny model, on word problems: minutes on a laptop
    python train.py --preset smollm2 --minutes 90 --out out-gsm8k                   # SmolLM2-135M on GSM8K
    python train.py --preset smollm2 --minutes 90 --out out-gsm8k --resume

The idea. Append k-1 copies of one special token, <mtp>, to a text. The pass that predicts the next token at the last
real token now also predicts, at each <mtp>, the tokens after it:

    input      x1 x2 ... xi  M  M  M          k = 4
    predicts            y1   y2 y3 y4

Trained on ground truth, each slot would learn what is likely at its place *by itself*, and the most likely words of
several places need not fit together ("the panda ate ... meat"). So the student is judged on what it wrote jointly, in
every step of training:

    1. the student reads text and masks and writes y1 .. yk, the most likely token at each slot         (rollout)
    2. a frozen copy of the starting checkpoint, an ordinary language model, reads the text with y1 .. y(k-1) in the
       masks' places, and says at each slot what *it* would have written after what the student wrote   (teacher)
    3. cross-entropy of the student's slots against the teacher's choices                               (hard targets)

Nothing is added to the network but one row of the embedding, so the result is an ordinary checkpoint. The paper's
recipe (section on training): AdamW, lr 1e-5 after 2000 steps of warm-up, 128 sequences of 160 slots, k up to 16.

Shapes: B sequences, T text tokens (padded), R regions of a sequence, L = T + R(k-1) fed tokens, N regions of the batch,
k slots of a region, V vocabulary.
"""
import argparse
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import draw_rows, encode_rows, load_data
from eval_gsm8k import extract_flexible, normalise
from model import DTYPES, Transformer, add_mask_token, machine, pick_device, pick_dtype, save_pretrained
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, new_folder, resolve, run
from regions import PADDING, attention_mask, choose_anchors, make_layout
from sample import chunks_of, generate, printable, shared_prefix
from tokenizer import Tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Objective (paper, section on the online self-distillation loss)

def hard_targets(teacher_logits, rollout, stop_ids, end_id):
    """What the teacher would have written: (N, k, V) and (N, k) -> (N, k) long.

    Slot j's target is the teacher's most likely token after y1 .. y(j-1). Behind a stop token in the rollout the
    teacher would read text after the end of the text, and has nothing to say: the targets there are `end_id`.
    """
    targets = teacher_logits.argmax(dim=-1)                                                 # (N, k)
    is_stop = torch.isin(rollout, torch.tensor(sorted(stop_ids), device=rollout.device))
    stopped = is_stop.long().cumsum(dim=1) - is_stop.long() > 0                             # a stop token before j
    return torch.where(stopped, end_id, targets)


def region_loss(student, teacher, ids, position, mask, slots, truth, mask_id, stop_ids, end_id):
    """One pass of student and teacher over a batch of regions.

    ids       (B, L) long: text, with the mask token in every other place
    slots     row and place of each prediction, (N, k) each
    truth     (N, k) long: what the text says at each slot. These are the targets where `teacher` is None, -100 where
              the text was cut; else they are not looked at
    mask_id   id of the mask token, or None where k = 1 and there is none
    returns the *sum* of the cross-entropy over all N * k slots, in nats, with a gradient for the student alone; and
            three (N, k) tensors without one: the rollout, the targets, the student's confidence in the rollout
    """
    logits = student(ids, position, mask, at=slots)                                         # (N, k, V)
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf                                                   # never a candidate
    rollout = logits.detach().argmax(dim=-1)                                                # y1 .. yk
    targets = truth
    if teacher is not None:
        with torch.no_grad():
            row, place = slots
            teacher_ids = ids.clone()
            teacher_ids[row[:, 1:], place[:, 1:]] = rollout[:, :-1]                         # y1 .. y(k-1) for the masks
            teacher_logits = teacher(teacher_ids, position, mask, at=slots)
            if mask_id is not None and mask_id < teacher_logits.shape[-1]:                  # a free row, not a new one
                teacher_logits[..., mask_id] = -torch.inf
            targets = hard_targets(teacher_logits, rollout, stop_ids, end_id)
    log_p = F.log_softmax(logits.float(), dim=-1)                                           # (N, k, V)
    loss = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    confidence = log_p.detach().gather(-1, rollout[..., None])[..., 0].exp()
    return loss, rollout, targets, confidence


# ----------------------------------------------------------------------------------------------------------------------
# What a step trains on

def draw_k_and_offset(step, args):
    """k uniform in 2..k_max and the anchors' offset uniform in 0..stride-1, drawn anew for each step from its number.

    With --curriculum N the widest k grows from 2 to k_max over the first N steps. --k 1 is 1 throughout.
    """
    rng = random.Random(f"layout/{args.seed}/{step}")
    if args.k == 1:
        return 1, rng.randrange(args.stride)
    grown = min(1.0, step / args.curriculum) if args.curriculum else 1.0
    return rng.randint(2, 2 + round(grown * (args.k - 2))), rng.randrange(args.stride)


def make_batch(encoded, k, offset, stride, mask_id, end_id, device):
    """Encoded rows -> (ids, position, mask, slots, truth) for `region_loss`, on `device`."""
    lengths = [len(text) for _, text in encoded]
    anchors = choose_anchors([prompt for prompt, _ in encoded], lengths, offset, stride)
    position, region, bound, slots = make_layout(lengths, anchors, k)
    text = torch.full((len(encoded), max(lengths) + k), end_id)             # behind its end a text goes on with the end
    for b, (_, row) in enumerate(encoded):
        text[b, :len(row)] = torch.tensor(row)
        if row[-1] != end_id:                                               # cut at --seq-len: nobody knows what follows
            text[b, len(row):] = -100
    row, place = slots
    truth = text[row, place[:, :1] + 1 + torch.arange(k)]                   # (N, k): the anchor's successors
    ids = torch.full_like(position, end_id if mask_id is None else mask_id)
    ids[:, :max(lengths)] = text[:, :max(lengths)].clamp(min=0)
    ids[region == PADDING] = end_id
    return (ids.to(device), position.to(device), attention_mask(position, region, bound).to(device),
            tuple(index.to(device) for index in slots), truth.to(device))


def learning_rate(step, args):
    """Linear warm-up, constant, linear cool-down over the last --cooldown steps, at most half of all. `step` is from 0."""
    cooldown = min(args.cooldown, args.steps // 2)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, cooldown))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation on held-out prompts: does it write several tokens per pass, and is it still the same text?

def evaluate(student, tokenizer, rows, args, mask_id):
    """Answer held-out rows with k = 1 and, for k_max > 1, at threshold 0.9. Returns a dict for the log."""
    prompts = [tokenizer.prompt(row["question"], args.prompt_format) for row in rows]

    def decode(k, threshold):
        results = generate(student, prompts, k, threshold, mask_id, tokenizer.stop_ids, args.eval_tokens)
        hits = [normalise(extract_flexible(tokenizer.decode(result.tokens))) == normalise(extract_flexible(row["answer"]))
                for result, row in zip(results, rows)]
        return results, sum(hits) / len(hits)

    plain, accuracy = decode(1, None)
    report = {"prompts": len(prompts), "accuracy_k1": accuracy}
    if args.k > 1:
        adaptive, report["accuracy"] = decode(args.k, 0.9)
        shared = sum(shared_prefix(a.tokens, b.tokens) for a, b in zip(adaptive, plain))
        report["tokens_per_forward"] = sum(r.tokens_per_forward for r in adaptive) / len(adaptive)
        report["agreement_with_k1"] = shared / sum(len(r.tokens) for r in plain)        # tokens before the first difference
        report["sample"] = "".join(f"[{len(chunk)}|{tokenizer.decode(chunk)}]" for chunk in chunks_of(adaptive[0]))
    return report


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: out/step-N is a Hugging Face folder plus trainer.pt; out/latest points to the newest

MAY_CHANGE = ("resume", "out", "cache", "steps", "minutes", "device", "micro_batch_size", "eval_every", "eval_tokens",
              "log_every", "save_every")                                        # between a run and its resumption


def save_checkpoint(out, step, student, optimizer, tokenizer, args, mask_id):
    """Write out/step-N whole or not at all, point out/latest to it, keep the last two. Returns its path."""
    folder = out / f"step-{step}"
    with new_folder(folder) as temporary:
        save_pretrained(student, temporary, args.k > 1 and {
            "mask_token_id": mask_id, "k_max": args.k, "bidirectional": False, "prompt_format": args.prompt_format,
            "data": args.data, "steps": step})
        tokenizer.save(temporary, mask_id)
        try:
            torch.save({"step": step, "args": vars(args), "optimizer": optimizer.state_dict()}, temporary / "trainer.pt")
        except RuntimeError:                                            # how torch's writer reports a short write
            raise OSError("the optimizer's state could not be written whole; is the disk full?") from None
    link = out / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(out / "latest")
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
    for name, was in state["args"].items():
        if name not in MAY_CHANGE and getattr(args, name, was) != was:
            raise InputError(f"{out} was trained with --{name.replace('_', '-')} {was}, not {getattr(args, name)}: "
                             "resume with the same settings, or start anew with another --out")
    return state


# ----------------------------------------------------------------------------------------------------------------------

# Presets: what differs from the defaults of the flags, which are those of `tiny`. `paper`: its model, data, k, optimiser and
# batch. Its sequences of 160 fed tokens hold 5 regions and 85 to 155 tokens of text (method: an interleaved layout, a
# period of 17 text tokens at k = 16); here it is up to 160 tokens of text, with a region for every 17th behind them.
PRESETS = {
    "tiny": {},
    "smollm2": dict(model="smollm2-135m", data="gsm8k", k=4, lr=2e-4, batch_size=8, micro_batch_size=4, seq_len=224,
                    steps=500, warmup=20, cooldown=120, eval_every=50, eval_prompts=8, save_every=50),
    "paper": dict(model="Qwen/Qwen3-4B-Instruct-2507", data="metamath", prompt_format="plain", k=16, stride=17, lr=1e-5,
                  warmup=2000, cooldown=0, batch_size=128, micro_batch_size=8, seq_len=160, steps=100_000,
                  eval_every=1000, eval_tokens=128, log_every=10, save_every=1000),
    "pretrain-tiny": dict(random_init=True, targets="ground-truth", k=1, stride=1, lr=3e-3, warmup=100, cooldown=2000,
                          batch_size=64, micro_batch_size=32, steps=4000, eval_every=250, eval_prompts=100,
                          log_every=10, save_every=250),
}


def get_args():
    parser, flag = ArgumentParser(prog="train.py", description=__doc__), argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to train, on what").add_argument
    add("--preset", choices=PRESETS, default="tiny", help="sets the flags below; those that are given win (%(default)s)")
    add("--model", default=DEFAULT_MODEL, help="start checkpoint: tiny, smollm2-135m, a folder or a hub id (%(default)s)")
    add("--random-init", action=flag, default=False, help="draw the weights anew: only config and tokenizer are --model's")
    add("--data", default="wordproblems", help="wordproblems, gsm8k, metamath or a JSONL file (%(default)s)")
    add("--prompt-format", choices=["plain", "chat"], help="default: chat where the model has a template")
    add("--out", default="out", help="folder for checkpoints and log.jsonl (%(default)s)")
    add("--resume", action=flag, default=False, help="go on from --out's newest checkpoint")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add = parser.add_argument_group("multi-token prediction").add_argument
    add("--k", type=int, default=8, help="k_max, most tokens per pass: each step draws k in 2..k_max (%(default)s)")
    add("--stride", type=int, default=3, help="an anchor every so many tokens of the answer (%(default)s)")
    add("--curriculum", type=int, default=0, help="widen k from 2 to k_max over the first N steps (%(default)s: off)")
    add("--targets", choices=["hard", "ground-truth"], default="hard", help="hard: what the teacher would have written; "
        "ground-truth: the text itself, as in ordinary training (%(default)s)")
    add = parser.add_argument_group("optimisation (AdamW)").add_argument
    add("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    add("--warmup", type=int, default=20, help="steps of linear warm-up (%(default)s)")
    add("--cooldown", type=int, default=300, help="last steps, linearly down to 0; at most half of all (%(default)s)")
    add("--weight-decay", type=float, default=0.1, help="on matrices only (%(default)s)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (%(default)s)")
    add("--batch-size", type=int, default=32, help="sequences per step (%(default)s)")
    add("--micro-batch-size", type=int, default=16, help="sequences per pass; gradients accumulate (%(default)s)")
    add("--seq-len", type=int, default=224, help="longest text, tokens; longer answers are cut (%(default)s)")
    add("--steps", type=int, default=700, help="the schedule follows this number (%(default)s)")
    add("--minutes", type=float, help="stop, and save, after so many minutes; the schedule does not change")
    add("--overfit", type=int, default=0, help="train on N rows only, as a sanity check (%(default)s: off)")
    add = parser.add_argument_group("evaluation, logs, machine").add_argument
    add("--eval-every", type=int, default=100, help="steps between evaluations (%(default)s; 0: none)")
    add("--eval-prompts", type=int, default=32, help="held-out prompts (%(default)s)")
    add("--eval-tokens", type=int, default=96, help="new tokens for each (%(default)s)")
    add("--log-every", type=int, default=1, help="log.jsonl gets a row about every N-th step (%(default)s)")
    add("--save-every", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the passes, auto: bf16 where that is faster; "
        "the weights stay fp32 (%(default)s)")
    args = parser.parse_args()
    parser.set_defaults(**PRESETS[args.preset])
    args = parser.parse_args()                                                  # once more: flags win over the preset
    at_least = dict(k=1, stride=1, batch_size=1, micro_batch_size=1, seq_len=8, steps=1, log_every=1, save_every=1,
                    eval_prompts=1, eval_tokens=1, warmup=0, cooldown=0, curriculum=0, overfit=0, eval_every=0)
    for name, least in at_least.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
    if args.k == 1 and args.targets == "hard":
        raise InputError("--k must be at least 2: with k = 1 there is nothing to distil (ordinary next-token training is "
                         "--k 1 --targets ground-truth)")
    if not (0 < args.lr < math.inf and args.clip > 0 and (args.minutes is None or args.minutes > 0)):
        raise InputError("--lr, --clip and --minutes must be above 0")
    if not 0 <= args.weight_decay < math.inf:
        raise InputError("--weight-decay must be at least 0")
    return args


def main():
    args = get_args()

    # --- where to: refuse before any long work what would overwrite a run or mix two up
    out = Path(args.out)
    resuming = args.resume and (out / "latest").exists()
    there = sorted(path.resolve().name for path in [*out.glob("latest"), *out.glob("step-*")])
    if there and not args.resume:
        raise InputError(f"{out} already holds {there[-1]}: add --resume to go on, or choose another --out")
    if args.resume and not resuming:
        print(f"nothing to resume in {out}: starting anew")

    # --- data and tokens
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = next(name for name, value in DTYPES.items() if value == dtype)
    start = resolve(args.model, args.cache)
    tokenizer = Tokenizer(start)
    args.prompt_format = args.prompt_format or ("chat" if tokenizer.chat else "plain")
    mask_id = tokenizer.free_id if tokenizer.mask_id is None and args.k > 1 else tokenizer.mask_id
    train, held_out = load_data(args.data, args.eval_prompts, args.seed)
    if args.overfit:
        train = held_out = [train[i] for i in range(min(args.overfit, len(train)))]
    some = [train[i] for i in range(min(100, len(train)))]
    fitting = encode_rows(some, tokenizer, args.prompt_format, args.seq_len)
    if not fitting:
        raise InputError(f"no prompt fits --seq-len {args.seq_len}: raise it")
    cut = sum(text[-1] != tokenizer.end_id for _, text in fitting)
    if cut or len(fitting) < len(some):
        print(f"note: with --seq-len {args.seq_len}, of the first {len(some)} rows {len(some) - len(fitting)} are left out "
              f"(the prompt is too long) and {cut} answers are cut")

    # --- student and frozen teacher start from the same weights; only the student gets the mask token. Ground truth as
    # targets needs no teacher, and with k = 1 there is no mask either: that is ordinary language modelling
    state = load_trainer(out, args) if resuming else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    torch.set_float32_matmul_precision("high")
    if args.random_init and not resuming:
        student = Transformer.from_scratch(start, args.seed, device)
    else:
        student = Transformer.from_pretrained(out / "latest" if resuming else start, torch.float32, device)
    teacher = None
    if args.targets == "hard":
        teacher = Transformer.from_pretrained(start, dtype, device).requires_grad_(False)
    if args.seq_len > student.config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} is beyond the model's context of "
                         f"{student.config.max_position_embeddings} tokens")
    if args.k > 1 and tokenizer.mask_id is None and not resuming:
        add_mask_token(student, mask_id, args.seed)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in student.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True)
    first_step, saved = 0, None
    if resuming:
        optimizer.load_state_dict(state.pop("optimizer"))
        first_step, saved = state["step"], (out / "latest").resolve()
    mixed = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def gradients(step):
        """Accumulate the gradient of one step's mean loss, in as many passes as --micro-batch-size asks for.

        Returns k, the loss (nats per slot), the number of fed tokens, and (3, k_max) sums for each slot: predictions,
        agreements with the teacher, confidences.
        """
        k, offset = draw_k_and_offset(step, args)
        rows = draw_rows(train, args.batch_size, step, args.seed)
        encoded = encode_rows(rows, tokenizer, args.prompt_format, args.seq_len)
        encoded.sort(key=lambda row: len(row[1]))                       # alike lengths share a pass: less padding
        batches = [make_batch(encoded[i:i + args.micro_batch_size], k, offset, args.stride, mask_id, tokenizer.end_id,
                              device) for i in range(0, len(encoded), args.micro_batch_size)]
        total = sum(truth.numel() for *_, truth in batches)              # the loss is the mean over all of the step's
        loss, sums = 0.0, torch.zeros(3, args.k)
        for batch in batches:
            with mixed():
                part, rollout, targets, confidence = region_loss(
                    student, teacher, *batch, mask_id, tokenizer.stop_ids, tokenizer.end_id)
            (part / max(1, total)).backward()
            loss += part.item() / max(1, total)
            sums[:, :k] += torch.stack([torch.ones_like(confidence), rollout == targets, confidence]).sum(dim=1).cpu()
        return k, loss, sum(ids.numel() for ids, *_ in batches), sums

    # --- say what is about to happen; the first step's gradient is computed once for its timing and thrown away
    def record(event, step, **row):
        log.write(json.dumps({"event": event, "step": step, **row}) + "\n")
        log.flush()

    settings = {"parameters": sum(p.numel() for p in student.parameters()), **vars(args), **machine(device)}
    print("\n".join(f"{name:>18}  {value}" for name, value in settings.items()))
    record("resume" if resuming else "start", first_step, **settings)
    if args.steps > first_step:
        began = time.perf_counter()
        k, _, fed, sums = gradients(first_step)
        optimizer.zero_grad(set_to_none=True)
        seconds, slots, regions = time.perf_counter() - began, int(sums[0].sum()), int(sums[0, 0]) / args.batch_size
        print(f"\nfirst step: {args.batch_size} sequences * {regions:.1f} regions * {k} slots = {slots} supervised tokens "
              f"(k is {f'drawn from 2..{args.k}' if args.k > 1 else 1}), {fed} tokens fed\n"
              f"about {slots / seconds:.0f} supervised tokens/s, {seconds:.1f} s a step, "
              f"{(args.steps - first_step) * seconds / 60:.0f} min for {args.steps - first_step} steps\n")

    def evaluate_and_record(step):
        with mixed():
            report = evaluate(student, tokenizer, held_out, args, mask_id)
        record("eval", step, minutes=minutes(), **report)
        lines = f"step {step}: {report['accuracy_k1']:.0%} of {len(held_out)} held-out problems right with k = 1"
        if args.k > 1:
            lines += (f"; at threshold 0.9 {report['accuracy']:.0%}, {report['tokens_per_forward']:.2f} tokens per forward "
                      f"and {report['agreement_with_k1']:.0%} of the text as with k = 1\n{printable(report['sample'])}")
        tqdm.write(lines + "\n")

    # --- the loop. Ctrl-C finishes the step and saves; a second one stops at once.
    interrupted = []

    def interrupt(signum, frame):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(signum)
        tqdm.write("stopping after this step (again to stop at once) ...")

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    begun, step = time.perf_counter(), first_step

    def minutes():
        return round((time.perf_counter() - begun) / 60, 3)

    if args.eval_every and not resuming:
        evaluate_and_record(0)
    bar = tqdm(total=args.steps, initial=first_step, unit="step", dynamic_ncols=True)
    while step < args.steps and not interrupted and (args.minutes is None or minutes() < args.minutes):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        k, loss, fed, sums = gradients(step)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            sys.exit(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped. The last good checkpoint is "
                     f"{saved or 'none'} (try a lower --lr)")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.perf_counter() - began
        agree, confidence = (sums[1:, :k] / sums[0, :k].clamp(min=1)).tolist()              # per slot, 1..k
        bar.update()
        slot_by_slot = ", ".join(f"{slot} {agree[slot - 1]:.0%}" for slot in sorted({1, min(2, k), k}))
        bar.set_postfix_str(f"loss {loss:.2f}, agreement at slot {slot_by_slot}, {sums[0].sum() / seconds:.0f} tokens/s")
        if step % args.log_every == 0:
            record("train", step, minutes=minutes(), k=k, loss=loss, agreement=agree, confidence=confidence, lr=group["lr"],
                   gradient_norm=norm, slots=int(sums[0].sum()), fed_tokens=fed, seconds=seconds)
        if args.eval_every and step % args.eval_every == 0:
            evaluate_and_record(step)
        if step % args.save_every == 0:
            saved = save_checkpoint(out, step, student, optimizer, tokenizer, args, mask_id)
    bar.close()
    if step > first_step and (saved is None or saved.name != f"step-{step}"):
        saved = save_checkpoint(out, step, student, optimizer, tokenizer, args, mask_id)
    record("end", step, minutes=minutes(), interrupted=bool(interrupted))
    print(f"{step} steps; the newest checkpoint is {saved} (python sample.py --model {out})")
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
