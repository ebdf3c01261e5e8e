"""The batch cut keeps its promises for every queue, budget and mix of lanes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vecmill.core.types import Lane
from vecmill.scheduler.lines import WaitingLines
from vecmill.scheduler.policy import Budget, Cut, Rules, TurnTaker, WaitingLine, cut

RULES = Rules(bulk_share=0.2, aging_seconds=5.0)
MODELS = ("a", "b")


@dataclass(eq=False)
class Waiting:
    tokens: int
    gone: bool = False
    prefix: range | None = None
    submitted: float = 0.0

    def __len__(self) -> int:
        return self.tokens

    def unwanted(self, now: float) -> bool:
        return self.gone


@dataclass(frozen=True)
class Joining:
    """What one client submits at once."""

    sequences: Sequence[Waiting]
    lane: Lane = Lane.BULK
    model: str = "a"


class Queue:
    """The scheduler's lines, served by cut after cut."""

    def __init__(
        self,
        joining: Sequence[Joining],
        budgets: dict[str, Budget],
        rules: Rules = RULES,
        owed: float = 0.0,
        now: float = 0.0,
    ) -> None:
        """Each of `joining` is a client of its own, which came at time 0.0."""
        self.budgets, self.rules, self.owed, self.now = budgets, rules, owed, now
        self.cuts: list[Cut[Waiting]] = []
        self._lines = cast("Any", WaitingLines())  # its sequences need no row and no futures here
        for number, each in enumerate(joining):
            if each.sequences:
                self._lines.join(each.model, each.lane, str(number), 0.0).waiting.extend(each.sequences)

    @property
    def lines(self) -> list[WaitingLine[Waiting]]:
        """The lines that are not empty."""
        return list(self._lines)

    def searching(self, sequences: Sequence[Waiting]) -> WaitingLine[Waiting]:
        """Replace what a person has waiting by these sequences, and return the person's line."""
        line: WaitingLine[Waiting] = self._lines.join("a", Lane.INTERACTIVE, "person", self.now)
        line.waiting = deque(sequences)
        line.front_since = self.now
        return line

    def cut(self) -> Cut[Waiting]:
        taken = cut(self.lines, self.budgets, self.rules, self.owed, self.now)
        self._lines.leave(taken, self.now)
        self.owed = taken.owed
        self.cuts.append(taken)
        return taken

    def drain(self) -> Iterator[Cut[Waiting]]:
        while (taken := self.cut()).popped:
            yield taken


def line(sequences: Sequence[Waiting], lane: Lane = Lane.BULK) -> WaitingLine[Waiting]:
    return WaitingLine("a", lane, TurnTaker(), 0.0, deque(sequences))


waiting = st.builds(Waiting, st.integers(1, 600), st.booleans())
joining_of = st.lists(
    st.builds(Joining, st.lists(waiting, max_size=20), st.sampled_from(Lane), st.sampled_from(MODELS)), max_size=8
)
budgets_of = st.fixed_dictionaries(
    {model: st.builds(Budget, st.integers(1, 1000), st.integers(1, 20), st.integers(0, 300)) for model in MODELS}
)
queues = st.builds(
    Queue,
    joining_of,
    budgets_of,
    st.builds(Rules, st.floats(0, 1), st.just(5.0)),
    st.floats(0, 2000),
    st.sampled_from([0.0, 100.0]),
)


def everything(queue: Queue) -> list[Waiting]:
    return [sequence for line in queue.lines for sequence in line.waiting]


@settings(deadline=None)
@given(queues)
def test_every_batch_keeps_its_budget_and_is_of_one_model(queue: Queue) -> None:
    model_of = {id(sequence): line.model for line in queue.lines for sequence in line.waiting}
    for taken in queue.drain():
        assert len(taken.batch) <= queue.budgets[taken.model].max_batch_size if taken.batch else True
        assert {model_of[id(sequence)] for sequence in taken.batch} <= {taken.model}
        if taken.batch:
            limit = queue.budgets[taken.model].max_batch_tokens
            assert taken.tokens == sum(map(len, taken.batch))
            assert taken.tokens <= limit or len(taken.batch) == 1


