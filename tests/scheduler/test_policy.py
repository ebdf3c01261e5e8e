"""The batch cut keeps its promises for every queue and budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vecmill.scheduler.policy import Budget, cut


@dataclass(eq=False)
class Waiting:
    tokens: int
    abandoned: bool
    prefix: range | None = None

    def __len__(self) -> int:
        return self.tokens


queues = st.lists(st.builds(Waiting, st.integers(1, 600), st.booleans()), max_size=60)
budgets = st.builds(Budget, max_batch_tokens=st.integers(1, 1000), max_batch_size=st.integers(1, 20))


@given(queues, budgets)
def test_a_batch_keeps_the_budget(waiting: list[Waiting], budget: Budget) -> None:
    batch = cut(waiting, budget).batch
    assert len(batch) <= budget.max_batch_size
    assert sum(map(len, batch)) <= budget.max_batch_tokens or len(batch) == 1


@given(queues, budgets)
def test_what_is_taken_is_exactly_the_front_in_order(waiting: list[Waiting], budget: Budget) -> None:
    taken = cut(waiting, budget)
    front = waiting[: taken.taken]
    assert [one for one in front if not one.abandoned] == list(taken.batch)
    assert [one for one in front if one.abandoned] == list(taken.abandoned)


@given(queues, budgets)
def test_the_first_live_sequence_always_runs(waiting: list[Waiting], budget: Budget) -> None:
    live = [one for one in waiting if not one.abandoned]
    assert cut(waiting, budget).batch[:1] == tuple(live[:1])


@given(queues, budgets)
def test_a_batch_is_as_full_as_order_allows(waiting: list[Waiting], budget: Budget) -> None:
    taken = cut(waiting, budget)
    rest = [one for one in waiting[taken.taken :] if not one.abandoned]
    if rest:
        assert (
            len(taken.batch) == budget.max_batch_size
            or sum(map(len, taken.batch)) + len(rest[0]) > budget.max_batch_tokens
        )


@given(queues, budgets)
def test_cutting_until_empty_loses_nothing_and_repeats_nothing(waiting: list[Waiting], budget: Budget) -> None:
    queue, run = deque(waiting), list[Waiting]()
    while queue:
        taken = cut(queue, budget)
        assert taken.taken > 0
        run += taken.batch
        for _ in range(taken.taken):
            queue.popleft()
    assert run == [one for one in waiting if not one.abandoned]


@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from([None, range(50), range(70)])), max_size=30), budgets)
def test_a_shared_prefix_counts_once_a_batch(lengths: list[tuple[int, range | None]], budget: Budget) -> None:
    queue = [Waiting(own + (len(prefix) if prefix else 0), False, prefix) for own, prefix in lengths]
    taken = cut(queue, budget)
    prefixes = {id(one.prefix): len(one.prefix) for one in taken.batch if one.prefix is not None}
    own = sum(len(one) - (len(one.prefix) if one.prefix is not None else 0) for one in taken.batch)
    assert taken.tokens == own + sum(prefixes.values())
    assert taken.tokens <= budget.max_batch_tokens or len(taken.batch) == 1


def test_the_cost_is_in_what_is_taken_not_in_what_waits() -> None:
    looked_at = 0

    class Counting(Waiting):
        def __len__(self) -> int:
            nonlocal looked_at
            looked_at += 1
            return self.tokens

    cut((Counting(10, abandoned=False) for _ in range(100_000)), Budget(100, 64))
    assert looked_at < 50
