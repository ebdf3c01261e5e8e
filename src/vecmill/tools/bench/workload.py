"""The texts that are sent: functions and classes of Python's standard library, or pieces of a folder's text files."""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from random import Random

from vecmill.tools.bench.target import BenchError, BenchTarget, Payload

SEED = 0  # the same folder gives the same texts, in the same order
LONGEST = 1500  # characters of a text
HUGE_BYTES = 1_000_000  # a file above this is data or generated
LOOKED_AT_BYTES = 8192  # for a NUL, which no text has
NOT_THE_PROJECT = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
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

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts and where they come from."""

    source: str
    texts: tuple[str, ...]


def read_workload(folder: Path | None, most: int, longest: int = LONGEST) -> Workload:
    """`most` texts of at most `longest` characters; where there are fewer, they repeat.

    From a folder: pieces of its text files. From None: functions and classes of this Python's standard library.

    Raises:
        BenchError: there is no folder, or no text in it.
    """
    if folder is None:
        source = "Python's standard library"
        texts = _sample(python_files(), lambda path: python_chunks(path, longest), most)
    else:
        source = str(folder)
        if not folder.is_dir():
            raise BenchError(f"{folder} is not a folder.")
        texts = _sample(text_files(folder), lambda path: text_chunks(path, longest), most)
    if not texts:
        raise BenchError(f"There are no text files in {source}.")
    return Workload(source, tuple(islice(cycle(texts), most)))


class Requests:
    """Requests without end. No two have a text or a query in common, unless they may repeat.

    So neither a cache nor a server that runs equal texts once has less to do than with new texts.
    """

    def __init__(
        self,
        target: BenchTarget,
        texts: Sequence[str],
        batch: int = 1,
        *,
        longest: int | None = None,
        repeat: bool = False,
    ) -> None:
        """`batch`: texts in each. `longest`: characters of a text, at the most; None: whatever they have.

        `repeat`: the texts, as they are; queries repeat where the target may answer from a cache.
        """
        self._target = target
        self._texts = texts
        self._batch = batch
        self._longest = longest
        self._repeat = repeat
        self._numbers = count(1)
        self._sent: set[str] = set()
        self._queries = cycle(QUERIES) if target.cached else different_queries()

    def of_texts(self, texts: int | None = None) -> Iterator[Payload]:
        """The texts from the first on, in batches; they end after so many, or never. One that was sent is changed."""
        fresh = islice(self._fresh_texts(), texts)
        while part := list(islice(fresh, self._batch)):
            body = self._target.body(part, next(self._queries))
            yield Payload(body, len(part), sum(len(text.encode()) for text in part))

    def of_queries(self) -> Iterator[bytes]:
        """A person's queries."""
        return map(self._target.query_body, self._queries)

    def _fresh_texts(self) -> Iterator[str]:
        for text in cycle(self._texts):
            if self._repeat:
                yield text
            elif text in self._sent:
                # At the beginning, for what comes behind a model's longest text is not read.
                mark = f"# {next(self._numbers)}\n"
                yield f"{mark}{text}"[: None if self._longest is None else max(self._longest, len(mark))]
            else:
                self._sent.add(text)
                yield text


def payloads(target: BenchTarget, texts: Sequence[str], batch: int) -> list[Payload]:
    """The texts as they are, in requests of `batch`, the last perhaps smaller."""
    return list(Requests(target, texts, batch, repeat=True).of_texts(len(texts)))


def different_queries() -> Iterator[str]:
    """Queries without end, each a different one."""
    yield from QUERIES
    for number in count(2):
        yield from (f"{query} #{number}" for query in QUERIES)


def text_files(folder: Path) -> list[Path]:
    """The files below the folder that may be text, sorted: none that are hidden, links, empty or huge."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NOT_THE_PROJECT and not name.startswith("."))
        paths = (Path(where, name) for name in sorted(names) if not name.startswith("."))
        files.extend(path for path in paths if _may_be_text(path))
    return files


def text_chunks(path: Path, longest: int) -> Iterator[str]:
    """A file in pieces of two thirds of `longest` to `longest` characters, cut at line ends; none where binary."""
    try:
        content = path.read_bytes()
        if b"\0" in content[:LOOKED_AT_BYTES]:
            return
        rest = content.decode()
    except (OSError, UnicodeDecodeError):
        return
    while rest:
        piece = _piece(rest, longest)
        rest = rest[len(piece) :]
        if stripped := piece.strip():
            yield stripped


def python_files() -> list[Path]:
    """The modules of the standard library, without its tests, sorted."""
    files: list[Path] = []
    for where, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = [name for name in folders if name not in NOT_THE_LIBRARY]
        files.extend(Path(where, name) for name in names if name.endswith(".py"))
    return sorted(files)


def python_chunks(path: Path, longest: int) -> Iterator[str]:
    """A file's functions, methods and class headers, cut off at a line end; none where it is no valid Python."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    # Not splitlines(): that also splits at form feeds, which ast does not count as line ends.
    for text in _definitions(tree.body, source.split("\n")):
        yield _cut(text, longest)


def _sample(files: list[Path], chunks: Callable[[Path], Iterable[str]], most: int) -> list[str]:
    random = Random(SEED)  # noqa: S311  # a choice of texts, no secret
    random.shuffle(files)
    texts: list[str] = []
    for path in files:
        texts.extend(chunks(path))
        if len(texts) >= most:
            break
    random.shuffle(texts)
    return texts[:most]


def _may_be_text(path: Path) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and 0 < path.stat().st_size <= HUGE_BYTES
    except OSError:
        return False


def _piece(rest: str, longest: int) -> str:
    """Up to the first line end behind two thirds of `longest`, or the last one before them, or anywhere."""
    if len(rest) <= longest:
        return rest
    end = rest.find("\n", longest * 2 // 3, longest) + 1 or rest.rfind("\n", 0, longest) + 1
    return rest[: end or longest]


def _cut(text: str, longest: int) -> str:
    """The text's beginning, up to its last line end before `longest` characters, or to there."""
    if len(text) <= longest:
        return text
    end = text.rfind("\n", 0, longest)
    return text[: end if end > 0 else longest]


def _definitions(body: Sequence[ast.stmt], lines: list[str]) -> Iterator[str]:
    """Functions, methods and class headers, depth first; a class's header ends before its first method."""
    for node in body:
        if not isinstance(node, Definition):
            continue
        inner = [member for member in node.body if isinstance(member, Definition)]
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef) and inner:
            last = max(node.lineno, _first_line(inner[0]) - 1)
        yield "\n".join(lines[_first_line(node) - 1 : last]).rstrip()
        if isinstance(node, ast.ClassDef):
            yield from _definitions(inner, lines)


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
