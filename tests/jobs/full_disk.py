"""Jobs on a disk of 1 MB that fills up: `python -m tests.jobs.full_disk FOLDER`, with FOLDER on that disk."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from tests.jobs.queues import Hand, ids, on_sqlite, opened


async def main(folder: Path) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s")
    hand = Hand()
    jobs = await opened(on_sqlite(folder, hand))
    before = await jobs.register("before", 10, "i")
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        size = 65_536
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    # Its log may have room left: until it is full, each of these is still written.
    during = [await jobs.register("x" * 500, 10, "i") for _ in range(200)]
    await jobs.complete(before["id"])
    known = await ids(jobs)
    assert known["active"] == [during[0]["id"]]
    hand.now += 2
    await jobs.get(during[0]["id"])
    os.unlink(filler)
    hand.now += 2
    await jobs.sweep()
    await jobs.close()
    again = await opened(on_sqlite(folder, hand))
    assert await ids(again) == known
    await again.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
