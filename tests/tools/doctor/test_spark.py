"""Every check on a DGX Spark: its driver and its probes answer as recorded, all else is this machine."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10
from tests.tools.doctor.command_line import Check, checks
from vecmill.hardware.nvml import reading
from vecmill.tools.doctor.checks import gpu

GB = 1 << 30
NAMES = ("torch", "driver", "gpu", "matmul", "clock", "memory", "allocation", "attention", "compile")
PROBES: dict[str, Any] = {
    "build": {
        "version": "2.15.0+cu132",
        "cuda": "13.2",
        "hip": None,
        "arch_list": ["sm_80", "sm_90", "sm_100", "sm_110", "sm_120"],
        "gpus": [{"name": "NVIDIA GB10", "capability": [12, 1], "uuid": "GPU-6e0b2f7c-0000-4000-8000-00000000gb10"}],
        "cuda_error": None,
    },
    "memory": {"free": 1 * GB, "total": 121 * GB, "integrated": True},
    "matmul": {"device": "cuda:0", "dtype": "bfloat16", "size": 4096, "tflops": [87.1, 88.4, 88.9]},
    "load": {"seconds": 5.02, "tflops": 87.9},
    "allocation": {
        "cap": GB,
        "requested": int(1.1 * GB),
        "refused": "OutOfMemoryError",
        "seconds": 0.01,
        "works_after": True,
    },
    "attention": {
        "varlen": True,
        "dtype": "bfloat16",
        "rows": 72,
        "tokens": 10056,
        "largest_difference": 0.0078,
        "seconds": 0.0005,
        "sdpa_seconds": 0.004,
    },
    "compiling": {"seconds": 4.2, "largest_difference": 2e-7},
}


@pytest.fixture
def spark(tmp_path: Path, recorded_probes: None) -> Any:
    """Runs the checks on it, with some lines of the driver's and some of the probes' answers changed."""
    fake_nvml.load()

    def run(clock_mhz: int = 2190, names: Sequence[str] = NAMES, **changes: Any) -> dict[str, Check]:
        recording = tmp_path / "recording.txt"
        recording.write_text(GB10.read_text().replace("sm_clock 2190", f"sm_clock {clock_mhz}"))
        probes = json.dumps({**PROBES, **changes})
        return checks(*names, FAKE_NVML=str(recording), RECORDED_PROBES=probes, TORCH_COMPILE="auto")

    return run


def statuses(results: dict[str, Check]) -> set[str]:
    """What is not well, but for this machine's swap."""
    if results["memory"]["details"]["swap_bytes"] and results["memory"]["status"] == "warn":
        results = {name: result for name, result in results.items() if name != "memory"}
    return {f"{name} {result['status']}" for name, result in results.items() if result["status"] != "ok"}


def test_a_healthy_one(spark: Any) -> None:
    results = spark()
    assert statuses(results) == set(), results
    assert "88.4 TFLOPS" in results["matmul"]["seen"]
    assert results["clock"]["seen"].startswith("2190 to 2190 MHz under load, 82.4 W, 71 °C")
    assert results["clock"]["details"]["readings"] > 0
    assert "cudaMemGetInfo says that 1.0 GB are free" in results["memory"]["seen"]
    assert "refused with OutOfMemoryError in 0.01 s" in results["allocation"]["seen"]
    assert "8.0 times as fast" in results["attention"]["seen"]
    assert results["compile"]["details"]["compiler"].endswith("gcc")


def test_one_with_a_power_supply_in_a_slow_state(spark: Any) -> None:
    results = spark(612, matmul={**PROBES["matmul"], "tflops": [18.1, 18.2, 18.2]})
    assert statuses(results) == {"matmul fail", "clock fail"}
    assert "unplug the supply from the wall" in results["clock"]["cure"]


def test_one_with_probes_that_fail(spark: Any) -> None:
    results = spark(
        compiling={"error": {"type": "RuntimeError", "message": "ptxas fatal: sm_121a is not defined"}},
        attention={"error": {"type": "ImportError", "message": "No module named 'torch.nn.attention.varlen'"}},
        allocation={**PROBES["allocation"], "refused": None},
    )
    assert statuses(results) == {"compile fail", "attention fail", "allocation fail"}
    assert results["attention"]["cure"] == "See the check torch: torch.nn.attention.varlen needs 2.11 or newer."
    assert "sm_121a is not defined" in results["compile"]["seen"]
    assert "TORCH_COMPILE=false" in results["compile"]["cure"]


def test_one_without_what_layers_are_compiled_with(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There compiled layers are required, by TORCH_COMPILE=auto too: the cure names the packages of this Python."""
    dev = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: {"include": str(empty)})
        headers = spark(names=("compile",))["compile"]
        patch.setenv("PATH", str(empty))
        both = spark(names=("compile",))["compile"]
    assert (headers["status"], both["status"]) == ("fail", "fail")
    assert "Python.h not found, and the layers run in eager mode on the GPU" in headers["seen"]
    assert headers["cure"].startswith(f"sudo apt install {dev}, or set TORCH_COMPILE=false")
    assert "a C compiler and Python.h not found" in both["seen"]
    assert both["cure"].startswith(f"sudo apt install gcc {dev}, ")
    (empty / "cc").write_text("#!/bin/sh\n")  # by itself of no use to Triton, which looks for gcc and clang
    (empty / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(empty))
    assert "a C compiler not found" in spark(names=("compile",))["compile"]["seen"]


def test_a_driver_that_hangs_under_load(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LOOK_SECONDS", 0.1)
    looked: list[object] = []

    def hang(uuid: str | None) -> object:
        looked.append(uuid)
        (tmp_path / "recording.txt").write_text("hang\n")
        return reading(uuid)

    monkeypatch.setattr("vecmill.tools.doctor.checks.gpu.reading", hang)
    result = spark(names=("clock",))["clock"]
    (tmp_path / "recording.txt").write_text(GB10.read_text())  # whoever still waits goes on
    assert (result["status"], len(looked)) == ("fail", 1)
    assert "did not answer within 0 s under load" in result["seen"]
    assert "nvidia-smi" in result["cure"]
