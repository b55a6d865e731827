"""
README.md and docs/results.md: their numbers, written from the raw logs in results/.

    python -m studies.tables                            # both pages
    python -m studies.tables --out some/folder

To change a page, edit its template in docs/templates/ and run this. A template is the page with
Jinja expressions where a number stands: {{ ... }} calls a function below and says how to write what
it returns,

    {% set k8 = strategies("tiny-k8") %}                    results/tiny-k8/table.json
    k = 1 answers {{ k8["k = 1"].accuracy | to(".1%") }} right

Each function reads files of results/; what is computed from them is computed by the study that
wrote them. `paper` is common/paper.py. CI makes the pages again and compares them byte by byte
(tests/test_tables.py), so a digit changed by hand, there or in a log, does not get through.
"""
import functools
import gzip
import json
import re
import statistics
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jinja2

import eval_gsm8k
from common import cli, paper
from common.cli import ArgumentParser
from common.files import read_json, write_text
from common.intervals import t_quantile
from common.report import acceptance_by_position
from common.wordproblems import STRUCTURES
from studies import ROOT, ablate, bench, cascade, clash, confidence, efficiency
from studies.figures import read_log

PAGES = {"README.md": "README.md", "docs/results.md": "results.md"}     # page: its template
TEMPLATES, RESULTS = ROOT / "docs" / "templates", ROOT / "results"


# --------------------------------------------------------------------------------------------------
# How a number is written

def to(value, spec):
    """{{ 0.975 | to(".1%") }}: 97.5%. What rounds to zero has no sign."""
    text = format(value, spec)
    return format(0, spec.replace("+", "")) if not text.strip("+-0.%x") else text


def plus_minus(pair, spec):
    """{{ (97.5, 0.49) | plus_minus(".1f") }}: 97.5 +- 0.5."""
    value, error = pair
    return f"{to(value, spec)} +- {format(error, spec.replace('+', ''))}"


def rate(value):
    """{{ 0.0002 | rate }}: 2e-4, as a flag has it."""
    return f"{value:.0e}".replace("e-0", "e-")


def word(number):
    return ("zero one two three four five six seven eight nine ten eleven twelve".split())[number]


def threads(device):
    """{{ "cpu: AMD EPYC, 2 threads" | threads }}: two."""
    return word(int(re.search(r"(\d+) threads", device)[1]))


def giga(value, spec):
    return format(value / 1e9, spec)


def points(pair):
    """A share and its error, or a difference and its interval, in points."""
    return tuple(100 * value for value in pair)


def markdown(heads, rows):
    """A table of cells, which are text."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def columns(table, *names):
    """Some columns of a Markdown table; "accuracy: right, %" is `accuracy` under another name."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    heads, _, *rows = lines
    pairs = [name.partition(": ")[::2] for name in names]
    wanted = [heads.index(name) for name, _ in pairs]
    return markdown([other or name for name, other in pairs],
                    [[row[n] for n in wanted] for row in rows])


def as_drafts(text):
    """lossless 5 heads -> 4 drafts: of five tokens a pass the model itself writes one."""
    def drafts(match):
        count = int(match[1]) - 1
        return f"{count} draft{'s' * (count > 1)}"

    return re.sub(r"lossless (\d+) heads", drafts, text)


def flag(words, name):
    """What stands behind a flag of a command line."""
    return words[words.index(name) + 1]


def unlogged(number):
    """A number that no log holds: results/README.md, or a study's source, alone says it."""
    return number


# --------------------------------------------------------------------------------------------------
# Any study

def record(file):
    """A JSON file of results/."""
    return read_json(RESULTS / file)


def counted(file, pattern):
    """The integers that a pattern finds in a text of results/, for each line that has them."""
    found = [re.search(pattern, line) for line in (RESULTS / file).read_text().splitlines()]
    return [[int(number) for number in match.groups()] for match in found if match]


# --------------------------------------------------------------------------------------------------
# eval_gsm8k.py: RUN/table.json, RUN/rows.jsonl.gz

