"""The comparisons: each of vecmill's special paths against the plain way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks.lib.figures import significant
from benchmarks.lib.results import progress
from benchmarks.lib.timing import LIMITS, Machine, TimedSide, alternate, report
from benchmarks.models.builds import (
    OF_OTHER_FORM,
    RandomValues,
    build,
    build_beside_plain,
    build_latents,
    matmul_parameters,
    merged_and_separate,
)
from benchmarks.models.families import FAMILY_SHAPES, FamilyShape, both_sides, timed, tiny
from benchmarks.models.plain import PlainLatentAttention, by_length, padded, with_sdpa
from benchmarks.models.shapes import Shape, Sizes
from benchmarks.models.workloads import (
    BEFORE_DOCUMENT,
    CAUSAL,
    batches,
    computed_tokens,
    equal_rows,
    first_tokens,
    operations,
    ragged_rows,
    reranker_rows,
    run_model,
    with_shared_prefix,
)
from torch import Tensor

from vecmill.core.types import Row, Task
from vecmill.engine.device import choose_dtype, dtype_name
from vecmill.engine.warmup import CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS
from vecmill.models.networks import Model
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import PackedBatch, pack
from vecmill.models.weights import Target

# How far two answers may be apart, as a part of their norm. Through random weights rounding makes up to a third of it;
# a position or a mask that is wrong makes several times more.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.06}
# A score is one sum in which much cancels, so rounding is a larger part of it.
SCORE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}
LATENT_HEADS = 8
CHECKED_LAYERS = 4
FULL_ROW = 512


@dataclass(frozen=True)
class ModelCase:
    """One comparison; its first side is vecmill's."""

    name: str
    dtype: torch.dtype
    sides: Mapping[str, TimedSide]
    items: int
    """Of one call of each side."""
    unit: str
    answers: Mapping[str, Tensor]
    """(rows, values), the same rows from each side."""
    about: Mapping[str, Any]
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)


def measure(case: ModelCase, machine: Machine) -> dict[str, Any]:
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


def worst_error(first: Tensor, second: Tensor) -> float:
    """The largest difference of two rows, as a part of the row's norm; NaN counts as infinite."""
    first, second = first.float(), second.float()
    errors = (first - second).norm(dim=1) / second.norm(dim=1)
    return float(errors.nan_to_num(nan=torch.inf).max())


@dataclass(frozen=True)
class Given:
    """The settings that all cases share."""

    sizes: Sizes
    device: torch.device
    dtype: str
    """As the setting DTYPE."""

    @property
    def batch_tokens(self) -> int:
        """As the server's default."""
        return CPU_BATCH_TOKENS if self.device.type == "cpu" else CUDA_BATCH_TOKENS

    def target(self, width: int) -> Target:
        """The type that the server would choose, and the device."""
        return Target(choose_dtype(self.dtype, self.device, width).dtype, self.device)


def latent_attention(given: Given) -> Iterator[ModelCase]:
    """NV-Embed's, with its constants multiplied out at load, against the plain maths."""
    width = given.sizes.latent_width
    target = given.target(width)
    config = {"num_latents_value": given.sizes.latents, "num_cross_heads": LATENT_HEADS, "cross_dim_head": width}
    with TemporaryDirectory() as folder:
        folded = build_latents(width, config, target, Path(folder))
        load_plain = partial(
            PlainLatentAttention, Path(folder, "model.safetensors"), LATENT_HEADS, target.device, target.dtype
        )
        plain, kept = load_plain(), load_plain(kept=True)
    parameters = matmul_parameters([folded])
    for tokens in given.sizes.latent_tokens:
        hidden = RandomValues(target.device, target.dtype).tensor((tokens, width))
        sides = {
            "folded": _side(partial(folded, hidden), 2.0 * parameters * tokens, parameters, target),
            "plain": TimedSide(partial(plain, hidden), plain.operations(tokens), plain.weight_bytes()),
            "plain, keys kept": TimedSide(partial(kept, hidden), kept.operations(tokens), kept.weight_bytes()),
        }
        yield ModelCase(
            f"latent attention, {tokens} tokens",
            target.dtype,
            sides,
            tokens,
            "tokens",
            # The residual is taken off: it is the same on all sides and would hide a difference.
            {name: side.run().float() - hidden.float() for name, side in sides.items()},
            {"width": width, "latents": given.sizes.latents, "heads": LATENT_HEADS},
        )


