"""Whenever the process dies, no line is lost, none is there twice, and every batch comes to its end."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.batches.light import LightEndpoint, all_of, content, create, ended, line, opened, progressed, upload
from vecmill.batches.record import BatchStatus

EVENTS = frozenset({"os.rename", "os.remove", "os.truncate", "open", "os.mkdir"})
CHUNK = 4


class Snapshots:
    """Copies a folder just before each change of it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._into: Path | None = None
        self.taken: list[Path] = []
        self._busy = False
        sys.addaudithook(self._look)  # it stays for as long as the process does

    @contextmanager
    def of(self, folder: Path, into: Path) -> Iterator[None]:
        self._folder, self._into, self.taken = folder, into, []
        try:
            yield
        finally:
            self._folder = None

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder is None or self._busy or event not in EVENTS or not self._concerns(event, args):
            return
        assert self._into is not None
        self._busy = True
        try:
            copy = self._into / str(len(self.taken))
            shutil.copytree(self._folder, copy)
            self.taken.append(copy)
        finally:
            self._busy = False

    def _concerns(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "os.truncate":  # by descriptor
            return True
        reading = event == "open" and isinstance(args[1], str) and not set(args[1]) & set("wax+")
        return not reading and str(args[0]).startswith(str(self._folder))


@pytest.fixture(scope="module")
def snapshots() -> Snapshots:
    return Snapshots()


def requests(count: int) -> bytes:
    return b"".join(line(str(n), input=n) if n % 5 else line(str(n), refuse=n) for n in range(1, count + 1))


async def check(
    folder: Path, batch_id: str, lines: int, status: BatchStatus = BatchStatus.COMPLETED, *, may_have_killed: int = 0
) -> None:
    """Resume a batch and check every line; at most `may_have_killed` lines are reported as the cause of a crash."""
    batches = opened(folder, LightEndpoint(), batch_chunk_size=CHUNK)
    try:
        batch = await ended(batches, batch_id)
        assert batch.status is status
        output = [entry["custom_id"] for entry in await content(batches, batch.output_file_id)]
        failed = await content(batches, batch.error_file_id)
        killers = [entry["custom_id"] for entry in failed if (entry["error"] or {}).get("code") == "process_died"]
        errors = [entry["custom_id"] for entry in failed if entry["custom_id"] not in killers]
        done = batch.progress.completed + batch.progress.failed
        assert len(killers) <= may_have_killed
        ran = [n for n in range(1, done + 1) if str(n) not in killers]
        assert output == [str(n) for n in ran if n % 5]
        assert errors == [str(n) for n in ran if n % 5 == 0]
        assert status is not BatchStatus.COMPLETED or done == lines == batch.total
        assert len(await batches.file_ids()) == 3
    finally:
        await batches.close()


async def test_it_may_die_before_any_change_to_the_folder(tmp_path: Path, snapshots: Snapshots) -> None:
    folder, into = tmp_path / "state", tmp_path / "copies"
    folder.mkdir()
    into.mkdir()
    batches = opened(folder, None)
    batch_id = await create(batches, await upload(batches, requests(13)))
    await batches.close()
    with snapshots.of(folder, into):
        batches = opened(folder, LightEndpoint(), batch_chunk_size=CHUNK)
        await ended(batches, batch_id)
        await batches.close()
    assert len(snapshots.taken) > 20
    for copy in snapshots.taken:
        await check(copy, batch_id, 13)


async def test_it_may_die_while_a_batch_is_cancelled(tmp_path: Path, snapshots: Snapshots) -> None:
    folder, into = tmp_path / "state", tmp_path / "copies"
    folder.mkdir()
    into.mkdir()
    batches = opened(folder, LightEndpoint(allowed=8), batch_chunk_size=CHUNK)
    batch_id = await create(batches, await upload(batches, requests(13)))
    await progressed(batches, batch_id, 8)
    await batches.cancel(batch_id)
    with snapshots.of(folder, into):
        await ended(batches, batch_id)
    await batches.close()
    assert len(snapshots.taken) > 5
    for copy in snapshots.taken:
        await check(copy, batch_id, 13, BatchStatus.CANCELLED)


async def test_it_may_die_while_a_file_comes_in(tmp_path: Path, snapshots: Snapshots) -> None:
    """The file is whole or it is not there, and what is not there takes no room."""
    folder, into = tmp_path / "state", tmp_path / "copies"
    folder.mkdir()
    into.mkdir()
    batches = opened(folder, None)
    with snapshots.of(folder, into):
        await upload(batches, requests(13))
    assert len(snapshots.taken) >= 3
    for copy in snapshots.taken:
        again = opened(copy, None)
        again.start({})  # deletes what is left over
        while (left := {path.suffix for path in (copy / "files").iterdir()}) not in (set(), {".data", ".json"}):
            await all_of(again)
        assert len(await again.file_ids()) == len(left) // 2
        await again.close()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_it_may_be_killed_again_and_again(tmp_path: Path, seed: int) -> None:
    """Ten kills at random moments, some of them while the process starts; more if work begins slowly.

    A line that ran alone when the process was killed is not run again: it may have been the cause.
    """
    chance = random.Random(seed)
    batches = opened(tmp_path, None)
    total = 4000
    batch_id = await create(batches, await upload(batches, requests(total)))
    lost, done, times = [], 0, 0
    while times < 10 or not done:
        await asyncio.to_thread(run_and_kill, tmp_path, chance.uniform(0.0, 0.2 * (1 + times // 10)))
        times += 1
        batch = await batches.get(batch_id)
        done = batch.progress.lines
        written = tmp_path / "batches" / batch_id / "output.jsonl"
        if written.exists():
            beyond = written.read_bytes()[batch.progress.output_bytes :]
            lost.append(beyond.count(b"\n"))
    assert max(lost) <= CHUNK
    assert 0 < done < total
    await asyncio.wait_for(check(tmp_path, batch_id, total, may_have_killed=times - 1), 60.0)


def run_and_kill(folder: Path, after_seconds: float) -> None:
    """Run batches in a process of its own and kill it, so long after it has begun."""
    command = [sys.executable, "-m", "tests.batches.light", str(folder), str(CHUNK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(after_seconds)
        process.kill()
