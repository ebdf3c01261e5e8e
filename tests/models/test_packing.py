"""For every family a row's answer does not depend on what it was packed with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.families import TinyModel, every_family, tiny_model, tiny_models
from tests.models.loaded import CPU, ON_CPU, ids, load_model, run, unit
from tests.unicode_texts import texts
from vecmill.config import InferenceSettings, ModelSettings
from vecmill.core.errors import InputTooLong, StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Prefix, Row, Task, TokenIds
from vecmill.engine.loader import expected_card
from vecmill.inference.models import Embedder, Reranker, assemble_one
from vecmill.models import networks
from vecmill.models.checkpoint import Source, read
from vecmill.models.families import FAMILIES
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PrefixMemory, pack
from vecmill.models.source import find
from vecmill.models.tokenizer_loading import load_tokenizer
from vecmill.models.weights import Target

LONGEST = 120


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], Path]:
    root = tmp_path_factory.mktemp("families")
    return cache(lambda tiny: tiny.write(root / str(tiny)))


@pytest.fixture(scope="module")
def model_of(folder_of: Callable[[TinyModel], Path]) -> Callable[[TinyModel], Model]:
    return cache(lambda tiny: load_model(folder_of(tiny), tiny.task)[1])


lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=8)


def random_rows(lengths: list[int], seed: int, tiny: TinyModel, vocab_size: int) -> list[Row]:
    random = np.random.default_rng(seed)
    return [tiny.row(length, vocab_size, random) for length in lengths]


def test_every_family_is_tested_for_each_of_its_tasks() -> None:
    served = {(task, family.model_type) for family in FAMILIES.values() for task in family.tasks}
    assert {(tiny.task, tiny.model_type) for tiny in tiny_models()} == served


def same(together: Any, alone: Any, task: Task) -> None:
    if task is Task.EMBED:
        together, alone = unit(together), unit(alone)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0 if task is Task.EMBED else 1e-5)


@pytest.mark.parametrize("tiny", every_family())
def test_a_row_packed_equals_the_row_alone(model_of: Callable[[TinyModel], Model], tiny: TinyModel) -> None:
    model = model_of(tiny)

    @settings(max_examples=10, deadline=None, database=None)
    @given(lengths=lengths, seed=st.integers(0, 1000))
    def packed_equals_alone(lengths: list[int], seed: int) -> None:
        rows = random_rows(lengths, seed, tiny, model.vocab_size)
        same(run(model, rows), np.concatenate([run(model, [row]) for row in rows]), tiny.task)

    packed_equals_alone()


Serve = Callable[[TinyModel], Embedder | Reranker]
OF_EACH_TOKENIZER = ("embed-bert", "rerank-xlm-roberta", "embed-qwen3", "rerank-qwen3", "embed-gemma3_text")


@pytest.fixture(scope="module")
def served_of(folder_of: Callable[[TinyModel], Path], model_of: Callable[[TinyModel], Model]) -> Iterator[Serve]:
    with WorkerThreads(1) as threads:

        def serve(tiny: TinyModel) -> Embedder | Reranker:
            folder = folder_of(tiny)
            checkpoint = read(Source(folder.name, folder, tiny.task))
            card = expected_card(checkpoint, (), ModelSettings(dtype="float32"), CPU)
            return assemble_one(card, (checkpoint, load_tokenizer(checkpoint)), InferenceSettings(), threads)

        yield cache(serve)


async def rows_of(served: Embedder | Reranker, texts: list[str]) -> list[Row]:
    """Of texts, or of the first with each of the others."""
    if isinstance(served, Embedder):
        return [each.row for each in await served.tokenizer.encode(texts)]
    try:
        return [each.row for each in await served.tokenizer.encode(texts[0], texts[1:], None)]
    except InputTooLong:
        return []


def check_texts(tiny: TinyModel, model: Model, served: Embedder | Reranker, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 20)
    @given(some=st.lists(texts, min_size=2, max_size=6))
    def packed_equals_alone(some: list[str]) -> None:
        # A text of which the tokenizer makes no token is refused before it gets here.
        rows = [row for row in asyncio.run(rows_of(served, some)) if len(row)]
        if rows:
            assert all(len(row) <= served.card.max_model_len for row in rows)
            together = run(model, rows)
            assert np.isfinite(together).all()
            same(together, np.concatenate([run(model, [row]) for row in rows]), tiny.task)

    packed_equals_alone()


@pytest.mark.parametrize("tiny", [tiny for tiny in tiny_models() if str(tiny) in OF_EACH_TOKENIZER], ids=str)
def test_any_text_packed_equals_the_text_alone(
    model_of: Callable[[TinyModel], Model], served_of: Serve, tiny: TinyModel
) -> None:
    check_texts(tiny, model_of(tiny), served_of(tiny), 5)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tiny", every_family())
def test_many_texts_packed_equal_the_texts_alone(
    model_of: Callable[[TinyModel], Model], served_of: Serve, tiny: TinyModel
) -> None:
    check_texts(tiny, model_of(tiny), served_of(tiny), 300)


@pytest.mark.parametrize("tiny", every_family(prefixes=True))
def test_rows_with_a_shared_prefix_equal_whole_rows(model_of: Callable[[TinyModel], Model], tiny: TinyModel) -> None:
    model = model_of(tiny)

    @settings(max_examples=20, deadline=None, database=None)
    @given(
        prefixes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
        tails=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=9),
        seed=st.integers(0, 1000),
    )
    def shared_equals_whole(prefixes: list[int], tails: list[tuple[int, int]], seed: int) -> None:
        random = np.random.default_rng(seed)

        def some(length: int) -> TokenIds:
            return random.integers(0, model.vocab_size, length).astype(np.int32)

        shared = [Prefix(some(length)) for length in prefixes]
        rows = []
        for choice, length in tails:
            rows.append(Row(some(length), prefix=shared[choice] if choice < len(shared) else None))
        whole = [
            Row(np.concatenate((row.prefix.token_ids, row.token_ids))) if row.prefix is not None else row
            for row in rows
        ]
        same(run(model, rows), run(model, whole), tiny.task)

    shared_equals_whole()


@pytest.mark.parametrize("attention", ON_CPU)
def test_a_prefix_is_computed_once_for_several_batches(
    model_of: Callable[[TinyModel], Model], attention: Attention
) -> None:
    model = model_of(tiny_model(Task.RERANK, "qwen3"))
    memory = PrefixMemory(most_tokens=100)
    random = np.random.default_rng(0)
    first, second, too_long = (Prefix(random.integers(0, 400, length).astype(np.int32)) for length in (30, 40, 60))

    def batch(*rows: tuple[Prefix | None, int]) -> list[Row]:
        return [Row(random.integers(0, 400, length).astype(np.int32), prefix=prefix) for prefix, length in rows]

    def run_batch(rows: list[Row]) -> list[int]:
        packed = pack(rows, CPU, memory, attention=attention)
        with torch.inference_mode():
            answers = model.forward(packed).numpy()
        for new in packed.new_prefixes:
            memory.keep(new.prefix, new.layers)
        np.testing.assert_allclose(answers, run(model, [rows[index] for index in packed.order]), atol=1e-5, rtol=1e-5)
        return [len(new.prefix) for new in packed.new_prefixes]

    computed = [
        run_batch(batch((first, 5), (None, 9), (first, 7))),
        run_batch(batch((second, 5), (first, 5), (first, 3), (None, 3))),
        run_batch(batch((first, 1), (second, 11), (too_long, 4))),
        run_batch(batch((too_long, 4))),
    ]
    assert computed == [[30], [40], [60], [60]]  # the last has no room to be kept
    assert len(memory) == 70
    del first
    assert len(memory) == 40  # forgotten together with the request's rows


def row(*values: int) -> Row:
    return Row(ids(*values))


def test_a_pack_is_the_rows_end_to_end_and_a_filler() -> None:
    packed = pack([row(7, 8, 9), row(5), Row(ids(1, 2, 3), second_text=1)], CPU)
    assert packed.order == (1, 0, 2)
    assert packed.input_ids.tolist() == [[5, 7, 8, 9, 1, 2, 3, *[0] * 9]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 2, *range(9)]]
    assert packed.token_type_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, *[0] * 9]]
    assert packed.cu_seqlens.tolist() == [0, 1, 4, 7, 16]
    assert (packed.first.tolist(), packed.last.tolist()) == ([0, 1, 4], [0, 3, 6])
    assert [(group.start, group.rows, group.length) for group in packed.groups] == [(0, 1, 1), (1, 2, 3), (7, 1, 9)]
    assert packed.keys is None


def test_a_prefix_is_there_once_and_its_rows_look_at_it() -> None:
    prefix = Prefix(ids(4, 5))
    packed = pack([Row(ids(6, 7), prefix=prefix), row(1), Row(ids(8), prefix=prefix)], CPU)
    assert packed.input_ids.tolist() == [[1, 4, 5, 8, 6, 7, *[0] * 10]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2, 2, 3, *range(10)]]
    assert packed.order == (1, 2, 0)
    assert (packed.first.tolist(), packed.last.tolist()) == ([0, 3, 4], [0, 3, 5])
    assert packed.keys is not None
    assert packed.keys.cu_seqlens.tolist() == [0, 1, 3, 6, 10, 20]
    assert packed.keys.index.tolist() == [0, 1, 2, 1, 2, 3, 1, 2, 4, 5, *range(6, 16)]
    assert packed.keys.max_length == 10


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_packs_have_few_shapes_and_little_filler(lengths: list[int]) -> None:
    tokens = sum(lengths)
    packed = pack([Row(np.ones(length, dtype=np.int32)) for length in lengths], CPU)
    total = packed.input_ids.shape[1]
    step = 16 if tokens <= 256 else 32 if tokens <= 1024 else 64
    assert total % step == 0
    assert 0 <= total - tokens < step


@pytest.mark.parametrize("tiny", every_family(), ids=str)
def test_padded_keys_change_no_answer(
    model_of: Callable[[TinyModel], Model], on_cpu_with: Callable[[str], None], tiny: TinyModel
) -> None:
    model = model_of(tiny)
    rows = random_rows([*range(1, 34), 47, 47, 63, 79, 79, 79, LONGEST], 1, tiny, model.vocab_size)
    on_cpu_with("AVX2")
    assert pack(rows, CPU).padded_keys is None
    plain = run(model, rows)
    on_cpu_with("AVX512")
    assert pack(rows, CPU).padded_keys is not None
    same(run(model, rows), plain, tiny.task)


def test_keys_are_padded_where_half_a_vector_or_more_is_left_over(on_cpu_with: Callable[[str], None]) -> None:
    on_cpu_with("AVX512")
    packed = pack([row(*range(length)) for length in (7, 8, 15, 15, 16, 23, 24)], CPU)
    assert [(group.length, group.padded) for group in packed.groups] == [
        (7, None),
        (8, (0, 16)),
        (15, (16, 16)),
        (16, None),
        (23, None),
        (24, (48, 32)),
        (4, None),
    ]
    assert packed.padded_keys is not None
    of_rows_of_15 = [*range(15, 30), 29, *range(30, 45), 44]
    assert packed.padded_keys[16:48].tolist() == of_rows_of_15  # a row's last token again, never another row's


def test_padded_keys_are_those_of_the_prefix_too(on_cpu_with: Callable[[str], None]) -> None:
    on_cpu_with("AVX512")
    prefix = Prefix(np.arange(20, dtype=np.int32))
    packed = pack([Row(np.arange(size, dtype=np.int32), prefix=prefix) for size in (8, 9, 9, 12)], CPU)
    of_rows = {group.length: group.padded for group in packed.groups if group.prefix is not None}
    assert of_rows == {8: (0, 32), 9: (32, 32), 12: None}  # 28 and 29 keys; and 32, two whole vectors
    assert packed.padded_keys is not None
    first = next(group.start for group in packed.groups if group.length == 9)
    second_row_of_9 = [*range(20), *range(first + 9, first + 18), *[first + 17] * 3]
    assert packed.padded_keys[64:].tolist() == second_row_of_9


@pytest.mark.parametrize("tiny", every_family(prefixes=True), ids=str)
def test_padded_keys_behind_a_prefix_change_no_answer(
    model_of: Callable[[TinyModel], Model], on_cpu_with: Callable[[str], None], tiny: TinyModel
) -> None:
    model = model_of(tiny)
    rows = random_rows([29, 30, 31, 31, 47, LONGEST], 1, tiny, model.vocab_size)
    prefix = Prefix(rows[0].token_ids[:18])
    rows = [*rows, *(Row(row.token_ids[18:], prefix=prefix) for row in rows)]
    on_cpu_with("AVX2")
    plain = run(model, rows)
    on_cpu_with("AVX512")
    same(run(model, rows), plain, tiny.task)


@pytest.mark.parametrize("tiny", every_family(), ids=str)
def test_attention_as_products_changes_no_answer(model_of: Callable[[TinyModel], Model], tiny: TinyModel) -> None:
    model = model_of(tiny)
    rows = random_rows([1, 5, 16, 17, 17, 17, 31, 40, LONGEST, LONGEST], 1, tiny, model.vocab_size)
    if tiny.prefixes:
        prefix = Prefix(rows[-1].token_ids[:18])
        rows = [*rows, *(Row(row.token_ids, prefix=prefix) for row in rows[:5])]
    same(run(model, rows, Attention.PRODUCTS), run(model, rows), tiny.task)


@pytest.mark.parametrize("attention", ON_CPU)
def test_padding_brings_no_value_that_is_not_finite_into_another_row(
    model_of: Callable[[TinyModel], Model], on_cpu_with: Callable[[str], None], attention: Attention
) -> None:
    on_cpu_with("AVX512")
    tiny = tiny_model(Task.EMBED, "bert")
    model = model_of(tiny)
    rows = random_rows([15, 15, 15, 31, 31], 2, tiny, model.vocab_size)
    spoiled = int(rows[1].token_ids[3])
    rows = [rows[0], rows[1], *(Row(np.where(each.token_ids == spoiled, 1, each.token_ids)) for each in rows[2:])]
    embeddings = next(part for part in model.modules[0].modules() if isinstance(part, torch.nn.Embedding))
    before = embeddings.weight[spoiled].clone()
    embeddings.weight.data[spoiled] = torch.inf
    try:
        finite = np.isfinite(run(model, rows, attention)).all(axis=1).tolist()
    finally:
        embeddings.weight.data[spoiled] = before
    assert finite == [spoiled not in each.token_ids for each in rows]
    assert finite.count(False) in (1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tiny", every_family())
@torch.inference_mode()
def test_flash_attention_equals_sdpa_on_a_gpu(folder_of: Callable[[TinyModel], Path], tiny: TinyModel) -> None:
    device = torch.device("cuda")
    try:
        folder = folder_of(tiny)
    except StartupError as error:
        pytest.skip(f"a GPU machine may lack the bundled model: {error}")
    model = networks.load_model(read(Source(folder.name, folder, tiny.task)), Target(torch.bfloat16, device))
    rows = random_rows([1, 3, 64, 64, LONGEST], 0, tiny, model.vocab_size)
    if tiny.prefixes:
        prefix = Prefix(rows[-1].token_ids)
        rows = [*rows, *(Row(row.token_ids, prefix=prefix) for row in rows[:4])]
    flash, sdpa = (
        model.forward(pack(rows, device, attention=attention)) for attention in (Attention.FLASH, Attention.SDPA)
    )
    if tiny.task is Task.EMBED:
        assert torch.nn.functional.cosine_similarity(flash, sdpa).min() > 0.999
    else:
        torch.testing.assert_close(flash, sdpa, atol=0.1, rtol=0.05)


def test_the_bundled_model_is_one_of_the_families() -> None:
    assert load_model(find("auto").folder)[1].width == 384
