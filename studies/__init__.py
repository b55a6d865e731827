"""
Studies: what was measured, compared and drawn with nanoMTP. Nothing above this folder imports them.

    python -m studies.NAME --help

    ablate, cascade             the papers' claims in miniature: of mask tokens, of heads
    clash                       why ground truth as labels fails
    answers                     training rows that the model wrote itself
    confidence                  is the student right when it is sure?
    bench, efficiency, plan     speed of decoding and of training; memory for training
    figures, tables, viewer     every picture and every number of the pages; a page to play with
    lm_eval_adapter             our decoding inside EleutherAI's lm-eval
    tiny                        how checkpoints/tiny and tiny-mtp were made
"""
import importlib.util
import subprocess
import sys
from pathlib import Path

from common.cli import InputError
from common.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


def needs(package):
    """Raises InputError where a package of requirements-dev.txt is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install -r requirements-dev.txt")


def output_file(path):
    """The file for --out, a Path. InputError, before any work, where there can be none."""
    path = Path(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"cannot write {path}: it is {what}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: no folder {path.parent}")
    return path


def run_script(script, *flags, what):
    """`python script flags` in a process of its own. InputError, naming `what`, if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise InputError(f"{script} failed for {what}, see above; --resume goes on from here")


def keep_settings(out, settings):
    """Note in OUT/settings.json what the runs there have in common; InputError for other ones."""
    path = out / "settings.json"
    was = read_json(path) if path.exists() else settings
    if was != settings:
        raise InputError(f"{out} was made with {was}: resume with the same settings, or choose "
                         "another --out")
    write_json(path, settings)
