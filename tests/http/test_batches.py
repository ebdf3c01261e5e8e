"""Files and batches as OpenAI's own client uses them, against a real server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from openai.types import Batch

from tests.conftest import serving
from tests.servers import RunningServer, free_port, running, vecmill_command

EMBED, RERANK = "/v1/embeddings", "/v1/rerank"
ENDED = ("failed", "completed", "expired", "cancelled")
TEXTS = ["def add(a, b):\n    return a + b", "Berlin has 3.5 million inhabitants.", "", "grün 🌱", "x " * 400]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def jsonl(bodies: list[Any], url: str = EMBED) -> bytes:
    return b"".join(
        orjson.dumps(
            {"custom_id": f"line-{n}", "method": "POST", "url": url, "body": body}, option=orjson.OPT_APPEND_NEWLINE
        )
        for n, body in enumerate(bodies)
    )


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        time.sleep(0.01)
    return batch


def lines(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [orjson.loads(line) for line in client.files.content(file_id).content.splitlines()]


def test_a_misspelt_field_of_a_line_is_named_in_its_answer(client: openai.OpenAI) -> None:
    bodies = [{"input": "x", "dimension": 12}, {"inputs": "x"}, {"input": "x", "user": "u"}]
    file = client.files.create(file=("texts.jsonl", BytesIO(jsonl(bodies))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    batch = ended(client, batch.id)
    first, last = (line["response"] for line in lines(client, batch.output_file_id))
    assert first["hint"] == "`dimension` is not read here: did you mean `dimensions`?"
    assert len(first["body"]["data"]) == 1
    assert "hint" not in last
    [refused] = lines(client, batch.error_file_id)
    assert refused["response"]["hint"] == "`inputs` is not read here: did you mean `input`?"
    error = refused["response"]["body"]["error"]
    assert error["message"] == "`input`: Field required. `inputs` is not read here: did you mean `input`?"


def test_the_whole_life_with_openais_client(client: openai.OpenAI) -> None:
    content = jsonl([{"model": "m", "input": text} for text in TEXTS])
    file = client.files.create(file=("texts.jsonl", BytesIO(content)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "texts.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert file.id in [listed.id for listed in client.files.list(purpose="batch")]

    created = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"project": "stdlib"}
    )
    assert created.status in ("validating", "in_progress")
    assert created.id in [listed.id for listed in client.batches.list(limit=5)]
    batch = ended(client, created.id)
    assert batch.status == "completed"
    assert batch.metadata == {"project": "stdlib"}
    assert batch.model == "sentence-transformers/all-MiniLM-L6-v2"
    assert batch.errors is None
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0)
    assert (batch.expires_at or 0) - batch.created_at in (86_400, 86_401)
    entries = lines(client, batch.output_file_id)
    assert [entry["custom_id"] for entry in entries] == [f"line-{n}" for n in range(5)]
    assert batch.usage is not None
    tokens = sum(entry["response"]["body"]["usage"]["prompt_tokens"] for entry in entries)
    assert batch.usage.input_tokens == batch.usage.total_tokens == tokens

    with pytest.raises(openai.ConflictError, match="completed already"):
        client.batches.cancel(batch.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert client.batches.retrieve(batch.id) == batch


async def test_each_line_is_answered_as_the_route_answers_it() -> None:
    """Bit for bit, with the line's own usage, whatever it runs together with."""
    bodies = [
        *({"input": text, "encoding_format": "base64"} for text in TEXTS),
        {"input": TEXTS},
        {"input": TEXTS, "encoding_format": "base64", "user": "somebody"},
        {"input": [[101, 7592, 102]], "priority": "interactive"},
        {"input": "what is a tree", "input_type": "query"},
        {"input": "x", "output_dtype": "ubinary"},
    ]
    async with serving() as client:
        outcomes = await outcome(client, jsonl(bodies))
        assert len(outcomes) == len(bodies)
        for number, body in enumerate(bodies):
            expected = (await client.post(EMBED, json=body)).json()
            answer = outcomes[f"line-{number}"]["response"]
            assert answer["status_code"] == 200
            assert answer["body"] == expected


