"""Which batches run as CUDA graphs: shapes, the choice by measurement, and what does not fit. The graphs need a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.models.loaded import CPU, GOLDEN, load_model
from vecmill.config import load_settings
from vecmill.core.calibration import fit
from vecmill.core.types import Lane, Prefix, Row, Task
from vecmill.engine.cuda_graphs import (
    INTERACTIVE_TOKENS,
    LONGEST_ROW,
    PROBED_TOKENS,
    Gain,
    Graphs,
    Pass,
    capture_graphs,
    ladder,
    lane_of,
    shape_of,
)
from vecmill.engine.warmup import largest_size
from vecmill.models.packing import PackedBatch, PackShape, pack

MAX_ROWS = 64


def rows(*lengths: int, prefix: Prefix | None = None) -> list[Row]:
    return [Row(np.ones(length, dtype=np.int32), prefix=prefix) for length in lengths]


class Standing:
    """A stand-in for a graph, which takes so many seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def __call__(self, packed: PackedBatch) -> Tensor:
        time.sleep(self._seconds)
        assert packed.shape is not None
        return torch.zeros(packed.shape.rows, 4)


def graphs_of(tokens: Sequence[int], gains: Sequence[Gain] = ()) -> Graphs:
    return Graphs({shape_of(each, MAX_ROWS): Standing() for each in tokens}, gains)


def test_the_ladder_wastes_little_and_has_few_steps() -> None:
    steps = ladder(16_384)

    assert steps[:4] == [16, 32, 48, 64]
    assert steps[-1] == 16_384
    assert all(tokens % 16 == 0 for tokens in steps)
    assert all(above - below <= max(16, below / 8) for below, above in pairwise(steps))
    assert len(steps) <= 64
    assert ladder(15) == []


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=80))
def test_a_batch_gets_the_smallest_shape_that_holds_it(lengths: list[int]) -> None:
    graphs = graphs_of(ladder(8192))

    chosen = graphs.shape_for(rows(*lengths))

    holding = [shape for shape in graphs.passes if shape.holds(lengths)]
    assert chosen == (min(holding, key=lambda shape: shape.tokens) if holding else None)
    if sum(lengths) > 8192 or len(lengths) > MAX_ROWS or max(lengths) > LONGEST_ROW:
        assert chosen is None


def test_what_a_graph_cannot_hold_runs_directly() -> None:
    graphs = graphs_of([16, 1024, 4096])

    assert graphs.shape_for(rows(5)) == PackShape(16, 16, 16)
    assert graphs.shape_for(rows(17)) == PackShape(1024, 32, 1024)
    assert graphs.shape_for(rows(*[1] * 33)) == PackShape(4096, 64, 1024), "more rows than the smaller one has room for"
    assert graphs.shape_for(rows(1025)) is None, "longer than any row in a graph"
    assert graphs.shape_for(rows(5, prefix=Prefix(np.ones(3, dtype=np.int32)))) is None
    assert Graphs().shape_for(rows(5)) is None


@pytest.mark.parametrize(("rows_of_16", "graph_tokens"), [(16, 512), (64, 2048), (128, 4096), (200, None), (512, None)])
def test_many_short_rows_take_a_larger_graph_where_it_ends_sooner(rows_of_16: int, graph_tokens: int | None) -> None:
    """Direct passes take 10 ms up to 4,096 tokens, and graphs 2 ms for each 1,024."""
    gains = [Gain(tokens, 0.010, tokens * 0.002 / 1024) for tokens in (512, 1024, 2048, 4096)]
    gains.append(Gain(8192, 0.014, 0.016))
    graphs = Graphs({shape_of(tokens, 1024): Standing() for tokens in (512, 1024, 2048, 4096, 8192)}, gains)

    shape = graphs.shape_for(rows(*[16] * rows_of_16))

    assert (shape and shape.tokens) == graph_tokens


@pytest.mark.parametrize(
    ("device", "flags", "size"),
    [
        ("cpu", {}, 128),
        ("cpu", {"max_batch_tokens": 2048}, 64),
        ("cpu", {"max_batch_tokens": 32}, 32),
        ("cuda:1", {}, 1024),
        ("cuda", {"max_batch_tokens": 4096}, 256),
        ("cuda", {"max_batch_tokens": 512}, 64),
        ("cuda", {"max_batch_size": 17}, 17),
    ],
)
def test_rows_of_a_pass_follow_the_device_and_its_tokens(device: str, flags: dict[str, Any], size: int) -> None:
    assert largest_size(load_settings(flags).engine, torch.device(device)) == size


