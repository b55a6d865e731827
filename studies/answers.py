"""
Training rows that the model wrote itself: a data set's questions, answered with k = 1 by the start
checkpoint.

    python -m studies.answers --data gsm8k --model smollm2-135m --limit 1000 --out gsm8k-own.jsonl
    python train.py --preset smollm2 --data gsm8k-own.jsonl --out out-own

When it decodes, the student reads its own text, not the data set's. Distilled on the data set's
answers, it is judged after prefixes that it would never write; on its own answers, after those that
it will meet. (The paper trains on the data set's.)

Of every 512 questions the shortest prompts come first, so that a batch pads little. How the rows
came about stands beside them, in gsm8k-own.json: command, commit, machine, and the minutes of each
piece of the work.
"""
import json
import math
import time
from pathlib import Path

from common import cli
from common.answers import check_prompts
from common.cli import SWITCH, ArgumentParser, InputError, reading
from common.data import load_data
from common.files import read_json, write_json
from common.hub import DEFAULT_MODEL, resolve
from common.machine import dtype_name, keep_freed_memory, machine, pick_device, pick_dtype
from common.progress import Progress
from common.records import fingerprint, json_lines
from common.tokenizer import Tokenizer
from model import Transformer
from sample import generate


WINDOW = 512            # questions that are sorted by length: not all, --limit should take any rows


def answered(path, questions):
    """How many of the questions an earlier run has answered; InputError where they are others."""
    rows = list(json_lines(path, {"question", "answer"}))
    with reading(path):
        if [row["question"] for row in rows] != list(questions[:len(rows)]):
            raise InputError(f"{path} answers other questions: resume with the same flags")
    return len(rows)


def earlier_pieces(path, piece):
    """Of how the rows in a file came about; InputError where it was not as `piece` would go on."""
    if not path.exists():
        return []
    with reading(path):
        pieces = list(read_json(path)["pieces"])
        for name in ("start weights", "prompt_format", "max_new_tokens", "dtype"):
            if pieces[-1][name] != piece[name]:
                raise InputError(f"{path} says that its rows were made with {name} "
                                 f"{pieces[-1][name]}, not {piece[name]}: resume with the same "
                                 "flags, or choose another --out")
    return pieces


def main():
    parser = ArgumentParser(prog="-m studies.answers", description=__doc__)
    add = parser.add_argument_group("what to ask").add_argument
    add("--data", default="gsm8k", help="its training rows: gsm8k, metamath, wordproblems or a "
        "JSONL file (%(default)s)")
    add("--limit", type=int, default=1000, help="the first N questions (%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="longer answers are cut (%(default)s)")
    cli.add_prompt_format_flag(add, default="chat where the model has a template")
    add("--seed", type=int, default=0, help="which word problems (%(default)s)")
    add = parser.add_argument_group("model, files, machine").add_argument
    add("--model", default=DEFAULT_MODEL,
        help="the start checkpoint of the training to come (%(default)s)")
    add("--out", default="answers.jsonl", help="file to write, a row per question (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    add("--batch-size", type=int, default=64, help="questions decoded together (%(default)s)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, limit=1, max_new_tokens=1, batch_size=1)
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out} must end in .jsonl, which is how --data knows such a file")
    note = out.with_suffix(".json")
    for file in (out, note):
        cli.spare(file, args.resume)

    # --- questions and model
    train, _ = load_data(args.data, 0, args.seed)
    questions = [train[i]["question"] for i in range(min(args.limit, len(train)))]
    device = pick_device(args.device)
    keep_freed_memory()
    folder = resolve(args.model)
    tokenizer = Tokenizer(folder)
    style = args.prompt_format or tokenizer.default_format
    # not fused, unlike what sample.load returns: faster for many rows
    model = Transformer.from_pretrained(folder, pick_dtype(args.dtype, device), device)
    pairs = [(tokenizer.prompt(question, style), question) for question in questions]
    check_prompts([prompt for prompt, _ in pairs], model)
    pairs = [pair for first in range(0, len(pairs), WINDOW)
             for pair in sorted(pairs[first:first + WINDOW], key=lambda pair: len(pair[0]))]
    prompts, questions = zip(*pairs)

    # --- how the rows came about: a dict for each piece, one that was killed has no minutes
    piece = vars(args) | machine(device) | {
        "start weights": fingerprint(folder), "prompt_format": style,
        "dtype": dtype_name(next(model.parameters()).dtype)}
    pieces, began = [*earlier_pieces(note, piece), piece], time.perf_counter()

    # --- answer; a batch is on disk as soon as it is done
    with cli.writing(out), open(out, "a", encoding="utf-8") as file:
        file.lock = cli.Alone(out)                                  # as long as it is open
        done = answered(out, questions)
        write_json(note, {"pieces": pieces})
        file.truncate(out.read_bytes().rfind(b"\n") + 1)            # a killed run's half line
        bar = Progress(total=len(questions), initial=done, unit="answer")
        for first in range(done, len(questions), args.batch_size):
            some = slice(first, first + args.batch_size)
            results = generate(model, tokenizer, prompts[some], max_new_tokens=args.max_new_tokens)
            for question, result in zip(questions[some], results):
                ended = result.finish == "stop"             # the stop token is no part of the text
                tokens = result.tokens[:-1] if ended else result.tokens
                row = {"question": question, "answer": tokenizer.decode(tokens)}
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(len(results))
            bar.lap(left=math.ceil((len(questions) - bar.n) / args.batch_size))
            speed = sum(len(r.tokens) for r in results) / max(r.seconds for r in results)
            bar.say(f"{speed:.0f} new tokens/s")
        bar.close()
        pieces[-1] |= {"minutes": round((time.perf_counter() - began) / 60, 3),
                       "rows": len(questions) - done}
        write_json(note, {"pieces": pieces})
    cli.say(f"{len(questions)} rows in {out}")


if __name__ == "__main__":
    cli.run(main, resumes=True)
