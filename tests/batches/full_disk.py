"""What happens on a full disk and on one that becomes read-only; run in a folder that is a small disk of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from pathlib import Path

from tests.batches.light import LightEndpoint, content, create, ended, line, opened, upload
from vecmill.batches.disk import on_disk
from vecmill.batches.record import BatchStatus
from vecmill.batches.service import BatchService
from vecmill.core.errors import InsufficientStorage, StateUnavailable, VecmillError

FOLDER = Path(sys.argv[1])
LINES = 2000
BIG = b"x" * 65_536


class Heard(logging.Handler):
    """What was logged of batches that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.arrived = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "for the disk" in record.getMessage():
            self.messages.append(record.getMessage())
            self.arrived.set()


async def refused(batches: BatchService, kind: type[VecmillError], size: int) -> None:
    """An upload of so many times BIG fails, and leaves nothing."""
    try:
        coming = await batches.upload(0)
        try:
            for _ in range(size):
                await on_disk(coming.write, BIG)
            await on_disk(coming.finish, "x", None)
        finally:
            coming.discard()
    except kind:
        assert await asyncio.to_thread(lambda: list(FOLDER.rglob("*.part"))) == []
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


async def full() -> None:
    """An upload is refused; a batch waits, says so once, and goes on when there is room."""
    batches = opened(FOLDER, None, batch_chunk_size=64)
    await refused(batches, InsufficientStorage, 100)
    file_id = await upload(batches, b"".join(line(str(n), input=n) for n in range(1, LINES + 1)))
    batch_id = await create(batches, file_id)
    ballast = FOLDER / "ballast"
    heard = Heard()
    logging.getLogger("vecmill").addHandler(heard)
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(BIG):
            pass
    batches.start({"/v1/embeddings": LightEndpoint()})
    await heard.arrived.wait()
    batch = await batches.get(batch_id)
    assert batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS), batch
    await refused(batches, InsufficientStorage, 1)
    ballast.unlink()
    batches.wake()
    await finished(batches, batch_id)
    assert len(heard.messages) == 1, heard.messages
    await batches.close()


async def read_only() -> None:
    """A disk that becomes read-only makes a batch wait too."""
    batches = opened(FOLDER, None, batch_chunk_size=64)
    batch_id = await create(
        batches, await upload(batches, b"".join(line(str(n), input=n) for n in range(1, LINES + 1)))
    )
    heard = Heard()
    logging.getLogger("vecmill").addHandler(heard)
    await remount("ro")
    batches.start({"/v1/embeddings": LightEndpoint()})
    await heard.arrived.wait()
    await refused(batches, StateUnavailable, 1)
    assert not (await batches.get(batch_id)).ended
    await remount("rw")
    batches.wake()
    await finished(batches, batch_id)
    await batches.close()


async def remount(how: str) -> None:
    process = await asyncio.create_subprocess_exec("mount", "-o", f"remount,{how}", str(FOLDER))
    assert await process.wait() == 0


async def finished(batches: BatchService, batch_id: str) -> None:
    batch = await ended(batches, batch_id)
    assert batch.status is BatchStatus.COMPLETED
    custom_ids = [entry["custom_id"] for entry in await content(batches, batch.output_file_id)]
    assert custom_ids == [str(n) for n in range(1, LINES + 1)]


if __name__ == "__main__":
    asyncio.run({"full": full, "read_only": read_only}[sys.argv[2]]())
