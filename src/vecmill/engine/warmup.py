"""Warm-up: the largest shape first, so that memory does not grow once the server is ready, and then what each costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import nn

from vecmill.config import EngineSettings
from vecmill.core.calibration import BULK_RATE_FRACTION, BULK_RATE_FRACTION_ON_CPU, Calibration, Warmed, fit
from vecmill.core.errors import StartupObstacle
from vecmill.core.types import Lane, Row
from vecmill.engine import compilation
from vecmill.engine.compilation import CompileChoice, Run
from vecmill.engine.cuda_graphs import Capture, CudaCapture, Pass, capture_graphs, lane_of, shape_of
from vecmill.engine.device import unless_out_of_memory
from vecmill.engine.forward import Device, LoadedModel, collect, launch, pack_on
from vecmill.engine.measurements import Before
from vecmill.models.packing import Attention, PackedBatch, PackShape, pack

logger = logging.getLogger(__name__)

CUDA_BATCH_TOKENS = 16_384
# Shared out among the threads: 2,048 for each of two. With 1,024 for each a text takes a tenth longer, since every
# pass reads all weights and calls attention once for each length of its rows.
CPU_BATCH_TOKENS = 4_096
CPU_TOKENS_PER_ROW = 32
FEWEST_ROWS = 64  # the limit of a pass is not below it, unless it has fewer tokens
# A pass of a table of token vectors is over in less time than handing it over takes. Where passes are so short they are
# made longer, up to so many tokens: nobody waits noticeably for one, and it packs and hands over for more texts.
SHORT_PASS_SECONDS = 0.005
CPU_SHORT_PASS_TOKENS = 8_192
# On a GPU texts of so few tokens on average still fill a forward pass. With 64 rows they did not: queries of 16 tokens
# made passes of 1,024, which take an H100 as long as 4,096 where each kernel is launched, and 1.4 times as long a token
# in graphs.
SHORT_TEXT = 16
SMALLEST_SHAPE = 16  # tokens: a search query
TYPICAL_TEXT = 128  # tokens: a chunk of code
# Tokens of the passes of a first look; the last where it takes no longer than a pass may.
QUICK_LOOK = (SMALLEST_SHAPE, TYPICAL_TEXT, 4 * TYPICAL_TEXT)
# A first look compares one thread with all in so many runs of each, unless a pass of a typical text takes longer.
QUICK_RUNS, QUICK_PASS_SECONDS = 2, 0.05
# Rounds over all shapes, until one of these is reached. Of each shape the fastest run counts: others were disturbed,
# and what disturbs rarely lasts for all rounds. What requests' own passes take tells the rest (`RunningFit`).
ROUNDS, ENOUGH_SECONDS = 6, 0.5


Choices = dict[nn.Module, CompileChoice]
"""By the first layer of a model, see `_shared`."""


def _shared(model: LoadedModel) -> nn.Module:
    """What two models that are one network have in common."""
    return model.model.layers[0] if model.model.layers else model.model.modules[0]


def largest_batch(engine: EngineSettings, device: torch.device) -> int:
    """Tokens of the largest forward pass that is tried."""
    return engine.max_batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else CUDA_BATCH_TOKENS)


def most_tokens(engine: EngineSettings, device: torch.device) -> int:
    """Tokens of a forward pass, at the most: of the largest that is tried, or to which short passes are lengthened."""
    tokens = largest_batch(engine, device)
    return max(tokens, CPU_SHORT_PASS_TOKENS) if engine.max_batch_tokens is None and device.type == "cpu" else tokens


def largest_size(engine: EngineSettings, device: torch.device, tokens: int | None = None) -> int:
    """Rows of a forward pass of so many tokens, at most; left out, of the largest that is tried."""
    if engine.max_batch_size is not None:
        return engine.max_batch_size
    tokens = largest_batch(engine, device) if tokens is None else tokens
    per_row = CPU_TOKENS_PER_ROW if device.type == "cpu" else SHORT_TEXT
    return min(tokens, max(FEWEST_ROWS, tokens // per_row))


def warm_up(
    model: LoadedModel,
    engine: EngineSettings,
    device: Device,
    choices: Choices,
    before: Before | None = None,
    serve_others: Callable[[], None] = lambda: None,
    *,
    at_once: bool = False,
) -> Warmed:
    """Run every shape; choose between eager and compiled layers; capture graphs; fit the cost and set the budgets.

    With `at_once` a first look will do on a CPU, where no shape has to be run before it is served: `measure_again` does
    the rest once nobody waits.

    `choices` are kept from model to model: where two share their layers, the first decides for both. What was measured
    at an earlier start is not measured again, but for a choice that other work disturbed. `serve_others` is called
    before each forward pass.

    Raises:
        StartupObstacle: not one token fits into memory.
    """
    stopwatch = _Stopwatch(model, engine, device, serve_others)
    if at_once and device.device.type == "cpu" and engine.torch_compile != "true":
        return _look_quickly(stopwatch, model, engine, device, choices, before)
    tokens = largest_batch(engine, device.device)
    stopwatch.try_longest_text(tokens)
    if before is not None:
        if before.choice is not None and before.choice.is_disturbed and engine.torch_compile == "auto":
            before = replace(before, choice=None)
        largest = before.warmed.largest_tokens if device.device.type == "cuda" else before.warmed.max_batch_tokens
        if unless_out_of_memory(partial(stopwatch.run, largest)) is not None:
            return _warm_up_as_before(stopwatch, model, engine, device, choices, before, before.warmed.largest_tokens)
    tokens = stopwatch.lengthened(tokens)
    while tokens:
        warmed = unless_out_of_memory(partial(_warm_up, stopwatch, model, engine, device, tokens, choices))
        if warmed is not None:
            return warmed
        logger.warning("out of memory: a forward pass of %d tokens does not fit, trying %d", tokens, tokens // 2)
        tokens //= 2
    raise StartupObstacle(f"{model.card.id}: not one token fits into the memory that is left: free some.")


def _look_quickly(
    stopwatch: _Stopwatch,
    model: LoadedModel,
    engine: EngineSettings,
    device: Device,
    choices: Choices,
    before: Before | None,
) -> Warmed:
    """What a few short passes tell, or what an earlier start has measured."""
    largest = largest_batch(engine, device.device)
    longest, measured = engine.max_batch_ms / 1000, list[tuple[int, float]]()
    for tokens in sorted({min(tokens, largest) for tokens in QUICK_LOOK}):
        if len(measured) > 1 and measured[-1][1] * tokens / measured[-1][0] > longest:
            break
        first = unless_out_of_memory(partial(stopwatch.run, tokens))  # it is slower than those after it
        if first is None:
            break
        others = [stopwatch.run(tokens) for _ in range(2 if before is None and first <= longest else 0)]
        measured.append((tokens, min([first, *others])))
    if not measured:
        raise StartupObstacle(f"{model.card.id}: not one token fits into the memory that is left: free some.")
    choice = model.choice = _choose(model, engine, choices, stopwatch, largest, None, device.device)
    if before is not None:
        model.threads.single_up_to = before.single_up_to
        return replace(
            before.warmed,
            compiled=choice.compiled,
            compile_reason=choice.reason,
            seconds=tuple(stopwatch.seconds),
        )
    calibration = fit(measured[::-1])  # the largest first, as everywhere
    if calibration.seconds(TYPICAL_TEXT) <= QUICK_PASS_SECONDS:
        # A search gets one thread from the first on: what needs all of them has to wait until all are free.
        model.threads.measure(stopwatch.run, largest, QUICK_LOOK[:2], QUICK_RUNS)
    if calibration.seconds(largest) <= SHORT_PASS_SECONDS:
        largest = stopwatch.lengthened(largest)
    return replace(_warmed(stopwatch, model, choice, calibration, largest, engine), is_provisional=True)


class Interrupted(Exception):
    """Somebody waits for the device: a measurement ends without a result."""


def measure_again(
    model: LoadedModel, engine: EngineSettings, device: Device, choices: Choices, check: Callable[[], None]
) -> Warmed:
    """What `warm_up` left open on a CPU: which passes get one thread, and what each size takes.

    `check` is called before each forward pass, and raises Interrupted where somebody waits.

    Raises:
        Interrupted: nothing has changed.
    """
    single_up_to = model.threads.single_up_to
    stopwatch = _Stopwatch(model, engine, device, check)
    try:
        largest = unless_out_of_memory(partial(_affordable, stopwatch, engine, largest_batch(engine, device.device)))
        if not largest:
            raise Interrupted
        return _warm_up(stopwatch, model, engine, device, stopwatch.lengthened(largest), choices)
    except BaseException:
        model.threads.single_up_to = single_up_to
        raise


NOT_ON_CPU = CompileChoice(False, "eager: compiled layers are no faster on a CPU (TORCH_COMPILE=true compiles them)")
DETERMINED = CompileChoice(False, "eager: DETERMINISTIC=true")
NOT_MEASURED = CompileChoice(
    False, "eager: loaded while others are served, and TORCH_COMPILE=auto measures at the start"
)


def warm_up_beside_others(
    model: LoadedModel,
    engine: EngineSettings,
    device: Device,
    choices: Choices,
    serve_others: Callable[[], None],
    *,
    before: Before | None = None,
) -> Warmed:
    """As `warm_up`, while other models are served: `serve_others` is called before each forward pass.

    Passes grow until one takes MAX_BATCH_MS. The longest takes about twice that, and so much longer may a search of
    another model have to wait. What was measured before is not measured again.
    Layers are compiled where they were before, or for TORCH_COMPILE=true: only then others wait for the compiler.

    Raises:
        StartupObstacle: not one token fits into memory.
    """
    stopwatch = _Stopwatch(model, engine, device, serve_others)
    if engine.torch_compile == "auto" and (before is None or before.choice is None):
        choices.setdefault(_shared(model), NOT_ON_CPU if device.device.type == "cpu" else NOT_MEASURED)
    largest = unless_out_of_memory(partial(_affordable, stopwatch, engine, largest_batch(engine, device.device)))
    if not largest:
        raise StartupObstacle(f"{model.card.id}: not one token fits into the memory that is left: free some.")
    if before is None:
        largest = stopwatch.lengthened(largest)
        warmed = _warm_up(stopwatch, model, engine, device, largest, choices)
        return replace(warmed, is_provisional=device.device.type == "cpu")  # it was disturbed
    return _warm_up_as_before(stopwatch, model, engine, device, choices, before, largest)


def _warm_up_as_before(
    stopwatch: _Stopwatch,
    model: LoadedModel,
    engine: EngineSettings,
    device: Device,
    choices: Choices,
    before: Before,
    largest: int,
) -> Warmed:
    """Run what is to be run once, in passes of up to `largest` tokens, and take over what was measured."""
    shared = _shared(model)
    model.threads.single_up_to = before.single_up_to
    capture = _capture(model, engine, device)
    if before.choice is None:
        _choose(model, engine, choices, stopwatch, largest, capture, device.device)
    elif shared not in choices and not before.choice.compiled:
        choices[shared] = before.choice
    elif shared not in choices:
        choice = compilation.choose(model.model, "true", lambda tokens: stopwatch.run(min(tokens, largest)))
        choices[shared] = before.choice if choice.compiled else choice
    model.choice = choices[shared]
    for tokens in _shapes(min(largest, before.warmed.max_batch_tokens)):
        stopwatch.run(tokens)
    if capture is not None:
        model.graphs = capture_graphs(
            stopwatch.with_others(capture), stopwatch.run_directly, device.device, largest, stopwatch.max_rows
        )
    return replace(
        before.warmed,
        compiled=model.choice.compiled,
        compile_reason=model.choice.reason,
        graphs=len(model.graphs.passes),
        graph_tokens=max((shape.tokens for shape in model.graphs.passes), default=0),
        graph_memory_bytes=model.graphs.memory_bytes,
        seconds=tuple(stopwatch.seconds),
    )


def _affordable(stopwatch: _Stopwatch, engine: EngineSettings, largest: int) -> int:
    """The first size, of doubling ones, at which a pass takes MAX_BATCH_MS or fills what memory there is."""
    fitting, longest = 0, engine.max_batch_ms / 1000
    for tokens in reversed(list(_shapes(largest))):
        seconds = unless_out_of_memory(partial(stopwatch.run, tokens))
        if seconds is None:
            break
        fitting = tokens
        # Once more, as the first may have been disturbed.
        if min(seconds, stopwatch.run(tokens) if seconds >= longest else seconds) >= longest:
            break
    return fitting


def _warmed(
    stopwatch: _Stopwatch,
    model: LoadedModel,
    choice: CompileChoice,
    calibration: Calibration,
    largest: int,
    engine: EngineSettings,
) -> Warmed:
    """What was found out, with the budgets that follow from the fit."""
    return Warmed(
        calibration=calibration,
        largest_tokens=largest,
        max_batch_tokens=largest,
        max_batch_size=stopwatch.max_rows,
        free_tokens=0,
        compiled=choice.compiled,
        compile_reason=choice.reason,
        graphs=len(model.graphs.passes),
        graph_tokens=max((shape.tokens for shape in model.graphs.passes), default=0),
        graph_memory_bytes=model.graphs.memory_bytes,
        seconds=tuple(stopwatch.seconds),
        bulk_rate=BULK_RATE_FRACTION_ON_CPU if stopwatch.is_on_cpu else BULK_RATE_FRACTION,
    ).refitted(calibration, engine.max_batch_ms / 1000)


def _warm_up(
    stopwatch: _Stopwatch,
    model: LoadedModel,
    engine: EngineSettings,
    device: Device,
    largest: int,
    choices: Choices,
) -> Warmed:
    stopwatch.run(largest)
    if device.device.type == "cpu":
        model.threads.measure(stopwatch.run, largest)
    capture = _capture(model, engine, device)
    choice = model.choice = _choose(model, engine, choices, stopwatch, largest, capture, device.device)
    if capture is not None:
        model.graphs = capture_graphs(
            stopwatch.with_others(capture), stopwatch.run_directly, device.device, largest, stopwatch.max_rows
        )
    calibration = fit(stopwatch.fastest(list(_shapes(largest))))
    warmed = _warmed(stopwatch, model, choice, calibration, largest, engine)
    logger.info(
        "%s: a forward pass takes %.1f ms + %.1f µs a token, knee at %d tokens; up to %d tokens at a time; %s",
        model.card.id,
        1000 * calibration.fixed_seconds,
        1e6 * calibration.seconds_per_token,
        calibration.knee_tokens,
        warmed.max_batch_tokens,
        warmed.compile_reason,
    )
    if capture is not None:
        logger.info(
            "%s: %d CUDA graphs in %.1f GB of memory: %s",
            model.card.id,
            warmed.graphs,
            warmed.graph_memory_bytes / 1e9,
            model.graphs.reason,
        )
    return warmed


def _capture(model: LoadedModel, engine: EngineSettings, device: Device) -> Capture | None:
    """What captures the model's passes; None where they cannot be captured, as SDPA, which runs by each batch's
    lengths, or need not."""
    if device.streams is None or model.attention is not Attention.FLASH or not engine.cuda_graphs or model.alone:
        return None
    return CudaCapture(model.model, device.device, device.streams.run)


def _choose(
    model: LoadedModel,
    engine: EngineSettings,
    choices: Choices,
    stopwatch: _Stopwatch,
    largest: int,
    capture: Capture | None,
    device: torch.device,
) -> CompileChoice:
    shared = _shared(model)
    if model.alone:
        choices[shared] = DETERMINED
    elif shared not in choices and engine.torch_compile == "auto" and device.type == "cpu":
        choices[shared] = NOT_ON_CPU
    elif shared not in choices:

        def run(tokens: int) -> float:
            return stopwatch.run(min(tokens, largest))

        def replays() -> Run:
            """Of the layers as they are now: graphs are how passes of few tokens will run."""
            assert capture is not None
            passes = {
                tokens: capture(shape_of(min(tokens, largest), stopwatch.max_rows))
                for tokens in compilation.MEASURED_TOKENS
            }
            return lambda tokens: stopwatch.replay(passes[tokens], min(tokens, largest))

        choices[shared] = compilation.choose(
            model.model, engine.torch_compile, run, prepare=replays if capture is not None else None
        )
    return choices[shared]


def _shapes(largest: int) -> Iterator[int]:
    """Numbers of tokens, the largest first, each half of the one before."""
    tokens = largest
    while tokens > SMALLEST_SHAPE:
        yield tokens
        tokens //= 2
    yield min(SMALLEST_SHAPE, largest)


class _Stopwatch:
    """Times forward passes of one model."""

    def __init__(
        self,
        model: LoadedModel,
        engine: EngineSettings,
        device: Device,
        serve_others: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._engine, self._device, self._serve_others = model, engine, device, serve_others
        self.max_rows = largest_size(engine, device.device)
        self._random = np.random.default_rng(0)
        self.seconds: list[float] = []
        """Every run."""

    @property
    def is_on_cpu(self) -> bool:
        """Whether the passes run on a CPU."""
        return self._device.device.type == "cpu"

    def try_longest_text(self, tokens: int) -> None:
        """On CUDA, run the longest text where it is longer than the largest batch: it may come at any time."""
        longest = self._model.card.max_model_len
        if self._device.streams is None or longest <= tokens:
            return
        if unless_out_of_memory(lambda: self._forward([self._row(longest)])) is None:
            logger.warning("out of memory: a text of %d tokens does not fit, and will be refused", longest)

    def lengthened(self, tokens: int) -> int:
        """On a CPU and without MAX_BATCH_TOKENS: twice the tokens again and again, while a pass of them is short."""
        if self._engine.max_batch_tokens is not None or self._device.device.type != "cpu":
            return tokens
        self.run(tokens)  # the first is slower
        # The fastest of several: other programs disturb so short a time.
        while tokens < CPU_SHORT_PASS_TOKENS and 2 * min(map(self.run, [tokens] * 3)) <= SHORT_PASS_SECONDS:
            tokens *= 2
            self.max_rows = largest_size(self._engine, self._device.device, tokens)
        return tokens

    def fastest(self, shapes: Sequence[int]) -> list[tuple[int, float]]:
        """Each number of tokens with the seconds of its fastest run."""
        runs: dict[int, list[float]] = {tokens: [] for tokens in shapes}
        started = perf_counter()
        for number in range(ROUNDS):
            if number and perf_counter() - started > ENOUGH_SECONDS:
                break
            for tokens, seconds in runs.items():
                seconds.append(self.run(tokens))
        return [(tokens, min(seconds)) for tokens, seconds in runs.items()]

    def run(self, tokens: int) -> float:
        """Seconds of one forward pass over ragged rows of so many tokens, as bulk runs."""
        return self._forward(self._rows(tokens))

    def with_others(self, capture: Capture) -> Capture:
        """The same capture, which lets the other models' batches go first each time."""

        def capture_after_others(shape: PackShape) -> Pass:
            self._serve_others()
            return capture(shape)

        return capture_after_others

    @torch.inference_mode()
    def run_directly(self, packed: PackedBatch) -> None:
        """Launch a forward pass without a graph."""
        with self._device.on_stream(Lane.BULK):
            self._model.forward(packed)

    @torch.inference_mode()
    def replay(self, captured: Pass, tokens: int) -> float:
        """Seconds of a captured pass of so many tokens."""
        self._serve_others()
        shape = shape_of(tokens, self.max_rows)
        with self._device.on_stream(lane_of(shape, Lane.BULK)):
            rows = [self._row(1)] * min(shape.rows, tokens)
            packed = pack(rows, self._device.device, shape=shape, attention=self._model.attention)
            started = perf_counter()
            captured(packed).cpu()
        return perf_counter() - started

    def _forward(self, rows: Sequence[Row]) -> float:
        self._serve_others()
        model, device = self._model, self._device
        packed = pack_on(device, model, rows)
        started = perf_counter()
        collect(launch(model, rows, device, Lane.BULK, packed, halves=False))
        self.seconds.append(perf_counter() - started)
        return self.seconds[-1]

    def _rows(self, tokens: int) -> list[Row]:
        """Lengths around a typical text's, or longer where there would be more than MAX_BATCH_SIZE rows."""
        typical = min(max(TYPICAL_TEXT, 2 * tokens // self.max_rows), self._model.card.max_model_len)
        rows = []
        while tokens:
            length = min(tokens, int(self._random.integers(typical // 2, typical + 1)))
            rows.append(self._row(length))
            tokens -= length
        return rows

    def _row(self, length: int) -> Row:
        return Row(self._random.integers(0, self._model.card.vocab_size, length).astype(np.int32))
