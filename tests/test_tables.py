"""
README.md and docs/results.md are what studies.tables writes from results/; their templates hold no
measured number; a number changed in a log changes a page.
"""
import gzip
import json
import os
import re
import shutil

import jinja2
import pytest
from conftest import ROOT, write_json
from test_cli import cli

from common import paper
from common.cli import InputError
from common.records import compact
from eval_gsm8k import markdown
from studies import ablate, tables
from studies.figures import read_log

PAGES = list(tables.PAGES.items())


# --------------------------------------------------------------------------------------------------
# The pages

@pytest.mark.parametrize("page, template", PAGES)
def test_a_page_is_what_results_say(page, template):
    """If this fails: edit docs/templates/, then python -m studies.tables."""
    assert tables.render(template) == (ROOT / page).read_text(encoding="utf-8")


# What may hold a digit though nobody measured it: names and settings
ALLOWED = [
    # --- names of models, data, number formats, papers, licences, versions, dates, commits
    r"SmolLM2(-135M)?(-Instruct)?", r"Llama-3\.1-8B-Magpie", r"Llama 3\b", r"Qwen 2/2\.5/3",
    r"\b(4B and 8B|8B) models?", r"GSM8K", r"\b(fp32|bf16|4-bit)\b", r"arXiv \d{4}\.\d{5}",
    r"Apache-2\.0", r"Python 3\.10\+", r"\b(of|transformers,?) 5\.23\b",
    r"\btransformers, 4\.52\b", r"\bvLLM, 0\.16\b", r"\bPEFT \| run here by hand with 0\.21\b",
    r"November 2026", r"commit [0-9a-f]{7}\b", r"\[(tiny-k\d|eval_gsm8k\.py)\]", r"\bqwen3\b",
    r"\bmodel of 4 billion parameters", r"\ba 4B model fits 24 GB\b",     # the latter: see below
    # --- names of things in the method: k = 1, k-1 mask tokens, slot 1, y1, position i+1, head 2
    r"\bk = 1\b", r"\bk from 2\b", r"\b[Kk] ?- ?1\b", r"\bk_max \+ 1\b",
    r"\b(one of|with) k_max 8\b", r"\b[Ss]lot\*? [1-4]\b", r"\b[Dd]raft [1-4]\b", r"\by1\b",
    r"\b[ij]\+[j1]+(\+1)?", r"\b[Hh]ead [12]\b",
    # --- names of strategies, and the threshold that the text is about
    r"\b[Ss]tatic [238]\b", r"\b(adaptive|[Tt]hreshold|at|At|Is) 0\.9\b",
    # --- where to look, and what a number beside a table stands for
    r"\b[Ss]ections? \d+(, \d+)*( and \d+)?", r"^ *\d+\. ", r"\([1-4]\)", r"\b95% interval",
    # --- examples, and what a command prints
    r"\[8\|After the gift Rosa has 39\]: 8 tokens in one pass", r'"1 of 1 answers identical to',
    r'"\d [a-z]+( and \d [a-z]+)?"', r"^> Elif has 2 beads and 6 toys", r"after 7, apples",
    r"rise well above 1\b",
]


def literal_text(template):
    """What of a template is written as it stands, without code, addresses, headings and ALLOWED.
    Of a command its comment remains."""
    text = (tables.TEMPLATES / template).read_text(encoding="utf-8")
    for pattern in (r"\{#.*?#\}", r"\{%.*?%\}", r"\{\{.*?\}\}"):
        text = re.sub(pattern, " ", text, flags=re.S)
    text = re.sub(r"```.*?```", lambda block: "\n".join(re.findall(" # (.*)", block[0])), text,
                  flags=re.S)
    text = re.sub(r"`[^`]*`", " ", text)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    # a name may be broken between two lines, but not between two paragraphs, rows or bullets
    text = re.sub(r"(?<=\S)\n *(?=[^\s|>*-])(?!\d+\. )", " ", text)
    for pattern in ALLOWED:
        text = re.sub(pattern, "", text, flags=re.M)
    return text


