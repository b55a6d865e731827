"""
What a decoded answer looks like, and what it counts: chunks in colour, speed, acceptance.

    from common.report import summary
    print(summary([answers]))                   # batches of Answers, as `generate` returns them

Nothing here decodes.
"""
import codecs
import io
import itertools
import os
import statistics
import sys
from collections import Counter

from common.cli import printable

# --------------------------------------------------------------------------------------------------
# Chunks: the tokens of one pass

BACKGROUNDS = (153, 222, 157, 218, 189, 229)            # light ones of the 256-colour palette
BLACK = 16                                              # the text on them
BADGE = "\x1b[48;5;238;38;5;231m"                        # white on grey: how many tokens follow
RESET = "\x1b[0m"


class ChunkPrinter:
    """Writes chunks as they come, each a list of tokens.

    Each begins with the number of its tokens, on a terminal as a badge before a coloured text;
    elsewhere, or under NO_COLOR, they look like [3|three tokens here]. Control tokens, such as the
    one that ends an answer, are shown by name.
    """


    def __init__(self, tokenizer, stream=None, boxed=True):
        """boxed   False: the text alone, which is more to read where every pass has one token"""
        self.tokenizer, self.stream, self.count = tokenizer, stream or sys.stdout, 0
        self.boxed = boxed
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")    # characters span chunks
        self.colour = self.stream.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, tokens):
        text = printable(self.utf8.decode(self.tokenizer.visible_bytes(tokens)))
        self.count += 1
        if self.boxed and self.colour:
            background = BACKGROUNDS[self.count % len(BACKGROUNDS)]
            paint = f"\x1b[48;5;{background};38;5;{BLACK}m"
            text = text.replace("\n", f"{RESET}\n{paint}")      # or it colours to the right margin
            text = f"{BADGE}{len(tokens)}|{paint}{text}{RESET}"
        elif self.boxed:
            text = f"[{len(tokens)}|{text}]"
        self.stream.write(text)
        self.stream.flush()


def boxes(tokenizer, answer):
    """An Answer as [3|three tokens here][2|two more], without colours: a str."""
    text = io.StringIO()
    printer = ChunkPrinter(tokenizer, text)
    for chunk in chunks_of(answer):
        printer(chunk)
    return text.getvalue()


def chunks_of(answer):
    """The tokens of an Answer, pass by pass: a list of lists."""
    ends = itertools.accumulate(answer.chunks)
    return [answer.tokens[end - size:end] for size, end in zip(answer.chunks, ends)]


# --------------------------------------------------------------------------------------------------
# Counts. A batch is a list of Answers that were decoded together.

def speeds(batches):
    """(whole, decode only) tokens/s of a list of batches.

    Whole: all tokens / all time. Decode only: the pass over the prompt left out, its time and its
    tokens; NaN where nothing is left.
    """
    tokens, seconds, prompt_tokens, prompt_seconds = 0, 0.0, 0, 0.0
    for batch in batches:
        tokens += sum(len(answer.tokens) for answer in batch)
        seconds += max(answer.seconds for answer in batch)      # until the last row has ended
        prompt_tokens += sum(answer.chunks[0] for answer in batch)
        prompt_seconds += batch[0].prompt_seconds               # one pass, the same for all rows
    decode_seconds = seconds - prompt_seconds
    decode = (tokens - prompt_tokens) / decode_seconds if decode_seconds > 0 else float("nan")
    return tokens / seconds, decode


def acceptance_by_position(answers):
    """Lossless decoding: for draft 1, 2, ... of a pass, the share of those fed that stood.

        acceptance(j) = passes with at least j standing drafts / passes with at least j drafts fed

    A draft that is right behind a wrong one did not stand.
    """
    passes = [counts for answer in answers for counts in answer.drafts]     # (fed, stood) each
    most = max((fed for fed, _ in passes), default=0)
    shares = []
    for j in range(1, most + 1):
        n_stood = sum(stood >= j for _, stood in passes)
        n_fed = sum(fed >= j for fed, _ in passes)
        shares.append(n_stood / n_fed)
    return shares


def summary(batches):
    """A few lines about what came out and how fast."""
    answers = [answer for batch in batches for answer in batch]
    tokens = sum(len(answer.tokens) for answer in answers)
    passes = sum(answer.passes for answer in answers)

    # --- tokens per forward: mean and standard deviation over prompts
    rates = [answer.tokens_per_forward for answer in answers]
    mean, several = f"{statistics.mean(rates):.2f}", ""
    if len(answers) > 1:
        mean += f" +- {statistics.stdev(rates):.2f}"
        several = f" over {len(answers)} prompts"
    lines = [f"{tokens} tokens in {passes} passes: {mean} tokens per forward{several}"]

    # --- speed; where every answer took one pass, that of the prompt, there is no decoding
    whole, decode = speeds(batches)
    speed = f"{whole:.1f} new tokens/s, the prompt's pass included"
    if passes > len(answers):
        speed += f"; {decode:.1f} from the second pass on"
    lines.append(speed)

    # --- how often what happened
    sizes = Counter(size for answer in answers for size in answer.chunks)
    finishes = Counter(answer.finish for answer in answers)
    for title, counts in (("chunk sizes", sizes), ("finished by", finishes)):
        parts = [f"{value} x {count}" for value, count in sorted(counts.items())]
        lines.append(f"{title}: " + ", ".join(parts))
    shares = [f"{share:.0%}" for share in acceptance_by_position(answers)]
    if shares:
        lines.append("acceptance of draft 1, 2, ... (stood / fed): " + ", ".join(shares))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# How far two decodings agree

def shared_prefix(a, b):
    """Number of leading tokens that two lists have in common."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def shared_text(texts, reference):
    """Share of the reference's tokens that come before the first difference, over all texts.

    texts, reference   lists of token lists, pairwise
    """
    shared = sum(shared_prefix(a, b) for a, b in zip(texts, reference))
    return shared / sum(map(len, reference))
