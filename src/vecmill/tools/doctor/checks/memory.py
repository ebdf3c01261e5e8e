"""Memory: what there is, what is available, and whether the configured models find room."""

from __future__ import annotations

from dataclasses import dataclass

from vecmill.core.errors import MemoryLow, StartupError
from vecmill.engine.probes.results import ClaimedMemory
from vecmill.hardware.memory import GIGABYTE, MemoryGuard, meminfo
from vecmill.hardware.memory_room import MemoryRoom, allowance, memory_room
from vecmill.tools.doctor.checks.models import bytes_per_parameter, configured
from vecmill.tools.doctor.context import DoctorContext
from vecmill.tools.doctor.findings import Finding, fail, ok, together, warn
from vecmill.tools.doctor.probing import ProbeFailed

HUB_SECONDS = 2.0  # a server that is to start waits for this
PROBE_SECONDS = 30.0
# Who holds it.
OF_GPU, OF_MACHINE = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv", "ps aux --sort=-rss"


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of weights by model, in the type they are loaded in; the size of `unknown` models is not known."""

    weights: dict[str, int]
    unknown: tuple[str, ...]
    allowance: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.allowance if self.weights else 0


def check_memory(context: DoctorContext) -> Finding:
    """Read the kernel's and the driver's account; ask CUDA only where torch is imported anyway."""
    room = _room(context)
    parts = [_judge_room(context, room)]
    if context.uses_torch and room.of_gpu:
        parts.append(_claimed(context, room))
    parts.append(judge_swap(meminfo().get("SwapTotal", 0), unified=room.unified))
    return together(parts)


def _room(context: DoctorContext) -> MemoryRoom:
    engine = context.settings.engine
    gpu = context.gpu_memory if context.wants_gpu else None
    return memory_room(gpu, engine.memory_floor_gb, engine.memory_fraction)


def need_of(context: DoctorContext) -> MemoryNeed:
    """What the configured models take. The hub is asked for what is not cached, and not waited for."""
    dtype = context.settings.model.dtype
    weights: dict[str, int] = {}
    unknown: list[str] = []
    for model in configured(context):
        size = model.weight_bytes(dtype)
        if model.to_fetch:
            plan = context.plan(model.name, HUB_SECONDS)
            # Two bytes of each parameter, as the plan counts them.
            size = None if isinstance(plan, StartupError) else plan.memory // 2 * bytes_per_parameter(dtype)
        if size is None:
            unknown.append(model.name)
        else:
            weights[str(model.checkpoint.folder.resolve()) if model.checkpoint else model.name] = size
    return MemoryNeed(weights, tuple(unknown), allowance(on_gpu=context.wants_gpu))


def _judge_room(context: DoctorContext, room: MemoryRoom) -> Finding:
    if context.server is not None and context.server.is_vecmill:
        return judge_memory(room, MemoryNeed({}, (), 0), running=context.server.url)
    need = need_of(context)
    finding = judge_memory(room, need)
    if finding.cure is None and not (room.of_gpu and not room.unified):
        try:
            MemoryGuard(context.settings.engine.memory_floor_gb, context.settings.engine.memory_fraction).check(
                need.total
            )
        except MemoryLow as error:  # the control group's limit, which the machine's account does not show
            return fail(finding.seen, f"The control group allows less than the machine has. {error.message}")
    return finding


def judge_memory(room: MemoryRoom, need: MemoryNeed, running: str | None = None) -> Finding:
    """`running`: the address of a server that has its models loaded already."""
    owner = (
        "the GPU shares it with the machine" if room.unified else "the GPU's own" if room.of_gpu else "the machine's"
    )
    seen = f"{_gb(room.available)} GB of {_gb(room.total)} are available ({owner})"
    facts: dict[str, object] = {
        "total_bytes": room.total,
        "available_bytes": room.available,
        "floor_bytes": room.floor,
        "unified": room.unified,
        "weights_bytes": sum(need.weights.values()),
        "needed_bytes": need.total,
        "unknown": need.unknown,
    }
    if running is not None:
        return ok(f"{seen}; the server at {running} has its models loaded", **facts)
    if need.weights:
        seen += (
            f"; the models need {_gb(need.total)}: {_gb(sum(need.weights.values()))} of weights and an allowance of "
            f"{_gb(need.allowance)} for all else"
        )
        seen += f", and {_gb(room.floor)} must stay free (MEMORY_FLOOR_GB)" if room.floor else ""
    if need.unknown:
        seen += f"; the size of {', '.join(need.unknown)} is not known before it is fetched"
    if need.total > room.available - room.floor:
        short = need.total - (room.available - room.floor)
        return fail(
            seen,
            f"{_gb(short)} GB are missing: stop what else holds memory ({OF_GPU if room.of_gpu else OF_MACHINE}), give "
            f"vLLM a smaller --gpu-memory-utilization, or set EMBED_MODEL and RERANK_MODEL to smaller models.",
            **facts,
        )
    if need.total > room.most:
        return fail(
            seen,
            f"MEMORY_FRACTION lets the process take {_gb(room.most)} GB: raise it, or use smaller models.",
            **facts,
        )
    return ok(seen, **facts)


def _claimed(context: DoctorContext, room: MemoryRoom) -> Finding:
    if not context.device.startswith("cuda"):
        return ok("")
    try:
        claimed = context.prober.ask("memory", context.device, ClaimedMemory, PROBE_SECONDS)
    except ProbeFailed as error:
        return warn(f"CUDA does not say what is free: {error}", "See the check torch.")
    return judge_claim(claimed, room.available)


def judge_claim(claimed: ClaimedMemory, available: int) -> Finding:
    """What cudaMemGetInfo says is never a reason to worry: where memory is unified, it leaves out the page cache."""
    facts = {"claimed_free_bytes": claimed.free, "claimed_total_bytes": claimed.total}
    seen = f"cudaMemGetInfo says that {_gb(claimed.free)} GB are free"
    if not claimed.integrated:
        return ok(seen, **facts)
    difference = available - claimed.free
    return ok(
        f"{seen}, {_gb(difference)} less than there are: to it the page cache, which the kernel gives back, is used",
        **facts,
    )


def judge_swap(total: int, *, unified: bool) -> Finding:
    """Swap helps no GPU that shares the machine's memory."""
    if total and unified:
        return warn(
            f"{_gb(total)} GB of swap are on: the GPU's pages cannot go there, and a machine short of memory swaps "
            f"until it stands still",
            "sudo swapoff -a, and take the swap out of /etc/fstab",
            swap_bytes=total,
        )
    return ok("", swap_bytes=total)


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:.{1 if size >= GIGABYTE / 10 else 2}f}"