@pytest.mark.parametrize("_, template", PAGES)
def test_a_template_holds_no_number(_, template):
    found = re.findall(r".{0,40}\d.{0,20}", literal_text(template))
    assert found == []


@pytest.mark.parametrize("_, template", PAGES)
def test_nor_does_an_expression(_, template):
    """{{ 97.5 }} is none: what is written comes from a name or from a function."""
    text = (tables.TEMPLATES / template).read_text(encoding="utf-8")
    for expression in re.findall(r"\{\{(.*?)\}\}", text, re.S):
        value = re.sub(r'"[^"]*"', "", expression.split("|")[0])
        assert re.search(r"[A-Za-z]", value), expression
    # the only numbers that get a name in a template: thresholds; an aim; a machine's cores
    given = []
    for value in re.findall(r"\{% set .*? = (.*?) %\}", text, re.S):
        value = re.sub(r'"([\d.]+)"', r"\1", value)
        value = re.sub(r'"[^"]*"', "", value)
        while re.search(r"[(\[][^()\[\]]*[)\]]", value):                  # of calls and indices
            value = re.sub(r"[(\[][^()\[\]]*[)\]]", "", value)
        given += re.findall(r"(?:^|[,:] )(\d[\d.]*)", value)
    named = {"README.md": ["0.9"], "results.md": ["0.9", "2", "0.95", "2"]}
    assert given == named[template]
    # the numbers for which there is no log are known, one by one
    unlogged = {"README.md": [], "results.md": ["2", "128"]}
    assert sorted(re.findall(r"unlogged\((.*?)\)", text)) == sorted(unlogged[template])


def test_the_papers_numbers_stand_in_one_place():
    """common/paper.py: neither page's template nor a study's source repeats them."""
    numbers = {str(right) for right, _ in [*paper.DECODING.values(), *paper.VARIANTS.values()]}
    for path in (ROOT / "studies").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not [number for number in numbers if re.search(rf"\b{number}\b", source)], path
        assert not any(claim in source for claim in paper.HEADS.values()), path


def test_what_the_words_say():
    """Claims without a number of their own: the same text, slower, the highest."""
    runs = ["tiny-k8", "tiny-k3", "tiny-heads4", "tiny-loop8", "tiny-adapters64",
            "tiny-adapters64-500", "tiny-adapters64-2000", "smollm2-masks/eval",
            "smollm2-heads/eval", "smollm2-adapters64/eval"]
    lossless = [own for run in runs for name, own in tables.strategies(run).items()
                if name.startswith("lossless")]
    assert len(lossless) >= 12 and all(own["identical_text"] == 1 for own in lossless)
    for run, batch in (("bench-smollm2-masks", 1), ("bench-smollm2-adapters64", 1),
                       ("bench-tiny-k8", 1), ("bench-tiny-k8", 8)):
        for name, own in tables.race(run, batch).items():
            if re.search("k = 1|lossless", name):
                assert own["greedy"] == own["texts"], (run, name)
    assert tables.race("bench-tiny-k8", 8)["ours, lossless 8"]["times_k1"] < 1
    for way in ("adapters64", "heads4"):
        plan = tables.record(f"plan/qwen3-4b-instruct-2507-{way}.json")
        assert plan["largest_micro_batch_size"]["24"] > 0
    # none within one point, and one within two
    assert tables.chosen("tiny-k8/validation", 0.01) is None
    assert tables.chosen("tiny-k8/validation", 0.02) is not None
    table = ablate.summarise(tables.ablation())
    order = sorted(table, key=lambda variant: table[variant]["k = 1"][0], reverse=True)
    assert order[0] == "prefix loss"
    assert {order for orders in tables.verdicts().values() for order in orders} == {"is undecided"}


HEADED = ("table.json", "bench.json", "confidence.json", "clash.json", "efficiency.json",
          "viewer.json")