def shared_prefix(given: Given) -> Iterator[ModelCase]:
    """Qwen3-Reranker: what a query's pairs have in common computed once, against each pair by itself."""
    shape = given.sizes.reranker
    target = given.target(shape["hidden_size"])
    model = _built("qwen3-reranker", shape, target)
    rows = reranker_rows(given.sizes.documents, given.sizes.document_tokens, shape["vocab_size"])
    ways = {"shared prefix": with_shared_prefix(rows), "each pair whole": [Row(row) for row in rows]}
    sides = {name: _model_side("qwen3-reranker", model, shape, [way], target) for name, way in ways.items()}
    with first_layers(model, CHECKED_LAYERS):
        answers = {name: _apart(side.run()) for name, side in sides.items()}
    computed = {name: computed_tokens(way) for name, way in ways.items()}
    yield ModelCase(
        f"shared prefix, {len(rows)} documents",
        target.dtype,
        sides,
        len(rows),
        "documents",
        answers,
        {
            "hidden_size": shape["hidden_size"],
            "layers": shape["num_hidden_layers"],
            "checked_layers": min(CHECKED_LAYERS, shape["num_hidden_layers"]),
            "prefix_tokens": BEFORE_DOCUMENT,
            "computed_tokens": computed,
            "saved_share": 1 - computed["shared prefix"] / computed["each pair whole"],
        },
        SCORE_TOLERANCE,
    )


@contextmanager
def first_layers(model: Model, count: int) -> Iterator[None]:
    """Run a decoder without its other layers: rounding grows with depth and would hide a position that is wrong."""
    backbone: Any = model.modules[0]
    layers = backbone.layers
    backbone.layers = layers[:count]
    try:
        yield
    finally:
        backbone.layers = layers


def _apart(scores: Tensor) -> Tensor:
    """(1, N) from the scores' mean: what all share would hide a difference."""
    return (scores - scores.mean()).view(1, -1)


def packed_rows(given: Given) -> Iterator[ModelCase]:
    """Ragged texts end to end, against transformers' own forward over padded batches of 32."""
    for name, (kind, shape) in given.sizes.encoders.items():
        yield _packed(name, kind, shape, given)


def _packed(name: str, kind: str, shape: Shape, given: Given) -> ModelCase:
    target = given.target(shape["hidden_size"])
    if kind in OF_OTHER_FORM:
        with TemporaryDirectory() as folder:
            model, plain = build_beside_plain(kind, shape, target, Path(folder))
    else:
        model = _built(kind, shape, target)
        plain = with_sdpa(model.modules[0])
    rows = ragged_rows(given.sizes.texts, shape["vocab_size"])
    packs = batches([Row(row) for row in rows], given.batch_tokens)
    packed = _model_side(kind, model, shape, packs, target)
    pad = partial(padded, plain, device=target.device, pooling="lasttoken" if kind in CAUSAL else "mean")
    sides = {
        "packed": packed,
        # The same useful work on both sides: computing padding does not count.
        "padded, sorted by length": replace(packed, run=partial(by_length, rows, pad)),
        "padded, as they come": replace(packed, run=partial(pad, rows)),
    }
    lengths = [len(row) for row in rows]
    return ModelCase(
        f"packed rows, {name}",
        target.dtype,
        sides,
        sum(lengths),
        "tokens",
        {name: side.run() for name, side in sides.items()},
        {
            "texts": len(rows),
            "mean_tokens": float(np.mean(lengths)),
            "median_tokens": float(np.median(lengths)),
            "packs": len(packs),
        },
    )


def merged_projections(given: Given) -> Iterator[ModelCase]:
    """Queries, keys and values in one product and gate and up in another, against each in its own."""
    for name, (kind, shape) in given.sizes.merged.items():
        yield from _merged(name, kind, shape, given)


def _merged(name: str, kind: str, shape: Shape, given: Given) -> Iterator[ModelCase]:
    text_shape = shape.get("text_config", shape)
    target = given.target(text_shape["hidden_size"])
    ways = dict(zip(("merged", "separate"), merged_and_separate(kind, shape, target), strict=True))
    parameters = matmul_parameters([ways["merged"]])
    texts = ragged_rows(64, text_shape["vocab_size"])
    for tokens in given.sizes.merged_tokens:
        packed = pack(first_tokens(texts, tokens), target.device, attention=attention_on(target.device, target.dtype))
        sides = {
            way: _side(partial(_hidden, model, packed), 2.0 * parameters * tokens, parameters, target)
            for way, model in ways.items()
        }
        yield ModelCase(
            f"merged projections, {name}, {tokens} tokens",
            target.dtype,
            sides,
            tokens,
            "tokens",
            {way: side.run().float() for way, side in sides.items()},
            {"hidden_size": text_shape["hidden_size"], "layers": text_shape["num_hidden_layers"]},
        )


