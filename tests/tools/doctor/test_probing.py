"""The process of the probes: its failures are findings, and the next probe has a new one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.doctor.command_line import checks
from vecmill.engine.probes.results import ClaimedMemory, Load, TorchBuild
from vecmill.tools.doctor.probing import ProbeFailed, Prober


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    with Prober() as prober:
        yield prober


def probe_build(prober: Prober) -> TorchBuild:
    return prober.ask("build", "cpu", TorchBuild, 60)


def test_a_probe_that_raises(prober: Prober) -> None:
    with pytest.raises(ProbeFailed) as failed:
        prober.ask("memory", "cuda:77", ClaimedMemory, 60)
    assert failed.value.kind in ("AssertionError", "RuntimeError", "AcceleratorError")
    assert probe_build(prober).version


def test_a_probe_that_takes_too_long_is_ended(prober: Prober) -> None:
    looks: list[None] = []
    with pytest.raises(ProbeFailed, match=r"TimeoutError: no result within 0\.5 s"):
        prober.ask("load", "cpu", Load, 0.5, lambda: looks.append(None))
    assert looks
    assert probe_build(prober).version


def test_a_process_that_dies() -> None:
    with Prober() as prober:
        with pytest.raises(ProbeFailed, match="SIGSEGV"):
            prober.ask("load", "cpu", Load, 60, lambda: os.kill(prober.pid or 0, signal.SIGSEGV))
        assert prober.pid is None


def test_a_torch_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = checks("torch", "matmul", "memory")
    assert {name: result["status"] for name, result in results.items()} == {
        "torch": "fail",
        "matmul": "warn",
        "memory": "ok",
    }
    assert "libcudart.so.13" in results["torch"]["seen"]
    assert "pip install --force-reinstall" in results["torch"]["cure"]
    assert results["matmul"]["cure"] == "See the check torch."
