"""A corpus in files, cut into shards: what is read, what is written where, and which of it is done already.

A shard is a range of rows of one file. Its output is one Parquet file, written whole under another name and then moved
into place, so a shard is either done or not there: however often a run is killed or a shard is repeated, each row is in
the output once. Nothing here knows Ray or a model.
"""

from __future__ import annotations

import gzip
import io
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import numpy as np
import orjson

from vecmill.tools.console import UsageError
from vecmill.tools.embed import parquet
from vecmill.tools.embed.batches import Failure, TextVector
from vecmill.tools.embed.inputs import GZIP, JSON_LINES, jsonl_records, kind_of
from vecmill.tools.embed.rows import (
    Columns,
    InputTable,
    TextRow,
    TextRows,
    TextSource,
    id_field_of,
    text_field_of,
)

SHARD_ROWS = 10_000
MANIFEST = "_manifest.json"
"""Readers of a folder of Parquet files leave out names that begin so."""
FORMAT = 1
NOTE = "vecmill_shard"
"""In a shard's footer: what `ShardDone` says, as JSON."""
COPY_BYTES = 8 * 1024 * 1024
LOOKED_AT = 1000  # rows of a file, until one says which fields there are
FOOTERS_AT_A_TIME = 16

Answer = TextVector | Failure
Embed = Callable[[Iterable[TextRow]], Iterator[tuple[TextRow, Answer]]]
"""Each row and what became of it, in order."""


