"""
What README.md and docs/results.md claim: every command's flags exist, every file they name is
there, and the commands that need neither network nor hours run as they stand. Their numbers are
tests/test_tables.py's business.
"""
import json
import os
import re
import shlex
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
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
    assert "[list](studies/__init__.py)" in README
    listed = (ROOT / "studies" / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    assert studies <= set(re.findall(r"\w+", listed))


def test_it_stays_short():
    """One sitting."""
    assert len(README.split()) <= 1550


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
