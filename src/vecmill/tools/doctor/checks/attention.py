"""The server's attention over packed rows, against SDPA row by row."""

from __future__ import annotations

from vecmill.engine.probes.results import AttentionComparison
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.probing import ProbeFailed
from vecmill.tools.doctor.report import Finding, fail, ok, warn

SECONDS = 120.0
# Outputs are weighted means of values of about 1: bfloat16 has 3 digits, float32 7.
TOLERANCES = {"bfloat16": 0.05, "float32": 0.0001}
WITHOUT = "Set USE_FLASH_ATTN=false"


def check(context: Context) -> Finding:
    """Compare."""
    try:
        comparison = context.prober.ask("attention", context.device, AttentionComparison, SECONDS)
    except ProbeFailed as error:
        if error.kind in ("ImportError", "ModuleNotFoundError"):
            return fail(
                f"the server's attention cannot be imported: {error}",
                "See the check torch: torch.nn.attention.varlen needs 2.11 or newer.",
            )
        raise
    return judge(comparison, used=context.settings.engine.use_flash_attn)


def judge(comparison: AttentionComparison, *, used: bool) -> Finding:
    """`used`: USE_FLASH_ATTN."""
    path = "varlen attention" if comparison.varlen else "packed attention (SDPA; varlen is not used on a CPU)"
    difference = comparison.largest_difference
    seen = (
        f"{path} over {comparison.rows} rows and {comparison.tokens} tokens: differs from SDPA row by row by "
        f"{'a value that is no number' if difference is None else f'{difference:.2g}'} at the most in "
        f"{comparison.dtype}, and is {comparison.speedup:.1f} times as fast"
    )
    facts = {"largest_difference": difference, "speedup": comparison.speedup, "varlen": comparison.varlen}
    if comparison.varlen and not used:
        seen += "; USE_FLASH_ATTN=false leaves it unused"
    if difference is None or difference > TOLERANCES.get(comparison.dtype, 0.05):
        cure = WITHOUT if comparison.varlen else "This torch computes wrongly: install another version."
        return fail(seen, f"{cure}.", **facts)
    if comparison.varlen and used and comparison.speedup < 0.9:
        return warn(seen, f"{WITHOUT}: it is faster here.", **facts)
    return ok(seen, **facts)