class Place:
    """A file or a folder: a path, or an address that pyarrow or fsspec knows, such as `s3://bucket/folder`."""

    def __init__(self, uri: str) -> None:
        """Raises UsageError: no file system is installed for it."""
        self.uri = uri.rstrip("/") or uri
        self._fs, self._path = _resolved(self.uri)

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.uri}/{name}")

    def info(self) -> Any:
        """pyarrow's `FileInfo`."""
        return self._fs.get_file_info(self._path)

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self.info().type)

    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return str(self.info().type.name) == "Directory"

    def names(self, *, below: bool = False) -> list[str]:
        """The files in the folder, sorted, relative to it; none where it is not there. `below`: in its folders too."""
        selector = import_module("pyarrow.fs").FileSelector(self._path, allow_not_found=True, recursive=below)
        root = PurePosixPath(self._path)
        files = (info for info in self._fs.get_file_info(selector) if info.is_file)
        return sorted(PurePosixPath(info.path).relative_to(root).as_posix() for info in files)

    def make_folder(self) -> None:
        """Make it, and those above it, unless it is there."""
        self._fs.create_dir(self._path, recursive=True)

    def open(self) -> IO[bytes]:
        """Open for reading, with seek.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            return cast(IO[bytes], self._fs.open_input_file(self._path))
        except OSError as error:
            raise UsageError(f"{self.uri} cannot be read: {error}.") from error

    def put(self, content: Path) -> None:
        """Copy a local file here: whole or not at all, in place of what is there."""
        folder, name = str(PurePosixPath(self._path).parent), PurePosixPath(self._path).name
        unfinished = f"{folder}/_unfinished-{uuid.uuid4().hex}-{name}"
        try:
            with content.open("rb") as source, self._fs.open_output_stream(unfinished) as copy:
                shutil.copyfileobj(source, copy, COPY_BYTES)
            self._fs.move(unfinished, self._path)
        except BaseException:
            if self._fs.get_file_info(unfinished).type:
                self._fs.delete_file(unfinished)
            raise

    def delete(self) -> None:
        """Delete the file."""
        self._fs.delete_file(self._path)


def _resolved(uri: str) -> tuple[Any, str]:
    parquet.require_pyarrow()
    arrow, systems = import_module("pyarrow"), import_module("pyarrow.fs")
    if "://" not in uri:
        return systems.LocalFileSystem(), Path(uri).absolute().as_posix()
    try:
        return cast(tuple[Any, str], systems.FileSystem.from_uri(uri))
    except (arrow.ArrowException, OSError) as unknown:
        try:
            system, path = import_module("fsspec.core").url_to_fs(uri)
        except (ImportError, ValueError, OSError) as error:
            raise UsageError(f"{uri}: neither pyarrow ({unknown}) nor fsspec ({error}) opens it.") from error
        return systems.PyFileSystem(systems.FSSpecHandler(system)), path


@dataclass(frozen=True, slots=True)
class _Source(TextSource):
    """A file of the corpus, for the readers of `vecmill embed`."""

    uri: str = ""

    @property
    def name(self) -> str:
        return self.uri


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What is embedded, and how. A run that goes on with an output must have the same."""

    inputs: tuple[str, ...]
    """Files or folders, as paths or addresses: .jsonl and .ndjson, also with .gz, and .parquet."""
    text_field: str | None = None
    """None: found as `vecmill embed` finds it."""
    id_field: str | None = None
    skip_bad: bool = False
    string_ids: bool = False
    """Write ids as strings also where the first is an integer."""
    with_text: bool = True
    shard_rows: int = SHARD_ROWS
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What a request of /v1/embeddings has beside its texts: `model`, `dimensions`, `input_type`, `prompt_name`."""


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file that is read."""

    uri: str
    size: int
    modified: str
    rows: int
    """Lines of JSON lines, blank ones too."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of a file that are embedded and written together."""

    file: int
    """Which of the corpus' files."""
    first: int
    """The first row, from 0."""
    rows: int
    offset: int
    """Where the first line begins, in bytes; 0 for Parquet."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus that is cut: the content of the manifest."""

    options: CorpusOptions
    files: Sequence[CorpusFile]
    shards: Sequence[Shard]
    text_field: str | None
    """None: the rows are bare strings."""
    id_field: str | None
    """None: ids are the rows' numbers; of several files, `FILE:NUMBER`."""
    integer_ids: bool

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What became of a shard's rows."""

    shard: int
    rows: int
    """That are in the output: those with a text."""
    failed: int
    """Those of them without a vector."""
    tokens: int
    cached_tokens: int
    model: str
    dimensions: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Rows without a text, by reason."""


# Cutting


def cut(options: CorpusOptions) -> Corpus:
    """Find the files and cut them. JSON lines are read once for this, of Parquet only the footers.

    Raises:
        UsageError: there are no texts, or it is not clear where they are.
    """
    uris = list(_files(options.inputs))
    if not uris:
        raise UsageError(f"There are no .jsonl or .parquet files in {', '.join(options.inputs)}.")
    files: list[CorpusFile] = []
    shards: list[Shard] = []
    looked = [_look(uri, options) for uri in uris]
    for number, uri in enumerate(uris):
        ranges = _ranges(uri, options.shard_rows)
        shards += [Shard(number, first, rows, offset) for first, rows, offset in ranges]
        files.append(_described(uri, sum(rows for _, rows, _ in ranges)))
    first = looked[0]
    for uri, fields in zip(uris, looked, strict=True):
        if fields[:2] != first[:2]:
            raise UsageError(
                f"{uris[0]} has texts and ids in `{first[0]}` and `{first[1]}`, {uri} in `{fields[0]}` and "
                f"`{fields[1]}`: say with --field and --id-field which are meant."
            )
    integers = all(fields[2] for fields in looked) and not options.string_ids
    if first[1] is None and len(files) > 1:
        integers = False
    return Corpus(options, files, shards, first[0], first[1], integers)


def _files(inputs: Iterable[str]) -> Iterator[str]:
    for given in inputs:
        place = Place(given)
        if not place.exists():
            raise UsageError(f"{given}: there is no such file or folder.")
        if not place.is_folder():
            _check_kind(given)
            yield place.uri
            continue
        for name in place.names(below=True):
            hidden = any(part.startswith((".", "_")) for part in name.split("/"))
            if not hidden and name.removesuffix(GZIP).endswith((*JSON_LINES, parquet.SUFFIX)):
                yield f"{place.uri}/{name}"


def _check_kind(uri: str) -> str:
    kind = kind_of(Path(uri))
    if kind not in (*JSON_LINES, parquet.SUFFIX):
        raise UsageError(f"{uri}: a corpus is read from .jsonl and .parquet; `vecmill embed` reads {kind} too.")
    return kind


def _described(uri: str, rows: int) -> CorpusFile:
    info = Place(uri).info()
    return CorpusFile(uri, int(info.size or 0), str(info.mtime or ""), rows)


def _look(uri: str, options: CorpusOptions) -> tuple[str | None, str | None, bool]:
    """Which fields of a file hold texts and ids, and whether the ids are integers."""
    source = _source(uri, options)
    with _opened(uri) as content:
        if _check_kind(uri) == parquet.SUFFIX:
            file = parquet.parquet_file(content, source)
            columns = parquet.columns_of(file)
            text, identity = text_field_of(columns, source), id_field_of(columns, source)
            return text, identity, identity is None or not columns[identity]
        for _, record in islice(jsonl_records(content), LOOKED_AT):
            if isinstance(record, str):
                return None, None, True
            if isinstance(record, Mapping):
                names: Columns = {name: isinstance(value, str) for name, value in record.items()}
                text, identity = text_field_of(names, source), id_field_of(names, source)
                return text, identity, identity is None or not names[identity]
    raise UsageError(f"There are no texts in {uri}.")


def _ranges(uri: str, most: int) -> list[tuple[int, int, int]]:
    """First row, rows and offset of each shard."""
    with _opened(uri) as content:
        if _check_kind(uri) == parquet.SUFFIX:
            metadata = parquet.parquet_file(content, TextSource(Path(uri))).metadata
            sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            return [(first, rows, 0) for first, rows in _of_groups(sizes, most)]
        # What is compressed is read from its beginning.
        return list(_of_lines(content, most if not uri.endswith(GZIP) else 2**62))


def _of_groups(sizes: Iterable[int], most: int) -> Iterator[tuple[int, int]]:
    """Whole row groups together, up to `most` rows; a larger one in equal parts."""
    first = rows = 0
    for size in sizes:
        if rows and rows + size > most:
            yield first, rows
            first, rows = first + rows, 0
        rows += size
        while rows > most:
            part = -(-rows // -(-rows // most))
            yield first, part
            first, rows = first + part, rows - part
    if rows:
        yield first, rows


def _of_lines(content: IO[bytes], most: int) -> Iterator[tuple[int, int, int]]:
    first = lines = start = read = 0
    last = b"\n"
    while block := content.read(COPY_BYTES):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        while lines + len(ends) >= most:
            offset = read + int(ends[most - lines - 1]) + 1
            ends = ends[most - lines :]
            yield first, most, start
            first, lines, start = first + most, 0, offset
        lines += len(ends)
        read += len(block)
        last = block[-1:]
    lines += last != b"\n"
    if lines:
        yield first, lines, start


def _source(uri: str, options: CorpusOptions) -> _Source:
    return _Source(Path(uri), options.text_field, options.id_field, (), options.skip_bad, uri)


@contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    with Place(uri).open() as content:
        if _check_kind(uri) == parquet.SUFFIX:
            yield content
        elif uri.lower().endswith(GZIP):
            yield cast(IO[bytes], gzip.GzipFile(fileobj=content))
        else:  # pyarrow's own files have no lines
            yield io.BufferedReader(cast(io.RawIOBase, content), COPY_BYTES)


# Reading and writing a shard


@contextmanager
def shard_rows(corpus: Corpus, shard: Shard) -> Iterator[tuple[Iterator[TextRow], InputTable]]:
    """The texts of a shard, read lazily, and the table that they are read from.

    Raises:
        UsageError: while it is read, for a row that is no text, unless such rows are skipped.
    """
    uri = corpus.files[shard.file].uri
    pinned = replace(corpus.options, text_field=corpus.text_field, id_field=corpus.id_field)
    source = _source(uri, pinned)
    with _opened(uri) as content:
        if _check_kind(uri) == parquet.SUFFIX:
            table = parquet.parquet_table(content, source, range(shard.first, shard.first + shard.rows))
        else:
            content.seek(shard.offset)
            table = InputTable(jsonl_records(islice(content, shard.rows), shard.first + 1), _columns(corpus))
        yield _with_ids(corpus, uri, TextRows(table, source)), table


def _columns(corpus: Corpus) -> Columns | None:
    if corpus.text_field is None:
        return None
    return {name: True for name in (corpus.text_field, corpus.id_field) if name is not None}


def _with_ids(corpus: Corpus, uri: str, rows: Iterable[TextRow]) -> Iterator[TextRow]:
    by_number = corpus.id_field is None and len(corpus.files) > 1
    for row in rows:
        if by_number:
            yield replace(row, id=f"{uri}:{row.number}")
        elif corpus.integer_ids and isinstance(row.id, str):
            raise UsageError(
                f"Row {row.number} of {uri} has a string in `{corpus.id_field}` where the first row has an integer: "
                f"--string-ids writes all ids as strings."
            )
        else:
            yield row


def write_shard(output: str, corpus: Corpus, number: int, embed: Embed, model: str, dimensions: int) -> ShardDone:
    """Embed a shard and put it in place.

    Raises:
        UsageError: a row is no text.
    """
    folder = Place(output)
    failures: list[bytes] = []
    rows = tokens = cached = 0
    with shard_rows(corpus, corpus.shards[number]) as (texts, table), TemporaryDirectory() as scratch:
        path = Path(scratch, "part")
        with parquet.ParquetWriter(
            path, dimensions, model, integer_ids=corpus.integer_ids, with_text=corpus.options.with_text
        ) as writer:
            for row, answer in embed(texts):
                rows += 1
                if isinstance(answer, Failure):
                    failures.append(_error_line(corpus.files[corpus.shards[number].file].uri, row, answer))
                    writer.write(row.id, row.text, None)
                    continue
                tokens, cached = tokens + answer.tokens, cached + (answer.cached_tokens or 0)
                writer.write(row.id, row.text, answer.values)
            done = ShardDone(number, rows, len(failures), tokens, cached, model, dimensions, dict(table.skipped))
            writer.note({NOTE: orjson.dumps(asdict(done)).decode()})
        _put_errors(folder / errors_name(number), Path(scratch, "errors"), failures)
        (folder / part_name(number)).put(path)
    return done


def _error_line(uri: str, row: TextRow, failure: Failure) -> bytes:
    line = {"file": uri, "row": row.number, "id": row.id, "status": failure.status, "message": failure.message}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _put_errors(place: Place, scratch: Path, lines: Sequence[bytes]) -> None:
    if lines:
        scratch.write_bytes(b"".join(lines))
        place.put(scratch)
    elif place.exists():
        place.delete()


def part_name(shard: int) -> str:
    """The file of a shard's vectors."""
    return f"part-{shard:06d}.parquet"