@functools.cache
def summarised(folder):
    """{strategy: its numbers}, of an evaluation's rows in the order of its table."""
    names = [entry["strategy"] for entry in read_json(folder / "table.json")["table"]]
    rows = read_rows(folder / "rows.jsonl.gz")[1]
    table = eval_gsm8k.summarise({name: rows[name] for name in names})
    return {entry["strategy"]: entry for entry in table}


def strategies(run):
    """{strategy: its numbers}, computed from the rows."""
    return summarised((RESULTS / run).resolve())


def evaluation(run):
    """The settings of an evaluation, with the machine."""
    whole = record(f"{run}/table.json")
    del whole["table"]
    return whole.pop("settings") | whole


def decoding_table(run):
    return eval_gsm8k.markdown(list(strategies(run).values())).rstrip()


def accuracy(entry):
    """(percent, its standard error)."""
    return points((entry["accuracy"], entry["stderr"]))


@functools.cache                        # tables ask for the same rows again and again
def read_rows(path):
    """(settings, {strategy: rows}) of a rows.jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        settings, *rows = map(json.loads, lines)
    by_strategy = {}
    for row in rows:
        name = row["strategy"].replace("static 1", "k = 1")         # as older rows call it
        by_strategy.setdefault(name, []).append(row)
    for own in by_strategy.values():
        own.sort(key=lambda row: row["id"])                 # several processes write as they come
    return settings, by_strategy


def rows_of(run, strategy):
    return read_rows((RESULTS / run / "rows.jsonl.gz").resolve())[1][strategy]


def rows_settings(run):
    """The settings of an evaluation, where its table does not hold them."""
    return read_rows((RESULTS / run / "rows.jsonl.gz").resolve())[0]


def against_start(run):
    """(points, 95% interval): the trained checkpoint's k = 1 against the start, by question."""
    difference, interval = strategies(run)["start, k = 1"]["difference"]    # the start's, that is
    return points((-difference, interval))


def start_texts(run, *names):
    """How many answers are the start model's, token for token, with each of these strategies."""
    def texts(name):
        return [row.get("hash", row["tokens"]) for row in rows_of(run, name)]

    own = [texts(name) for name in names]
    return sum(all(text == theirs for text in texts)
               for theirs, *texts in zip(texts("start, k = 1"), *own))


def chosen(run, most=0.02):
    """The lowest threshold that costs at most `most` of accuracy against k = 1, by the point
    estimate on validation problems; as a text, "0.9", or None."""
    found = [name.removeprefix("adaptive ") for name, own in strategies(run).items()
             if name.startswith("adaptive") and own["difference"][0] >= -most]
    return min(found, key=float, default=None)


def thresholds_table(validation, test):
    """What each threshold costs where it is chosen, and where it is reported."""
    cells, tested = [], strategies(test)
    for name, own in strategies(validation).items():
        if not name.startswith("adaptive"):
            continue
        row = [name.removeprefix("adaptive ")]
        for entry in (own, tested[name]):
            row += [plus_minus(points(entry["difference"]), "+.1f"),
                    f"{entry['tokens_per_forward']:.2f}"]
        cells.append(row)
    return markdown(["threshold", "validation: points against k = 1", "tokens per forward",
                     "test: points against k = 1", "tokens per forward"], cells)


def kinds_table():
    """Kinds of problems that training saw and kinds that it did not."""
    cells = []
    for trained, folder in (("all kinds", "tiny-k8"), ("the others alone", "tiny-familiar")):
        for asked in ("familiar", "unfamiliar"):
            own = strategies(f"{folder}/{asked}")
            kinds = {"familiar": "the others", "unfamiliar": "the held-out ones"}[asked]
            cells.append([
                trained, kinds,
                *(plus_minus(accuracy(own[name]), ".1f")
                  for name in ("start, k = 1", "k = 1", "adaptive 0.9")),
                f"{own['adaptive 0.9']['tokens_per_forward']:.2f}",
                f"{own['lossless 8']['tokens_per_forward']:.2f}",
                f"{own['start, k = 1']['identical_text']:.0%}"])
    return markdown(["trained on", "asked", "start, k = 1, %", "k = 1, %", "threshold 0.9, %",
                     "its tokens per forward", "lossless, wide", "k = 1 writes the start's text"],
                    cells)


