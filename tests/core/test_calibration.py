"""From measured forward passes to budgets."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecmill.core.calibration import LARGEST_CHANGE, REFIT_SECONDS, Calibration, RunningFit, Warmed, fit

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
    on_cpu = fitted.bulk_tokens(max_seconds=10, largest=16384, rate=0.98)
    assert on_cpu == 980 // 64 * 64
    assert on_cpu / fitted.seconds(on_cpu) > 0.975 * fitted.best_rate


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


class Passes:
    """Forward passes on a device whose line may change, and a fit that follows them."""

    def __init__(self, line: Calibration, seed: int = 0) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.fit = RunningFit(line, lambda: self.now)
        self.changes: list[tuple[Calibration, Calibration]] = []

    def run(self, true: Calibration, sizes: list[int], seconds: float, outliers: float = 0.0) -> None:
        """Run passes of these sizes for so long; a share of them is disturbed."""
        end = self.now + seconds
        while self.now < end:
            tokens = self.random.choice(sizes)
            taken = true.seconds(tokens) * (1 + abs(self.random.gauss(0, 0.03)))
            if self.random.random() < outliers:
                taken *= self.random.uniform(2, 50)
            self.now += 0.1
            before = self.fit.calibration
            if self.fit.add(tokens, taken):
                self.changes.append((before, self.fit.calibration))


def of(fixed: float, per_token: float) -> Calibration:
    return fit(line(fixed, per_token))


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.0005, 0.05),
    st.floats(1e-5, 1e-3),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_a_fit_follows_the_device(
    fixed: float, per_token: float, slower: float, longer: float, seed: int, outliers: float
) -> None:
    """Whatever warm-up measured, also where every third pass is disturbed; and never in a leap."""
    passes, true = Passes(of(fixed, per_token), seed), of(fixed * slower, per_token * longer)
    passes.run(true, list(SHAPES), 200, outliers)
    for tokens in SHAPES:
        assert passes.fit.calibration.seconds(tokens) == pytest.approx(true.seconds(tokens), rel=0.25)
        for before, after in passes.changes:
            change = after.seconds(tokens) / before.seconds(tokens)
            assert 0.99 / LARGEST_CHANGE <= change <= 1.01 * LARGEST_CHANGE


def test_passes_of_one_size_speak_for_the_others() -> None:
    """As on a card that has left its slow power state, which is only asked for queries."""
    passes = Passes(of(0.010, 0.0010))
    passes.run(of(0.001, 0.0001), [16], 100)
    assert passes.fit.calibration.seconds(2048) == pytest.approx(of(0.001, 0.0001).seconds(2048), rel=0.2)


def test_no_passes_lead_a_fit_astray_for_ever() -> None:
    """A clock that is wrong, or work that is not done, is not believed beyond a factor of 30."""
    for wrong in (1e-9, 1e3):
        passes = Passes(of(0.010, 0.0001))
        passes.run(of(0.010 * wrong, 0.0001 * wrong), list(SHAPES), 600)
        for tokens in SHAPES:
            assert 1 / 31 < passes.fit.calibration.seconds(tokens) / of(0.010, 0.0001).seconds(tokens) < 31


def test_a_fit_that_is_right_stays() -> None:
    passes = Passes(of(0.010, 0.0001))
    passes.run(of(0.010, 0.0001), list(SHAPES), 300, outliers=0.3)
    assert passes.changes == []


@given(st.lists(st.tuples(st.integers(-5, 10**6), st.floats(allow_nan=True, allow_infinity=True)), max_size=200))
def test_any_passes_leave_a_fit_that_can_be_used(passes: list[tuple[int, float]]) -> None:
    clock = iter(range(10**6))
    running = RunningFit(of(0.010, 0.0001), lambda: REFIT_SECONDS * next(clock))
    for tokens, seconds in passes:
        running.add(tokens, seconds)
    assert 0 <= running.calibration.fixed_seconds < float("inf")
    assert 0 < running.calibration.seconds_per_token < float("inf")


def test_budgets_follow_the_fit_within_what_was_tried() -> None:
    warmed = Warmed(of(0.010, 0.0001), 2048, 0, 64, 0, False, "eager", 0, 0, 0, ()).refitted(of(0.010, 0.0001), 0.1)
    assert (warmed.max_batch_tokens, warmed.free_tokens) == (896, 100)
    slower = warmed.refitted(of(0.020, 0.0004), 0.1)
    assert (slower.max_batch_tokens, slower.max_batch_size, slower.largest_tokens) == (192, 64, 2048)
    assert warmed.refitted(of(0.001, 0.0000001), 0.1).max_batch_tokens == 2048
    assert slower.changed_at >= warmed.changed_at
