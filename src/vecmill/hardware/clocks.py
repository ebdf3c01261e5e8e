"""Whether a GPU runs as fast as it should, from one reading.

A GB10 whose power supply was negotiated wrongly runs at 500 to 850 MHz in P0, at full utilization, and nvidia-smi names
no reason; a healthy one runs at 2.2 to 2.4 GHz. Only taking the power away for a minute ends that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vecmill.hardware.gpu import GpuReading

GB10 = "GB10"
GB10_SLOWEST_MHZ = 1400
# Below this share of its highest clock a loaded card is held back, whatever it says.
SLOWEST_SHARE = 0.5
LOADED_PERCENT = 50
HEAT = ("hw_thermal_slowdown", "sw_thermal_slowdown")
POWER = ("hw_power_brake_slowdown", "hw_slowdown")


class Clock(StrEnum):
    """The verdict. `unknown` where clock or load cannot be read; an idle GPU's clock says nothing."""

    OK = "ok"
    IDLE = "idle"
    THROTTLED = "throttled"
    LOCKED = "locked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ClockVerdict:
    """State, and one sentence with the cure where something is wrong."""

    state: Clock
    message: str

    @property
    def bad(self) -> bool:
        return self.state in (Clock.THROTTLED, Clock.LOCKED)


def clock_verdict(gpu: GpuReading | None) -> ClockVerdict:
    """Judge one reading."""
    if gpu is None or gpu.sm_clock_mhz is None or gpu.utilization_percent is None:
        return ClockVerdict(Clock.UNKNOWN, "clock and load are not available")
    if gpu.utilization_percent < LOADED_PERCENT:
        return ClockVerdict(Clock.IDLE, f"{gpu.sm_clock_mhz} MHz, {gpu.utilization_percent} % busy")
    reasons = gpu.clock_reasons or ()
    if any(reason in HEAT for reason in reasons):
        return ClockVerdict(
            Clock.THROTTLED, f"{_at(gpu)}: it is too hot. Give it air, and look at the fan and the room."
        )
    if any(reason in POWER for reason in reasons):
        return ClockVerdict(Clock.THROTTLED, f"{_at(gpu)}: it gets too little power. Check the power supply and cable.")
    if _is_slow(gpu):
        return _locked(gpu)
    return ClockVerdict(Clock.OK, f"{gpu.sm_clock_mhz} MHz under load")


def _is_slow(gpu: GpuReading) -> bool:
    clock = gpu.sm_clock_mhz
    if clock is None:
        return False
    if GB10 in (gpu.name or ""):
        return clock < GB10_SLOWEST_MHZ
    return gpu.max_sm_clock_mhz is not None and clock < SLOWEST_SHARE * gpu.max_sm_clock_mhz


def _locked(gpu: GpuReading) -> ClockVerdict:
    if "applications_clocks_setting" in (gpu.clock_reasons or ()):
        cure = "somebody has set its clocks; `sudo nvidia-smi -rgc` takes that back."
    elif GB10 in (gpu.name or ""):
        cure = (
            f"a healthy one runs above {GB10_SLOWEST_MHZ}. Its power supply may be in a slow state that no tool shows: "
            f"shut down, unplug the supply from the wall and from the Spark for 60 seconds, and plug it straight into "
            f"the wall."
        )
    else:
        cure = f"it can do {gpu.max_sm_clock_mhz}. See `nvidia-smi -q -d PERFORMANCE,CLOCK` for what holds it back."
    return ClockVerdict(Clock.LOCKED, f"{_at(gpu)}: {cure}")


def _at(gpu: GpuReading) -> str:
    heat = "" if gpu.temperature_c is None else f" and {gpu.temperature_c} °C"
    return f"The GPU runs at {gpu.sm_clock_mhz} MHz under load{heat}"