def errors_name(shard: int) -> str:
    """The file of a shard's rows without a vector, a line of JSON each."""
    return f"_part-{shard:06d}.errors.jsonl"


# The output as a whole


def take_up(output: str, options: CorpusOptions, *, overwrite: bool = False) -> tuple[Corpus, list[ShardDone]]:
    """The corpus as an earlier run of the same command cut it, and what that run has done; else cut it now.

    Raises:
        UsageError: the output is another corpus', or the files have changed meanwhile.
    """
    folder = Place(output)
    if folder.exists() and not folder.is_folder():
        raise UsageError(f"{output} is a file; the output of a corpus is a folder.")
    names = folder.names()
    if overwrite:
        for name in filter(_is_ours, names):
            (folder / name).delete()
        names = []
    if MANIFEST in names:
        return _taken_up(folder, options, names)
    if names:
        raise UsageError(f"{output} is not empty and no output of this command: give another folder.")
    corpus = cut(options)
    folder.make_folder()
    _put_manifest(folder, corpus, None)
    return corpus, []


def finish(output: str, corpus: Corpus, done: Iterable[ShardDone]) -> None:
    """Say in the manifest that all shards are there, and what is in them."""
    total = {"rows": 0, "failed": 0, "tokens": 0}
    model = dimensions = None
    for each in done:
        model, dimensions = each.model, each.dimensions
        for name in total:
            total[name] += getattr(each, name)
    _put_manifest(Place(output), corpus, {**total, "model": model, "dimensions": dimensions})


