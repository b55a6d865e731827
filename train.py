"""
Teach a pretrained model to write several tokens per forward pass, by self-distillation (arXiv 2602.06019).

    python train.py --k 3                                       # the tiny model, on word problems: minutes on a laptop
    python train.py --preset smollm2 --minutes 90 --out out-gsm8k                   # SmolLM2-135M on GSM8K
    python train.py --preset smollm2 --minutes 90 --out out-gsm8k --resume

The idea. Append k-1 copies of one special token, <|mtp|>, to a text. The pass that predicts the next token at the last
real token now also predicts, at each <|mtp|>, the token that comes one position after it:

    position   i       i+1     i+2     i+3
    input      xi      <|mtp|> <|mtp|> <|mtp|>          k = 4
    predicts   y1      y2      y3      y4               for positions i+1, i+2, i+3, i+4

Trained on ground truth, each slot would learn what is likely at its position *by itself*, and the most likely words of
several positions need not fit together: where "7 apples" and "5 books" are both good answers, "7 books" is not. So the
student is judged on what it wrote jointly, in every step of training:

    1. the student reads text and masks and writes y1 .. yk, the most likely token at each slot         (rollout)
    2. a frozen copy of the starting checkpoint, an ordinary language model, reads the text with y1 .. y(k-1) in the
       masks' places, and says at each slot what *it* would have written after what the student wrote   (teacher)
    3. cross-entropy of the student's slots against the teacher's choices                               (hard targets)

All of the student's weights are trained; new is only the mask token's row of the embedding (and of the output matrix,
where that is another one), so the result is an ordinary checkpoint. The paper's recipe (section on training): AdamW, lr
1e-5 after 2000 steps of warm-up, batches of 128 sequences, k up to 16.

Words: an *anchor* is the last text token that a problem sees; anchor and masks together are its *region*; the k places
where predictions are read, the anchor first, are its *slots* (regions.py draws them).

Shapes: B sequences, T text tokens (padded), R regions of a sequence, L = T + R(k-1) fed tokens, N regions of the batch,
k slots of a region, M any number of slots, P text tokens of the prefix loss, C hidden size, V vocabulary.
"""
import argparse
import functools
import json
import math
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import draw_rows, encode_rows, load_data
from eval_gsm8k import extract_flexible, gold_of, is_right
from extras import parallel
from extras.checkpoint import find_run, load_trainer, open_log, restore, save_checkpoint
from extras.machine import DTYPES, keep_freed_memory, machine, peak_memory, pick_device, pick_dtype
from extras.report import chunks_of, printable, shared_prefix
from model import Transformer, add_mask_token
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, resolve, run
from regions import choose_anchors, make_batch
from sample import generate
from tokenizer import Tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Objective (paper, section on the online self-distillation loss)

CHUNK = 1024                # slots whose logits exist at the same time: 1024 * 150k ids * 4 bytes are 0.6 GB


def output_layer(model, mask_id):
    """What turns the model's hidden states into logits: the output matrix (V, C), and a bias (V,) that takes the mask token
    (None: there is none) out of the candidates."""
    matrix = model.output_matrix
    bias = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if mask_id is not None and mask_id < len(matrix):                       # a teacher whose matrix did not grow lacks it
        bias[mask_id] = -1e30                   # finite on purpose: -inf would make p * log p = 0 * -inf, which is NaN
    return matrix, bias


@torch.no_grad()
def most_likely(hidden, layer):
    """The most likely token at each slot, and its probability: (M, C) -> (M,) long and (M,) fp32."""
    tokens, probabilities = [], []
    for portion in hidden.split(CHUNK):
        logits = F.linear(portion, *layer).float()                          # (CHUNK, V)
        top, token = logits.max(dim=-1)
        tokens.append(token)
        probabilities.append((top - logits.logsumexp(dim=-1)).exp())
    return torch.cat(tokens), torch.cat(probabilities)


def hard_loss(hidden, layer, targets):
    """Sum over slots of -log p(target), in nats: (M, C) and (M,) long -> scalar. A target of -100 counts nothing.

    `linear_cross_entropy` is the output layer and cross-entropy in one, in portions: logits (M, V) never exist as a whole.
    """
    matrix, bias = layer
    return F.linear_cross_entropy(hidden.float(), matrix.float(), targets, linear_bias=bias.float(), reduction="sum",
                                  ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK))


