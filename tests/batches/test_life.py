"""A batch from its input to its files: what is where, and what stays when it is cancelled or over its time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.batches.light import (
    LONGEST_LINE,
    URL,
    LightEndpoint,
    all_of,
    answer,
    content,
    create,
    ended,
    line,
    opened,
    progressed,
    upload,
)
from vecmill.batches.record import BatchStatus
from vecmill.batches.service import BatchService
from vecmill.config import BatchSettings
from vecmill.core.clock import Clock
from vecmill.core.errors import BatchConflict, NoSuchBatch, NoSuchFile, StateUnavailable
from vecmill.storage.files import write_atomically
from vecmill.telemetry.telemetry import Telemetry

LINES = 100
INPUT = b"".join(line(f"id-{n}", input=f"text {n}") for n in range(1, LINES + 1))


class Moved(Clock):
    """A clock that can be moved on."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0.0

    def __call__(self) -> float:
        return super().__call__() + self.ahead


async def test_every_line_is_answered_in_order(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint(), batch_chunk_size=16)
    batch = await ended(batches, await create(batches, await upload(batches, INPUT)))
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.total, batch.progress.completed, batch.progress.failed) == (LINES, LINES, 0)
    assert batch.progress.tokens == 3 * LINES
    assert batch.model == "light"
    assert batch.error_file_id is None
    entries = await content(batches, batch.output_file_id)
    assert [entry["custom_id"] for entry in entries] == [f"id-{n}" for n in range(1, LINES + 1)]
    assert len({entry["id"] for entry in entries}) == LINES
    for number, entry in enumerate(entries, 1):
        assert entry["error"] is None
        assert entry["response"]["status_code"] == 200
        assert entry["response"]["body"]["digest"] in answer({"input": f"text {number}"}).body.decode()
    assert (await batches.file(str(batch.output_file_id))).purpose == "batch_output"
    await batches.close()


async def test_lines_that_fail_go_to_the_errors(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint(), batch_chunk_size=5)
    given = b"".join(line(str(n), **({"refuse": True} if n % 3 == 0 else {"input": n})) for n in range(10))
    batch = await ended(batches, await create(batches, await upload(batches, given)))
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (6, 4)
    assert [entry["custom_id"] for entry in await content(batches, batch.output_file_id)] == list("124578")
    failed = await content(batches, batch.error_file_id)
    assert [entry["custom_id"] for entry in failed] == list("0369")
    assert failed[0]["response"]["status_code"] == 400
    assert failed[0]["response"]["body"] == {"error": {"message": "refused"}}
    await batches.close()


async def test_where_every_line_fails_there_is_no_output(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint())
    batch = await ended(batches, await create(batches, await upload(batches, line("a", refuse=True))))
    assert (batch.status, batch.output_file_id, batch.errors) == (BatchStatus.COMPLETED, None, ())
    assert len(await content(batches, batch.error_file_id)) == 1
    await batches.close()


@pytest.mark.parametrize("chunk_size", [1, 2, 1000])
async def test_a_line_is_never_asked_for_twice(tmp_path: Path, chunk_size: int) -> None:
    endpoint = LightEndpoint()
    batches = opened(tmp_path, endpoint, batch_chunk_size=chunk_size)
    assert (await ended(batches, await create(batches, await upload(batches, INPUT)))).errors == ()
    assert endpoint.answered == list(range(1, LINES + 1))
    await batches.close()


async def test_a_cancelled_batch_keeps_what_is_done(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint(allowed=40), batch_chunk_size=8)
    batch_id = await create(batches, await upload(batches, INPUT))
    await progressed(batches, batch_id, 40)
    cancelled = await batches.cancel(batch_id)
    assert cancelled.status is BatchStatus.CANCELLING
    batch = await ended(batches, batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    assert batch.cancelled_at >= batch.cancelling_at
    assert [entry["custom_id"] for entry in await content(batches, batch.output_file_id)] == [
        f"id-{n}" for n in range(1, 41)
    ]
    with pytest.raises(BatchConflict, match="cancelled already"):
        await batches.cancel(batch_id)
    await batches.close()


async def test_what_waits_for_its_turn_is_cancelled_at_once(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint(allowed=0), batches_max_active=1)
    file_id = await upload(batches, INPUT)
    first, second = await create(batches, file_id), await create(batches, file_id)
    await batches.cancel(second)
    batch = await ended(batches, second)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchStatus.CANCELLED, None, None)
    assert not (await batches.get(first)).ended
    await batches.close()