def acceptance(run, strategy):
    """(passes with drafts, [share of each draft that stood, given those before it])."""
    answers = [SimpleNamespace(drafts=row["drafts"]) for row in rows_of(run, strategy)]
    shares = acceptance_by_position(answers)
    given = [share / before for before, share in zip([1, *shares], shares)]
    return sum(fed > 0 for answer in answers for fed, _ in answer.drafts), given


def at_a_glance():
    """README's table: 1,000 problems, and speed-up at batch 1."""
    rows = [("start model, k = 1", "tiny-k8", "start, k = 1"), ("k = 1", "tiny-k8", "k = 1"),
            ("static 2", "tiny-k8", "static 2"), ("adaptive 0.99", "tiny-k8", "adaptive 0.99"),
            ("adaptive 0.9", "tiny-k8", "adaptive 0.9"),
            ("lossless, narrow", "tiny-k8", "lossless 8 narrow"),
            ("start model, 4 heads", "tiny-heads4", "lossless 5 heads"),
            ("start model, adapters, lossless", "tiny-adapters64-2000", "lossless 8 narrow")]
    cells = []
    for name, run, strategy in rows:
        own, alone = strategies(run)[strategy], strategies(f"{run}/batch1")[strategy]
        cells.append([name, plus_minus(accuracy(own), ".1f"), f"{own['tokens_per_forward']:.2f}",
                      f"{alone['speed_up']:.1f}x",
                      f"{own['identical_text']:.0%}"])
    heads = ["decoding", "right, %", "tokens per forward", "speed-up", "same text as k = 1"]
    return markdown(heads, cells)


def beside_the_paper(run):
    own, cells = strategies(run), []
    for name, (right, per_forward) in paper.DECODING.items():
        ours = ["", ""]
        if name in own:
            ours = [f"{100 * own[name]['accuracy']:.1f}", f"{own[name]['tokens_per_forward']:.2f}"]
        cells.append([name, f"{right:.1f}", f"{per_forward}", *ours])
    k_max = training(run)["k"]
    return markdown(["decoding", "the paper: accuracy", "tokens per forward",
                     f"tiny, k_max {k_max}: accuracy", "tokens per forward"], cells)


# --------------------------------------------------------------------------------------------------
# train.py: RUN/log.jsonl

def log(run):
    """Rows by event, see studies.figures.read_log; of RUN/log.jsonl, RUN/log.jsonl.gz or RUN."""
    names = (f"{run}/log.jsonl", f"{run}/log.jsonl.gz", run)
    return read_log(next(RESULTS / name for name in names if (RESULTS / name).is_file()))


def training(run):
    """Settings and machine of a run's first piece, its minutes (of all pieces), its peak in GB."""
    events = log(run)
    ends = events.get("end", [])
    peaks = [end["peak_memory_gb"] for end in ends if "peak_memory_gb" in end]
    return events["start"][0] | {"minutes": sum(end["minutes"] for end in ends),
                                 "peak": max(peaks, default=None),
                                 "last": events["train"][-1]["step"],
                                 "supervised": sum(row["slots"] for row in events["train"])}


def trainings(folder):
    """`training` of every run in a folder."""
    files = sorted((RESULTS / folder).glob("*/log.jsonl*"))
    return [training(file.parent.relative_to(RESULTS)) for file in files]


def agreement(run, slot, first, last):
    """Mean agreement of a slot with the teacher over the steps first .. last that had this slot."""
    found = [row["agreement"][slot - 1] for row in log(run)["train"]
             if first <= row["step"] <= last and slot <= len(row["agreement"])
             and row["agreement"][slot - 1] is not None]
    return statistics.fmean(found)


