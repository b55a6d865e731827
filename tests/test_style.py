"""
What holds for every source file: how wide it is, and who may know whom. The method's files stand at
the top; common/ is what they are built on; studies/ builds on all of it.
"""
import ast

from conftest import ROOT

FOLDERS = ("", "common/", "common/custom_generate/", "studies/", "tests/")
FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS
               for path in ROOT.glob(f"{folder}*.py"))


def imported(file):
    """First names of all modules that a file imports, inside functions too: {"torch", "common"}."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add(node.module.split(".")[0])
    return names


def test_lines_have_at_most_100_columns():
    wide = []
    for file in FILES:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        wide += [f"{file}:{number}" for number, line in enumerate(lines, 1) if len(line) > 100]
    assert wide == []


def test_nothing_below_knows_what_stands_above():
    """Only studies and tests import studies; common/ knows nothing of the method's files."""
    method = {file.removesuffix(".py") for file in FILES if "/" not in file}
    assert method == {"adapters", "eval_gsm8k", "heads", "model", "mtp", "sample", "speculate",
                      "train"}
    for file in FILES:
        folder, names = file.rpartition("/")[0], imported(file)
        assert folder in ("studies", "tests") or "studies" not in names, file
        assert folder == "tests" or not names & {"conftest", "pytest"}, file
        assert folder != "common" or not names & method, file
    # mtp.py is about its method alone: torch and nothing of ours. Heads are trained as it trains
    # and run on the model's blocks; decoding knows both methods, and neither knows of decoding
    assert not imported("mtp.py") & (method | {"common"})
    assert imported("heads.py") & method == {"model", "mtp"}
    assert imported("adapters.py") & method == {"model"}
    assert imported("sample.py") & method == {"adapters", "heads", "model", "speculate"}
    assert imported("speculate.py") & method == {"heads", "model", "mtp", "sample"}
