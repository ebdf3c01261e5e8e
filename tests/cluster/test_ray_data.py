"""A corpus through Ray Data, with real workers and a real model that is tiny; killed half-way, and gone on with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from tests.cluster.test_corpus import jsonl
from tests.servers import free_port, running, vecmill_command
from tests.tiny_checkpoints import tiny_bert
from tests.tools.embed.command_line import embedded

ray = pytest.importorskip("ray", reason="needs the extra `ray-data`; `make test-ray` installs it")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(590)]

ROWS = 2000
WITHIN_S = 400.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)


@contextmanager
def started(
    source: Path | str, output: Path | str, checkpoint: Path, *options: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, in a session of its own, of which nothing is left when the block has ended."""
    settings = [f"embed_model={checkpoint}", "dtype=float32", "device=cpu", "max_batch_tokens=512"]
    pairs = [part for pair in settings for part in ("--set", pair)]
    command = [sys.executable, "-m", "vecmill.cluster.data", str(source), "-o", str(output), *pairs, *options]
    # Ray starts its workers at the lowest priority, where a busy machine leaves them hardly any time.
    env = {**os.environ, "RAY_worker_niceness": "0", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        family = Family(process.pid)
        try:
            yield process
        finally:
            family.look()
            process.kill()
            family.end()


class Family:
    """A process and all that it has started, which Ray puts into sessions of their own."""

    def __init__(self, pid: int) -> None:
        self._head = psutil.Process(pid)
        self._known: set[psutil.Process] = set()

    def look(self) -> set[psutil.Process]:
        """All that are seen so far."""
        with suppress(psutil.NoSuchProcess):
            self._known.update(self._head.children(recursive=True))
        return self._known

    def end(self) -> None:
        """Kill what is left of them."""
        for process in self._known:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def rows_of(output: Path) -> dict[int, np.ndarray[Any, Any]]:
    """The vectors by id; each id is there once."""
    table = pq.read_table(output)
    ids = table.column("id").to_pylist()
    assert len(ids) == len(set(ids))
    return dict(zip(ids, np.array(table.column("embedding").to_pylist(), np.float32), strict=True))


def test_a_run_that_is_killed_twice_ends_with_what_vecmill_embed_writes(tmp_path: Path, checkpoint: Path) -> None:
    """A worker is killed, then everything; the same command then does the rest."""
    texts = [
        {"id": number, "text": f"text number {number} of {ROWS}: {'word ' * (number % 40)}"} for number in range(ROWS)
    ]
    source, output = jsonl(tmp_path / "texts.jsonl", texts), tmp_path / "out"
    options = ("--workers", "2", "--num-cpus", "0.5", "--shard-rows", "50")

    with started(source, output, checkpoint, *options) as process:
        family = Family(process.pid)
        until(lambda: bool(parts(output)))
        worker = next(each for each in family.look() if "MapWorker" in " ".join(each.cmdline()))
        worker.kill()
        seen = len(parts(output))
        until(lambda: len(parts(output)) > seen + 3)
        os.kill(process.pid, signal.SIGKILL)
        family.end()
    kept = {path: path.stat().st_mtime_ns for path in parts(output)}
    assert 0 < len(kept) < ROWS // 50

    with started(source, output, checkpoint, *options) as process:
        printed, _ = process.communicate(timeout=WITHIN_S)

    assert process.returncode == 0, printed
    assert "shards now" in printed
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    found = rows_of(output)
    assert sorted(found) == list(range(ROWS))
    assert orjson.loads((output / "_manifest.json").read_bytes())["complete"]["rows"] == ROWS
    assert sorted(path.name for path in output.iterdir()) == ["_manifest.json", *(path.name for path in parts(output))]

    port = free_port()
    flags = ("--embed-model", str(checkpoint), "--dtype", "float32", "--device", "cpu", "--max-batch-tokens", "512")
    with running(vecmill_command(port, *flags), port, "/ready", {"STATE_DIR": str(tmp_path / "state")}) as server:
        embedded(source, "-o", tmp_path / "expected.parquet", "--url", server.url)
    expected = rows_of(tmp_path / "expected.parquet")
    assert max(np.abs(found[number] - vector).max() for number, vector in expected.items()) < 1e-5
    assert pq.read_schema(parts(output)[0]).names == pq.read_schema(tmp_path / "expected.parquet").names


@contextmanager
def object_storage() -> Iterator[dict[str, str]]:
    """A server of S3's protocol; the environment in which its clients find it."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(port))
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "anybody",
                "AWS_SECRET_ACCESS_KEY": "anything",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            process.kill()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_corpus_in_object_storage(checkpoint: Path) -> None:
    """Read there and written there; a second call finds that all is done."""
    with object_storage() as environment:
        storage = fs.S3FileSystem(
            endpoint_override=environment["AWS_ENDPOINT_URL"].removeprefix("http://"),
            scheme="http",
            access_key="anybody",
            secret_key="anything",
            allow_bucket_creation=True,
        )
        storage.create_dir("bucket/corpus")
        for number in range(2):
            ids = list(range(60 * number, 60 * number + 60))
            table = pa.table({"id": ids, "text": [f"text number {each}" for each in ids]})
            pq.write_table(table, f"bucket/corpus/{number}.parquet", filesystem=storage)
        options = ("--workers", "1", "--num-cpus", "0.5", "--shard-rows", "50")
        said = []
        for _ in range(2):
            with started("s3://bucket/corpus", "s3://bucket/vectors", checkpoint, *options, **environment) as process:
                printed, _ = process.communicate(timeout=WITHIN_S)
            assert process.returncode == 0, printed
            said.append(printed)
        assert "120 vectors" in said[0]
        found = pq.read_table("bucket/vectors", filesystem=storage)
        assert sorted(found.column("id").to_pylist()) == list(range(120))
        names = {info.base_name for info in storage.get_file_info(fs.FileSelector("bucket/vectors"))}
        assert "_manifest.json" in names
        assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations, and what it leaves open when it ends
def test_the_class_adds_vectors_to_a_dataset(checkpoint: Path) -> None:
    from vecmill.cluster.data import LOCAL_STORE_BYTES, TextEmbedder

    ray.init(num_cpus=1, object_store_memory=LOCAL_STORE_BYTES, include_dashboard=False, logging_level="warning")
    try:
        dataset = ray.data.from_items([{"text": f"text {number}"} for number in range(40)])
        settings = {"embed_model": str(checkpoint), "device": "cpu", "max_batch_tokens": 128}
        arguments = {"fields": {"dimensions": 32}, "settings": settings}
        rows = dataset.map_batches(
            TextEmbedder, fn_constructor_kwargs=arguments, concurrency=1, num_cpus=1, batch_size=16
        ).take_all()
    finally:
        ray.shutdown()

    assert sorted(row["text"] for row in rows) == sorted(f"text {number}" for number in range(40))
    assert {len(row["embedding"]) for row in rows} == {32}


def test_a_model_that_is_not_there_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "texts.jsonl", [{"text": "one"}])

    with started(source, tmp_path / "out", tmp_path / "nowhere") as process:
        printed, _ = process.communicate(timeout=WITHIN_S)

    assert process.returncode == 1
    assert "nowhere" in printed.strip().splitlines()[-1]