def mean_loss(run, first, last):
    """In nats, over the steps first .. last."""
    return statistics.fmean(row["loss"] for row in log(run)["train"]
                            if first <= row["step"] <= last)


def agreement_table(run, *steps):
    """Of each slot, over the 50 steps up to each of these."""
    slots = range(1, training(run)["k"] + 1)
    cells = [[f"{last - 49} to {last}",
              *(f"{agreement(run, slot, last - 49, last):.0%}" for slot in slots)]
             for last in steps]
    return markdown(["steps", *(f"slot {slot}" for slot in slots)], cells)


def cost_table(*runs):
    """What training costs at k = 1."""
    cells = []
    for run in runs:
        own, asked, found = training(run), evaluation(run), strategies(run)
        cells.append([
            f"{own['k']}", f"{own['steps']:,}", f"{own['minutes']:.1f}", f"{asked['questions']:,}",
            *(plus_minus(accuracy(found[name]), ".1f") for name in ("start, k = 1", "k = 1")),
            plus_minus(against_start(run), "+.1f"),
            f"{found['start, k = 1']['identical_text']:.0%}",
            f"{found['start, k = 1']['shared_prefix']:.0%}"])
    return markdown(["k_max", "steps", "minutes", "problems", "start, k = 1, %",
                     "trained, k = 1, %", "difference", "same text", "text before it parts"], cells)


def ways_table():
    """All weights, adapters and heads beside each other: of each its training, and what it comes to
    at threshold 0.9, lossless, and in time at batch 1."""
    cells = []
    for model, way, run, asked, wide, narrow, faster in (
            ("tiny", "all weights", "tiny-k8", "tiny-k8", "lossless 8", "lossless 8 narrow",
             at_batch_1("tiny-k8", "lossless 8 narrow")),
            ("tiny", "adapters", "tiny-adapters64-500", "tiny-adapters64-500", "lossless 8",
             "lossless 8 narrow", ""),
            ("tiny", "adapters", "tiny-adapters64", "tiny-adapters64", "lossless 8",
             "lossless 8 narrow", at_batch_1("tiny-adapters64", "lossless 8 narrow")),
            ("tiny", "adapters", "tiny-adapters64-2000", "tiny-adapters64-2000", "lossless 8",
             "lossless 8 narrow", at_batch_1("tiny-adapters64-2000", "lossless 8 narrow")),
            ("tiny", "4 heads", "tiny-heads4", "tiny-heads4", "lossless 5 heads", None,
             at_batch_1("tiny-heads4", "lossless 5 heads")),
            ("SmolLM2", "all weights", "smollm2-masks", "smollm2-masks/eval", "lossless 4",
             "lossless 4 narrow", median_ratio("bench-smollm2-masks", "ours, lossless 4 narrow")),
            ("SmolLM2", "adapters", "smollm2-adapters64", "smollm2-adapters64/eval", "lossless 4",
             "lossless 4 narrow",
             median_ratio("bench-smollm2-adapters64", "ours, lossless 4 narrow")),
            ("SmolLM2", "one head, looped", "smollm2-heads", "smollm2-heads/eval",
             "lossless 5 heads", None,
             median_ratio("bench-smollm2-heads", "ours, lossless 5 heads"))):
        own, found = training(run), strategies(asked)
        whole = training("tiny-k8" if model == "tiny" else "smollm2-gsm8k-k4")["parameters"]
        trained = own["parameters"] - (whole if own.get("adapters") else 0)
        at_09 = found.get("adaptive 0.9")
        cells.append([
            model, f"{way}, rank {own['adapters']}" if own.get("adapters") else way,
            f"{trained / 1e6:.1f}", f"{own['last']:,}", f"{own['minutes']:.0f}",
            f"{own['peak']:.1f}", "another" if way == "all weights" else "the start's",
            plus_minus(points(at_09["difference"]), "+.1f") if at_09 else "",
            f"{at_09['tokens_per_forward']:.2f}" if at_09 else "",
            f"{found[wide]['tokens_per_forward']:.2f}",
            f"{found[narrow]['tokens_per_forward']:.2f}" if narrow else "",
            f"{faster:.2f}x" if faster else ""])
    return markdown(
        ["model", "trained", "millions of numbers", "steps", "minutes", "peak, GB",
         "text at k = 1", "threshold 0.9: points against k = 1", "tokens per forward",
         "lossless: tokens per forward", "narrow", "its speed-up at batch 1"], cells)


