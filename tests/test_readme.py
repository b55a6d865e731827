"""
The README's claims: every command's flags exist, every file it names is there, the numbers of its tables are those of
results/, and the commands that need neither network nor hours run.
"""
import gzip
import json
import os
import re
import shlex
import statistics
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from extras import ablate

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [part.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()
            for part in line.split(" && ") if part.split(" #")[0].strip()]
# Inline too: `python -m extras.NAME ...`
COMMANDS += [code for code in re.findall(r"`(python[^`\n]*)`", README) if not code.startswith("python3")]


def script_of(command):
    """("train.py", its flags) of a command that runs one of our scripts, else (None, [])."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *[word for word in words[1:] if not word.startswith("--nproc")]]
    if words[0] != "python" or len(words) < 2:
        return None, []
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1], words[2:]


OURS = sorted({(script, tuple(word for word in flags if word.startswith("--"))) for script, flags in map(script_of, COMMANDS)
               if script and script != "pytest"})


def test_there_are_commands():
    assert {"train.py", "sample.py", "eval_gsm8k.py", "extras.viewer", "extras.plan"} <= {script for script, _ in OURS}


@pytest.fixture(scope="module")
def help_of():
    texts = {}

    def read(script):
        if script not in texts:
            arguments = ["-m", script] if script.startswith("extras.") else [script]
            result = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            texts[script] = result.stdout
        return texts[script]

    return read


def test_flags_exist(help_of):
    """Of every command, in blocks and in sentences. extras.plan takes train.py's flags too."""
    for script, flags in OURS:
        text = help_of(script) + (help_of("train.py") if script == "extras.plan" else "")
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{script} has no {flag}"
    presets = set(re.findall(r"--preset (\S+)", " ".join(COMMANDS)))
    assert presets <= set(re.findall(r"[\w-]+", re.search(r"--preset \{(.*?)\}", help_of("train.py"))[1]))


def test_links_and_files_exist():
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(targets) > 20
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for name in re.findall(r"python (?:-m )?(extras\.\w+|\w+\.py)", README):
        assert (ROOT / (name.replace(".", "/") + ".py" if name.startswith("extras.") else name)).exists(), name


def test_one_command_draws_all_figures(tmp_path):
    subprocess.run([sys.executable, "-m", "extras.figures", "--out", str(tmp_path)], cwd=ROOT, check=True)
    shown = {target.removeprefix("assets/") for target in re.findall(r"\]\((assets/[^)]+)\)", README)}
    assert len(shown) >= 6 and shown == {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "viewer.html").read_bytes() == (ROOT / "assets" / "viewer.html").read_bytes()
    for picture in tmp_path.glob("*.png"):
        committed, drawn = (plt.imread(folder / picture.name) for folder in (ROOT / "assets", tmp_path))
        assert committed.shape == drawn.shape and abs(committed - drawn).mean() < 0.001, picture.name


def test_functions_it_sends_the_reader_to_exist():
    """`name` ... in [file](file): the file defines it."""
    found = re.findall(r"((?:`\w+`(?:, | and )?)+) in\n? ?\s*\[(\w+\.py)\]", README)
    assert len(found) >= 6
    for names, file in found:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), (name, file)


def test_it_stays_short():
    assert len(README.splitlines()) < 300


def table_rows(first_cell):
    """The README's table rows that begin with this cell: lists of cells."""
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in README.splitlines()
            if line.startswith(f"| {first_cell} |")]


NAMES = {"k = 1": "static 1", **{f"static {k}": f"static {k}" for k in (2, 3)},
         **{f"adaptive {t}": f"adaptive {t}" for t in ("0.99", "0.95", "0.9", "0.8")}, "start, k = 1": "start, k = 1"}


