"""A batches API that does as a test says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.embed.batch_server import BatchServer, batch_server


@pytest.fixture
def batch_api() -> Iterator[BatchServer]:
    with batch_server() as served:
        yield served