def at_batch_1(run, strategy):
    return strategies(f"{run}/batch1")[strategy]["speed_up"]


def median_ratio(run, contender):
    return statistics.median(ratio_to_k1(run, contender))


# --------------------------------------------------------------------------------------------------
# studies.confidence

def joined(run, slots, least, most=1):
    """The tokens of some slots whose confidence is in a range, as one bin."""
    found = record(f"{run}/confidence.json")["calibration"]
    return confidence.joined([b for slot in slots for b in found[slot]
                              if least <= b["from"] and b["to"] <= most])


def overconfident(run, slots):
    """(from, to) of the bins in which more is said than is right, by two standard errors."""
    return [(b["from"], b["to"]) for b in record(f"{run}/confidence.json")["calibration"][slots]
            if b["confidence"] - b["agrees"] > 2 * b["stderr"]]


def overconfident_from(run, slots):
    """The lowest confidence from which up all bins are."""
    starts, found = [low for low, _ in overconfident(run, slots)], None
    for low in reversed(confidence.EDGES[:-1]):
        if low not in starts:
            return found
        found = low
    return found


def calibration_table(run):
    slots = record(f"{run}/confidence.json")["calibration"].values()
    one, more = ([*bins, confidence.joined(bins)] for bins in slots)
    cells = []
    for low, high in [*zip(confidence.EDGES, confidence.EDGES[1:]), (None, None)]:
        row = ["all" if low is None else f"{low:g} to {high:g}"]
        for bins in (one, more):
            own = [bins[-1]] if low is None else [b for b in bins[:-1] if b["from"] == low]
            row += ["", "", ""] if not own else [
                f"{own[0]['tokens']:,}", f"{100 * own[0]['confidence']:.2f}",
                plus_minus(points((own[0]["agrees"], own[0]["stderr"])), ".2f")]
        cells.append(row)
    return markdown(["confidence", "slot 1: tokens", "said, %", "right, %",
                     "slots 2 and up: tokens", "said, %", "right, %"], cells)


# --------------------------------------------------------------------------------------------------
# studies.ablate

@functools.cache
def ablation_runs(folder):
    return ablate.read_runs(folder)


def ablation():
    """{variant: its runs}, as `ablate.read_runs` has them from the rows in results/ablation."""
    return ablation_runs(RESULTS / "ablation")


def ablation_table():
    return ablate.markdown(ablate.summarise(ablation()), ablation()).rstrip()


def against(variant, strategy=ablate.COMPARED):
    """A variant less the default: [(points, half of its interval), (tokens per forward, pooled,
    half of its interval)]."""
    own = ablate.differences(ablation(), strategy)[0][variant]
    return [own[measure][:2] for measure in ablate.MEASURES]


def by_seed(variant, measure="tokens per forward", strategy=ablate.COMPARED):
    """The differences of `against`, seed by seed, as a text: "-0.69, -1.06"."""
    *_, each = ablate.differences(ablation(), strategy)[0][variant][measure]
    spec = "+.2f" if measure == "tokens per forward" else "+.1f"
    return ", ".join(to(difference, spec) for difference in each)


def comparisons():
    """(how many differences stand beside each other, the level of each one's interval, and that of
    all of them together)."""
    found, level = ablate.differences(ablation())
    return len(ablate.MEASURES) * len(found), level, ablate.TOGETHER


