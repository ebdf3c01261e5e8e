"""When a device that answers nothing is taken for hung."""

from __future__ import annotations

from vecmill.engine.engine import PendingPasses


class TurnedClock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_hung_is_what_takes_twenty_times_as_long_and_a_minute() -> None:
    clock = TurnedClock()
    progress = PendingPasses(clock)
    assert progress.hung() is None
    with progress.of(0.1):
        clock.now += 59
        assert progress.hung() is None
        clock.now += 2
        assert "answered nothing for 61 s" in (progress.hung() or "")
        with progress.of(10.0):  # a long text behind it
            assert progress.hung() is None
            clock.now += 200
            assert progress.hung() is not None
        assert progress.hung() is None, "one was answered"
        clock.now += 61
        assert progress.hung() is not None
    clock.now += 1000
    assert progress.hung() is None


def test_idle_time_does_not_count() -> None:
    clock = TurnedClock()
    progress = PendingPasses(clock)
    clock.now += 1000
    with progress.of(0.1), progress.of(0.1):
        assert len(progress) == 2
        assert progress.hung() is None
    assert len(progress) == 0
