"""Whether an allocation that is too large is refused, in place of stopping the machine."""

from __future__ import annotations

from vecmill.engine.probes.results import Oversized
from vecmill.hardware.memory import GIGABYTE
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.probing import ProbeFailed
from vecmill.tools.doctor.report import Finding, fail, ok, warn

SECONDS = 60.0
QUICK = 5.0
LEAST_MB = 4096  # a GB10 that runs out of memory freezes, so nothing is tried near that
CURE = "The driver or torch is at fault: update both. Until then MEMORY_FRACTION does not protect this machine."


def check(context: Context) -> Finding:
    """Ask for a little more than a cap of 1 GiB."""
    if not context.device.startswith("cuda"):
        return ok("not tried on a CPU: there the server refuses by itself what would take too much")
    available = context.gpu_memory.available_mb
    if available is not None and available < LEAST_MB:
        return warn(f"not tried: only {available} MB are available", "See the check memory.")
    try:
        oversized = context.prober.ask("allocation", context.device, Oversized, SECONDS)
    except ProbeFailed as error:
        if error.kind == "TimeoutError":
            return fail(f"an allocation above the process's cap hangs: {error}", CURE)
        raise
    return judge(oversized)


def judge(oversized: Oversized) -> Finding:
    """It must raise, at once, and leave a device that works."""
    asked = f"{oversized.asked / GIGABYTE:.1f} GB above a cap of {oversized.cap / GIGABYTE:.1f}"
    facts = {"cap_bytes": oversized.cap, "asked_bytes": oversized.asked, "refused_with": oversized.refused}
    if oversized.refused is None:
        return fail(f"{asked} were allocated: the cap does not hold", CURE, **facts)
    if not oversized.works_after:
        return fail(f"{asked} were refused, and then the device computed wrongly", CURE, **facts)
    seen = f"{asked} were refused with {oversized.refused} in {oversized.seconds:.2f} s, and the device works on"
    return ok(seen, **facts) if oversized.seconds < QUICK else warn(seen, CURE, **facts)
