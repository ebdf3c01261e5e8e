"""The event loop of a measurement: the cheapest there is, for it shares the machine with the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end; KeyboardInterrupt at ^C."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
