"""Latency over throughput: in the terminal, or as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import plotille  # type: ignore[import-untyped]

from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.results import Load

WIDTH, HEIGHT = 60, 14  # characters; with the axis it fits 80 columns
TICK = 10  # characters between two numbers on the x axis; on the y axis each line has one
ROUND = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)  # steps, times a power of ten, that are easy to read
PICTURES = (".pdf", ".png", ".svg")
INCHES = (8, 5)


@dataclass(frozen=True, slots=True)
class _Point:
    connections: int
    throughput: float
    p50: float
    p99: float


def _points(loads: Sequence[Load]) -> list[_Point]:
    """Of the loads with answers, in order of connections."""
    return [
        _Point(load.connections, load.texts_per_second, latency.p50, latency.p99)
        for load in sorted(loads, key=lambda load: load.connections)
        if (latency := load.outcomes.latency_ms) is not None
    ]


def terminal_plot(loads: Sequence[Load], *, colours: bool) -> str | None:
    """p99, with each level's connections, and below it p50; None: there are no two points to join."""
    points = _points(loads)
    if len(points) < 2:
        return None
    figure = plotille.Figure()
    figure.width, figure.height = WIDTH, HEIGHT
    figure.with_colors, figure.origin = colours, False
    figure.x_label, figure.y_label = "texts/s", "ms"
    figure.x_ticks_fkt = figure.y_ticks_fkt = lambda low, high: f"{round(low, 3):,g}"
    throughputs = [point.throughput for point in points]
    p50s, p99s = [point.p50 for point in points], [point.p99 for point in points]
    figure.set_x_limits(0, _limit(max(throughputs), WIDTH // TICK))
    figure.set_y_limits(0, _limit(max(p99s), HEIGHT))
    figure.plot(throughputs, p50s, lc="cyan" if colours else None)
    figure.plot(throughputs, p99s, lc="yellow" if colours else None)
    figure.text(throughputs, p50s, ["o"] * len(points))
    figure.text(throughputs, p99s, [str(point.connections) for point in points])
    # A braille blank is as wide as a letter in few fonts; a space is in all.
    drawn = str(figure.show()).replace("\N{BRAILLE PATTERN BLANK}", " ")
    lines = "\n".join(line.rstrip() for line in drawn.splitlines())
    return f"{lines}\np99 at each number of connections; o: p50"


def _limit(largest: float, steps: int) -> float:
    """The end of an axis from 0 whose steps are round numbers."""
    power = 10.0 ** math.floor(math.log10(largest / steps))
    return steps * power * next(one for one in ROUND if one * power * steps >= largest)


def require_picture(path: Path) -> None:
    """Say before the measurement what would keep its picture from being written.

    Raises:
        BenchError: there is no such folder, no such kind of picture, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURES:
        raise BenchError(f"--plot {path}: the name must end in one of {', '.join(PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {path.absolute().parent}.")
    if find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'vecmill[plot]'.")


def write_picture(loads: Sequence[Load], title: str, path: Path) -> None:
    """The same points as a picture, of the kind that the path's ending says.

    Raises:
        BenchError: it cannot be written.
    """
    from matplotlib.figure import Figure  # an extra, and half a second to import

    points = _points(loads)
    throughputs = [point.throughput for point in points]
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(throughputs, [point.p99 for point in points], marker="o", label="p99")
    axes.plot(throughputs, [point.p50 for point in points], marker="o", label="p50")
    for point in points:
        axes.annotate(
            f"{point.connections}",
            (point.throughput, point.p99),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="texts/s", ylabel="latency, ms", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="at each number\nof connections")
    try:
        figure.savefig(path)
    except OSError as error:
        raise BenchError(f"--plot {path} cannot be written: {error.strerror}.") from error
