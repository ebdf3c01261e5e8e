"""One comparison: whether its sides give the same numbers, then their times in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from benchmarks.model_rounds import LIMITS, Machine, Side, alternate, report, significant
from benchmarks.progress import progress
from torch import Tensor

from vecmill.engine.device import dtype_name

# How far two answers may be apart, as a part of their norm. Through random weights rounding makes up to a third of it;
# a position or a mask that is wrong makes several times more.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.06}
# A score is one sum in which much cancels, so rounding is a larger part of it.
SCORE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Case:
    """What is compared; the first side is vecmill's."""

    name: str
    dtype: torch.dtype
    sides: Mapping[str, Side]
    items: int
    """Of one call of each side."""
    unit: str
    answers: Mapping[str, Tensor]
    """(rows, values), the same rows from each side."""
    about: Mapping[str, Any]
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)


def measure(case: Case, machine: Machine) -> dict[str, Any]:
    """Check, time, and what JSON gets of it."""
    first, *others = case.answers.values()
    error = max(worst_error(first, other) for other in others)
    tolerance = case.tolerances[case.dtype]
    with progress(case.name, machine.rounds * (len(case.sides) + len(LIMITS))) as advance:
        rounds = alternate(replace(machine, advance=advance), case.dtype, case.sides)
    return {
        "name": case.name,
        "dtype": dtype_name(case.dtype),
        "about": dict(case.about),
        "items": case.items,
        "unit": case.unit,
        **report(machine, case.dtype, case.sides, rounds, case.items),
        "check": {"error": significant(error), "tolerance": tolerance, "same": error <= tolerance},
    }


def worst_error(one: Tensor, other: Tensor) -> float:
    """The largest difference of two rows, as a part of the row's norm; NaN counts as infinite."""
    one, other = one.float(), other.float()
    errors = (one - other).norm(dim=1) / other.norm(dim=1)
    return float(errors.nan_to_num(nan=torch.inf).max())
