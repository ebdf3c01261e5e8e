"""For every family a row's answer does not depend on what it was packed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.loaded import CPU, GOLDEN, ids, load_model, run, unit
from tests.tiny_checkpoints import tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta
from vecmill.core.errors import StartupError
from vecmill.core.types import Prefix, Row, Task, TokenIds
from vecmill.models.packing import pack
from vecmill.models.prefix_memory import PrefixMemory
from vecmill.models.registry import FAMILIES, Model
from vecmill.models.source import find

Family = tuple[Task, str]
LONGEST = 120


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    root = tmp_path_factory.mktemp("families")

    def minilm() -> Path:
        return find("auto").folder

    makers: dict[Family, Callable[[], Path]] = {
        (Task.EMBED, "bert"): lambda: tiny_bert(root / "bert", minilm()),
        (Task.EMBED, "xlm-roberta"): lambda: tiny_xlm_roberta(root / "xlm-roberta"),
        (Task.EMBED, "nomic_bert"): lambda: tiny_nomic(root / "nomic", minilm()),
        (Task.EMBED, "qwen3"): lambda: GOLDEN / "qwen3" / "embedding",
        (Task.EMBED, "nvembed"): lambda: GOLDEN / "nvembed" / "checkpoint",
        (Task.RERANK, "bert"): lambda: tiny_cross_encoder(root / "ce", kind="bert", tokenizer_from=minilm()),
        (Task.RERANK, "xlm-roberta"): lambda: tiny_cross_encoder(root / "xlm-ce", kind="xlm-roberta"),
        (Task.RERANK, "qwen3"): lambda: GOLDEN / "qwen3" / "reranker",
    }
    return cache(lambda family: makers[family]())


@pytest.fixture(scope="module")
def model_of(folder_of: Callable[[Family], Path]) -> Callable[[Family], Model]:
    return cache(lambda family: load_model(folder_of(family), family[0])[1])


EVERY_FAMILY: list[Any] = [
    pytest.param((task, model_type), id=f"{task}-{model_type}") for task in Task for model_type in FAMILIES[task]
]

lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=8)


def random_rows(lengths: list[int], seed: int, family: Family, vocab_size: int) -> list[Row]:
    """Rows as the family gets them: pairs for cross-encoders, some unpooled tokens for NV-Embed."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        token_ids = random.integers(0, vocab_size, length).astype(np.int32)
        second = int(random.integers(0, length)) if family == (Task.RERANK, "bert") else None
        unpooled = int(random.integers(0, length)) if family[1] == "nvembed" else 0
        rows.append(Row(token_ids, unpooled=unpooled, second_text=second))
    return rows


def same(together: Any, alone: Any, task: Task) -> None:
    if task is Task.EMBED:
        together, alone = unit(together), unit(alone)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0 if task is Task.EMBED else 1e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_row_packed_equals_the_row_alone(model_of: Callable[[Family], Model], family: Family) -> None:
    model = model_of(family)

    @settings(max_examples=25, deadline=None, database=None)
    @given(lengths=lengths, seed=st.integers(0, 1000))
    def packed_equals_alone(lengths: list[int], seed: int) -> None:
        rows = random_rows(lengths, seed, family, model.vocab_size)
        same(run(model, rows), np.concatenate([run(model, [row]) for row in rows]), family[0])

    packed_equals_alone()


@pytest.mark.parametrize("family", [(Task.EMBED, "qwen3"), (Task.RERANK, "qwen3")], ids=["embed", "rerank"])
def test_rows_with_a_shared_prefix_equal_whole_rows(model_of: Callable[[Family], Model], family: Family) -> None:
    model = model_of(family)

    @settings(max_examples=40, deadline=None, database=None)
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
        same(run(model, rows), run(model, whole), family[0])

    shared_equals_whole()


def test_a_prefix_is_computed_once_for_several_batches(model_of: Callable[[Family], Model]) -> None:
    model = model_of((Task.RERANK, "qwen3"))
    memory = PrefixMemory(most_tokens=100)
    random = np.random.default_rng(0)
    first, second, too_long = (Prefix(random.integers(0, 400, length).astype(np.int32)) for length in (30, 40, 60))

    def batch(*rows: tuple[Prefix | None, int]) -> list[Row]:
        return [Row(random.integers(0, 400, length).astype(np.int32), prefix=prefix) for prefix, length in rows]

    def run_batch(rows: list[Row]) -> list[int]:
        packed = pack(rows, CPU, memory)
        with torch.inference_mode():
            answers = model.forward(packed, use_flash_attn=False).numpy()
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
    assert total % (16 if total <= 256 else 64) == 0
    assert 0 <= total - tokens < (16 if tokens <= 256 else 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.inference_mode()
def test_flash_attention_equals_sdpa_on_a_gpu(folder_of: Callable[[Family], Path], family: Family) -> None:
    from vecmill.models.checkpoint import read
    from vecmill.models.registry import family as family_class
    from vecmill.models.source import Source
    from vecmill.models.weights import Target

    device = torch.device("cuda")
    try:
        folder = folder_of(family)
    except StartupError as error:
        pytest.skip(f"a GPU machine may lack the bundled model: {error}")
    checkpoint = read(Source("tiny", folder, family[0]))
    model = family_class(checkpoint)(checkpoint, Target(torch.bfloat16, device))
    rows = random_rows([1, 3, 64, 64, LONGEST], 0, family, model.vocab_size)
    if family[1] == "qwen3":
        prefix = Prefix(rows[-1].token_ids)
        rows = [*rows, *(Row(one.token_ids, prefix=prefix) for one in rows[:4])]
    packed = pack(rows, device)
    flash, sdpa = (model.forward(packed, use_flash_attn=flash) for flash in (True, False))
    if family[0] is Task.EMBED:
        assert torch.nn.functional.cosine_similarity(flash, sdpa).min() > 0.999
    else:
        torch.testing.assert_close(flash, sdpa, atol=0.1, rtol=0.05)


def test_the_bundled_model_is_one_of_the_families() -> None:
    assert load_model(find("auto").folder)[1].width == 384
