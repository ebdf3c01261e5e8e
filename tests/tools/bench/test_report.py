"""The bars in the terminal, whatever was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vecmill.tools.bench import report
from vecmill.tools.bench.load_generator import BulkLoad, Latency, Outcomes
from vecmill.tools.bench.report import BAR_WIDTH, show_sweep
from vecmill.tools.bench.scenarios import SweepResult

RATES = st.floats(1e-3, 1e7)
LEVELS = st.lists(st.tuples(RATES, RATES, st.floats(1, 100)), min_size=2, max_size=8)


def load(connections: int, texts_per_second: float, p50: float, p99: float) -> BulkLoad:
    outcomes = Outcomes(10, Latency(p50, p99, p99, p99), {}, {}, None)
    return BulkLoad(connections, outcomes, 10, 1.0, texts_per_second, 0.1, None, 0.1)


def shown(levels: Sequence[BulkLoad], encoding: str = "utf-8") -> str:
    """The table, and the bars below it, on a terminal of 80 columns."""
    content = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        file = io.TextIOWrapper(content, encoding)
        patch.setattr(report, "results", Console(file=file, width=80, markup=False, highlight=False))
        show_sweep(SweepResult(384, list(levels)))
        file.flush()
        return content.getvalue().decode(encoding)


def bars(levels: Sequence[BulkLoad]) -> list[tuple[str, str]]:
    """Of each level: its throughput's bar and its latency's."""
    lines = shown(levels).splitlines()
    at = next(number for number, line in enumerate(lines) if "texts/s, 0 to" in line)
    begin = lines[at].index("texts/s, 0 to")
    rows = [line.ljust(80) for line in lines[at + 1 :]]
    assert len(rows) == len(levels)
    return [(row[begin : begin + BAR_WIDTH], row[begin + BAR_WIDTH + 2 :].rstrip()) for row in rows]


@given(LEVELS)
def test_every_level_has_both_bars_within_80_columns(values: list[tuple[float, float, float]]) -> None:
    levels = [load(number, rate, p50, p50 * spread) for number, (rate, p50, spread) in enumerate(values, 1)]
    assert all(len(line) <= 80 for line in shown(levels).splitlines())
    assert all(rate.strip() and latency.strip() for rate, latency in bars(levels))


def test_levels_at_the_edge() -> None:
    """The slowest at the highest throughput, by whose label a plot was ended with an IndexError."""
    levels = [load(1, 0.1846, 0.0041, 0.0054), load(2, 0.623, 0.0055, 0.0055)]
    (slow, below), (fast, last) = bars(levels)
    assert fast == "█" * BAR_WIDTH
    assert 0 < len(slow.strip()) < BAR_WIDTH
    assert len(below) <= len(last) == BAR_WIDTH


def test_equal_levels() -> None:
    (one, latency), same = bars([load(1, 100.0, 5.0, 5.0), load(2, 100.0, 5.0, 5.0)])
    assert one == "█" * BAR_WIDTH
    assert same == (one, latency)
    assert latency.strip()


def test_a_terminal_without_block_characters_has_the_table_alone() -> None:
    text = shown([load(1, 100.0, 5.0, 9.0), load(2, 150.0, 6.0, 12.0)], "ascii")
    assert "p99 ms" in text
    assert "p50 to p99" not in text
