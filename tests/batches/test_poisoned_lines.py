"""A line that kills the process is tried once more alone, then reported; everything else is answered."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.batches.light import URL, LightEndpoint, content, create, ended, line, opened, progressed, upload
from vecmill.batches.endpoint import Turns
from vecmill.batches.input import MOST_COMMAS, validate
from vecmill.batches.record import BatchRecord, BatchStatus

CHUNK = 8


def requests(count: int, deadly: Sequence[int] = ()) -> bytes:
    return b"".join(line(str(n), kill=n) if n in deadly else line(str(n), input=n) for n in range(1, count + 1))


async def lives(folder: Path) -> list[int]:
    """The exit statuses of the processes that ran the batches one after the other, until no work was left."""
    statuses: list[int] = []
    while not statuses or statuses[-1]:
        command = [sys.executable, "-m", "tests.batches.light", str(folder), str(CHUNK)]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        statuses.append(await asyncio.wait_for(process.wait(), 60.0))
        assert statuses[-1] in (0, -signal.SIGKILL)
        assert len(statuses) < 10
    return statuses


async def submit(folder: Path, *contents: bytes) -> list[str]:
    batches = opened(folder, None)
    ids = [await create(batches, await upload(batches, content)) for content in contents]
    await batches.close()
    return ids


async def outcome(folder: Path, batch_id: str) -> tuple[BatchRecord, list[str], list[tuple[str, str]]]:
    """The batch, the custom_ids of its output, and those of its errors with their codes."""
    batches = opened(folder, None)
    batch = await batches.get(batch_id)
    output = [entry["custom_id"] for entry in await content(batches, batch.output_file_id)]
    failed = await content(batches, batch.error_file_id) if batch.error_file_id else []
    await batches.close()
    return batch, output, [(entry["custom_id"], entry["error"]["code"]) for entry in failed]


AT_NIGHT = [pytest.param(deadly, marks=pytest.mark.nightly) for deadly in ([1], [30], [13, 14])]


@pytest.mark.parametrize("deadly", [[13], [3, 29], *AT_NIGHT], ids=str)
async def test_a_line_kills_twice_at_the_most(tmp_path: Path, deadly: list[int]) -> None:
    [batch_id] = await submit(tmp_path, requests(30, deadly))
    # Lines of one window are found one after the other: the first time they die together.
    deaths = 3 if deadly == [13, 14] else 2 * len(deadly)
    assert await lives(tmp_path) == [-signal.SIGKILL] * deaths + [0]
    batch, output, failed = await outcome(tmp_path, batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert output == [str(n) for n in range(1, 31) if n not in deadly]
    assert failed == [(str(n), "process_died") for n in deadly]
    assert (batch.progress.completed, batch.progress.failed) == (30 - len(deadly), len(deadly))


async def test_other_batches_lose_nothing_by_it(tmp_path: Path) -> None:
    """Their lines were in progress too whenever the process died, but never alone."""
    ids = await submit(tmp_path, requests(40), requests(30, [13]), requests(40))
    assert await lives(tmp_path) == [-signal.SIGKILL] * 2 + [0]
    for batch_id, expected in zip(ids, (0, 1, 0), strict=True):
        batch, output, failed = await outcome(tmp_path, batch_id)
        assert (batch.status, len(failed)) == (BatchStatus.COMPLETED, expected)
        assert len(output) == batch.total - expected


async def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    [batch_id] = await submit(tmp_path, requests(3, [2]))
    await lives(tmp_path)
    batches = opened(tmp_path, None)
    [entry] = await content(batches, (await batches.get(batch_id)).error_file_id)
    assert (entry["custom_id"], entry["response"]) == ("2", None)
    assert "died twice" in entry["error"]["message"]
    assert "less text" in entry["error"]["message"]
    await batches.close()


async def test_a_server_that_stops_leaves_no_suspicion(tmp_path: Path) -> None:
    stuck, second = LightEndpoint(allowed=8), LightEndpoint()
    [batch_id] = await submit(tmp_path, requests(30))
    batches = opened(tmp_path, stuck, batch_chunk_size=4)
    await progressed(batches, batch_id, 8)
    note = tmp_path / "batches" / batch_id / "working"
    assert note.exists()
    await batches.close()
    assert not note.exists()
    batches = opened(tmp_path, second, batch_chunk_size=4)
    await ended(batches, batch_id)
    assert second.answered == list(range(9, 31))
    assert not note.exists()
    await batches.close()


async def test_a_device_that_fails_is_as_a_process_that_dies(tmp_path: Path) -> None:
    [batch_id] = await submit(tmp_path, requests(30))
    batches = opened(tmp_path, None, batch_chunk_size=4)
    batches.start({URL: LightEndpoint(allowed=8)}, device_failed=lambda: True)
    await progressed(batches, batch_id, 8)
    await batches.close()
    assert (tmp_path / "batches" / batch_id / "working").exists()


@pytest.mark.parametrize("note", [b"", b"{", b'{"first": "x"}', b'{"first":-5,"lines":10000000,"alone":true}'])
async def test_a_note_that_makes_no_sense_harms_nothing(tmp_path: Path, note: bytes) -> None:
    [batch_id] = await submit(tmp_path, requests(30))
    (tmp_path / "batches" / batch_id / "working").write_bytes(note)
    batches = opened(tmp_path, LightEndpoint(), batch_chunk_size=4)
    assert (await ended(batches, batch_id)).progress.completed == 30
    await batches.close()


async def test_a_batch_is_cancelled_while_its_lines_are_done_again(tmp_path: Path) -> None:
    [batch_id] = await submit(tmp_path, requests(30))
    (tmp_path / "batches" / batch_id / "working").write_bytes(b'{"first":1,"lines":30,"alone":false}')
    batches = opened(tmp_path, LightEndpoint(allowed=5), batch_chunk_size=4)
    await progressed(batches, batch_id, 5)
    await batches.cancel(batch_id)
    batch = await ended(batches, batch_id)
    assert (batch.status, batch.progress.completed) == (BatchStatus.CANCELLED, 5)
    await batches.close()


def test_a_line_of_millions_of_ids_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(line("1", input="x") + line("2", input=[1] * (MOST_COMMAS + 10)))
    checked = validate(tmp_path / "input", URL, 32_000_000, lambda: False)
    assert [(error.line, error.code) for error in checked.errors] == [(2, "line_too_long")]
    assert f"more than {MOST_COMMAS} values" in checked.errors[0].message


async def test_alone_is_beside_nothing() -> None:
    turns = Turns()
    running: list[str] = []
    seen: set[tuple[str, ...]] = set()

    async def work(name: str) -> None:
        async with turns.alone() if name.startswith("alone") else turns.together():
            running.append(name)
            seen.add(tuple(running))
            try:
                await asyncio.sleep(0.001)
            finally:
                running.remove(name)

    names = [f"alone {n}" if n % 3 == 0 else f"together {n}" for n in range(30)]
    cancelled = asyncio.create_task(work("alone and gone"))
    tasks = [asyncio.create_task(work(name)) for name in names]
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(*tasks)
    assert all(len(names) == 1 for names in seen if any(name.startswith("alone") for name in names))
    assert {name for names in seen for name in names} >= set(names)
    assert any(len(names) > 1 for names in seen)
