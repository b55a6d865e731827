"""
Training rows whose answers the model wrote itself: the questions of a data set, answered with k = 1 by the start checkpoint.

    python -m extras.answers --data gsm8k --model smollm2-135m --limit 1000 --out gsm8k-answers.jsonl
    python train.py --preset smollm2 --data gsm8k-answers.jsonl --out out-answers

When it decodes, the student reads its own text, not the data set's. Distilled on the data set's answers, it is judged after
prefixes that it would never write; on its own answers, after those that it will meet. (The paper trains on the data set's.)
"""
import argparse
import json
from pathlib import Path

from tqdm import tqdm

from data import load_data
from extras.machine import DTYPES, keep_freed_memory, pick_device, pick_dtype
from model import Transformer
from pretrained import DEFAULT_MODEL, ArgumentParser, InputError, at_least, resolve, run
from sample import generate
from tokenizer import Tokenizer


def main():
    parser = ArgumentParser(prog="-m extras.answers", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", default="gsm8k", help="gsm8k, metamath, wordproblems or a JSONL file: its training rows (%(default)s)")
    add("--limit", type=int, default=1000, help="the first N questions (%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="longer answers are cut (%(default)s)")
    add("--prompt-format", choices=["plain", "chat"], help="default: chat where the model has a template")
    add("--seed", type=int, default=0, help="which word problems (%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    add("--model", default=DEFAULT_MODEL, help="the start checkpoint of the training to come (%(default)s)")
    add("--out", default="answers.jsonl", help="file to write, one row per question (%(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with what is in --out")
    add("--batch-size", type=int, default=64, help="questions decoded together (%(default)s)")
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast (%(default)s)")
    args = parser.parse_args()
    at_least(args, limit=1, max_new_tokens=1, batch_size=1)
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out} must end in .jsonl, which is how --data knows such a file")
    if out.exists() and not args.resume:
        raise InputError(f"{out} exists: add --resume to go on, or choose another --out")
    train, _ = load_data(args.data, 1, args.seed)
    questions = [train[i]["question"] for i in range(min(args.limit, len(train)))]
    device = pick_device(args.device)
    keep_freed_memory()
    folder = resolve(args.model, args.cache)
    tokenizer = Tokenizer(folder)
    model = Transformer.from_pretrained(folder, pick_dtype(args.dtype, device), device)     # not fused: faster for many rows
    style = args.prompt_format or ("chat" if tokenizer.chat else "plain")

    try:
        lines = out.read_text(encoding="utf-8").splitlines(keepends=True) if out.exists() else []
        lines = [line for line in lines if line.endswith("\n")]             # but the one that a killed run was writing
        if [json.loads(line)["question"] for line in lines] != questions[:len(lines)]:
            raise InputError(f"{out} answers other questions: resume with the same --data and --seed")
        temporary = out.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(out)
        file = open(out, "a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    bar = tqdm(total=len(questions), initial=len(lines), unit="answer", dynamic_ncols=True)
    for at in range(len(lines), len(questions), args.batch_size):
        some = questions[at:at + args.batch_size]
        results = generate(model, [tokenizer.prompt(question, style) for question in some], 1, mask_id=tokenizer.mask_id,
                           stop_ids=tokenizer.stop_ids, max_new_tokens=args.max_new_tokens)
        for question, result in zip(some, results):
            tokens = result.tokens[:-1] if result.finish == "stop" else result.tokens
            file.write(json.dumps({"question": question, "answer": tokenizer.decode(tokens)}) + "\n")
        file.flush()
        bar.update(len(some))
        bar.set_postfix_str(f"{sum(len(r.tokens) for r in results) / max(r.seconds for r in results):.0f} tokens/s")
    bar.close()
    print(f"{len(questions)} rows in {out}")


if __name__ == "__main__":
    run(main)
