"""
What README.md and docs/results.md claim: every command's flags exist, every file they name is
there, the numbers of their tables are those of results/, and the commands that need neither network
nor hours run as they stand.
"""
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

import eval_gsm8k
from studies import ablate

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "results"
PAGES = {"README.md": README, "docs/results.md": DOCS}


# --- commands

def commands_of(text):
    """Every command in blocks and in sentences, without comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S)
             for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`\n]*)`", text)
    parts = [part.split(" #")[0].strip() for line in lines for part in line.split(" && ")]
    return [part for part in parts if part and not part.startswith("python3")]


def script_of(command):
    """("train.py", its flags) of a command that runs one of our scripts, else (None, [])."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *[word for word in words[1:] if not word.startswith("--nproc")]]
    if words[0] != "python" or len(words) < 2 or words[1:3] == ["-m", "pytest"]:
        return None, []
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


@pytest.fixture(scope="module")
def help_of():
    texts = {}

    def read(script):
        if script not in texts:
            arguments = [script] if script.endswith(".py") else ["-m", script]
            done = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT,
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            texts[script] = done.stdout
        return texts[script]

    return read


def test_flags_exist(help_of):
    """Of every command. studies.plan takes train.py's flags too."""
    scripts = set()
    for command in [*commands_of(README), *commands_of(DOCS)]:
        script, flags = script_of(command)
        if script is None or script == "studies.NAME":
            continue
        scripts.add(script)
        text = help_of(script) + (help_of("train.py") if script == "studies.plan" else "")
        for flag in flags:
            if flag.startswith("--"):
                flag = flag.split("=")[0]
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{script} has no {flag}"
    assert {"train.py", "sample.py", "eval_gsm8k.py", "studies.viewer", "studies.plan"} <= scripts


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert len(targets) > 8
    for target in targets:
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


def test_functions_it_sends_the_reader_to_exist():
    """`name` ... in [file](file): the file defines it."""
    found = re.findall(r"((?:`\w+`(?:, | and )?\s*)+) in\s+\[(\w+\.py)\]", README)
    assert len(found) >= 6
    for names, file in found:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(def|class) {name}\b", text, re.M), (name, file)


def test_every_file_of_the_tutorial_and_every_study_is_in_the_map():
    files = [path.name for path in ROOT.glob("*.py")]
    assert len(files) >= 6 and [file for file in files if f"[{file}]({file})" not in README] == []
    studies = {path.stem for path in (ROOT / "studies").glob("[!_]*.py")}
    row = README[README.index("- [studies/]"):].split("\n## ")[0]
    assert studies <= set(re.findall(r"\w+", row))


def test_it_stays_short():
    """One sitting."""
    assert len(README.split()) <= 1500


def test_one_command_draws_all_figures(tmp_path):
    command = [sys.executable, "-m", "studies.figures", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    shown = set(re.findall(r"\]\((?:\.\./)?assets/([^)]+)\)", README + DOCS))
    assert len(shown) >= 6 and shown == {path.name for path in tmp_path.iterdir()}
    assets = ROOT / "assets"
    assert (tmp_path / "viewer.html").read_bytes() == (assets / "viewer.html").read_bytes()
    for picture in tmp_path.glob("*.png"):
        committed, drawn = (plt.imread(folder / picture.name) for folder in (assets, tmp_path))
        assert committed.shape == drawn.shape, picture.name
        assert abs(committed - drawn).mean() < 0.001, picture.name


# --- numbers

def table_of(run):
    """{strategy: its entry} of a table.json."""
    record = json.loads((RESULTS / run / "table.json").read_text())
    return {entry["strategy"]: entry for entry in record["table"]}


def rows_in(text, first_cell):
    """The table rows that begin with this cell: lists of cells."""
    return [[cell.strip() for cell in line.strip("| \n").split("|")]
            for line in text.splitlines() if line.startswith(f"| {first_cell} |")]


def test_the_readmes_table_is_the_logs():
    """Accuracy and tokens per forward on 1,000 problems, speed-up at batch 1."""
    heads = {"lossless 5 heads"}
    many, single = (
        table_of(f"tiny-k8{run}") | {name: table_of(f"tiny-heads4{run}")[name] for name in heads}
        for run in ("", "/batch1"))
    lines = [line for line in README.splitlines()
             if re.match(r"\| (start|k = 1|static|adaptive|lossless)\b", line)]
    assert len(lines) == 7
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        strategy = {"start model, k = 1": "start, k = 1",
                    "lossless, narrow": "lossless 8 narrow",
                    "start model, 4 heads": "lossless 5 heads"}.get(name, name)
        entry = many[strategy]
        assert cells == [
            f"{100 * entry['accuracy']:.1f} +- {100 * entry['stderr']:.1f}",
            f"{entry['tokens_per_forward']:.2f}",
            f"{single[strategy]['speed_up']:.1f}x",
            f"{entry['identical_text']:.0%}" if "identical_text" in entry else ""], name


def test_the_readmes_first_lines_are_the_logs():
    many, text = table_of("tiny-k8"), " ".join(README.split())
    adaptive, lossless, own = many["adaptive 0.9"], many["lossless 8"], table_of("tiny-k3")
    sentence = ("Of 1,000 problems k = 1 answers {:.1f}% right. Threshold 0.9 writes {:.1f} tokens "
                "per pass and answers {:.1f}% right; lossless decoding writes {:.1f}, and exactly "
                "the text of k = 1.")
    assert sentence.format(
        100 * many["k = 1"]["accuracy"], adaptive["tokens_per_forward"],
        100 * adaptive["accuracy"], lossless["tokens_per_forward"]) in text
    assert lossless["identical_text"] == 1.0
    assert "({:.1f}% at {:.1f} tokens per pass, of 3 at most; ".format(
        100 * own["adaptive 0.9"]["accuracy"], own["adaptive 0.9"]["tokens_per_forward"]) in text


def test_what_the_readme_says_a_threshold_costs():
    many = table_of("tiny-k8")
    training = 100 * (many["start, k = 1"]["accuracy"] - many["k = 1"]["accuracy"])
    costs = [-100 * many[f"adaptive {threshold}"]["difference"][0] for threshold in ("0.99", "0.9")]
    sentence = "beside the {:.1f} points of training, 0.99 costs {:.1f} here, 0.9 {:.1f}."
    assert sentence.format(training, *costs) in " ".join(README.split())


def test_what_it_says_of_heads_on_smollm2():
    """README and the first lines of the section."""
    heads = table_of("smollm2-heads/eval")["lossless 5 heads"]
    race = json.loads((RESULTS / "bench-smollm2-heads" / "bench.json").read_text())["races"]["1"]
    ratio = statistics.median(race["ours, lossless 5 heads"]["ratio_to_k1"])
    assert heads["identical_text"] == 1 and heads["questions"] == 100
    sentence = "{:.2f} tokens per pass on unseen questions, {:.2f} times the speed of k = 1"
    assert sentence.format(heads["tokens_per_forward"], ratio) in " ".join(README.split())
    sentence = "writes {:.2f} tokens per pass on unseen questions, at batch 1 at {:.2f} times the"
    assert sentence.format(heads["tokens_per_forward"], ratio) in " ".join(DOCS.split())
    for name, entry in race.items():                        # the docs' table of the bench
        drafts = name.removeprefix("ours, lossless ").removesuffix(" heads")
        name = f"ours, {int(drafts) - 1} draft" if drafts.isdigit() else name
        row, = [line for line in DOCS.splitlines() if line.startswith(
            "| " + name) and
            f"| {statistics.median(entry['tokens_per_second']):.1f} (" in line]
        assert f"{statistics.median(entry['ratio']):.2f} (" in row
        assert f"| {entry['tokens_per_pass_and_row']:.2f} |" in row


@pytest.mark.parametrize("run", [
    "tiny-k8", "tiny-k8/batch1", "tiny-k3", "tiny-heads4", "tiny-heads4/batch1", "tiny-loop8",
    "tiny-loop8/batch1", "tiny-adapters64", "tiny-adapters64/batch1"])
def test_the_docs_tables_of_the_tiny_model_are_the_logs(run):
    """Every line, as eval_gsm8k.py makes it from its own table.json."""
    lines = eval_gsm8k.markdown(list(table_of(run).values())).splitlines()
    assert len(lines) >= 5 and all(line in DOCS for line in lines)


@pytest.mark.parametrize("run", ["cascade-tiny", "cascade-smollm2"])
def test_the_claims_about_heads_are_those_of_the_runs(run):
    text = (RESULTS / run / "table.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\||- \*\*", line)]
    assert len(lines) > 6 and all(line in " ".join(DOCS.split()) or line in DOCS for line in lines)


