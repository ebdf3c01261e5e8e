"""The end of a process that does not end by itself."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class LastResort:
    """Ends the process after a time, whatever hangs: a forward pass, a disk, a library's own threads."""

    def __init__(self, exit_code: Callable[[], int]) -> None:
        self._exit_code = exit_code
        self._timer: threading.Timer | None = None

    def within(self, seconds: float) -> None:
        """From now on there is so much time left, whatever was said before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        logger.error("the server did not come to its end in time; it is ended")
        leave(self._exit_code())


def leave(exit_code: int) -> None:
    """End the process now. Python's own end would wait for threads that cannot be ended."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
