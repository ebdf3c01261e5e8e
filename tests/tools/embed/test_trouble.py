"""Servers that are busy, away, broken or something else; runs that are taken up."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.servers import free_port
from tests.tools.embed.batch_server import MODEL, BatchReply, BatchServer, Line, answer, failure, unanswered, vector
from tests.tools.embed.command_line import embed, embedded, write_jsonl

BUSY = BatchReply({"error": {"message": "busy"}}, 503, {"Retry-After": "0"})
CUT = BatchReply(status=None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six texts, which --batch-file-bytes 1024 makes two batches of."""
    return write_jsonl(tmp_path / "in.jsonl", *(f"text {at} {'x' * 100}" for at in range(6)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.npy"


def check(source: Path, out: Path) -> None:
    """Every text has its vector."""
    texts = [line.strip('"') for line in source.read_text("utf-8").splitlines()]
    assert np.array_equal(np.load(out), np.stack([np.frombuffer(vector(text), "<f4") for text in texts]))


def first(number: int, method: str, path: str, reply: BatchReply) -> Callable[[str, str], BatchReply | None]:
    """In place of so many answers to a call."""
    left = [reply] * number
    return lambda *call: left.pop() if call == (method, path) and left else None


def test_what_goes_over_the_wire(batch_api: BatchServer, source: Path, out: Path) -> None:
    options = ("--model", "alias", "--dimensions", 2, "--query", "--batch-file-bytes", 1024)
    embedded(source, "-o", out, "--url", f"{batch_api.url}/v1/", *options)
    check(source, out)
    fields = {"encoding_format": "base64", "model": "alias", "dimensions": 2, "input_type": "query"}
    assert len(batch_api.batches) == len(batch_api.uploads) == 2
    lines = [line for upload in batch_api.uploads for line in upload]
    assert [line["custom_id"] for line in lines] == list("012345")
    for line in lines:
        assert (line["method"], line["url"]) == ("POST", "/v1/embeddings")
        assert {name: line["body"][name] for name in fields} == fields
    assert {headers["authorization"] for _, _, headers in batch_api.received} == {"Bearer from-outside"}
    assert batch_api.probes[0] == {"input": "vecmill", **fields}


def test_the_model_is_pinned_and_the_files_go_at_the_end(batch_api: BatchServer, source: Path, out: Path) -> None:
    embedded(source, "-o", out, "--url", batch_api.url)
    assert {line["body"]["model"] for line in batch_api.uploads[0]} == {MODEL}
    assert batch_api.files == {}


def test_keep_leaves_the_files(batch_api: BatchServer, source: Path, out: Path) -> None:
    embedded(source, "-o", out, "--keep", "--url", batch_api.url)
    assert len(batch_api.files) == 2


def test_no_more_than_four_batches_at_a_time(batch_api: BatchServer, tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", *(f"{at} {'x' * 600}" for at in range(10)))
    waiting: list[int] = []

    def interfere(method: str, path: str) -> None:
        if (method, path) == ("POST", "/v1/batches"):
            waiting.append(sum(batch["status"] == "validating" for batch in batch_api.batches))

    batch_api.interfere = interfere
    embedded(source, "-o", out, "--batch-file-bytes", 1024, "--url", batch_api.url)
    check(source, out)
    assert len(waiting) == 10
    assert max(waiting) == 3


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/batches"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/files"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches/batch_0"),
    ],
)
def test_a_busy_server_is_waited_for(batch_api: BatchServer, method: str, path: str, source: Path, out: Path) -> None:
    batch_api.interfere = first(2, method, path, BUSY)
    result = embedded(source, "-o", out, "--url", batch_api.url)
    check(source, out)
    assert f"waiting   {method} {batch_api.url}{path} was answered with 503: busy\n" in result.stderr
    assert "waiting   no longer: the server answers\n" in result.stderr
    assert len(batch_api.uploads) == len(batch_api.batches) == 1


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize("done", [True, False])
def test_a_call_that_breaks_is_not_made_twice(
    batch_api: BatchServer, path: str, done: bool, source: Path, out: Path
) -> None:
    """Whether or not the server has done it before the connection broke."""
    batch_api.interfere = first(1, "POST", path, CUT)
    batch_api.works_although_cut = done
    embedded(source, "-o", out, "--url", batch_api.url)
    check(source, out)
    assert len(batch_api.uploads) == len(batch_api.batches) == 1
    assert batch_api.count("POST", path) == (1 if done else 2)


def test_a_download_that_breaks_begins_again(batch_api: BatchServer, source: Path, out: Path) -> None:
    broken = 0

    def interfere(method: str, path: str) -> BatchReply | None:
        nonlocal broken
        if not path.endswith("/content") or broken == 2:
            return None
        broken += 1
        content = batch_api.files[path.split("/")[3]][1]
        return BatchReply(content[: len(content) // 2], headers={"Content-Length": str(len(content))})

    batch_api.interfere = interfere
    result = embedded(source, "-o", out, "--url", batch_api.url)
    assert broken == 2
    check(source, out)
    assert "tokens    18\n" in result.stdout


def test_a_server_that_stays_away_is_given_up_and_the_run_taken_up(
    batch_api: BatchServer, source: Path, out: Path
) -> None:
    command = (source, "-o", out, "--url", batch_api.url, "--patience", "0")
    batch_api.interfere = first(1, "GET", "/v1/batches/batch_0", BUSY)
    result = embed(*command)
    assert result.exit_code == 1
    assert "vecmill: Given up after 0 s (--patience); the same command goes on from here. GET " in result.stderr
    assert result.stderr.endswith("was answered with 503: busy\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.jsonl"]
    embedded(*command)
    check(source, out)
    assert len(batch_api.uploads) == len(batch_api.batches) == 1


def test_results_of_an_earlier_run_are_found_among_others(batch_api: BatchServer, source: Path, out: Path) -> None:
    other = write_jsonl(out.parent / "other.jsonl", "other")
    options = ("--keep", "--batch-file-bytes", 1024, "--url", batch_api.url)
    embedded(source, "-o", out, *options)
    for name in ("a.npy", "b.npy", "c.npy"):
        embedded(other, "-o", out.parent / name, "--dimensions", 2, *options)
    made = len(batch_api.batches)
    result = embedded(source, "-o", out.parent / "again.npy", *options)
    check(source, out.parent / "again.npy")
    assert made == len(batch_api.batches) == 3
    assert "found     6 of 6 texts on the server, of an earlier run\n" in result.stderr
    assert "(6 found on the server)" in result.stdout


def test_other_options_are_another_run(batch_api: BatchServer, source: Path, out: Path) -> None:
    embedded(source, "-o", out, "--keep", "--url", batch_api.url)
    embedded(source, "-o", out, "--keep", "--overwrite", "--query", "--url", batch_api.url)
    assert len(batch_api.batches) == 2


def test_an_alias_of_another_model_is_another_run(batch_api: BatchServer, source: Path, out: Path) -> None:
    command = (source, "-o", out, "--model", "alias", "--overwrite", "--keep", "--url", batch_api.url)
    embedded(*command)
    batch_api.run = lambda line: answer(line, "another/model")
    assert "(another/model)" in embedded(*command).stdout
    assert len(batch_api.batches) == 2


def test_a_batch_whose_results_are_gone_is_made_anew(batch_api: BatchServer, source: Path, out: Path) -> None:
    command = (source, "-o", out, "--overwrite", "--url", batch_api.url)
    embedded(*command)
    assert batch_api.files == {}
    embedded(*command)
    check(source, out)
    assert len(batch_api.batches) == 2


def test_an_expired_batch_is_made_anew_for_what_is_missing(batch_api: BatchServer, source: Path, out: Path) -> None:
    batch_api.ends_as = lambda number: "expired" if number == 0 else "completed"
    batch_api.run = lambda line: (
        unanswered(line) if len(batch_api.batches) == 1 and line["custom_id"] in "35" else answer(line)
    )
    embedded(source, "-o", out, "--url", batch_api.url)
    check(source, out)
    assert [line["custom_id"] for line in batch_api.uploads[1]] == ["3", "5"]


def test_a_cancelled_batch_ends_the_run_and_the_next_goes_on(batch_api: BatchServer, source: Path, out: Path) -> None:
    batch_api.ends_as = lambda number: "cancelled" if number == 0 else "completed"
    batch_api.run = lambda line: (
        unanswered(line) if len(batch_api.batches) == 1 and line["custom_id"] in "01345" else answer(line)
    )
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert "batch_0 was cancelled on the server. The same command goes on with what is missing." in result.stderr
    result = embedded(source, "-o", out, "--url", batch_api.url)
    check(source, out)
    assert "found     1 of 6 texts" in result.stderr
    assert [line["custom_id"] for line in batch_api.uploads[1]] == list("01345")


def test_passing_failures_are_tried_again_until_nothing_comes_of_it(
    batch_api: BatchServer, source: Path, out: Path
) -> None:
    def run(line: Line) -> Line:
        number = len(batch_api.batches)
        if number and line["custom_id"] in ("1" if number > 1 else "1234"):
            return failure(line, 503, "no memory")
        return answer(line)

    batch_api.run = run
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert "failed    1, listed in" in result.stdout
    assert "error     503: no memory" in result.stdout
    assert [len(lines) for lines in batch_api.uploads] == [6, 4, 1]
    assert np.isnan(np.load(out)).all(axis=1).tolist() == [False, True, False, False, False, False]


def test_a_batch_that_is_refused(batch_api: BatchServer, source: Path, out: Path) -> None:
    batch_api.ends_as = lambda number: "failed"
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert result.stderr.endswith("vecmill: The server refused batch_0 (failed): no such model.\n")
    assert not out.exists()


def test_another_model_meanwhile(batch_api: BatchServer, source: Path, out: Path) -> None:
    batch_api.run = lambda line: answer(line, "another/model" if batch_api.batches else MODEL)
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert f"Vectors come from another/model and from {MODEL}" in result.stderr
    assert not out.exists()


def test_tokens_from_the_cache_are_told(batch_api: BatchServer, source: Path, out: Path) -> None:
    def run(line: Line) -> Line:
        reply = answer(line)
        reply["response"]["body"]["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
        return reply

    batch_api.run = run
    result = embedded(source, "-o", out, "--url", batch_api.url)
    assert "tokens    18, 12 of them from the cache\n" in result.stdout


@pytest.mark.parametrize(
    ("method", "path", "reply", "code", "reason"),
    [
        ("GET", "/v1/batches", BatchReply({}, 404), 1, "has no batches API (GET /v1/batches was answered with 404)"),
        ("GET", "/v1/batches", BatchReply({"error": "no"}, 401), 1, "answered with 401: no (--api-key, or API_KEY)"),
        ("GET", "/v1/batches", BatchReply(b"<html>"), 1, "was not answered with a JSON object: <html>"),
        ("GET", "/v1/batches", BatchReply({"data": [{}]}), 1, "The server's batch is not one of OpenAI's"),
        ("POST", "/v1/embeddings", BatchReply({"error": "`dimensions`"}, 400), 2, "answered with 400: `dimensions`"),
        ("POST", "/v1/embeddings", BatchReply({}), 1, "does not answer as OpenAI's does"),
        ("POST", "/v1/files", BatchReply({"error": "large"}, 413), 1, "answered with 413: large"),
    ],
)
def test_a_server_that_is_something_else(
    batch_api: BatchServer, method: str, path: str, reply: BatchReply, code: int, reason: str, source: Path, out: Path
) -> None:
    batch_api.interfere = first(1, method, path, reply)
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == code
    assert result.stderr.startswith("vecmill: ")
    assert reason in result.stderr
    assert "Traceback" not in result.output
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["in.jsonl"]


def test_an_unreachable_server_is_one_sentence_at_once(source: Path, out: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = embed(source, "-o", out, "--url", url)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"vecmill: {url} cannot be reached: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["http://", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_an_address_that_is_none(url: str, source: Path, out: Path) -> None:
    result = embed(source, "-o", out, "--url", url)
    assert result.exit_code == 2
    assert f"vecmill: {url} is not an address" in result.stderr


@pytest.mark.parametrize("rows", [[], ["", {"text": None}]])
def test_an_input_without_texts(batch_api: BatchServer, rows: list[object], tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "none.jsonl", *rows)
    result = embed(source, "-o", out, "--skip-bad", "--url", batch_api.url)
    assert result.exit_code == 2
    assert f"There are no texts in {source}." in result.stderr


def test_skipped_rows_are_counted(batch_api: BatchServer, tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", "one", "", "three")
    result = embedded(source, "-o", out, "--skip-bad", "--url", batch_api.url)
    assert "skipped   1 x is an empty text\n" in result.stdout
    assert (tmp_path / "out.npy.ids.txt").read_text("utf-8") == "1\n3\n"


def test_stdin(batch_api: BatchServer, out: Path) -> None:
    embedded("-", "-o", out, "--url", batch_api.url, stdin=b'"one"\n{"text": "two"}\n')
    assert np.load(out).shape == (2, 2)


def test_a_bar_on_a_terminal(batch_api: BatchServer, source: Path, out: Path) -> None:
    batch_api.interfere = first(1, "GET", "/v1/batches/batch_0", BUSY)
    command = [sys.executable, "-m", "vecmill", "embed", str(source), "-o", str(out), "--url", batch_api.url]
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        ) as process:
            os.close(theirs)
            shown = b""
            with suppress(OSError):  # how a terminal says that its last writer has gone
                while piece := screen.read(65536):
                    shown += piece
        assert process.returncode == 0
    output = shown.decode()
    assert "was answered with 503: busy" in output
    assert "6/6" in output
    assert "texts/s" in output


def test_sigterm_leaves_nothing_behind(batch_api: BatchServer, source: Path, out: Path) -> None:
    polled = threading.Event()

    def interfere(method: str, path: str) -> BatchReply | None:
        if path != "/v1/batches/batch_0":
            return None
        polled.set()
        return BUSY

    batch_api.interfere = interfere
    command = [sys.executable, "-m", "vecmill", "embed", str(source), "-o", str(out), "--url", batch_api.url]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert polled.wait(timeout=60)
        process.terminate()
    assert process.returncode == 143
    assert [path.name for path in out.parent.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(("name", "output"), [("in.jsonl", "out.parquet"), ("in.parquet", "out.npy")])
def test_parquet_without_pyarrow(
    batch_api: BatchServer, name: str, output: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / "in.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = embed(source.parent / name, "-o", source.parent / output, "--url", batch_api.url)
    assert result.exit_code == 2
    assert result.stderr == "vecmill: Parquet files need pyarrow: pip install 'vecmill[parquet]'.\n"


def test_an_answer_that_cannot_be_decompressed_is_not_asked_for_again(
    batch_api: BatchServer, source: Path, out: Path
) -> None:
    broken = BatchReply({"data": []}, headers={"Content-Encoding": "gzip"})
    batch_api.interfere = first(1, "POST", "/v1/embeddings", broken)
    result = embed(source, "-o", out, "--url", batch_api.url)
    assert result.exit_code == 1
    assert f"The answer to POST {batch_api.url}/v1/embeddings cannot be decompressed" in result.stderr
    assert batch_api.count("POST", "/v1/embeddings") == 1