def averages(run):
    """{strategy: (accuracy in %, tokens per forward)} from the rows themselves and not from table.json."""
    answers = {}
    with gzip.open(ROOT / "results" / run / "rows.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            if "strategy" in row:
                both = 100 * row["correct"], len(row["tokens"]) / len(row["chunks"])
                answers.setdefault(row["strategy"], []).append(both)
    return {strategy: tuple(map(statistics.fmean, zip(*rows))) for strategy, rows in answers.items()}


def test_accuracies_are_those_of_the_logs():
    """Each strategy's accuracy and tokens per forward."""
    found = averages("tiny-k8")
    for name, strategy in NAMES.items():
        (cells,) = [row for row in table_rows(name) if len(row) == 8 and "+-" in row[1] and row[-1].startswith("0.")
                    and float(row[1].split()[0]) > 50]
        assert (cells[1].split()[0], cells[3].split()[0]) == ("{:.1f}".format(found[strategy][0]),
                                                              "{:.2f}".format(found[strategy][1])), name


def test_numbers_of_the_quick_starts_model():
    """k_max 3, in a sentence."""
    found = averages("tiny-k3")
    text = " ".join(README.split())
    sentence = "k = 1 {:.1f}; adaptive 0.99 {:.1f} at {:.2f} tokens per forward, adaptive 0.9 {:.1f} at {:.2f}".format(
        found["static 1"][0], *found["adaptive 0.99"], *found["adaptive 0.9"])
    assert sentence in text
    times = {row["strategy"]: row["speed_up"] for row in
             json.loads((ROOT / "results" / "tiny-k3" / "batch1" / "table.json").read_text())["table"]}
    assert "at batch 1 {:.2f}x and {:.2f}x".format(times["adaptive 0.99"], times["adaptive 0.9"]) in text


def test_the_two_runs_of_smollm2():
    """The second's cells; the first's, where it has the row."""
    first, second = ({entry["strategy"]: entry for entry in json.loads((ROOT / "results" / run / "eval" / "table.json")
                                                                       .read_text())["table"]}
                     for run in ("smollm2-gsm8k-k4", "smollm2-answers-lr1e-4"))

    def cells(entry, speed=False):
        if entry is None:
            return [""] * 4
        shared = f"{entry['shared_prefix']:.0%}" if "shared_prefix" in entry else ""
        return [f"{100 * entry['accuracy']:.1f}", f"{entry['tokens_per_forward']:.2f}",
                *([f"{entry['speed_up']:.2f}x"] if speed else []), shared, f"{entry['start_loss']:.3f}"]

    for label, strategy in (("start model, k = 1", "start, k = 1"), ("trained, k = 1", "static 1"),
                            ("trained, static 2", "static 2"), ("trained, adaptive 0.9", "adaptive 0.9"),
                            ("trained, lossless", "lossless 4"), ("trained, lossless narrow", "lossless 4 narrow")):
        assert table_rows(label) == [[label, *cells(first.get(strategy)), *cells(second[strategy], speed=True)]], label


def test_slot_1_of_smollm2_on_unseen_questions():
    folder = ROOT / "results" / "smollm2-answers-lr1e-4"
    bins = json.loads((folder / "confidence" / "confidence.json").read_text())["calibration"]["slot 1"]
    agrees = sum(b["tokens"] * b["agrees"] for b in bins) / sum(b["tokens"] for b in bins)
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    last = [row["agreement"][0] for row in rows if row["event"] == "train" and row["step"] > 550]
    text = " ".join(README.split())
    assert f"would say in {agrees:.0%}; the {statistics.fmean(last):.0%} of the last training steps" in text


def test_the_ablations_are_those_of_the_runs():
    """The table, as extras.ablate makes it from every run's own table."""
    runs = json.loads((ROOT / "results" / "ablation" / "table.json").read_text())["runs"]
    lines = ablate.markdown(ablate.summarise(runs), runs).splitlines()
    assert len(lines) == 2 + len(ablate.VARIANTS) and all(line in README for line in lines)


def test_every_file_is_in_the_map():
    files = [str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "extras") for path in folder.glob("[!_]*.py")]
    assert len(files) > 20 and [file for file in files if f"]({file})" not in README] == []


