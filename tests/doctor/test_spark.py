"""Every check on a DGX Spark: its driver and its probes answer as recorded, all else is this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.command_line import Check, checks
from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10

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
        "asked": int(1.1 * GB),
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

    def run(clock_mhz: int = 2190, **changes: Any) -> dict[str, Check]:
        recording = tmp_path / "recording.txt"
        recording.write_text(GB10.read_text().replace("sm_clock 2190", f"sm_clock {clock_mhz}"))
        probes = json.dumps({**PROBES, **changes})
        return checks(*NAMES, FAKE_NVML=str(recording), RECORDED_PROBES=probes, TORCH_COMPILE="true")

    return run


def statuses(found: dict[str, Check]) -> set[str]:
    """What is not well, but for this machine's swap."""
    if found["memory"]["details"]["swap_bytes"] and found["memory"]["status"] == "warn":
        found = {name: one for name, one in found.items() if name != "memory"}
    return {f"{name} {one['status']}" for name, one in found.items() if one["status"] != "ok"}


def test_a_healthy_one(spark: Any) -> None:
    found = spark()
    assert statuses(found) == set(), found
    assert "88.4 TFLOPS" in found["matmul"]["seen"]
    assert found["clock"]["seen"].startswith("2190 to 2190 MHz under load, 82.4 W, 71 °C")
    assert found["clock"]["details"]["readings"] > 0
    assert "cudaMemGetInfo says that 1.0 GB are free" in found["memory"]["seen"]
    assert "refused with OutOfMemoryError in 0.01 s" in found["allocation"]["seen"]
    assert "8.0 times as fast" in found["attention"]["seen"]
    assert found["compile"]["details"]["compiler"].endswith("gcc")


def test_one_with_a_power_supply_in_a_slow_state(spark: Any) -> None:
    found = spark(612, matmul={**PROBES["matmul"], "tflops": [18.1, 18.2, 18.2]})
    assert statuses(found) == {"matmul fail", "clock fail"}
    assert "unplug the supply from the wall" in found["clock"]["cure"]


def test_one_with_probes_that_fail(spark: Any) -> None:
    found = spark(
        compiling={"error": {"type": "RuntimeError", "message": "ptxas fatal: sm_121a is not defined"}},
        attention={"error": {"type": "ImportError", "message": "No module named 'torch.nn.attention.varlen'"}},
        allocation={**PROBES["allocation"], "refused": None},
    )
    assert statuses(found) == {"compile fail", "attention fail", "allocation fail"}
    assert "sm_121a is not defined" in found["compile"]["seen"]
    assert "TORCH_COMPILE=false" in found["compile"]["cure"]
