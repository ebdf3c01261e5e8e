"""`vecmill serve` under an audit hook: `python -m tests.checkpoints.watched_server REPORT FOLDER ...`.

REPORT gets a line for whatever runs code of FOLDER, and for each pickle that finds a class: the interpreter itself
tells of them, so it does not matter by which way they are reached. `--try` in place of options does both on purpose.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from vecmill.__main__ import main

CODE = (".py", ".pyc", ".so", ".pth", ".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")


def watch(report: str, folder: str) -> None:
    """Write down what is imported, compiled, loaded or opened of the folder, and every pickle's classes."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        said = None
        if event == "pickle.find_class":
            said = f"pickle {arguments[0]}.{arguments[1]}"
        elif event in ("import", "exec", "compile", "ctypes.dlopen") and folder in repr(arguments):
            said = f"{event} {arguments[0]!r}"
        elif event == "open" and str(arguments[0]).startswith(folder) and str(arguments[0]).endswith(CODE):
            said = f"open {arguments[0]}"
        if said is not None:
            with os.fdopen(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as lines:
                lines.write(f"{said}\n")

    sys.addaudithook(hook)


def do_what_is_forbidden(folder: Path) -> None:
    """Import a module of the folder and load a pickle: the hook must see both."""
    sys.path.insert(0, str(folder))
    __import__("modeling_hf_nomic_bert")
    pickle.loads(pickle.dumps(Path))


if __name__ == "__main__":
    watch(sys.argv[1], sys.argv[2])
    if sys.argv[3:] == ["--try"]:
        do_what_is_forbidden(Path(sys.argv[2]))
    else:
        sys.argv = ["vecmill", "serve", *sys.argv[3:]]
        main()
