"""What is read of a GPU, through the real nvidia-ml-py and a library that answers as recorded cards do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import pytest

from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10, H100
from vecmill.hardware import monitor as monitor_module
from vecmill.hardware.gpu import (
    ClockState,
    ClockVerdict,
    GpuMemory,
    GpuProcess,
    GpuReading,
    clock_verdict,
    gpu_memory,
    nvidia_gpu_present,
)
from vecmill.hardware.memory import DeviceMemory, meminfo, memory_pressure, unified_available
from vecmill.hardware.monitor import Monitor, Watched
from vecmill.hardware.nvml import Nvml, NvmlUnavailable

Card = Callable[..., GpuReading]

SPARK = {"MemTotal": 130_600_000 * 1024, "MemFree": 2_000_000 * 1024, "MemAvailable": 60_000_000 * 1024}


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the driver of this process answers from; not there at first."""
    fake_nvml.load()
    file = tmp_path / "recording.txt"
    monkeypatch.setenv("FAKE_NVML", str(file))
    return file


@pytest.fixture
def card(recording: Path) -> Card:
    """Reads a recorded card, some of its lines changed (None: taken out)."""

    def read(source: Path, **changes: str | None) -> GpuReading:
        record(recording, source, **changes)
        nvml = Nvml()
        try:
            return nvml.read()
        finally:
            nvml.close()

    return read


def record(recording: Path, source: Path, **changes: str | None) -> None:
    lines = [line for line in source.read_text().splitlines() if line.split(" ", 1)[0] not in changes]
    recording.write_text("\n".join(lines + [f"{name} {value}" for name, value in changes.items() if value]) + "\n")


def test_a_gb10_has_no_memory_of_its_own(card: Card) -> None:
    gpu = card(GB10)
    assert (gpu.name, gpu.driver_version, gpu.cuda_version) == ("NVIDIA GB10", "580.173.02", "13.0")
    assert (gpu.compute_capability, gpu.performance_state, gpu.clock_reasons) == ("12.1", "P0", ())
    assert (gpu.utilization_percent, gpu.temperature_c, gpu.power_watts, gpu.sm_clock_mhz) == (96, 71, 82.4, 2190)
    missing = {"power_limit_watts", "max_sm_clock_mhz", "memory_total_mb", "memory_used_mb", "memory_free_mb"}
    assert gpu.not_available is not None
    assert {name for name in GpuReading.__dataclass_fields__ if getattr(gpu, name) is None} == missing
    assert dict(gpu.not_available) == dict.fromkeys(missing, "this GPU does not have it")
    assert gpu.unified is True
    assert (gpu.memory_of(os.getpid()), gpu.memory_of_others(os.getpid())) == (9216, 60970)


def test_a_data_centre_card_tells_all(card: Card) -> None:
    gpu = card(H100)
    assert gpu.not_available == {}
    assert (gpu.memory_total_mb, gpu.memory_used_mb, gpu.memory_free_mb) == (81559, 1024, 80535)
    assert (gpu.power_limit_watts, gpu.clock_reasons, gpu.unified) == (700.0, ("gpu_idle",), False)
    assert (gpu.memory_of(os.getpid()), gpu.memory_of_others(os.getpid())) == (None, 1024)


def test_zeros_in_place_of_an_answer_are_no_numbers(card: Card) -> None:
    """Some drivers answer for a GB10's memory with success and zeros."""
    gpu = card(GB10, memory="0 0 0", power_limit="0", performance_state="32")
    assert (gpu.memory_total_mb, gpu.memory_free_mb, gpu.power_limit_watts, gpu.performance_state) == (None,) * 4
    assert gpu.not_available is not None
    assert (
        gpu.not_available["memory_total_mb"] == gpu.not_available["performance_state"] == "the driver gives no number"
    )
    assert card(GB10, utilization="0", temperature="0").utilization_percent == 0


@pytest.mark.parametrize(
    ("code", "reason"), [("!4", "may not ask"), ("!13", "does not know it"), ("!15", "GPU is lost")]
)
def test_a_field_that_fails_costs_only_itself(card: Card, code: str, reason: str) -> None:
    gpu = card(GB10, temperature=code)
    assert gpu.temperature_c is None
    assert gpu.not_available is not None
    assert reason in gpu.not_available["temperature_c"]
    assert gpu.sm_clock_mhz == 2190


