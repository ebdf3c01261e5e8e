"""Sliding windows in packed rows equal transformers' own attention over each row alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel, ModernBertConfig, ModernBertModel, Qwen3Model
from transformers.masking_utils import sliding_window_bidirectional_mask_function, sliding_window_causal_mask_function

from tests.models.loaded import CPU, GOLDEN, load_model, run
from tests.tiny_checkpoints import edit_json
from vecmill.core.errors import StartupError
from vecmill.core.types import Prefix, Row, Task, TokenIds
from vecmill.engine.compilation import compilations, compile_layers
from vecmill.models import packed_attention
from vecmill.models.families.nv_embed import NV_EMBED
from vecmill.models.merged_projections import merge_projections
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PackedBatch, PrefixMemory, pack
from vecmill.models.transformers_networks import ATTENTION

WINDOW = 8
SLIDES = "sliding_attention"
WAYS: dict[str, dict[str, Any]] = {
    "all layers": {"sliding_window": WINDOW, "max_window_layers": 0},
    "the last layer": {"sliding_window": WINDOW, "max_window_layers": 1},
    "the first layer": {"sliding_window": WINDOW, "layer_types": [SLIDES, "full_attention"]},
    "a window of one": {"sliding_window": 1, "max_window_layers": 1},
    "wider than a block of the longest": {"sliding_window": 70, "max_window_layers": 0},
    "no layer": {"sliding_window": WINDOW, "max_window_layers": 2},
    "not used": {"sliding_window": WINDOW, "max_window_layers": 0, "use_sliding_window": False},
}
LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 1, 40, 90)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("windows")

    def make(way: str) -> Path:
        folder = shutil.copytree(GOLDEN / "qwen3" / "embedding", root / way)
        edit_json(folder / "config.json", **{"use_sliding_window": True, **WAYS[way]})
        return folder

    return cache(make)


def ids(length: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 400, length).astype(np.int32)


@torch.inference_mode()
def reference(folder: Path, attention: str, rows: Sequence[TokenIds]) -> NDArray[np.float32]:
    """transformers' last hidden state of each row alone."""
    model: Any = Qwen3Model.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    hidden = [model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state for row in rows]
    return np.stack([each[0, -1].numpy() for each in hidden])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_equal_each_row_alone(folder_of: Callable[[str], Path], way: str, attention: str) -> None:
    texts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    actual = run(load_model(folder_of(way))[1], [Row(text) for text in texts])

    np.testing.assert_allclose(actual, reference(folder_of(way), attention, texts), atol=1e-4, rtol=1e-4)


def test_a_window_changes_what_it_must(folder_of: Callable[[str], Path]) -> None:
    short, long = [Row(ids(WINDOW))], [Row(ids(40))]
    windowed, whole = (load_model(folder_of(way))[1] for way in ("all layers", "not used"))

    np.testing.assert_allclose(run(windowed, short), run(whole, short), atol=1e-6)
    assert np.abs(run(windowed, long) - run(whole, long)).max() > 0.01