async def test_what_is_not_done_in_time_goes_to_the_errors(tmp_path: Path) -> None:
    clock = Moved()
    batches = opened(tmp_path, LightEndpoint(allowed=40), clock, batch_chunk_size=8)
    batch_id = await create(batches, await upload(batches, INPUT), window=3600.0)
    await progressed(batches, batch_id, 40)
    clock.ahead = 3601.0
    batch = await ended(batches, batch_id)
    assert batch.status is BatchStatus.EXPIRED
    assert batch.expired_at is not None
    assert (batch.progress.completed, batch.progress.failed) == (40, 60)
    assert len(await content(batches, batch.output_file_id)) == 40
    failed = await content(batches, batch.error_file_id)
    assert [entry["custom_id"] for entry in failed] == [f"id-{n}" for n in range(41, LINES + 1)]
    assert {entry["error"]["code"] for entry in failed} == {"batch_expired"}
    assert {entry["response"] for entry in failed} == {None}
    await batches.close()


async def test_a_batch_that_expires_before_its_turn_loses_no_line(tmp_path: Path) -> None:
    clock = Moved()
    batches = opened(tmp_path, None, clock)
    batch_id = await create(batches, await upload(batches, INPUT), window=3600.0)
    clock.ahead = 4000.0
    batches.start({URL: LightEndpoint(allowed=0)})
    batch = await ended(batches, batch_id)
    assert (batch.status, batch.output_file_id) == (BatchStatus.EXPIRED, None)
    assert len(await content(batches, batch.error_file_id)) == LINES
    await batches.close()


async def test_a_clock_set_back_neither_lengthens_nor_ends_a_batch(tmp_path: Path) -> None:
    """Two days are lost between two starts; monotonic time goes on as it does."""
    now = 1_800_000_000.0
    before = opened(tmp_path, LightEndpoint(allowed=40), Clock(lambda: now, lambda: 0.0), batch_chunk_size=8)
    batch_id = await create(before, await upload(before, INPUT), window=3600.0)
    await progressed(before, batch_id, 40)
    await before.close()
    uptime = 0.0
    after = opened(tmp_path, LightEndpoint(allowed=40), Clock(lambda: now - 172_800.0, lambda: uptime))
    assert not (await after.get(batch_id)).ended
    uptime = 3600.0
    batch = await ended(after, batch_id)
    assert batch.status is BatchStatus.EXPIRED
    assert batch.expired_at is not None
    assert batch.expired_at >= now + 3600.0
    await after.close()


