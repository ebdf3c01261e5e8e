"""An embedding run from the first check to the summary."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from types import FrameType

from rich.console import Console

from vecmill.tools.embed import inputs, outputs
from vecmill.tools.embed.batches import Batches
from vecmill.tools.embed.client import Client
from vecmill.tools.embed.errors import EmbedError, UsageError
from vecmill.tools.embed.options import Options
from vecmill.tools.embed.progress import Show, said
from vecmill.tools.embed.requests import ENDPOINT, Prepared, prepare
from vecmill.tools.embed.results import Vector, vector_of
from vecmill.tools.embed.rows import Table
from vecmill.tools.embed.vectors import FLOAT_BYTES, Vectors
from vecmill.tools.embed.work import SHOWN_REASONS, Totals, Work

IN_PROGRESS = 4  # batches at a time; the server works through as many by default
FIRST_POLL_S, LONGEST_POLL_S = 0.25, 5.0
PROBE = "vecmill"
INTERRUPTED = 130
TERMINATED = 143

results = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the summary tells."""

    prepared: Prepared
    table: Table
    totals: Totals
    model: str
    dimensions: int
    computed: int
    """Texts that were not found on the server."""
    seconds: float


def run_embed(options: Options) -> int:
    """Do it and say so; the process's exit code."""
    try:
        outputs.check(options.output)
        with _ended_by_sigterm(), Show() as show, Client(options.server, show.waiting) as client:
            outcome = _Run(options, show, client).run()
    except EmbedError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(f"{error.filename or options.output.path}: {error.strerror or error}.", EmbedError.exit_code)
    except KeyboardInterrupt:
        said.print("vecmill: stopped; the server goes on with what it has, and the same command takes up its results.")
        return INTERRUPTED
    _summarise(options, outcome)
    return 1 if outcome.totals.failed else 0


def _fail(message: str, code: int) -> int:
    said.print(f"vecmill: {message}", style="bold red")
    return code


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM too leaves nothing behind: without it Python would not tidy up."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """The steps, in order."""

    def __init__(self, options: Options, show: Show, client: Client) -> None:
        self._options, self._show, self._client = options, show, client
        self._batches = Batches(client)
        self._totals = Totals()

    def run(self) -> _Outcome:
        """All of it. Scratch files lie beside the output, for the disk there must hold it anyway."""
        self._batches.look_around()
        probe = self._probe()
        output = self._options.output
        with TemporaryDirectory(prefix=f".{output.path.name}.", dir=output.path.parent) as scratch:
            folder = Path(scratch)
            prepared, table = self._prepare(folder, probe.model)
            outputs.check_ids(output, prepared)
            dimensions = len(probe.values) // FLOAT_BYTES
            with Vectors(folder / "embeddings.npy", prepared.texts, dimensions) as vectors:
                works = [Work(part, self._batches, vectors, probe.model, self._totals) for part in prepared.parts]
                began = monotonic()
                found = self._work_off(works, prepared.texts)
                seconds = monotonic() - began
                self._show.doing("writing")
                failures = chain.from_iterable(work.failures() for work in works)
                outputs.write_errors(output, folder / "errors", failures, prepared)
                outputs.write(output, folder, prepared, vectors, probe.model)
        if not self._options.keep:
            self._delete()
        return _Outcome(prepared, table, self._totals, probe.model, dimensions, prepared.texts - found, seconds)

    def _probe(self) -> Vector:
        """One text, so that wrong options are said at once, and model and dimensions are known."""
        body = {"input": PROBE, "encoding_format": "base64", **self._options.fields}
        answer = self._client.ask("POST", ENDPOINT, json=body)
        try:
            return vector_of(answer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EmbedError(f"{self._client.base}{ENDPOINT} does not answer as OpenAI's does.") from error

    def _prepare(self, folder: Path, model: str) -> tuple[Prepared, Table]:
        with inputs.opened(self._options.source) as (rows, table):
            options = self._options
            prepared = prepare(rows, folder, model, options.fields, options.batch_file_bytes, self._show.read)
        if not prepared.parts:
            raise UsageError(f"There are no texts in {self._options.source.name}.")
        return prepared, table

    def _work_off(self, works: Sequence[Work], texts: int) -> int:
        """Until all have ended; how many texts an earlier run had dealt with."""
        for work in works:
            work.take_up()
        found = sum(work.answered for work in works)
        self._show.begin(texts, found)
        wait = FIRST_POLL_S
        while True:
            self._hand_in(works)
            open_before = sum(not work.ended for work in works)
            for work in works:
                work.poll()
            self._show.answered(sum(work.answered for work in works))
            still_open = sum(not work.ended for work in works)
            if not still_open:
                return found
            sleep(wait)
            wait = FIRST_POLL_S if still_open < open_before else min(1.5 * wait, LONGEST_POLL_S)

    def _hand_in(self, works: Sequence[Work]) -> None:
        """Keep as many batches going as the server works through at a time."""
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
        """What is on the server is not needed any more; that it cannot be deleted is no reason to fail."""
        self._show.doing("tidying up")
        try:
            for file_id in sorted(self._totals.remote_files):
                self._batches.delete(file_id)
        except EmbedError as error:
            said.print(f"vecmill: the batches' files are left on the server: {error}")


def _summarise(options: Options, outcome: _Outcome) -> None:
    output, totals, texts = options.output, outcome.totals, outcome.prepared.texts
    vectors = texts - totals.failed
    results.print(f"wrote     {output.path}: {vectors:,} vectors of {outcome.dimensions} values ({outcome.model})")
    rate = f", {outcome.computed / outcome.seconds:,.0f} texts/s" if outcome.computed and outcome.seconds else ""
    found = f" ({texts - outcome.computed:,} found on the server)" if outcome.computed < texts else ""
    results.print(f"texts     {texts:,} in {outcome.seconds:,.1f} s{rate}{found}")
    cached = f", {totals.cached_tokens:,} of them from the cache" if totals.cached_tokens else ""
    results.print(f"tokens    {totals.tokens:,}{cached}")
    for reason, count in outcome.table.skipped.most_common(SHOWN_REASONS):
        results.print(f"skipped   {count:,} x {reason}")
    if totals.failed:
        results.print(f"failed    {totals.failed:,}, listed in {output.errors_path}")
        for reason in totals.reasons:
            results.print(f"error     {reason}")