def verdicts():
    """{variant: (its order of accuracy, of tokens per forward)}, where the paper has the variant:
    "holds", "does not hold" or "is undecided"."""
    found = ablate.differences(ablation())[0]
    return {name: ablate.orders(name, own) for name, own in found.items() if name in paper.VARIANTS}


def differences_table():
    cells, base = [], paper.VARIANTS["default"]
    for name in ablation():
        if name == "default":
            continue
        right, rates = against(name)
        row = [name, plus_minus(right, "+.1f"), by_seed(name, "points"), plus_minus(rates, "+.2f"),
               by_seed(name)]
        if name in paper.VARIANTS:
            theirs = paper.VARIANTS[name]
            row += [f"{theirs[0] - base[0]:+.1f}", f"{theirs[1] - base[1]:+.1f}",
                    f"{paper.VARIANTS_AT_K1[name]:.1f}",
                    *(order.removeprefix("is ") for order in verdicts()[name])]
        cells.append(row + [""] * (10 - len(row)))
    return markdown(["variant", "points at 0.9", "each seed's", "tokens per forward at 0.9",
                     "each seed's", "the paper: points", "the paper: tokens per forward",
                     "the paper: accuracy at k = 1", "its order of accuracy here",
                     "its order of tokens per forward here"], cells)


# --------------------------------------------------------------------------------------------------
# studies.clash

def clash_counts(labels, kind, run="clash"):
    """[of each seed]: how many first chunks, of the kind "together", "clash" or "foreign"."""
    return [own["objectives"][labels][kind] for own in record(f"{run}/clash.json")["each_seed"]]


def clash_share(labels, kind):
    """Of all seeds' chunks."""
    counts = clash_counts(labels, kind)
    return sum(counts) / (len(counts) * record("clash/clash.json")["limit"])


def clash_table():
    first, cells = record("clash/clash.json")["each_seed"][0]["objectives"], []
    for labels, own in first.items():
        likely = [", ".join(f"{text.strip()} {p:.2f}" for text, p in slot[:2])
                  for slot in own["slots"]]
        counts = [", ".join(map(str, clash_counts(labels, kind))) for kind in clash.KINDS]
        cells.append([labels, *counts, *likely])
    return markdown(["labels", "together", "clash", "a foreign word", "slot 1 holds likely",
                     "slot 2 holds likely"], cells)


# --------------------------------------------------------------------------------------------------
# studies.bench

def races(run, batch=1):
    return record(f"{run}/bench.json")["races"][str(batch)]


def per_pass(entry):
    """Tokens per pass of a row; an older record has another name for it."""
    return entry.get("tokens_per_pass", entry.get("tokens_per_pass_and_row"))


def race(run, batch=1):
    """{contender: medians over rounds: tokens/s, ratio to transformers and to our k = 1 of the same
    round; tokens per pass; how many greedy texts, of how many}."""
    return {name: {"speed": statistics.median(e["tokens_per_second"]),
                   "times_theirs": statistics.median(e["ratio"]),
                   "times_k1": statistics.median(e["ratio_to_k1"]),
                   "per_pass": per_pass(e), "greedy": e["greedy_texts"], "texts": e["texts"]}
            for name, e in races(run, batch).items()}


def speed(tokens_per_second):
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def race_table(run, batch=1):
    cells, entries = [], races(run, batch)
    for name, e in entries.items():
        rates = e["tokens_per_second"]
        # an older record has no count: there all contenders write equally many
        written = sum(e.get("tokens", [1])) / sum(entries[bench.PLAIN].get("tokens", [1]))
        cells.append([
            name, bench.middle(e["ratio_to_k1"], 2), bench.middle(e["ratio"], 2),
            f"{speed(statistics.median(rates))} ({speed(min(rates))} to {speed(max(rates))})",
            f"{written:.0%}", f"{per_pass(e):.2f}", f"{e['greedy_texts']} of {e['texts']}"])
    return markdown([f"decoding, batch {batch}", "times our k = 1", "times transformers",
                     "new tokens/s", "tokens written, of k = 1's", "tokens per pass",
                     "greedy text"], cells)


