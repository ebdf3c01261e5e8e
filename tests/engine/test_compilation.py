"""Compiled layers: one graph whatever the batch, the vectors of eager, and eager where compiling fails."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from tests.models.loaded import CPU, GOLDEN, load_model
from tests.tiny_checkpoints import tiny_bert, tiny_cross_encoder, tiny_nomic
from vecmill.config import load_settings
from vecmill.core.types import Lane, Prefix, Row, Task
from vecmill.engine import compilation
from vecmill.engine.compilation import choose, compilations, make_eager
from vecmill.engine.engine import Engine
from vecmill.engine.forward import CpuThreads
from vecmill.models.networks import Model
from vecmill.models.packing import PrefixMemory, pack

pytestmark = pytest.mark.slow

WITHOUT_COMPILER = "aot_eager"  # dynamo and its graph, and torch's own kernels
# Whether g++ knows the vectors that this CPU has is found out by ten programs, half of the time of a first compilation.
KNOWN_VECTORS = {"cpp.vec_isa_ok": True}
VOCAB = 200  # of the smallest tiny model, and fewer
LONGEST = 90


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What one test compiled must not serve another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def bert(folder: Path, minilm: Path) -> Model:
    return load_model(tiny_bert(folder, minilm))[1]


def cross_encoder(folder: Path, minilm: Path) -> Model:
    return load_model(tiny_cross_encoder(folder, kind="xlm-roberta"), Task.RERANK)[1]


def nomic(folder: Path, minilm: Path) -> Model:
    return load_model(tiny_nomic(folder, minilm))[1]


def qwen3(folder: Path, minilm: Path) -> Model:
    return load_model(GOLDEN / "qwen3" / "embedding")[1]


def nv_embed(folder: Path, minilm: Path) -> Model:
    return load_model(GOLDEN / "nvembed" / "checkpoint")[1]


def some_row(random: np.random.Generator, prefix: Prefix | None = None) -> Row:
    token_ids = random.integers(3, VOCAB, random.integers(1, LONGEST)).astype(np.int32)
    return Row(token_ids, prefix=prefix)


@torch.inference_mode()
def forward(model: Model, rows: Sequence[Row], memory: PrefixMemory | None = None) -> torch.Tensor:
    packed = pack(rows, CPU, memory)
    answers = model.forward(packed)
    for new in packed.new_prefixes:
        assert memory is not None
        memory.keep(new.prefix, new.layers)
    return answers


def stopwatch(model: Model) -> Callable[[int], float]:
    """As warm-up runs a model."""
    random = np.random.default_rng(1)

    def run(tokens: int) -> float:
        started = perf_counter()
        forward(model, [Row(random.integers(3, VOCAB, 16).astype(np.int32)) for _ in range(tokens // 16)])
        return perf_counter() - started

    return run


def assert_equal_to_eager(model: Model, rows: Sequence[Row], actual: torch.Tensor) -> None:
    make_eager(model.layers)
    torch.testing.assert_close(actual, forward(model, rows), atol=1e-5, rtol=1e-4)


AT_NIGHT = [pytest.param(build, marks=pytest.mark.nightly) for build in (cross_encoder, nomic, qwen3)]


@pytest.mark.parametrize("build", [bert, nv_embed, *AT_NIGHT])
def test_one_graph_serves_all_layers_and_all_batches(
    tmp_path: Path, minilm_folder: Path, build: Callable[[Path, Path], Model]
) -> None:
    model = build(tmp_path / "tiny", minilm_folder)
    assert len(model.layers) > 1
    before = compilations()
    assert choose(model, "true", stopwatch(model), WITHOUT_COMPILER).compiled
    assert compilations() == before + 1
    random = np.random.default_rng(0)
    rows: list[Row] = []
    answers = torch.empty(0)
    for _ in range(50):
        rows = [some_row(random) for _ in range(random.integers(1, 20))]
        answers = forward(model, rows)
    forward(model, [Row(np.array([5], dtype=np.int32))])
    assert compilations() == before + 1
    assert_equal_to_eager(model, rows, answers)


def test_new_and_recalled_prefixes_are_the_same_graph(tmp_path: Path, minilm_folder: Path) -> None:
    model = qwen3(tmp_path, minilm_folder)
    choose(model, "true", stopwatch(model), WITHOUT_COMPILER)
    before = compilations()
    random = np.random.default_rng(0)
    memory = PrefixMemory()
    shared = [Prefix(random.integers(3, VOCAB, length).astype(np.int32)) for length in (3, 17, 40)]
    prefixes = [None, *shared]
    batches = [[some_row(random, prefixes[random.integers(4)]) for _ in range(6)] for _ in range(20)]
    all_answers = [forward(model, rows, memory) for rows in batches]
    assert len(memory) == 3 + 17 + 40
    assert compilations() == before
    for rows, answers in zip(batches, all_answers, strict=True):
        assert_equal_to_eager(model, rows, answers)


def test_a_pass_leaves_no_prefix_behind(tmp_path: Path, minilm_folder: Path) -> None:
    model = qwen3(tmp_path, minilm_folder)
    choose(model, "true", stopwatch(model), WITHOUT_COMPILER)
    memory = PrefixMemory()
    prefix = Prefix(np.arange(3, 9, dtype=np.int32))
    forward(model, [some_row(np.random.default_rng(0), prefix)], memory)
    assert len(memory) == 6
    del prefix
    assert len(memory) == 0


@pytest.mark.nightly
def test_several_models_of_one_class_are_each_compiled_once(tmp_path: Path, minilm_folder: Path) -> None:
    models = [
        bert(tmp_path / "embed", minilm_folder),
        load_model(tiny_cross_encoder(tmp_path / "rank", kind="bert", tokenizer_from=minilm_folder), Task.RERANK)[1],
        load_model(minilm_folder)[1],
        load_model(minilm_folder, dtype=torch.bfloat16)[1],
    ]
    before = compilations()
    assert all(choose(model, "true", stopwatch(model), WITHOUT_COMPILER).compiled for model in models)
    compiled = compilations()
    assert compiled - before <= len(models)
    random = np.random.default_rng(0)
    for _ in range(5):
        for model in models:
            forward(model, [some_row(random) for _ in range(random.integers(1, 8))])
    assert compilations() == compiled


@pytest.mark.parametrize("single_up_to", [16, *(pytest.param(tokens, marks=pytest.mark.nightly) for tokens in (0, 64))])
async def test_nothing_is_compiled_once_the_engine_is_ready(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch, single_up_to: int
) -> None:
    """Also where forward passes change between one thread and all: both are run before."""
    monkeypatch.setattr(compilation, "choose", partial(choose, backend=WITHOUT_COMPILER))
    monkeypatch.setattr(CpuThreads, "measure", lambda self, run, largest: setattr(self, "single_up_to", single_up_to))
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "torch_compile": "true"})
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    (key,) = engine.loaded.result(60).models
    assert engine.loaded.result().warmed[key].compiled
    ready, random = compilations(), np.random.default_rng(0)
    for _ in range(30):
        await engine.run(key, [some_row(random) for _ in range(random.integers(1, 30))])
        await engine.run(key, [some_row(random)], Lane.INTERACTIVE)
    assert compilations() == ready > 0
    engine.close()


async def test_nothing_is_compiled_for_batches_that_cannot_be_divided(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up's rows are short, and many in each batch. What is compiled is for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(compilation, "choose", partial(choose, backend=WITHOUT_COMPILER))
    monkeypatch.setattr(CpuThreads, "measure", lambda self, run, largest: setattr(self, "single_up_to", 128))
    settings = load_settings(
        {"embed_model": str(tiny_bert(tmp_path / "tiny", minilm_folder)), "device": "cpu", "torch_compile": "true"}
    )
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    (key,) = engine.loaded.result(60).models
    ready = compilations()
    for lengths in ([100], [60] * 10, [100, 40], [120, 120]):
        rows = [Row(np.full(length, 5, dtype=np.int32)) for length in lengths]
        assert len((await engine.run(key, rows)).rows) == len(rows)
    assert compilations() == ready > 0
    engine.close()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("compiled_seconds", "kept", "reason"),
    [
        (1.5, False, "eager: compiled is 0.67 times as fast as eager, measured at warm-up"),
        pytest.param(
            0.99,
            False,
            "eager: compiled is 1.01 times as fast as eager, measured at warm-up",
            marks=pytest.mark.nightly,
        ),
        (0.5, True, "compiled: 2.00 times as fast as eager, measured at warm-up"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True], ids=["run", "prepared"])
def test_auto_keeps_the_faster(
    tmp_path: Path,
    minilm_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepared: bool,
    compiled_seconds: float,
    kept: bool,
    reason: str,
) -> None:
    """By a watch that says so: what is measured runs, but how long it takes here is up to the machine."""
    model = bert(tmp_path / "tiny", minilm_folder)
    real = stopwatch(model)
    monkeypatch.setattr(compilation, "MEASURE_SECONDS", 0.0)

    def run(tokens: int) -> float:
        real(tokens)
        return compiled_seconds if is_compiled(model) else 1.0

    def prepare() -> compilation.Run:
        seconds = run(16)  # of the layers as they are now, as a graph of them would be
        return lambda tokens: seconds

    choice = choose(model, "auto", run, WITHOUT_COMPILER, prepare if prepared else None)
    assert (choice.compiled, choice.reason) == (kept, reason)
    assert is_compiled(model) is kept
    if not kept:
        assert_runs_eager(model)


def is_compiled(model: Model) -> bool:
    return model.layers[0]._compiled_call_impl is not None


def test_false_compiles_nothing(tmp_path: Path, minilm_folder: Path) -> None:
    model = bert(tmp_path / "tiny", minilm_folder)
    before = compilations()
    choice = choose(model, "false", stopwatch(model))
    assert (choice.compiled, choice.reason) == (False, "eager: TORCH_COMPILE=false")
    assert compilations() == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.nightly), torch.bfloat16])
def test_inductors_vectors_are_those_of_eager(tmp_path: Path, minilm_folder: Path, dtype: torch.dtype) -> None:
    model = load_model(tiny_bert(tmp_path / "tiny", minilm_folder), dtype=dtype)[1]
    before = compilations()
    with inductor.patch(KNOWN_VECTORS):
        choice = choose(model, "true", stopwatch(model))
    assert (choice.compiled, choice.reason) == (True, "compiled: TORCH_COMPILE=true")
    random = np.random.default_rng(0)
    batches = [[some_row(random) for _ in range(random.integers(1, 12))] for _ in range(20)]
    actual = torch.cat([forward(model, rows) for rows in batches])
    assert compilations() == before + 1
    make_eager(model.layers)
    wanted = torch.cat([forward(model, rows) for rows in batches])
    least = 0.9995 if dtype is torch.bfloat16 else 1 - 1e-6
    assert torch.cosine_similarity(actual, wanted).min() >= least


@pytest.mark.parametrize("wanted", ["auto", pytest.param("true", marks=pytest.mark.nightly)])
def test_without_a_compiler_it_is_eager_and_says_so(
    tmp_path: Path,
    minilm_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
) -> None:
    model = bert(tmp_path / "tiny", minilm_folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        choice = choose(model, wanted, stopwatch(model))
    assert not choice.compiled
    assert re.fullmatch(r"eager: could not be compiled \(\w+: .*compiler.*\)", choice.reason)
    assert_warned(caplog)
    assert_runs_eager(model)


def test_a_model_too_many_is_eager(tmp_path: Path, minilm_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = bert(tmp_path / "tiny", minilm_folder), load_model(minilm_folder)[1]
    with dynamo.patch(recompile_limit=1):
        assert choose(first, "true", stopwatch(first), WITHOUT_COMPILER).compiled
        choice = choose(second, "true", stopwatch(second), WITHOUT_COMPILER)
    assert not choice.compiled
    assert_warned(caplog)
    assert_runs_eager(second)


def assert_warned(caplog: pytest.LogCaptureFixture) -> None:
    [record] = [record for record in caplog.records if record.name == "vecmill.engine.compilation"]
    assert record.levelno == logging.WARNING
    assert "eager" in record.getMessage()


def assert_runs_eager(model: Model) -> None:
    before = compilations()
    rows = [some_row(np.random.default_rng(0)) for _ in range(5)]
    answers = forward(model, rows)
    make_eager(model.layers)
    torch.testing.assert_close(answers, forward(model, rows), atol=0, rtol=0)
    torch.compiler.reset()
    forward(model, rows)
    assert compilations() == before
