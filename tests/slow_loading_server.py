"""`vecmill serve` that loads until it is stopped: `python -m tests.slow_loading_server returns|raises ...`.

Loading ends, either way, right after nobody waits for it any more; the process goes on until the device's thread has
ended.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from vecmill.__main__ import main
from vecmill.engine import engine
from vecmill.engine.engine import Engine

LOADING = "loading until it is stopped"
PATIENCE = 20.0  # seconds


def _slow(how: str) -> None:
    load, close = engine.load, Engine.close  # type: ignore[attr-defined]
    stopped = threading.Event()

    def load_until_stopped(models: Any, settings: Any, report: Any, measurements: Any, **options: Any) -> Any:
        report(10, LOADING)
        stopped.wait()
        if how == "raises":
            raise RuntimeError("the card has fallen off the bus")
        return load(models, settings, report, **options)

    def close_and_see(self: Engine) -> None:
        close(self)
        stopped.set()
        self._thread.join(PATIENCE)

    engine.load = load_until_stopped  # type: ignore[attr-defined, assignment]
    Engine.close = close_and_see  # type: ignore[method-assign]


if __name__ == "__main__":
    _slow(sys.argv[1])
    sys.argv = ["vecmill", "serve", *sys.argv[2:]]
    main()