def test_without_a_driver_it_says_so(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_NVML")
    with pytest.raises(NvmlUnavailable, match="driver is not loaded"):
        Nvml()
    monkeypatch.setenv("FAKE_NVML", str(recording))
    record(recording, GB10, count="0")
    assert Nvml().count() == 0
    with pytest.raises(NvmlUnavailable):
        Nvml().read("GPU-another")


def test_a_gpu_is_noticed_without_any_library(tmp_path: Path) -> None:
    assert not nvidia_gpu_present(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not nvidia_gpu_present(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert nvidia_gpu_present(tmp_path)


@pytest.mark.parametrize("file", ["proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvgpu/igpu0/ctrl", "dev/nvhost-gpu"])
def test_every_driver_of_nvidia_shows_its_gpu(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert nvidia_gpu_present(tmp_path)


@pytest.mark.parametrize(
    ("source", "changes", "state", "message"),
    [
        (GB10, {}, ClockState.OK, "2190 MHz"),
        (GB10, {"utilization": "3", "sm_clock": "208"}, ClockState.IDLE, "3 % busy"),
        (GB10, {"sm_clock": "612"}, ClockState.LOCKED, "unplug the supply"),
        (GB10, {"sm_clock": "612", "clock_reasons": "2"}, ClockState.LOCKED, "nvidia-smi -rgc"),
        (GB10, {"clock_reasons": "0x40", "temperature": "88"}, ClockState.THROTTLED, "88 °C: it is too hot"),
        (GB10, {"clock_reasons": "0x80"}, ClockState.THROTTLED, "too little power"),
        (GB10, {"sm_clock": None}, ClockState.UNKNOWN, "not available"),
        (GB10, {"utilization": "!3"}, ClockState.UNKNOWN, "not available"),
        (H100, {}, ClockState.IDLE, "345 MHz"),
        (H100, {"utilization": "100", "sm_clock": "1755"}, ClockState.OK, "1755 MHz"),
        (H100, {"utilization": "100"}, ClockState.LOCKED, "it can do 1980"),
        (H100, {"utilization": "100", "max_sm_clock": None}, ClockState.OK, "345 MHz"),
        # A power cap is how a data-centre card works at its limit: no fault.
        (H100, {"utilization": "100", "sm_clock": "1400", "clock_reasons": "4"}, ClockState.OK, "1400 MHz"),
    ],
)
def test_the_verdict_on_the_clock(
    card: Card, source: Path, changes: dict[str, str | None], state: ClockState, message: str
) -> None:
    verdict = clock_verdict(card(source, **changes))
    assert verdict.state is state
    assert message in verdict.message
    assert verdict.bad == (state in (ClockState.THROTTLED, ClockState.LOCKED))


def device(*, unified: bool) -> DeviceMemory:
    return DeviceMemory(124_600, 9000, 9200, None if unified else 1950, unified)


def test_unified_memory_is_the_kernels_account(card: Card) -> None:
    gpu = card(GB10)
    here = gpu_memory(gpu, device(unified=True), SPARK, os.getpid())
    assert here == GpuMemory(True, 127_539, 58_593, 9000, 9200, 9216, 60970)
    assert gpu_memory(gpu, None, SPARK, 1).available_mb == 58_593  # before torch is there
    pages = SPARK | {"HugePages_Total": 100, "HugePages_Free": 40, "Hugepagesize": 512 * 2**20}
    assert gpu_memory(gpu, device(unified=True), pages, 1).available_mb == 40 * 512
    assert gpu_memory(gpu, device(unified=True), {}, 1).available_mb is None


def test_a_cards_own_memory_is_the_drivers(card: Card) -> None:
    gpu = card(H100)
    assert gpu_memory(gpu, device(unified=False), SPARK, 1).available_mb == 1950
    assert gpu_memory(gpu, None, SPARK, 4242) == GpuMemory(False, 81559, 80535, None, None, 1024, 0)
    assert gpu_memory(None, None, SPARK, 1) == GpuMemory()


def test_others_memory_is_unknown_where_one_is() -> None:
    gpu = GpuReading(processes=(GpuProcess(1, 10), GpuProcess(2, None)))
    assert (gpu.memory_of(1), gpu.memory_of_others(1), gpu.memory_of_others(2)) == (10, None, 10)
    assert GpuReading().memory_of_others(1) is None


def test_the_kernels_files(tmp_path: Path) -> None:
    assert (meminfo(tmp_path), memory_pressure(tmp_path)) == ({}, None)
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   60 kB\nHugePages_Total:   0\nodd line\n")
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure/memory").write_text("some avg10=1.25 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00\n")
    fields = meminfo(tmp_path)
    assert fields == {"MemTotal": 102_400, "MemAvailable": 61_440, "HugePages_Total": 0}
    assert unified_available(fields) == 61_440
    assert memory_pressure(tmp_path) == 1.25


def monitors() -> list[threading.Thread]:
    """The monitors' threads, including that of an application that tests share."""
    return [thread for thread in threading.enumerate() if thread.name == "gpu-monitor"]


@pytest.fixture
def verdicts(recording: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Monitor, Queue[ClockVerdict]]]:
    """A monitor of a GB10 that looks almost without pause, and what it reports."""
    monkeypatch.setattr(monitor_module, "PERIOD", 0.001)
    record(recording, GB10)
    reported, before = Queue[ClockVerdict](), len(monitors())
    monitor = Monitor(reported.put)
    monitor.start()
    yield monitor, reported
    monitor.close()
    assert len(monitors()) == before


def test_a_slow_clock_is_reported_once_and_its_end_too(
    recording: Path, verdicts: tuple[Monitor, Queue[ClockVerdict]]
) -> None:
    monitor, reported = verdicts
    record(recording, GB10, sm_clock="612")
    assert reported.get(timeout=30).state is ClockState.LOCKED
    assert monitor.latest().clock.bad
    record(recording, GB10, utilization="2", sm_clock="208")  # an idle clock proves nothing: the fault is not over
    while monitor.latest().clock.state is not ClockState.IDLE:
        time.sleep(0.01)
    record(recording, GB10)
    assert reported.get(timeout=30).state is ClockState.OK
    assert reported.empty()


def test_one_slow_look_is_no_verdict(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single slow reading may have been taken at the moment when the load began."""
    monkeypatch.setattr(monitor_module, "PERIOD", 3600)
    record(recording, GB10, sm_clock="612")
    monitor = Monitor()
    monitor.start()
    while monitor.latest().gpu is None:
        time.sleep(0.01)
    assert monitor.latest().clock == ClockVerdict(ClockState.UNKNOWN, "the load has just begun")
    monitor.close()


def test_a_driver_that_stops_answering_is_not_believed(
    recording: Path, verdicts: tuple[Monitor, Queue[ClockVerdict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "STALE_SECONDS", 0.05)
    monitor, _ = verdicts
    held = device(unified=True)
    monitor.watch(Watched(lambda: None, lambda: held))
    assert (monitor.latest().memory, monitor.latest().stale) == (held, False)
    record(recording, GB10, hang="now")
    while not (look := monitor.latest()).stale:
        time.sleep(0.01)
    assert (look.gpu, look.clock.state) == (None, ClockState.UNKNOWN)
    assert look.reason is not None
    assert "has not answered" in look.reason
    assert look.memory is held  # torch's own numbers, of the last look
    assert look.age_seconds > 0.05
    record(recording, GB10)
    while (look := monitor.latest()).stale:
        time.sleep(0.01)
    assert look.gpu is not None


def test_torch_has_a_gpu_that_nvml_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another maker's, or a container without NVIDIA's library; and what torch raises once its device has failed."""
    fake_nvml.load()
    monkeypatch.delenv("FAKE_NVML", raising=False)
    monkeypatch.setattr(monitor_module, "PERIOD", 0.001)
    held: list[DeviceMemory] = [device(unified=False)]
    monitor = Monitor()
    monitor.start()
    monitor.watch(Watched(lambda: None, lambda: held[0]))
    look = monitor.latest()
    assert (look.gpu, look.memory, look.reason) == (None, held[0], "the NVIDIA driver is not loaded")
    [memory] = held
    held.clear()
    while (look := monitor.latest()).memory is not None:
        time.sleep(0.01)
    assert (look.reason, look.stale) == ("the GPU cannot be looked at (IndexError)", False)
    held.append(memory)
    while monitor.latest().memory is None:
        time.sleep(0.01)
    monitor.close()


def test_a_machine_without_a_gpu_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.load()
    monkeypatch.delenv("FAKE_NVML", raising=False)
    monkeypatch.setattr(monitor_module, "STALE_SECONDS", 0.001)
    before = len(monitors())
    monitor = Monitor()
    monitor.start()
    while (look := monitor.latest()).reason != "the NVIDIA driver is not loaded":
        time.sleep(0.01)
    assert (look.gpu, look.clock.state, look.memory) == (None, ClockState.UNKNOWN, None)
    while monitor.latest().age_seconds < 0.05:
        time.sleep(0.01)
    assert not monitor.latest().stale  # there is nothing to look at, and so nothing that is old
    monitor.close()
    assert len(monitors()) == before
