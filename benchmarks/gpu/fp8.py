"""DTYPE=fp8 beside bfloat16: whether its kernels compute what they should, and tokens a second, memory and cosine.

Both models have the same random weights and run in turns, their layers compiled where that can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.gpu.forward import timed
from benchmarks.gpu.subjects import FULL, TINY, GpuSizes, Subject, compile_if_possible, forward, make
from benchmarks.lib.figures import significant
from benchmarks.lib.timing import Machine
from benchmarks.models.workloads import first_tokens
from rich.console import Console
from rich.table import Table

from vecmill.models.float8 import PRODUCTS, Product, in_bfloat16, product_on, round_weight, rounded, to_float8
from vecmill.models.weights import Target

MODELS = 2  # of the sizes, the first ones
TOKENS = (16, 256, 1024, 4096, 16384)
COMPARED_TOKENS = 4096
KERNEL_SHAPES = ((16, 2560, 2560), (100, 2560, 19456), (4096, 9728, 2560), (1, 768, 768))
"""Tokens, inputs and outputs."""
TINY_SHAPES = KERNEL_SHAPES[-1:]
MOST_OFF = 0.01  # of a product's length: both ways round to bfloat16
LEAST_COSINE = 0.9  # of random weights, which are worse than trained ones
EXACT, SMALL = "bfloat16", "fp8"

Keep = Callable[[str, dict[str, Any]], None]


def fp8_beside_bfloat16(device: torch.device, keep: Keep, *, tiny: bool, rounds: int) -> None:
    """Add the kernels, then each model."""
    sizes = TINY if tiny else FULL
    with torch.inference_mode():
        keep("kernels", kernels(device, TINY_SHAPES if tiny else KERNEL_SHAPES))
        for name in list(sizes.models)[:MODELS]:
            keep(name, compare(name, sizes, device, rounds))


Shapes = Sequence[tuple[int, int, int]]


def kernels(device: torch.device, shapes: Shapes) -> dict[str, Any]:
    """How far each way to multiply is from the same numbers multiplied in bfloat16, in lengths of the product."""
    ways: dict[str, Any] = {product.__name__: _off(product, device, shapes) for product in PRODUCTS}
    chosen = product_on(device).__name__
    return {"ok": isinstance(ways[chosen], float) and ways[chosen] < MOST_OFF, "chosen": chosen, "off": ways}


def _off(product: Product, device: torch.device, shapes: Shapes) -> float | str:
    """The largest over all shapes; a sentence where the way does not exist here."""
    largest = 0.0
    for tokens, inputs, outputs in shapes:
        values, scales = rounded(torch.randn(tokens, inputs, device=device))
        weight, weight_scales = round_weight(torch.randn(outputs, inputs, device=device))
        try:
            found = product(values, weight, scales, weight_scales, None).float()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:160]
        wanted = in_bfloat16(values, weight, scales, weight_scales, None).float()
        largest = max(largest, float((found - wanted).norm() / wanted.norm()))
    return significant(largest)


def compare(name: str, sizes: GpuSizes, device: torch.device, rounds: int) -> dict[str, Any]:
    """One model in both types."""
    kind, shape = sizes.models[name]
    machine = Machine(device, rounds, sizes.seconds, sizes.matmul_size, sizes.copy_bytes)
    with TemporaryDirectory() as exact_folder, TemporaryDirectory() as small_folder:
        subjects = {
            way: make(name, kind, shape, sizes, Target(torch.bfloat16, device), Path(folder))
            for way, folder in ((EXACT, exact_folder), (SMALL, small_folder))
        }
        small = subjects[SMALL]
        tokens = [each for each in TOKENS if each <= max(sizes.tokens)]
        samples = first_tokens(small.texts, min(COMPARED_TOKENS, max(sizes.tokens)))
        comparison = to_float8(small.model, samples, device, small.attention)
        compiled = {way: compile_if_possible(subject, sizes.compile_backend) for way, subject in subjects.items()}
        sides = {
            f"{way} {count}": forward(subject, first_tokens(subject.texts, count))
            for count in tokens
            for way, subject in subjects.items()
        }
        times = timed(f"{name}, fp8 beside bfloat16", machine, torch.bfloat16, sides)["sides"]
        weights = {way: _weights_gb(subject) for way, subject in subjects.items()}
    return {
        "ok": comparison.least_cosine > LEAST_COSINE,
        "product": product_on(device).__name__,
        "least_cosine": round(comparison.least_cosine, 5),
        "texts": comparison.texts,
        "weights_gb": weights,
        "compiled": compiled,
        "forwards": [_forward(count, {way: times[f"{way} {count}"] for way in subjects}) for count in tokens],
    }


def _forward(tokens: int, sides: Mapping[str, Any]) -> dict[str, Any]:
    milliseconds = {way: side["ms"]["median"] for way, side in sides.items()}
    return {
        "tokens": tokens,
        "ms": {way: side["ms"] for way, side in sides.items()},
        "tokens_per_s": {way: significant(1000 * tokens / each) for way, each in milliseconds.items()},
        "times_as_fast": significant(milliseconds[EXACT] / milliseconds[SMALL]),
    }


def _weights_gb(subject: Subject) -> float:
    held = {id(each): each for module in subject.model.modules for each in module.parameters()}
    return significant(sum(each.nbytes for each in held.values()) / 1e9)


def print_fp8(console: Console, proofs: Mapping[str, Any]) -> None:
    """A row for each model and number of tokens."""
    headings = ("tokens", "bfloat16 tokens/s", "fp8 tokens/s", "times as fast", "weights GB", "least cosine")
    table = Table("", *headings, box=None)
    for name, found in proofs.items():
        for side in found.get("forwards", ()):
            rates = (f"{side['tokens_per_s'][way]:,.0f}" for way in (EXACT, SMALL))
            weights = " to ".join(f"{found['weights_gb'][way]:.3g}" for way in (EXACT, SMALL))
            row = (*rates, f"{side['times_as_fast']:.2f}", weights, f"{found['least_cosine']:.4f}")
            table.add_row(name, str(side["tokens"]), *row)
    console.print(table)