async def test_rerank_lines_too_in_each_dialect() -> None:
    documents = ["Berlin is known for its museums.", "Berlin has 3.5 million inhabitants."]
    bodies = [
        {"query": "How many people live in Berlin?", "documents": documents, "return_documents": True},
        {"query": "museums", "texts": documents},
        {"query": "museums", "documents": documents, "top_k": 1},
        {"query": "museums", "documents": []},
        {"query": "museums"},
        {"query": "museums", "documents": documents, "texts": documents},
        {"query": "museums", "documents": documents, "top_n": 1, "top_k": 2},
    ]
    async with serving() as client:
        outcomes = await outcome(client, jsonl(bodies, RERANK), RERANK)
        for number, body in enumerate(bodies):
            expected = await client.post(RERANK, json=body)
            answer = outcomes[f"line-{number}"]["response"]
            assert answer["status_code"] == expected.status_code
            assert without_id(answer["body"]) == without_id(expected.json())


def without_id(body: Any) -> Any:
    return {key: value for key, value in body.items() if key != "id"} if isinstance(body, dict) else body


async def test_only_the_guilty_lines_fail_and_as_the_route_refuses_them() -> None:
    bodies = [
        {"input": "fine"},
        {"input": []},
        {"input": 7},
        {"input": "word " * 300},
        {"input": "x", "dimensions": 5},
        {"input": ["fine", "too"]},
        {"input": ["x"] * 5},
        {"input": "x", "model": "nobody"},
        {"input": "x", "task": "retrieval.query", "input_type": "passage"},
        {"input": "x", "encoding_format": "float", "embedding_type": "base64"},
        {"input": "x", "normalize": True, "normalized": False},
        {"input": "fine"},
    ]
    async with serving(auto_truncate=False, strict_model=True, max_client_batch_size=4) as client:
        outcomes = await outcome(client, jsonl(bodies))
        statuses = [outcomes[f"line-{n}"]["response"]["status_code"] for n in range(len(bodies))]
        assert statuses == [200, 400, 400, 400, 400, 200, 400, 404, 400, 400, 400, 200]
        for number, body in enumerate(bodies):
            expected = await client.post(EMBED, json=body)
            answer = outcomes[f"line-{number}"]["response"]
            assert answer["status_code"] == expected.status_code
            if answer["status_code"] != 200:
                assert answer["body"] == expected.json()


async def test_a_server_without_room_makes_lines_wait_not_fail() -> None:
    """One request at a time, which others ask for too."""
    bodies = [{"input": f"text number {n}", "dimensions": 384 if n % 2 else None} for n in range(20)]
    async with serving(max_concurrent_requests=1, queue_timeout=0) as client:
        others = (client.post(EMBED, json={"input": "x"}) for _ in range(40))
        outcomes, *statuses = await asyncio.gather(outcome(client, jsonl(bodies)), *others)
    assert {entry["response"]["status_code"] for entry in outcomes.values()} == {200}
    assert 503 in {answer.status_code for answer in statuses}


async def outcome(client: httpx.AsyncClient, content: bytes, endpoint: str = EMBED) -> dict[str, dict[str, Any]]:
    """The lines of output and errors, by custom_id."""
    batch = await ran(client, content, endpoint)
    assert batch["status"] == "completed", batch
    outcomes: dict[str, dict[str, Any]] = {}
    for file_id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
        answer = await client.get(f"/v1/files/{file_id}/content")
        entries = [orjson.loads(line) for line in answer.content.splitlines()]
        outcomes |= {entry["custom_id"]: entry for entry in entries}
    assert len(outcomes) == batch["request_counts"]["total"]
    return outcomes


async def ran(client: httpx.AsyncClient, content: bytes, endpoint: str = EMBED, **options: Any) -> dict[str, Any]:
    file_id = (await upload(client, content)).json()["id"]
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **options}
    batch: dict[str, Any] = (await client.post("/v1/batches", json=body)).json()
    while batch["status"] not in ENDED:
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    return batch


