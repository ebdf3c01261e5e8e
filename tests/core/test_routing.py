"""Where requests go: searches to the shortest wait, bulk to the keeper of its cache, nothing to who drains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecmill.core.routing import (
    ABOUT_EQUAL,
    BALANCE,
    PATIENCE,
    Replica,
    RoutedRequest,
    affinity_key,
    cap,
    choose,
    expected_wait,
    one_pass,
    owner,
    sampled,
    shortest_wait,
)
from vecmill.core.types import Lane

KEYS = 4000


def replica(name: str, **what: float) -> Replica:
    return Replica(name, **{"fixed_seconds": 0.01, "seconds_per_token": 1e-4, **what})  # type: ignore[arg-type]


def idle(count: int) -> list[Replica]:
    return [replica(f"replica-{number}") for number in range(count)]


def bulk(key: int, tokens: int = 1000) -> RoutedRequest:
    return RoutedRequest(Lane.BULK, tokens, key)


def owners(replicas: list[Replica]) -> list[str]:
    found = [owner(replicas, bulk(affinity_key([f"text {number}"]))) for number in range(KEYS)]
    return [each.name for each in found if each is not None]


tokens = st.integers(0, 200_000)
replicas = st.lists(
    st.builds(
        Replica,
        name=st.uuids().map(str),
        fixed_seconds=st.floats(0, 0.1),
        seconds_per_token=st.floats(1e-6, 1e-2),
        queued_interactive=tokens,
        queued_bulk=tokens,
        max_batch_tokens=st.integers(16, 65_536),
        draining=st.booleans(),
        weight=st.floats(0.1, 10),
    ),
    max_size=12,
    unique_by=lambda each: each.name,
)
works = st.builds(RoutedRequest, st.sampled_from(Lane), st.integers(1, 200_000), st.integers(0, 2**64 - 1))


@given(replicas, works)
def test_one_that_drains_gets_nothing_and_there_is_a_choice_as_long_as_one_does_not(
    candidates: list[Replica], work: RoutedRequest
) -> None:
    chosen = choose(candidates, work)

    assert (chosen is None) == all(each.draining for each in candidates)
    assert chosen is None or not chosen.draining


@given(replicas, works)
def test_a_search_waits_hardly_longer_than_it_had_to(candidates: list[Replica], work: RoutedRequest) -> None:
    search = replace(work, lane=Lane.INTERACTIVE)
    chosen = choose(candidates, search)

    if chosen is not None:
        shortest = min(expected_wait(each, search) for each in candidates if not each.draining)
        assert expected_wait(chosen, search) <= ABOUT_EQUAL * shortest


@given(replicas, works)
def test_bulk_is_not_added_to_a_replica_above_its_cap(candidates: list[Replica], work: RoutedRequest) -> None:
    chosen = choose(candidates, replace(work, lane=Lane.BULK))

    if chosen is not None:
        available = [each for each in candidates if not each.draining]
        assert chosen.queued_seconds <= max(cap(available, work.tokens), one_pass(chosen))


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4000)), max_size=200))
def test_a_hot_key_does_not_bury_its_owner(count: int, sent: list[tuple[int, int]]) -> None:
    """Of four keys: everything that is sent stays queued, and no replica gets more than its share and one request."""
    candidates = {each.name: each for each in idle(count)}
    for key, size in sent:
        chosen = choose(list(candidates.values()), bulk(key, size))
        assert chosen is not None
        candidates[chosen.name] = replace(chosen, queued_bulk=chosen.queued_bulk + size)

    total, largest = sum(size for _, size in sent), max((size for _, size in sent), default=0)
    most = max(BALANCE * total / count, candidates["replica-0"].max_batch_tokens) + largest
    assert max(each.queued for each in candidates.values()) <= most


@given(replicas, st.integers(0, 2**64 - 1), st.randoms(use_true_random=False))
def test_the_order_in_which_replicas_are_known_changes_nothing(
    candidates: list[Replica], key: int, random: Random
) -> None:
    shuffled = random.sample(candidates, len(candidates))

    assert owner(candidates, bulk(key)) == owner(shuffled, bulk(key))


@given(replicas, works)
def test_only_the_keys_of_a_replica_that_left_move(candidates: list[Replica], work: RoutedRequest) -> None:
    quiet = [replace(each, queued_interactive=0, queued_bulk=0) for each in candidates]
    before = owner(quiet, replace(work, tokens=1))

    for gone in quiet:
        if before is not None and gone != before:
            assert owner([each for each in quiet if each != gone], replace(work, tokens=1)) == before


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_replica_that_comes_takes_its_share_of_the_keys_and_no_others_move(count: int) -> None:
    before, after = owners(idle(count)), owners(idle(count + 1))

    moved = [new for old, new in zip(before, after, strict=True) if old != new]

    assert set(moved) == {f"replica-{count}"}
    assert len(moved) / KEYS == pytest.approx(1 / (count + 1), rel=0.2)


def test_keys_are_divided_by_weight() -> None:
    shares = Counter(owners([replica("small"), replica("large", weight=3)]))

    assert shares["large"] / KEYS == pytest.approx(3 / 4, rel=0.1)


def test_a_text_is_found_where_it_went_the_last_time_though_its_replica_has_more_to_do() -> None:
    candidates = idle(3)
    key = affinity_key(["a chunk of code"])
    first = owner(candidates, bulk(key))
    assert first is not None
    busier = [replace(each, queued_bulk=4000 if each == first else 3000) for each in candidates]

    again = owner(busier, bulk(key))

    assert again is not None
    assert again.name == first.name


def test_a_search_does_not_count_bulk_that_it_overtakes() -> None:
    deep_in_bulk = replica("bulk", queued_bulk=1_000_000, max_batch_tokens=2000)
    searched = replica("searched", queued_interactive=3000)
    search = RoutedRequest(Lane.INTERACTIVE, 10, key=0)

    assert shortest_wait([deep_in_bulk, searched], search) is deep_in_bulk
    assert expected_wait(deep_in_bulk, search) == pytest.approx(0.01 + 1e-4 * 10 + (0.01 + 1e-4 * 2000) / 2)
    assert expected_wait(deep_in_bulk, bulk(0, 10)) == pytest.approx(0.01 + 1e-4 * 1_000_010)


def test_a_search_goes_where_the_running_pass_ends_first() -> None:
    """A pass of bulk takes 0.11 s here."""
    search = RoutedRequest(Lane.INTERACTIVE, 10, key=0)

    def wait(since: float | None, overhead: float = 0.0, rest: float | None = None) -> float:
        busy = replica("busy", queued_bulk=50_000, max_batch_tokens=1000)
        known = replace(busy, since_answer=since, overhead_seconds=overhead, rest_of_pass=rest)
        return expected_wait(known, search) - 0.011

    just_begun, half, known_no_more = wait(0.0), wait(0.055), wait(0.11 * 20)

    assert just_begun == pytest.approx(0.11)
    assert half == pytest.approx(0.055)
    assert wait(0.045, overhead=0.01) == pytest.approx(half)
    assert wait(0.08) < half < wait(0.02) < just_begun
    # The answer said that the pass that ran then would take 0.05 s more: half of a longer one's, or a search's.
    assert wait(0.02, rest=0.05) == pytest.approx(0.03)
    assert wait(0.08, rest=0.05) > 0.07
    assert wait(0.0, rest=0.3) == pytest.approx(0.3)
    assert known_no_more == pytest.approx(wait(None)) == pytest.approx(0.055)
    # What is about to end may have given way to the next pass before the search is there.
    assert wait(0.1099) == pytest.approx(0.055, abs=0.001)
    assert expected_wait(replica("idle", since_answer=0.01), search) == pytest.approx(0.011)


def test_none_idles_while_a_text_would_wait_long_for_its_own_replica() -> None:
    key = affinity_key(["a chunk of code"])
    of_key = owner(idle(3), bulk(key))
    assert of_key is not None
    full, name = of_key.max_batch_tokens, of_key.name

    def chosen(passes: float) -> Replica | None:
        nothing, four_passes = [each for each in idle(3) if each.name != name]
        queued = {name: int(passes * full), nothing.name: 0, four_passes.name: 4 * full}
        # Of ten replicas that are as full, it is not above its share.
        busy = [replica(f"busy-{number}", queued_bulk=7 * full) for number in range(9)]
        return owner([*(replace(each, queued_bulk=queued[each.name]) for each in idle(3)), *busy], bulk(key, 1))

    near, far = chosen(PATIENCE - 0.1), chosen(PATIENCE + 0.1)

    assert near is not None
    assert far is not None
    assert far.queued == 0
    assert near.queued > 0


def test_a_slower_card_gets_the_search_only_when_the_faster_one_has_more_before_it() -> None:
    search = RoutedRequest(Lane.INTERACTIVE, 100, key=0)
    slow = replica("slow", seconds_per_token=1e-3)

    assert shortest_wait([slow, replica("fast")], search) is not slow
    assert shortest_wait([slow, replica("fast", queued_interactive=5000)], search) is slow


def test_idle_replicas_share_searches_and_equal_ones_meet() -> None:
    candidates = idle(4)
    searches = [RoutedRequest(Lane.INTERACTIVE, 10, affinity_key([f"question {number}"])) for number in range(KEYS)]

    chosen = [choose(candidates, search) for search in searches]

    assert [choose(candidates[::-1], search) for search in searches] == chosen
    assert min(Counter(chosen).values()) > 0.8 * KEYS / 4


def test_an_index_keeps_its_replicas_when_a_chunk_is_inserted_at_its_front() -> None:
    chunks = [f"chunk {number} of the code base" for number in range(6400)]
    candidates = idle(4)

    def places(texts: list[str]) -> list[str]:
        requests = [texts[start : start + 64] for start in range(0, 6400, 64)]
        found = [owner(candidates, bulk(affinity_key(request))) for request in requests]
        return [each.name for each in found if each is not None]

    same = sum(a == b for a, b in zip(places(chunks), places(["new", *chunks]), strict=True))

    assert same >= 90


def test_a_key_is_that_of_the_texts_and_of_the_job_alone_where_there_are_none() -> None:
    assert affinity_key(["a", "b"]) == affinity_key(["b", "a", "a"])
    assert affinity_key(["a"]) != affinity_key(["a"], job="other")
    assert affinity_key([], job="one") != affinity_key([], job="other")
    assert 0 <= affinity_key(["\ud800 a lone surrogate"]) < 2**64


@settings(max_examples=20)
@given(replicas, st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_sample_has_nobody_twice_and_nobody_who_drains(candidates: list[Replica], count: int, random: Random) -> None:
    some = sampled(candidates, random, count)

    assert len({each.name for each in some}) == len(some) <= count
    assert not any(each.draining for each in some)
    assert len(some) == min(count, sum(not each.draining for each in candidates))
