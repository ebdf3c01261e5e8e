"""How fast the device multiplies matrices, against what the card should give.

Sources of the table, bfloat16 with float32 accumulation and without sparsity: NVIDIA's datasheets of A100, H100, H200,
L4, L40S and HGX B200, and its architecture whitepapers of Ada (RTX 4090), Blackwell (RTX 5090) and RTX PRO Blackwell.
A GB10 gives 70 to 95 with CUDA 13 (https://github.com/huggingface/kernels/pull/283), of a peak of about 125.
"""

from __future__ import annotations

import re

from vecmill.engine.probes.results import MatmulSpeed
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, fail, ok, warn

SECONDS = 120.0
PEAKS = (  # the first that matches a whole name
    (r"H100 PCIe", 756),
    (r"H100 NVL|H200 NVL", 835),
    (r"H[12]00\b(?!.*MIG).*", 989),
    (r"A100\b(?!.*MIG).*", 312),
    (r"L40S", 362),
    (r"L4", 121),
    (r"GeForce RTX 4090", 165),
    (r"GeForce RTX 5090", 209),
    (r"RTX PRO 6000 Blackwell (Workstation|Server) Edition", 504),
    (r"RTX PRO 6000 Blackwell Max-Q.*", 439),
    (r"B200\b(?!.*MIG).*", 2250),
)
LEAST_SHARE = 0.5
GB10_GOOD, GB10_LEAST = 70, 40
CURE = (
    "See the checks clock and torch; stop what else uses the GPU (nvidia-smi), and let it cool down, then\n"
    "vecmill doctor --only torch,clock,matmul"
)


def check(context: Context) -> Finding:
    """Measure."""
    device = context.device
    speed = context.prober.ask("matmul", device, MatmulSpeed, SECONDS)
    index = int(device.partition(":")[2] or 0)
    return judge(speed, context.build.gpus[index].name if device.startswith("cuda") else None)


def judge(speed: MatmulSpeed, card: str | None) -> Finding:
    """By the card's name; None: a CPU, of which nothing is expected."""
    figure = speed.median
    seen = (
        f"{figure:.1f} TFLOPS ({min(speed.tflops):.1f} to {max(speed.tflops):.1f} in {len(speed.tflops)} timings) in "
        f"{speed.dtype}, {speed.size} x {speed.size}, on {card or 'the CPU'}"
    )
    facts = {"tflops": figure, "timings": speed.tflops, "size": speed.size, "dtype": speed.dtype}
    if card is None:
        return ok(seen, **facts)
    if "GB10" in card:
        seen += f"; {GB10_GOOD} to 95 is healthy"
        if figure < GB10_LEAST:
            return fail(f"{seen}: it is held back, or torch's CUDA is older than 13", CURE, **facts)
        return ok(seen, **facts) if figure >= GB10_GOOD else warn(seen, CURE, **facts)
    peak = peak_of(card)
    if peak is None:
        return ok(f"{seen}; what it should give is not known here", **facts)
    seen += f", {figure / peak:.0%} of its peak of {peak}"
    if figure < LEAST_SHARE * peak:
        return warn(f"{seen}; {LEAST_SHARE:.0%} and more is healthy", CURE, **facts)
    return ok(seen, **facts)


def peak_of(card: str) -> int | None:
    """TFLOPS in bfloat16; None of a card that is not in the table."""
    name = card.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)