async def upload(client: httpx.AsyncClient, content: bytes, **fields: str) -> httpx.Response:
    return await client.post("/v1/files", files={"file": ("input.jsonl", content)}, data={"purpose": "batch", **fields})


@pytest.mark.parametrize(
    ("content", "line", "code", "words"),
    [
        (b"", None, "empty_file", "no lines"),
        (b"\n\r\n  \n", None, "empty_file", "no lines"),
        (jsonl([{}])[:-2], 1, "invalid_json_line", "not valid JSON"),
        (b"[1]", 1, "invalid_json_line", "not a JSON object"),
        (jsonl([{}]) + b"\n" + jsonl([{}]), 2, "invalid_json_line", "blank"),
        (jsonl([{}, []]), 2, "invalid_body", "`body`"),
        (jsonl([{}]) + jsonl([{}]).replace(b"line-0", b"other").replace(b"POST", b"GET"), 2, "invalid_method", "POST"),
        (jsonl([{}], RERANK), 1, "invalid_url", "/v1/embeddings"),
        (jsonl([{}]).replace(b'"line-0"', b"7"), 1, "missing_custom_id", "`custom_id`"),
        (jsonl([{}]).replace(b'"line-0"', b'"half \\ud83d of one"'), 1, "invalid_json_line", "surrogate"),
        (jsonl([{}, {}]) + jsonl([{}]), 3, "duplicate_custom_id", "line 1"),
        (jsonl([{"input": "x" * 40_000}]), 1, "line_too_long", "MAX_BODY_BYTES"),
    ],
)
async def test_a_file_that_cannot_be_run_fails_the_batch_with_the_line(
    small: httpx.AsyncClient, content: bytes, line: int | None, code: str, words: str
) -> None:
    batch = await ran(small, content)
    assert (batch["status"], batch["output_file_id"], batch["error_file_id"]) == ("failed", None, None)
    assert batch["failed_at"] >= batch["created_at"]
    [error] = batch["errors"]["data"]
    assert (error["line"], error["code"]) == (line, code)
    assert words in error["message"]


async def test_at_most_50_errors_are_shown_in_the_files_order(small: httpx.AsyncClient) -> None:
    errors = (await ran(small, b"{}\n" * 70))["errors"]["data"]
    assert [error["line"] for error in errors] == list(range(1, 51))
    mixed = (await ran(small, jsonl([{}]) * 2 + b"[]\n" + jsonl([{}])))["errors"]["data"]
    assert [(error["line"], error["code"]) for error in mixed] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
    ]
    errors = (await ran(small, jsonl([{}] * 40) * 3))["errors"]["data"]
    assert [error["line"] for error in errors] == list(range(41, 91))


async def test_windows_line_ends_a_byte_order_mark_and_blank_lines_at_the_end(small: httpx.AsyncClient) -> None:
    content = b"\xef\xbb\xbf" + jsonl([{"input": "a"}, {"input": "b"}]).replace(b"\n", b"\r\n") + b"\r\n\n"
    assert list(await outcome(small, content)) == ["line-0", "line-1"]
    assert list(await outcome(small, content[3:].rstrip())) == ["line-0", "line-1"]


