"""`vecmill verify` as a person sees it, and the examples that it runs."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import edit_json, tiny_cross_encoder
from vecmill.core.types import Task
from vecmill.models.card_examples import ComponentCheck, Example, ScoreCheck, VectorCheck, examples, find_example
from vecmill.models.families import FAMILIES
from vecmill.tools import verify
from vecmill.tools.verify import run_verify

Captured = pytest.CaptureFixture[str]

GOLDEN = Path(__file__).parents[1] / "golden"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NOT_PUBLISHED = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct",
    "BAAI/bge-reranker-v2-gemma",
    "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
    "Querit/Querit-4B",
    "Snowflake/snowflake-arctic-embed-m-v1.5",
    "antoinelouis/crossencoder-camembert-base-mmarcoFR",
    "cross-encoder/ettin-reranker-150m-v1",
    "cross-encoder/ettin-reranker-17m-v1",
    "cross-encoder/ettin-reranker-1b-v1",
    "cross-encoder/ettin-reranker-400m-v1",
    "google/embeddinggemma-2",
    "ibm-granite/granite-embedding-125m-english",
    "intfloat/e5-mistral-7b-instruct",
    "jinaai/jina-embeddings-v3",
    "keeeeenw/MicroLlama-text-embedding",
    "mixedbread-ai/mxbai-rerank-base-v2",
    "mixedbread-ai/mxbai-rerank-large-v2",
    "nvidia/Nemotron-3-Embed-8B-BF16",
    "nvidia/Nemotron-3.5-Embed-1B-BF16",
    "nvidia/Nemotron-3.5-Rerank-8B-BF16",
    "nvidia/llama-nemotron-embed-1b-v2",
    "nvidia/llama-nemotron-rerank-1b-v2",
    "sentence-transformers/all-distilroberta-v1",
    "sentence-transformers/multi-qa-distilbert-cos-v1",
    "sentence-transformers/paraphrase-albert-small-v2",
}
"""Listed models of which neither a card nor another project's tests have numbers."""
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture
def disturbed(minilm_folder: Path, tmp_path: Path) -> Path:
    """The bundled model under its own name, with one matrix of one layer a little off."""
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(minilm_folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.2.output.dense.weight"))
    weights[name] = weights[name] * 1.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.nightly)])
def test_the_bundled_weights_give_the_expected_numbers(dtype: str, capsys: Captured) -> None:
    assert run_verify("auto", dtype=dtype, device="cpu") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"model     {MINILM} (embedding model)"
    assert lines[1].startswith("revision  sha256:")
    assert lines[2] == f"dtype     {dtype}: DTYPE={dtype}"
    assert lines[3].startswith("device    cpu (")
    assert out.count(" ok\n") == 8
    assert "OFF" not in out
    assert "…" not in next(line for line in lines if line.startswith("what"))
    assert lines[-1] == f"ok: all 8 numbers of {MINILM} are within the tolerance of {dtype}."


@pytest.mark.parametrize("name", [MINILM, pytest.param("all-MiniLM-L6-v2", marks=pytest.mark.nightly)])
def test_the_bundled_models_id_is_verified_without_network(name: str, capsys: Captured) -> None:
    assert run_verify(name, dtype="float32", device="cpu") == 0
    assert capsys.readouterr().out.startswith(f"model     {MINILM} (embedding model)")


def test_a_disturbed_weight_is_off(disturbed: Path, capsys: Captured) -> None:
    assert run_verify(str(disturbed), dtype="float32", device="cpu") == 1
    out = capsys.readouterr().out
    assert f"example   {MINILM}" in out
    assert " OFF\n" in out
    assert out.splitlines()[-1].startswith("OFF: ")
    assert "--dtype float32" not in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("folder", "rerank", "name", "count"),
    [("embedding", False, "Qwen3-Embedding-0.6B", 10), ("reranker", True, "Qwen3-Reranker-0.6B", 2)],
)
def test_another_model_is_off(folder: str, rerank: bool, name: str, count: int, capsys: Captured) -> None:
    model = str(GOLDEN / "qwen3" / folder)
    assert run_verify(model, rerank=rerank, example=name, dtype="bfloat16", device="cpu") == 1
    out = capsys.readouterr().out
    assert f"model     {folder} ({'reranker' if rerank else 'embedding model'})" in out
    assert out.count(" OFF\n") == count
    last = out.splitlines()[-1]
    assert last.startswith(f"OFF: {count} of {count} numbers of Qwen/{name} are off by more than the tolerance")
    assert "or with `--dtype float32` whether it is rounding" in last


