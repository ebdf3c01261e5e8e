"""An endpoint without a model, and a process that runs batches with it, to be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from vecmill.batches.endpoint import Endpoint, LineResult
from vecmill.batches.input import InputLine
from vecmill.batches.record import BatchRecord
from vecmill.batches.service import BatchService
from vecmill.config import BatchSettings
from vecmill.core.types import Caller
from vecmill.storage.files import read_whole
from vecmill.storage.state_folder import StateFolder
from vecmill.telemetry.telemetry import Telemetry

URL = "/v1/embeddings"
LONGEST_LINE = 65_536


def answer(body: Mapping[str, Any]) -> LineResult:
    """The hash of the body; an error if the body asks for one."""
    if "refuse" in body:
        return LineResult(400, b'{"error":{"message":"refused"}}')
    digest = sha256(orjson.dumps(body)).hexdigest()
    return LineResult(200, orjson.dumps({"digest": digest}), tokens=3, model="light")


class LightEndpoint:
    """Answers at once, at most the first `allowed` lines, and keeps the numbers of the lines that it answered."""

    def __init__(self, allowed: int | None = None) -> None:
        self.answered: list[int] = []
        self._allowed = allowed
        self._never = asyncio.Event()

    def texts(self, body: Mapping[str, Any]) -> int:
        return 1

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        await asyncio.sleep(0)
        if self._allowed is not None and lines[-1].number > self._allowed:
            await self._never.wait()
        self.answered += [line.number for line in lines]
        return [answer(line.body) for line in lines]


def line(custom_id: str, url: str = URL, **body: Any) -> bytes:
    entry = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)


def opened(folder: Path, endpoint: Endpoint | None, clock: Any = None, **settings: Any) -> BatchService:
    """Batches in a folder, which are run if an endpoint is given."""
    batches = BatchService(BatchSettings(**settings), LONGEST_LINE, Telemetry(), clock)
    batches.open(folder, None)
    if endpoint is not None:
        batches.start({URL: endpoint})
    return batches


async def upload(batches: BatchService, content: bytes) -> str:
    """Upload a file. Returns its id."""
    upload = await batches.upload(len(content))
    upload.write(content)
    return upload.finish("input.jsonl", None).id


async def create(batches: BatchService, file_id: str, window: float = 3600.0) -> str:
    """Create a batch. Returns its id."""
    batch = await batches.create(
        endpoint=URL,
        input_file_id=file_id,
        completion_window="1h",
        window_seconds=window,
        metadata=None,
        output_expires_seconds=None,
    )
    return batch.id


async def ended(batches: BatchService, batch_id: str) -> BatchRecord:
    """Wait until the batch has ended, and return it."""
    while not (batch := await batches.get(batch_id)).ended:
        await asyncio.sleep(0.001)
    return batch


async def progressed(batches: BatchService, batch_id: str, lines: int) -> BatchRecord:
    """Wait until so many of the batch's lines are done, and return it."""
    while (batch := await batches.get(batch_id)).progress.lines < lines:
        assert not batch.ended
    return batch


async def content(batches: BatchService, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file."""
    assert file_id is not None
    file = await batches.file(file_id)
    raw = read_whole(batches.path_of(file_id))
    assert len(raw) == file.bytes
    return [orjson.loads(line) for line in raw.splitlines()]


async def all_of(batches: BatchService) -> list[BatchRecord]:
    """All batches, the newest first; each is read."""
    return await batches.records(await batches.ids())


class DeadlyEndpoint(LightEndpoint):
    """An endpoint whose process some lines kill, alone or together with others."""

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Sequence[LineResult]:
        results = await super().run(caller, lines)
        if any("kill" in line.body for line in lines):
            os.kill(os.getpid(), signal.SIGKILL)
        return results


async def _run_until_killed(folder: Path, chunk_size: int) -> None:
    state = StateFolder.open(folder, shared=True)
    batches = opened(state.path, DeadlyEndpoint(), batch_chunk_size=chunk_size)
    sys.stdout.write("running\n")
    sys.stdout.flush()
    while not all(batch.ended for batch in await all_of(batches)):
        await asyncio.sleep(0.001)
    await batches.close()


if __name__ == "__main__":
    asyncio.run(_run_until_killed(Path(sys.argv[1]), int(sys.argv[2])))
