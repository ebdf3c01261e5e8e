"""The batch cut: which waiting sequences run together next. Pure: no clock, no event loop, no tensors.

Interactive work goes before bulk. While both wait, bulk is owed its share of the tokens, and goes first whenever what
it is owed pays for its next text. Whoever has stood at the front of a line for too long goes before everything. Within
a lane, clients take turns by tokens served (virtual token counters, https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from vecmill.core.types import Lane

# Of one line in one cut: a client that leaves a very deep line must not hold up everyone while it is cleared.
MOST_SKIPPED = 4096


class Cuttable(Protocol):
    """What the cut needs to know of a sequence."""

    submitted: float

    def __len__(self) -> int:
        """Tokens, those of the prefix included."""
        ...

    @property
    def prefix(self) -> Sized | None:
        """Leading tokens that a batch computes once for all that have the same object here."""
        ...

    def unwanted(self, now: float) -> bool:
        """Not to be run any more; it leaves its line without being counted."""
        ...


S = TypeVar("S", bound=Cuttable)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that one forward pass of a model may hold."""

    max_batch_tokens: int
    max_batch_size: int
    free_tokens: int = 0
    """Tokens up to which bulk fills an interactive batch, which takes only a little longer for it."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of fairness."""

    bulk_share: float = 0.2
    aging_seconds: float = 5.0


@dataclass(eq=False, slots=True)
class TurnTaker:
    """Somebody who takes turns within a lane."""

    served: float = 0.0
    """Tokens run for it, or what the others had been served when it came."""
    served_at: float = float("-inf")
    """When something of it was last put into a batch."""


@dataclass(eq=False, slots=True)
class WaitingLine(Generic[S]):
    """What one job of one client has waiting in one lane for one model, first come first served."""

    model: str
    lane: Lane
    client: TurnTaker
    front_since: float
    """When its present head came to the front. A deep line does not age, only one that stands still."""
    waiting: deque[S] = field(default_factory=deque)
    job: TurnTaker = field(default_factory=TurnTaker)
    """The job as one that takes turns with the client's other jobs."""


@dataclass(slots=True)
class Cut(Generic[S]):
    """One batch, and what leaves each line for it."""

    model: str
    lane: Lane
    """Interactive where any of the batch is."""
    batch: list[S] = field(default_factory=list)
    unwanted: list[S] = field(default_factory=list)
    popped: dict[WaitingLine[S], int] = field(default_factory=dict)
    """Sequences to take off the front of each line."""
    served: dict[TurnTaker, int] = field(default_factory=dict)
    """Tokens of the batch for each client, and for each job."""
    tokens: int = 0
    """What the batch has to compute, at the most: the runner may know a prefix from an earlier batch."""
    owed: float = 0.0
    """Tokens that bulk is owed after this batch."""


def cut(
    lines: Sequence[WaitingLine[S]], budgets: Mapping[str, Budget], rules: Rules, owed: float, now: float
) -> Cut[S]:
    """The next batch; empty where nothing wanted waits. The lines are left as they are.

    The first sequence is always taken, so one that is longer than the budget runs alone and cannot block its line. Cost
    is in the lines and in the sequences taken, not in those waiting.
    """
    draft = _Draft(lines, budgets, rules, owed, now)
    if (first := draft.first()) is not None:
        draft.begin(first)
        draft.fill()
    return draft.finish()


