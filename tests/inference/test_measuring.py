"""Measuring in quiet moments alone: with parts that say when the device is used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psutil
import pytest

from vecmill.core.errors import EngineFailed
from vecmill.inference import measuring
from vecmill.inference.measuring import measure_when_quiet


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(measuring, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 0.0)


def noting(measured: list[str], due: list[str]) -> Callable[[str], Awaitable[bool]]:
    async def measure(key: str) -> bool:
        measured.append(key)
        due.remove(key)
        return True

    return measure


async def test_each_model_is_measured_once() -> None:
    due, measured = ["one", "two"], list[str]()
    await measure_when_quiet(lambda: due, lambda: 0, lambda: False, noting(measured, due))
    assert (measured, due) == (["one", "two"], [])


async def test_nothing_is_measured_while_the_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By passes, by what waits, or by other programs: each in turn."""
    due, measured, looks = ["one"], list[str](), 0

    def passes() -> int:
        nonlocal looks
        looks += 1
        return looks if looks < 6 else 6

    waits = iter([True, True])
    shares = iter([0.0, 90.0] * 3)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: next(shares, 0.0))
    await measure_when_quiet(lambda: due, passes, lambda: next(waits, False), noting(measured, due))
    assert (measured, looks) == (["one"], looks)
    assert looks > 10
    assert (next(waits, None), next(shares, None)) == (None, None)


async def test_what_was_interrupted_is_tried_again() -> None:
    """And a failure of the device ends nothing but the try."""
    due, tries = ["one"], 0

    async def measure(key: str) -> bool:
        nonlocal tries
        tries += 1
        if tries == 1:
            return False
        if tries == 2:
            raise EngineFailed
        due.remove(key)
        return True

    async with asyncio.timeout(5):
        await measure_when_quiet(lambda: due, lambda: 0, lambda: False, measure)
    assert tries == 3
