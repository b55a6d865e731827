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
import contextlib
import fcntl
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

SWITCH = argparse.BooleanOptionalAction     # --flag and --no-flag (type=bool reads "False" as True)

# No count is meant to be larger: memory would run full before anything came of it
MOST = {"batch_size": 10 ** 5, "micro_batch_size": 10 ** 5, "eval_prompts": 10 ** 5, "shots": 1000,
        "k": 1000, "heads": 1000, "seq_len": 10 ** 6, "max_new_tokens": 10 ** 6}


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


def number(text):
    """The type of flags that take any finite number: float("nan") and float("inf") are none."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number")


def printable(text):
    """Text from outside, ready for a terminal: control characters but newline and tab become "?".

    Prompts, rows, names in files, and what a model writes give no commands to a terminal.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", str(text))


def say(text):
    """print, for what may hold names, prompts or rows from outside."""
    print(printable(text))


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is an InputError too: one line, not a page of usage."""

    def __init__(self, prog, description):
        """prog   as it follows "python": "train.py", "-m studies.bench" """
        super().__init__(f"python {prog}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self):
        """The flags. An empty text, as of `--out "$forgotten"`, is no value of any."""
        args = super().parse_args()
        for name, value in vars(args).items():
            if isinstance(value, str) and not value.strip():
                raise InputError(f"--{name.replace('_', '-')} is empty")
        return args

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
            print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
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
    add("--threshold", type=number, help="adaptive: keep tokens while their confidence is above "
        "this, at most --k or the checkpoint's k_max (0.9 where --k is not given)")


def add_prompt_format_flag(add, *more, default="what the checkpoint was trained with"):
    add("--prompt-format", choices=["plain", "chat", *more], help=f"default: {default}")


def at_least(args, **least):
    """Raise InputError for the first flag below its least value: at_least(args, limit=1).

    None is below nothing. A flag must not be above MOST, either; --seed is always looked at.
    """
    seed = {"seed": 0} if hasattr(args, "seed") else {}
    for name, value in (seed | least).items():
        given = getattr(args, name)
        given = given if isinstance(given, list) else [] if given is None else [given]
        flag = f"--{name.replace('_', '-')}"
        if not all(one >= value for one in given):
            raise InputError(f"{flag} must be at least {value}")
        most = MOST.get(name, 10 ** 9)
        if not all(one <= most for one in given):
            raise InputError(f"{flag} must be at most {most}")


# --------------------------------------------------------------------------------------------------
# Output

@contextlib.contextmanager
def writing(path):
    """What the disk refuses inside the block is one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def reading(path):
    """What is damaged inside the block, whatever it does to the code that reads it, is one line."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError,
            RuntimeError, AssertionError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged, or no such file as it should be ({what})") from None


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


class Alone:
    """Holds a folder, or a file, for one program: a second one that asks for it is refused.

    The lock is the system's: it goes with the object or with the process, even a killed one.
    """

    def __init__(self, path):
        with writing(path):
            self.handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another program is writing to {path}: wait for it, or choose "
                             "another folder") from None
        except OSError:                             # a file system without locks
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.__del__()

    def __del__(self):
        if hasattr(self, "handle"):
            os.close(self.handle)
            del self.handle
