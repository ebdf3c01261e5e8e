"""Figures of several rounds: the order the sides take turns in, median and range, a figure beside its target."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console

ALLOWED_OTHER_CORES = 0.1

T = TypeVar("T")


def in_turns(sides: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield every side once per round, in the given order and in reverse by turns."""
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def judged(figure: Mapping[str, Any], most: float) -> dict[str, Any]:
    """A spread beside the target that its median must not pass."""
    return {**figure, "target": most, "met": figure["median"] <= most}


def shown(figure: Mapping[str, Any], unit: str = "") -> str:
    """Median and range, and the target where there is one."""
    low, middle, high = (rounded(figure[key]) for key in ("min", "median", "max"))
    text = f"{middle}{unit} ({low} to {high})"
    if "target" not in figure:
        return text
    return f"{text}, target at most {figure['target']:g}{unit}: {'met' if figure['met'] else 'MISSED'}"


def rounded(value: float) -> str:
    """The value as text, with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_disturbance(console: Console, other_cores: float) -> None:
    """Print a warning if other programs were busy; `other_cores` is what they used on average."""
    if other_cores > ALLOWED_OTHER_CORES:
        console.print(f"Other programs used up to {other_cores:.2f} cores meanwhile: measure again on a quiet machine.")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of the rounds, and the rounds themselves in their order."""
    return {
        "median": significant(statistics.median(values)),
        "min": significant(min(values)),
        "max": significant(max(values)),
        "rounds": [significant(value) for value in values],
    }


def significant(value: float) -> float:
    """Rounded to four significant digits: more would be noise."""
    return float(f"{value:.4g}")
