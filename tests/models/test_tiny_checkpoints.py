"""The tiny checkpoints load whole in the reference libraries, and their numbers tell texts apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.oracle import cross_encoder_scores, nomic_encode, st_encode
from tests.tiny_checkpoints import edit_json, tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta

TEXTS = ["one", "def add(first, second):\n    return first + second", "", "a longer text " * 60, "naïve 你好  <s> дела"]
DOCUMENTS = ["one", "Plants create oxygen.", "", "a longer text " * 60, "你好"]


def assert_units_that_differ(vectors: NDArray[np.float32]) -> None:
    assert vectors.dtype == np.float32
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    assert cosines[~np.eye(len(cosines), dtype=bool)].max() < 0.98


def assert_loads_whole(model_class: Any, folder: Path) -> None:
    _, loading_info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in loading_info.items() if names}


def assert_same_files(first: Path, second: Path) -> None:
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()]
    assert not [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()]


def test_bert(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    assert_units_that_differ(st_encode(folder, TEXTS))


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_xlm_roberta(tmp_path: Path, pooling: str) -> None:
    from transformers import AutoModel

    folder = tiny_xlm_roberta(tmp_path / "tiny", pooling=pooling)
    assert_units_that_differ(st_encode(folder, TEXTS))
    assert_loads_whole(AutoModel, folder)
    assert_same_files(folder, tiny_xlm_roberta(tmp_path / "again", pooling=pooling))


def test_xlm_robertas_tokenizer_gives_the_same_ids_everywhere(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_xlm_roberta(tmp_path / "tiny")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert auto(text)["input_ids"] == raw.encode(text).ids
        pair = raw.encode(text, "a document")
        assert auto(text, "a document")["input_ids"] == pair.ids
        assert set(pair.type_ids) == {0}
    first, second = (raw.encode(text, add_special_tokens=False).ids for text in ("the dog", "你好"))
    assert raw.encode("the dog").ids == [0, *first, 2]
    assert raw.encode("the dog", "你好").ids == [0, *first, 2, 2, *second, 2]
    assert [raw.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert raw.token_to_id("<mask>") == raw.get_vocab_size() - 1
    assert len(first) < len("the dog")
    assert 3 in raw.encode("ő").ids


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_cross_encoders(tmp_path: Path, minilm_folder: Path, kind: Literal["bert", "xlm-roberta"]) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_cross_encoder(tmp_path / "tiny", kind=kind, tokenizer_from=minilm_folder)
    assert_loads_whole(AutoModelForSequenceClassification, folder)
    scores = cross_encoder_scores(folder, "What do plants create?", DOCUMENTS)
    assert scores.dtype == np.float32
    assert scores.shape == (len(DOCUMENTS),)
    assert np.diff(np.sort(scores)).min() > 0.01
    assert np.ptp(scores) > 0.5
    assert cross_encoder_scores(folder, "another query", DOCUMENTS) != pytest.approx(scores, abs=0.01)
    shorter = cross_encoder_scores(folder, "What do plants create?", DOCUMENTS, max_length=64)
    np.testing.assert_allclose(shorter[:3], scores[:3], atol=1e-5)
    assert abs(shorter[3] - scores[3]) > 0.01
    assert_same_files(folder, tiny_cross_encoder(tmp_path / "again", kind=kind, tokenizer_from=minilm_folder))


def test_a_bert_cross_encoder_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_from"):
        tiny_cross_encoder(tmp_path, kind="bert")


def test_nomic(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_nomic(tmp_path / "tiny", minilm_folder, prompts={"query": "search_query: "})
    plain = nomic_encode(folder, TEXTS)
    assert_units_that_differ(plain)
    prompted = nomic_encode(folder, TEXTS, prompt="search_query: ")
    np.testing.assert_array_equal(prompted, nomic_encode(folder, [f"search_query: {text}" for text in TEXTS]))
    assert (prompted * plain).sum(axis=1).max() < 0.999
    sliced = nomic_encode(folder, TEXTS, dimensions=8, layer_norm=True)
    assert sliced.shape == (len(TEXTS), 8)
    assert_units_that_differ(sliced)
    assert np.abs(sliced - nomic_encode(folder, TEXTS, dimensions=8)).max() > 1e-3
    assert_same_files(folder, tiny_nomic(tmp_path / "again", minilm_folder, prompts={"query": "search_query: "}))


def test_nomics_rotary_base_reaches_the_oracle(tmp_path: Path, minilm_folder: Path) -> None:
    folder = tiny_nomic(tmp_path / "tiny", minilm_folder)
    other = tiny_nomic(tmp_path / "other", minilm_folder)
    edit_json(other / "config.json", rotary_emb_base=10_000)
    text = ["a longer text of several different words"]
    assert np.abs(nomic_encode(folder, text) - nomic_encode(other, text)).max() > 1e-3


def test_seeds_differ(tmp_path: Path, minilm_folder: Path) -> None:
    folders = [tiny_nomic(tmp_path / str(seed), minilm_folder, seed=seed) for seed in (0, 1)]
    vectors = torch.from_numpy(np.concatenate([nomic_encode(folder, ["one"]) for folder in folders]))
    assert torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0) < 0.98