def test_every_log_says_how_it_was_made():
    """Command, commit and machine, and no commit with edits that nobody can look up."""
    files = [path for path in tables.RESULTS.rglob("*.json")
             if path.name in HEADED or path.parent.name == "plan"]
    headers = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    logs = [path for path in tables.RESULTS.rglob("*.jsonl*") if path.name.startswith("log.")]
    for path in logs:
        headers += [row for event in ("start", "resume") for row in read_log(path).get(event, [])]
    assert len(files) > 40 and len(headers) > len(files) + 20
    for path, header in zip(files + ["a log"] * len(headers), headers):
        assert header["command"] and header["device"], path
        assert re.fullmatch("[0-9a-f]{7,}", header["commit"]), path


def test_what_is_undefined_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TEMPLATES", tmp_path)
    (tmp_path / "page.md").write_text("{{ strategies('tiny-k8').nosuch.accuracy }}")
    with pytest.raises(jinja2.UndefinedError):
        tables.render("page.md")


def test_one_command_writes_both(tmp_path):
    result = cli(tables, "--out", tmp_path)
    assert result.code == 0, result
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == set(tables.PAGES)
    for page in written:
        assert (tmp_path / page).read_bytes() == (ROOT / page).read_bytes()


# --------------------------------------------------------------------------------------------------
# Another number in a log: another page

@pytest.mark.parametrize("file, old, new, page", [
    ("tiny-k8/batch1/rows.jsonl.gz", '"seconds": 0.1', '"seconds": 0.3', "README.md"),
    ("tiny-k8/rows.jsonl.gz", '"correct": 1', '"correct": 0', "README.md"),
    ("tiny-k8/validation/rows.jsonl.gz", '"correct": 1', '"correct": 0', "README.md"),
    ("tiny-familiar/unfamiliar/rows.jsonl.gz", '"correct": 1', '"correct": 0', "results.md"),
    ("tiny-k8/log.jsonl", '"minutes": 24.448', '"minutes": 25.448', "README.md"),
    ("bench-smollm2-heads/bench.json", '"ratio_to_k1": [', '"ratio_to_k1": [9, 9, 9, ',
     "README.md"),
    ("smollm2-answers-lr1e-4/log.jsonl", '"agreement": [0.9', '"agreement": [0.8', "results.md"),
    ("confidence-tiny-k8/confidence.json", '"tokens": 3058', '"tokens": 3059', "results.md"),
    ("ablation/default-0/rows.jsonl.gz", '"correct": 1', '"correct": 0', "results.md"),
    ("clash/clash.json", '"together": 1', '"together": 2', "results.md"),
    ("bench-tiny-k8/bench.json", '"tokens_per_second": [', '"tokens_per_second": [9, 9, 9, ',
     "results.md"),
    ("efficiency-tiny/efficiency.json", '"matmul_flop_per_second": [', '"matmul_flop_per_second": '
     '[9e11, 9e11, 9e11, ', "results.md"),
    ("efficiency-tiny/efficiency.json", '"peak_bytes": 1', '"peak_bytes": 2', "results.md"),
    ("plan/qwen3-0.6b.json", '"estimated_bytes": 1', '"estimated_bytes": 2', "results.md"),
    ("plan/tiny-measured.json", '"process": 1', '"process": 2', "results.md"),
    ("cascade-tiny/joint-0.json", '"passes": 2', '"passes": 3', "results.md"),
])
def test_a_number_of_a_log_is_one_of_a_page(file, old, new, page, tmp_path, monkeypatch):
    results = tmp_path / "results"
    shutil.copytree(tables.RESULTS, results, copy_function=os.symlink)
    was = (results / file).read_bytes()
    text = gzip.decompress(was).decode() if file.endswith(".gz") else was.decode()
    if file.endswith(".json"):                              # whatever its line breaks
        text = re.sub(r"\[\s+", "[", text)
    assert old in text
    (results / file).unlink()
    changed = text.replace(old, new).encode()
    (results / file).write_bytes(gzip.compress(changed) if file.endswith(".gz") else changed)
    monkeypatch.setattr(tables, "RESULTS", results)
    path = next(path for path, template in PAGES if template == page)
    assert tables.render(page) != (ROOT / path).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# How a number is written

