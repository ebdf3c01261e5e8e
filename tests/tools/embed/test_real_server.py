"""Against `vecmill serve`: the results, and what comes between."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.servers import RunningServer, free_port, running, vecmill_command
from tests.tiny_checkpoints import tiny_bert
from tests.tools.embed.command_line import embed, embedded, write_jsonl

TEXTS = ["Berlin has 3.5 million inhabitants.", "def add(a, b): return a + b", "ünïcödé \u2028 text"]
CLOSE = 0.9999  # cosine: in bfloat16 a vector depends a little on its batch
MANY = 4000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)


@contextmanager
def tiny_server(checkpoint: Path, state: Path, port: int) -> Iterator[RunningServer]:
    command = vecmill_command(port, "--embed-model", str(checkpoint), "--dtype", "float32", "--device", "cpu")
    with running(command, port, "/ready", {"STATE_DIR": str(state), "TORCH_COMPILE": "false"}) as server:
        yield server


def asked_directly(url: str, texts: Sequence[str], **fields: object) -> np.ndarray[Any, Any]:
    """What POST /v1/embeddings gives."""
    body = {"input": list(texts), "encoding_format": "base64", **fields}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).raise_for_status().json()
    return np.stack([np.frombuffer(b64decode(entry["embedding"]), "<f4") for entry in answer["data"]])


def check_equal(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert (actual * expected).sum(axis=1).min() > CLOSE


def files_of(url: str) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = httpx.get(f"{url}/v1/files").raise_for_status().json()["data"]
    return files


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, which has ended when the block has."""
    command = [sys.executable, "-m", "vecmill", "embed", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until_printed(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return
    raise AssertionError("".join(lines))


def test_results_are_those_of_the_endpoint(server: RunningServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", *({"id": at, "text": text} for at, text in enumerate(TEXTS)))
    before = files_of(server.url)
    result = embedded(source, "-o", tmp_path / "out.parquet", "--batch-file-bytes", 1024, "--url", server.url)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [0, 1, 2]
    assert table["text"].to_pylist() == TEXTS
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    assert table.schema.metadata[b"model"] == b"sentence-transformers/all-MiniLM-L6-v2"
    check_equal(np.array(table["embedding"].to_pylist(), "f4"), asked_directly(server.url, TEXTS))
    assert "3 vectors of 384 values (sentence-transformers/all-MiniLM-L6-v2)" in result.stdout
    assert files_of(server.url) == before


def test_csv(server: RunningServer, tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["key", "content"], *([f"k{at}", text] for at, text in enumerate(TEXTS))])
    embedded(tmp_path / "in.csv", "-o", tmp_path / "out.npy", "--id-field", "key", "--url", server.url)
    check_equal(np.load(tmp_path / "out.npy"), asked_directly(server.url, TEXTS))
    assert (tmp_path / "out.npy.ids.txt").read_text("utf-8") == "k0\nk1\nk2\n"


def test_parquet_in_and_out(server: RunningServer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [7, 8, 9], "document": TEXTS}), tmp_path / "in.parquet")
    embedded(tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--url", server.url)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [7, 8, 9]
    check_equal(np.array(table["embedding"].to_pylist(), "f4"), asked_directly(server.url, TEXTS))


def test_a_folder(server: RunningServer, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "below/c.txt"), TEXTS, strict=True):
        (folder / name).write_text(text, "utf-8")
    (folder / "picture").write_bytes(b"\0\1")
    result = embedded(folder, "-o", tmp_path / "out.npz", "--url", server.url)
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["ids"].tolist() == ["a.txt", "b.md", "below/c.txt"]
        check_equal(archive["embeddings"], asked_directly(server.url, TEXTS))
    assert "skipped   1 x is not UTF-8 text\n" in result.stdout


def test_wrong_options_are_the_servers_own_sentence_before_any_upload(server: RunningServer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", *TEXTS)
    before = files_of(server.url)
    result = embed(source, "-o", tmp_path / "out.npy", "--dimensions", 7, "--url", server.url)
    assert result.exit_code == 2
    assert "`dimensions` is 7;" in result.stderr
    assert files_of(server.url) == before


def test_an_interrupted_run_is_taken_up(checkpoint: Path, tmp_path: Path) -> None:
    texts = [f"text number {at} about {at % 7} things" for at in range(MANY)]
    source, out = write_jsonl(tmp_path / "in.jsonl", *texts), tmp_path / "out.npy"
    port = free_port()
    with tiny_server(checkpoint, tmp_path / "state", port) as server:
        command = (source, "-o", out, "--url", server.url)
        with started(*command) as process:
            until_printed(process, "embedded  ")
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=60)[1]
        uploaded = [file for file in files_of(server.url) if file["purpose"] == "batch"]
        assert process.returncode == 130
        assert stderr.endswith(
            "vecmill: stopped; the server goes on with what it has, and the same command takes up its results.\n"
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "state"]
        embedded(*command, "--keep")
        assert [file for file in files_of(server.url) if file["purpose"] == "batch"] == uploaded
        assert len(uploaded) == 1
        check_equal(np.load(out)[:64], asked_directly(server.url, texts[:64]))
        assert np.isfinite(np.load(out)).all()


def test_a_server_that_is_killed_and_started_again_meanwhile(checkpoint: Path, tmp_path: Path) -> None:
    texts = [f"text number {at} about {at % 7} things" for at in range(MANY)]
    source, out = write_jsonl(tmp_path / "in.jsonl", *texts), tmp_path / "out.npy"
    port, state = free_port(), tmp_path / "state"
    url = f"http://127.0.0.1:{port}"
    with tiny_server(checkpoint, state, port) as server, started(source, "-o", out, "--url", url, "--keep") as process:
        until_printed(process, "embedded  ")
        os.kill(server.pid, signal.SIGKILL)
        until_printed(process, "waiting   ")
        with tiny_server(checkpoint, state, port):
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            assert "waiting   no longer" in stderr
            assert f"{MANY:,} vectors of 32 values" in stdout
            assert len([file for file in files_of(url) if file["purpose"] == "batch"]) == 1
            check_equal(np.load(out)[-64:], asked_directly(url, texts[-64:]))


def test_rows_that_the_server_refuses(checkpoint: Path, tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", "short", "long " * 300), tmp_path / "out.npy"
    port = free_port()
    command = vecmill_command(port, "--embed-model", str(checkpoint), "--no-auto-truncate", "--device", "cpu")
    with running(command, port, "/ready") as server:
        result = embed(source, "-o", out, "--url", server.url)
    assert result.exit_code == 1
    (failed,) = map(orjson.loads, Path(f"{out}.errors.jsonl").read_bytes().splitlines())
    assert (failed["row"], failed["status"]) == (2, 400)
    assert "maximum context length" in failed["message"]
    assert np.isnan(np.load(out)).all(axis=1).tolist() == [False, True]
