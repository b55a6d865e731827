"""
GSM8K as EleutherAI's lm-eval asks and scores it: prompts, extraction, comparison, errors.

Rules and regular expressions are those of its tasks gsm8k and gsm8k_cot, metric exact_match, to the
letter. The paper reports their flexible-extract: the last thing in a text that looks like a number.
"""
import math
import re
import statistics

# Prompt formats beside the tokenizer's "plain" and "chat": gsm8k_cot's and gsm8k_cot_zeroshot's
QA_FORMATS = {
    "qa": "Q: {question}\nA:",
    "qa-step": "Q: {question}\nA: Let's think step by step.",
}
QA_STOPS = ["Q:", "</s>", "<|im_end|>"]

STRICT = {
    "gsm8k": r"#### (\-?[0-9\.\,]+)",
    "gsm8k_cot": r"The answer is (\-?[0-9\.\,]+).",         # the last dot: sic
}
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
INVALID = "[invalid]"           # what both extractions give for a text without a number
NO_GOLD = "[no number]"         # our own word for a gold answer without one


def build_prompt(tokenizer, question, examples, style):
    """Ids of one question behind its worked examples (rows of {"question", "answer"}).

    In the Q: A: formats an example ends "The answer is N.", as gsm8k_cot's do; in the others it is
    the plain row, and in "chat" all of it is one user message.
    """
    if style not in QA_FORMATS:
        shots = "".join(f"{row['question']}\n\n{row['answer']}\n\n" for row in examples)
        return tokenizer.prompt(shots + question, style)
    shots = ""
    for row in examples:
        answer = re.sub(r"#### (.*)$", r"The answer is \1.", row["answer"])
        shots += f"Q: {row['question']}\nA: {answer}\n\n"
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(shots + QA_FORMATS[style].format(question=question))


def extract_strict(text, task="gsm8k"):
    """The number behind the task's phrase, its first occurrence; "[invalid]" without one."""
    found = re.findall(STRICT[task], text)
    return found[0].strip() if found else INVALID


def extract_flexible(text):
    """The last thing that looks like a number, "..." and "$." included; "[invalid]" without one."""
    found = re.findall(FLEXIBLE, text)
    return next(part for part in found[-1] if part).strip() if found else INVALID


def normalise(text):
    """What exact_match compares: no commas, dollars, text up to "#### ", or one dot at the end."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def is_right(extracted, gold):
    """lm-eval's exact_match, whatever the gold answer is: equal strings after `normalise`."""
    return normalise(extracted) == normalise(gold)


def gold_of(answer):
    """A worked answer's end: the line behind "####" (GSM8K, MetaMath), else its last number.

    An answer in prose, with neither, is NO_GOLD, which no extraction gives: where the question has
    no number for an answer nothing counts as right, a text without numbers included.
    """
    if "####" in answer:
        return answer.split("####")[-1].strip().split("\n")[0]
    number = extract_flexible(answer)
    return number if re.search(r"\d", number) else NO_GOLD


def standard_error(hits):
    """Of a mean of 0s and 1s: sqrt(p (1 - p) / (n - 1)); NaN for fewer than two."""
    n, p = len(hits), statistics.fmean(hits)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else float("nan")


def paired_interval(hits, reference):
    """(mean of hits - reference, 1.96 of its standard errors: half a 95% interval), pairwise."""
    differences = [a - b for a, b in zip(hits, reference)]
    if len(differences) < 2:
        return statistics.fmean(differences), float("nan")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), 1.96 * error
