"""Embedding one part: submit its batch, poll it, collect results, and submit again what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import orjson

from vecmill.tools.console import CommandError
from vecmill.tools.embed.batches import Failure, RemoteBatch, RemoteBatches, TextVector, result_of
from vecmill.tools.embed.outputs import Failed, Vectors
from vecmill.tools.embed.requests import InputPart, RequestFile, select
from vecmill.tools.http_client import NotThere

SHOWN_REASONS = 3


@dataclass(slots=True)
class EmbedTotals:
    """Counts over all parts."""

    tokens: int = 0
    cached_tokens: int | None = None
    """None: the server does not say."""
    remote_files: set[str] = field(default_factory=set)
    """What lies on the server."""

    failed: int = 0
    """Texts without a vector."""
    reasons: list[str] = field(default_factory=list)
    """The first few of them."""

    def add_failure(self, failure: Failure) -> None:
        """Count a text without a vector, and keep its reason among the first few."""
        self.failed += 1
        reason = failure.message if failure.status is None else f"{failure.status}: {failure.message}"
        if len(self.reasons) < SHOWN_REASONS and reason not in self.reasons:
            self.reasons.append(reason)

    def add_cached(self, tokens: int | None) -> None:
        """Add a count of cached tokens; None where the server does not say."""
        if tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + tokens


@dataclass(slots=True)
class _Results:
    """What one file of results holds. A download that breaks begins anew."""

    tokens: int = 0
    cached_tokens: int | None = None
    failures: dict[int, Failure] = field(default_factory=dict)


class PartWork:
    """Works until each text of the part has its vector, or a reason why it has none."""

    def __init__(
        self, part: InputPart, batches: RemoteBatches, vectors: Vectors, model: str, totals: EmbedTotals
    ) -> None:
        self._part, self._batches, self._vectors, self._model = part, batches, vectors, model
        self._totals = totals
        self._file: RequestFile | None = part.file
        """What is submitted now; None: nothing is left to do."""
        self._batch: RemoteBatch | None = None
        self._failures: dict[int, Failure] = {}
        self._failures_path = part.file.path.with_suffix(".failures")
        self._rounds = 0
        self._before = 0
        """Texts that earlier rounds answered."""

    @property
    def ended(self) -> bool:
        """True once nothing is left to do."""
        return self._file is None

    def failures(self) -> Iterator[Failed]:
        """The texts without a vector, in order; valid once it has ended."""
        with self._failures_path.open("rb") as file:
            for line in file:
                index, status, message = orjson.loads(line)
                yield index, status, message

    @property
    def running(self) -> bool:
        """True while the server has a batch of it in progress."""
        return self._batch is not None and self._file is not None

    @property
    def answered(self) -> int:
        """Texts with an answer so far."""
        if self._file is None:
            return self._part.file.count
        return self._before + (0 if self._batch is None else self._batch.answered)

    def take_up(self) -> None:
        """Take up the batch that an earlier run has left, if there is one, and collect it if it has ended."""
        while self._file is not None and (earlier := self._batches.take(self._file.digest)) is not None:
            self._batch = earlier
            if earlier.running:
                return
            try:
                self._collect(earlier)
            except NotThere:
                self._batch = None  # its files were deleted

    def start(self) -> None:
        """Submit its batch."""
        assert self._file is not None
        self._batch = self._batches.submit(self._file)

    def poll(self) -> None:
        """Ask for the batch's state, and collect its results if it has ended.

        Raises:
            CommandError: the server will not do it.
        """
        if self._batch is None or self._file is None:
            return
        self._batch = batch = self._batches.batch(self._batch.id)
        if batch.running:
            return
        if batch.status == "cancelled":
            raise CommandError(
                f"{batch.id} was cancelled on the server. The same command goes on with what is missing."
            )
        if batch.status not in ("completed", "expired"):
            raise CommandError(
                f"The server refused {batch.id} ({batch.status}): {batch.message or 'it does not say why'}."
            )
        self._collect(batch)
        self.take_up()

    def _collect(self, batch: RemoteBatch) -> None:
        """Take a batch's results. What is missing is submitted again, unless this batch brought nothing new."""
        assert self._file is not None
        before = self._missing()
        failures: dict[int, Failure] = {}
        cached: int | None = None
        for file_id in batch.result_files:
            results = self._batches.download(file_id, self._read)
            failures |= results.failures
            self._totals.tokens += results.tokens
            if results.cached_tokens is not None:
                cached = (cached or 0) + results.cached_tokens
        self._totals.add_cached(batch.cached_tokens if cached is None else cached)
        self._totals.remote_files.update((batch.input_file, *batch.result_files))
        self._failures |= {index: failure for index, failure in failures.items() if not failure.passing}
        missing = self._missing()
        self._batch, self._before = None, self._part.file.count - len(missing)
        if not missing:
            self._end()
        elif len(missing) < len(before):
            self._rounds += 1
            path = self._part.file.path.with_suffix(f".{self._rounds}.jsonl")
            self._file = select(self._part.file, path, missing.__contains__)
        else:
            nothing = Failure(None, f"the batch is {batch.status} and has no result for it")
            self._failures |= {index: failures.get(index, nothing) for index in missing}
            self._end()

    def _end(self) -> None:
        """Write the failures to disk, so that memory does not grow with the number of parts."""
        with self._failures_path.open("wb") as file:
            for index, failure in sorted(self._failures.items()):
                line = (index, failure.status, failure.message)
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                self._totals.add_failure(failure)
        self._failures, self._file = {}, None

    def _missing(self) -> set[int]:
        return {index for index in self._part.indexes if index not in self._vectors and index not in self._failures}

    def _read(self, lines: Iterable[bytes]) -> _Results:
        results = _Results()
        for line in lines:
            if not line.strip():
                continue
            index, result = result_of(line)
            if isinstance(result, Failure):
                results.failures[index] = result
                continue
            if result.model != self._model:
                raise CommandError(
                    f"Vectors come from {result.model} and from {self._model}: the server was started with another "
                    f"model meanwhile. Run the same command again."
                )
            self._put(index, result, results)
        return results

    def _put(self, index: int, vector: TextVector, results: _Results) -> None:
        if index not in self._part.indexes:
            raise CommandError(f"The server's results are for a text that was not sent: {index}.")
        self._vectors.put(index, vector.values)
        results.tokens += vector.tokens
        if vector.cached_tokens is not None:
            results.cached_tokens = (results.cached_tokens or 0) + vector.cached_tokens