def test_formats():
    assert tables.to(0.9749, ".1%") == "97.5%" and tables.to(1234.5, ",.0f") == "1,234"
    assert tables.to(-0.001, "+.2f") == tables.to(0.001, "+.2f") == "0.00"
    assert tables.to(-0.5, "+.1f") == "-0.5" and tables.to(0.5, "+.1f") == "+0.5"
    assert tables.plus_minus((-3.44, 1.2), "+.1f") == "-3.4 +- 1.2"
    assert tables.rate(0.0002) == "2e-4" and tables.rate(1e-5) == "1e-5"
    assert tables.word(8) == "eight" and tables.threads("cpu: AMD EPYC, 2 threads") == "two"
    assert tables.giga(3.3685e9, ".3f") == "3.369" and tables.points((0.5, 0.01)) == (50, 1)
    assert tables.speed(1070.6) == "1,071" and tables.speed(23.81) == "23.8"
    assert tables.flag(["--lr", "2e-3", "--limit", "160"], "--limit") == "160"
    assert tables.unlogged(20) == 20
    text = "| lossless 2 heads | lossless 5 heads | lossless 8 |"
    assert tables.as_drafts(text) == "| 1 draft | 4 drafts | lossless 8 |"


def test_columns():
    table = tables.markdown(["a", "b", "c"], [["1", "2", "3"], ["4", "", "6"]])
    assert table == "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n| 4 |  | 6 |"
    assert tables.columns(table, "c", "b: beta") == "| c | beta |\n|---|---|\n| 3 | 2 |\n| 6 |  |"
    with pytest.raises(ValueError):
        tables.columns(table, "d")


# --------------------------------------------------------------------------------------------------
# What is read, from a small made-up results/

@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def row(i, strategy, correct, tokens, drafts=(), **more):
    return {"id": i, "strategy": strategy, "batch": i // 2 * 2, "batch_rows": 2,
            "correct": correct, "correct_strict": correct, "tokens": tokens, "chunks": [1] *
            len(tokens), "drafts": list(drafts), "finish": "stop", "seconds": 2.0,
            "prompt_seconds": 0.5, "start_loss": 0.5} | more


def evaluated(folder, rows):
    """An evaluation's two files; the table names the strategies, in another order than the rows."""
    names = list(dict.fromkeys(own["strategy"] for own in rows))
    folder.mkdir(parents=True)
    write_json(folder / "table.json", {
        "settings": {"batch_size": 2}, "device": "cpu: x, 1 threads",
        "table": [{"strategy": name.replace("static 1", "k = 1")} for name in names]})
    write_lines(folder / "rows.jsonl.gz", [{"batch_size": 2}, *reversed(rows)])


def test_an_evaluation(results):
    """All numbers come from the rows, whole or compact."""
    rows = [row(i, "start, k = 1", 1, [i, 7]) for i in range(4)]
    rows += [row(i, "static 1", int(i > 0), [i, 7]) for i in range(4)]     # an older name of k = 1
    rows += [row(i, "lossless 3", 1, [i % 3, 7], [[2, 2], [2, 1], [0, 0]], seconds=1.0 + i)
             for i in range(4)]
    evaluated(results / "run", rows)
    found = tables.strategies("run")
    assert list(found) == ["start, k = 1", "k = 1", "lossless 3"]
    assert (found["k = 1"]["accuracy"], found["lossless 3"]["identical_text"]) == (0.75, 0.75)
    assert found["lossless 3"]["speed_ups"] == [2 / 2, 2 / 4]               # two batches
    assert tables.decoding_table("run") + "\n" == markdown(list(found.values()))
    assert tables.accuracy(found["start, k = 1"]) == (100, 0)
    assert tables.evaluation("run") == {"batch_size": 2, "device": "cpu: x, 1 threads"}
    assert tables.rows_settings("run") == {"batch_size": 2}
    with pytest.raises(InputError):
        tables.strategies("nosuch")
    difference, interval = tables.against_start("run")
    assert difference == -25 and interval == pytest.approx(49)             # 1.96 * 0.5 / sqrt(4)
    assert tables.start_texts("run", "k = 1") == 4
    assert tables.start_texts("run", "k = 1", "lossless 3") == 3
    assert tables.acceptance("run", "lossless 3") == (8, [1, 0.5])

    plain = {own["id"]: own for own in rows if own["strategy"] == "static 1"}
    evaluated(results / "compact", [compact(own, plain[own["id"]]) for own in rows])
    assert tables.strategies("compact") == found
    assert tables.start_texts("compact", "k = 1", "lossless 3") == 3
    assert tables.against_start("compact") == (difference, interval)