def test_speeds_are_those_of_the_logs():
    """The race with transformers: median tokens/s of every contender."""
    for column, run in ((1, "bench-smollm2-k4"), (4, "bench-tiny-k8")):
        race = json.loads((ROOT / "results" / run / "bench.json").read_text())["races"]["1"]
        for name, entry in race.items():
            label = re.sub(r"lossless \d", "lossless", name.replace("static 1", "k = 1"))
            for cells in table_rows(label):
                median = statistics.median(entry["tokens_per_second"])
                assert float(cells[column]) == pytest.approx(median, abs=0.51 if median > 100 else 0.051), (run, name)


def test_memory_is_that_of_the_plans():
    for label, name in (("Qwen3-0.6B", "qwen3-0.6b"), ("Qwen3-4B", "qwen3-4b-instruct-2507"),
                        ("Llama-3.1-8B", "llama-3.1-8b-instruct")):
        (cells,) = table_rows(label)
        for column, file in ((1, f"{name}.json"), (4, f"{name}-fsdp4.json")):
            record = json.loads((ROOT / "results" / "plan" / file).read_text())
            assert cells[column] == f"{record['estimated_bytes'] / 1e9:.1f} GB"
            for memory, cell in zip(("24", "80"), cells[column + 1:]):
                best = record["largest_micro_batch_size"][memory]
                assert cell.split()[:3] == (["no"] if best == 0 else ["up", "to", str(best)])


def test_training_speeds_are_those_of_the_race():
    labels = {"before, stride 3": 0, "now, stride 3": 1, "now, the paper's density": 2, "now, stride 1": 4,
              "the same, half the micro batch": 5}
    for column, run in ((1, "efficiency-tiny"), (4, "efficiency-smollm2")):
        table = json.loads((ROOT / "results" / run / "efficiency.json").read_text())["table"]
        for label, place in labels.items():
            (cells,), entry = table_rows(label), table[place]
            speed, first = (e["supervised_tokens_per_second"] for e in (entry, table[0]))
            assert cells[column:column + 3] == [f"{speed:.0f} ({speed / first:.2f}x)", f"{entry['utilisation']:.0%}",
                                                f"{entry['peak_bytes'] / 1e9:.2f}"]


# --- blocks that need neither network nor hours: as they stand, but for fewer steps, questions and tokens

SHORT = {"train.py": ["--steps", "2", "--batch-size", "2", "--eval-prompts", "2", "--eval-tokens", "8"],
         "sample.py": ["--max-new-tokens", "16"], "eval_gsm8k.py": ["--limit", "2", "--max-new-tokens", "16"],
         "extras.viewer": ["--max-new-tokens", "16"]}


def run_block(block, folder):
    """Returns how many of our scripts were run; what installs is CI's own business."""
    commands = [part.split(" #")[0].strip() for line in block.splitlines() for part in line.split(" && ")]
    ran = 0
    for command in commands:
        script, flags = script_of(command)
        if script is None:
            assert re.match(r"python3 -m venv|\. |pip install", command), command
            continue
        where = ["-m", script] if script.startswith("extras.") else [str(ROOT / script)]
        result = subprocess.run([sys.executable, *where, *flags, *SHORT[script]], cwd=folder, capture_output=True,
                                text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, (command, result.stderr)
        ran += 1
    return ran


def test_the_laptops_commands_run(tmp_path):
    assert run_block(BLOCKS[0], tmp_path) == 4
    assert (tmp_path / "out" / "latest").exists() and (tmp_path / "out-eval" / "table.md").exists()
    assert (tmp_path / "viewer.html").exists()


def test_commands_for_an_own_checkpoint_run(tiny, tmp_path):
    (block,) = [block for block in BLOCKS if "path/to/checkpoint" in block]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a} + 3", "response": f"That is {a + 3}."}) + "\n" for a in range(12)))
    assert run_block(block.replace("path/to/checkpoint", str(tiny)).replace("path/to/rows.jsonl", str(path)), tmp_path) == 2
    rows = (tmp_path / "out-eval" / "table.md").read_text()
    assert "| start, k = 1 |" in rows and "| static 4 |" in rows
