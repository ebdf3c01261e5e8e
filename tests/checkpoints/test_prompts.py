"""Prompts of every kind that sentence-transformers reads: which goes before what, and which tokens are pooled."""

from __future__ import annotations

import asyncio
import io
import shutil
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.checkpoints.variants import TEXTS, TOLERANCE, Served, Variant, refusal, served
from tests.conftest import serving
from tests.models.loaded import GOLDEN
from tests.oracle import st_encode
from tests.tiny_checkpoints import edit_json, tiny_bert, tiny_nomic, tiny_xlm_roberta, write
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.models.source import find
from vecmill.serve.start_log import start_table

Change = Callable[[Path], Any]

PROMPTS = {"query": "search_query: ", "document": "search_document: ", "code": "Find code: "}
LONG = "Read all of this first. " * 40  # longer than the models take
LIBRARY = "config_sentence_transformers.json"


def bert(pooling: str = "mean_tokens") -> Change:
    return lambda folder: tiny_bert(folder, find("auto").folder, pooling=pooling)


def xlm_roberta(pooling: str = "mean_tokens") -> Change:
    return lambda folder: tiny_xlm_roberta(folder, pooling=pooling)


def qwen3(pooling: str = "lasttoken") -> Change:
    def write_folder(folder: Path) -> None:
        shutil.copytree(GOLDEN / "qwen3" / "embedding", folder, dirs_exist_ok=True)
        write(folder / LIBRARY, {})
        write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True})

    return write_folder


def unchanged(folder: Path) -> None:
    """Without prompts."""


def says(**keys: object) -> Change:
    return lambda folder: write(folder / LIBRARY, keys)


def default(name: str, **prompts: str) -> Change:
    return says(prompts={**PROMPTS, **prompts}, default_prompt_name=name)


def left_out(name: str = "code", include: object = False, **prompts: str) -> Change:
    """The default prompt is not pooled."""

    def change(folder: Path) -> None:
        default(name, **prompts)(folder)
        edit_json(folder / "1_Pooling" / "config.json", include_prompt=include)

    return change


def made_from(name: str, **keys: object) -> Change:
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", _name_or_path=name)
        write(folder / LIBRARY, keys)

    return change


def without_modules(folder: Path) -> None:
    default("code")(folder)
    (folder / "modules.json").unlink()