def test_which_threshold(results):
    """Chosen where it is not reported: the lowest within the limit, whatever the order."""
    def rows(wrong):
        found = [row(i, "k = 1", 1, [i]) for i in range(100)]
        for name, n in wrong.items():
            found += [row(i, name, int(i >= n), [i]) for i in range(100)]
        return found

    evaluated(results / "validation", rows(
        {"adaptive 0.99": 0, "adaptive 0.9": 1, "adaptive 0.95": 0, "adaptive 0.8": 2}))
    evaluated(results / "test", rows(
        {"adaptive 0.9": 3, "adaptive 0.99": 1, "adaptive 0.8": 0, "adaptive 0.95": 0}))
    assert tables.chosen("validation", 0.01) == "0.9" and tables.chosen("test") == "0.8"
    assert tables.chosen("validation") == "0.8" and tables.chosen("validation", -1) is None
    lines = tables.thresholds_table("validation", "test").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 0.99", "| 0.9", "| 0.95", "| 0.8"]
    assert lines[1].startswith("| 0.9 | -1.0 +- 2.0 | 1.00 | -3.0 +- ")


def test_a_training(results):
    start = {"event": "start", "step": 0, "k": 2, "lr": 0.001}
    rows = [{"event": "train", "step": step, "slots": 10, "agreement": [0.1 * step, None][:n]}
            for step, n in ((1, 1), (2, 2), (3, 1))]
    ends = [{"event": "end", "step": 2, "minutes": 5.0, "peak_memory_gb": 3.0},
            {"event": "end", "step": 3, "minutes": 1.5, "peak_memory_gb": 2.0}]
    write_lines(results / "all" / "one" / "log.jsonl.gz", [start, *rows, rows[-1], *ends])
    own = tables.training("all/one")
    assert (own["minutes"], own["peak"], own["last"], own["k"]) == (6.5, 3.0, 3, 2)
    assert own["supervised"] == 30                      # a step that was repeated counts once
    assert tables.trainings("all") == [own]
    assert tables.agreement("all/one", 1, 2, 3) == pytest.approx(0.25)
    write_lines(results / "two.jsonl", [start, *rows, *ends[1:]])
    assert tables.training("two.jsonl")["minutes"] == 1.5
    assert [row["step"] for row in tables.log("two.jsonl")["train"]] == [1, 2, 3]
    (results / "bars.txt").write_text("28%| 832/2999 [18:26<\nnothing\n 7/9 [0:5<\n")
    assert tables.counted("bars.txt", r"(\d+)/\d+ .(\d+):") == [[832, 18], [7, 0]]


