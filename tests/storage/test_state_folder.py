"""One server to a folder, and what happens where nothing can be written."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from vecmill.core.errors import StartupError
from vecmill.storage.files import write_atomically
from vecmill.storage.sqlite_jobs import SqliteJobs
from vecmill.storage.sqlite_vectors import SqliteVectors
from vecmill.storage.state_folder import StateFolder


def test_a_second_server_is_refused_with_the_cure(tmp_path: Path) -> None:
    first = StateFolder.open(tmp_path / "state")
    with pytest.raises(StartupError, match=r"in use by another vecmill server.*REDIS_URL"):
        StateFolder.open(tmp_path / "state")
    with pytest.raises(StartupError):
        StateFolder.open(tmp_path / "state", shared=True)
    first.close()
    StateFolder.open(tmp_path / "state").close()


def test_servers_that_share_let_each_other_in_and_nobody_else(tmp_path: Path) -> None:
    folders = [StateFolder.open(tmp_path, shared=True) for _ in range(2)]
    with pytest.raises(StartupError):
        StateFolder.open(tmp_path)
    for folder in folders:
        folder.close()


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path / "new" / "state")
    assert folder.problem is None
    assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0
    folder.close()


def test_where_nothing_can_be_written_it_says_so_and_serves(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = StateFolder.open(file)
    assert folder.problem is not None
    assert "cannot be written" in folder.problem
    folder.close()


def test_a_folder_that_was_removed_or_replaced_is_taken_as_at_the_start(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    folder = StateFolder.open(path)
    assert not folder.look()
    path.rename(elsewhere)
    assert folder.look()
    assert folder.problem is None
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(StartupError):
        StateFolder.open(path)
    StateFolder.open(elsewhere).close()

    path.rename(tmp_path / "second")
    elsewhere.rename(path)
    with_another = StateFolder.open(path)
    assert not folder.look()
    assert folder.problem is not None
    assert "replaced by another folder, which another vecmill server uses" in folder.problem
    with_another.close()
    assert folder.look()
    assert folder.problem is None
    folder.close()


def test_a_folder_that_cannot_be_made_again_is_told(tmp_path: Path) -> None:
    above = tmp_path / "above"
    folder = StateFolder.open(above / "state")
    above.rename(tmp_path / "elsewhere")
    above.touch()
    assert not folder.look()
    assert folder.problem is not None
    assert "what is kept now does not outlive this process" in folder.problem
    above.unlink()
    assert folder.look()
    assert folder.problem is None
    folder.close()


def test_what_is_kept_is_nobody_else_s_also_in_a_folder_that_everybody_may_look_into(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        StateFolder.open(tmp_path).close()
        write_atomically(tmp_path / "history", b"what was searched")
        vectors = SqliteVectors(tmp_path / "cache.db", 1_000_000)
        vectors.put({bytes(16): b"a vector"}, [])
        asyncio.run(_begin_jobs(tmp_path / "jobs.db"))
        modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
        vectors.close()
    finally:
        os.umask(before)
    assert {"format", "history", "lock", "cache.db", "cache.db-wal", "cache.db-shm", "jobs.db"} <= modes.keys()
    assert set(modes.values()) == {"0o600"}


async def _begin_jobs(path: Path) -> None:
    jobs = SqliteJobs(path)
    await jobs.load()
    await jobs.close()
