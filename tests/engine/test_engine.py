"""The device's thread: it answers every batch, survives a bad one, and when it dies leaves nobody waiting."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny_checkpoints import tiny_bert, tiny_static
from vecmill.config import load_settings
from vecmill.core.calibration import Warmed, fit
from vecmill.core.errors import DoesNotFit, EngineFailed, NonFiniteEmbedding, StartupError
from vecmill.core.protocols import BatchResult
from vecmill.core.types import Lane, Row
from vecmill.engine import device as device_module
from vecmill.engine.compilation import CompileChoice
from vecmill.engine.device import ChosenDtype, choose_device
from vecmill.engine.engine import LAUNCHED_AT_A_TIME, Call, Closed, Engine, Inbox, Probe, QueuedBatch, may_launch
from vecmill.engine.forward import CpuThreads, LoadedModel, parts_of
from vecmill.engine.live_models import LiveModels
from vecmill.engine.loader import load
from vecmill.engine.measurements import Before, Measurements
from vecmill.hardware.gpu import nvidia_gpu_present
from vecmill.models.packing import PackedBatch

ROWS = [Row(np.array(ids, dtype=np.int32)) for ids in ([101, 2003, 102], [101, 102], [101, 7592, 2088, 102])]
KEY = "embed:tiny"


@contextmanager
def running(
    tmp_path: Path, minilm_folder: Path, threads: int | None = None, *, at_once: bool = False
) -> Iterator[Engine]:
    """An engine with the tiny model, whose passes have so many threads; left out, as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32"})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None, at_once=at_once)
    engine.start()
    try:
        engine.loaded.result(60)
        yield engine
    finally:
        engine.close()
        torch.set_num_threads(before)


@pytest.fixture
def engine(tmp_path: Path, minilm_folder: Path) -> Iterator[Engine]:
    with running(tmp_path, minilm_folder) as engine:
        yield engine


@pytest.mark.parametrize("limit", [None, 2048])
def test_passes_that_take_no_time_are_made_longer(tmp_path: Path, minilm_folder: Path, limit: int | None) -> None:
    flags = {"embed_model": str(tiny_static(tmp_path / "tiny", minilm_folder)), "device": "cpu"}
    settings = load_settings({**flags, **({"max_batch_tokens": limit} if limit else {})})
    warmed = load(settings.model, settings.engine, lambda percent, message: None).warmed[KEY]
    assert warmed.max_batch_size == (256 if limit is None else 64)
    assert limit is None or warmed.max_batch_tokens <= limit


def model_of(engine: Engine) -> LoadedModel:
    return engine.loaded.result().models[KEY]


class Spoiling:
    """The real model, but a row of two tokens comes out as NaN: weights that overflow do this."""

    def __init__(self, model: LoadedModel) -> None:
        self._forward = model.model.forward

    def __call__(self, packed: PackedBatch) -> Tensor:
        pooled: Tensor = self._forward(packed)
        pooled[packed.lengths[: len(pooled)] == 2] = float("nan")
        return pooled


async def test_rows_are_answered_in_the_callers_order(engine: Engine) -> None:
    together = await engine.run(KEY, ROWS)
    for index, row in enumerate(ROWS):
        alone = (await engine.run(KEY, [row])).rows[0]
        np.testing.assert_allclose(np.asarray(together.rows[index]), np.asarray(alone), atol=1e-5)
    assert together.seconds > 0


async def test_a_row_that_is_not_finite_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(engine)
    wanted = (await engine.run(KEY, ROWS)).rows
    monkeypatch.setattr(model.model, "forward", Spoiling(model))
    found = (await engine.run(KEY, ROWS)).rows
    assert isinstance(found[1], NonFiniteEmbedding)
    for index in (0, 2):
        np.testing.assert_allclose(np.asarray(found[index]), np.asarray(wanted[index]), atol=1e-6)


async def test_a_batch_that_raises_fails_alone_and_the_next_works(engine: Engine) -> None:
    too_high = Row(np.array([10**6], dtype=np.int32))  # would be an out-of-range gather
    with pytest.raises(IndexError):
        await engine.run(KEY, [too_high])
    assert len((await engine.run(KEY, ROWS)).rows) == 3


