"""All checks, in the order in which they run: a later one's finding is often explained by an earlier one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vecmill.tools.doctor.checks import (
    allocation,
    attention,
    clock,
    compile,
    disk,
    docker,
    driver,
    gpu,
    matmul,
    memory,
    models,
    port,
    python,
    state,
    tailscale,
    torch,
)
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding

Check = Callable[[Context], Finding]

CHECKS: Mapping[str, Check] = {
    "python": python.check,
    "torch": torch.check,
    "driver": driver.check,
    "gpu": gpu.check,
    "matmul": matmul.check,
    "clock": clock.check,
    "memory": memory.check,
    "allocation": allocation.check,
    "attention": attention.check,
    "compile": compile.check,
    "models": models.check,
    "disk": disk.check,
    "port": port.check,
    "state": state.check,
    "tailscale": tailscale.check,
    "docker": docker.check,
}
