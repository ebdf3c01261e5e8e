"""A small model, and servers of it that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.service import Service, service
from tests.tiny_checkpoints import tiny_bert

NewService = Callable[..., Service]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    """A model of 32 dimensions that takes 64 tokens."""
    return tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)


@pytest.fixture
def new_service(tiny_model: Path, tmp_path: Path) -> Iterator[NewService]:
    """Makes servers, each on the folder `state` and with a log of its own unless said otherwise; none is started."""
    state = tmp_path / "state"
    state.mkdir()
    with ExitStack() as stack:
        count = iter(range(100))

        def make(settings: dict[str, str] | None = None, **others: Any) -> Service:
            log = tmp_path / f"log-{next(count)}"
            return stack.enter_context(service(tiny_model, state, log, settings, **others))

        yield make