@pytest.fixture(scope="module")
async def small() -> AsyncIterator[httpx.AsyncClient]:
    """A server with small limits."""
    async with serving(max_file_bytes=100_000, max_files_bytes=600_000, max_body_bytes=32_768) as client:
        yield client


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"expires_after[seconds]": "60"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "soon"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "last_active_at"}, "expires_after[anchor]"),
        ({"x": "y" * 5000}, "x"),
    ],
)
async def test_a_form_that_is_wrong_is_refused_by_field(
    small: httpx.AsyncClient, fields: dict[str, str], param: str
) -> None:
    answer = await upload(small, b"{}", **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"purpose": "batch"}', "application/json"),
        (b"", ""),
        (b"--b\r\n", "multipart/form-data"),
        (b"nothing of a form", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n', "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
        (b"--b\r\n" + b"x" * 70_000, "multipart/form-data; boundary=b"),
    ],
)
async def test_what_is_no_form_is_refused(small: httpx.AsyncClient, content: bytes, kind: str) -> None:
    answer = await small.post("/v1/files", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_file_may_come_before_its_purpose_and_without_one_it_is_refused(small: httpx.AsyncClient) -> None:
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="gr\xc3\xbcn.jsonl"\r\n\r\n{}\r\n',
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    file = (await small.post("/v1/files", content=b"".join(parts) + b"--b--\r\n", headers=headers)).json()
    assert (file["bytes"], file["filename"]) == (2, "grün.jsonl")
    refused = await small.post("/v1/files", content=parts[0] + b"--b--\r\n", headers=headers)
    assert refused.json()["error"]["param"] == "purpose"


async def test_a_files_own_expiry_is_kept(small: httpx.AsyncClient) -> None:
    own = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = (await upload(small, b"{}", **own)).json()
    assert file["expires_at"] - file["created_at"] == 3600
    usual = (await upload(small, b"{}")).json()
    assert usual["expires_at"] - usual["created_at"] == 30 * 86_400


async def test_a_file_over_the_limit_is_a_413_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(max_file_bytes=200_000, state_dir=tmp_path) as client:
        declared = await upload(client, b"x" * 300_000)
        assert declared.status_code == 413
        assert "MAX_FILE_BYTES" in declared.json()["error"]["message"]
        pieces_sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal pieces_sent
            yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
            while True:
                pieces_sent += 1
                yield b"x" * 65_536

        headers = {"content-type": "multipart/form-data; boundary=b"}
        undeclared = await client.post("/v1/files", content=endless(), headers=headers)
        assert undeclared.status_code == 413
        assert undeclared.headers["connection"] == "close"
        assert pieces_sent < 10
        assert list((tmp_path / "files").iterdir()) == []


def test_an_upload_whose_client_leaves_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    files = tmp_path / "files"
    with running(vecmill_command(port), port, "/ready", {"STATE_DIR": str(tmp_path)}):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 1_000_000
            )
            while not any(path.stat().st_size for path in files.iterdir()):
                httpx.get(f"http://127.0.0.1:{port}/health")
        while list(files.iterdir()):
            httpx.get(f"http://127.0.0.1:{port}/health")
        assert httpx.get(f"http://127.0.0.1:{port}/v1/files").json()["data"] == []


async def test_all_files_together_have_a_limit_with_the_cure(tmp_path: Path) -> None:
    async with serving(max_files_bytes=150_000, state_dir=tmp_path) as client:
        first = (await upload(client, b"x" * 100_000)).json()
        refused = await upload(client, b"x" * 100_000)
        assert refused.status_code == 413
        assert "MAX_FILES_BYTES" in refused.json()["error"]["message"]
        assert len(list((tmp_path / "files").iterdir())) == 2
        assert (await client.delete(f"/v1/files/{first['id']}")).json()["deleted"]
        assert (await upload(client, b"x" * 100_000)).status_code == 200


