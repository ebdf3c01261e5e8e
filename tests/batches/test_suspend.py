"""A server that stops leaves its batches so that no line is done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.batches.light import LightEndpoint, content, create, ended, line, opened, progressed, upload
from vecmill.batches import runner

LINES = 400


async def test_what_was_begun_with_is_finished_and_the_rest_left(tmp_path: Path) -> None:
    first, second = LightEndpoint(), LightEndpoint()
    batches = opened(tmp_path, first, batch_chunk_size=4)
    file_id = await upload(batches, b"".join(line(str(number), input="x") for number in range(LINES)))
    batch_id = await create(batches, file_id)
    await progressed(batches, batch_id, 8)
    await batches.suspend()
    left = await batches.get(batch_id)
    assert 8 <= left.progress.lines == len(first.answered) < LINES
    await batches.close()

    batches = opened(tmp_path, second, batch_chunk_size=4)
    batch = await ended(batches, batch_id)
    assert first.answered + second.answered == list(range(1, LINES + 1))
    assert len(await content(batches, batch.output_file_id)) == LINES
    await batches.close()


async def test_what_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUSPEND_SECONDS", 0.05)
    stuck, second = LightEndpoint(allowed=8), LightEndpoint()
    batches = opened(tmp_path, stuck, batch_chunk_size=4)
    file_id = await upload(batches, b"".join(line(str(number), input="x") for number in range(20)))
    batch_id = await create(batches, file_id)
    await progressed(batches, batch_id, 8)
    await batches.suspend()
    assert (await batches.get(batch_id)).progress.lines == 8
    await batches.close()
    batches = opened(tmp_path, second, batch_chunk_size=4)
    await ended(batches, batch_id)
    assert second.answered == list(range(9, 21))
    await batches.close()
