"""The progress of an embedding run, on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN_EVERY = 1000  # texts while they are read: showing each would take longer than reading it
LINE_EVERY = 10  # percent between lines where there is no terminal

said = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)


class Show:
    """What a person sees of it."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=said, transient=True, disable=not said.is_terminal)
        self._task = self._bar.add_task("reading", total=None, rate="")
        self._doing, self._waiting = "reading", ""
        self._began, self._at_start = monotonic(), 0
        self._total, self._tenth = 0, -1

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def read(self, texts: int) -> None:
        """So many texts of the input so far."""
        if texts % SHOWN_EVERY == 0:
            self._bar.update(self._task, completed=texts)

    def begin(self, texts: int, answered: int) -> None:
        """All are read, and an earlier run has dealt with some."""
        self._began, self._at_start, self._total = monotonic(), answered, texts
        self._bar.reset(self._task, total=texts, completed=answered)
        if answered:
            said.print(f"found     {answered:,} of {texts:,} texts on the server, of an earlier run")

    def answered(self, texts: int) -> None:
        """So many have an answer."""
        rate = (texts - self._at_start) / max(monotonic() - self._began, 1e-9)
        self._bar.update(self._task, completed=texts, rate=f"{rate:,.0f} texts/s" if texts > self._at_start else "")
        tenth = 100 * texts // max(self._total, 1) // LINE_EVERY
        if not said.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            said.print(f"embedded  {texts:,} of {self._total:,} texts, {rate:,.0f} texts/s")

    def doing(self, what: str) -> None:
        """What is being done, in one or two words."""
        self._doing = what
        self._describe()

    def waiting(self, reason: str) -> None:
        """Why the server is waited for; empty: it is not any more."""
        if reason == self._waiting:
            return
        self._waiting = reason
        self._describe()
        said.print(f"waiting   {reason}" if reason else "waiting   no longer: the server answers")

    def _describe(self) -> None:
        self._bar.update(self._task, description="waiting" if self._waiting else self._doing)
