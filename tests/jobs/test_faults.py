"""A database that is locked, broken or full, or cannot be there at all: no job is stuck, what can be kept is kept."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.queues import Hand, ids, later, on_sqlite, opened
from vecmill.storage.sqlite import connect


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


async def test_locked_while_open(tmp_path: Path, hand: Hand, caplog: pytest.LogCaptureFixture) -> None:
    jobs = await opened(on_sqlite(tmp_path, hand))
    job = await jobs.register("a", 10, "i")
    other = connect(tmp_path / "jobs.db")
    other.execute("BEGIN IMMEDIATE")
    for current in range(1, 6):
        await jobs.progress(job["id"], current)
    second = await jobs.register("b", 10, "i")
    await jobs.complete(job["id"])
    assert (await jobs.get(second["id"]))["status"] == "active"
    assert len(lines(caplog, logging.ERROR)) == 1
    assert "locked" in lines(caplog, logging.ERROR)[0]
    other.execute("ROLLBACK")
    other.close()
    await later(jobs, hand, 2)
    assert lines(caplog, logging.WARNING) == ["the jobs are written to the database again"]
    known = await ids(jobs)
    await jobs.close()
    again = await opened(on_sqlite(tmp_path, hand))
    assert await ids(again) == known
    await again.close()


async def test_locked_at_the_start_and_free_later(tmp_path: Path, hand: Hand) -> None:
    jobs = await opened(on_sqlite(tmp_path, hand))
    old = [(await jobs.register(name, 10, "i"))["id"] for name in "ab"]
    await jobs.close()
    other = connect(tmp_path / "jobs.db")
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    jobs = await opened(on_sqlite(tmp_path, hand))
    new = (await jobs.register("c", 10, "i"))["id"]
    assert (await ids(jobs))["active"] == [new]
    other.execute("ROLLBACK")
    other.close()
    await later(jobs, hand, 2)
    assert await ids(jobs) == {"active": [old[0], new], "queued": [old[1]], "recent": []}
    await jobs.close()
    again = await opened(on_sqlite(tmp_path, hand))
    assert await ids(again) == {"active": [old[0], new], "queued": [old[1]], "recent": []}
    await again.close()


@pytest.mark.parametrize("damage", ["overwritten", "removed", "tables dropped"])
async def test_broken_while_open(tmp_path: Path, hand: Hand, damage: str) -> None:
    jobs = await opened(on_sqlite(tmp_path, hand))
    for name in "abc":
        await jobs.complete((await jobs.register(name, 10, "i"))["id"])
    running, waiting = await jobs.register("d", 10, "i"), await jobs.register("e", 10, "i")
    file = tmp_path / "jobs.db"
    match damage:
        case "overwritten":
            file.write_bytes(b"garbage" * 5000)
        case "removed":
            file.unlink()
        case _:
            other = connect(file)
            other.execute("DROP TABLE open")
            other.close()
    await jobs.progress(running["id"], 5)
    known = await ids(jobs)
    await jobs.close()
    again = await opened(on_sqlite(tmp_path, hand))
    assert await ids(again) == known
    assert (known["active"], known["queued"], len(known["recent"])) == ([running["id"]], [waiting["id"]], 3)
    assert (await again.get(running["id"]))["current"] == 5
    await again.close()


@pytest.mark.parametrize("damage", ["header", "pages", "records"])
async def test_broken_while_closed(tmp_path: Path, hand: Hand, damage: str) -> None:
    jobs = await opened(on_sqlite(tmp_path, hand))
    good = (await jobs.register("a" * 400, 10, "i"))["id"]
    bad = (await jobs.register("b" * 400, 10, "i"))["id"]
    await jobs.close()
    file = tmp_path / "jobs.db"
    match damage:
        case "header":
            file.write_bytes(b"no database, but long enough to be one" * 1000)
        case "pages":
            content = file.read_bytes()
            file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        case _:
            other = connect(file)
            other.execute("UPDATE open SET record = 'nonsense' WHERE id = ?", (bad,))
            other.execute("UPDATE meta SET value = '[]'")
            other.close()
    again = await opened(on_sqlite(tmp_path, hand))
    assert (await ids(again))["active"] == ([good] if damage == "records" else [])
    new = (await again.register("c", 10, "i"))["id"]
    known = await ids(again)
    await again.close()
    once_more = await opened(on_sqlite(tmp_path, hand))
    assert await ids(once_more) == known
    assert new in known["active"] + known["queued"]
    await once_more.close()


async def test_a_folder_that_goes_away_and_comes_back(tmp_path: Path, hand: Hand) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    jobs = await opened(on_sqlite(folder, hand))
    job = await jobs.register("a", 10, "i")
    folder.rename(tmp_path / "elsewhere")
    await jobs.progress(job["id"], 3)
    await later(jobs, hand, 2)
    assert (await jobs.get(job["id"]))["current"] == 3
    folder.mkdir()
    await later(jobs, hand, 2)
    await jobs.close()
    again = await opened(on_sqlite(folder, hand))
    assert (await again.get(job["id"]))["current"] == 3
    await again.close()


def test_a_full_disk(tmp_path: Path) -> None:
    """On a real one, in a namespace of its own where a small one can be mounted."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -m tests.jobs.full_disk "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1, ended.stderr
    assert "full" in errors[0] or "disk I/O error" in errors[0]
    assert "the jobs are written to the database again" in ended.stderr
