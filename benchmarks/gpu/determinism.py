"""DETERMINISTIC=true: whether a row's bits stay the same, how far batches move vectors without it, and what it costs.

Each model runs in bfloat16 as the server runs it with that setting: each row in a pass of its own, in kernels that give
the same bits each time, with layers as they are written. Its rows run one by one, and then in batches of other
compositions that overlap on both streams, each composition twice; the bits must be those of the row alone. Afterwards
the same weights run as they do without the setting: rows packed, layers compiled, passes in CUDA graphs. Before all
that the same is proven of a small model in the server's own engine.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from benchmarks.gpu.forward import CAPTURE_SECONDS, COMPILE_SECONDS, START_SECONDS
from benchmarks.gpu.proofs import tiny_engine
from benchmarks.gpu.stages import Stages
from benchmarks.gpu.subjects import MAX_ROWS, GpuSizes, Subject, compile_if_possible, make
from benchmarks.lib.figures import significant, spread
from benchmarks.models.workloads import answers_of, batches

from vecmill.core.types import Lane, Matrix, Prefix, Row, Vector
from vecmill.engine import determinism
from vecmill.engine.cuda_graphs import CudaCapture, Graphs, capture_graphs
from vecmill.engine.forward import CpuThreads, Device, Launched, LoadedModel, Streams, launch
from vecmill.models.packing import PackedBatch
from vecmill.models.weights import Target

ENGINE = "a tiny Qwen3 in the engine"
ENGINE_ROWS, ENGINE_COMPOSITIONS = 40, 4
ENGINE_SECONDS = 20.0
BUILD_SECONDS = 5.0
PASS_SECONDS = 0.04  # of a short row alone, launched kernel by kernel: 4B parameters on an H100
AT_ONCE = 4  # batches: the engine launches two of each lane
LARGEST_BATCH = 64  # rows, where the composition is random
TOP = 10
FILLED_PACKS = 4
"""So many full packs at least are timed."""

Keep = Callable[[str, dict[str, Any]], None]
Doubles = np.typing.NDArray[np.float64]
Batch = Sequence[int]
"""The indexes of its rows."""


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """What DETERMINISTIC=true sets for a whole process; afterwards torch's switches are what they were before.

    Only the size of cuBLAS's workspaces stays: torch reads it once. On Hopper it is torch's own.
    """
    matmul, memory = torch.backends.cuda.matmul, cast(Any, torch.utils.deterministic)
    enabled, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    determinism.configure(device)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        memory.fill_uninitialized_memory = filled
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = reduced


def determinism_of_models(device: torch.device, keep: Keep, stages: Stages, sizes: GpuSizes, rounds: int) -> None:
    """Add to the results, model by model: the proof first, then what it is compared with."""
    proof = stages.run(ENGINE, ENGINE_SECONDS, partial(_engine, device))
    if proof is not None:
        keep(ENGINE, proof)
    on = Device(device, Streams.on(device) if device.type == "cuda" else None)
    with torch.inference_mode():
        for name in sizes.models:
            stages.guard(name, partial(_measure, name, on, keep, stages, sizes, rounds))


def _engine(device: torch.device) -> dict[str, Any]:
    """Through the server's loader and queues: batches of both lanes wait at once, and some rows have a prefix."""
    random = np.random.default_rng(0)
    prefix = Prefix(random.integers(0, 200, 13).astype(np.int32))
    rows = [
        Row(random.integers(0, 200, length).astype(np.int32), prefix=prefix if length % 2 else None)
        for length in random.integers(1, 300, ENGINE_ROWS)
    ]
    flags = {"dtype": "bfloat16", "deterministic": True}
    with deterministic_kernels(device), tiny_engine(device.type, flags) as engine:
        (key,) = engine.loaded.result().models

        async def answers(batches: Sequence[Batch], first: int) -> list[tuple[Lane, Batch, Sequence[Any]]]:
            lanes = _lanes(len(batches), first)
            passes = (
                engine.run(key, [rows[index] for index in batch], lane)
                for batch, lane in zip(batches, lanes, strict=True)
            )
            done = await asyncio.gather(*passes)
            return [(lane, batch, each.rows) for lane, batch, each in zip(lanes, batches, done, strict=True)]

        bits = compared(lambda chosen, first: asyncio.run(answers(chosen, first)), ENGINE_ROWS, ENGINE_COMPOSITIONS)
    return {"dtype": "bfloat16", **bits}


