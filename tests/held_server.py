"""`vecmill serve` whose forward passes wait while the test holds a lock: `python -m tests.held_server LOCK ...`."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vecmill.__main__ import main
from vecmill.engine import engine, forward


@contextmanager
def held(gate: Path) -> Iterator[None]:
    """No forward pass begins while the block runs."""
    with gate.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hold(gate: Path) -> None:
    launch = forward.launch

    def wait_and_launch(*args: Any, **flags: Any) -> Any:
        with gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        return launch(*args, **flags)

    engine.launch = wait_and_launch  # type: ignore[attr-defined]


if __name__ == "__main__":
    _hold(Path(sys.argv[1]))
    sys.argv = ["vecmill", "serve", *sys.argv[2:]]
    main()
