"""What recorded measurements mean: a healthy GB10, one that is held back, a wrong torch, other cards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vecmill.engine.probes.results import (
    AttentionComparison,
    ClaimedMemory,
    CompileTry,
    GpuSeen,
    Load,
    MatmulSpeed,
    Oversized,
    TorchBuild,
)
from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.memory_room import MemoryRoom
from vecmill.tools.doctor.checks import computing, gpu, installation, memory
from vecmill.tools.doctor.findings import Finding, FindingStatus

GB = 1 << 30
ARM = ("sm_80", "sm_90", "sm_100", "sm_110", "sm_120")
GB10 = GpuSeen("NVIDIA GB10", (12, 1), "GPU-1")
H100 = GpuSeen("NVIDIA H100 80GB HBM3", (9, 0), "GPU-2")
SPARK = TorchBuild("2.15.0+cu132", "13.2", None, ARM, (GB10,), None)
HEALTHY = GpuReading(
    name="NVIDIA GB10", utilization_percent=96, sm_clock_mhz=2190, temperature_c=71, power_watts=82.4, clock_reasons=()
)
LOAD = Load(5.0, 88.0)


def judged(build: TorchBuild, device: str = "auto", *, has_gpu: bool = True) -> Finding:
    return installation.judge_torch(build, device, has_gpu=has_gpu)


def speed(tflops: float) -> MatmulSpeed:
    return MatmulSpeed("cuda:0", "bfloat16", 4096, (tflops * 0.98, tflops, tflops * 1.01))


def test_a_healthy_gb10() -> None:
    finding = judged(SPARK)
    assert finding.status is FindingStatus.OK
    assert "NVIDIA GB10 (compute capability 12.1, by the code for sm_120)" in finding.seen
    assert gpu.judge_driver("580.173.02", "13.0", "13.2").status is FindingStatus.OK
    assert "torch's CUDA 13.2 runs on it" in gpu.judge_driver("580.173.02", "13.0", "13.2").seen
    assert gpu.judge_matmul(speed(88.4), GB10.name).status is FindingStatus.OK
    rising = replace(HEALTHY, sm_clock_mhz=1100)
    idle = replace(HEALTHY, sm_clock_mhz=208, utilization_percent=0)
    finding = gpu.judge_clock([idle, rising, HEALTHY, HEALTHY, HEALTHY], LOAD)
    assert (finding.status, finding.seen.startswith("1100 to 2190 MHz under load, 82.4 W, 71 °C")) == (
        FindingStatus.OK,
        True,
    )


def test_a_gb10_in_a_slow_power_state() -> None:
    finding = gpu.judge_matmul(speed(18.2), GB10.name)
    assert (finding.status, "18.2 TFLOPS" in finding.seen) == (FindingStatus.FAIL, True)
    slow = replace(HEALTHY, sm_clock_mhz=612, power_watts=17.0)
    finding = gpu.judge_clock([slow] * 9, LOAD)
    assert finding.status is FindingStatus.FAIL
    assert "612 MHz under load, 17 W" in finding.seen
    assert "unplug the supply from the wall and from the Spark for 60 seconds" in str(finding.cure)


def test_a_gb10_that_is_warm_is_a_warning() -> None:
    assert gpu.judge_matmul(speed(55.0), GB10.name).status is FindingStatus.WARN


def test_a_gb10_with_cuda_12() -> None:
    finding = judged(TorchBuild("2.12.0+cu128", "12.8", None, (*ARM, "compute_120"), (GB10,), None))
    assert (finding.status, "with CUDA 12" in finding.seen) == (FindingStatus.FAIL, True)
    assert gpu.judge_matmul(speed(11.9), GB10.name).status is FindingStatus.FAIL


def test_a_healthy_h100() -> None:
    build = TorchBuild("2.15.0+cu132", "13.2", None, ("sm_75", "sm_80", "sm_90"), (H100,), None)
    assert judged(build).status is FindingStatus.OK
    finding = gpu.judge_matmul(speed(640), H100.name)
    assert (finding.status, "65% of its peak of 989" in finding.seen) == (FindingStatus.OK, True)
    busy = GpuReading(name=H100.name, utilization_percent=99, sm_clock_mhz=1755, max_sm_clock_mhz=1980)
    assert gpu.judge_clock([busy], LOAD).status is FindingStatus.OK
    assert gpu.judge_clock([replace(busy, sm_clock_mhz=700)], LOAD).status is FindingStatus.FAIL
    assert gpu.judge_matmul(speed(300), H100.name).status is FindingStatus.WARN


def test_a_clock_that_nobody_can_read() -> None:
    assert gpu.judge_clock([], LOAD).status is FindingStatus.WARN
    assert gpu.judge_clock([replace(HEALTHY, utilization_percent=None)], LOAD).status is FindingStatus.WARN


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (TorchBuild("2.10.0", "13.0", None, ARM, (GB10,), None), "2.11 or newer is needed"),
        (TorchBuild("2.15.0+cpu", None, None, (), (), None), "CPU-only build, beside an NVIDIA GPU"),
        (TorchBuild("2.15.0", "13.2", None, (), (), "driver too old (found 12040)"), "driver too old (found 12040)"),
        (TorchBuild("2.15.0", "13.2", None, ("sm_80", "sm_90"), (GB10,), None), "no code for NVIDIA GB10"),
    ],
)
def test_a_torch_that_does_not_fit_the_gpu(build: TorchBuild, reason: str) -> None:
    finding = judged(build)
    assert (finding.status, reason in finding.seen) == (FindingStatus.FAIL, True), finding
    assert finding.cure


def test_no_gpu_is_no_fault() -> None:
    cpu = TorchBuild("2.15.0+cpu", None, None, (), (), None)
    assert judged(cpu, has_gpu=False).status is FindingStatus.OK
    assert judged(cpu, "cpu").status is FindingStatus.OK


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:1", "DEVICE=cuda:1, and it sees 1 GPU"),
        ("mps", "DEVICE=mps, and it sees no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there(device: str, reason: str) -> None:
    finding = judged(SPARK, device)
    assert (finding.status, reason in finding.seen) == (FindingStatus.FAIL, True)
    assert judged(SPARK, "cuda:0").status is FindingStatus.OK
    absent = judged(TorchBuild("2.15.0+cpu", None, None, (), (), None), "cuda", has_gpu=False)
    assert (absent.status, "there is no NVIDIA GPU" in absent.seen) == (FindingStatus.FAIL, True)


@pytest.mark.parametrize(
    ("capability", "arch", "runs"),
    [
        ((12, 1), "sm_120", True),
        ((12, 0), "sm_121", False),
        ((9, 0), "sm_90a", True),
        ((12, 1), "sm_120a", False),
        ((8, 6), "sm_80", True),
        ((9, 0), "sm_80", False),
        ((12, 1), "compute_90", True),
        ((8, 0), "compute_90", False),
        ((10, 3), "sm_100", True),
        ((9, 0), "gfx942", False),
    ],
)
def test_what_runs_on_what(capability: tuple[int, int], arch: str, runs: bool) -> None:
    assert installation.covered(capability, (arch,)) is runs


def test_drivers() -> None:
    assert gpu.judge_driver("570.10", "12.8", "13.0").status is FindingStatus.FAIL
    assert gpu.judge_driver("550.10", "12.4", "12.8").status is FindingStatus.OK
    assert gpu.judge_driver("470.10", "11.4", "12.8").status is FindingStatus.FAIL
    assert gpu.judge_driver("580.10", "13.0", None).status is FindingStatus.OK


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
    ],
)
def test_peaks_go_by_the_whole_name(card: str, peak: int | None) -> None:
    assert gpu.peak_of(card) == peak


def test_a_card_that_is_not_in_the_table_gets_no_verdict() -> None:
    finding = gpu.judge_matmul(speed(3), "NVIDIA T1000")
    assert (finding.status, "what it should give is not known" in finding.seen) == (FindingStatus.OK, True)


def test_allocations() -> None:
    refused = Oversized(GB, int(1.1 * GB), "OutOfMemoryError", 0.01, True)
    assert computing.judge_allocation(refused).status is FindingStatus.OK
    assert computing.judge_allocation(replace(refused, seconds=9.0)).status is FindingStatus.WARN
    assert computing.judge_allocation(replace(refused, refused=None)).status is FindingStatus.FAIL
    assert computing.judge_allocation(replace(refused, works_after=False)).status is FindingStatus.FAIL


def test_attention() -> None:
    varlen = AttentionComparison(True, "bfloat16", 72, 10_056, 0.0078, 0.0004, 0.004)
    finding = computing.judge_attention(varlen, used=True)
    assert (finding.status, "10.0 times as fast" in finding.seen) == (FindingStatus.OK, True)
    assert computing.judge_attention(replace(varlen, largest_difference=0.7), used=True).status is FindingStatus.FAIL
    assert computing.judge_attention(replace(varlen, largest_difference=None), used=True).status is FindingStatus.FAIL
    slow = computing.judge_attention(replace(varlen, seconds=0.008), used=True)
    assert (slow.status, slow.cure) == (FindingStatus.WARN, "Set USE_FLASH_ATTN=false: it is faster here.")
    assert computing.judge_attention(replace(varlen, seconds=0.008), used=False).status is FindingStatus.OK


def test_compiling() -> None:
    assert computing.judge_compile(CompileTry(2.0, 1e-6), "gcc").status is FindingStatus.OK
    assert computing.judge_compile(CompileTry(2.0, 0.5), "gcc").status is FindingStatus.FAIL
    assert computing.judge_compile(CompileTry(2.0, None), "gcc").status is FindingStatus.FAIL


def spark_room(available: float) -> MemoryRoom:
    return MemoryRoom(int(121.6 * GB), int(available * GB), int(4.9 * GB), int(109 * GB), unified=True, of_gpu=True)


def test_two_models_of_4b_on_a_spark_beside_vllm() -> None:
    need = memory.MemoryNeed({"embed": 8 * GB, "rerank": 8 * GB}, (), 4 * GB)
    assert memory.judge_memory(spark_room(60), need).status is FindingStatus.OK
    finding = memory.judge_memory(spark_room(12), need)
    assert finding.status is FindingStatus.FAIL
    assert "the models need 20.0: 16.0 of weights and an allowance of 4.0" in finding.seen
    assert "12.9 GB are missing" in str(finding.cure)
    assert "--gpu-memory-utilization" in str(finding.cure)


def test_what_cuda_claims_after_a_download() -> None:
    finding = memory.judge_claim(ClaimedMemory(41 * GB, 121 * GB, integrated=True), 115 * GB)
    assert (finding.status, "41.0 GB are free, 74.0 less than there are" in finding.seen) == (FindingStatus.OK, True)
    assert "page cache" not in memory.judge_claim(ClaimedMemory(70 * GB, 80 * GB, integrated=False), 70 * GB).seen


def test_swap_on_unified_memory() -> None:
    assert memory.judge_swap(16 * GB, unified=True).status is FindingStatus.WARN
    assert memory.judge_swap(16 * GB, unified=False).status is FindingStatus.OK
    assert memory.judge_swap(0, unified=True).status is FindingStatus.OK


def test_pythons() -> None:
    assert installation.judge_python((3, 12, 3), "aarch64", in_environment=True).status is FindingStatus.OK
    assert installation.judge_python((3, 10, 1), "aarch64", in_environment=True).status is FindingStatus.FAIL
    assert installation.judge_python((3, 12, 3), "armv7l", in_environment=True).status is FindingStatus.FAIL
    assert installation.judge_python((3, 16, 0), "x86_64", in_environment=False).status is FindingStatus.WARN


def test_a_card_that_says_nothing_of_its_memory() -> None:
    card = GpuReading(name="NVIDIA L4", not_available={"memory_total_mb": "no", "memory_free_mb": "no"})
    assert gpu.judge_gpu(card).status is FindingStatus.WARN
    assert gpu.judge_gpu(replace(card, name="NVIDIA GB10")).status is FindingStatus.OK
