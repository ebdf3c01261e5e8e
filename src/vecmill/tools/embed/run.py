"""An embedding run from the first check to the summary."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from types import FrameType, TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vecmill.tools.console import INTERRUPTED, CommandError, UsageError, messages, print_error, results
from vecmill.tools.embed import inputs, outputs
from vecmill.tools.embed.batches import RemoteBatches, TextVector, vector_of
from vecmill.tools.embed.outputs import FLOAT_BYTES, OutputFile, Vectors
from vecmill.tools.embed.requests import BATCH_FILE_BYTES, ENDPOINT, Prepared, prepare
from vecmill.tools.embed.rows import InputTable, TextSource
from vecmill.tools.embed.work import SHOWN_REASONS, EmbedTotals, PartWork
from vecmill.tools.http_client import HttpClient, ServerAddress

IN_PROGRESS = 4  # batches at a time; the server works through as many by default
FIRST_POLL_S, LONGEST_POLL_S = 0.25, 5.0
PROBE = "vecmill"
TERMINATED = 143  # the exit code after SIGTERM
SHOWN_EVERY = 1000  # texts while they are read: showing each would take longer than reading it
LINE_EVERY = 10  # percent between lines where there is no terminal


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """An embedding run; see the help of `vecmill embed`."""

    server: ServerAddress
    source: TextSource
    output: OutputFile
    fields: dict[str, Any] = field(default_factory=dict)
    """What every request carries beside its text."""
    batch_file_bytes: int = BATCH_FILE_BYTES
    keep: bool = False
    """Leave the files on the server."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the summary is written from."""

    prepared: Prepared
    table: InputTable
    totals: EmbedTotals
    model: str
    dimensions: int
    computed: int
    """Texts that were not found on the server."""
    seconds: float


