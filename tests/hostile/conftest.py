"""One server with short time-outs and little room for bodies, for tests that speak to it by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.service import Service, service
from tests.tiny_checkpoints import tiny_bert

HEAD_TIMEOUT = BODY_TIMEOUT = 1
IDLE_TIMEOUT = 2
MAX_BODY_BYTES = 1_000_000
SETTINGS = {
    "HEAD_TIMEOUT": str(HEAD_TIMEOUT),
    "BODY_TIMEOUT": str(BODY_TIMEOUT),
    "IDLE_TIMEOUT": str(IDLE_TIMEOUT),
    "MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    "LOG_LEVEL": "debug",
}


@pytest.fixture(scope="session")
def wired(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[Service]:
    """It runs for all tests of this folder."""
    folder = tmp_path_factory.mktemp("wired")
    tiny = tiny_bert(folder / "tiny", minilm_folder)
    with service(tiny, folder / "state", folder / "log", SETTINGS) as server:
        server.start()
        yield server
        log = server.log()
        assert "unhandled error" not in log, log[log.index("unhandled error") :][:8000]
        assert "Traceback" not in log, log[log.index("Traceback") :][:8000]