async def test_the_next_server_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first_endpoint, second_endpoint = LightEndpoint(allowed=40), LightEndpoint()
    first = opened(tmp_path, first_endpoint, batch_chunk_size=8)
    batch_id = await create(first, await upload(first, INPUT))
    done = (await progressed(first, batch_id, 40)).progress.lines
    await asyncio.wait_for(first.close(), 2.0)
    second = opened(tmp_path, second_endpoint, batch_chunk_size=8)
    batch = await ended(second, batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert second_endpoint.answered == list(range(done + 1, LINES + 1))
    assert len(await content(second, batch.output_file_id)) == LINES
    await second.close()


async def test_two_servers_on_one_folder_never_run_the_same_batch(tmp_path: Path) -> None:
    endpoints = [LightEndpoint(), LightEndpoint()]
    servers = [opened(tmp_path, endpoint, batch_chunk_size=8, batches_max_active=2) for endpoint in endpoints]
    file_id = await upload(servers[0], INPUT)
    created = [await create(servers[n % 2], file_id) for n in range(8)]
    for batch_id in created:
        batch = await ended(servers[0], batch_id)
        assert len(await content(servers[1], batch.output_file_id)) == LINES
    assert sum(len(endpoint.answered) for endpoint in endpoints) == 8 * LINES
    for server in servers:
        await server.close()


async def test_another_server_takes_over(tmp_path: Path) -> None:
    stuck, other = opened(tmp_path, LightEndpoint(allowed=40)), opened(tmp_path, None)
    batch_id = await create(stuck, await upload(stuck, INPUT))
    other.start({URL: LightEndpoint()})
    await stuck.close()
    batch = await ended(other, batch_id)
    assert (batch.status, batch.progress.completed) == (BatchStatus.COMPLETED, LINES)
    await other.close()


async def test_a_broken_record_harms_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = opened(tmp_path, None)
    file_id = await upload(batches, INPUT)
    broken, whole = await create(batches, file_id), await create(batches, file_id)
    (tmp_path / "batches" / broken / "batch.json").write_bytes(b"{")
    batches.start({URL: LightEndpoint()})
    assert (await ended(batches, whole)).status is BatchStatus.COMPLETED
    with pytest.raises(NoSuchBatch):
        await batches.get(broken)
    assert [record.id for record in await all_of(batches)] == [whole]
    assert len([entry for entry in caplog.records if "cannot be read" in entry.message]) == 1
    await batches.close()


@pytest.mark.parametrize("changed", ["gone", "cut", "replaced"])
async def test_an_input_that_changes_under_a_batch_fails_it_and_keeps_what_is_done(
    tmp_path: Path, changed: str
) -> None:
    batches = opened(tmp_path, LightEndpoint(allowed=40), batch_chunk_size=8)
    file_id = await upload(batches, INPUT)
    batch_id = await create(batches, file_id)
    await progressed(batches, batch_id, 40)
    await batches.close()
    path = batches.path_of(file_id)
    if changed == "gone":
        os.unlink(path)
    else:
        write_atomically(path, INPUT[:2000] if changed == "cut" else b"\n" * len(INPUT))
    again = opened(tmp_path, LightEndpoint())
    batch = await ended(again, batch_id)
    assert batch.status is BatchStatus.FAILED
    assert batch.errors[0].code == "input_file_changed"
    assert len(await content(again, batch.output_file_id)) == 40
    await again.close()


async def test_answers_that_a_broken_disk_has_lost_are_given_again(tmp_path: Path) -> None:
    batches = opened(tmp_path, LightEndpoint(allowed=40), batch_chunk_size=8)
    batch_id = await create(batches, await upload(batches, INPUT))
    await progressed(batches, batch_id, 40)
    await batches.close()
    (tmp_path / "batches" / batch_id / "output.jsonl").write_bytes(b"")
    again = opened(tmp_path, LightEndpoint())
    batch = await ended(again, batch_id)
    entries = await content(again, batch.output_file_id)
    assert [entry["custom_id"] for entry in entries] == [f"id-{n}" for n in range(1, LINES + 1)]
    assert batch.progress.completed == LINES
    await again.close()


async def test_ids_that_are_none_lead_nowhere(tmp_path: Path) -> None:
    batches = opened(tmp_path, None)
    for wrong in ("", "..", "../lock", "file-", "file-" + "0" * 32, "batch_" + "0" * 32, "batch_../../etc", "file-\n"):
        with pytest.raises(NoSuchFile):
            await batches.file(wrong)
        with pytest.raises(NoSuchBatch):
            await batches.get(wrong)


async def test_where_nothing_can_be_kept_every_call_says_so(tmp_path: Path) -> None:
    batches = BatchService(BatchSettings(), LONGEST_LINE, Telemetry())
    with pytest.raises(StateUnavailable, match="starting"):
        await all_of(batches)
    batches.open(tmp_path, f"STATE_DIR={tmp_path} cannot be written (Read-only file system).")
    batches.start({URL: LightEndpoint()})
    with pytest.raises(StateUnavailable, match="cannot be written"):
        await batches.upload(0)
    with pytest.raises(StateUnavailable, match="cannot be written"):
        await batches.get("batch_" + "0" * 32)
    await batches.close()
