"""`vecmill doctor` on the command line."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer
from rich.console import Console

from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.tools.doctor.order import CHECKS
from vecmill.tools.doctor.report import Result
from vecmill.tools.doctor.run import run_checks
from vecmill.tools.doctor.show import Json, Lines

said = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)


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
    results: dict[str, Result] = {}
    show: Json | Lines = Json() if json else Lines()
    interrupted = False
    try:
        run_checks(settings, names, wait, show, results)
    except KeyboardInterrupt:
        interrupted = True
    show.close(results.values(), interrupted=interrupted)
    failed = any(result.failed for result in results.values())
    raise typer.Exit(130 if interrupted else int(failed))


def _refuse(sentence: str) -> NoReturn:
    said.print(f"vecmill: {sentence}", style="bold red")
    raise typer.Exit(2)
