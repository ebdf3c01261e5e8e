"""The progress bar of a measurement, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress as Bar
from rich.progress import ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from vecmill.tools.bench.load_generator import Advance
from vecmill.tools.console import messages

BAR_WIDTH = 40  # characters
LOOKS_PER_SECOND = 4  # each costs the measured machine about a millisecond


class _Rate(ProgressColumn):
    """Texts per second so far, blank until there are some."""

    def render(self, task: Task) -> Text:
        texts, elapsed = task.fields["texts"], task.elapsed
        return Text(f"{texts / elapsed:,.0f} texts/s" if texts and elapsed else "")


class _Stage(ProgressColumn):
    """A bar that fills with time where there is a time, else with texts."""

    def render(self, task: Task) -> ProgressBar:
        seconds, texts, expected = task.fields["seconds"], task.fields["texts"], task.fields["expected"]
        total, done = (expected, texts) if seconds is None else (seconds, task.elapsed or 0.0)
        return ProgressBar(total=total, completed=min(done, total), width=BAR_WIDTH)


class StageBars:
    """A bar for each stage, on a terminal; nothing elsewhere."""

    def __init__(self, *, shown: bool = True) -> None:
        columns = (TextColumn("{task.description:<16}", markup=False), _Stage(), TimeElapsedColumn(), _Rate())
        self._bar = Bar(
            *columns,
            console=messages,
            transient=True,
            refresh_per_second=LOOKS_PER_SECOND,
            disable=not (shown and messages.is_terminal),
        )

    def __enter__(self) -> StageBars:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def stage(self, name: str, seconds: float | None, expected: int = 0) -> Iterator[Advance]:
        """A bar while the block runs, full after `seconds` or else after `expected` texts; tell it of texts."""
        task = self._bar.add_task(name, total=None, seconds=seconds, expected=expected, texts=0)
        answered = 0

        def advance(texts: int) -> None:
            nonlocal answered
            answered += texts
            self._bar.update(task, texts=answered)

        yield advance
        self._bar.stop_task(task)
