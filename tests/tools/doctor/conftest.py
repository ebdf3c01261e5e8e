"""No hub, and nothing of what whoever runs the tests has fetched from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from vecmill.tools.doctor import probing


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no asking; `hub_here` in a test has a hub all the same."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def recorded_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes answer what RECORDED_PROBES holds, whatever this machine's torch can do."""
    monkeypatch.setattr(probing, "COMMAND", (sys.executable, str(Path(__file__).with_name("recorded_probes.py"))))