def test_the_example_says_the_task(capsys: Captured) -> None:
    model = str(GOLDEN / "qwen3" / "reranker")
    assert run_verify(model, example="Qwen/Qwen3-Reranker-8B", dtype="float32", device="cpu") == 1
    assert "(reranker)" in capsys.readouterr().out


def test_a_folder_is_known_by_where_its_files_were_made(disturbed: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = disturbed.rename(tmp_path / "mine")
    edit_json(folder / "config.json", _name_or_path=MINILM.upper())
    assert run_verify(str(folder), dtype="float32", device="cpu") == 1
    assert f"example   {MINILM}" in capsys.readouterr().out


def test_settings_that_change_the_numbers_do_not_count(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("QUERY_INSTRUCTION", "Find a recipe")
    monkeypatch.setenv("MODEL_ALIASES", "alias=served-elsewhere")
    monkeypatch.setenv("MAX_MODEL_LEN", "2048")
    monkeypatch.setenv("RERANK_MODEL", "owner/reranker")
    assert run_verify("auto", dtype="float32", device="cpu") == 0
    assert capsys.readouterr().err == ""


def no_example(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": "owner/unknown"}, "no numbers are known that were published. Run `pip install sentence-tr"


def unknown_folder(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": str(folder)}, "For a folder with another name, `vecmill verify FOLDER --example NAME` picks"


def unknown_example(folder: Path) -> tuple[dict[str, object], str]:
    sentence = "--example nothing: no example of that name. There are: nvidia/NV-Embed-v2, "
    return {"model": "auto", "example": "nothing"}, sentence


def not_a_reranker(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": MINILM, "rerank": True}, f"{MINILM} is an embedding model: leave --rerank out"


def auto_reranker(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": "auto", "rerank": True, "device": "cpu"}, "RERANK_MODEL=auto is a reranker on a CUDA GPU only"


def not_a_model(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": str(folder), "example": MINILM}, "has no config.json, so it is not a model folder."


def bad_dtype(folder: Path) -> tuple[dict[str, object], str]:
    return {"model": "auto", "dtype": "int3"}, "DTYPE"


def bad_config(folder: Path) -> tuple[dict[str, object], str]:
    (folder / "config.json").write_text("{")
    return {"model": str(folder)}, "config.json is not valid JSON"


@pytest.mark.parametrize(
    "case",
    [
        no_example,
        unknown_folder,
        unknown_example,
        not_a_reranker,
        auto_reranker,
        not_a_model,
        bad_dtype,
        bad_config,
    ],
)
def test_what_cannot_be_run_is_said_and_exits_2(
    case: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
    assert callable(case)
    flags, sentence = case(tmp_path)
    assert run_verify(**flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("vecmill: ")


def test_without_published_numbers_the_library_computes_some(
    minilm_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "mine").symlink_to(minilm_folder)
    assert run_verify(str(tmp_path / "mine"), dtype="float32", device="cpu") == 0
    out, err = capsys.readouterr()
    assert "no numbers are known that were published of mine: sentence-transformers computes some." in err
    assert "computed now from the same files in float32" in out
    assert out.splitlines()[-1] == "ok: all 9 numbers of mine are within the tolerance of float32."


def test_a_reranker_without_published_numbers_too(tmp_path: Path, capsys: Captured) -> None:
    folder = tiny_cross_encoder(tmp_path / "mine", kind="xlm-roberta")
    assert run_verify(str(folder), rerank=True, dtype="float32", device="cpu") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: all 4 numbers of mine are within")


@pytest.mark.parametrize("task", Task)
def test_the_library_is_not_asked_to_guess(task: Task, tmp_path: Path, capsys: Captured) -> None:
    folder = GOLDEN / "qwen3" / ("reranker_untied" if task is Task.RERANK else "embedding")
    shutil.copytree(folder, tmp_path / "mine", ignore=shutil.ignore_patterns("modules.json"))
    edit_json(tmp_path / "mine" / "config.json", _name_or_path="")
    assert run_verify(str(tmp_path / "mine"), rerank=task is Task.RERANK, dtype="float32", device="cpu") == 2
    assert "no numbers of it are published, and its files do not tell sentence-transformers" in capsys.readouterr().err


def test_on_a_terminal_loading_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(verify, "messages", Console(file=terminal, force_terminal=True, width=100, color_system=None))
    assert run_verify("auto", dtype="float32", device="cpu") == 0
    assert "%" in terminal.getvalue()


def test_a_stop_is_no_failure_of_the_numbers(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def stop(names: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "find_example", stop)
    assert run_verify(MINILM) == 130
    assert capsys.readouterr().err == "vecmill: stopped.\n"


def test_listed_models_have_numbers_where_any_are_published() -> None:
    listed = {model.id for family in FAMILIES.values() for model in family.examples}
    assert {model for model in listed if find_example([model]) is None} == NOT_PUBLISHED


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.model)
def test_examples_are_well_formed(example: Example) -> None:
    assert find_example([example.model.lower()]) is example
    assert (example.task is Task.RERANK) == bool(re.search("rerank|^cross-encoder/", example.model.lower()))
    for check in example.checks:
        tolerances = [getattr(check.tolerance, dtype) for dtype in DTYPES]
        assert 0 < tolerances[0] <= tolerances[1] <= tolerances[2]
        assert check.source
        if isinstance(check, VectorCheck):
            assert example.task is Task.EMBED
            assert np.linalg.norm(np.array(check.vectors), axis=1) == pytest.approx(1, abs=1e-3)
        elif isinstance(check, ComponentCheck):
            assert example.task is Task.EMBED
            assert 0.03 < np.linalg.norm(np.array(check.components), axis=1).min() < 1
            assert tolerances[2] < np.abs(np.array(check.components)).max() / 5
        else:
            assert all(math.isfinite(number) for row in check.expected for number in row)
            assert all(text == text.strip() for text in (*check.queries, *check.documents))
            assert example.task is Task.EMBED or not check.prompted


@pytest.mark.parametrize(
    "change", [{"documents": ["one more", "than", "expected"]}, {"vectors": [[1.0]]}, {"tolerance": {"float32": 0}}]
)
def test_a_malformed_example_is_refused(change: dict[str, object]) -> None:
    kind = "vectors" if "vectors" in change else "scores"
    good = next(check for example in examples() for check in example.checks if check.kind == kind)
    with pytest.raises(ValidationError):
        type(good).model_validate(good.model_dump() | change)


def test_stored_vectors_are_those_of_the_snapshots() -> None:
    stored = json.loads((GOLDEN / "real" / "tei_snapshots.json").read_text("utf-8"))
    compared = 0
    for example in examples():
        for check in example.checks:
            if not isinstance(check, VectorCheck):
                continue
            assert list(check.texts) == stored["inputs"]["batch"][:2]
            assert stored["source"].split()[-1] in check.source
            raw = np.array(stored["models"][example.model]["batch"][:2])
            unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
            assert np.array(check.vectors) == pytest.approx(unit, abs=5.1e-5)
            compared += 1
    assert compared == 3


def test_texts_and_scores_are_those_of_the_facts() -> None:
    """Against the token ids' file, whose texts give the published ids."""
    stored = json.loads((GOLDEN / "real" / "token_ids.json").read_text("utf-8"))
    nvidia, qwen = stored["nvidia/NV-Embed-v2"], stored["Qwen/Qwen3-Embedding"]
    pinned = [("nvidia/NV-Embed-v2", nvidia["queries"], nvidia["passages"], nvidia["expected_scores_x100"])] + [
        (f"Qwen/Qwen3-Embedding-{size}", qwen["queries"], qwen["documents"], scores)
        for size, scores in qwen["expected_scores"].items()
    ]
    pair = stored["Qwen/Qwen3-Reranker"]["expected_0.6B_bf16_logit_diff_card"]
    texts = [{"text": text} for text in pair["documents"]]
    pinned.append(("Qwen/Qwen3-Reranker-0.6B", [{"text": pair["query"]}], texts, [pair["logit_diff"]]))
    for model, queries, documents, scores in pinned:
        example = find_example([model])
        assert example is not None
        check = example.checks[0]
        assert isinstance(check, ScoreCheck)
        assert list(check.queries) == [query["text"] for query in queries]
        assert list(check.documents) == [document["text"] for document in documents]
        assert np.array(check.expected) == pytest.approx(np.array(scores), abs=5.1e-5)