def test_confidence(results):
    def own(low, high, tokens, said, right, stderr=0.01):
        return {"from": low, "to": high, "tokens": tokens, "confidence": said, "agrees": right,
                "stderr": stderr}

    one = [own(0.3, 0.5, 10, 0.4, 0.1), own(0.9, 0.95, 10, 0.92, 0.91),
           own(0.95, 0.99, 30, 0.97, 0.5), own(0.99, 1.0, 60, 0.999, 0.9)]
    (results / "run").mkdir()
    write_json(results / "run" / "confidence.json",
               {"calibration": {"slot 1": one, "slots 2 and up": one[3:]}})
    high = tables.joined("run", ["slot 1", "slots 2 and up"], 0.95)
    assert high["tokens"] == 150 and high["agrees"] == pytest.approx((30 * 0.5 + 120 * 0.9) / 150)
    assert tables.joined("run", ["slot 1"], 0, 0.5)["tokens"] == 10
    assert tables.overconfident("run", "slot 1") == [(0.3, 0.5), (0.95, 0.99), (0.99, 1.0)]
    assert tables.overconfident_from("run", "slot 1") == 0.95
    lines = tables.calibration_table("run").splitlines()
    assert "| 0.99 to 1 | 60 | 99.90 | 90.00 +- 1.00 | 60 | 99.90 | 90.00 +- 1.00 |" in lines
    assert lines[-1].startswith("| all | 110 | ") and len(lines) == 2 + 9 + 1


def test_ablation(results):
    """Two seeds, two questions, and variants that differ from the default in one thing each."""
    def run(hits, tokens):
        rows = [{"id": i, "correct": hit, "tokens": tokens, "chunks": [1] * 10}
                for i, hit in enumerate(hits)]
        return {"steps": 3, "minutes": 1.5, "rows": dict.fromkeys(ablate.STRATEGIES, rows)}

    runs = {"default": [run([1, 0], 20)] * 2, "fixed k": [run([1, 0], 10)] * 2,
            "curriculum": [run([1, 1], 20), run([1, 0], 20)]}
    tables.ablation_runs.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "read_runs", lambda folder: runs)
        assert tables.ablation() is runs
    assert tables.ablation_table() == ablate.markdown(ablate.summarise(runs), runs).rstrip()
    right, rate = tables.against("curriculum")
    assert right[0] == pytest.approx(25) and right[1] > 1000 and rate == (0, 0)
    assert tables.by_seed("curriculum", "points") == "+50.0, 0.0"
    assert tables.comparisons() == (4, pytest.approx(1 - 0.05 / 4), 0.95)
    assert tables.verdicts() == {"fixed k": ("is undecided", "holds")}
    rows = tables.differences_table().splitlines()[2:]
    assert rows[0].startswith("| fixed k | 0.0 +- 0.0 | 0.0, 0.0 | -1.00 +- 0.00 | -1.00, -1.00")
    assert rows[0].endswith("| -12.5 | -0.6 | 54.1 | undecided | holds |")
    assert rows[1].startswith("| curriculum | +25.0 +- ") and rows[1].endswith("|  |  |  |  |  |")


def test_clash(results):
    def seed(together, clash, foreign):
        own = {"together": together, "clash": clash, "foreign": foreign,
               "slots": [[["6", 0.69], ["2", 0.3]], [[" toys", 0.36]]]}
        return {"objectives": {"ground truth as labels": own}}

    (results / "clash").mkdir()
    write_json(results / "clash" / "clash.json",
               {"limit": 200, "each_seed": [seed(91, 98, 11), seed(109, 90, 1)]})
    assert tables.clash_table().splitlines()[2] == (
        "| ground truth as labels | 91, 109 | 98, 90 | 11, 1 | 6 0.69, 2 0.30 | toys 0.36 |")
    assert tables.clash_counts("ground truth as labels", "clash") == [98, 90]
    assert tables.clash_share("ground truth as labels", "together") == 0.5