def _measure(name: str, on: Device, keep: Keep, stages: Stages, sizes: GpuSizes, rounds: int) -> None:
    with TemporaryDirectory() as folder:
        build = partial(_build, name, sizes, on.device, Path(folder))
        subject = stages.run(f"{name}: build", BUILD_SECONDS, build)
        if subject is None:
            return
        texts = Texts.of(subject, sizes)
        needs = PASS_SECONDS * len(texts.rows) * (2 + 2 * sizes.compositions + rounds)
        proof = stages.run(f"{name}: the same bits", needs, partial(_deterministic, subject, on, texts, sizes, rounds))
        if proof is None:
            return
        keep(name, proof)
        plain = _as_without(subject, on, stages, sizes)
        needs = START_SECONDS + PASS_SECONDS * len(texts.searched)
        found = stages.run(f"{name}: packed", needs, partial(_packed, plain, on, texts, sizes, rounds))
        if found is not None:
            rates = (side["rows_per_s"]["median"] for side in (proof["deterministic"], found["packed"]))
            keep(name, {**proof, **found, "rate_kept": significant(next(rates) / next(rates))})


def _build(name: str, sizes: GpuSizes, device: torch.device, folder: Path) -> Subject:
    kind, shape = sizes.models[name]
    with deterministic_kernels(device):  # before anything runs there, as when the server starts
        return make(name, kind, shape, sizes, Target(torch.bfloat16, device), folder)


@dataclass(frozen=True)
class Texts:
    """The rows of one model."""

    rows: Sequence[Row]
    """Whose bits are compared, and that rates are of."""
    long: Row
    """Runs so long that others run beside it, on the other stream."""
    queries: Sequence[Row]
    documents: Sequence[Row]

    @property
    def searched(self) -> list[Row]:
        """Queries and documents."""
        return [*self.queries, *self.documents]

    @classmethod
    def of(cls, subject: Subject, sizes: GpuSizes) -> Texts:
        """Documents in the lengths of code chunks; queries have the fewest tokens that are measured."""
        queries, documents = sizes.searched
        cut = [Row(text[: sizes.tokens[0]]) for text in subject.texts[documents : documents + queries]]
        whole = [Row(text) for text in subject.texts]
        long = Row(np.concatenate(subject.texts)[: sizes.longest_text])
        return cls(whole[: sizes.compared_rows], long, cut, whole[:documents])


def _loaded(subject: Subject, graphs: Graphs, *, alone: bool) -> LoadedModel:
    """The model as the engine's loader has it, with DETERMINISTIC or without."""
    absent = cast(Any, None)  # neither packing nor passes read them
    threads = CpuThreads(fixed=alone)
    model, attention = subject.model, subject.attention
    return LoadedModel(absent, absent, model, absent, attention, threads=threads, graphs=graphs, alone=alone)


def _deterministic(subject: Subject, on: Device, texts: Texts, sizes: GpuSizes, rounds: int) -> dict[str, Any]:
    with deterministic_kernels(on.device):
        model = _loaded(subject, Graphs(), alone=True)
        bits = same_bits(model, [*texts.rows, texts.long], on, sizes.compositions)
        rate = rows_per_s(model, texts.rows, [range(len(texts.rows))], on, rounds)
    return {"dtype": "bfloat16", **bits, "deterministic": {"rows_per_s": rate}}


