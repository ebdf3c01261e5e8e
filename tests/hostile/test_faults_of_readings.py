"""Readings of the machine's memory and of the GPU come from the right place and are not trusted once they are old."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import pytest

from vecmill.core.errors import MemoryLow
from vecmill.hardware import memory as memory_module
from vecmill.hardware import monitor as monitor_module
from vecmill.hardware.gpu import ClockState, ClockVerdict, GpuReading
from vecmill.hardware.memory import MemoryGuard
from vecmill.hardware.monitor import Monitor
from vecmill.hardware.nvml import NvmlUnavailable

UNLIMITED_V1 = 9223372036854771712
SERVICE = "system.slice/qmd-embed.service"


def group(folder: Path, limit: object, used: int = 0, inactive: int = 0) -> None:
    """A control group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - inactive}\ninactive_file {inactive}\n")


def group_v1(folder: Path, limit: int, used: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control groups' folder in place of the kernel's; the file `own` beside it names those of this process."""
    monkeypatch.setattr(memory_module, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_module, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def is_in(groups: Path, *lines: str) -> None:
    (groups.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def assert_left(gigabytes: float, floor: float = 0.1) -> None:
    guard = MemoryGuard(floor, 1.0)
    guard.check(needed=0)
    with pytest.raises(MemoryLow, match=rf"{gigabytes:.1f} GB are free"):
        guard.check(needed=int((gigabytes - floor + 0.01) * 2**30))


def test_the_limit_of_a_service_counts(groups: Path) -> None:
    is_in(groups, f"0::/{SERVICE}")
    group(groups / "system.slice", "max")
    group(groups / SERVICE, 40 * 2**30, 39 * 2**30, 2**30 // 2)
    assert_left(1.5)


def test_the_limit_of_a_group_above_counts(groups: Path) -> None:
    is_in(groups, f"0::/{SERVICE}/inner")
    group(groups / SERVICE / "inner", "max", 2**30)
    group(groups / SERVICE, 30 * 2**30, 2**30)
    group(groups / "system.slice", 40 * 2**30, 39 * 2**30)
    assert_left(1.0)


@pytest.mark.parametrize("line", ["4:memory:/docker/abc", "7:cpu,memory:/docker/abc"])
def test_version_1_counts(groups: Path, line: str) -> None:
    is_in(groups, "9:name=systemd:/docker/abc", line, "0::/")
    group_v1(groups / "memory", UNLIMITED_V1)
    group_v1(groups / "memory/docker", UNLIMITED_V1)
    group_v1(groups / "memory/docker/abc", 40 * 2**30, 39 * 2**30, 2**30)
    assert_left(2.0)


@pytest.mark.parametrize("own", [["0::/"], ["0::/../../elsewhere"], ["4:memory:/docker/abc"], ["nonsense", ""]])
def test_a_container_that_sees_its_own_part_alone(groups: Path, own: list[str]) -> None:
    is_in(groups, *own)
    group(groups, 40 * 2**30, 39 * 2**30)
    group_v1(groups / "memory", 60 * 2**30, 0)
    assert_left(1.0)


def test_without_a_limit_the_machine_decides(groups: Path) -> None:
    MemoryGuard(0.1, 1.0).check(needed=0)  # no control groups at all
    is_in(groups, f"0::/{SERVICE}")
    group(groups / SERVICE, "max", 2**50)
    group_v1(groups / "memory", UNLIMITED_V1, 2**50)
    MemoryGuard(0.1, 1.0).check(needed=0)


def test_a_limit_above_the_machines_memory_is_none(groups: Path) -> None:
    is_in(groups, "0::/")
    group(groups, 2**55, 0)
    with pytest.raises(MemoryLow, match="MEMORY_FRACTION"):
        MemoryGuard(0.0, 1.0).check(needed=2**50)


def test_a_limit_that_is_set_later_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_in(groups, f"0::/{SERVICE}")
    group(groups / SERVICE, "max", 39 * 2**30)
    guard = MemoryGuard(0.1, 1.0)
    guard.check(needed=0)
    group(groups / SERVICE, 39 * 2**30, 39 * 2**30)
    monkeypatch.setattr("vecmill.hardware.memory.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("vecmill.hardware.memory.READ_EVERY", -1.0)
    with pytest.raises(MemoryLow, match=r"0\.0 GB are free"):
        guard.check(needed=0)


def test_between_two_readings_what_was_let_pass_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests may be admitted before the first of them takes its memory."""
    is_in(groups, f"0::/{SERVICE}")
    group(groups / SERVICE, 40 * 2**30, 39 * 2**30)
    monkeypatch.setattr("vecmill.hardware.memory.READ_EVERY", 60.0)
    guard = MemoryGuard(0.1, 1.0)
    guard.check(needed=2**29)
    with pytest.raises(MemoryLow, match=r"0\.5 GB are free"):
        guard.check(needed=2**29)


class ScriptedDriver:
    """Gives one reading after another, or raises it if it is an exception, and then the last one for ever."""

    def __init__(self, *readings: GpuReading | Exception) -> None:
        self._readings = deque(readings)
        self.done = threading.Event()

    def __call__(self) -> ScriptedDriver:
        return self

    def read(self, uuid: str | None) -> GpuReading:
        reading = self._readings[0]
        if len(self._readings) == 1:
            self.done.set()
        else:
            self._readings.popleft()
        if isinstance(reading, Exception):
            raise reading
        return reading

    def close(self) -> None:
        pass


def reported(driver: ScriptedDriver, monkeypatch: pytest.MonkeyPatch) -> list[ClockState]:
    """The clock states that a monitor reports while it goes through the driver's readings."""
    monkeypatch.setattr(monitor_module, "PERIOD", 0.0005)
    monkeypatch.setattr(monitor_module, "Nvml", driver)
    verdicts: list[ClockVerdict] = []
    monitor = Monitor(verdicts.append)
    monitor.start()
    assert driver.done.wait(30)
    monitor.close()
    return [verdict.state for verdict in verdicts]


WELL = GpuReading(name="NVIDIA GB10", sm_clock_mhz=2190, utilization_percent=96)
SLOW = GpuReading(name="NVIDIA GB10", sm_clock_mhz=612, utilization_percent=96)
IDLE = GpuReading(name="NVIDIA GB10", sm_clock_mhz=208, utilization_percent=2)
UNKNOWN = GpuReading(name="NVIDIA GB10", utilization_percent=96)


@pytest.mark.parametrize("between", [IDLE, WELL, UNKNOWN, NvmlUnavailable("lost"), RuntimeError("not thought of")])
def test_slow_looks_that_are_not_in_a_row_are_no_verdict(
    between: GpuReading | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slow reading may have been taken at the moment when a load began."""
    assert reported(ScriptedDriver(*[SLOW, SLOW, between] * 5, WELL), monkeypatch) == []


def test_a_verdict_stays_until_a_loaded_clock_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ScriptedDriver(SLOW, SLOW, SLOW, IDLE, SLOW, UNKNOWN, RuntimeError("not thought of"), SLOW, WELL)
    assert reported(driver, monkeypatch) == [ClockState.LOCKED, ClockState.OK]
