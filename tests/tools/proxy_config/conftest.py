"""Servers that know nothing of each other: without Redis, each with a state folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.service import Service, service
from tests.tiny_checkpoints import tiny_bert
from tests.tools.proxy_config.proxies import KINDS, Proxy, program, proxy

NewServices = Callable[..., list[Service]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    """A model of 32 dimensions that takes 64 tokens."""
    return tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)


def started(stack: ExitStack, model: Path, folder: Path, count: int, settings: dict[str, str]) -> list[Service]:
    """So many servers that are ready."""
    services = []
    for number in range(count):
        state = folder / f"state-{number}"
        state.mkdir()
        services.append(stack.enter_context(service(model, state, folder / f"log-{number}", settings)))
    for each in services:
        each.launch()
    for each in services:
        each.wait_until_ready()
    return services


@pytest.fixture
def new_services(tiny_model: Path, tmp_path: Path) -> Iterator[NewServices]:
    """Makes servers that are the test's own, and ready."""
    with ExitStack() as stack:

        def make(count: int, **settings: str) -> list[Service]:
            return started(stack, tiny_model, tmp_path, count, settings)

        yield make


@pytest.fixture(scope="module")
def replicas(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """Two that no test stops."""
    settings = {"MAX_BODY_BYTES": "200000", "MAX_FILE_BYTES": "1000000", "LOG_FORMAT": "json", "LOG_LEVEL": "debug"}
    settings |= {"TRUSTED_PROXIES": "127.0.0.1", "CACHE_MAX_BYTES": "0"}
    with ExitStack() as stack:
        yield started(stack, tiny_model, tmp_path_factory.mktemp("replicas"), 2, settings)


LIMITS = ("--max-body-bytes", "200000", "--max-file-bytes", "1000000")


@pytest.fixture(scope="module", params=KINDS)
def behind(
    request: pytest.FixtureRequest, replicas: Sequence[Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy of each kind in front of the two."""
    program(request.param)
    urls = [each.url for each in replicas]
    with proxy(request.param, tmp_path_factory.mktemp(request.param), urls, *LIMITS) as running:
        yield running
