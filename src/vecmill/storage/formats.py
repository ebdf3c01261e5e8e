"""The format of what is kept, as a number beside it: an older vecmill does not touch what a newer one wrote.

FORMAT rises with every change that the version before could not read, or would misread: of a file in the state folder,
a table, a key or record in Redis. Fields that are only added need none: every reader ignores what it does not know.
State that is older is read, or put aside with a line in the log; `docs/upgrading.md` has the formats.
"""

from __future__ import annotations

import json
from pathlib import Path

from vecmill import __version__
from vecmill.storage.files import read_start, write_atomically
from vecmill.storage.sqlite_jobs import MAGIC
from vecmill.storage.sqlite_jobs import VERSION as JOBS_VERSION
from vecmill.storage.sqlite_vectors import VERSION as VECTORS_VERSION

FORMAT = 1
FILE = "format"
LONGEST = 1_048_576  # bytes of the file, which a newer version may have more to say in
DATABASES = {"jobs.db": JOBS_VERSION, "cache.db": VECTORS_VERSION}
# One sentence: what is before it may have any characters.
CURE = "Install that version again, or one that is newer; or begin with nothing, with another {setting}."


def newer_state(folder: Path, setting: str = "STATE_DIR") -> str | None:
    """Why this version must not use the folder, with the cure; None where it may. Changes nothing.

    Raises:
        OSError: its mark is there and cannot be read, so that nobody knows.
    """
    written, by = stamped(folder)
    if written > FORMAT:
        return _sentence(f"{setting}={folder} is of format {written}, written by vecmill {by}", FORMAT, setting)
    for name, version in DATABASES.items():
        if (stored := _user_version(folder / name)) > version:
            return _sentence(f"{folder / name} is of format {stored}", version, setting)
    return None


def _sentence(found: str, known: int, setting: str) -> str:
    return f"{found}, which is newer than what vecmill {__version__} reads ({known}). {CURE.format(setting=setting)}"


def stamp(folder: Path) -> None:
    """Write this version's format into the folder, where it is not there yet. Raises OSError."""
    if stamped(folder)[0] != FORMAT:
        content = {"format": FORMAT, "written_by": __version__}
        write_atomically(folder / FILE, json.dumps(content).encode())


def stamped(folder: Path) -> tuple[int, str]:
    """The format of a folder, and which version began it; 0 where it says none: it is new, or older than this file.

    Raises OSError.
    """
    try:
        content = json.loads(read_start(folder / FILE, LONGEST))
    except (FileNotFoundError, ValueError, RecursionError):
        return 0, ""
    number = content.get("format") if isinstance(content, dict) else None
    return (number, str(content.get("written_by"))[:40]) if type(number) is int else (0, "")


def _user_version(path: Path) -> int:
    """Of a SQLite file, by its header: opening it would leave files beside it. 0 where there is none, or no database.

    What is only in the log yet is not seen. Then the file that `stamp` wrote says it, and so does whoever opens it.

    Source: https://www.sqlite.org/fileformat.html#user_version_number
    """
    try:
        header = read_start(path, 64)
    except OSError:
        return 0
    return int.from_bytes(header[60:64], "big", signed=True) if header.startswith(MAGIC) else 0
