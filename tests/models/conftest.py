"""What tests of models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from vecmill.models import packing
from vecmill.models.packing import Attention


@pytest.fixture
def on_cpu_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Packs and attends as on a CPU of that capability."""

    def be(capability: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        packing.scores_at_once.cache_clear()

    yield be
    packing.scores_at_once.cache_clear()


@pytest.fixture(params=["AVX2", "AVX512", Attention.PRODUCTS])
def any_way(request: pytest.FixtureRequest, on_cpu_with: Callable[[str], None]) -> Attention:
    """What packs are made for: torch's kernel on any CPU, or products."""
    if request.param is Attention.PRODUCTS:
        return Attention.PRODUCTS
    on_cpu_with(request.param)
    return Attention.SDPA
