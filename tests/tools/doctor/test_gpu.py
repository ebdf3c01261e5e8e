"""A recorded card, through a driver library that answers as the card did, beside a torch that cannot use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10, H100
from tests.tools.doctor.command_line import check, checks, doctor
from vecmill.tools.doctor.context import nvidia_cards

CPU_ONLY = {"version": "2.13.0+cpu", "cuda": None, "cuda_error": None}
NO_DRIVER = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "cuda_error": "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a "
    "driver from http://www.nvidia.com/Download/index.aspx",
}


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's library, with no card unless FAKE_NVML names a recording."""
    fake_nvml.load()
    monkeypatch.delenv("FAKE_NVML", raising=False)


def built(build: Mapping[str, str | None]) -> str:
    """RECORDED_PROBES of a torch that can use no GPU."""
    return json.dumps({"build": {**build, "hip": None, "arch_list": [], "gpus": []}})


@pytest.mark.usefixtures("recorded_probes")
def test_a_gb10_beside_a_torch_without_cuda() -> None:
    """What a Spark looks like when torch was installed from the wrong place."""
    names = ("torch", "driver", "gpu", "clock", "allocation", "compile")
    results = checks(*names, FAKE_NVML=str(GB10), RECORDED_PROBES=built(CPU_ONLY))
    assert {name: result["status"] for name, result in results.items()} == {
        "torch": "fail",
        "driver": "ok",
        "gpu": "ok",
        "clock": "warn",
        "allocation": "ok",
        "compile": "ok",
    }
    assert "CPU-only build, beside an NVIDIA GPU" in results["torch"]["seen"]
    assert "pip install --force-reinstall 'torch>=2.11'" in results["torch"]["cure"]
    assert "DEVICE=cpu" in results["torch"]["cure"]
    assert results["driver"]["seen"] == "driver 580.173.02, for CUDA up to 13.0"
    assert "5 are not available, which is normal for it" in results["gpu"]["seen"]
    assert results["gpu"]["details"]["memory_total_mb"] == "not available: this GPU does not have it"
    assert "cannot put a load on the GPU" in results["clock"]["seen"]
    assert results["clock"]["cure"] == "See the check torch."


@pytest.mark.usefixtures("recorded_probes")
def test_a_gb10_beside_a_torch_that_finds_no_driver() -> None:
    """In a container that was given NVML's library and not CUDA's."""
    results = checks("torch", "clock", FAKE_NVML=str(GB10), RECORDED_PROBES=built(NO_DRIVER))
    assert {name: result["status"] for name, result in results.items()} == {"torch": "fail", "clock": "warn"}
    assert "CUDA 13.0, cannot use the GPU: Found no NVIDIA driver on your system" in results["torch"]["seen"]
    assert "nvidia-smi (see the check driver)" in results["torch"]["cure"]
    assert "DEVICE=cpu" in results["torch"]["cure"]


def test_device_cpu_is_a_choice() -> None:
    results = checks("torch", "clock", FAKE_NVML=str(GB10), DEVICE="cpu")
    assert {result["status"] for result in results.values()} == {"ok"}
    assert "DEVICE=cpu leaves the GPU unused" in results["torch"]["seen"]


def test_fp8_on_a_card_without_it(tmp_path: Path) -> None:
    ampere = tmp_path / "ampere.txt"
    ampere.write_text(re.sub(r"(?m)^compute_capability .*$", "compute_capability 8.6", H100.read_text()))
    result = check("gpu", FAKE_NVML=str(ampere), DTYPE="fp8")
    assert result["status"] == "fail"
    assert result["seen"].endswith("is of 8.6")
    assert result["cure"] == "Set DTYPE to auto, bfloat16 or float32."
    assert check("gpu", FAKE_NVML=str(GB10), DTYPE="fp8")["status"] == "ok"
    assert check("gpu", DTYPE="fp8", DEVICE="auto")["status"] == "fail"


def test_people_see_every_field() -> None:
    printed = doctor("--only", "gpu", FAKE_NVML=str(GB10)).stdout
    assert "\n                  sm_clock_mhz: 2190\n" in printed
    assert "\n                  power_limit_watts: not available: this GPU does not have it\n" in printed


def test_a_gb10_s_memory_is_the_machine_s() -> None:
    results = checks("memory", "models", FAKE_NVML=str(GB10))
    assert results["memory"]["details"]["unified"] is True
    assert "the GPU shares it with the machine" in results["memory"]["seen"]
    assert results["models"]["status"] == "warn"
    assert "until it is, the small bundled model is served" in results["models"]["seen"]
    assert "until it is, documents are ranked by cosine" in results["models"]["seen"]
    assert "vecmill pull Qwen/Qwen3-Embedding-4B" in results["models"]["cure"]


def test_a_card_with_memory_of_its_own() -> None:
    results = checks("gpu", "memory", FAKE_NVML=str(H100))
    assert results["gpu"]["seen"] == "NVIDIA H100 80GB HBM3: 17 fields"
    details = results["memory"]["details"]
    assert (details["unified"], details["total_bytes"], details["floor_bytes"]) == (False, 81559 << 20, 0)
    assert "78.6 GB of 79.6 are available (the GPU's own)" in results["memory"]["seen"]


def test_a_field_that_a_card_should_have(tmp_path: Path) -> None:
    recording = tmp_path / "recording.txt"
    recording.write_text(re.sub("^temperature.*\n", "", H100.read_text(), flags=re.M))
    result = check("gpu", FAKE_NVML=str(recording))
    assert (result["status"], result["seen"].endswith("temperature_c should be")) == ("warn", True)


def test_cards_on_the_bus(tmp_path: Path) -> None:
    bus = tmp_path / "sys/bus/pci/devices"
    for name, vendor, kind in (
        ("0000:00:02.0", "0x8086", "0x030000"),
        ("000f:01:00.0", "0x10de", "0x030200"),
        ("000f:01:00.1", "0x10de", "0x040300"),
    ):
        (bus / name).mkdir(parents=True)
        (bus / name / "vendor").write_text(f"{vendor}\n")
        (bus / name / "class").write_text(f"{kind}\n")
    assert nvidia_cards(tmp_path) == ["000f:01:00.0"]
    assert nvidia_cards(tmp_path / "elsewhere") == []