def soft_loss(hidden, layer, teacher_hidden, teacher_layer):
    """Sum over slots of -sum_v p_T(v) log p_S(v): (M, C) and the teacher's (M, C) -> scalar, in nats.

    That is KL(p_T || p_S) plus the teacher's entropy, which has no gradient. Portions are computed again in the backward
    pass (`checkpoint`), so that only one portion's logits exist at a time here, too.
    """
    def portion_loss(hidden, teacher_hidden):
        p = F.linear(teacher_hidden, *teacher_layer).float().softmax(dim=-1)                # (CHUNK, V)
        log_p = F.linear(hidden, *layer).float().log_softmax(dim=-1)
        return -(p * log_p[:, :p.shape[1]]).sum()                           # the student may have one row more: the mask's

    portions = zip(hidden.split(CHUNK), teacher_hidden.split(CHUNK))
    return sum(checkpoint(portion_loss, *portion, use_reentrant=False) for portion in portions)


def behind_stop(rollout, stop_ids):
    """(N, k) bool: the slots behind a stop token of the rollout; the slot that wrote it is not among them.

        rollout      five  STOP  three  STOP  six
        behind       no    no    yes    yes   yes
    """
    is_stop = torch.isin(rollout, torch.tensor(sorted(stop_ids), device=rollout.device)).long()
    return is_stop.cumsum(dim=1) - is_stop > 0


def region_loss(student, teacher, batch, mask_id, stop_ids, end_id, soft=False, slot1_weight=1.0):
    """The student writes, the teacher reads what was written, and the loss lies between: one pass of each over a Batch.

    teacher         None: the targets are the batch's `truth`. Else what the teacher would have written at slot j after the
                    student's y1 .. y(j-1): its most likely token or, `soft`, its distribution
    mask_id         id of the mask token, or None where k = 1 and there is none
    stop_ids        behind one of these in the rollout the teacher would read text after the end of the text, and has nothing
                    to say. The target there is `end_id`, so that a chunk that holds the end stays filled up with it
    slot1_weight    of slot 1 (the ordinary next token) in the sum over slots; above 1 it keeps k = 1 near the start
                    checkpoint. Not in the paper
    returns         loss      scalar: cross-entropy in nats, *summed* over all N * k slots; a gradient for the student alone
                    prefix    scalar: the same over all P text tokens (paper, section on ablations: the prefix loss)
                    rollout   (N, k) long: what the student wrote
                    targets   (N, k) long: the most likely targets
                    confidence  (N, k) fp32: the student's probabilities of the rollout
    """
    # --- 1. rollout: hidden states at all N * k slots and, behind them, at the P text tokens of the prefix loss
    row, place = batch.slots
    where = torch.cat((row.flatten(), batch.prefix[0])), torch.cat((place.flatten(), batch.prefix[1]))
    hidden = student(batch.ids, batch.position, batch.mask, at=where, head=False)           # (N * k + P, C)
    hidden, prefix_hidden = hidden.split((row.numel(), len(batch.next_token)))
    layer = output_layer(getattr(student, "module", student), mask_id)                      # DDP wraps the model
    rollout, confidence = (x.view_as(row) for x in most_likely(hidden.detach(), layer))     # y1 .. yk

    # --- 2. targets
    if teacher is None:
        targets, by_distribution = batch.truth, torch.zeros_like(rollout, dtype=torch.bool)
    else:
        with torch.no_grad():
            teacher_ids = batch.ids.clone()
            teacher_ids[row[:, 1:], place[:, 1:]] = rollout[:, :-1]                         # y1 .. y(k-1) for the masks
            teacher_hidden = teacher(teacher_ids, batch.position, batch.teacher_mask, at=batch.slots, head=False)
            teacher_hidden = teacher_hidden.flatten(0, 1)                                   # (N * k, C)
            teacher_layer = output_layer(teacher, mask_id)
            ended = behind_stop(rollout, stop_ids)
            targets = most_likely(teacher_hidden, teacher_layer)[0].view_as(row).masked_fill(ended, end_id)
            by_distribution = ~ended & soft                                                 # (N, k)

    # --- 3. loss
    def loss_at(chosen):                                                                    # (N, k) bool -> their sum
        one_hot, distribution = (chosen & ~by_distribution).flatten(), (chosen & by_distribution).flatten()
        loss = hard_loss(hidden[one_hot], layer, targets.flatten()[one_hot])
        if distribution.any():
            loss = loss + soft_loss(hidden[distribution], layer, teacher_hidden[distribution], teacher_layer)
        return loss

    slot1 = torch.zeros_like(rollout, dtype=torch.bool)
    slot1[:, 0] = True
    loss = loss_at(slot1 | True) if slot1_weight == 1 else slot1_weight * loss_at(slot1) + loss_at(~slot1)
    prefix_loss = hard_loss(prefix_hidden, layer, batch.next_token) if len(batch.next_token) else 0.0
    return loss, prefix_loss, rollout, targets, confidence


# ----------------------------------------------------------------------------------------------------------------------
# What changes from step to step

