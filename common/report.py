"""
What a decoded answer looks like, and what it counts: coloured chunks, speeds, acceptance, a summary.

    from common.report import summary
    print(summary([results]))                                   # Answers, as sample.py's `generate` returns them

Nothing here decodes.
"""
import codecs
import itertools
import os
import re
import statistics
import sys
from collections import Counter

BACKGROUNDS = (153, 222, 157, 218, 189, 229)           # light colours of the 256-colour palette, black text on them
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text):
    """`text` with control characters but newline and tab as "?": a model gives no commands to a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


class ChunkPrinter:
    """Writes chunks as they come: coloured on a terminal, as [3|three tokens here] elsewhere or under NO_COLOR."""

    def __init__(self, tokenizer, stream=None):
        self.tokenizer, self.stream, self.count = tokenizer, stream or sys.stdout, 0
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")    # a character may span two chunks
        self.colour = self.stream.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, tokens):
        text = printable(self.utf8.decode(self.tokenizer.token_bytes(tokens)))
        self.count += 1
        if self.colour:
            paint = f"\x1b[48;5;{BACKGROUNDS[self.count % len(BACKGROUNDS)]};38;5;16m"
            text = text.replace("\n", f"\x1b[0m\n{paint}")              # or the colour would run to the right margin
            text = f"{paint}{text}{str(len(tokens)).translate(SUPERSCRIPTS)}\x1b[0m"
        else:
            text = f"[{len(tokens)}|{text}]"
        self.stream.write(text)
        self.stream.flush()


def chunks_of(result):
    """The tokens of a Generation, pass by pass: a list of lists."""
    ends = list(itertools.accumulate(result.chunks))
    return [result.tokens[end - size:end] for size, end in zip(result.chunks, ends)]


def speeds(batches):
    """(whole, decode only) tokens/s of a list of batches, each a list of Generations that were decoded together.

    Whole: all tokens / all time. Decode only: the pass over the prompt left out, its time and its tokens.
    """
    tokens = sum(len(r.tokens) for batch in batches for r in batch)
    seconds = sum(max(r.seconds for r in batch) for batch in batches)
    first_tokens = sum(r.chunks[0] for batch in batches for r in batch)
    first_seconds = sum(batch[0].prompt_seconds for batch in batches)
    decode_seconds = seconds - first_seconds
    return tokens / seconds, (tokens - first_tokens) / decode_seconds if decode_seconds > 0 else float("nan")


def acceptance_by_position(results):
    """Lossless decoding: for draft 1, 2, ... of a pass, the share of those fed that stood. One that is right behind a wrong
    one did not stand: acceptance(j) = passes with at least j standing drafts / passes with at least j drafts fed."""
    passes = [counts for result in results for counts in result.drafts]
    most = max((fed for fed, _ in passes), default=0)
    return [sum(stood >= j for _, stood in passes) / sum(fed >= j for fed, _ in passes) for j in range(1, most + 1)]


def summary(batches):
    """A few lines about what came out and how fast."""
    results = [result for batch in batches for result in batch]
    tokens, passes = sum(len(r.tokens) for r in results), sum(r.passes for r in results)
    per_forward = [r.tokens_per_forward for r in results]
    spread = f" +- {statistics.stdev(per_forward):.2f}" if len(results) > 1 else ""
    prompts = f" over {len(results)} prompts" if len(results) > 1 else ""
    whole, decode = speeds(batches)
    acceptance = [f"{share:.0%}" for share in acceptance_by_position(results)]
    sizes = sorted(Counter(size for r in results for size in r.chunks).items())
    finishes = sorted(Counter(r.finish for r in results).items())
    return (f"{tokens} tokens in {passes} passes: {statistics.mean(per_forward):.2f}{spread} tokens per forward{prompts}\n"
            f"{whole:.1f} tokens/s, prompt pass included"
            + (f"; {decode:.1f} tokens/s decoding only\n" if passes > len(results) else "\n") +
            "chunk sizes: " + ", ".join(f"{size} x {count}" for size, count in sizes) + "\n"
            "finished by: " + ", ".join(f"{reason} x {count}" for reason, count in finishes)
            + ("\nacceptance of draft 1, 2, ... (stood / fed): " + ", ".join(acceptance) if acceptance else ""))


def shared_prefix(a, b):
    """Number of leading tokens that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def shared_text(texts, reference):
    """Share of the reference's tokens that come before the first difference, over all texts.

    texts, reference   lists of token lists, pairwise
    """
    shared = sum(shared_prefix(a, b) for a, b in zip(texts, reference))
    return shared / sum(map(len, reference))
