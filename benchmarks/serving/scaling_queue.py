"""The batch cut with few and many texts waiting: in process, without HTTP, tokenizer or model."""

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from benchmarks.lib.figures import in_turns, judged, spread

from vecmill.core.types import Lane, Row
from vecmill.scheduler.lines import Sequence as Waiting
from vecmill.scheduler.lines import WaitingLines
from vecmill.scheduler.policy import Budget, Rules, cut

MODEL = "model"
BUDGETS = {MODEL: Budget(max_batch_tokens=2048, max_batch_size=64, free_tokens=256)}
RULES = Rules()
TEXT_TOKENS = tuple(range(16, 257, 16))
MOST_GROWTH = 2.0
NOW = 0.0  # time stands still: no line ages, so every cut does the same


@dataclass
class SimulatedQueue:
    """Waiting lines of constant depth: what a cut takes joins the end of its line again."""

    lines: WaitingLines
    depth: int
    owed: float = 0.0
    clients: dict[Any, tuple[Lane, str]] = field(default_factory=dict)
    """Lane and client of each sequence, by the sequence's key."""

    def cut(self) -> float:
        """The seconds of one cut, including taking its texts off their lines, but not putting them back."""
        started = time.perf_counter()
        taken = cut(list(self.lines), BUDGETS, RULES, self.owed, NOW)
        self.lines.leave(taken, NOW)
        seconds = time.perf_counter() - started
        self.owed = taken.owed
        for sequence in taken.batch:
            self._join(sequence)
        return seconds

    def _join(self, sequence: Waiting) -> None:
        lane, client = self.clients[sequence.key]
        self.lines.join(MODEL, lane, client, NOW).waiting.append(sequence)

    def fill(self, clients: int, loop: asyncio.AbstractEventLoop) -> None:
        """Add texts of so many clients in turns; every fourth client is interactive."""
        rows = [Row(np.zeros(tokens, dtype=np.int32)) for tokens in TEXT_TOKENS]
        for number in range(self.depth):
            client = number % clients
            lane = Lane.INTERACTIVE if client % 4 == 1 else Lane.BULK
            self.clients[number] = lane, f"client-{client}"
            row = rows[number * 7 % len(rows)]
            sequence = Waiting(row, MODEL, number, lane, len(row), None, float(number), float("inf"))
            sequence.futures.append(loop.create_future())
            self._join(sequence)


def measure(
    depths: Sequence[int], clients: Sequence[int], rounds: int, cuts: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Microseconds per cut by clients and waiting texts, and the ratio of the most waiting texts to the fewest."""
    loop = asyncio.new_event_loop()  # futures belong to one, though it never runs
    results = {}
    for count in clients:
        queues = [SimulatedQueue(WaitingLines(), depth) for depth in depths]
        for queue in queues:
            queue.fill(count, loop)
        took: dict[int, list[float]] = {depth: [] for depth in depths}
        for queue in in_turns(queues, rounds):
            took[queue.depth].append(1e6 * statistics.median(queue.cut() for _ in range(cuts)))
            advance(1)
        results[str(count)] = {
            "us_per_cut": {str(depth): spread(each) for depth, each in took.items()},
            "most_over_fewest": _growth(took, min(depths)),
            # Where fewer texts wait than there are clients, fewer lines stand there: a cut looks at each line once.
            "most_over_fewest_in_all_lines": _growth(took, min((each for each in depths if each >= count), default=0)),
        }
    loop.close()
    return results


def _growth(took: Mapping[int, Sequence[float]], fewest: int) -> dict[str, Any] | None:
    """The ratio of the times with the most texts waiting and with `fewest`; None if these are the same."""
    if fewest not in took or fewest == max(took):
        return None
    ratios = [most / few for most, few in zip(took[max(took)], took[fewest], strict=True)]
    return judged(spread(ratios), MOST_GROWTH)
