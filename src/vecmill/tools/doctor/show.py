"""The findings as people and programs read them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import orjson
from rich.console import Console, RenderableType
from rich.status import Status as Spinner
from rich.table import Table
from rich.text import Text

from vecmill import __version__
from vecmill.tools.doctor.report import Result, Status, summary

NAME, STATUS = 10, 4  # columns
INDENT = NAME + STATUS + 4
STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


class Lines:
    """For people: a line for each check as it ends; on a terminal with colours and a spinner."""

    def __init__(self) -> None:
        self._console = Console(markup=False, highlight=False, emoji=False)
        self._spinner: Spinner | None = None

    def running(self, name: str) -> None:
        self._spin(f"{name} ...")

    def ended(self, result: Result) -> None:
        self._still()
        if self._console.is_terminal:
            self._console.print(_rows(result))
        else:
            self._console.print("\n".join(_plain(result)), soft_wrap=True)

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        line = f"waiting for {', '.join(names)}, {seconds:.0f} s at the most"
        if self._console.is_terminal:
            self._spin(line)
        else:
            self._console.print(line, soft_wrap=True)

    def close(self, results: Iterable[Result], *, interrupted: bool) -> None:
        """The last line."""
        self._still()
        ended = "stopped; " if interrupted else ""
        self._console.print(f"\n{ended}{summary(results)}", style="bold", soft_wrap=True)

    def _spin(self, text: str) -> None:
        if self._console.is_terminal:
            self._still()
            self._spinner = self._console.status(text)
            self._spinner.start()

    def _still(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


class Json:
    """For programs: one object, when all is done."""

    def running(self, name: str) -> None:
        pass

    def ended(self, result: Result) -> None:
        pass

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        pass

    def close(self, results: Iterable[Result], *, interrupted: bool) -> None:
        """Write it."""
        found = list(results)
        said = {
            "version": __version__,
            "ok": not interrupted and not any(result.failed for result in found),
            "checks": [
                {
                    "name": result.name,
                    "status": result.finding.status.value,
                    "seen": result.finding.seen,
                    "cure": result.finding.cure,
                    "details": result.finding.details,
                    "seconds": round(result.seconds, 3),
                }
                for result in found
            ],
        }
        sys.stdout.buffer.write(orjson.dumps(said, default=str, option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.buffer.flush()


def _listed(result: Result) -> list[str]:
    details = result.finding.details if result.finding.listed else {}
    return [f"{name}: {value}" for name, value in details.items()]


def _cures(result: Result) -> list[str]:
    lines = result.finding.cure.splitlines() if result.finding.cure else []
    return [f"{'      ' if number else 'cure: '}{line}" for number, line in enumerate(lines)]


def _plain(result: Result) -> list[str]:
    first, *others = [*(result.finding.seen.splitlines() or [""]), *_listed(result), *_cures(result)]
    head = f"{result.name:<{NAME}}  {result.finding.status.value:<{STATUS}}  "
    return [f"{head}{first}".rstrip(), *(f"{'':{INDENT}}{line}" for line in others)]


def _rows(result: Result) -> RenderableType:
    status = result.finding.status
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=NAME, no_wrap=True)
    table.add_column(width=STATUS, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(result.name, Text(status.value, style=STYLES[status]), result.finding.seen)
    for line in _listed(result):
        table.add_row("", "", Text(line, style="dim"))
    for line in _cures(result):
        table.add_row("", "", Text(line, style="bold"))
    return table