@pytest.mark.parametrize("prefix_length", [3, WINDOW, 30])
@pytest.mark.parametrize("way", ["all layers", "the last layer", "a window of one"])
def test_rows_after_a_prefix_equal_whole_rows(folder_of: Callable[[str], Path], way: str, prefix_length: int) -> None:
    """The prefix new in one batch and recalled in the next."""
    model = load_model(folder_of(way))[1]
    prefix, memory = Prefix(ids(prefix_length)), PrefixMemory()
    tails = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    rows = [*(Row(tail, prefix=prefix) for tail in tails), Row(ids(50))]
    wanted = reference(
        folder_of(way), "eager", [*(np.concatenate((prefix.token_ids, tail)) for tail in tails), ids(50)]
    )
    for recalled in (False, True):
        packed = pack(rows, CPU, memory)
        assert bool(packed.recalled) is recalled
        answers = _run(model, packed)
        for new in packed.new_prefixes:
            memory.keep(new.prefix, new.layers)
        np.testing.assert_allclose(answers, wanted[list(packed.order)], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_compiled_layers_have_their_windows(folder_of: Callable[[str], Path]) -> None:
    """Layers of both kinds: compiled once for each, and never again."""
    torch.compiler.reset()
    model = load_model(folder_of("the last layer"))[1]
    rows = [Row(ids(length, seed)) for seed, length in enumerate(LENGTHS)]
    wanted = run(model, rows)
    before = compilations()

    def run_tokens(tokens: int) -> float:
        run(model, [Row(ids(tokens))])
        return 0.0

    compile_layers(model.layers, run_tokens, backend="eager")
    assert compilations() == before + 2
    np.testing.assert_allclose(run(model, rows), wanted, atol=1e-5)
    assert compilations() == before + 2
    torch.compiler.reset()


@torch.inference_mode()
def test_masks_are_made_once_for_a_batch(
    folder_of: Callable[[str], Path], on_cpu_with: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask serves all layers and all groups; there is none if no row is longer than its window."""
    on_cpu_with("AVX2")
    model, whole = (load_model(folder_of(way))[1] for way in ("all layers", "not used"))
    made: list[tuple[int, ...]] = []
    ones = torch.ones

    def counted(*shape: int, **kwargs: Any) -> Tensor:
        made.append(shape)
        return ones(*shape, **kwargs)

    monkeypatch.setattr(torch, "ones", counted)
    first, second = Prefix(ids(20)), Prefix(ids(20, seed=1))
    rows = [Row(ids(30)), Row(ids(30)), Row(ids(5), prefix=first), Row(ids(5), prefix=second)]
    _run(model, pack(rows, CPU))
    # For the rows of 30; and a wider one for the rows of 5, which see keys before their own.
    assert made == [(32, 33), (32, 40)]
    made.clear()
    _run(model, pack([Row(ids(WINDOW))] * 2, CPU))
    assert made == []
    _run(whole, pack([Row(ids(100))], CPU))
    assert made == []


@pytest.mark.parametrize("causal", [True, False], ids=["one way", "both ways"])
@pytest.mark.parametrize(
    ("length", "window"), [(20, 4), (4, 4), (5, 4), (15, 4), (303, 65), (1300, 16), (1303, 600), (1305, 2000), (600, 1)]
)
def test_attention_sees_what_transformers_masks_say(any_way: Attention, causal: bool, length: int, window: int) -> None:
    """Both ways as ModernBERT's layers, whose window is on either side; rows longer than a block among them."""
    torch.manual_seed(0)
    batch = pack([Row(ids(length)), Row(ids(3)), Row(ids(length))], CPU, attention=any_way)
    tokens = batch.input_ids.shape[1]
    query, key, value = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    actual, _ = packed_attention.packed_attention(
        nn.Module(), query, key, value, None, packed_batch=batch, is_causal=causal, sliding_window=window
    )

    # ModernBERT gives its attention one more than the tokens on either side.
    allowed = (
        sliding_window_causal_mask_function(window)
        if causal
        else sliding_window_bidirectional_mask_function(window - 1)
    )
    places = torch.arange(length)
    mask = allowed(0, 0, places[:, None], places[None])
    for start in batch.first[-2:].tolist():
        own = slice(start, start + length)
        wanted = nn.functional.scaled_dot_product_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(actual[:, own].transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


def mask_values(batch: PackedBatch) -> int:
    """Of all masks that a batch keeps."""
    bands = [band for band, _ in batch.bands.values()]
    return sum(mask.numel() for mask in [*bands, *batch.masks.values()])


def test_the_masks_of_a_long_row_stay_small() -> None:
    """8,192 tokens in a window of 16: a mask of all of them would take 67 MB."""
    batch = pack([Row(ids(8192))], CPU)
    query = torch.randn(1, 1, 8192, 4)
    packed_attention.packed_attention(
        nn.Module(), query, query, query, None, packed_batch=batch, is_causal=True, sliding_window=16
    )
    assert mask_values(batch) < 1_000_000


def test_the_masks_of_a_long_row_behind_a_prefix_stay_small(on_cpu_with: Callable[[str], None]) -> None:
    """8,192 tokens in blocks of 512: masks of their own would take 75 MB in all."""
    on_cpu_with("AVX512")
    batch = pack([Row(ids(8192), prefix=Prefix(ids(1000)))], CPU)
    query = torch.randn(1, 1, batch.input_ids.shape[1], 4)
    packed_attention.packed_attention(nn.Module(), query, query, query, None, packed_batch=batch, is_causal=True)
    assert 0 < mask_values(batch) < 10_000_000


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"layer_types": [SLIDES, "full_attention"], "use_sliding_window": False}, "`use_sliding_window`: false"),
        ({"layer_types": [SLIDES, "full_attention"], "sliding_window": None}, "`sliding_window`: null"),
        ({"sliding_window": 0, "max_window_layers": 0}, "`sliding_window`: 0"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "`layer_types`"),
    ],
)
def test_windows_that_mean_nothing_are_refused(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    folder = shutil.copytree(GOLDEN / "qwen3" / "embedding", tmp_path / "model")
    edit_json(folder / "config.json", **{"use_sliding_window": True, "sliding_window": 4, **keys})

    with pytest.raises(StartupError, match=named):
        load_model(folder)


@torch.inference_mode()
def _run(model: Model, packed: PackedBatch) -> NDArray[np.float32]:
    """The model's answers in packed order."""
    answers: NDArray[np.float32] = model.forward(packed).numpy()
    return answers


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@torch.inference_mode()
def test_mistrals_window_is_the_same_in_every_layer(merged: bool) -> None:
    """Mistral's window is set in its configuration, not for each layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**shape, vocab_size=400, num_hidden_layers=2, head_dim=8, sliding_window=WINDOW)
    model: Any = MistralModel(config).eval()
    texts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = _each_alone(model, texts)
    weights = model.state_dict()
    model.set_attn_implementation(ATTENTION)
    places = merge_projections(model, NV_EMBED.tasks[Task.EMBED].network.merged) if merged else {}
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        if name in places:
            place = places[name]
            parameters[place.parameter].data[place.start : place.stop] = value

    np.testing.assert_allclose(_packed(model, texts), wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_modernberts_layers_look_both_ways() -> None:
    """No family here has them yet: transformers' own class, every other layer with a window on either side."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,
        local_attention=WINDOW,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    model: Any = ModernBertModel(config).eval()
    texts = [ids(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = _each_alone(model, texts)
    model.set_attn_implementation(ATTENTION)

    np.testing.assert_allclose(_packed(model, texts), wanted, atol=1e-4, rtol=1e-4)


def _each_alone(model: Any, texts: Sequence[TokenIds]) -> NDArray[np.float32]:
    """The last token's hidden state of each, by transformers' eager attention."""
    model.set_attn_implementation("eager")
    rows = [torch.from_numpy(text.astype(np.int64))[None] for text in texts]
    return np.stack([model(input_ids=row).last_hidden_state[0, -1].numpy() for row in rows])


def _packed(model: Any, texts: Sequence[TokenIds]) -> NDArray[np.float32]:
    """The same of a pack, in the order of the texts."""
    batch = pack([Row(text) for text in texts], CPU)
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "packed_batch": batch}
    hidden = model(**given).last_hidden_state[0, batch.last].numpy()
    ordered: NDArray[np.float32] = hidden[np.argsort(batch.order)]
    return ordered
