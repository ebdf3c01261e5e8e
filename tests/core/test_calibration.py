"""From measured forward passes to budgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vecmill.core.calibration import fit

SHAPES = (2048, 1024, 512, 256, 128, 64, 32, 16)


def line(fixed: float, per_token: float) -> list[tuple[int, float]]:
    return [(tokens, fixed + per_token * tokens) for tokens in SHAPES]


@given(st.floats(0, 0.1), st.floats(1e-6, 1e-2))
def test_a_line_is_found_again(fixed: float, per_token: float) -> None:
    fitted = fit(line(fixed, per_token))
    assert fitted.seconds_per_token == pytest.approx(per_token, rel=1e-3)
    assert fitted.fixed_seconds == pytest.approx(fixed, rel=1e-3, abs=1e-6)
    assert fitted.best_rate == pytest.approx(1 / per_token, rel=1e-3)


def test_a_gpus_roof_is_a_knee() -> None:
    """Bound by memory below 420 tokens, by arithmetic above: the published figures of a GB10 and a 4B model."""
    measured = [(tokens, max(0.037, 0.037 * tokens / 420)) for tokens in (16384, 8192, 4096, 2048, 1024, 512, 64, 16)]
    fitted = fit(measured)
    assert 200 < fitted.knee_tokens < 900


def test_the_budget_is_the_fewest_tokens_with_95_percent_of_the_best_rate() -> None:
    fitted = fit(line(0.002, 0.0001))  # knee at 20 tokens
    budget = fitted.bulk_tokens(max_seconds=10, largest=16384)
    assert budget == 380 // 64 * 64
    assert budget / fitted.seconds(budget) > 0.94 * fitted.best_rate


def test_the_budget_keeps_the_time() -> None:
    fitted = fit(line(0.010, 0.0001))
    budget = fitted.bulk_tokens(max_seconds=0.100, largest=16384)
    assert fitted.seconds(budget) <= 0.100
    assert fitted.seconds(budget + 64) > 0.100


def test_a_time_that_hardly_a_forward_keeps_still_lets_a_query_through() -> None:
    assert fit(line(0.010, 0.0001)).bulk_tokens(0.0101, largest=16384) == 16


@pytest.mark.parametrize("max_seconds", [1e-6, 0.001, 0.0099])
def test_where_no_forward_keeps_the_time_it_is_half_the_knee(max_seconds: float) -> None:
    assert fit(line(0.010, 0.0001)).bulk_tokens(max_seconds, largest=16384) == 50


def test_the_largest_shape_that_was_run_is_the_most() -> None:
    assert fit(line(0.1, 0.0001)).bulk_tokens(max_seconds=100, largest=1000) == 1000


@given(st.lists(st.floats(1e-4, 10), min_size=8, max_size=8), st.floats(1e-3, 10))
def test_whatever_was_measured_gives_a_budget(seconds: list[float], max_seconds: float) -> None:
    fitted = fit(list(zip(SHAPES, seconds, strict=True)))
    assert fitted.seconds_per_token > 0
    assert fitted.fixed_seconds >= 0
    assert 1 <= fitted.bulk_tokens(max_seconds, largest=2048) <= 2048


def test_one_shape_is_enough() -> None:
    assert fit([(8, 0.008)]).seconds_per_token == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("fixed", "per_token", "free"),
    [(0.040, 0.0001, 400), (0.0025, 0.00005, 200), (0.0, 0.001, 12), (0.0, 10.0, 1)],
)
def test_bulk_rides_to_the_knee_or_to_an_eighth_of_the_time(fixed: float, per_token: float, free: int) -> None:
    assert fit(line(fixed, per_token)).free_tokens(max_seconds=0.1) == pytest.approx(free, abs=1)
