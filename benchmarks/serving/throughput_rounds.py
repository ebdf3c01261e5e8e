"""Each side's passes over the same texts, in turns; a side that fails is left out from then on, with its reason."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from benchmarks.lib.figures import ALLOWED_OTHER_CORES
from benchmarks.lib.host import watched
from benchmarks.lib.load import embed_all
from benchmarks.lib.minilm import BATCH, encode, load_model, tokenize
from benchmarks.lib.results import progress
from benchmarks.lib.servers import RunningServer
from benchmarks.serving.environments import Recipe, Unavailable, environment
from benchmarks.serving.onnx_export import export
from benchmarks.serving.peers import PEERS, Peer, Wanted

from vecmill.engine.warmup import CPU_BATCH_TOKENS

CHECKED_TEXTS = 100  # whose vectors must be the same from all sides
PACKED = "packed loop"
IN_PROCESS = "sentence-transformers"
RUNTIMES: Mapping[str, tuple[str, str]] = {
    "openvino, sorted": ("openvino", "sorted"),
    "openvino, arrival": ("openvino", "arrival"),
    "onnxruntime, sorted": ("onnxruntime", "sorted"),
}
"""Sides in process, to the runtime and the order of its batches, see `other_runtimes`."""
ABOUT_RUNTIMES = {
    "openvino": {"version": "2026.4.1", "dtype": "bfloat16", "device": "cpu"},
    "onnxruntime": {"version": "1.32.0", "dtype": "float32", "device": "cpu"},
}
RUNTIMES_RECIPE = Recipe(
    "runtimes", (*(f"{name}=={about['version']}" for name, about in ABOUT_RUNTIMES.items()), "onnx==1.23.2")
)
KNOWN_KEYS = ("version", "dtype", "dtype_reason", "device", "options")


@dataclass(frozen=True)
class ThroughputPass:
    """One side's run over all texts."""

    seconds: float
    sample: npt.NDArray[np.float32]  # (CHECKED_TEXTS, dimensions)
    about: Mapping[str, Any]
    other_cores: float = 0.0
    """Cores that programs outside the benchmark used meanwhile."""


@dataclass
class ThroughputPlan:
    """What is sent, how, and how long it may take."""

    texts: Sequence[str]
    warm_up: int
    connections: int
    batch: int
    rounds: int
    retries: int
    """Passes that may still be repeated because other programs were busy."""
    minutes: float
    runtimes: bool = True
    """Whether OpenVINO and ONNX Runtime are measured in process."""
    repeated: int = 0