async def test_a_device_that_fails_for_good_answers_everybody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(packed: PackedBatch) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model_of(engine).model, "forward", broken)
    runs = [asyncio.create_task(engine.run(KEY, ROWS)) for _ in range(20)]
    done, waiting = await asyncio.wait(runs, timeout=10)
    assert not waiting
    assert all(isinstance(run.exception(), EngineFailed) for run in done)
    with pytest.raises(EngineFailed, match="must be restarted"):
        await engine.run(KEY, ROWS)


async def test_a_closed_engine_answers_too(engine: Engine) -> None:
    before = [asyncio.create_task(engine.run(KEY, ROWS)) for _ in range(5)]
    await asyncio.sleep(0)  # the tasks put their batches into the inbox
    engine.close()
    after = [asyncio.create_task(engine.run(KEY, ROWS)) for _ in range(5)]
    answers = await asyncio.wait_for(asyncio.gather(*before, *after, return_exceptions=True), 10)
    assert not any(isinstance(answer, BaseException) for answer in answers[:5])
    assert all(isinstance(answer, EngineFailed) for answer in answers[5:])


async def test_the_next_engine_of_a_process_has_as_many_threads(tmp_path: Path, minilm_folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32"})
    rows = [Row(np.full(60, 5, dtype=np.int32))] * 10
    for _ in range(2):
        engine = Engine(settings.model, settings.engine, lambda percent, message: None)
        engine.start()
        loaded = engine.loaded.result(60)
        assert loaded.common.threads == 2
        assert len(parts_of(loaded.runs_on, loaded.models[KEY], rows)) == 2
        await engine.run(KEY, rows)
        engine.close()
        while engine.alive:
            await asyncio.sleep(0.01)
    torch.set_num_threads(before)


def test_a_model_that_cannot_be_loaded_is_the_answer_of_loaded(tmp_path: Path) -> None:
    settings = load_settings({"embed_model": str(tmp_path), "device": "cpu"})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    with pytest.raises(StartupError, match=r"config\.json"):
        engine.loaded.result(60)


async def test_what_was_measured_holds_for_the_next_start(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same model and settings; a file that is damaged, or of another release, is as good as none."""
    folder, kept = tiny_bert(tmp_path / "tiny", minilm_folder), tmp_path / "measurements.json"

    async def started(**flags: object) -> tuple[Warmed, list[Any]]:
        settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32", **flags})
        engine = Engine(settings.model, settings.engine, lambda percent, message: None, kept)
        engine.start()
        warmed = engine.loaded.result(60).warmed
        vectors = (await engine.run(KEY, ROWS)).rows
        # As passes since then have found it.
        warmed[KEY] = replace(warmed[KEY].refitted(fit([(64, 0.5), (128, 0.75)]), 0.1), changed_at=1000.0)
        engine.keep_measured()
        engine.close()
        return loaded_as.pop(), vectors

    loaded_as: list[Warmed] = []
    remember = LiveModels._remember

    def remembering(self: LiveModels, key: str, model: LoadedModel, warmed: Warmed) -> None:
        loaded_as.append(warmed)
        remember(self, key, model, warmed)

    monkeypatch.setattr(LiveModels, "_remember", remembering)
    first, vectors = await started()
    again, same = await started()
    assert first.changed_at > again.changed_at == 1000.0
    assert again.calibration == fit([(64, 0.5), (128, 0.75)])
    assert again.max_batch_tokens == again.calibration.bulk_tokens(0.1, first.largest_tokens)
    for vector, other in zip(vectors, same, strict=True):
        np.testing.assert_array_equal(vector, other)
    assert (await started(max_batch_tokens=256))[0].changed_at > 1000
    content = kept.read_text()
    assert (await started())[0].changed_at == 1000
    for damaged in ("", "[" * 100_000, content.replace("measurements 1", "measurements 9"), content[:200], "{}"):
        kept.write_text(damaged)
        assert (await started())[0].changed_at > 1000
    for number in ("largest_tokens", "max_batch_size"):  # of a pass that would take all memory
        kept.write_text(re.sub(rf'"{number}": \d+', f'"{number}": 1000000000', content))
        assert (await started())[0].changed_at > 1000


WARMED = Warmed(fit([(64, 0.5)]), 256, 128, 64, 16, False, "eager", 0, 0, 0, ())
HOSTILE: dict[str, tuple[Any, ...]] = {
    "fixed_seconds": (-1, math.nan, math.inf, 1e308, "1", None, [], {}),
    "seconds_per_token": (0, -1.0, math.nan, 1e-320, 1e308, 10**400, "x", [1]),
    "measured": (5, "x", [[1]], [["a", "b"]], [[1, math.nan]], [[math.inf, 1]], [[0, 1.0]], [[1, 1.0]] * 100_000),
    "largest_tokens": (0, 2**40, 1.5, "x", None, True),
    "max_batch_tokens": (0, 2**30, 64.0, "x", None),
    "max_batch_size": (0, -1, 2**40, "x", math.nan),
    "free_tokens": (-1, 2**30, "x", None, []),
    "changed_at": (-1, math.nan, 1e300, "x"),
    "single_up_to": (-1, "x", None, 10**30),
    "choice": (5, "x", [], {}, {"compiled": True}),
    "calibration": (None, "x", 5, []),
    "warmed": (None, "x", 5, [], {}),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_what_is_no_measurement_is_measured(tmp_path: Path, key: str) -> None:
    kept = tmp_path / "measurements.json"
    line = fit([(64, 0.5), (128, 0.75)])
    warmed = replace(WARMED, calibration=line)
    Measurements(kept).keep("one", Before(warmed, 32, CompileChoice(False, "eager")))
    content = json.loads(kept.read_text())
    bounds = {"most_tokens": 256, "most_rows": 64}
    assert (known := Measurements(kept).of("one", **bounds)) is not None
    assert (known.warmed.calibration, known.warmed.max_batch_tokens, known.single_up_to) == (line, 128, 32)
    assert Measurements(kept).of("one", most_tokens=255, most_rows=64) is None
    assert Measurements(kept).of("one", most_tokens=256, most_rows=63) is None

    def with_value(within: dict[str, Any], value: Any) -> dict[str, Any]:
        changed = {name: with_value(part, value) if isinstance(part, dict) else part for name, part in within.items()}
        return changed | {key: value} if key in within else changed

    for value in HOSTILE[key]:
        kept.write_text(json.dumps(with_value(content, value)))
        found = Measurements(kept)
        assert found.of("one", **bounds) is None, value
        found.keep("two", Before(warmed, 32, None))
        assert Measurements(kept).of("two", **bounds) is not None, value


def test_the_fastest_type_is_kept_for_the_machine_and_the_width(tmp_path: Path) -> None:
    kept, chosen = tmp_path / "measurements.json", ChosenDtype(torch.bfloat16, "measured")
    Measurements(kept).keep_dtype(384, 2, chosen)
    found = Measurements(kept)
    assert (found.dtype_of(384, 2), found.dtype_of(384, 4), found.dtype_of(768, 2)) == (chosen, None, None)
    found.keep("one", Before(WARMED, 0, CompileChoice(True, "compiled", is_disturbed=True)))
    assert Measurements(kept).dtype_of(384, 2) == chosen
    before = Measurements(kept).of("one", most_tokens=256, most_rows=64)
    assert before is not None
    assert before.choice == CompileChoice(True, "compiled", is_disturbed=True)
    assert before.warmed.is_provisional
    content = json.loads(kept.read_text())
    [key] = content["dtypes"]
    hostile: list[Any] = [5, [], {key: 5}, {key: {}}, {key: {"dtype": "int8"}}, {key: {"dtype": []}}]
    for damaged in hostile:
        kept.write_text(json.dumps({**content, "dtypes": damaged}))
        assert Measurements(kept).dtype_of(384, 2) is None
        assert Measurements(kept).of("one", most_tokens=256, most_rows=64) is not None


async def test_a_measurement_gives_way_to_whoever_waits(engine: Engine) -> None:
    """And what it would have changed stays as it was."""
    model, before = model_of(engine), engine.loaded.result().warmed[KEY]
    forward, passes = model.model.forward, 0
    search: Future[BatchResult] | None = None
    loop = asyncio.get_running_loop()

    def noted(packed: PackedBatch) -> Tensor:
        nonlocal passes, search
        passes += 1
        if passes == 2:
            search = asyncio.run_coroutine_threadsafe(engine.run(KEY, ROWS), loop)
            until = time.monotonic() + 10
            while not engine._inbox.is_wanted and time.monotonic() < until:
                time.sleep(0.001)
        return forward(packed)

    model.model.forward = noted  # type: ignore[method-assign]
    assert not await asyncio.to_thread(engine.measure_again, KEY)
    assert search is not None
    assert len((await asyncio.wrap_future(search)).rows) == len(ROWS)
    assert passes == 3
    assert engine.loaded.result().warmed[KEY] is before
    model.model.forward = forward  # type: ignore[method-assign]
    assert await asyncio.to_thread(engine.measure_again, KEY)
    assert engine.loaded.result().warmed[KEY].changed_at > before.changed_at


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "large", "unreadable", "dangling", "deep"])
def test_a_file_that_is_none_of_measurements_is_as_good_as_none(tmp_path: Path, kind: str) -> None:
    """And costs neither memory nor time."""
    kept = tmp_path / "measurements.json"
    if kind == "pipe":
        os.mkfifo(kept)
    elif kind == "folder":
        kept.mkdir()
    elif kind == "deep":
        kept.write_text('{"format": "vecmill-measurements 1", "models": {"one": %s}}' % ("[" * 900 + "]" * 900))
    elif kind in ("large", "unreadable"):
        kept.write_text("[" + "1," * 5_000_000 + "1]" if kind == "large" else "{}")
        kept.chmod(0 if kind == "unreadable" else 0o600)
    else:
        kept.symlink_to("/dev/zero" if kind == "endless" else tmp_path / "nowhere")
    measurements = Measurements(kept)
    assert measurements.of("one", most_tokens=256, most_rows=64) is None
    measurements.keep("one", Before(WARMED, 0, None))
    assert (Measurements(kept).of("one", most_tokens=256, most_rows=64) is None) is (kind == "folder")
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_the_faster_dtype_is_measured_and_the_reason_told(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    settings = load_settings({"embed_model": str(folder), "device": "cpu"})
    seen: list[tuple[float, str]] = []
    engine = Engine(settings.model, settings.engine, lambda percent, message: seen.append((percent, message)))
    engine.start()
    card = engine.loaded.result(60).models[KEY].card
    engine.close()
    assert card.dtype in ("float32", "bfloat16")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[card.dtype]
    assert "GFLOP/s" in card.dtype_reason
    assert card.dtype_reason.endswith(f"in {other}")
    percents = [percent for percent, _ in seen]
    assert percents == sorted(percents)
    assert any("loading tiny" in message for _, message in seen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
@pytest.mark.parametrize(
    ("wanted", "gpu", "said"),
    [
        ("auto", True, r"CPU-only build.*pip install.*DEVICE=cpu"),
        ("cuda", True, "CPU-only build"),
        ("cuda", False, "no CUDA GPU here"),
        ("cuda:1", False, "no CUDA GPU here"),
        ("mps", False, "no Apple GPU"),
    ],
)
def test_a_device_that_cannot_be_used_is_one_sentence_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpu: bool, said: str
) -> None:
    monkeypatch.setattr(device_module, "nvidia_gpu_present", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(StartupError, match=said):
        choose_device(wanted)


def test_device_cpu_serves_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "nvidia_gpu_present", lambda: True)
    assert choose_device("cpu").type == "cpu"


def test_a_gpu_is_seen_by_its_kernel_driver(tmp_path: Path) -> None:
    assert not nvidia_gpu_present(tmp_path)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert nvidia_gpu_present(tmp_path)


class Cramped:
    """The real model on a device whose memory ends at so many tokens a forward: it raises what torch raises there."""

    def __init__(self, model: LoadedModel, tokens: int, error: Exception) -> None:
        self._forward = model.model.forward
        self._tokens, self._error = tokens, error
        self.ran: list[int] = []

    def __call__(self, packed: PackedBatch) -> Tensor:
        tokens = packed.input_ids.shape[1]
        if tokens > self._tokens:
            raise self._error
        self.ran.append(tokens)
        return self._forward(packed)


def long_rows(*lengths: int) -> list[Row]:
    return [Row(np.arange(1000, 1000 + length, dtype=np.int32)) for length in lengths]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
async def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    rows = long_rows(60, 10, 50, 40, 60, 30, 20, 64)
    wanted = (await engine.run(KEY, rows)).rows
    cramped = Cramped(model_of(engine), 128, error)
    monkeypatch.setattr(model_of(engine).model, "forward", cramped)
    found = await engine.run(KEY, rows)
    assert found.splits > 0
    assert found.fitting_tokens == max(cramped.ran)
    for one, other in zip(found.rows, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


async def test_a_text_that_does_not_fit_alone_is_refused_with_its_length_and_the_others_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_of(engine).model, "forward", Cramped(model_of(engine), 64, torch.OutOfMemoryError("out of memory"))
    )
    small, large, other = (await engine.run(KEY, long_rows(20, 100, 30))).rows
    assert isinstance(large, DoesNotFit)
    assert "100 tokens" in large.message
    assert not isinstance(small, Exception)
    assert not isinstance(other, Exception)


async def test_an_interactive_batch_overtakes_bulk_that_has_not_begun(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()
    order: list[int] = []
    forward = model_of(engine).model.forward
    # The first pass has all threads. Where warm-up found that one is enough for it, bulk would begin in another.
    model_of(engine).threads.single_up_to = 0

    def held(packed: PackedBatch) -> Tensor:
        order.append(len(packed.order))
        begun.set()
        assert gate.wait(20)
        return forward(packed)

    monkeypatch.setattr(model_of(engine).model, "forward", held)
    first = asyncio.create_task(engine.run(KEY, ROWS[:1]))
    await asyncio.to_thread(begun.wait, 20)
    bulk = asyncio.create_task(engine.run(KEY, ROWS[:2]))
    await asyncio.sleep(0)
    query = asyncio.create_task(engine.run(KEY, ROWS, Lane.INTERACTIVE))
    await asyncio.sleep(0)
    passes = engine.loaded.result().runs_on.passes
    assert passes is not None
    async with asyncio.timeout(20):
        while not (passes._urgent and passes._other):  # until both wait for the first one's threads
            await asyncio.sleep(0.001)
    gate.set()
    await asyncio.wait_for(asyncio.gather(first, bulk, query), 20)
    assert order == [1, 3, 2]


@pytest.mark.nightly
def test_a_budget_that_does_not_fit_into_memory_is_lowered_at_warm_up(tmp_path: Path, minilm_folder: Path) -> None:
    """In a process whose address space ends before the largest forward pass: torch itself runs out of memory."""
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    script = f"""
import logging, resource, sys
import numpy
from vecmill.config import load_settings
from vecmill.engine.loader import load
from vecmill.engine.measurements import Before, Measurements
from vecmill.engine.compilation import CompileChoice
from vecmill.engine.device import choose_device
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
settings = load_settings({{"embed_model": {str(folder)!r}, "device": "cpu", "dtype": "float32",
    "torch_compile": "false", "max_batch_tokens": 800_000, "max_batch_ms": 1e9}})
# OpenBLAS ends the process where it gets no buffers: it has them before the limit.
numpy.linalg.lstsq(numpy.eye(512), numpy.ones(512), rcond=None)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Of these, threads that read and compute take 64 MB of addresses each.
resource.setrlimit(resource.RLIMIT_AS, (used + 420_000_000, -1))
loaded = load(settings.model, settings.engine, lambda percent, message: None)
print(*(tokens for tokens, _ in loaded.warmed[{KEY!r}].calibration.measured))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = [int(tokens) for tokens in done.stdout.split()]
    assert 16 < measured[0] < 800_000
    assert "does not fit, trying" in done.stderr


def test_bulk_that_was_launched_does_not_keep_interactive_work_from_the_device() -> None:
    loop = asyncio.new_event_loop()
    inbox = Inbox()
    work = {name: QueuedBatch(name, [], loop, loop.create_future()) for name in ("b1", "b2", "b3", "i1", "i2", "i3")}
    for name, one in work.items():
        inbox.put(Lane.INTERACTIVE if name[0] == "i" else Lane.BULK, one)

    taken = [inbox.take_now() for _ in range(4)]
    assert [(lane, one.model) for lane, one in cast(list[tuple[Lane, QueuedBatch]], taken)] == [
        (Lane.INTERACTIVE, "i1"),
        (Lane.INTERACTIVE, "i2"),
        (Lane.BULK, "b1"),
        (Lane.BULK, "b2"),
    ]
    inbox.ended(Lane.BULK)
    assert inbox.take_now() == (Lane.BULK, work["b3"]), "the interactive lane is full by itself"
    inbox.ended(Lane.INTERACTIVE)
    inbox.probe(loop.stop)
    assert inbox.take() == Probe(loop.stop), "a probe goes first"
    inbox.close()
    assert inbox.take() == (Lane.INTERACTIVE, work["i3"]), "what was queued before the end is still done"
    for lane in (Lane.INTERACTIVE, Lane.INTERACTIVE, Lane.BULK, Lane.BULK):
        inbox.ended(lane)
    with pytest.raises(Closed):
        inbox.take()
    loop.close()


def test_bulk_that_the_devices_thread_waits_for_is_taken_once_nothing_is_on_the_device() -> None:
    """Or that thread could launch no search meanwhile."""
    loop = asyncio.new_event_loop()
    inbox = Inbox()
    before, behind, search = (QueuedBatch(name, [], loop, loop.create_future()) for name in ("b1", "b2", "i1"))
    behind.by_itself = search.by_itself = True
    inbox.put(Lane.BULK, before)
    inbox.put(Lane.BULK, behind)
    assert inbox.take_now() == (Lane.BULK, before)
    assert inbox.take_now() is None
    inbox.put(Lane.INTERACTIVE, search)
    assert inbox.take_now() == (Lane.INTERACTIVE, search)
    inbox.ended(Lane.INTERACTIVE)
    assert inbox.take_now() is None
    inbox.ended(Lane.BULK)
    assert inbox.take_now() == (Lane.BULK, behind)
    loop.close()


def test_a_call_waits_for_what_is_on_the_device_and_what_comes_later_for_the_call() -> None:
    loop = asyncio.new_event_loop()
    inbox, call = Inbox(), Call(lambda: 1)
    first, second = (QueuedBatch(name, [], loop, loop.create_future()) for name in ("b1", "b2"))
    inbox.put(Lane.BULK, first)
    assert inbox.take() == (Lane.BULK, first)
    inbox.call(call)
    inbox.put(Lane.BULK, second)
    threading.Timer(0.05, inbox.ended, (Lane.BULK,)).start()
    assert inbox.take() is call
    assert inbox.take() == (Lane.BULK, second)
    loop.close()


@pytest.fixture
def two_threads(tmp_path: Path, minilm_folder: Path) -> Iterator[Engine]:
    with running(tmp_path, minilm_folder, 2) as engine:
        yield engine


def test_a_first_look_tells_which_searches_get_one_thread(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until more is measured in a quiet moment, which may not come soon."""
    chosen = list[int]()
    fastest = CpuThreads._fastest

    def one_is_enough(self: CpuThreads, run: Any, tokens: int, runs: int, *, single: bool) -> float:
        fastest(self, run, tokens, runs, single=single)
        chosen.append(tokens)
        return 1.3 if single else 1.0

    monkeypatch.setattr(CpuThreads, "_fastest", one_is_enough)
    with running(tmp_path, minilm_folder, 2, at_once=True) as engine:
        assert (chosen, model_of(engine).threads.single_up_to) == ([16, 16, 128, 128], 128)


class Holding:
    """The real model, but passes with a row of one of these lengths wait until they are let go."""

    def __init__(self, model: LoadedModel, *lengths: int) -> None:
        self._forward, self._lengths = model.model.forward, set(lengths)
        self.waiting, self.gate = threading.Event(), threading.Event()
        self.begun: list[int] = []

    def __call__(self, packed: PackedBatch) -> Tensor:
        longest = max(packed.lengths.tolist())
        self.begun.append(longest)
        if longest in self._lengths:
            self.waiting.set()
            assert self.gate.wait(20)
        pooled: Tensor = self._forward(packed)
        return pooled


def two_parts(length: int) -> list[Row]:
    """A batch of two parts: the longest row of the first has one token more than so many."""
    return long_rows(*[length] * 5, length + 1)


async def test_a_thread_that_is_done_goes_on_with_the_next_batch_and_a_search_goes_first(
    two_threads: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(two_threads)
    model.threads.single_up_to = 64
    batches = [two_parts(44), two_parts(46), two_parts(48)]
    alone = [[(await two_threads.run(KEY, [row])).rows[0] for row in rows] for rows in batches]
    holding = Holding(model, 45, 47)
    monkeypatch.setattr(model.model, "forward", holding)
    first, second, third = (asyncio.create_task(two_threads.run(KEY, rows)) for rows in batches)
    while len(holding.begun) < 3:  # each of the threads holds a pass: one of the first batch, one of the second
        await asyncio.sleep(0.001)
    assert sorted(holding.begun) == [44, 45, 47]
    search = asyncio.create_task(two_threads.run(KEY, long_rows(20), Lane.INTERACTIVE))
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in (first, second, third, search))
    holding.gate.set()
    await search
    for task, wanted in zip((first, second, third), alone, strict=True):
        for found, vector in zip((await task).rows, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(found), np.asarray(vector), atol=1e-5)
    assert holding.begun.index(20) < holding.begun.index(49)


async def test_a_search_is_answered_while_another_thread_runs_bulk(
    two_threads: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(two_threads)
    model.threads.single_up_to = 64
    holding = Holding(model, 45)
    monkeypatch.setattr(model.model, "forward", holding)
    bulk = asyncio.create_task(two_threads.run(KEY, two_parts(44)))
    while not holding.waiting.is_set():
        await asyncio.sleep(0.001)
    async with asyncio.timeout(10):
        await two_threads.run(KEY, long_rows(20), Lane.INTERACTIVE)
    assert not bulk.done()
    holding.gate.set()
    result = await bulk
    assert len(result.rows) == 6
    assert result.overlapped, "what it took says nothing of what such a batch takes"


@pytest.mark.parametrize("count", [1, 2])
async def test_a_search_runs_between_two_layers_of_bulk(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """And neither changes the other's numbers. All threads are busy with bulk until it is answered."""
    with running(tmp_path, minilm_folder, count) as engine:
        loaded = engine.loaded.result(60)
        model, passes = loaded.models[KEY], loaded.runs_on.passes
        assert passes is not None
        model.threads.single_up_to = 64
        rows, query = two_parts(44), long_rows(20)
        wanted = [(await engine.run(KEY, [row])).rows[0] for row in (*rows, *query)]
        held, queued, answered = list[int](), threading.Event(), threading.Event()
        first, last = model.model.layers[0], model.model.layers[-1]
        forward, submit = type(last).forward, passes.submit

        def hold(layer: Any, hidden: Tensor, *args: Any, **flags: Any) -> Any:
            if hidden.shape[1] > 64 and layer in (first, last):
                held.append(hidden.shape[1])
                assert (queued if layer is first else answered).wait(20)
            return forward(layer, hidden, *args, **flags)

        def noted(function: Any, width: int, *, urgent: bool = False) -> Any:
            running = submit(function, width, urgent=urgent)
            if urgent:
                queued.set()
            return running

        monkeypatch.setattr(type(last), "forward", hold)
        monkeypatch.setattr(passes, "submit", noted)
        bulk = asyncio.create_task(engine.run(KEY, rows))
        while len(held) < count:
            await asyncio.sleep(0.001)
        found = (await engine.run(KEY, query, Lane.INTERACTIVE)).rows
        assert not bulk.done()
        answered.set()
        found = [*(await bulk).rows, *found]
        for vector, alone in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(vector), np.asarray(alone), atol=1e-5)


async def test_a_pass_of_all_threads_has_them_to_itself(two_threads: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(two_threads)
    model.threads.single_up_to = 64
    holding = Holding(model, 45)
    monkeypatch.setattr(model.model, "forward", holding)
    bulk = [asyncio.create_task(two_threads.run(KEY, two_parts(44)))]
    while not holding.waiting.is_set():
        await asyncio.sleep(0.001)
    bulk.append(asyncio.create_task(two_threads.run(KEY, two_parts(46))))
    long = asyncio.create_task(two_threads.run(KEY, long_rows(100), Lane.INTERACTIVE))
    await asyncio.sleep(0.1)
    assert 100 not in holding.begun
    holding.gate.set()
    await asyncio.gather(long, *bulk)


@pytest.mark.parametrize("lane", list(Lane))
def test_a_lane_only_waits_for_itself(lane: Lane) -> None:
    others = Counter({each: 5 for each in Lane if each != lane})

    assert may_launch(lane, others + Counter({lane: LAUNCHED_AT_A_TIME - 1}))
    assert not may_launch(lane, Counter({lane: LAUNCHED_AT_A_TIME}))
