"""The bars in the terminal, whatever was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vecmill.tools.bench import report
from vecmill.tools.bench.load_generator import BulkLoad, Latency, Outcomes
from vecmill.tools.bench.report import BAR_WIDTH, show_remarks, show_sweep, write_picture
from vecmill.tools.bench.scenarios import SweepResult
from vecmill.tools.console import CommandError

RATES = st.floats(1e-3, 1e7)
LEVELS = st.lists(st.tuples(RATES, RATES, st.floats(1, 100)), min_size=2, max_size=8)


def load(connections: int, texts_per_second: float, p50: float, p99: float) -> BulkLoad:
    outcomes = Outcomes(10, Latency(p50, p99, p99, p99), {}, {}, None)
    return BulkLoad(connections, outcomes, 10, 1.0, texts_per_second, 0.1, None, 0.1)


def shown(levels: Sequence[BulkLoad], encoding: str = "utf-8", width: int = 80, **console: Any) -> str:
    """The table, and the bars below it, on a terminal of 80 columns."""
    content = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        file = io.TextIOWrapper(content, encoding)
        patch.setattr(report, "results", Console(file=file, width=width, markup=False, highlight=False, **console))
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


HOSTILE = st.one_of(st.floats(0, 1e15), st.sampled_from([0.0, 5e-324, 1e-12, 1.0, 1e15]))


@given(st.lists(st.tuples(HOSTILE, HOSTILE, HOSTILE), max_size=6), st.integers(1, 200), st.booleans())
def test_whatever_was_measured_is_shown_on_any_terminal(
    values: list[tuple[float, float, float]], width: int, terminal: bool
) -> None:
    levels = [load(number, rate, p50, p50 + more) for number, (rate, p50, more) in enumerate(values, 1)]
    text = shown(levels, width=width, force_terminal=terminal, no_color=not terminal)
    assert "texts/s" in text
    assert "\u2026" not in text.split("p50 to p99")[0]  # no figure is cut


def test_levels_without_an_answer_have_no_bars() -> None:
    failed = BulkLoad(1, Outcomes(3, None, {}, {"500": 3}, "500: gone"), 0, 1.0, 0.0, 0.0, None, 0.1)
    assert "p50 to p99" not in shown([failed, failed])
    assert "p50 to p99" not in shown([failed, load(2, 3.0, 1.0, 2.0)])
    assert "p50 to p99" not in shown([])


def test_twenty_columns_have_every_figure_and_both_bars() -> None:
    text = shown([load(1, 1234.5, 5.25, 9.75), load(2, 2345.6, 6.25, 12.75)], width=20)
    assert all(figure in text for figure in ("1,234.5", "2,345.6", "5.2", "9.8", "12.8"))
    assert "\u2588" in text


@pytest.mark.parametrize("values", [[], [(1, 100.0, 5.0, 9.0)], [(1, 0.0, 0.0, 0.0)], [(1, 5.0, 1.0, 1.0)] * 3])
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_picture_of_anything(values: list[tuple[int, float, float, float]], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot{ending}"
    write_picture([load(*each) for each in values], "http://host/$x_{$ 50 % \u4e2d", path)
    assert path.stat().st_size > 1000


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(CommandError, match="cannot be written: Is a directory"):
        write_picture([load(1, 100.0, 5.0, 9.0)], "title", tmp_path / "folder.png")


def test_what_a_server_says_is_no_command_to_the_terminal() -> None:
    outcomes = Outcomes(1, None, {}, {"500": 1}, "500: \x1b[2Jgone\r\n\u202eevil")
    content = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "results", Console(file=content, width=80, markup=False, highlight=False))
        show_remarks({"1 connection": outcomes}, [])
    assert "error     500: \\x1b[2Jgone\\r\\n\\u202eevil\n" in content.getvalue()


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
