"""The texts that are sent, and the requests made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

from vecmill.tools.bench import python_source, text_files
from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.target import Target

SEED = 0  # the same folder gives the same texts, in the same order
LONGEST = 1500  # characters of a text
QUERIES = (
    "parse an ISO 8601 date",
    "copy a directory tree recursively",
    "open a temporary file that is deleted on close",
    "where are passwords hashed",
    "retry a request with exponential backoff",
    "read a CSV file with a header",
    "convert a string to bytes",
    "thread pool with a bounded queue",
    "compare two version numbers",
    "escape HTML characters in a string",
    "walk a syntax tree and collect names",
    "send an email with an attachment",
    "format a number of bytes for people",
    "lock a file against other processes",
    "merge two sorted lists",
    "decode a URL's query string",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts and where they come from."""

    source: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """A request, ready to be sent."""

    body: bytes
    texts: int
    text_bytes: int
    """UTF-8, without what JSON adds."""


def load(folder: Path | None, count: int, longest: int = LONGEST) -> Workload:
    """So many texts of at most so many characters; where there are fewer, they repeat.

    From a folder: pieces of its text files. From None: functions and classes of this Python's standard library.

    Raises:
        BenchError: there is no folder, or no text in it.
    """
    if folder is None:
        source = "Python's standard library"
        texts = _sample(python_source.files(), lambda path: python_source.chunks(path, longest), count)
    else:
        source = str(folder)
        if not folder.is_dir():
            raise BenchError(f"{folder} is not a folder.")
        texts = _sample(text_files.files(folder), lambda path: text_files.chunks(path, longest), count)
    if not texts:
        raise BenchError(f"There are no text files in {source}.")
    return Workload(source, tuple(islice(cycle(texts), count)))


def _sample(files: list[Path], chunks: Callable[[Path], Iterable[str]], count: int) -> list[str]:
    random = Random(SEED)  # noqa: S311  # a choice of texts, no secret
    random.shuffle(files)
    texts: list[str] = []
    for path in files:
        texts.extend(chunks(path))
        if len(texts) >= count:
            break
    random.shuffle(texts)
    return texts[:count]


def payloads(target: Target, texts: Sequence[str], batch: int) -> list[Payload]:
    """The texts in requests of `batch`, the last perhaps smaller."""
    batches = [texts[start : start + batch] for start in range(0, len(texts), batch)]
    return [
        Payload(target.body(one, QUERIES[index % len(QUERIES)]), len(one), sum(len(text.encode()) for text in one))
        for index, one in enumerate(batches)
    ]