async def test_a_batch_without_room_for_its_answers_waits_until_there_is(tmp_path: Path) -> None:
    async with serving(max_files_bytes=140_000, state_dir=tmp_path) as client:
        full = (await upload(client, b"x" * 100_000)).json()["id"]
        file_id = (await upload(client, jsonl([{"input": f"text {n}"} for n in range(10)]))).json()["id"]
        body = {"input_file_id": file_id, "endpoint": EMBED, "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=body)).json()
        log = (await client.get("/metrics")).text
        while 'vecmill_requests_total{dialect="batch"' not in log:
            log = (await client.get("/metrics")).text
        assert (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] == "in_progress"
        assert (await client.delete(f"/v1/files/{full}")).is_success
        while batch["status"] not in ENDED:
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        assert batch["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
        assert 'vecmill_batch_lines_total{outcome="completed"} 10.0' in (await client.get("/metrics")).text


async def test_a_file_that_a_batch_needs_is_kept() -> None:
    async with serving(batches_max_active=1) as client:
        slow = jsonl([{"input": ["word " * 200] * 64, "dimensions": 384} for _ in range(40)])
        file_id = (await upload(client, slow)).json()["id"]
        body = {"input_file_id": file_id, "endpoint": EMBED, "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=body)).json()
        refused = await client.delete(f"/v1/files/{file_id}")
        assert refused.status_code == 409
        assert "cancel" in refused.json()["error"]["message"]
        assert (await client.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
        while batch["status"] not in ENDED:
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        assert batch["status"] == "cancelled"
        assert (await client.delete(f"/v1/files/{file_id}")).json()["deleted"]
        again = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert again.status_code == 409
        assert "cancelled" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input_file_id": "file-" + "0" * 32}, 404, None),
        ({"input_file_id": "../../etc/passwd"}, 404, None),
        ({"endpoint": "/v1/chat/completions"}, 400, "endpoint"),
        ({"completion_window": "31d"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": 24}, 400, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, 400, None),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
    ],
)
async def test_a_batch_that_is_wrong_is_refused_by_field(
    small: httpx.AsyncClient, change: dict[str, Any], status: int, param: str | None
) -> None:
    file_id = (await upload(small, jsonl([{"input": "a"}]))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": EMBED, "completion_window": "24h"}
    answer = await small.post("/v1/batches", json={**body, **change})
    assert answer.status_code == status
    assert param is None or answer.json()["error"]["param"] == param


async def test_windows_and_expiries_of_ones_own(small: httpx.AsyncClient) -> None:
    life = {"anchor": "created_at", "seconds": 7200}
    batch = await ran(small, jsonl([{"input": "a"}]), completion_window="2d", output_expires_after=life)
    assert batch["expires_at"] - batch["created_at"] in (2 * 86_400, 2 * 86_400 + 1)
    output = (await small.get(f"/v1/files/{batch['output_file_id']}")).json()
    assert output["expires_at"] - output["created_at"] == 7200
    assert output["purpose"] == "batch_output"
    body = {"input_file_id": output["id"], "endpoint": EMBED, "completion_window": "24h"}
    assert (await small.post("/v1/batches", json=body)).status_code == 400


@pytest.mark.parametrize("wrong", ["..%2f..%2flock", "file-" + "0" * 32, "batch_" + "0" * 32, "..", "%00", "x" * 5000])
async def test_ids_that_are_none_are_404_in_openais_shape(small: httpx.AsyncClient, wrong: str) -> None:
    for method, path in (
        ("GET", f"/v1/files/{wrong}"),
        ("GET", f"/v1/files/{wrong}/content"),
        ("DELETE", f"/v1/files/{wrong}"),
        ("GET", f"/v1/batches/{wrong}"),
        ("POST", f"/v1/batches/{wrong}/cancel"),
    ):
        answer = await small.request(method, path)
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with serving(state_dir=tmp_path) as client:
        ids = [(await upload(client, b"{}")).json()["id"] for _ in range(3)]
        newest = (await client.get("/v1/files", params={"limit": 2})).json()
        assert [file["id"] for file in newest["data"]] == [ids[2], ids[1]]
        assert (newest["first_id"], newest["last_id"], newest["has_more"]) == (ids[2], ids[1], True)
        rest = (await client.get("/v1/files", params={"after": ids[1]})).json()
        assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([ids[0]], False)
        first = (await client.get("/v1/files", params={"after": "", "limit": 2})).json()
        assert first == newest, "as some clients ask for the first page"
        oldest = (await client.get("/v1/files", params={"order": "asc"})).json()
        assert [file["id"] for file in oldest["data"]] == ids
        assert (await client.get("/v1/files", params={"purpose": "batch_output"})).json()["data"] == []
        empty = (await client.get("/v1/batches")).json()
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        for wrong in ({"limit": 0}, {"limit": 101}, {"after": "batch_x"}):
            assert (await client.get("/v1/batches", params=wrong)).status_code == 400


async def test_a_folder_that_cannot_be_written_is_a_503_and_the_rest_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with serving(state_dir=tmp_path / "file") as client:
        for answer in (await upload(client, b"{}"), await client.get("/v1/files"), await client.get("/v1/batches")):
            assert answer.status_code == 503
            assert "cannot be written" in answer.json()["error"]["message"]
        assert (await client.post(EMBED, json={"input": "x"})).status_code == 200