def chat(*, modules: bool = True, **message: object) -> Change:
    """With a chat template, which is used where texts are messages."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
        if not modules:
            (folder / "modules.json").unlink()
        if message:
            write(folder / "sentence_bert_config.json", {"modality_config": message})

    return change


def texts_for(name: str) -> tuple[str, ...]:
    """The reference of a folder without a length fails with a long text."""
    return TEXTS[:-1] if name == "bert-without-modules" else TEXTS


VARIANTS = [
    Variant(name, base, change, texts=texts_for(name))
    for name, base, change in [
        ("bert-no-prompts", bert(), unchanged),
        ("bert-no-library-config", bert(), lambda folder: (folder / LIBRARY).unlink()),
        ("bert-prompts", bert(), says(prompts=PROMPTS)),
        ("bert-empty-prompts", bert(), says(prompts={}, default_prompt_name=None)),
        ("bert-default-query", bert(), default("query")),
        ("bert-default-document", bert(), default("document")),
        ("bert-default-of-its-own", bert(), default("code")),
        ("bert-default-empty", bert(), default("none", none="")),
        ("bert-default-without-prompts", bert(), says(default_prompt_name="query")),
        ("bert-default-alone", bert(), says(prompts={"x": "x: "}, default_prompt_name="x")),
        ("bert-a-null-prompt", bert(), says(prompts={"query": None, "document": "d: "}, default_prompt_name="query")),
        ("bert-without-modules", bert(), without_modules),
        ("bert-made-from-bge", bert(), made_from("BAAI/bge-small-en-v1.5", prompts={"query": "", "document": ""})),
        ("bert-made-from-e5", bert(), made_from("intfloat/e5-base-v2")),
        ("bert-left-out", bert(), left_out()),
        ("bert-left-out-by-null", bert(), left_out(include=None)),
        ("bert-left-out-cls", bert("cls_token"), left_out()),
        ("bert-left-out-last", bert("lasttoken"), left_out()),
        ("bert-prompt-of-the-query-alone", bert(), says(prompts={"query": "q: "})),
        ("bert-prompt-of-the-document-alone", bert(), says(prompts={"document": "d: "})),
        ("bert-left-out-empty", bert(), left_out("none", none="")),
        ("bert-left-out-long", bert(), left_out("long", long=LONG)),
        ("bert-left-out-long-cls", bert("cls_token"), left_out("long", long=LONG)),
        ("bert-left-out-ends-special", bert(), left_out("end", end="Find [SEP]")),
        ("bert-left-out-ends-within-a-word", bert(), left_out("word", word="Find anti")),
        ("bert-not-left-out", bert(), left_out(include=True)),
        ("xlm-roberta-default", xlm_roberta(), default("code")),
        ("xlm-roberta-left-out", xlm_roberta(), left_out()),
        ("xlm-roberta-left-out-cls", xlm_roberta("cls_token"), left_out()),
        ("xlm-roberta-left-out-last", xlm_roberta("lasttoken"), left_out()),
        ("qwen3-no-prompts", qwen3(), unchanged),
        ("qwen3-unused-template", qwen3(), chat()),
        ("qwen3-default", qwen3(), default("query")),
        ("qwen3-made-from", qwen3(), made_from("Qwen/Qwen3-Embedding-0.6B")),
        ("qwen3-left-out", qwen3(), left_out()),
        ("qwen3-left-out-mean", qwen3("mean_tokens"), left_out()),
        ("qwen3-left-out-cls", qwen3("cls_token"), left_out()),
    ]
]
REFUSED = [
    Variant(name, qwen3() if name.startswith("rendered") else bert(), change, refused)
    for name, change, refused in [
        ("no-such-default", default("codes"), "'codes', which is none of its prompts (code, document, query)"),
        ("default-without-prompts", says(default_prompt_name="code"), "which is none of its prompts (there are none)"),
        ("a-list-for-a-default", says(prompts=PROMPTS, default_prompt_name=["code"]), "which is none of its prompts"),
        ("an-empty-default", default(""), "`default_prompt_name` in config_sentence_transformers.json is ''"),
        (
            "prompts-in-a-list",
            says(prompts=["query: "]),
            "`prompts` in config_sentence_transformers.json must be an obj",
        ),
        ("a-number-for-a-prompt", says(prompts={"query": 7}), "must be an object of texts"),
        ("rendered-without-modules", chat(modules=False), "would put every text into a message"),
        ("rendered-messages", chat(message={"method": "forward"}), "`modality_config`"),
        ("sparse", says(model_type="SparseEncoder"), '`model_type`: "SparseEncoder"; supported: "SentenceTransf'),
        ("cross-encoder", says(model_type="CrossEncoder"), "this is a reranker; name it in RERANK_MODEL"),
    ]
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("variants")) as server:
        yield server


def reference(folder: Path, variant: Variant) -> dict[str, NDArray[np.float32]]:
    """What `encode`, `encode_query` and `encode_document` give."""
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
        ways: dict[str, Any] = {"": model.encode, "query": model.encode_query, "document": model.encode_document}
        return {
            role: encode(list(variant.texts), normalize_embeddings=True, show_progress_bar=False)
            for role, encode in ways.items()
        }


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    expected = await asyncio.to_thread(reference, server.folders[variant.name], variant)
    for role, vectors in expected.items():
        fields = {"input_type": role} if role else {}
        np.testing.assert_allclose(
            await server.vectors(variant, **fields), vectors, atol=TOLERANCE, rtol=0, err_msg=role
        )


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    assert variant.refused is not None
    assert variant.refused in refusal(variant.write(tmp_path))


DEFAULT = next(variant for variant in VARIANTS if variant.name == "bert-default-of-its-own")


@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        ("/embed", {"inputs": "a text"}, "Find code: "),
        ("/embed", {"inputs": "a text", "is_query": None}, "Find code: "),
        ("/embed", {"inputs": "a text", "is_query": False}, "search_document: "),
        ("/embed", {"inputs": "a text", "instruction": ""}, ""),
        ("/embed", {"inputs": "a text", "prompt_name": "query"}, "search_query: "),
        ("/embed", {"inputs": "a text", "input_type": "classification"}, ""),
        ("/embed", {"inputs": "Find code: a text"}, "Find code: "),
        ("/v1/embeddings", {"input": "a text"}, "Find code: "),
        ("/api/embed", {"input": "a text"}, "Find code: "),
        ("/embeddings", {"input": "a text"}, "Find code: "),
    ],
)
async def test_the_default_prompt_goes_before_what_says_nothing(
    server: Served, path: str, body: dict[str, Any], prompt: str
) -> None:
    answer = await server.client.post(path, json={"model": DEFAULT.name, **body})
    assert answer.is_success, answer.text
    parsed = answer.json()
    vector = (
        parsed[0]
        if path == "/embed"
        else parsed["embeddings"][0]
        if path == "/api/embed"
        else parsed["data"][0]["embedding"]
    )
    expected = await asyncio.to_thread(st_encode, server.folders[DEFAULT.name], ["a text"], prompt)
    np.testing.assert_allclose(vector, expected[0], atol=1e-5)


async def test_the_default_prompts_tokens_are_shown_and_token_ids_have_none(server: Served) -> None:
    body = {"model": DEFAULT.name, "inputs": "a text"}
    shown = (await server.client.post("/tokenize", json=body)).json()[0]
    assert [token["text"] for token in shown] == ["[CLS]", "Find", "code", ":", "a", "text", "[SEP]"]
    ids = [token["id"] for token in shown]
    by_text, by_ids = [
        (await server.client.post("/embed", json={"model": DEFAULT.name, "inputs": inputs})).json()[0]
        for inputs in ("a text", [ids])
    ]
    np.testing.assert_allclose(by_ids, by_text, atol=1e-6)


async def test_a_models_prompts_are_listed_with_their_source(server: Served) -> None:
    listed = {model["id"]: model for model in (await server.client.get("/v1/models")).json()["data"]}
    shown = {key: listed[DEFAULT.name][key] for key in ("prompts", "prompts_from", "default_prompt_name")}
    assert shown == {"prompts": PROMPTS, "prompts_from": "files", "default_prompt_name": "code"}
    none = listed["bert-made-from-e5"]
    assert (none["prompts"], none["prompts_from"], none["default_prompt_name"]) == (
        {"query": "", "document": ""},
        None,
        None,
    )


COMMIT = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
BGE = "Represent this sentence for searching relevant passages: "
NAMED: list[tuple[str, dict[str, str] | None]] = [
    ("bge-small-en-v1.5", {"query": BGE}),
    ("models--BAAI--bge-base-en-v1.5/snapshots/" + COMMIT, {"query": BGE}),
    ("models--someone--bge-large-en-v1.5/snapshots/" + COMMIT, None),
    ("bge-small-en-v1.5-tuned", None),
    ("my-bge-small-en", None),
    ("E5-base-v2", {"query": "query: ", "document": "passage: "}),
    ("multilingual-e5-small", {"query": "query: ", "document": "passage: "}),
    ("nomic-embed-text-v1", {"query": "search_query: ", "document": "search_document: "}),
    ("nomic-tuned", None),
    ("Qwen3-Embedding-0.6B", {"document": ""}),
    ("models--Qwen--Qwen3-Embedding-8B/snapshots/" + COMMIT, {"document": ""}),
    ("models--other--Qwen3-Embedding-4B/snapshots/" + COMMIT, None),
    ("Qwen3-Embedding-tuned", None),
]


async def test_a_cards_prompts_are_for_the_model_of_that_name_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name, _ in NAMED]
    for folder in folders:
        folder.mkdir(parents=True)
        if "nomic" in folder.name:
            tiny_nomic(folder, find("auto").folder)
        elif "Qwen3" in str(folder.relative_to(tmp_path)):
            qwen3()(folder)
        else:
            bert()(folder)
    async with serving(embed_model=",".join(map(str, folders)), max_batch_tokens=64) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        await check_queries(client, [entry["id"] for entry in listed], folders)
    for model, (name, prompts) in zip(listed, NAMED, strict=True):
        assert model["prompts_from"] == ("card" if prompts else None), name
        assert model["default_prompt_name"] is None
        assert {key: model["prompts"].get(key) for key in prompts or {}} == (prompts or {}), name
    assert listed[9]["prompts"]["query"].startswith("Instruct: ")


async def check_queries(client: httpx.AsyncClient, ids: list[str], folders: list[Path]) -> None:
    """A query of a model that is not a card's is embedded as it is."""
    for index in (0, 3):
        response = await client.post("/embed", json={"model": ids[index], "inputs": "a text", "is_query": True})
        expected = await asyncio.to_thread(st_encode, folders[index], ["a text"], BGE if index == 0 else "")
        np.testing.assert_allclose(response.json()[0], expected[0], atol=1e-5)


async def test_the_start_log_says_which_prompts_there_are_and_from_where(tmp_path: Path) -> None:
    folders = [tmp_path / "tuned", tmp_path / "bge-small-en-v1.5", tmp_path / "reranker"]
    for folder in folders[:2]:
        folder.mkdir()
        bert()(folder)
    default("code")(folders[0])
    shutil.copytree(GOLDEN / "qwen3" / "reranker", folders[2])
    models = {"embed_model": f"{folders[0]},{folders[1]}", "rerank_model": str(folders[2])}
    app = create_app(load_settings({**models, "dtype": "float32", "device": "cpu", "max_batch_tokens": 64}))
    async with app.router.lifespan_context(app):
        await app.state.loading
        console = Console(file=(written := io.StringIO()), width=200)
        console.print(start_table(app.state.services, "http://localhost"))
    log = written.getvalue()
    assert "'search_query: ' (from the model's files)" in log
    assert "'Find code: ', code, for plain requests (from the model's files)" in log
    assert f"'{BGE}' (from the model's card)" in log
    assert "instruction" in log
    assert "relevant passages that answer the query' (from the model's files)" in log
