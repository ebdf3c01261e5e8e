"""A few hundred changed inputs of each target, the same every time; at night tens of thousands, others each time."""

from __future__ import annotations

import random
import time

import pytest

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import TARGETS, Target

QUICK = {"checkpoint_files": 40, "requests": 250}
NIGHTLY_SECONDS = 60


def run(target: Target, data: bytes) -> None:
    """The target, whose input is shown where it fails. A panic of a library is no Exception."""
    try:
        target.run(data)
    except BaseException as error:
        error.add_note(f"input: {data[:3000]!r}")
        raise


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs(name: str) -> None:
    source, target = random.Random(name), TARGETS[name]
    seeds = target.seeds()
    for seed in seeds if name != "checkpoint_files" else ():
        run(target, seed)
    for _ in range(QUICK.get(name, 500)):
        run(target, mutated(source.choice(seeds), target.words, source))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_inputs(name: str) -> None:
    source, target, until = random.Random(), TARGETS[name], time.monotonic() + NIGHTLY_SECONDS
    pool = [*target.seeds()]
    while time.monotonic() < until:
        run(target, mutated(source.choice(pool), target.words, source))