def test_bench(results):
    """An older record has another name for tokens per pass."""
    def contender(rates, k1, **per_pass):
        return {"tokens_per_second": rates, "greedy_texts": 2, "texts": 3, "peak_mebibytes": 1,
                "ratio": [1, 2, 3], "ratio_to_k1": k1} | per_pass

    (results / "run").mkdir()
    write_json(results / "run" / "bench.json", {
        "races": {"1": {"ours, k = 1": contender([40, 50, 60], [1, 1, 1], tokens_per_pass=1.0),
                        "ours, lossless 3 heads": contender(
                            [100, 900, 1100], [2, 3.5, 3], tokens_per_pass_and_row=1.5)}},
        "milliseconds_by_width": {"1": 20.0, "4": 30.0}})
    own = tables.race("run")["ours, lossless 3 heads"]
    assert (own["times_theirs"], own["times_k1"], own["speed"]) == (2, 3, 900)
    assert (own["per_pass"], own["greedy"], own["texts"]) == (1.5, 2, 3)
    assert tables.race_table("run").splitlines()[-1] == (
        "| ours, lossless 3 heads | 3.00 (2.00 to 3.50) | 2.00 (1.00 to 3.00) | 900 (100 to 1,100) "
        "| 100% | 1.50 | 2 of 3 |")
    assert tables.ratio_to_k1("run", "ours, lossless 3 heads") == [2, 3.5, 3]
    assert tables.widths("run") == {1: 20, 4: 30}
    assert tables.widths_table(x="run").splitlines()[2:] == [
        "| x, ms | 20.0 | 30.0 |", "| times one token | 1.00 | 1.50 |"]


def test_efficiency(results):
    """From the rounds; of the matmul rates the median."""
    def rounds(rate):
        return [{"seconds": s, "flop": s * 4e9, "slots": 25, "fed_tokens": 100,
                 "supervised_tokens_per_second": rate * s / 20} for s in (10, 20, 60)]

    (results / "run").mkdir()
    write_json(results / "run" / "efficiency.json", {
        "steps": 3, "table": [{"name": name, "peak_bytes": 2e9} for name in ("before", "now")],
        "matmul_flop_per_second": [10e9, 90e9, 8e9],
        "each_round": {"before": rounds(1000), "now": rounds(1500)}})
    assert tables.efficiency_table("run", "tiny").splitlines()[-1] == (
        "| now | 1,500 (1.50x) | 750 to 4,500 | 0.25 | 40% | 2.00 |")
    assert tables.first_ratio("run", "now") == 1.5
    assert tables.step_seconds("run") == [10, 10]


def test_which_part_a_plan_trains():
    plan = {"gpus": 1, "fsdp": False}
    assert tables.trained_part(plan) == "all weights"
    assert tables.trained_part(plan | {"gpus": 4, "fsdp": True}) == (
        "all weights, each of 4 GPUs, `--fsdp`")
    assert tables.trained_part(plan | {"adapters": 16}) == "adapters, rank 16"
    heads = plan | {"adapters": None, "heads": 4, "loop": False, "draft_vocab": 0}
    assert tables.trained_part(heads) == "4 heads"
    assert tables.trained_part(heads | {"loop": True, "draft_vocab": 32768}) == (
        "one head, looped 4 deep, 32,768 drafted tokens")


def test_cascade(results):
    """What was counted question by question, and no table, makes the table."""
    settings = {"heads": 4, "steps": 10}
    runs = {"joint": [{"seed": 0}], "joint, no distillation": [{"seed": 0}]}
    (results / "run").mkdir()
    write_json(results / "run" / "table.json", {"settings": settings, "runs": runs})
    for name, tokens in (("joint", 30), ("joint-no-distillation", 20)):
        questions = [{"tokens": tokens + i, "passes": 10, "stood": [2, 1, 1]} for i in range(4)]
        write_json(results / "run" / f"{name}-0.json", {"questions": questions})
    _, found = tables.cascade_runs("run")
    assert [len(own[0]) for own in found.values()] == [4, 4]
    assert "| joint | 1 | 10 | 3.150 +- 0.065 | 50.0 +- 0.0 (50.0 +- 0.0) |" in (
        tables.cascade_table("run"))
    claim = tables.cascade_claims("run")
    assert claim.startswith("- **joint** against joint, no distillation: +1.000")
    assert paper.HEADS["joint", "joint, no distillation"] in " ".join(claim.split())
    assert all(len(line) <= 100 for line in claim.splitlines())
