"""The texts as files of request lines, as the batches API takes them.

Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from vecmill.tools.embed.rows import TextRow

ENDPOINT = "/v1/embeddings"
MAX_REQUESTS = 50_000  # in a batch: the limit of OpenAI's own
BATCH_FILE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class RequestFile:
    """Request lines, ready to be uploaded. The same content for the same model always has the same digest."""

    path: Path
    count: int
    bytes: int
    digest: str
    model: str
    """By the name that the server gives it: an alias may come to mean another."""


@dataclass(frozen=True, slots=True)
class InputPart:
    """Texts that follow each other, in one file."""

    first: int
    """The first text's index."""
    file: RequestFile

    @property
    def indexes(self) -> range:
        """The indexes of its texts, counted over all parts."""
        return range(self.first, self.first + self.file.count)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input, cut into parts."""

    parts: list[InputPart]
    rows_path: Path
    """A line of JSON for each text: its row number and its id."""
    integer_ids: bool
    longest_id: int
    """Characters, where ids are not integers."""
    multiline_ids: bool

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return sum(part.file.count for part in self.parts)

    def rows(self) -> Iterator[tuple[int, int | str]]:
        """Row number and id of each text, in order."""
        with self.rows_path.open("rb") as file:
            for line in file:
                number, identity = orjson.loads(line)
                yield number, identity

    def texts_in_order(self) -> Iterator[str]:
        """The texts, read back from the parts."""
        for part in self.parts:
            with part.file.path.open("rb") as file:
                for line in file:
                    yield orjson.loads(line)["body"]["input"]


class _Writer:
    """A file of request lines, while it is written."""

    def __init__(self, path: Path, model: str) -> None:
        self._path, self._model, self._file = path, model, path.open("wb")
        self._hash = sha256(model.encode() + b"\n")
        self.count = self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self._hash.update(line)
        self.count += 1
        self.bytes += len(line)

    def close(self) -> RequestFile:
        self._file.close()
        return RequestFile(self._path, self.count, self.bytes, self._hash.hexdigest(), self._model)


class _Preparation:
    """The parts so far, and what is known of the ids so far."""

    def __init__(self, folder: Path, model: str, fields: Mapping[str, Any], max_bytes: int) -> None:
        self._folder, self._model, self._max_bytes = folder, model, max_bytes
        self._fields = {"model": model, **fields}
        self._writer: _Writer | None = None
        self._integer_ids, self._longest_id, self._multiline_ids = True, 1, False
        self._parts: list[InputPart] = []
        self.texts = 0

    def add(self, row: TextRow) -> None:
        """Append a text to the file that is being written, or begin the next one."""
        body = {"input": row.text, "encoding_format": "base64", **self._fields}
        request = {"custom_id": str(self.texts), "method": "POST", "url": ENDPOINT, "body": body}
        line = orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE)
        writer = self._writer
        if writer is not None and (writer.count >= MAX_REQUESTS or writer.bytes + len(line) > self._max_bytes):
            self.cut()
        if self._writer is None:
            self._writer = _Writer(self._folder / f"part-{len(self._parts)}.jsonl", self._model)
        self._writer.write(line)
        self.texts += 1
        if isinstance(row.id, str):
            self._integer_ids = False
            self._multiline_ids = self._multiline_ids or row.id.splitlines() not in ([], [row.id])
        self._longest_id = max(self._longest_id, len(str(row.id)))

    def cut(self) -> None:
        """Close the file that is being written: it is a part."""
        if self._writer is not None:
            file = self._writer.close()
            self._parts.append(InputPart(self.texts - file.count, file))
            self._writer = None

    def prepared(self, rows_path: Path) -> Prepared:
        """Close the last part, and describe all of them."""
        self.cut()
        return Prepared(self._parts, rows_path, self._integer_ids, self._longest_id, self._multiline_ids)


def prepare(
    rows: Iterable[TextRow],
    folder: Path,
    model: str,
    fields: Mapping[str, Any],
    max_bytes: int,
    read: Callable[[int], None] = lambda texts: None,
) -> Prepared:
    """Write the texts into files of at most `max_bytes` (one text may be more); `read` is told how many there are.

    Every request names the model, or what `fields` has for it: a server that is restarted may have another default.
    """
    preparation = _Preparation(folder, model, fields, max_bytes)
    rows_path = folder / "rows.jsonl"
    try:
        with rows_path.open("wb") as file:
            for row in rows:
                preparation.add(row)
                file.write(orjson.dumps((row.number, row.id), option=orjson.OPT_APPEND_NEWLINE))
                read(preparation.texts)
    finally:
        preparation.cut()
    return preparation.prepared(rows_path)


def select(source: RequestFile, path: Path, wanted: Callable[[int], bool]) -> RequestFile:
    """Copy the lines of those texts whose index is `wanted` into a file of their own."""
    with source.path.open("rb") as lines, _Writer(path, source.model) as writer:
        for line in lines:
            if wanted(int(orjson.loads(line)["custom_id"])):
                writer.write(line)
        return writer.close()