class _Draft(Generic[S]):
    """A batch in the making."""

    def __init__(
        self, lines: Sequence[WaitingLine[S]], budgets: Mapping[str, Budget], rules: Rules, owed: float, now: float
    ) -> None:
        self._budgets, self._rules, self._owed, self._now = budgets, rules, owed, now
        self._cut = Cut[S]("", Lane.BULK)
        self._popped = dict.fromkeys(lines, 0)
        self._chosen: set[int] = set()  # ids of the batch: a sequence may stand in two lines
        self._prefixes: set[int] = set()
        self._of_lane = dict.fromkeys(Lane, 0)
        self._heads = {line: head for line in lines if (head := self._next(line)) is not None}

    def _next(self, line: WaitingLine[S]) -> S | None:
        """The first wanted sequence of a line that is not in the batch."""
        skipped = 0
        while self._popped[line] < len(line.waiting) and skipped < MOST_SKIPPED:
            sequence = line.waiting[self._popped[line]]
            if id(sequence) not in self._chosen:
                if not sequence.unwanted(self._now):
                    return sequence
                self._cut.unwanted.append(sequence)
            self._popped[line] += 1
            skipped += 1
        return None

    def first(self) -> WaitingLine[S] | None:
        """The line that goes first, whatever its model."""
        if aged := self._aged(self._heads):
            return aged[0]
        interactive, bulk = (self._turn(lane) for lane in Lane)
        if interactive is None or bulk is None:
            return interactive or bulk
        return bulk if self._owed >= len(self._heads[bulk]) else interactive

    def _aged(self, lines: Iterable[WaitingLine[S]]) -> list[WaitingLine[S]]:
        """The longest-standing line of each client that has been served nothing for too long, longest first.

        By client: one with many jobs has always a line that stands still while its others are served.
        """
        limit = self._now - self._rules.aging_seconds
        standing = (line for line in lines if line.front_since <= limit and line.client.served_at <= limit)
        oldest: dict[TurnTaker, WaitingLine[S]] = {}
        for line in sorted(standing, key=lambda line: line.front_since):
            oldest.setdefault(line.client, line)
        return list(oldest.values())

    def _turn(self, lane: Lane) -> WaitingLine[S] | None:
        """The line of a lane whose client was served least."""
        return min((line for line in self._heads if line.lane is lane), key=self._turn_key, default=None)

    def _turn_key(self, line: WaitingLine[S]) -> tuple[float, float, float]:
        """Clients take turns, and jobs within their client's."""
        served = self._cut.served
        return (
            line.client.served + served.get(line.client, 0),
            line.job.served + served.get(line.job, 0),
            self._heads[line].submitted,
        )

    def begin(self, first: WaitingLine[S]) -> None:
        """Take the first sequence; the rest of the batch is of its model."""
        self._cut.model = first.model
        self._budget = self._budgets[first.model]
        self._take(first, len(self._heads[first]))

    def fill(self) -> None:
        """Those that have aged, bulk that is owed, interactive work, and bulk as far as it rides along."""
        full = self._budget.max_batch_tokens
        mine = [line for line in self._heads if line.model == self._cut.model]
        for line in self._aged(mine):
            self._take_if_fits(line, full)
        interactive, bulk = ([line for line in mine if line.lane is lane] for lane in Lane)
        self._take_turns(bulk, full, owed=self._owed)
        self._take_turns(interactive, full)
        free = min(self._budget.free_tokens, full)
        self._take_turns(bulk, free if self._of_lane[Lane.INTERACTIVE] else full)

    def _take_turns(self, lines: Iterable[WaitingLine[S]], limit: int, owed: float = float("inf")) -> None:
        """Take heads of a lane's lines in turn while they fit; a line whose head does not fit sits this batch out."""
        heap = [(self._turn_key(line), number, line) for number, line in enumerate(lines) if line in self._heads]
        heapq.heapify(heap)
        while heap and self._cut.tokens < limit:
            _, number, line = heap[0]
            if self._of_lane[line.lane] + len(self._heads[line]) > owed:
                return
            if not self._take_if_fits(line, limit) or line not in self._heads:
                heapq.heappop(heap)
            elif len(heap) > 1:  # one line alone needs no order
                heapq.heapreplace(heap, (self._turn_key(line), number, line))

    def _take_if_fits(self, line: WaitingLine[S], limit: int) -> bool:
        self._pass_chosen(line)
        head = self._heads.get(line)
        if head is None or len(self._cut.batch) >= self._budget.max_batch_size:
            return False
        added = len(head)
        if head.prefix is not None and id(head.prefix) in self._prefixes:
            added -= len(head.prefix)
        if self._cut.tokens + added > limit:
            return False
        self._take(line, added)
        return True

    def _take(self, line: WaitingLine[S], added: int) -> None:
        head = self._heads[line]
        self._cut.batch.append(head)
        self._chosen.add(id(head))
        if head.prefix is not None:
            self._prefixes.add(id(head.prefix))
        self._cut.tokens += added
        self._of_lane[line.lane] += added
        for taker in (line.client, line.job):
            self._cut.served[taker] = self._cut.served.get(taker, 0) + added
        self._pass_chosen(line)

    def _pass_chosen(self, line: WaitingLine[S]) -> None:
        """Move a line on when its head is in the batch already."""
        head = self._heads.get(line)
        if head is not None and id(head) in self._chosen:
            if (following := self._next(line)) is not None:
                self._heads[line] = following
            else:
                del self._heads[line]

    def finish(self) -> Cut[S]:
        """What bulk is owed grows by its share of every batch and shrinks by its tokens, while it waits."""
        self._cut.popped = {line: count for line, count in self._popped.items() if count}
        if self._of_lane[Lane.INTERACTIVE]:
            self._cut.lane = Lane.INTERACTIVE
        if any(line.lane is Lane.BULK for line in self._heads):
            owed = self._owed + self._rules.bulk_share * self._cut.tokens - self._of_lane[Lane.BULK]
            self._cut.owed = max(0.0, owed)
        return self._cut
