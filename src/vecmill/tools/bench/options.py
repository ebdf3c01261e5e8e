"""What was asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.mixed import QUERY_INTERVAL_S
from vecmill.tools.bench.target import Target
from vecmill.tools.bench.workload import LONGEST

LEVELS = (1, 2, 4, 8, 16)
SECONDS = 10.0
DIFFERENT_TEXTS = 2000  # sent again and again where the time, not the number of texts, ends a level
BATCH = 32


@dataclass(frozen=True, slots=True)
class Options:
    """A measurement; see the help of `vecmill bench`."""

    target: Target
    folder: Path | None = None
    texts: int | None = None
    longest: int = LONGEST
    batch: int = BATCH
    connections: tuple[int, ...] | None = None
    seconds: float | None = None
    warm_up_seconds: float = 1.0
    mixed: bool = False
    query_interval: float = QUERY_INTERVAL_S
    plot: Path | None = None
    json: bool = False

    def check(self) -> None:
        """Say which options do not go together.

        Raises:
            BenchError: some do not.
        """
        if self.texts is not None and self.seconds is not None:
            raise BenchError("--texts and --seconds each say when a level ends: give one of them.")
        if not self.mixed:
            return
        if self.texts is not None:
            raise BenchError("--mixed measures for a time: give --seconds, not --texts.")
        if self.connections is not None and len(self.connections) > 1:
            raise BenchError("--mixed measures one bulk load: give one number of --connections.")
        if self.plot is not None:
            raise BenchError("--plot draws several levels of --connections, and --mixed has one.")

    @property
    def level_seconds(self) -> float | None:
        """None: a level ends with its texts."""
        return None if self.texts is not None else self.seconds or SECONDS


def levels_of(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers.

    Raises:
        BenchError: it is something else.
    """
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise BenchError(f"--connections {text}: expected numbers of 1 or more with commas between them, like 1,4,16.")
    return levels
