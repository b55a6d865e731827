"""
Plumbing that nobody must read. One thing happens on import: while a script of ours is still loading
torch, Ctrl-C ends it at once, where Python would print a page. `cli.run` takes over from there.
"""
import signal
import sys
from pathlib import Path

main_file = getattr(sys.modules["__main__"], "__file__", None)
root = Path(__file__).resolve().parent.parent
ours = (root, root / "common", root / "studies")
if sys.argv[0] == "-m" or (main_file and Path(main_file).resolve().parent in ours):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
