"""A queue in a process of its own, without end, until it is killed: prints each answer that a client would have had.

`python -m tests.jobs.killed FOLDER SEED`
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

from vecmill.config import JobSettings
from vecmill.jobs.local import LocalJobs
from vecmill.jobs.queue import JobQueue
from vecmill.storage.sqlite_jobs import SqliteJobs


async def main(folder: Path, seed: int) -> None:
    choose = random.Random(seed)
    settings = JobSettings(jobs_max_active=2)
    queue = JobQueue(settings)
    await queue.open(LocalJobs(settings, SqliteJobs(folder / "jobs.db")))
    known: list[str] = []
    while True:
        call = choose.choice(["register", "register", "progress", "progress", "progress", "complete", "cancel"])
        if call == "register" or not known:
            seen = await queue.register(f"project {len(known)}", 100, "i")
            known.append(seen["id"])
        else:
            job_id = choose.choice(known)
            match call:
                case "progress":
                    seen = await queue.progress(job_id, choose.randint(0, 100))
                case "complete":
                    seen = await queue.complete(job_id)
                case _:
                    seen = await queue.cancel(job_id)
            if seen["status"] in ("completed", "failed"):
                known.remove(job_id)
        sys.stdout.write(json.dumps(seen) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
