"""The ring of the last 24 hours, and what is kept of it."""

from __future__ import annotations

import json
import zlib

import pytest

from vecmill.telemetry.history import MAGIC, OF_WORK, SERIES, STEP_SECONDS, STEPS, History, UnreadableHistory

START = 1_790_000_000 // 120 * 120


def filled(steps: int, first: int = 0) -> History:
    history = History()
    for step in range(first, first + steps):
        history.add(START + step * STEP_SECONDS + 3, {"texts_per_second": step, "bulk_p95_ms": step, "errors": 1})
    return history


def test_a_quarter_of_an_hour_step_by_step() -> None:
    span = filled(200).span(900, START + 2000 + 7)  # in the step after the last, which has not ended
    assert (span.step_seconds, len(span.at)) == (10, 90)
    assert span.at == list(range(START + 1100, START + 2000, 10))
    assert span.series["texts_per_second"] == list(range(110, 200))
    assert set(span.series) == set(SERIES)
    assert span.series["gpu_power_watts"] == [None] * 90  # nobody said it: that is not zero


def test_a_day_in_720_points() -> None:
    span = filled(STEPS).span(86_400, START + 86_400)
    assert (span.step_seconds, len(span.at)) == (120, 720)
    assert span.series["texts_per_second"][:2] == [5.5, 17.5]  # the mean of twelve
    assert span.series["bulk_p95_ms"][:2] == [11, 23]  # the highest
    assert span.series["errors"] == [12] * 720  # all of them
    assert len(json.dumps(span.as_json())) < 200_000


def test_what_is_older_than_a_day_is_gone() -> None:
    history = filled(STEPS + 100)
    span = history.span(86_400, START + (STEPS + 100) * STEP_SECONDS)
    assert span.series["errors"][0] is not None
    later = history.span(900, START + (STEPS + 100 + 3 * STEPS) * STEP_SECONDS)
    assert later.series["errors"] == [None] * 90


def test_where_the_server_did_not_run_nothing_is_known() -> None:
    history = filled(10)
    for step in range(40, 50):
        history.add(START + step * STEP_SECONDS, {"errors": 2})
    errors = history.span(500, START + 500).series["errors"]
    assert errors == [1] * 10 + [None] * 30 + [2] * 10
    after_days = START + 10 * 86_400
    history.add(after_days, {"errors": 3})
    assert history.span(900, after_days + 10).series["errors"] == [None] * 89 + [3]


def test_a_clock_that_was_wrong_by_years_is_forgiven() -> None:
    history = History()
    history.add(START + 10**9, {"errors": 1})
    history.add(START, {"errors": 2})
    assert history.span(100, START + 10).series["errors"] == [None] * 9 + [2]


def test_it_is_kept_as_it_was() -> None:
    history = filled(500)
    data = history.to_bytes()
    assert len(data) < 200_000
    kept = History.from_bytes(data)
    now = START + 5000
    assert kept.span(86_400, now) == history.span(86_400, now)
    kept.add(now, {"errors": 4})
    assert kept.span(20, now + 10).series["errors"] == [1, 4]
    assert History.from_bytes(History().to_bytes()).span(100, now).series["errors"] == [None] * 10


@pytest.mark.parametrize("restarted", [False, True])
def test_the_parts_of_a_step_are_put_together_by_their_seconds(restarted: bool) -> None:
    """A server that is started again within ten seconds neither hides what the one before did nor counts it twice."""
    history = History()
    history.add(START, {"texts_per_second": 9.0, "bulk_p95_ms": 50.0, "errors": 2}, seconds=2.0)
    if restarted:
        history = History.from_bytes(history.to_bytes())
    history.add(START + 4, {"texts_per_second": 0.0, "bulk_p95_ms": None, "errors": 0, "bulk_p50_ms": 7.0}, seconds=4.0)
    history.add(START + 9, {"texts_per_second": 3.0, "bulk_p95_ms": 20.0, "errors": 1}, seconds=3.0)
    series = history.span(10, START + 10).series
    assert (series["texts_per_second"], series["errors"]) == ([3.0], [3])
    assert (series["bulk_p95_ms"], series["bulk_p50_ms"], series["cache_hit_ratio"]) == ([50.0], [7.0], [None])


def test_series_of_another_release_are_left_out_and_missing_ones_unknown() -> None:
    head, _, body = filled(50).to_bytes().removeprefix(MAGIC).partition(b"\n")
    facts = json.loads(head)
    facts["series"] = [{"errors": "mistakes"}.get(name, name) for name in facts["series"]]
    kept = History.from_bytes(MAGIC + json.dumps(facts).encode() + b"\n" + body)
    span = kept.span(100, START + 500)
    assert (span.series["errors"], span.series["texts_per_second"][-1]) == ([None] * 10, 49)


def _bomb(series: int) -> bytes:
    body = zlib.compress(b"\0" * max(50_000_000, 4 * series * STEPS), 1)
    head = {"latest": 1, "series": ["errors"] * series, "steps": STEPS, "step_seconds": STEP_SECONDS}
    return MAGIC + json.dumps(head | {"bytes": len(body), "crc": zlib.crc32(body)}).encode() + b"\n" + body


WHOLE = filled(20).to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        WHOLE[:-1],
        WHOLE[:30],
        WHOLE[:-5] + b"\0\0\0\0\0",
        WHOLE.replace(b"history 1", b"history 2"),
        WHOLE.replace(b'"step_seconds": 10', b'"step_seconds": 20'),
        WHOLE.replace(b'"latest": ', b'"latest": "x", "l": '),
        MAGIC + b"[]\n",
        MAGIC + b"{}\n",
        MAGIC + b"[" * 200_000 + b"\n",
        _bomb(series=1),
        _bomb(series=1447),  # of just the size that it says
    ],
)
def test_what_is_no_history_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableHistory):
        History.from_bytes(data)


def test_hidden_series_are_null() -> None:
    shown = filled(20).span(100, START + 200).as_json(OF_WORK)
    assert all(shown["series"][name] == [None] * 10 for name in OF_WORK)
    assert shown["series"]["texts_per_second"][-1] == 19