def ratio_to_k1(run, contender, batch=1):
    """[of each round]."""
    return races(run, batch)[contender]["ratio_to_k1"]


def widths(run):
    """{fed tokens: milliseconds of a pass}."""
    times = record(f"{run}/bench.json")["milliseconds_by_width"]
    return {int(width): time for width, time in times.items()}


def widths_table(**runs):
    times = {name: widths(run) for name, run in runs.items()}
    fed = sorted(set().union(*times.values()))
    cells = []
    for name, own in times.items():
        digits = 1 if own[1] >= 10 else 2
        cells.append([f"{name}, ms", *(f"{own[n]:.{digits}f}" if n in own else "" for n in fed)])
        cells.append(["times one token",
                      *(f"{own[n] / own[1]:.2f}" if n in own else "" for n in fed)])
    return markdown(["fed tokens", *map(str, fed)], cells)


# --------------------------------------------------------------------------------------------------
# studies.efficiency, studies.plan

def matmul_rates(run):
    """FLOP/s of each round."""
    return record(f"{run}/efficiency.json")["matmul_flop_per_second"]


def efficiency_rows(run):
    """The study's table, computed from its rounds; the matmul rate is their median."""
    whole = record(f"{run}/efficiency.json")
    peaks = {entry["name"]: entry["peak_bytes"] for entry in whole["table"]}
    return efficiency.summarise(whole["each_round"], peaks, statistics.median(matmul_rates(run)))


def efficiency_table(run, name):
    whole, table = record(f"{run}/efficiency.json"), efficiency_rows(run)
    first, cells = table[0]["supervised_tokens_per_second"], []
    for e in table:
        rounds = [own["supervised_tokens_per_second"] for own in whole["each_round"][e["name"]]]
        median = e["supervised_tokens_per_second"]
        cells.append([e["name"], f"{median:,.0f} ({median / first:.2f}x)",
                      f"{min(rounds):,.0f} to {max(rounds):,.0f}", f"{e['supervised_share']:.2f}",
                      f"{e['utilisation']:.0%}", f"{e['peak_bytes'] / 1e9:.2f}"])
    return markdown([name, "supervised tokens/s", "rounds", "per fed token", "of the matmul rate",
                     "peak, GB"], cells)


def step_seconds(run):
    """Of each contender: the median over rounds, whose first step does not count."""
    whole = record(f"{run}/efficiency.json")
    return [statistics.median(r["seconds"] / (whole["steps"] - 1) for r in rounds)
            for rounds in whole["each_round"].values()]


def first_ratio(run, contender):
    """Supervised tokens/s of a contender over those of the first one."""
    own = {e["name"]: e["supervised_tokens_per_second"] for e in efficiency_rows(run)}
    return own[contender] / next(iter(own.values()))


def trained_part(plan):
    """What of the model a planned training trains."""
    if plan.get("adapters"):
        return f"adapters, rank {plan['adapters']}"
    if plan.get("heads"):
        drafted = f", {plan['draft_vocab']:,} drafted tokens" if plan["draft_vocab"] else ""
        heads = f"{plan['heads']} heads"
        if plan["loop"]:
            heads = f"one head, looped {plan['heads']} deep"
        return heads + drafted
    each = f", each of {plan['gpus']} GPUs, `--fsdp`" if plan["fsdp"] else ""
    return f"all weights{each}"


def plan_table():
    sizes = record("plan/qwen3-0.6b.json")
    memory, cells = [f"{gb:g}" for gb in sizes["memory"]], []
    for name, file in (("Qwen3-0.6B", "qwen3-0.6b"), ("Qwen3-4B", "qwen3-4b-instruct-2507"),
                       ("Llama-3.1-8B", "llama-3.1-8b-instruct")):
        for way in ("", "-adapters64", "-heads4", "-heads4-loop", "-fsdp4"):
            own = record(f"plan/{file}{way}.json")
            fits = [own["largest_micro_batch_size"][gb] for gb in memory]
            cells.append([name, trained_part(own), f"{own['estimated_bytes'] / 1e9:.1f} GB",
                          *(f"up to {most}" if most else "no" for most in fits)])
    return markdown(["model", "trained", f"{sizes['micro_batch_size']} sequences a pass",
                     *(f"{gb} GB" for gb in memory)], cells)


