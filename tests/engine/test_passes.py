"""A batch on a CPU as several passes that run at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models.loaded import CPU, GOLDEN, load_model, unit
from vecmill.core.errors import OutOfMemory, WorkLost
from vecmill.core.types import ModelCard, Prefix, Row
from vecmill.engine.forward import (
    FEWEST_TOKENS_OF_A_PART,
    LARGEST_OVER_SHARE,
    CpuThreads,
    Device,
    LoadedModel,
    collect,
    launch,
    pack_on,
    parts_of,
)
from vecmill.models.packing import Attention, PackedBatch


@given(
    st.integers(1, 64),
    st.lists(st.integers(1, 2000), min_size=1, max_size=80),
    st.integers(0, 4096),
)
def test_parts_hold_each_row_once_and_are_alike(threads: int, lengths: list[int], single_up_to: int) -> None:
    shared_out = CpuThreads(threads)
    shared_out.single_up_to = single_up_to
    parts = shared_out.divided(lengths)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(part and part == sorted(part) for part in parts)
    if len(parts) > 1:
        assert threads % len(parts) == 0  # no thread is left over
        assert sum(lengths) > single_up_to
        assert sum(lengths) / len(parts) >= FEWEST_TOKENS_OF_A_PART
        largest = max(sum(lengths[index] for index in part) for part in parts)
        assert largest <= LARGEST_OVER_SHARE * sum(lengths) / len(parts)


@pytest.mark.parametrize(
    ("threads", "lengths", "parts"),
    [
        (2, [128] * 10, 2),
        (2, [100, 100], 1),  # too few tokens
        (2, [1000], 1),  # a row is not divided
        (2, [900, 100, 100], 1),  # one would wait for the other
        (2, [500, 300, 200], 2),
        (8, [128] * 16, 8),
        (8, [128] * 7, 4),  # of two threads each
        (7, [128] * 6, 1),  # what would be left over
        (1, [128] * 16, 1),
    ],
)
def test_into_how_many_parts(threads: int, lengths: list[int], parts: int) -> None:
    assert len(CpuThreads(threads).divided(lengths)) == parts


@pytest.fixture
def device() -> Iterator[Device]:
    threads = torch.get_num_threads()
    made = Device.of(CPU, 2)
    yield made
    made.close()
    torch.set_num_threads(threads)


def loaded(*, alone: bool = False) -> LoadedModel:
    checkpoint, network = load_model(GOLDEN / "qwen3" / "embedding")
    return LoadedModel(
        cast(ModelCard, None), checkpoint, network, cast(Any, None), threads=CpuThreads(2, fixed=alone), alone=alone
    )


def rows_of(lengths: Sequence[int]) -> list[Row]:
    random = np.random.default_rng(0)
    return [Row(random.integers(1, 200, length).astype(np.int32)) for length in lengths]


LENGTHS = (3, 200, 57, 120, 64, 31, 90, 5)


def test_each_row_has_the_vector_that_it_has_alone(device: Device) -> None:
    model, rows = loaded(), rows_of(LENGTHS)
    assert len(parts_of(device, model, rows)) == 2
    launched = launch(model, rows, device)
    together = np.stack(cast(Any, collect(launched)))
    assert len(launched.parts) == 2
    alone = np.stack(cast(Any, [collect(launch(model, [row], device))[0] for row in rows]))
    assert np.abs(unit(together) - unit(alone)).max() < 1e-5
    ready = launch(model, rows, device, packed=pack_on(device, model, rows))
    np.testing.assert_array_equal(np.stack(cast(Any, collect(ready))), together)


def test_passes_overlap_each_in_one_thread(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, both, seen = loaded(), threading.Barrier(2, timeout=20), list[int]()
    forward = type(model.model).forward

    def meet(network: Any, packed: PackedBatch) -> torch.Tensor:
        if len(packed.order) > 1:
            both.wait()  # neither ends before the other has begun
        seen.append(torch.get_num_threads())
        return forward(network, packed)

    monkeypatch.setattr(type(model.model), "forward", meet)
    collect(launch(model, rows_of(LENGTHS), device))
    collect(launch(model, rows_of([400]), device))
    assert seen == [1, 1, 2]  # a row that cannot be divided has all of them


def test_rows_that_share_a_prefix_stay_together(device: Device) -> None:
    prefix = Prefix(np.arange(1, 20, dtype=np.int32))
    rows = [Row(row.token_ids, prefix=prefix) for row in rows_of(LENGTHS)]
    assert len(parts_of(device, loaded(), rows)) == 1


def test_one_by_one_where_bits_must_not_change(device: Device) -> None:
    model, rows = loaded(alone=True), rows_of(LENGTHS)
    first = collect(launch(model, rows, device))
    assert [cast(Any, each).tobytes() for each in first] == [
        cast(Any, collect(launch(model, [row], device))[0]).tobytes() for row in rows
    ]


class Failing:
    """What a pass raises, where it has a row of so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: LoadedModel, length: int, error: BaseException) -> None:
        forward = type(model.model).forward
        ended = self.ended = list[int]()

        def fail(network: Any, packed: PackedBatch) -> torch.Tensor:
            if length in packed.lengths.tolist():
                raise error
            answers = forward(network, packed)
            ended.append(len(packed.order))
            return answers

        monkeypatch.setattr(type(model.model), "forward", fail)


