"""Fixtures with real parts: the bundled weights, a server in a process of its own, an app in this one."""

from __future__ import annotations

import gc
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import hypothesis
import pytest

from tests import kinds
from tests.in_process import InProcess
from tests.preloaded import SHORT_WARM_UP, share_between_workers
from tests.servers import RunningServer, free_port, running, vecmill_command
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.config.settings import GROUPS
from vecmill.models.source import find

# How long one example takes is no property of the code: a machine may be busy.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# A run under nohup ignores SIGHUP, and so would every server that it starts.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest-xdist starts workers, have them fork their servers from one process."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        share_between_workers()


def pytest_collection() -> None:
    """Collect no garbage meanwhile: there is none, and what is imported is looked through again and again."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a process, a browser, an application or a reference library."""
    kinds.mark(items)


def pytest_collection_finish() -> None:
    """Spare every later garbage collection the millions of objects of modules and tests."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def hermetic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """None of the settings of whoever runs the tests: neither environment nor `.env`.

    Layers are eager unless a test says otherwise: compiling them takes seconds at each start. No vector is kept, except
    in tests of that. Warm-up is short, as in servers.
    """
    with pytest.MonkeyPatch.context() as patch:
        for group in GROUPS:
            for name in group.model_fields:
                patch.delenv(name.upper(), raising=False)
            patch.setitem(group.model_config, "env_file", None)
        for constant, value in SHORT_WARM_UP.items():
            patch.setattr(constant, value)
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


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The bundled model's files."""
    return find("auto").folder


@asynccontextmanager
async def serving(**flags: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, its model loaded in float32.

    Forward passes are small unless a test says otherwise: warm-up runs the largest, which takes seconds at each start.
    """
    with tempfile.TemporaryDirectory() as state:
        common = {"dtype": "float32", "device": "cpu", "max_batch_tokens": 128, "state_dir": state}
        app = create_app(load_settings({**common, **flags}))
        async with app.router.lifespan_context(app):
            await app.state.loading
            transport = InProcess(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                yield client


@pytest.fixture(scope="session")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """The shared in-process application, with default limits."""
    async with serving() as client:
        yield client


Sharing = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Sharing]:
    """`serving`, but one application for all tests of a file that ask with the same settings.

    For tests that neither mind nor leave behind jobs, files, cached vectors or counts.
    """
    clients: dict[tuple[tuple[str, object], ...], httpx.AsyncClient] = {}
    async with AsyncExitStack() as stack:

        async def client_of(**flags: object) -> httpx.AsyncClient:
            settings = tuple(sorted(flags.items()))
            if settings not in clients:
                clients[settings] = await stack.enter_async_context(serving(**flags))
            return clients[settings]

        yield client_of
