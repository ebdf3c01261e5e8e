"""Several servers on one folder of batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.batches.light import LightEndpoint, all_of, content, create, ended, line, opened, progressed, upload
from vecmill.batches.input import InputLine
from vecmill.batches.record import BatchStatus
from vecmill.batches.store import LOCK
from vecmill.config import load_settings
from vecmill.core.errors import FilesFull, StartupError
from vecmill.core.types import Caller
from vecmill.state import State
from vecmill.storage.files import unshared_locks
from vecmill.storage.state_folder import StateFolder
from vecmill.telemetry.telemetry import Telemetry

LINES = 60
INPUT = b"".join(line(str(number), input=f"text {number}") for number in range(LINES))


class Slow(LightEndpoint):
    """Lets the others have a turn before each group."""

    async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Any:
        await asyncio.sleep(0.005)
        return await super().run(caller, lines)


def custom_ids(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [line["custom_id"] for line in lines]


EVERY_LINE = [str(number) for number in range(LINES)]


async def test_each_batch_is_run_once_by_whichever_server(tmp_path: Path) -> None:
    endpoints = [Slow() for _ in range(3)]
    servers = [opened(tmp_path, endpoint, batch_chunk_size=8, batches_max_active=1) for endpoint in endpoints]
    ids = [await create(servers[number % 3], await upload(servers[0], INPUT)) for number in range(6)]
    for server in servers:
        assert {batch.id for batch in await all_of(server)} == set(ids)
    batches = [await ended(servers[2], batch_id) for batch_id in ids]
    assert {batch.status for batch in batches} == {BatchStatus.COMPLETED}
    for batch in batches:
        assert custom_ids(await content(servers[1], batch.output_file_id)) == EVERY_LINE
    assert sum(len(endpoint.answered) for endpoint in endpoints) == LINES * len(ids)
    assert sum(bool(endpoint.answered) for endpoint in endpoints) > 1
    for server in servers:
        await server.close()


async def test_another_cancels_it_and_another_goes_on_with_it(tmp_path: Path) -> None:
    held = LightEndpoint(allowed=24)
    first, second = opened(tmp_path, held, batch_chunk_size=8), opened(tmp_path, None)
    file_id = await upload(second, INPUT)
    cancelled, kept = await create(second, file_id), await create(second, file_id)
    await progressed(second, cancelled, 24)
    await second.cancel(cancelled)
    batch = await ended(second, cancelled)
    assert (batch.status, batch.progress.lines) == (BatchStatus.CANCELLED, 24)
    await progressed(second, kept, 24)
    await first.close()  # its locks are let go of as a kill would
    free = LightEndpoint()
    third = opened(tmp_path, free, batch_chunk_size=8)
    batch = await ended(second, kept)
    assert custom_ids(await content(second, batch.output_file_id)) == EVERY_LINE
    assert free.answered == list(range(25, LINES + 1))
    await third.close()


async def test_a_server_that_was_cut_off_and_lost_its_lock_writes_nothing_more(tmp_path: Path) -> None:
    """As a network's file system has it: the lock is another's, and the first still runs."""
    first_gate, slow = asyncio.Event(), LightEndpoint()

    class CutOff(LightEndpoint):
        async def run(self, caller: Caller, lines: Sequence[InputLine]) -> Any:
            if lines[0].number > 16:
                await first_gate.wait()
            return await super().run(caller, lines)

    first = opened(tmp_path, CutOff(), batch_chunk_size=8)
    batch_id = await create(first, await upload(first, INPUT))
    await progressed(first, batch_id, 16)
    lock = tmp_path / "batches" / batch_id / LOCK
    lock.rename(lock.with_name("lost"))  # what the first holds is no longer the batch's lock
    lock.touch()
    second = opened(tmp_path, slow, batch_chunk_size=8)
    batch = await ended(second, batch_id)
    first_gate.set()
    while first.runs(batch_id):
        await asyncio.sleep(0.01)
    assert await second.get(batch_id) == batch
    assert custom_ids(await content(second, batch.output_file_id)) == EVERY_LINE
    await first.close()
    await second.close()


async def test_the_bound_on_bytes_is_of_all_servers(tmp_path: Path) -> None:
    limit = 4 * len(INPUT)
    servers = [opened(tmp_path, None, max_files_bytes=limit, max_file_bytes=limit) for _ in range(2)]
    for number in range(3):
        await upload(servers[number % 2], INPUT)
    await asyncio.sleep(1.1)  # how old the account of the folder may be
    third = await servers[1].upload(0)
    with pytest.raises(FilesFull):
        third.write(INPUT * 2)
    third.discard()
    assert len(await servers[0].file_ids()) == 3


def settings(folder: Path, name: str) -> Any:
    return load_settings({"state_dir": folder / name, "batch_dir": folder / "common", "cache_max_bytes": 0})


async def test_servers_with_states_of_their_own_share_batch_dir(tmp_path: Path) -> None:
    states = [State(settings(tmp_path, name), Telemetry()) for name in ("a", "b")]
    for state in states:
        await state.open()
    first, second = (state.batches for state in states)
    file_id = await upload(first, INPUT)
    assert (await second.file(file_id)).bytes == len(INPUT)
    batch_id = await create(second, file_id)
    assert [batch.id for batch in await all_of(first)] == [batch_id]
    assert all(state.problems()["batches"] is None for state in states)
    for state in states:
        await state.close()
    assert not (tmp_path / "a" / "files").exists()


async def test_a_batch_dir_that_cannot_be_written_stops_batches_alone(tmp_path: Path) -> None:
    (tmp_path / "common").write_text("a file")
    state = State(settings(tmp_path, "a"), Telemetry())
    await state.open()
    problems = state.problems()
    assert problems["jobs"] is None
    assert "BATCH_DIR cannot be written" in str(problems["batches"])
    await state.close()


NFS = (
    "30 1 0:30 / /srv/team\\040files rw shared:1 - nfs4 host:/team rw,vers=4.2,hard,{}\n"
    "1 0 8:1 / / rw - ext4 /dev/a rw\n"
)


@pytest.mark.parametrize(
    ("options", "path", "trouble"),
    [
        ("local_lock=none", "/srv/team files/vecmill", None),
        ("local_lock=flock", "/srv/team files/vecmill", "`local_lock=flock`"),
        ("local_lock=all", "/srv/team files", "`local_lock=all`"),
        ("nolock,local_lock=all", "/srv/team files", "two servers would run the same batch"),
        ("local_lock=all", "/srv/else", None),
    ],
)
def test_locks_that_other_machines_do_not_see(tmp_path: Path, options: str, path: str, trouble: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(NFS.format(options))
    found = unshared_locks(Path(path), mounts)
    assert (found is None) if trouble is None else trouble in str(found)


def test_such_a_folder_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = "is on NFS mounted with `nolock`."
    monkeypatch.setattr("vecmill.storage.state_folder.unshared_locks", lambda path: trouble)
    with pytest.raises(StartupError, match=r"BATCH_DIR=.*nolock"):
        StateFolder.open(tmp_path, shared=True, setting="BATCH_DIR")
    StateFolder.open(tmp_path).close()  # alone it needs no other machine's locks