@pytest.mark.parametrize("length", [200, 120])  # one in the device's own thread, one in a helper's
def test_what_one_pass_raises_is_raised_once_both_have_ended(
    device: Device, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, rows = loaded(), rows_of(LENGTHS)
    failing = Failing(monkeypatch, model, length, ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        collect(launch(model, rows, device))
    assert len(failing.ended) == 1
    monkeypatch.undo()
    assert len(collect(launch(model, rows, device))) == len(rows)


@pytest.mark.parametrize("length", [200, 120])
def test_memory_that_ends_in_one_pass_refuses_its_row_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, rows = loaded(), rows_of(LENGTHS)
    Failing(monkeypatch, model, length, MemoryError())
    launched = launch(model, rows, device)
    answers = collect(launched)
    assert [index for index, answer in enumerate(answers) if isinstance(answer, Exception)] == [LENGTHS.index(length)]
    assert launched.splits


def test_what_fitted_at_the_same_time_is_what_fits(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_out = Device.of(CPU, 4)
    model, rows = loaded(), rows_of([130] * 7 + [131])
    model.threads = CpuThreads(4)
    assert len(parts_of(shared_out, model, rows)) == 4
    Failing(monkeypatch, model, 131, MemoryError())
    launched = launch(model, rows, shared_out)
    collect(launched)
    shared_out.close()
    assert launched.splits
    assert launched.fitting_tokens >= 6 * 130  # all but the part that was halved


def test_a_helper_that_ends_fails_its_batch_and_is_replaced(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, own = loaded(), rows_of(LENGTHS), threading.get_ident()
    forward = type(model.model).forward

    def end(network: Any, packed: PackedBatch) -> torch.Tensor:
        if threading.get_ident() != own:
            raise SystemExit
        return forward(network, packed)

    monkeypatch.setattr(type(model.model), "forward", end)
    with pytest.raises((RuntimeError, WorkLost)):
        collect(launch(model, rows, device))
    monkeypatch.undo()
    assert len(collect(launch(model, rows, device))) == len(rows)


def test_without_a_thread_to_spare_the_passes_run_in_turns(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = loaded(), rows_of(LENGTHS)
    wanted = np.stack(cast(Any, collect(launch(model, rows, device))))
    fresh = Device.of(CPU, 2)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    np.testing.assert_array_equal(np.stack(cast(Any, collect(launch(model, rows, fresh)))), wanted)
    assert not any(isinstance(each, OutOfMemory) for each in collect(launch(model, rows, fresh)))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.PRODUCTS])
def test_memory_is_flat_over_ten_thousand_batches(attention: Attention) -> None:
    """Kernel libraries keep what they prepare for each shape: there must not be a new one for each batch."""
    done = subprocess.run(
        [sys.executable, "-c", TEN_THOUSAND, str(GOLDEN / "qwen3" / "embedding"), attention],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    [early, late] = map(float, done.stdout.split())
    assert late - early < 10  # MB


TEN_THOUSAND = """
import sys
from pathlib import Path
import numpy as np, psutil, torch
from vecmill.core.types import Row, Task
from vecmill.engine.forward import CpuThreads, Device, LoadedModel, collect, launch
from vecmill.hardware.memory import give_back_memory, keep_freed_memory
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import load_model
from vecmill.models.packing import Attention
from vecmill.models.prepacked_linears import prepack
from vecmill.models.weights import Target

keep_freed_memory()
checkpoint = read(Source("tiny", Path(sys.argv[1]), Task.EMBED))
cpu = torch.device("cpu")
network = load_model(checkpoint, Target(torch.bfloat16, cpu))
assert prepack(network)
model = LoadedModel(None, checkpoint, network, None, Attention(sys.argv[2]), threads=CpuThreads(2))
device = Device.of(cpu, 2)
random = np.random.default_rng(0)
divided = 0
for number in range(10_000):
    lengths = random.integers(1, 200, int(random.integers(1, 12)))
    rows = [Row(random.integers(1, 200, int(length)).astype(np.int32)) for length in lengths]
    launched = launch(model, rows, device)
    collect(launched)
    divided += len(launched.parts) > 1
    if number in (3_000, 9_999):
        give_back_memory()
        print(psutil.Process().memory_info().rss / 1e6)
assert divided > 5_000
"""