def test_short_texts_fill_a_pass_on_a_gpu() -> None:
    """As measured on an H100: 95 % of the best rate needs more tokens than 64 rows of a query's length have."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-2026-11-26-h100.json"
    (model,) = json.loads(path.read_text())["models"]
    forwards = model["modes"]["graphs"]["forwards"]
    calibration = fit([(each["tokens"], each["ms"]["median"] / 1000) for each in forwards])
    budget = calibration.bulk_tokens(0.1, 16_384)

    def rate(size: int) -> float:
        tokens = min(16 * size, budget)
        return tokens / calibration.seconds(tokens)

    assert rate(64) < 0.7 * calibration.best_rate
    assert rate(largest_size(load_settings().engine, torch.device("cuda"))) > 0.94 * calibration.best_rate


def test_small_graphs_run_before_bulk_whoever_asks() -> None:
    small, large = shape_of(INTERACTIVE_TOKENS, MAX_ROWS), shape_of(INTERACTIVE_TOKENS + 64, MAX_ROWS)

    assert lane_of(small, Lane.BULK) is Lane.INTERACTIVE
    assert lane_of(large, Lane.INTERACTIVE) is Lane.BULK
    assert [lane_of(None, lane) for lane in Lane] == list(Lane)


@pytest.mark.parametrize(("tokens", "whole"), [(40, True), (400, False)])
def test_a_prefix_is_read_several_times_where_that_takes_less(tokens: int, whole: bool) -> None:
    """A direct pass takes 10 ms however few its tokens; a graph of 64 tokens 1 ms, one of 512 tokens 20 ms."""
    graphs = graphs_of([64, 512], [Gain(64, 0.010, 0.001), Gain(512, 0.012, 0.020)])
    prefix = Prefix(np.arange(10, dtype=np.int32))

    whole_rows = graphs.whole_rows([Row(np.full(tokens, 7, dtype=np.int32), prefix=prefix)])

    assert (whole_rows is not None) is whole
    if whole_rows is not None:
        assert whole_rows[0].prefix is None
        assert whole_rows[0].token_ids.tolist() == [*range(10), *[7] * tokens]
    assert graphs.whole_rows(rows(5)) is None


def captured(
    graph_seconds: Callable[[int], float],
    direct_seconds: float,
    failing: Callable[[int], bool] = lambda number: False,
    message: str = "CUDA out of memory. Tried to allocate 2.00 GiB.",
) -> tuple[Graphs, list[int]]:
    """Graphs of a stand-in for a model with these times, and the tokens of each graph in the order of capture."""
    order: list[int] = []

    def capture(shape: PackShape) -> Pass:
        order.append(shape.tokens)
        if failing(len(order)):
            raise torch.OutOfMemoryError(message)
        return Standing(graph_seconds(shape.tokens))

    return capture_graphs(capture, lambda packed: time.sleep(direct_seconds), CPU, 4096, MAX_ROWS), order


def test_graphs_are_captured_as_far_as_they_are_faster() -> None:
    graphs, order = captured(lambda tokens: 0.0 if tokens <= 512 else 0.01, 0.005)

    assert [shape.tokens for shape in graphs.passes] == ladder(512)
    assert [gain.tokens for gain in graphs.gains] == [16, 128, 512, 1024]
    assert [gain.pays for gain in graphs.gains] == [True, True, True, False]
    assert order[4:] == ladder(512)[::-1], "the largest first: the smaller find room in its memory"


def test_no_graph_is_kept_where_none_is_faster() -> None:
    graphs, order = captured(lambda tokens: 0.01, 0.001)

    assert not graphs.passes
    assert order == [16]
    assert "no faster" in graphs.reason


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB.", ""])
def test_running_out_of_memory_leaves_what_was_captured(caplog: pytest.LogCaptureFixture, message: str) -> None:
    probes = sum(tokens <= 4096 for tokens in PROBED_TOKENS)
    graphs, _ = captured(lambda tokens: 0.0, 0.002, failing=lambda number: number == probes + 40, message=message)

    tokens = [shape.tokens for shape in graphs.passes]
    assert len(tokens) == 39
    assert tokens[: len(ladder(INTERACTIVE_TOKENS))] == ladder(INTERACTIVE_TOKENS), "a person's come first"
    assert "OutOfMemoryError" in graphs.reason
    assert "OutOfMemoryError" in caplog.text


@pytest.mark.parametrize(
    ("folder", "task"),
    [("qwen3/embedding", Task.EMBED), ("qwen3/reranker", Task.RERANK), ("nvembed/checkpoint", Task.EMBED)],
)
@torch.inference_mode()
def test_a_batch_in_a_larger_shape_gives_the_same_answers(folder: str, task: Task) -> None:
    _, model = load_model(GOLDEN / folder, task)
    random = np.random.default_rng(0)
    batch = [
        Row(random.integers(0, model.vocab_size, length).astype(np.int32), unpooled=unpooled)
        for length, unpooled in ((3, 0), (30, 9 if "nvembed" in folder else 0), (1, 0), (17, 0))
    ]

    wanted = model.forward(pack(batch, CPU))
    in_shape = pack(batch, CPU, shape=PackShape(112, 8, 64))
    answers = model.forward(in_shape)

    assert answers.shape == (8, model.width), "as many as the shape has room for"
    np.testing.assert_allclose(answers[: len(in_shape.order)].numpy(), wanted.numpy(), atol=1e-5)