@settings(deadline=None)
@given(queues)
def test_nothing_is_lost_nothing_runs_twice_and_the_unwanted_never(queue: Queue) -> None:
    before = everything(queue)
    run, dropped = list[Waiting](), list[Waiting]()
    for taken in queue.drain():
        run += taken.batch
        dropped += taken.unwanted
    assert Counter(map(id, run)) == Counter(id(sequence) for sequence in before if not sequence.gone)
    assert Counter(map(id, dropped)) == Counter(id(sequence) for sequence in before if sequence.gone)
    assert not queue.lines


@settings(deadline=None)
@given(queues)
def test_a_line_keeps_its_order(queue: Queue) -> None:
    orders = [[id(sequence) for sequence in a_line.waiting if not sequence.gone] for a_line in queue.lines]
    run = [id(sequence) for taken in queue.drain() for sequence in taken.batch]
    places = {identity: place for place, identity in enumerate(run)}
    for order in orders:
        assert [places[identity] for identity in order] == sorted(places[identity] for identity in order)


@settings(deadline=None)
@given(queues)
def test_cutting_changes_nothing_by_itself(queue: Queue) -> None:
    before = [list(line.waiting) for line in queue.lines]
    first = cut(queue.lines, queue.budgets, queue.rules, queue.owed, queue.now)
    again = cut(queue.lines, queue.budgets, queue.rules, queue.owed, queue.now)
    assert first == again
    assert [list(line.waiting) for line in queue.lines] == before


@settings(deadline=None)
@given(queues)
def test_interactive_goes_first_unless_bulk_is_owed_or_has_aged(queue: Queue) -> None:
    while queue.lines:
        wanted = [line for line in queue.lines if any(not sequence.gone for sequence in line.waiting)]
        interactive = [line for line in wanted if line.lane is Lane.INTERACTIVE]
        aged = any(queue.now - line.front_since >= queue.rules.aging_seconds for line in wanted)
        smallest = min(
            (next(len(s) for s in line.waiting if not s.gone) for line in wanted if line.lane is Lane.BULK), default=0
        )
        owed = queue.owed
        taken = queue.cut()
        if interactive and not aged and owed < smallest:
            assert taken.lane is Lane.INTERACTIVE


@pytest.mark.slow
@settings(deadline=None, max_examples=8)  # each example makes thousands of cuts
@given(
    st.lists(st.integers(1, 300), min_size=20, max_size=20),
    st.integers(1, 100),
    # Searches ride along where the next bulk text is too long for the rest of a batch; of any two batches in a row that
    # leaves bulk one, so more than half cannot be promised.
    st.floats(0.05, 0.5),
    st.builds(Budget, st.integers(64, 1000), st.integers(1, 64), st.integers(0, 64)),
)
def test_under_endless_interactive_load_bulk_keeps_its_share(
    bulk: list[int], query: int, share: float, budget: Budget
) -> None:
    queue = Queue([Joining([Waiting(tokens) for tokens in bulk])], {"a": budget}, Rules(share, 1e9))
    ran = dict.fromkeys(Lane, 0)
    longest = max(bulk)
    endless = [Waiting(query) for _ in range(budget.max_batch_size + 1)]
    while any(line.lane is Lane.BULK for line in queue.lines):
        person = queue.searching(endless).client
        taken = queue.cut()
        ran[Lane.INTERACTIVE] += taken.served.get(person, 0)
        ran[Lane.BULK] += taken.tokens - taken.served.get(person, 0)
        if any(line.lane is Lane.BULK for line in queue.lines):
            # Never further behind than a text that is not paid for yet, the share of one that has just been, and two
            # batches: one in which the debt grew past the text's price, and one that could not hold the next.
            behind = longest * (1 + share) + 2 * share * (budget.max_batch_tokens + query)
            assert ran[Lane.BULK] >= share * sum(ran.values()) - behind


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 64))
def test_whoever_stands_still_too_long_goes_before_everything(bulk: list[int], query: int) -> None:
    queue = Queue([Joining([Waiting(tokens) for tokens in bulk])], {"a": Budget(256, 16, 0)}, Rules(0.0, 5.0))
    head = queue.lines[0].waiting[0]
    since = queue.now
    while not any(head in taken.batch for taken in queue.cuts):
        queue.searching([Waiting(query) for _ in range(40)])
        queue.cut()
        queue.now += 1.0
    assert queue.now - since <= RULES.aging_seconds + 2


