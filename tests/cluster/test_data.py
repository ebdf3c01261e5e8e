"""A worker without Ray: a server's parts without its socket, and the class for `map_batches`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

from tests.cluster.test_corpus import jsonl
from tests.conftest import serving
from tests.tiny_checkpoints import tiny_bert
from vecmill.cluster.corpus import CorpusOptions, take_up
from vecmill.cluster.data import ShardEmbedder, TextEmbedder, worker_settings
from vecmill.core.errors import StartupError
from vecmill.tools.console import CommandError

TEXTS = ["Berlin has 3.5 million inhabitants.", "def add(a, b): return a + b", "ünïcödé \u2028 text"] * 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_bert(folder, minilm_folder, prompts={"query": "query: "})


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> dict[str, object]:
    return {"embed_model": str(checkpoint), "dtype": "float32", "device": "cpu", "max_batch_tokens": 128}


@pytest.fixture(scope="module")
def embedder(settings: dict[str, object]) -> Iterator[TextEmbedder]:
    embedder = TextEmbedder("body", "vector", "why", {"prompt_name": "query"}, settings)
    yield embedder
    embedder.close()


async def test_a_batch_gets_what_the_server_answers_over_http(
    embedder: TextEmbedder, settings: dict[str, object]
) -> None:
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS)]

    batch = embedder({"body": np.array(texts, object), "other": np.arange(len(texts))})

    async with serving(**settings) as client:
        body = {"input": texts, "prompt_name": "query"}
        answer = (await client.post("/v1/embeddings", json=body)).raise_for_status().json()
    expected = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    assert batch.keys() == {"body", "other", "vector", "why"}
    assert batch["other"].tolist() == list(range(len(texts)))
    assert np.abs(batch["vector"] - expected).max() < 1e-5
    assert set(batch["why"]) == {""}


def test_a_text_that_is_refused_has_a_reason_in_place_of_its_vector(embedder: TextEmbedder) -> None:
    batch = embedder({"body": np.array(["one", "\ud800 no text", "two"], object)})

    assert np.isnan(batch["vector"]).all(axis=1).tolist() == [False, True, False]
    assert batch["why"][0] == batch["why"][2] == ""
    assert batch["why"][1]


def test_a_worker_writes_its_shards_and_says_what_became_of_them(tmp_path: Path, settings: dict[str, object]) -> None:
    rows = [{"id": number, "text": f"text {number}"} for number in range(5)]
    options = CorpusOptions((str(jsonl(tmp_path / "a.jsonl", rows)),), shard_rows=3)
    output = str(tmp_path / "out")
    take_up(output, options)

    worker = ShardEmbedder(output, settings)
    done = [worker({"shard": number}) for number in range(2)]
    worker.close()
    broken = ShardEmbedder(output, {"embed_model": str(tmp_path / "nowhere")})

    assert [each["problem"] for each in done] == ["", ""]
    assert [orjson.loads(each["done"])["rows"] for each in done] == [3, 2]
    table = pq.read_table(output)
    assert table.column("id").to_pylist() == list(range(5))
    assert table.column("embedding").null_count == 0
    assert "nowhere" in broken({"shard": 0})["problem"]


def test_fields_that_the_models_do_not_know_end_it_at_once(settings: dict[str, object]) -> None:
    with pytest.raises(CommandError, match="nonsense"):
        TextEmbedder(fields={"prompt_name": "nonsense"}, settings=settings)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"embed_modle": "x"}, "embed_modle"), ({"max_batch_tokens": "many"}, "MAX_BATCH_TOKENS")],
)
def test_a_workers_settings_are_checked(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        worker_settings(given, "/nowhere")


def test_workers_of_one_machine_have_folders_of_their_own_and_share_a_cache_only_by_redis(tmp_path: Path) -> None:
    alone = worker_settings({}, str(tmp_path))
    shared = worker_settings({"redis_url": "redis://localhost"}, str(tmp_path))

    assert alone.state.state_dir == shared.state.state_dir == tmp_path
    assert alone.cache.cache_max_bytes == 0
    assert worker_settings({"cache_max_bytes": 5_000_000}, str(tmp_path)).cache.cache_max_bytes == 5_000_000