def _hidden(model: Any, packed: PackedBatch) -> Tensor:
    """(T, width)"""
    hidden: Tensor = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        packed_batch=packed,
    ).last_hidden_state[0]
    return hidden


def whole_models(given: Given) -> Iterator[ModelCase]:
    """Full-size models, against what the machine can do alone."""
    for name, (kind, shape) in given.sizes.whole.items():
        yield from _whole(name, kind, shape, given)  # a function of its own: its model is gone when the next is made


def _whole(name: str, kind: str, shape: Shape, given: Given) -> Iterator[ModelCase]:
    text_shape = shape.get("text_config", shape)
    target = given.target(shape["hidden_size"])
    model = _built(kind, shape, target)
    for tokens in given.sizes.whole_tokens:
        rows = [Row(row) for row in equal_rows(tokens, FULL_ROW, text_shape["vocab_size"])]
        side = _model_side(kind, model, text_shape, [rows], target)
        yield ModelCase(
            f"whole model, {name}, {tokens} tokens",
            target.dtype,
            {"forward": side},
            tokens,
            "tokens",
            {"together": side.run()[-1:], "alone": run_model(model, [rows[-1:]], target.device)},
            {
                "rows": len(rows),
                "layers": text_shape["num_hidden_layers"],
                "matmul_parameters": matmul_parameters(model.modules),
            },
        )


def _built(kind: str, shape: Shape, target: Target) -> Model:
    with TemporaryDirectory() as folder:
        return build(kind, shape, target, Path(folder))


def families(given: Given, only: str | None = None) -> Iterator[ModelCase]:
    """Models of the hub's shapes, packed, against padded batches through sentence-transformers."""
    for name, model in FAMILY_SHAPES.items():
        if only in (None, name):
            yield from _family(name, tiny(model) if given.sizes.tiny_families else model, given)


def _family(name: str, model: FamilyShape, given: Given) -> Iterator[ModelCase]:
    target = given.target(model.shape["hidden_size"])
    for both in both_sides(model, target, given.sizes.family_texts, given.batch_tokens):
        sides = timed(both, target.dtype)
        answers = {side: timed_side.run() for side, timed_side in sides.items()}
        reranks = model.task is Task.RERANK
        yield ModelCase(
            f"family, {name}",
            target.dtype,
            sides,
            sum(both.tokens),
            "tokens",
            {side: _apart(answer) if reranks else answer for side, answer in answers.items()},
            {
                "hidden_size": model.shape["hidden_size"],
                "layers": model.shape["num_hidden_layers"],
                "texts": len(both.tokens),
                "mean_tokens": float(np.mean(both.tokens)),
                "median_tokens": float(np.median(both.tokens)),
                "packs": both.packs,
            },
            SCORE_TOLERANCE if reranks else TOLERANCE,
        )


def _model_side(kind: str, model: Model, shape: Shape, packs: Sequence[Sequence[Row]], target: Target) -> TimedSide:
    weights = matmul_parameters(model.modules) * len(packs)
    run = partial(run_model, model, packs, target.device)
    return _side(run, operations(kind, model, shape, packs), weights, target)


def _side(run: Callable[[], Tensor], computed: float, parameters: int, target: Target) -> TimedSide:
    return TimedSide(run, computed, parameters * target.dtype.itemsize)


CASES: Mapping[str, Callable[[Given], Iterator[ModelCase]]] = {
    make.__name__: make
    for make in (latent_attention, shared_prefix, packed_rows, merged_projections, whole_models, families)
}
ONLY = (*CASES, *FAMILY_SHAPES)
"""What can be measured alone."""


def cases(given: Given, only: str | None = None) -> Iterator[ModelCase]:
    """All of them, or those of one name in ONLY."""
    if only in FAMILY_SHAPES:
        yield from families(given, only)
    for name, make in CASES.items():
        if only in (None, name):
            yield from make(given)
