"""JSON lines: an object, or a bare string, on each. Source: https://jsonlines.org/"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import orjson

from vecmill.tools.embed.rows import Bad, Record, Table

BOM = b"\xef\xbb\xbf"


def jsonl_table(file: IO[bytes]) -> Table:
    """A row for each line; blank ones are counted as rows, so that a row's number is its line's, and hold none."""
    return Table(_records(file))


def _records(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(file, 1):
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if content:
            yield number, _record(content)


def _record(line: bytes) -> Record:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Bad(f"is not JSON ({error.msg})")
    return found if isinstance(found, dict | str) else Bad("is neither an object nor a string")
