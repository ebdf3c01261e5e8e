"""Keys of a checkpoint's JSON files changed at random: the vectors are the reference's, or it is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.checkpoints.test_config import bert, native_nomic, qwen3, xlm_roberta
from tests.checkpoints.variants import TOLERANCE, Variant, reference_vectors, served
from tests.models.loaded import load_model
from tests.tiny_encoders import tiny_encoder
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.config_keys import ACTIVATIONS, ROPE
from vecmill.models.families import FAMILIES
from vecmill.models.modules import NORMALIZE, POOLING, SENTENCE_TRANSFORMERS
from vecmill.models.tokenizer_loading import load_tokenizer

TEXTS = ("one", "How do I parse dates in Python?", "a longer text " * 60)
BASES: Mapping[str, Callable[[Path], Any]] = {
    "bert": bert,
    "xlm-roberta": xlm_roberta,
    "qwen3": qwen3,
    "nomic_bert": native_nomic,
    **{kind: partial(tiny_encoder, kind=kind) for kind in ("roberta", "distilbert", "electra", "albert", "mpnet")},
}
# Files with the keys that are known of them.
KEYS: Mapping[str, set[str]] = {
    "config.json": {key for family in FAMILIES.values() for spec in family.tasks.values() for key in spec.keys},
    "1_Pooling/config.json": {*POOLING},
    "2_Normalize/config.json": {*NORMALIZE},
    "config_sentence_transformers.json": {*SENTENCE_TRANSFORMERS[Task.EMBED]},
}
numbers = st.integers(-1, 64) | st.sampled_from([128, 130, 512, 30522]) | st.floats(0, 8) | st.floats()
words = st.sampled_from(
    [*ACTIVATIONS, "geglu", "absolute", "relative_key", "alibi", "mean", "cls", "max", "dot", "query"]
)
layers = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=3)
rope = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])},
    optional={key: numbers for key in ROPE if key not in ("rope_type", "type", "truncate")},
)
scalars = st.none() | st.booleans() | numbers | words
prompts = st.dictionaries(words, st.none() | st.sampled_from(["", "query: ", " two words "]), max_size=3)
values = (
    scalars | layers | rope | prompts | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=3), scalars)
)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, Any]]]:
    """A base, and keys of its files with their new values."""
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        file = draw(st.sampled_from(["config.json"] * 3 + sorted(KEYS)))
        key = draw(st.sampled_from(sorted(KEYS[file])) | st.text(min_size=1, max_size=4))
        drawn.append((file, key, draw(values)))
    return draw(st.sampled_from(sorted(BASES))), drawn


@given(changes())
@example(("bert", [("config.json", "hidden_act", "relu"), ("1_Pooling/config.json", "pooling_mode", "cls")]))
@example(("qwen3", [("config.json", "rope_scaling", {"rope_type": "linear", "factor": 2.0})]))
@example(("xlm-roberta", [("config.json", "layer_norm_eps", 0.5)]))
@example(("qwen3", [("config.json", "is_causal", None)]))
@example(("bert", [("config.json", "hidden_dropout_prob", None)]))
@example(("bert", [("config_sentence_transformers.json", "default_prompt_name", ["query"])]))
@example(("nomic_bert", [("config.json", "rope_parameters", None), ("config.json", "rotary_emb_base", 7)]))
@example(
    (
        "bert",
        [
            ("config_sentence_transformers.json", "prompts", {"mean": "query: "}),
            ("config_sentence_transformers.json", "default_prompt_name", "mean"),
            ("1_Pooling/config.json", "include_prompt", False),
        ],
    )
)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_any_key_is_honoured_or_refused(changed: tuple[str, list[tuple[str, str, Any]]]) -> None:
    check(*changed)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@given(changes())
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
def test_many_keys_are_honoured_or_refused(changed: tuple[str, list[tuple[str, str, Any]]]) -> None:
    check(*changed)


def check(base: str, changed: list[tuple[str, str, Any]]) -> None:
    """The changed folder is refused with a sentence, or its vectors are those of the reference."""

    def change(folder: Path) -> None:
        for name, key, value in changed:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            existing = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            file.write_text(json.dumps({**existing, key: value}), "utf-8")

    root = Path(tempfile.mkdtemp())
    try:
        variant = Variant("changed", BASES[base], change, texts=TEXTS)
        try:
            load_tokenizer(load_model(variant.write(root / "first"))[0])
        except StartupError as error:
            assert error.message.startswith("EMBED_MODEL=changed: ")  # noqa: PT017  # a sentence about this model
            return
        asyncio.run(_compare(variant, root / "second"))
    finally:
        shutil.rmtree(root)


async def _compare(variant: Variant, root: Path) -> None:
    async with served([variant], root) as server:
        measured = await server.vectors(variant)
        try:
            expected = reference_vectors(server.folders[variant.name], variant.texts)
        except Exception:  # the reference takes no such checkpoint: there is nothing to compare
            return
        np.testing.assert_allclose(measured, expected, atol=TOLERANCE, rtol=0)