@dataclass
class ThroughputResults:
    """Each side's passes in the order of the rounds, and why a side has none or too few."""

    passes: dict[str, list[ThroughputPass]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


MeasurePass = Callable[[str], ThroughputPass]
"""One pass; gets the label of its progress bar."""


def measure_rounds(names: Sequence[str], wanted: Wanted, plan: ThroughputPlan) -> ThroughputResults:
    """Measure servers and in-process sides in turns, in order and in reverse by turns."""
    results = ThroughputResults()
    sides = {name: side for name in names if (side := _server_side(name, wanted, plan, results)) is not None}
    if plan.runtimes:
        sides |= _runtime_sides(wanted, plan, results)
    sides[PACKED] = partial(_packed, wanted.model_folder, plan, results)
    sides[IN_PROCESS] = partial(_in_process, load_model(wanted.model_folder), plan)
    started = time.monotonic()
    for number in range(plan.rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            _measure(name, sides[name], f"round {number + 1}/{plan.rounds}, {name}", results)
            if name in results.failed:
                del sides[name]
        so_far = (time.monotonic() - started) / 60
        if number + 1 < plan.rounds and so_far * (number + 2) / (number + 1) > plan.minutes:
            print(f"{number + 1} rounds took {so_far:.1f} minutes; another would pass --minutes.", file=sys.stderr)
            break
    return results


def _server_side(name: str, wanted: Wanted, plan: ThroughputPlan, results: ThroughputResults) -> MeasurePass | None:
    try:
        return partial(_served, PEERS[name](wanted), plan)
    except Unavailable as error:
        results.failed[name] = str(error)
        print(f"{name}: {error}", file=sys.stderr)
        return None


def _runtime_sides(wanted: Wanted, plan: ThroughputPlan, results: ThroughputResults) -> dict[str, MeasurePass]:
    try:
        folder = environment(RUNTIMES_RECIPE, wanted.environments)
        model = folder / "model.onnx"
        if not model.exists():
            (packages,) = folder.glob("lib/python*/site-packages")
            export(wanted.model_folder, model, packages)
    except (Unavailable, RuntimeError, OSError) as error:
        results.failed |= dict.fromkeys(RUNTIMES, str(error))
        return {}
    rows = [row.tolist() for row in tokenize(wanted.model_folder, plan.texts)]
    given = json.dumps({"rows": rows, "batch_tokens": CPU_BATCH_TOKENS})
    return {
        name: partial(_in_runtime, (folder / "bin" / "python", model), kind, given, plan)
        for name, kind in RUNTIMES.items()
    }


def _in_runtime(
    files: tuple[Path, Path], kind: tuple[str, str], given: str, plan: ThroughputPlan, label: str
) -> ThroughputPass:
    python, model = files

    def once() -> ThroughputPass:
        with TemporaryDirectory() as folder, progress(label, len(plan.texts)) as advance:
            file = Path(folder, "vectors.npy")
            command = (python, Path(__file__).with_name("other_runtimes.py"), *kind, model, file)
            done = subprocess.run(command, input=given, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            advance(len(plan.texts))
            vectors = np.load(file)[:CHECKED_TEXTS]
            return ThroughputPass(json.loads(done.stdout)["seconds"], vectors, ABOUT_RUNTIMES[kind[0]])

    return _undisturbed(once, plan)


def _measure(name: str, side: MeasurePass, label: str, results: ThroughputResults) -> None:
    try:
        results.passes.setdefault(name, []).append(side(label))
    except (RuntimeError, OSError, httpx.HTTPError, subprocess.SubprocessError) as error:
        results.failed[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {error}", file=sys.stderr)


def _served(peer: Peer, plan: ThroughputPlan, label: str) -> ThroughputPass:
    send = partial(embed_all, connections=plan.connections, batch=plan.batch, dialect=peer.dialect)
    with peer.started() as server:
        send(server.url, plan.texts[: plan.warm_up])
        about = peer.about or _health(server)

        def once() -> ThroughputPass:
            with progress(label, len(plan.texts)) as advance:
                answered = send(server.url, plan.texts, advance=advance)
            return ThroughputPass(answered.seconds, answered.vectors[:CHECKED_TEXTS], about)

        return _undisturbed(once, plan)


def _health(server: RunningServer) -> dict[str, Any]:
    health = httpx.get(f"{server.url}/health", timeout=10.0).json()
    known = {key: health[key] for key in KNOWN_KEYS if key in health}
    return {**known, "dtype": str(known.get("dtype")).removeprefix("torch.")}


def _undisturbed(once: Callable[[], ThroughputPass], plan: ThroughputPlan) -> ThroughputPass:
    """A pass during which no other program was busy, or the last one where no repetition is left."""
    while True:
        with watched() as contention:
            measured = once()
        if contention.other_cores <= ALLOWED_OTHER_CORES or plan.repeated >= plan.retries:
            return ThroughputPass(measured.seconds, measured.sample, measured.about, contention.other_cores)
        plan.repeated += 1


def _in_process(model: Any, plan: ThroughputPlan, label: str) -> ThroughputPass:
    """All texts in one call, which sorts them by length."""

    def once() -> ThroughputPass:
        with progress(label, len(plan.texts)) as advance:
            encode(model.encode, plan.texts[:BATCH], BATCH, lambda _: None)
            started = time.perf_counter()
            vectors = encode(model.encode, plan.texts, len(plan.texts), advance)
            seconds = time.perf_counter() - started
        return ThroughputPass(seconds, vectors[:CHECKED_TEXTS], {"dtype": "float32", "device": str(model.device)})

    return _undisturbed(once, plan)


def _packed(model_folder: Path, plan: ThroughputPlan, results: ThroughputResults, label: str) -> ThroughputPass:
    """In the dtype that vecmill chose, so that HTTP and scheduler are all that is between the two."""
    served = results.passes.get("vecmill")
    dtype = str(served[-1].about["dtype"]) if served else "bfloat16"

    def once() -> ThroughputPass:
        with TemporaryDirectory() as folder, progress(label, len(plan.texts)) as advance:
            file = Path(folder, "vectors.npy")
            options = ["--model", str(model_folder), "--dtype", dtype, "--warm-up", str(plan.warm_up)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.serving.packed_loop", *options, "--vectors", str(file)],
                input=json.dumps(plan.texts),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            advance(len(plan.texts))
            answer = json.loads(done.stdout)
            return ThroughputPass(answer["seconds"], np.load(file)[:CHECKED_TEXTS], {"dtype": dtype, **answer})

    return _undisturbed(once, plan)
