"""What a batch has answered so far: two files that only ever grow, and are cut back to what was recorded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import orjson

from vecmill.batches.endpoint import Line, LineResult
from vecmill.batches.record import Progress

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"


class Answers:
    """The open files of one batch. For any thread, one at a time; every call may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._output = _open(folder / OUTPUT)
        self._errors = _open(folder / ERRORS)

    def holds(self, progress: Progress) -> bool:
        """Whether all that was recorded is still there: a disk that failed may have lost some."""
        sizes = os.fstat(self._output).st_size, os.fstat(self._errors).st_size
        return sizes[0] >= progress.output_bytes and sizes[1] >= progress.error_bytes

    def append(self, progress: Progress, output: bytes, errors: bytes) -> None:
        """Write behind what is recorded, in place of whatever is there, and have it on disk."""
        for file, start, data in (
            (self._output, progress.output_bytes, output),
            (self._errors, progress.error_bytes, errors),
        ):
            if data or os.fstat(file).st_size != start:
                os.ftruncate(file, start)
                _write(file, start, data)
                os.fdatasync(file)

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._output)
        os.close(self._errors)


def written(batch_id: str, lines: Sequence[Line], results: Sequence[LineResult]) -> tuple[bytes, bytes]:
    """What goes to the output and what to the errors."""
    output: list[bytes] = []
    errors: list[bytes] = []
    for line, result in zip(lines, results, strict=True):
        (output if result.ok else errors).append(_answered(batch_id, line, result))
    return b"".join(output), b"".join(errors)


def expired(batch_id: str, lines: Iterable[Line]) -> bytes:
    """What goes to the errors for lines that were not run in time."""
    return _unanswered(
        batch_id,
        lines,
        "batch_expired",
        "This request was not run before the completion window of its batch was over.",
    )


def process_died(batch_id: str, lines: Iterable[Line]) -> bytes:
    """What goes to the errors for a line that is not run again."""
    return _unanswered(
        batch_id,
        lines,
        "process_died",
        "The server's process died twice while it worked on this request, the second time on nothing else; it was not "
        "tried again. Send less text in one request.",
    )


def _unanswered(batch_id: str, lines: Iterable[Line], code: str, message: str) -> bytes:
    error = {"code": code, "message": message}
    return b"".join(
        orjson.dumps(
            {"id": _id(batch_id, line), "custom_id": line.custom_id, "response": None, "error": error},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for line in lines
    )


def _answered(batch_id: str, line: Line, result: LineResult) -> bytes:
    request_id = _id(batch_id, line)
    response = {"status_code": result.status, "request_id": request_id, "body": orjson.Fragment(result.body)}
    return orjson.dumps(
        {"id": request_id, "custom_id": line.custom_id, "response": response, "error": None},
        option=orjson.OPT_APPEND_NEWLINE,
    )


def _id(batch_id: str, line: Line) -> str:
    """Unique, and the same when the line has to be run again."""
    return f"batch_req_{batch_id[6:]}{line.number:08x}"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _write(file: int, start: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, start)
        view, start = view[count:], start + count
