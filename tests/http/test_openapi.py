"""The document of the API: it is stored, its examples run as they stand, its errors are those that come."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from tests.api_document import DOCUMENT, STORED
from tests.in_process import InProcess
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.reference import texts

# They answer with an error: the first two without GENERATION_URL, the others always.
REFUSED = {
    "/v1/completions": 404,
    "/v1/chat/completions": 404,
    "/embed_all": 424,
    "/embed_sparse": 424,
    "/predict": 424,
}

NO_IDS = {"job_id": "no-such-job", "file_id": "no-such-file", "batch_id": "no-such-batch"}

OPERATIONS = [
    pytest.param(method.upper(), path, operation, id=f"{method.upper()} {path}")
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]

# An answer without an end cannot be read to its end; tests/http/test_job_events.py reads its beginning.
# Neither is doctor run for its example: tests/http/test_dashboard_data.py has it.
ENDING = [
    operation
    for operation in OPERATIONS
    if "text/event-stream" not in str(operation.values[2]) and operation.values[:2] != ("POST", "/dashboard/doctor")
]


def contents(operation: dict[str, Any], ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """What /docs would send, one for each example, as httpx takes it."""
    if "multipart/form-data" in operation.get("requestBody", {}).get("content", {}):
        return [{"files": {"file": ("input.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}]
    examples = bodies(operation)
    # A file that was not uploaded cannot be worked through.
    return [
        {"json": body | {"input_file_id": ids["file_id"]} if "input_file_id" in (body or {}) else body}
        for body in examples
    ]


def bodies(operation: dict[str, Any]) -> list[Any]:
    """What is sent as JSON; None for an operation without a body."""
    if "requestBody" not in operation:
        return [None]
    assert list(operation["requestBody"]["content"]) == ["application/json"]
    content = operation["requestBody"]["content"]["application/json"]
    examples = [example["value"] for example in content.get("examples", {}).values()] or [content["example"]]
    assert None not in examples
    return examples


def address(path: str, operation: dict[str, Any], ids: Mapping[str, str]) -> str:
    """The path with its parameters' examples; only ids that the server chose have none."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] != "path":
            assert not parameter["required"]
            continue
        if parameter["name"] in ids:
            value = ids[parameter["name"]]
        else:
            [value] = [example["value"] for example in parameter.get("examples", {}).values()] or [parameter["example"]]
        path = path.replace(f"{{{parameter['name']}}}", value)
    assert "{" not in path
    return path


@pytest.fixture
async def job_id(client: httpx.AsyncClient) -> AsyncIterator[str]:
    await clear_jobs(client)
    [example] = DOCUMENT["components"]["schemas"]["RegisterBody"]["examples"]
    yield (await client.post("/jobs", json=example)).json()["job_id"]
    await clear_jobs(client)


@pytest.fixture
async def ids(client: httpx.AsyncClient, job_id: str, path: str) -> AsyncIterator[dict[str, str]]:
    """A job, and for the calls that are about them a file and a batch that takes long."""
    if not path.startswith(("/v1/files/", "/v1/batches")):
        yield NO_IDS | {"job_id": job_id}
        return
    file_id = await upload(client, b"{}")
    texts = [f"{number} " * 200 for number in range(2000)]
    body = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": texts}}
    batch = {"input_file_id": await upload(client, json.dumps(body).encode()), "endpoint": "/v1/embeddings"}
    batch_id = (await client.post("/v1/batches", json=batch | {"completion_window": "24h"})).json()["id"]
    yield {"job_id": job_id, "file_id": file_id, "batch_id": batch_id}
    await client.post(f"/v1/batches/{batch_id}/cancel")


async def upload(client: httpx.AsyncClient, content: bytes) -> str:
    answer = await client.post("/v1/files", files={"file": ("input.jsonl", content)}, data={"purpose": "batch"})
    return str(answer.json()["id"])


async def clear_jobs(client: httpx.AsyncClient) -> None:
    """What other tests left: only a job that is active may report progress."""
    jobs = (await client.get("/jobs")).json()
    for job in jobs["active"] + jobs["queued"]:
        await client.delete(f"/jobs/{job['id']}")
    await client.delete("/jobs/recent")


@pytest.fixture
async def starting() -> AsyncIterator[httpx.AsyncClient]:
    """A client, without a key, of a server that has keys and no model yet."""
    app = create_app(load_settings({"api_key": "a-quite-long-secret"}))
    async with httpx.AsyncClient(transport=InProcess(app), base_url="http://localhost") as client:
        yield client


def test_what_is_written_from_the_code_is_up_to_date() -> None:
    for path, text in texts(STORED.parents[1]).items():
        assert path.read_text("utf-8") == text, f"{path.name} differs: python -m vecmill.reference"


async def test_the_server_gives_the_stored_document(client: httpx.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json() == DOCUMENT


def test_every_reference_leads_somewhere() -> None:
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', STORED.read_text("utf-8")):
        node = DOCUMENT
        for part in reference.split("/"):
            node = node[part]


@pytest.mark.parametrize(("method", "path", "operation"), ENDING)
async def test_every_example_runs_as_it_stands(
    client: httpx.AsyncClient, ids: dict[str, str], method: str, path: str, operation: dict[str, Any]
) -> None:
    for content in contents(operation, ids):
        answer = await client.request(method, address(path, operation, ids), **content)
        if path in REFUSED:
            assert answer.status_code == REFUSED[path]
        else:
            assert answer.is_success, answer.text
        assert str(answer.status_code) in operation["responses"]


def test_every_alternative_of_a_body_has_an_example() -> None:
    for path in ("/rerank", "/tokenize", "/"):
        content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        alternatives = {alternative["$ref"].rpartition("/")[2] for alternative in content["schema"]["oneOf"]}
        assert len(alternatives) > 1
        assert set(content["examples"]) == alternatives


@pytest.mark.parametrize(("method", "path", "operation"), ENDING)
async def test_what_is_refused_has_a_documented_status(
    client: httpx.AsyncClient, ids: dict[str, str], method: str, path: str, operation: dict[str, Any]
) -> None:
    where = address(path, operation, ids)
    for body in ("[]", "{", '{"model": "no-such-model"}', '{"inputs": 1}', '{"texts": [], "query": 1}'):
        answer = await client.request(method, where, content=body)
        assert str(answer.status_code) in operation["responses"], (body, answer.text)
    if "{job_id}" in path:
        assert (await client.request(method, path, json={"current": 1})).status_code == 404
        assert "404" in operation["responses"]


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
async def test_keys_and_a_model_that_is_not_there_yet_have_documented_statuses(
    starting: httpx.AsyncClient, method: str, path: str, operation: dict[str, Any]
) -> None:
    where = address(path, operation, NO_IDS)
    for content in contents(operation, NO_IDS):
        without = await starting.request(method, where, **content)
        assert (without.status_code == 401) == ("401" in operation["responses"])
        assert (without.status_code == 401) == (operation["security"] == [{}, {"API key": []}])
        if path == "/dashboard/events":  # it tells of the start, too
            continue
        with_key = await starting.request(
            method, where, **content, headers={"authorization": "Bearer a-quite-long-secret"}
        )
        assert str(with_key.status_code) in operation["responses"], with_key.text
