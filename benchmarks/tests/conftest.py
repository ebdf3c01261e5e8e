"""The benchmarks are tested without the settings of whoever runs the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.lib.servers import RunningServer, free_port, running, vecmill_command
from vecmill.config.settings import GROUPS


@pytest.fixture(scope="session", autouse=True)
def hermetic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """None of the settings of the environment; models run eagerly, for compiling takes seconds at each start."""
    with pytest.MonkeyPatch.context() as patch:
        for group in GROUPS:
            for name in group.model_fields:
                patch.delenv(name.upper(), raising=False)
        patch.setenv("TORCH_COMPILE", "false")
        patch.setenv("CACHE_MAX_BYTES", "0")
        patch.setenv("STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """`vecmill serve` on the bundled model, as a user starts it."""
    port = free_port()
    with running(vecmill_command(port), port, "/ready") as server:
        yield server