def draw_k_and_offset(step, args):
    """k uniform in 2..k_max and the anchors' offset uniform in 0..stride-1, drawn anew for each step from its number.

    With --curriculum N the widest k grows from 2 to k_max over the first N steps; with --fixed-k it is always k_max, as
    it is for --k 1. The offset is the same with and without --fixed-k.
    """
    rng = random.Random(f"layout/{args.seed}/{step}")
    grown = min(1.0, step / args.curriculum) if args.curriculum else 1.0
    widest = 2 + round(grown * (args.k - 2)) if args.k > 1 else 1
    k = rng.randint(min(2, widest), widest)
    return widest if args.fixed_k else k, rng.randrange(args.stride)


def learning_rate(step, args):
    """Linear warm-up, constant, linear cool-down over the last --cooldown steps, at most half of all. `step` is from 0."""
    cooldown = min(args.cooldown, args.steps // 2)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, cooldown))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation on held-out prompts: does it write several tokens per pass, and is it still the same text?

def evaluate(student, tokenizer, rows, args, mask_id):
    """Answer held-out rows with k = 1 and, for k_max > 1, at threshold 0.9. Returns a dict for the log."""
    prompts = [tokenizer.prompt(row["question"], args.prompt_format) for row in rows]
    # FSDP gathers no weights in inference mode: take the function from under its decorator
    answer = torch.no_grad()(generate.__wrapped__) if args.fsdp else generate

    def decode(k, threshold):
        results = answer(student, prompts, k, threshold, mask_id, tokenizer.stop_ids, args.eval_tokens,
                         bidirectional=args.bidirectional)
        hits = [is_right(extract_flexible(tokenizer.decode(result.tokens)), gold_of(row["answer"]))
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
# Training

def main():
    args = get_args()                                                   # at the end of this file

    out = Path(args.out)
    resuming = find_run(out, args.resume)                               # refuses what would overwrite a run

    # --- data and tokens
    keep_freed_memory()
    device = parallel.join(pick_device(args.device))
    rank, world = parallel.rank_and_world()
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
    log = open_log(out)
    torch.set_float32_matmul_precision("high")
    if args.random_init and not resuming:
        student = Transformer.from_scratch(start, args.seed, device)
    else:
        student = Transformer.from_pretrained(out / "latest" if resuming else start, torch.float32, device)
    teacher = None
    if args.targets != "ground-truth":
        teacher = Transformer.from_pretrained(start, dtype, device).requires_grad_(False)
    if args.seq_len > student.config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} is beyond the model's context of "
                         f"{student.config.max_position_embeddings} tokens")
    if args.k > 1 and tokenizer.mask_id is None and not resuming:
        add_mask_token(student, mask_id, args.seed)
    settings = {"parameters": sum(p.numel() for p in student.parameters()), **vars(args), "processes": world,
                **machine(device)}
    if args.fsdp:
        parallel.shard(student, dtype)
        if teacher is not None:
            parallel.shard(teacher, dtype)
    if args.compile:                                            # in place: names of parameters stay the checkpoint's
        student.compile(dynamic=True)
        if teacher is not None:
            teacher.compile(dynamic=True)
    wrapped = parallel.replicate(student, device) if world > 1 and not args.fsdp else student
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in student.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True)
    first_step, saved = 0, None
    if resuming:
        restore(state, student, optimizer)
        first_step, saved = state["step"], (out / "latest").resolve()
    mixed = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # --- one step's gradient, in as many passes as --micro-batch-size asks for
    def gradients(step):
        """Add up the gradient of the mean loss over all slots of step `step`.

        Returns k, the loss (nats per slot, the prefix loss included), the number of fed tokens, and (3, k_max) sums for
        each slot: predictions, agreements with the targets, confidences.
        """
        k, offset = draw_k_and_offset(step, args)
        rows = draw_rows(train, args.batch_size, step, args.seed)
        encoded = encode_rows(rows, tokenizer, args.prompt_format, args.seq_len)
        encoded.sort(key=lambda row: len(row[1]))                       # alike lengths share a pass: less padding
        prompts, lengths = [prompt for prompt, _ in encoded], [len(ids) for _, ids in encoded]
        # means are over the whole step, on all ranks: neither passes nor ranks change what is computed
        slots_of_step = k * sum(map(len, choose_anchors(prompts, lengths, offset, args.stride)))
        answer_tokens = sum(lengths) - sum(prompts)
        mine, most = encoded[rank::world], len(encoded[::world])        # rank 0 has most, and FSDP needs all for each pass
        loss, fed, sums = torch.zeros(()), 0, torch.zeros(3, args.k)
        for at in range(0, most, args.micro_batch_size):
            rows = mine[at:at + args.micro_batch_size]
            weight = world if rows else 0           # ranks' gradients are averaged, not added; no rows left: count nothing
            batch = make_batch(rows or encoded[:1], k, offset, args.stride, mask_id, tokenizer.end_id, device,
                               args.bidirectional, args.prefix_loss > 0)
            parallel.average_when(wrapped, last=at + args.micro_batch_size >= most)
            with mixed():
                sum_loss, sum_prefix, rollout, targets, confidence = region_loss(
                    wrapped, teacher, batch, mask_id, tokenizer.stop_ids, tokenizer.end_id, args.targets == "soft",
                    args.slot1_weight)
            part = sum_loss / max(1, slots_of_step) + args.prefix_loss * sum_prefix / max(1, answer_tokens)
            (weight * part).backward()
            if weight:
                loss += part.item()
                fed += batch.ids.numel()
                sums[:, :k] += torch.stack([torch.ones_like(confidence), rollout == targets, confidence]).sum(dim=1).cpu()
        everything = parallel.total(torch.cat((loss[None], torch.tensor([float(fed)]), sums.flatten())).to(device)).cpu()
        return k, everything[0].item(), int(everything[1]), everything[2:].view(3, -1)

    # --- say what is about to happen, and how long it will take: the first step's gradient is computed once for its timing,
    # before anyone waits for hours, and thrown away
    def record(event, step, **row):
        try:
            log.write((json.dumps({"event": event, "step": step, **row}) + "\n").encode())
        except OSError as error:
            raise InputError(f"cannot write to {out}/log.jsonl: {error.strerror}") from None

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

    def stop():                                                         # all ranks stop after the same step
        late = args.minutes is not None and minutes() >= args.minutes
        return parallel.total(torch.tensor(float(late or bool(interrupted)), device=device)) > 0

    if args.eval_every and not resuming:
        evaluate_and_record(0)
    bar = tqdm(total=args.steps, initial=first_step, unit="step", dynamic_ncols=True, disable=rank > 0)
    while step < args.steps and not stop():
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        k, loss, fed, sums = gradients(step)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        norm = (norm.full_tensor() if args.fsdp else norm).item()
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
    record("end", step, minutes=minutes(), interrupted=bool(interrupted), peak_memory_gb=peak_memory(device))
    print(f"{step} steps; the newest checkpoint is {saved} (python sample.py --model {out})")
    parallel.leave()
    if interrupted:
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# Flags

