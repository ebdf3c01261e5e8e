"""torch.compile of a model's layers: one graph for all its layers and all lengths, and eager where that is no slower.

Layers are compiled and not whole models: they are all alike, so that a model of 36 compiles as fast as one of 6.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from vecmill.models.networks import Model
from vecmill.models.packed_attention import LayerCall, compiled_call

logger = logging.getLogger(__name__)

Run = Callable[[int], float]
"""One warm forward pass of so many tokens in ragged rows; its seconds."""

# A query alone, and a batch that keeps the device busy.
MEASURED_TOKENS = (48, 512)
MEASURE_SECONDS = 3.0
MEASURE_ROUNDS = 40
# Below this it is noise, and eager is simpler.
LEAST_SPEEDUP = 1.03
# As a factor: how much longer than the fastest pass of its size the median one takes where other work disturbs.
DISTURBED = 1.3
LONGEST_PHRASE = 160  # characters
DYNAMO = "torch._dynamo"


@dataclass(frozen=True, slots=True)
class CompileChoice:
    """How a model's layers run."""

    compiled: bool
    reason: str
    """One phrase for the log."""
    is_disturbed: bool = False
    """Whether other work disturbed the measurement: at the next start it is measured again."""


def choose(
    model: Model, wanted: str, run: Run, backend: str = "inductor", prepare: Callable[[], Run] | None = None
) -> CompileChoice:
    """Compile a model's layers, or leave them eager, as TORCH_COMPILE wants it: `auto`, `true` or `false`.

    `prepare` makes ready what is measured, of the layers as they are at that moment (a graph of them); left out, `run`
    itself is measured.

    Must be called in the thread and the inference mode that the model is then run in: what is compiled holds only
    there. What cannot be compiled is eager, with a warning.
    """
    if wanted == "false":
        return CompileChoice(False, "eager: TORCH_COMPILE=false")
    if not model.layers:
        return CompileChoice(False, "eager: it has no layers")
    try:
        compile_layers(model.layers, run, backend)
        speedup, spread = (None, 1.0) if wanted == "true" else _speedup(model.layers, prepare or (lambda: run))
    except Exception as error:  # compilers fail in every way there is
        make_eager(model.layers)
        reason = f"eager: could not be compiled ({_phrase(error)})"
        logger.warning("torch.compile failed: the layers run in eager mode: %s", _phrase(error))
        return CompileChoice(False, reason)
    if speedup is None:
        return CompileChoice(True, "compiled: TORCH_COMPILE=true")
    measured, disturbed = f"{speedup:.2f} times as fast as eager, measured at warm-up", spread > DISTURBED
    if disturbed:
        measured += " beside other work: it is measured again at the next start"
    if speedup >= LEAST_SPEEDUP:
        return CompileChoice(True, f"compiled: {measured}", disturbed)
    make_eager(model.layers)
    return CompileChoice(False, f"eager: compiled is {measured}", disturbed)


def compile_layers(layers: Sequence[nn.Module], run: Run, backend: str = "inductor") -> None:
    """Have the layers run compiled, and compile them by running them.

    Raises:
        Exception: they cannot be compiled; they are to be made eager again.
    """
    if not layers:
        return
    # torch's own modules, as inductor imports them.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
    compiled = _Compiled(layers[0], backend)
    _set_calls(layers, [partial(compiled, number, layer) for number, layer in enumerate(layers)])
    for tokens in MEASURED_TOKENS:
        run(tokens)
        compiled.traced = True


def make_eager(layers: Sequence[nn.Module]) -> None:
    """Have the layers run as they are written."""
    _set_calls(layers, None)


def compilations() -> int:
    """Graphs compiled in this process so far: no more once the server says that it is ready."""
    dynamo = sys.modules.get(DYNAMO)  # not imported for this: it takes longer than torch itself
    return int(dynamo.utils.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


class _Compiled:
    """The forward method of layers of one class, compiled once for all of them."""

    def __init__(self, layer: nn.Module, backend: str) -> None:
        # fullgraph: an error instead of pieces with Python between them.
        self._forward = torch.compile(type(layer).forward, fullgraph=True, backend=backend)
        self.traced = False
        """Whether every layer has run once."""

    def __call__(self, number: int, layer: nn.Module, *args: Any, packed_batch: Any, **kwargs: Any) -> Any:
        if not self.traced:
            _mark_tokens((*args, *kwargs.values()))
        token = compiled_call.set(LayerCall(number, packed_batch))
        try:
            return self._forward(layer, *args, packed_batch=None, **kwargs)
        finally:
            compiled_call.reset(token)  # or the batch's prefixes would outlive their request


def _mark_tokens(values: Iterable[object]) -> None:
    """Say that dimension 1, T in all that a layer takes, differs from call to call.

    Left to find out, dynamo compiles for the first length it sees, and again at the second.
    """
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 1:
            import_module(DYNAMO).mark_dynamic(value, 1)
        elif isinstance(value, tuple):
            _mark_tokens(value)


def _set_calls(layers: Sequence[nn.Module], calls: Sequence[Callable[..., Any] | None] | None) -> None:
    for number, layer in enumerate(layers):
        layer._compiled_call_impl = calls[number] if calls is not None else None  # what nn.Module.compile sets


def _speedup(layers: Sequence[nn.Module], prepare: Callable[[], Run]) -> tuple[float, float]:
    """Times that compiled layers are as fast as eager ones: the mean over the measured sizes. And the spread: times
    that the median eager run is as long as the fastest, of the size at which that is more.

    Of each size the median of pairs, one run right after the other and each first in turn: what slows a machine down
    for a while slows both.
    """
    calls = [layer._compiled_call_impl for layer in layers]
    runs: dict[bool, Run] = {}
    for compiled in (False, True):
        _set_calls(layers, calls if compiled else None)
        runs[compiled] = prepare()
    ratios: dict[int, list[float]] = {tokens: [] for tokens in MEASURED_TOKENS}
    eager: dict[int, list[float]] = {tokens: [] for tokens in MEASURED_TOKENS}
    started = perf_counter()
    for number in range(MEASURE_ROUNDS):
        for tokens in MEASURED_TOKENS:
            seconds = {}
            for compiled in (False, True) if number % 2 else (True, False):
                _set_calls(layers, calls if compiled else None)
                seconds[compiled] = runs[compiled](tokens)
            ratios[tokens].append(seconds[False] / seconds[True])
            eager[tokens].append(seconds[False])
        if perf_counter() - started > MEASURE_SECONDS:
            break
    _set_calls(layers, calls)
    spread = max(median(taken) / min(taken) for taken in eager.values())
    return geometric_mean(median(of_size) for of_size in ratios.values()), spread


def _phrase(error: Exception) -> str:
    """The first line of what went wrong; backends wrap it."""
    cause = getattr(error, "inner_exception", error)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"[:LONGEST_PHRASE]