def _as_without(subject: Subject, on: Device, stages: Stages, sizes: GpuSizes) -> LoadedModel:
    """The model as it runs without DETERMINISTIC: compiled, its passes captured."""
    torch._dynamo.reset()  # what was compiled for the model before
    compile_layers = partial(compile_if_possible, subject, sizes.compile_backend)
    stages.run(f"{subject.name}: compile", COMPILE_SECONDS, compile_layers)
    graphs: Graphs | None = None
    if on.streams is not None:
        capture = partial(_capture, subject, on.device, on.streams, sizes.busy_tokens)
        graphs = stages.run(f"{subject.name}: capture", CAPTURE_SECONDS, capture)
    return _loaded(subject, graphs or Graphs(), alone=False)


def _capture(subject: Subject, device: torch.device, streams: Streams, largest: int) -> Graphs:
    def run_directly(packed: PackedBatch) -> None:
        subject.model.forward(packed)

    capture = CudaCapture(subject.model, device, streams.run)
    return capture_graphs(capture, run_directly, device, largest, MAX_ROWS)


def _packed(model: LoadedModel, on: Device, texts: Texts, sizes: GpuSizes, rounds: int) -> dict[str, Any]:
    moved = movement(model, texts.queries, texts.documents, on, sizes.compositions)
    times = math.ceil(FILLED_PACKS * sizes.busy_tokens / sum(map(len, texts.rows)))
    rows = [*texts.rows] * times  # the same lengths as in the other rate, in packs that are full
    ends = accumulate(map(len, batches(rows, sizes.busy_tokens)), initial=0)
    rate = rows_per_s(model, rows, [range(*each) for each in pairwise(ends)], on, rounds)
    compiled = any(layer._compiled_call_impl is not None for layer in model.model.layers)
    ran = {"compiled": compiled, "graphs": len(model.graphs.passes), "rows_per_s": rate}
    return {"moved": moved, "packed": ran}


def same_bits(model: LoadedModel, rows: Sequence[Row], on: Device, compositions: int) -> dict[str, Any]:
    """How many answers of rows in batches have other bits than the row alone."""

    def answers(chosen: Sequence[Batch], first: int) -> Iterator[tuple[Lane, Batch, Sequence[Any]]]:
        return run(model, rows, zip(_lanes(len(chosen), first), chosen, strict=True), on)

    return compared(answers, len(rows), compositions)


Answers = Callable[[Sequence[Batch], int], Iterable[tuple[Lane, Batch, Sequence[Any]]]]
"""Runs batches, by turns in both lanes from the one with a number on: each batch with its lane and its answers."""


def compared(answers: Answers, rows: int, compositions: int) -> dict[str, Any]:
    """Each composition runs twice: the second time its batches are in the other lanes, and so on other streams."""
    random = np.random.default_rng(0)
    alone = [each.tobytes() for index in range(rows) for _, _, (each,) in answers([[index]], 0)]  # nothing beside it
    answered, other_bits = Counter[Lane](), Counter[Lane]()
    batches = 0
    for _ in range(compositions):
        composition = list(composed(random, rows))
        for first in range(len(Lane)):
            batches += len(composition)
            for lane, batch, given in answers(composition, first):
                answered[lane] += len(batch)
                other_bits[lane] += sum(
                    each.tobytes() != alone[index] for index, each in zip(batch, given, strict=True)
                )
    bits = {
        "rows": rows,
        "batches": batches,
        "answers": {lane.value: answered[lane] for lane in Lane},
        "other_bits": {lane.value: other_bits[lane] for lane in Lane},
        "kept": 1 - other_bits.total() / answered.total(),
        # Weights and rows are drawn alike in each run: on the same card the next run has this one, too.
        "digest": sha256(b"".join(alone)).hexdigest()[:16],
    }
    return {"ok": not other_bits.total() and len(set(alone)) > 1, "bits": bits}


def _lanes(batches: int, first: int) -> list[Lane]:
    lanes = tuple(Lane)
    return [lanes[(first + number) % len(lanes)] for number in range(batches)]


