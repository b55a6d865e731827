"""
The command line: flags that several scripts share, and bad input as one line.

    from common.cli import ArgumentParser, InputError, run
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add = parser.add_argument_group("model and machine").add_argument
    add_machine_flags(add)

`InputError` is the one exception for "what you gave me cannot work": `run` shows it as a line on
stderr, exit code 2. Anything else is a bug and keeps its traceback.
"""
import argparse
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

SWITCH = argparse.BooleanOptionalAction     # --flag and --no-flag (type=bool reads "False" as True)


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is an InputError too: one line, not a page of usage."""

    def __init__(self, prog, description):
        """prog   as it follows "python": "train.py", "-m studies.bench" """
        super().__init__(f"python {prog}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def run(main, resumes=False):
    """Call `main()`. An InputError becomes one line on stderr and exit code 2; Ctrl-C is 130.

    resumes   the script has --resume, and says so when it is interrupted
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # see common/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except InputError as error:
        end_bars()
        if os.environ.get("RANK", "0") == "0":
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        else:
            time.sleep(3)           # torchrun's other ranks: the first to end has all others killed
        sys.exit(2)
    except KeyboardInterrupt:
        end_bars()
        if resumes and os.environ.get("RANK", "0") == "0":
            print("stopped; if anything was saved, the same command with --resume goes on from it",
                  file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:         # the reader of our output has left: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def end_bars():
    """End the line of every progress bar, so that what follows starts on one of its own."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


# --------------------------------------------------------------------------------------------------
# Flags that mean the same everywhere. `add` is the add_argument of a parser or group.

def add_machine_flags(add):
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 where that is faster (%(default)s)")


def add_model_flag(add):
    """--model of the scripts that decode; `common.hub.default_model` says what None stands for."""
    add("--model", help="tiny-mtp, tiny, smollm2-135m, a folder or a hub id "
        "(out/latest if there is one, else tiny-mtp)")


def add_strategy_flags(add):
    """--k and --threshold of the scripts that decode in one way; see `sample.choose_strategy`."""
    add("--k", type=int, help="tokens per pass; alone: static k, all of them kept; with "
        "--threshold: at most so many; 1: one at a time (train.py --k is the most that a "
        "checkpoint can)")
    add("--threshold", type=float, help="adaptive: keep tokens while their confidence is above "
        "this, at most --k or the checkpoint's k_max (0.9 where --k is not given)")


def add_prompt_format_flag(add, *more, default="what the checkpoint was trained with"):
    add("--prompt-format", choices=["plain", "chat", *more], help=f"default: {default}")


def at_least(args, **least):
    """Raise InputError for the first flag below its least value: at_least(args, limit=1).

    None is below nothing, and NaN below everything.
    """
    for name, value in least.items():
        given = getattr(args, name)
        given = given if isinstance(given, list) else [] if given is None else [given]
        if not all(one >= value for one in given):
            raise InputError(f"--{name.replace('_', '-')} must be at least {value}")


# --------------------------------------------------------------------------------------------------
# Output

@contextmanager
def writing(path):
    """What the disk refuses inside the block is one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None


def spare(path, resume=False):
    """Refuse to write over an earlier run's file or (not empty) folder."""
    path = Path(path)
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists: add --resume to go on, or choose another --out")


def output_folder(path):
    """The folder for --out, made if it is absent. Returns a Path."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
