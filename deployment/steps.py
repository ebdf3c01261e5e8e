"""A deployment: steps in order, each whole or not at all. They can be printed, or carried out."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from deployment import console
from deployment.actions import Action, Run, Undo
from deployment.causes import likely_cause
from deployment.commands import Failed

INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """What belongs together."""

    title: str
    actions: tuple[Action, ...]
    undo: str
    """How the user gets rid of what it did."""
    done: str = "nothing to do"
    """Why there is nothing to do, where there is not."""
    restores: bool = True
    """Whether a failure puts back the files that it changed."""
    recovery: tuple[Run, ...] = ()
    """What then lets that which ran before run again."""


def show(steps: Sequence[Step]) -> None:
    """Print every command and every file; do nothing."""
    for number, step in enumerate(steps, 1):
        console.say(_heading(number, steps, step, "" if step.actions else f": {step.done}"))
        for action in step.actions:
            console.detail(action.describe())
    console.say("Nothing was done (--dry-run).")


def carry_out(steps: Sequence[Step], keep_going: bool = False) -> int:
    """Do them; the exit code: 0, 1 where a step failed, 130 where somebody interrupted.

    `keep_going`: a step that fails does not keep the later ones from being tried.
    """
    code = 0
    for number, step in enumerate(steps, 1):
        if not step.actions:
            console.say(_heading(number, steps, step, f": {step.done}"))
            continue
        console.say(_heading(number, steps, step))
        started = monotonic()
        outcome = _carry_out(step)
        if outcome == INTERRUPTED or (outcome != 0 and not keep_going):
            return outcome
        if outcome == 0:
            console.detail([f"done in {console.duration(monotonic() - started)}"])
        code = max(code, outcome)
    return code


def _heading(number: int, steps: Sequence[Step], step: Step, end: str = "") -> str:
    return f"[{number}/{len(steps)}] {step.title}{end}"


def _carry_out(step: Step) -> int:
    undo: list[Undo] = []
    for action in step.actions:
        try:
            # Contents of files are for --dry-run.
            console.detail(action.describe()[:1])
            taken_back = action.apply()
        except (Failed, OSError) as error:
            _take_back(step, undo)
            _report(step, action, error)
            return 1
        except KeyboardInterrupt:
            _take_back(step, undo)
            console.complain(f"Interrupted in the step {step.title!r}, at: {action.describe()[0]}")
            _advise(step)
            return INTERRUPTED
        if taken_back is not None:
            undo.append(taken_back)
    return 0


def _take_back(step: Step, undo: Sequence[Undo]) -> None:
    """A second Ctrl-C must not leave half of it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for taken_back in reversed(undo if step.restores else ()):
            try:
                taken_back()
            except OSError as error:
                console.complain(f"Not put back: {error}")
        for run in step.recovery:
            console.detail(["back to what was before:", *run.describe()])
            with suppress(Failed, OSError):
                run.apply()
    finally:
        signal.signal(signal.SIGINT, before)


def _report(step: Step, action: Action, error: Failed | OSError) -> None:
    said = error.said if isinstance(error, Failed) else ""
    what = str(error) if isinstance(error, Failed) else f"{error.strerror}: {error.filename}"
    console.complain(f"The step {step.title!r} failed at: {action.describe()[0]}")
    console.complain(f"  {what}")
    for line in said.splitlines():
        console.complain(f"  | {line}")
    if cause := likely_cause(f"{said}\n{what}"):
        console.complain(f"Why: {cause}")
    _advise(step)


def _advise(step: Step) -> None:
    if step.recovery:
        console.complain("What ran before was put back.")
    console.complain("Running the same command again goes on from here.")
    console.complain(f"Undo: {step.undo}")