def _is_ours(name: str) -> bool:
    return name == MANIFEST or name.startswith(("part-", "_part-", "_unfinished-"))


def _put_manifest(folder: Place, corpus: Corpus, complete: Mapping[str, Any] | None) -> None:
    content = {"format": FORMAT, "complete": complete, **asdict(corpus)}
    with TemporaryDirectory() as scratch:
        path = Path(scratch, MANIFEST)
        path.write_bytes(orjson.dumps(content))
        (folder / MANIFEST).put(path)


def read_manifest(output: str) -> Corpus:
    """The corpus of an output that was begun.

    Raises:
        UsageError: it cannot be read, or another version of vecmill wrote it.
    """
    with (Place(output) / MANIFEST).open() as manifest:
        content = orjson.loads(manifest.read())
    if content.get("format") != FORMAT:
        raise UsageError(f"{output}/{MANIFEST} is of another version of vecmill: give another folder.")
    options = {**content["options"], "inputs": tuple(content["options"]["inputs"])}
    return Corpus(
        CorpusOptions(**options),
        [CorpusFile(**file) for file in content["files"]],
        [Shard(**shard) for shard in content["shards"]],
        content["text_field"],
        content["id_field"],
        content["integer_ids"],
    )


def _taken_up(folder: Place, options: CorpusOptions, names: Sequence[str]) -> tuple[Corpus, list[ShardDone]]:
    corpus = read_manifest(folder.uri)
    if corpus.options != options:
        before, now = asdict(corpus.options), asdict(options)
        changed = ", ".join(f"`{name}`" for name in now if now[name] != before[name])
        raise UsageError(f"{folder.uri} was begun with another {changed}: give --overwrite or another folder.")
    for file in corpus.files:
        if not Place(file.uri).exists() or _described(file.uri, file.rows) != file:
            raise UsageError(f"{file.uri} has changed since {folder.uri} was begun: give --overwrite.")
    for name in names:
        if name.startswith("_unfinished-"):
            (folder / name).delete()
    numbers = [number for number in range(len(corpus.shards)) if part_name(number) in set(names)]
    with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
        return corpus, list(pool.map(lambda number: _done(folder / part_name(number)), numbers))


def _done(part: Place) -> ShardDone:
    with part.open() as content:
        file = parquet.parquet_file(content, TextSource(Path(part.uri)))
        return ShardDone(**orjson.loads(file.metadata.metadata[NOTE.encode()]))