# Presets: what differs from the defaults of the flags, which are those of `tiny`. `paper`: its model, data, k, optimiser and
# batch. In the paper masks stand between the text: a sequence of 160 fed tokens holds 85 to 155 of text and 5 regions, one
# per 17 text tokens at k = 16. Here it is up to 160 tokens of text, with a region for every 17th behind them.
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
    add("--fixed-k", action=flag, default=False, help="each step draws k_max itself")
    add("--curriculum", type=int, default=0, help="widen k from 2 to k_max over the first N steps (%(default)s: off)")
    add("--stride", type=int, default=3, help="an anchor every so many tokens of the answer (%(default)s)")
    add("--targets", choices=["hard", "soft", "ground-truth"], default="hard", help="hard: what the teacher would have "
        "written; soft: its distribution; ground-truth: the text itself, as in ordinary training (%(default)s)")
    add("--slot1-weight", type=float, default=1.0, help="of slot 1 in the loss; above 1 the text of k = 1 "
        "keeps closer to the start's (%(default)s)")
    add("--prefix-loss", type=float, default=0.0, help="weight of ordinary next-token training on the answers, a mean over "
        "their tokens, beside the loss (%(default)s)")
    add("--bidirectional", action=flag, default=False, help="the masks of a region see each other both ways")
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
    add("--fsdp", action=flag, default=False, help="several GPUs: each holds a share of the models, not all of them")
    add("--compile", action=flag, default=False, help="torch.compile: minutes first, faster steps on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the passes, auto: bf16 where that is faster; "
        "the weights stay fp32 (%(default)s)")
    args = parser.parse_args()
    parser.set_defaults(**PRESETS[args.preset])
    args = parser.parse_args()                                                  # once more: flags win over the preset
    at_least(args, k=1, stride=1, batch_size=1, micro_batch_size=1, seq_len=8, steps=1, log_every=1, save_every=1,
             eval_prompts=1, eval_tokens=1, warmup=0, cooldown=0, curriculum=0, overfit=0, eval_every=0)
    if args.k == 1 and args.targets != "ground-truth":
        raise InputError("--k must be at least 2: with k = 1 there is nothing to distil (ordinary next-token training is "
                         "--k 1 --targets ground-truth)")
    if not (0 < args.lr < math.inf and args.clip > 0 and (args.minutes is None or args.minutes > 0)):
        raise InputError("--lr, --clip and --minutes must be above 0")
    for name in ("weight_decay", "prefix_loss", "slot1_weight"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be at least 0")
    if args.fsdp and parallel.rank_and_world()[1] == 1:
        raise InputError("--fsdp spreads a model over several processes: torchrun --nproc_per_node=4 train.py --fsdp ...")
    return args


if __name__ == "__main__":
    run(main)
