"""What was asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from vecmill.tools.embed.errors import UsageError

STDIN = Path("-")
BATCH_FILE_BYTES = 100_000_000
ANSWER_S = 300.0
PATIENCE_S = 600.0


class Format(StrEnum):
    """What is written, by the output's suffix."""

    PARQUET = ".parquet"
    NPY = ".npy"
    NPZ = ".npz"


@dataclass(frozen=True, slots=True)
class Server:
    """Where the batches API is, and how long to wait for it."""

    url: str
    """With or without `http://`, with or without `/v1`."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    answer_seconds: float = ANSWER_S
    patience_seconds: float = PATIENCE_S

    @property
    def base(self) -> str:
        """The address without `/v1`."""
        base = self.url if "://" in self.url else f"http://{self.url}"
        return base.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Source:
    """What is read, and what of it."""

    path: Path
    """`-`: JSONL on stdin."""
    text_field: str | None = None
    """None: guessed."""
    id_field: str | None = None
    """None: `id` where there is one, else the row's number."""
    patterns: tuple[str, ...] = ()
    """Of a folder's files; none: all."""
    skip_bad: bool = False

    @property
    def name(self) -> str:
        """As a person calls it."""
        return "stdin" if self.path == STDIN else str(self.path)


@dataclass(frozen=True, slots=True)
class Output:
    """What is written, and where."""

    path: Path
    overwrite: bool = False
    with_text: bool = True

    @property
    def format(self) -> Format:
        """By the suffix.

        Raises:
            UsageError: it is none of the three.
        """
        try:
            return Format(self.path.suffix.lower())
        except ValueError:
            raise UsageError(f"{self.path}: the name must end in one of {', '.join(Format)}.") from None

    @property
    def errors_path(self) -> Path:
        """Where the rows without a vector are listed."""
        return self.path.with_name(f"{self.path.name}.errors.jsonl")

    @property
    def ids_path(self) -> Path:
        """Where the ids of an .npy are, which has no place for them."""
        return self.path.with_name(f"{self.path.name}.ids.txt")

    def check(self) -> None:
        """Before any work.

        Raises:
            UsageError: it cannot be written, or must not be.
        """
        _ = self.format
        if not self.path.parent.is_dir():
            raise UsageError(f"{self.path}: there is no folder {self.path.parent}.")
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder.")
        if self.path.exists() and not self.overwrite:
            raise UsageError(f"{self.path} is there already: give --overwrite or another name.")


@dataclass(frozen=True, slots=True)
class Options:
    """An embedding run; see the help of `vecmill embed`."""

    server: Server
    source: Source
    output: Output
    fields: dict[str, Any] = field(default_factory=dict)
    """What every request carries beside its text."""
    batch_file_bytes: int = BATCH_FILE_BYTES
    keep: bool = False
    """Leave the files on the server."""