def measured_table():
    """The estimate, held against two real steps."""
    cells = []
    for name, file in (("tiny", "tiny"), ("SmolLM2", "smollm2-135m")):
        for way in ("", "-adapters64", "-adapters64-bf16", "-heads4", "-heads4-bf16", "-heads",
                    "-heads-bf16"):
            path = f"plan/{file}{way}-measured.json"
            if not (RESULTS / path).exists():
                continue
            own = record(path)
            tensors, process = (own["measured_bytes"][key] for key in ("tensors", "process"))
            part = "heads" if own.get("loop") else trained_part(own).replace(", rank", "")
            cells.append([f"{name}, {part}, {own['dtype']}",
                          *(giga(size, ".3f") for size in (own["estimated_bytes"], tensors)),
                          f"{own['estimated_bytes'] / tensors:.3f}", giga(process, ".3f")])
    return markdown(["run", "estimate", "tensors measured", "estimate / measured",
                     "the process grew by"], cells)


# --------------------------------------------------------------------------------------------------
# studies.cascade

def cascade_runs(run):
    """(settings, {variant: its runs, question by question})."""
    whole = record(f"{run}/table.json")
    settings = SimpleNamespace(**whole["settings"], out=RESULTS / run)
    found = {}
    for name, own in whole["runs"].items():
        files = [cascade.folder_of(name, one["seed"], settings).with_suffix(".json") for one in own]
        found[name] = [read_json(file)["questions"] for file in files]
    return settings, found


def cascade_table(run):
    settings, runs = cascade_runs(run)
    return cascade.markdown(cascade.summarise(runs), runs, settings).rstrip()


def cascade_claims(run):
    """The paper's claims, a bullet each."""
    _, runs = cascade_runs(run)
    return "\n".join(textwrap.fill(cascade.in_words(claim), 100, subsequent_indent="  ",
                                   break_on_hyphens=False)
                     for claim in cascade.claims(runs))


# --------------------------------------------------------------------------------------------------
# The script

FUNCTIONS = [
    unlogged, record, counted, strategies, evaluation, decoding_table, accuracy, against_start,
    rows_settings, start_texts, chosen, thresholds_table, kinds_table, acceptance, at_a_glance,
    beside_the_paper, log, training, trainings, mean_loss, agreement, agreement_table,
    cost_table, ways_table, joined, overconfident, overconfident_from, calibration_table,
    ablation_table, by_seed, comparisons, t_quantile, verdicts, differences_table,
    clash_counts, clash_share, clash_table, race, race_table, ratio_to_k1, matmul_rates,
    widths, widths_table, efficiency_table, first_ratio, step_seconds,
    plan_table, measured_table, cascade_runs, cascade_table, cascade_claims]
FILTERS = [to, plus_minus, rate, giga, word, threads, columns, as_drafts, flag, speed]


def render(template):
    """The text of a page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {own.__name__: own for own in FILTERS} | {
        "median": statistics.median, "min": min, "max": max}
    environment.globals |= {own.__name__: own for own in FUNCTIONS} | {
        "paper": paper, "STRUCTURES": STRUCTURES}
    return environment.get_template(template).render()


def main():
    parser = ArgumentParser(prog="-m studies.tables", description=__doc__)
    parser.add_argument("--out", default=str(ROOT),
                        help="folder for README.md and docs/results.md (this project's)")
    args = parser.parse_args()
    for page, template in PAGES.items():
        path = Path(args.out) / page
        cli.output_folder(path.parent)
        write_text(path, render(template))      # under another name first, so that it is whole
        print(path)


if __name__ == "__main__":
    cli.run(main)
