"""The GPU's clock while it works."""

from __future__ import annotations

from collections.abc import Sequence

from vecmill.doctor.context import Context, reading
from vecmill.doctor.report import Finding, fail, ok, warn
from vecmill.doctor.timely import within
from vecmill.engine.probes.results import Load
from vecmill.hardware.gpu import LOADED_PERCENT, GpuReading, clock_verdict

SECONDS = 30.0
LOOK_SECONDS = 5.0
HANGS = "If nvidia-smi hangs too, restart the machine; `sudo dmesg` may say why."


def check(context: Context) -> Finding:
    """Look at it for five seconds of matrix products."""
    if context.gpu is None:
        if context.has_gpu:
            return warn(f"cannot be read: {context.no_gpu}", "See the check gpu.")
        return ok("no NVIDIA GPU here")
    if not context.device.startswith("cuda"):
        if context.settings.engine.device in ("cpu", "mps"):
            return ok("not measured: DEVICE leaves the GPU unused")
        return warn("not measured: this torch cannot put a load on the GPU", "See the check torch.")
    looks = _Looks(context.gpu.uuid)
    load = context.prober.ask("load", context.device, Load, SECONDS, looks.look)
    if looks.hung:
        return fail(f"the driver did not answer within {LOOK_SECONDS:.0f} s under load", HANGS)
    return judge(looks.readings, load)


class _Looks:
    """At one GPU, until a look hangs."""

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self.readings: list[GpuReading] = []
        self.hung = False

    def look(self) -> None:
        """Look, unless the driver hangs: then it is asked no more."""
        if self.hung:
            return
        found = within(LOOK_SECONDS, lambda: reading(self._uuid))
        self.hung = found is None
        if isinstance(found, GpuReading):
            self.readings.append(found)


def judge(readings: Sequence[GpuReading], load: Load) -> Finding:
    """By the median of the readings under load: the first ones fall into the moment in which the clock still rises."""
    under_load = sorted(
        (one for one in readings if one.sm_clock_mhz is not None and (one.utilization_percent or 0) >= LOADED_PERCENT),
        key=lambda one: one.sm_clock_mhz or 0,
    )
    facts: dict[str, object] = {"seconds": load.seconds, "tflops": load.tflops, "readings": len(under_load)}
    if not under_load:
        return warn(
            f"no reading of {len(readings)} shows clock and load, so nothing is known", "nvidia-smi -q", **facts
        )
    middle = under_load[len(under_load) // 2]
    verdict = clock_verdict(middle)
    facts |= {
        "sm_clock_mhz": middle.sm_clock_mhz,
        "temperature_c": middle.temperature_c,
        "power_watts": middle.power_watts,
        "clock_reasons": middle.clock_reasons,
        "state": verdict.state.value,
    }
    seen = (
        f"{under_load[0].sm_clock_mhz} to {under_load[-1].sm_clock_mhz} MHz under load, "
        f"{_or_unknown(middle.power_watts)} W, {_or_unknown(middle.temperature_c)} °C, held by: "
        f"{', '.join(middle.clock_reasons or ()) or 'nothing'}"
    )
    return fail(seen, verdict.message, **facts) if verdict.bad else ok(seen, **facts)


def _or_unknown(number: float | None) -> str:
    return "unknown" if number is None else f"{number:g}"