def movement(
    model: LoadedModel, queries: Sequence[Row], documents: Sequence[Row], on: Device, compositions: int
) -> dict[str, Any]:
    """How far vectors in random batches are from those of the same rows alone, and whose ten nearest are others."""
    random = np.random.default_rng(0)
    rows = [*queries, *documents]
    alone = _unit(vectors(model, rows, each_alone(rows), on))
    wanted = nearest(alone, len(queries))
    farthest, other_vectors, set_changed, order_changed = 0.0, 0, set[int](), set[int]()
    for _ in range(compositions):
        batched = _unit(vectors(model, rows, composed(random, len(rows)), on))
        farthest = max(farthest, float(np.square(batched - alone).sum(axis=1).max()))
        other_vectors += int((batched != alone).any(axis=1).sum())
        for query, (mine, theirs) in enumerate(zip(nearest(batched, len(queries)), wanted, strict=True)):
            if list(mine) != list(theirs):
                order_changed.add(query)
            if set(mine) != set(theirs):
                set_changed.add(query)
    return {
        "queries": len(queries),
        "documents": len(documents),
        "compositions": compositions,
        "least_cosine": 1 - farthest / 2,
        "one_minus_cosine": significant(farthest / 2),
        "other_vectors": significant(other_vectors / (compositions * len(rows))),
        "other_top_ten": len(set_changed),
        "other_order": len(order_changed),
    }


def nearest(unit_vectors: Doubles, queries: int) -> list[list[int]]:
    """The documents nearest to each query, the nearest first; the first rows are the queries."""
    similarities = unit_vectors[:queries] @ unit_vectors[queries:].T
    return [np.argsort(-row, kind="stable")[:TOP].tolist() for row in similarities]


def rows_per_s(
    model: LoadedModel, rows: Sequence[Row], chosen: Sequence[Batch], on: Device, rounds: int
) -> dict[str, Any]:
    """Of bulk, after one run that prepares kernels and memory."""
    rates = []
    for _ in range(rounds + 1):
        started = perf_counter()
        for _ in run(model, rows, _on(Lane.BULK, chosen), on):
            pass
        rates.append(len(rows) / (perf_counter() - started))
    return spread(rates[1:])


def vectors(model: LoadedModel, rows: Sequence[Row], chosen: Iterable[Batch], on: Device) -> Matrix:
    """(n, width) in the rows' order."""
    found: Matrix = np.empty((len(rows), model.model.width), np.float32)
    for _, batch, answers in run(model, rows, _on(Lane.BULK, chosen), on):
        found[list(batch)] = answers
    return found


def run(
    model: LoadedModel, rows: Sequence[Row], chosen: Iterable[tuple[Lane, Batch]], on: Device
) -> Iterator[tuple[Lane, Batch, list[Vector]]]:
    """The answers of each batch, with its lane. Several are launched at a time, as in the engine.

    Raises:
        Exception: why a row has no answer.
    """
    launched: deque[tuple[Lane, Batch, Launched]] = deque()
    for lane, batch in chosen:
        launched.append((lane, batch, launch(model, [rows[index] for index in batch], on, lane)))
        if len(launched) == AT_ONCE:
            yield _next_of(launched)
    while launched:
        yield _next_of(launched)


def _next_of(launched: deque[tuple[Lane, Batch, Launched]]) -> tuple[Lane, Batch, list[Vector]]:
    lane, batch, first = launched.popleft()
    return lane, batch, answers_of(first)


def _on(lane: Lane, chosen: Iterable[Batch]) -> Iterator[tuple[Lane, Batch]]:
    return ((lane, batch) for batch in chosen)


def each_alone(rows: Sequence[Row]) -> list[Batch]:
    """A batch for each row."""
    return [range(index, index + 1) for index in range(len(rows))]


def composed(random: np.random.Generator, rows: int) -> Iterator[Batch]:
    """All rows in random order, in batches of random sizes, as many small ones as large ones."""
    order = random.permutation(rows).tolist()
    while order:
        size = int(2 ** random.uniform(0, math.log2(LARGEST_BATCH + 1)))
        yield order[:size]
        order = order[size:]


def _unit(values: Matrix) -> Doubles:
    doubles = values.astype(np.float64)  # the comparison's own rounding must not count
    unit: Doubles = doubles / np.linalg.norm(doubles, axis=1, keepdims=True)
    return unit
