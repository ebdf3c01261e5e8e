"""Which weights are served, where a folder has several."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.checkpoints.variants import Served, Variant, refusal, served
from tests.tiny_checkpoints import tiny_bert
from vecmill.models.source import find


def bert(folder: Path) -> None:
    tiny_bert(folder, find("auto").folder)


VARIANTS = [
    Variant("bert", bert),
]
SERVED = [one for one in VARIANTS if one.refused is None]
REFUSED = [one for one in VARIANTS if one.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("variants")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    assert variant.refused is not None
    assert variant.refused in refusal(variant.write(tmp_path), rerank=variant.rerank)