def test_the_ablations_are_those_of_the_runs():
    """The table, as studies.ablate makes it from every run's own table."""
    runs = json.loads((RESULTS / "ablation" / "table.json").read_text())["runs"]
    lines = ablate.markdown(ablate.summarise(runs), runs).splitlines()
    lines = [line for line in lines if line.startswith("|")]
    assert len(lines) == 2 + len(ablate.VARIANTS) and all(line in DOCS for line in lines)


# --- blocks that need neither network nor hours: as they stand, but for fewer steps and questions

SHORT = {"train.py": ["--steps", "2", "--batch-size", "2", "--eval-prompts", "2"],
         "sample.py": ["--max-new-tokens", "16"],
         "eval_gsm8k.py": ["--limit", "2", "--max-new-tokens", "16"]}


def run_commands(commands, folder):
    """Returns the scripts that were run; what installs is CI's own business."""
    ran = []
    for command in commands:
        script, flags = script_of(command)
        if script is None:
            assert re.match(r"\. |pip install", command), command
            continue
        done = subprocess.run([sys.executable, str(ROOT / script), *flags, *SHORT[script]],
                              cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, (command, done.stderr)
        ran.append(script)
    return ran


def first_commands(on_a_real_model):
    """Those of the first block that fetch a model, or those that need no network."""
    block = re.findall(r"```bash\n.*?```", README, re.S)[0]
    return [command for command in commands_of(block)
            if ("smollm2-135m" in command) == on_a_real_model]


def test_the_first_commands_run(tmp_path):
    """In a folder without a run: sample.py and eval_gsm8k.py take the trained tiny model."""
    assert run_commands(first_commands(on_a_real_model=False), tmp_path) == [
        "sample.py", "eval_gsm8k.py", "train.py", "sample.py"]
    assert (tmp_path / "out" / "latest").exists()
    assert "adaptive 0.9" in (tmp_path / "out-eval" / "table.md").read_text()


def test_the_first_command_on_a_real_model_runs(smollm2, tmp_path):
    assert run_commands(first_commands(on_a_real_model=True), tmp_path) == ["sample.py"]


def test_commands_for_an_own_checkpoint_run(tiny, tmp_path):
    block, = [block for block in re.findall(r"```bash\n.*?```", README, re.S)
              if "path/to/checkpoint" in block]
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{a} + 3", "response": f"That is {a + 3}."} for a in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = block.replace("path/to/checkpoint", str(tiny)).replace("path/to/rows.jsonl", str(path))
    assert run_commands(commands_of(block), tmp_path) == ["train.py", "eval_gsm8k.py"]
    table = (tmp_path / "out-eval-mine" / "table.md").read_text()
    assert "| start, k = 1 |" in table and "| static 4 |" in table
