"""`vecmill serve` that lines of a pipe do harm to: `python -m tests.faults.harmed_server PIPE ...`."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vecmill.__main__ import main
from vecmill.engine import engine
from vecmill.inference.tokenizer_pool import TokenizerPool

POISON = "poison"


class Panic(BaseException):
    """As pyo3's PanicException, which Rust code raises: no Exception."""


class Harm:
    """What is to go wrong, until the next line."""

    def __init__(self) -> None:
        self._launch, self._encode = engine.launch, TokenizerPool.encode_part  # type: ignore[attr-defined]
        self._chance, self._share = random.Random(0), 0.0

    def passes(self, share: str, seed: str = "0") -> None:
        """This share of the forward passes raises."""
        self._chance, self._share = random.Random(seed), float(share)

    def end(self, *names: str) -> None:
        """A thread whose name begins so ends as soon as it runs Python again; the rest of its work is not done."""
        for thread in threading.enumerate():
            if thread.name.startswith(names) and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

    def launch(self, model: Any, rows: Any, *args: Any, **flags: Any) -> Any:
        probe = len(rows) == 1 and len(rows[0]) == 1  # a device that fails it is given up
        if not probe and self._chance.random() < self._share:
            raise RuntimeError("harmed")
        return self._launch(model, rows, *args, **flags)

    def encode(self, pool: TokenizerPool, texts: Any, *args: Any) -> Any:
        if any(POISON in text for text in texts):
            raise Panic("called `Option::unwrap()` on a `None` value")
        return self._encode(pool, texts, *args)


def obey(pipe: Path, harm: Harm) -> None:
    actions: dict[str, Callable[..., None]] = {"passes": harm.passes, "end": harm.end}
    while True:
        with pipe.open() as lines:
            for line in lines:
                action, *arguments = line.split()
                actions[action](*arguments)


if __name__ == "__main__":
    harm = Harm()
    engine.launch = harm.launch  # type: ignore[attr-defined]
    TokenizerPool.encode_part = lambda pool, texts, *args: harm.encode(pool, texts, *args)  # type: ignore[method-assign]
    threading.Thread(target=obey, args=(Path(sys.argv[1]), harm), daemon=True).start()
    sys.argv = ["vecmill", "serve", *sys.argv[2:]]
    main()
