"""What tests of models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from vecmill.models import packing


@pytest.fixture
def on_cpu_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Packs and attends as on a CPU of that capability."""

    def be(capability: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        packing.scores_at_once.cache_clear()

    yield be
    packing.scores_at_once.cache_clear()