def test_a_deep_line_that_moves_does_not_age() -> None:
    """Otherwise a search would wait behind an index that has been running for longer than the limit."""
    queue = Queue([Joining([Waiting(100) for _ in range(1000)])], {"a": Budget(200, 16, 50)})
    for second in range(100):
        queue.now = float(second)
        queue.cut()
    query = Waiting(10)
    queue.searching([query])
    assert query in queue.cut().batch


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 200), min_size=40, max_size=40), min_size=2, max_size=6))
@example([[200] * 40] * 5 + [[56] * 40])
def test_bulk_clients_take_turns_by_tokens(clients: list[list[int]]) -> None:
    """Whoever was served least goes next. Others get only what is left where its next text does not fit, which is why
    what they were served may run ahead without bound, while whoever is in its turn is ahead by one text at the most."""
    queue = Queue([Joining([Waiting(tokens) for tokens in lengths]) for lengths in clients], {"a": Budget(256, 64, 0)})
    waiting = {line.client: deque(line.waiting) for line in queue.lines}
    served = dict.fromkeys(waiting, 0)
    while len(queue.lines) == len(clients):
        tokens = 0
        for sequence in queue.cut().batch:
            client = next(client for client in waiting if waiting[client] and waiting[client][0] is sequence)
            behind = [other for other in waiting if waiting[other] and served[other] < served[client]]
            assert all(tokens + len(waiting[other][0]) > 256 for other in behind)
            waiting[client].popleft()
            served[client] += len(sequence)
            tokens += len(sequence)
        assert served == {client: client.served for client in served}


@pytest.mark.parametrize(("free", "riding"), [(0, 0), (64, 1), (150, 2), (1000, 4)])
def test_bulk_rides_along_with_a_search_up_to_what_is_free(free: int, riding: int) -> None:
    query = Waiting(10)
    lines = [line([query], Lane.INTERACTIVE), line([Waiting(50) for _ in range(20)])]
    taken = cut(lines, {"a": Budget(210, 64, free)}, RULES, owed=0.0, now=0.0)
    assert taken.batch[0] is query
    assert taken.lane is Lane.INTERACTIVE
    assert len(taken.batch) - 1 == riding


def test_a_text_longer_than_the_budget_runs_alone_and_blocks_nobody() -> None:
    long, short = Waiting(32_000), Waiting(10)
    queue = Queue([Joining([long, short]), Joining([Waiting(20)])], {"a": Budget(512, 64, 0)})
    batches = [taken.batch for taken in queue.drain()]
    assert [long] in batches
    assert sum(map(len, batches)) == 3


def test_a_sequence_in_two_lines_runs_once() -> None:
    both = Waiting(10)
    lines = [line([both], Lane.INTERACTIVE), line([Waiting(5), both, Waiting(6)])]
    taken = cut(lines, {"a": Budget(500, 64, 500)}, RULES, owed=0.0, now=0.0)
    assert [sequence.tokens for sequence in taken.batch] == [10, 5, 6]
    assert sum(taken.popped.values()) == 4


@given(
    st.lists(st.tuples(st.integers(1, 200), st.sampled_from([None, range(50), range(70)])), max_size=30),
    st.integers(1, 1000),
)
def test_a_shared_prefix_counts_once_a_batch(lengths: list[tuple[int, range | None]], limit: int) -> None:
    queue = [Waiting(own + (len(prefix) if prefix else 0), False, prefix) for own, prefix in lengths]
    taken = cut([line(queue)], {"a": Budget(limit, 64, 0)}, RULES, owed=0.0, now=0.0)
    prefixes = {id(sequence.prefix): len(sequence.prefix) for sequence in taken.batch if sequence.prefix is not None}
    own = sum(len(sequence) - (len(sequence.prefix) if sequence.prefix is not None else 0) for sequence in taken.batch)
    assert taken.tokens == own + sum(prefixes.values())
    assert taken.tokens <= limit or len(taken.batch) == 1


@pytest.mark.parametrize("gone", [False, True])
def test_the_cost_is_in_what_is_taken_not_in_what_waits(gone: bool) -> None:
    looked_at = 0

    class Counting(Waiting):
        def unwanted(self, now: float) -> bool:
            nonlocal looked_at
            looked_at += 1
            return self.gone

    deep = line([Counting(10, gone) for _ in range(100_000)])
    cut([deep], {"a": Budget(100, 64, 0)}, RULES, owed=0.0, now=0.0)
    assert looked_at < 5000
