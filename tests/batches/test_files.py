"""What is deleted and when, and what is kept whatever happens."""

from __future__ import annotations

import gc
import os
import secrets
import sys
from pathlib import Path

import pytest

from tests.batches.light import LightEndpoint, all_of, create, ended, line, opened, upload
from tests.batches.test_life import Moved
from vecmill.batches.record import BatchStatus
from vecmill.core.errors import FilesFull, NoSuchBatch, NoSuchFile

DAY = 86_400.0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "files").iterdir())


async def test_files_expire_and_batches_are_forgotten(tmp_path: Path) -> None:
    clock = Moved()
    batches = opened(tmp_path, LightEndpoint(), clock, file_expires_days=10)
    file_id = await upload(batches, line("a"))
    batch_id = await create(batches, file_id)
    await ended(batches, batch_id)
    await batches.close()
    clock.ahead = 9 * DAY
    assert len(await batches.file_ids()) == 2
    clock.ahead = 11 * DAY
    with pytest.raises(NoSuchFile):
        await batches.file(file_id)
    assert await batches.file_ids() == []
    batches.start({})  # sweeps
    while names(tmp_path) or any((tmp_path / "batches").iterdir()):
        await all_of(batches)
    with pytest.raises(NoSuchBatch):
        await batches.get(batch_id)
    await batches.close()


async def test_no_name_stays_in_memory(tmp_path: Path) -> None:
    """Python 3.12 keeps each name that pathlib has seen, for as long as it runs."""
    batches = opened(tmp_path, None)

    async def pass_through(times: int) -> None:
        for _ in range(times):
            await batches.delete_file(await upload(batches, line("a")))
            with pytest.raises(NoSuchFile):
                await batches.file(f"file-{secrets.token_hex(16)}")
            with pytest.raises(NoSuchBatch):
                await batches.get(f"batch_{secrets.token_hex(16)}")

    await pass_through(20)
    gc.collect()
    before = sys.getallocatedblocks()
    await pass_through(60)
    gc.collect()
    # One for each file is in pydantic's cache of 16,384 strings.
    assert sys.getallocatedblocks() - before < 2 * 60
    await batches.close()


async def test_an_input_that_expires_is_kept_while_a_batch_reads_it(tmp_path: Path) -> None:
    clock = Moved()
    before = opened(tmp_path, None, clock, file_expires_days=1)
    batch_id = await create(before, await upload(before, line("a")), window=5 * DAY)
    clock.ahead = 2 * DAY
    batches = opened(tmp_path, LightEndpoint(), clock, file_expires_days=1)
    assert (await ended(batches, batch_id)).status is BatchStatus.COMPLETED
    await batches.close()


async def test_what_is_left_of_a_creation_that_was_cut_short_goes_some_time(tmp_path: Path) -> None:
    batches = opened(tmp_path, None)
    unborn = tmp_path / "batches" / ("new.batch_" + "0" * 32)
    just_now = tmp_path / "batches" / ("new.batch_" + "1" * 32)
    for folder in (unborn, just_now):
        folder.mkdir()
        (folder / "lock").touch()
    os.utime(unborn, (0, 0))
    batches.start({})
    while unborn.exists():
        assert await all_of(batches) == []
    assert just_now.exists()
    await batches.close()


async def test_what_another_server_is_still_writing_is_kept(tmp_path: Path) -> None:
    writing, sweeping = opened(tmp_path, None), opened(tmp_path, None)
    (tmp_path / "files" / ("file-" + "0" * 32 + ".part")).write_bytes(b"of one that was killed")
    (tmp_path / "files" / ("file-" + "1" * 32 + ".data")).write_bytes(b"of one that was killed")
    (tmp_path / "files" / ("file-" + "1" * 32 + ".json.tmp")).write_bytes(b"")
    coming = await writing.upload(0)
    coming.write(b"{}")
    sweeping.start({})
    while len(names(tmp_path)) > 1:
        await all_of(sweeping)
    file = coming.finish("x", None)
    assert (await sweeping.file(file.id)).bytes == 2
    await sweeping.close()


async def test_an_upload_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    batches = opened(tmp_path, None, max_files_bytes=10_000)
    coming = await batches.upload(0)
    coming.write(b"x" * 6000)
    with pytest.raises(FilesFull, match="MAX_FILES_BYTES"):
        coming.write(b"x" * 6000)
    coming.discard()
    coming.discard()
    assert names(tmp_path) == []
    again = await batches.upload(0)
    again.write(b"x" * 9000)
    again.discard()


async def test_a_file_with_broken_metadata_harms_itself_alone(tmp_path: Path) -> None:
    batches = opened(tmp_path, None)
    whole, broken = await upload(batches, b"{}"), await upload(batches, b"{}")
    (tmp_path / "files" / f"{broken}.json").write_bytes(b"{")
    again = opened(tmp_path, None)
    assert await again.file_ids() == [whole]
    with pytest.raises(NoSuchFile):
        await again.file(broken)
    await again.delete_file(whole)
    assert await again.file_ids() == []
