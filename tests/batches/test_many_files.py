"""Descriptions of files are on disk, not in memory; a page of them is read when it is asked for."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from random import Random
from secrets import token_hex
from time import perf_counter, time

import pytest

from tests.batches.light import line, opened, upload
from tests.batches.test_files import names
from vecmill.batches.disk import FileQuota
from vecmill.batches.files import FileStore, StoredFile
from vecmill.core.clock import Clock
from vecmill.core.errors import NoSuchFile
from vecmill.core.types import Viewer

MANY = 3000
MOST_BYTES_EACH = 500  # a description takes some 1,500


def put(folder: Path, number: int, **about: object) -> StoredFile:
    """As another server has left it, without the syncs of a real one."""
    file = StoredFile(
        id=f"file-{token_hex(16)}",
        bytes=2,
        created_at=1000.0 + number,
        expires_at=time() + 10_000,
        filename=f"batch_{token_hex(16)}_output.jsonl",
        purpose="batch" if number % 3 else "batch_output",
        owner=f"owner-{number % 2}",
    ).model_copy(update=about)
    (folder / f"{file.id}.data").write_bytes(b"{}")
    (folder / f"{file.id}.json").write_text(file.model_dump_json())
    return file


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StoredFile]]:
    """The newest first; written in another order."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "files").mkdir()
    files = [put(folder / "files", number) for number in Random(0).sample(range(MANY), MANY)]
    return folder, sorted(files, key=lambda file: file.created_at, reverse=True)


def test_a_file_takes_almost_no_memory(many: tuple[Path, list[StoredFile]]) -> None:
    folder = many[0] / "files"
    store = FileStore(folder, Clock(), FileQuota([folder], 10**9), expires_days=30)
    tracemalloc.start()
    try:
        assert len(store.ids()) == MANY
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
        store.described(file.id for file in many[1])
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - taken < 100_000
    finally:
        tracemalloc.stop()
    assert taken < MOST_BYTES_EACH * MANY


async def test_all_of_them_are_paged_and_found_after_a_restart(many: tuple[Path, list[StoredFile]]) -> None:
    folder, files = many
    batches = opened(folder, None)
    began = perf_counter()
    ids = await batches.file_ids()
    page = await batches.files(ids[:100])
    assert perf_counter() - began < 1
    assert ids == [file.id for file in files]
    assert page == files[:100]
    assert await batches.file(files[7].id) == files[7]
    own = Viewer("owner-1", False)
    assert await batches.file_ids(own) == [file.id for file in files if file.owner == "owner-1"]
    assert await batches.file_ids(own, "batch_output") == [
        file.id for file in files if (file.owner, file.purpose) == ("owner-1", "batch_output")
    ]
    assert await batches.files(ids[:2], own) == [file for file in files[:2] if file.owner == "owner-1"]
    await batches.close()


async def test_what_another_server_adds_and_deletes_is_seen(tmp_path: Path) -> None:
    batches, other = opened(tmp_path, None), opened(tmp_path, None)
    first, second = await upload(batches, line("a")), await upload(other, line("b"))
    assert await batches.file_ids() == [second, first] == await other.file_ids()
    older = put(tmp_path / "files", 0, owner=None)
    expired = put(tmp_path / "files", 1, owner=None, expires_at=time() - 1)
    assert await batches.file_ids() == [second, first, older.id]
    await other.delete_file(first)
    assert await batches.file_ids() == [second, older.id]
    assert [file.id for file in await batches.files([second, first, older.id])] == [second, older.id]
    with pytest.raises(NoSuchFile):
        await batches.file(first)
    batches.start({})  # sweeps
    while f"{expired.id}.json" in names(tmp_path):
        assert await batches.file_ids() == [second, older.id]
    for each in (batches, other):
        await each.close()
