"""`vecmill doctor`: the command line, and the findings as people and programs read them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, NoReturn

import orjson
import typer
from rich.console import RenderableType
from rich.status import Status as Spinner
from rich.table import Table
from rich.text import Text

from vecmill import __version__
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.tools.console import INTERRUPTED, UsageError, print_error
from vecmill.tools.console import results as console
from vecmill.tools.doctor.findings import CheckResult, FindingStatus, summary
from vecmill.tools.doctor.run import CHECKS, Reporter, run_checks

NAME, STATUS = 10, 4  # columns
INDENT = NAME + STATUS + 4
STYLES = {FindingStatus.OK: "green", FindingStatus.WARN: "yellow", FindingStatus.FAIL: "bold red"}


class LineReporter(Reporter):
    """For people: a line for each check as it ends; on a terminal with colours and a spinner."""

    def __init__(self) -> None:
        self._spinner: Spinner | None = None

    def running(self, name: str) -> None:
        self._spin(f"{name} ...")

    def ended(self, result: CheckResult) -> None:
        self._still()
        if console.is_terminal:
            console.print(_rows(result))
        else:
            console.print("\n".join(_plain(result)), soft_wrap=True)

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        line = f"waiting for {', '.join(names)}, {seconds:.0f} s at the most"
        if console.is_terminal:
            self._spin(line)
        else:
            console.print(line, soft_wrap=True)

    def close(self, results: Iterable[CheckResult], *, interrupted: bool) -> None:
        """Print the last line."""
        self._still()
        ended = "stopped; " if interrupted else ""
        console.print(f"\n{ended}{summary(results)}", style="bold", soft_wrap=True)

    def _spin(self, text: str) -> None:
        if console.is_terminal:
            self._still()
            self._spinner = console.status(text)
            self._spinner.start()

    def _still(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


class JsonReporter(Reporter):
    """For programs: one object, when all is done."""

    def close(self, results: Iterable[CheckResult], *, interrupted: bool) -> None:
        """Print the object."""
        ended = list(results)
        document = {
            "version": __version__,
            "ok": not interrupted and not any(result.failed for result in ended),
            "checks": [
                {
                    "name": result.name,
                    "status": result.finding.status.value,
                    "seen": result.finding.seen,
                    "cure": result.finding.cure,
                    "details": result.finding.details,
                    "seconds": round(result.seconds, 3),
                }
                for result in ended
            ],
        }
        sys.stdout.buffer.write(orjson.dumps(document, default=str, option=orjson.OPT_INDENT_2) + b"\n")
        sys.stdout.buffer.flush()


def _listed(result: CheckResult) -> list[str]:
    details = result.finding.details if result.finding.listed else {}
    return [f"{name}: {value}" for name, value in details.items()]


def _cures(result: CheckResult) -> list[str]:
    lines = result.finding.cure.splitlines() if result.finding.cure else []
    return [f"{'      ' if number else 'cure: '}{line}" for number, line in enumerate(lines)]


def _plain(result: CheckResult) -> list[str]:
    first, *others = [*(result.finding.seen.splitlines() or [""]), *_listed(result), *_cures(result)]
    head = f"{result.name:<{NAME}}  {result.finding.status.value:<{STATUS}}  "
    return [f"{head}{first}".rstrip(), *(f"{'':{INDENT}}{line}" for line in others)]


def _rows(result: CheckResult) -> RenderableType:
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


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of lines.")] = False,
    only: Annotated[
        str | None, typer.Option(help=f"Only these, comma-separated, of: {', '.join(CHECKS)}.", show_default=False)
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds for which what fails is looked at again until it is well.")
    ] = 0.0,
    env_file: Annotated[
        str | None, typer.Option("--env-file", help="File of settings to read in place of `.env`.", show_default=False)
    ] = None,
) -> None:
    """Say what is wrong with this machine and these settings, and what to do about it.

    The settings are those of `vecmill serve`: the environment and `.env`. Exit code 0: nothing has failed, warnings or
    not; 1: something has; 2: the options or the settings are wrong; 130: Ctrl-C.
    """
    names = list(CHECKS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in CHECKS]
    if unknown or not names:
        _refuse(f"--only {only}: no check {', '.join(unknown) or 'is named'}. There are: {', '.join(CHECKS)}.")
    try:
        settings = load_settings(env_file=env_file)
    except StartupError as error:
        _refuse(error.message)
    results: dict[str, CheckResult] = {}
    reporter: JsonReporter | LineReporter = JsonReporter() if json else LineReporter()
    interrupted = False
    try:
        run_checks(settings, names, wait, reporter, results)
    except KeyboardInterrupt:
        interrupted = True
    reporter.close(results.values(), interrupted=interrupted)
    failed = any(result.failed for result in results.values())
    raise typer.Exit(INTERRUPTED if interrupted else int(failed))


def _refuse(sentence: str) -> NoReturn:
    print_error(sentence)
    raise typer.Exit(UsageError.exit_code)