def run_embed(options: EmbedOptions) -> int:
    """Embed, and print a summary; the process's exit code."""
    try:
        options.output.check()
        with _ended_by_sigterm(), RunProgress() as show, HttpClient(options.server, show.waiting) as client:
            outcome = _Run(options, show, client).run()
    except CommandError as error:
        print_error(error)
        return error.exit_code
    except OSError as error:
        print_error(f"{error.filename or options.output.path}: {error.strerror or error}.")
        return CommandError.exit_code
    except KeyboardInterrupt:
        messages.print(
            "vecmill: stopped; the server goes on with what it has, and the same command takes up its results."
        )
        return INTERRUPTED
    _summarise(options, outcome)
    return 1 if outcome.totals.failed else 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that scratch files are removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RunProgress:
    """The progress on stderr: a bar on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal)
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
        """Show how many texts have been read."""
        if texts % SHOWN_EVERY == 0:
            self._bar.update(self._task, completed=texts)

    def begin(self, texts: int, answered: int) -> None:
        """All texts are read; `answered` of them have results of an earlier run."""
        self._began, self._at_start, self._total = monotonic(), answered, texts
        self._bar.reset(self._task, total=texts, completed=answered)
        if answered:
            messages.print(f"found     {answered:,} of {texts:,} texts on the server, of an earlier run")

    def answered(self, texts: int) -> None:
        """Show how many texts are answered."""
        rate = (texts - self._at_start) / max(monotonic() - self._began, 1e-9)
        self._bar.update(self._task, completed=texts, rate=f"{rate:,.0f} texts/s" if texts > self._at_start else "")
        tenth = 100 * texts // max(self._total, 1) // LINE_EVERY
        if not messages.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            messages.print(f"embedded  {texts:,} of {self._total:,} texts, {rate:,.0f} texts/s")

    def doing(self, what: str) -> None:
        """Show what is being done, in one or two words."""
        self._doing = what
        self._describe()

    def waiting(self, reason: str) -> None:
        """Show why the server is waited for; an empty reason: it answers again."""
        if reason == self._waiting:
            return
        self._waiting = reason
        self._describe()
        messages.print(f"waiting   {reason}" if reason else "waiting   no longer: the server answers")

    def _describe(self) -> None:
        self._bar.update(self._task, description="waiting" if self._waiting else self._doing)


class _Run:
    """The steps of a run, in order."""

    def __init__(self, options: EmbedOptions, show: RunProgress, client: HttpClient) -> None:
        self._options, self._show, self._client = options, show, client
        self._batches = RemoteBatches(client)
        self._totals = EmbedTotals()

    def run(self) -> _Outcome:
        """Run all steps. Scratch files lie beside the output: that disk must have room for it anyway."""
        self._batches.look_around()
        probe = self._probe()
        output = self._options.output
        with TemporaryDirectory(prefix=f".{output.path.name}.", dir=output.path.parent) as scratch:
            folder = Path(scratch)
            prepared, table = self._prepare(folder, probe.model)
            outputs.check_ids(output, prepared)
            dimensions = len(probe.values) // FLOAT_BYTES
            with Vectors(folder / "embeddings.npy", prepared.texts, dimensions) as vectors:
                works = [PartWork(part, self._batches, vectors, probe.model, self._totals) for part in prepared.parts]
                began = monotonic()
                earlier = self._work_off(works, prepared.texts)
                seconds = monotonic() - began
                self._show.doing("writing")
                failures = chain.from_iterable(work.failures() for work in works)
                outputs.write_errors(output, folder / "errors", failures, prepared)
                outputs.write(output, folder, prepared, vectors, probe.model)
        if not self._options.keep:
            self._delete()
        return _Outcome(prepared, table, self._totals, probe.model, dimensions, prepared.texts - earlier, seconds)

    def _probe(self) -> TextVector:
        """Embed one text, to learn model and dimensions, and to fail at once where the options are wrong."""
        body = {"input": PROBE, "encoding_format": "base64", **self._options.fields}
        answer = self._client.ask("POST", ENDPOINT, json=body)
        try:
            return vector_of(answer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CommandError(f"{self._client.base}{ENDPOINT} does not answer as OpenAI's does.") from error

    def _prepare(self, folder: Path, model: str) -> tuple[Prepared, InputTable]:
        with inputs.opened(self._options.source) as (rows, table):
            options = self._options
            prepared = prepare(rows, folder, model, options.fields, options.batch_file_bytes, self._show.read)
        if not prepared.parts:
            raise UsageError(f"There are no texts in {self._options.source.name}.")
        return prepared, table

    def _work_off(self, works: Sequence[PartWork], texts: int) -> int:
        """Work until all parts have ended; returns how many texts an earlier run had answered."""
        for work in works:
            work.take_up()
        earlier = sum(work.answered for work in works)
        self._show.begin(texts, earlier)
        wait = FIRST_POLL_S
        while True:
            self._hand_in(works)
            open_before = sum(not work.ended for work in works)
            for work in works:
                work.poll()
            self._show.answered(sum(work.answered for work in works))
            still_open = sum(not work.ended for work in works)
            if not still_open:
                return earlier
            sleep(wait)
            wait = FIRST_POLL_S if still_open < open_before else min(1.5 * wait, LONGEST_POLL_S)

    def _hand_in(self, works: Sequence[PartWork]) -> None:
        """Submit parts until as many batches run as the server works through at a time."""
        going = sum(work.running for work in works)
        for work in works:
            if going >= IN_PROGRESS:
                break
            if not work.running and not work.ended:
                self._show.doing("uploading")
                work.start()
                going += 1
        self._show.doing("embedding")

    def _delete(self) -> None:
        """Delete the batches' files on the server. A failure to do so is only reported."""
        self._show.doing("tidying up")
        try:
            for file_id in sorted(self._totals.remote_files):
                self._batches.delete(file_id)
        except CommandError as error:
            messages.print(f"vecmill: the batches' files are left on the server: {error}")


def _summarise(options: EmbedOptions, outcome: _Outcome) -> None:
    for line in _summary(options, outcome):
        results.print(line, soft_wrap=True)


def _summary(options: EmbedOptions, outcome: _Outcome) -> Iterator[str]:
    output, totals, texts = options.output, outcome.totals, outcome.prepared.texts
    vectors = texts - totals.failed
    yield f"wrote     {output.path}: {vectors:,} vectors of {outcome.dimensions} values ({outcome.model})"
    rate = f", {outcome.computed / outcome.seconds:,.0f} texts/s" if outcome.computed and outcome.seconds else ""
    earlier = f" ({texts - outcome.computed:,} found on the server)" if outcome.computed < texts else ""
    yield f"texts     {texts:,} in {outcome.seconds:,.1f} s{rate}{earlier}"
    cached = f", {totals.cached_tokens:,} of them from the cache" if totals.cached_tokens else ""
    yield f"tokens    {totals.tokens:,}{cached}"
    for reason, count in outcome.table.skipped.most_common(SHOWN_REASONS):
        yield f"skipped   {count:,} x {reason}"
    if totals.failed:
        yield f"failed    {totals.failed:,}, listed in {output.errors_path}"
        for reason in totals.reasons:
            yield f"error     {reason}"
