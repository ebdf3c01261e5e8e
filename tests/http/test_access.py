"""Who may use the server: keys, origins, names."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import serving
from vecmill.config import load_settings
from vecmill.core.errors import StartupError

KEYS = "editor:the-first-secret, ci:the-second-secret"

# A call of each dialect, and where its client finds the text of an error.
CALLS = [
    ("POST", "/v1/embeddings", {"input": "x"}, ("error", "message")),
    ("POST", "/v1/rerank", {"query": "q", "documents": ["a"]}, ("message",)),
    ("POST", "/v2/embed", {"texts": ["x"]}, ("message",)),
    ("POST", "/embed", {"inputs": "x"}, ("error",)),
    ("POST", "/", {"inputs": "x"}, ("error",)),
    ("POST", "/api/embed", {"model": "m", "input": "x"}, ("error",)),
    ("POST", "/embedding", {"content": "x"}, ("error", "message")),
    ("POST", "/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}]}, ("detail",)),
    ("POST", "/vectors", {"text": "x"}, ("error",)),
    ("GET", "/jobs", None, ("detail",)),
    ("GET", "/metrics", None, ("detail",)),
    ("GET", "/stats", None, ("detail",)),
    ("GET", "/v1/nothing", None, ("error", "message")),
]


@pytest.fixture(scope="module")
async def locked() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(api_key=KEYS) as client:
        yield client


@pytest.mark.parametrize(("method", "path", "body", "where"), CALLS)
@pytest.mark.parametrize(
    "given", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}, {"api-key": ""}]
)
async def test_without_a_key_nothing_is_done(
    locked: httpx.AsyncClient,
    method: str,
    path: str,
    body: object,
    where: tuple[str, ...],
    given: dict[str, str],
) -> None:
    answer = await locked.request(method, path, json=body, headers=given)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    found = answer.json()
    for key in where:
        found = found[key]
    assert "API key is missing or wrong" in found
    if where == ("error", "message") and path.startswith("/v1"):
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "given",
    [
        {"authorization": "Bearer the-first-secret"},
        {"authorization": "bearer  the-second-secret"},
        {"authorization": "the-first-secret"},  # LlamaIndex's client of TEI
        {"api-key": "the-first-secret"},
        {"x-api-key": "the-second-secret"},
        {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": "the-second-secret"},  # a proxy's own
    ],
)
async def test_any_key_in_any_of_three_headers(locked: httpx.AsyncClient, given: dict[str, str]) -> None:
    assert (await locked.post("/v1/embeddings", json={"input": "x"}, headers=given)).status_code == 200


@pytest.mark.parametrize(
    "key", ["the-first-secre", "the-first-secrets", "THE-FIRST-SECRET", "editor:the-first-secret", "editor", "é"]
)
async def test_nearly_right_is_wrong(locked: httpx.AsyncClient, key: str) -> None:
    headers = [(b"authorization", f"Bearer {key}".encode())]
    assert (await locked.post("/embed", json={"inputs": "x"}, headers=headers)).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ready",
        "/v1/health/live",
        "/v1/health/ready",
        "/.well-known/live",
        "/.well-known/ready",
        "/",
        "/dashboard",
        "/docs",
        "/openapi.json",
        "/static/dashboard.js",
    ],
)
async def test_health_checks_and_pages_stay_open(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path, follow_redirects=True)).status_code in (200, 204)
    if path != "/":  # where work is done too
        for method in ("TRACE", "DELETE", "PUT"):
            assert (await locked.request(method, path)).status_code == 405
    assert (await locked.post("/", json={"input": "x"})).status_code == 401


async def test_no_key_is_in_the_log(locked: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await locked.post("/embed", json={"inputs": "x"}, headers={"api-key": "the-first-secret"})
        await locked.post("/embed", json={"inputs": "x"}, headers={"api-key": "wrong-secret"})
    shown = [vars(record) for record in caplog.records if record.name.startswith("vecmill")]
    assert [one.get("key") for one in shown if one["msg"].startswith("request")] == ["editor", None]
    assert "secret" not in str(shown)


@pytest.mark.parametrize("value", ["a,a", "n:x,n:y", "two words", ":x", "n:"])
def test_unusable_keys_stop_the_start_without_being_shown(value: str) -> None:
    with pytest.raises(StartupError, match="API_KEY: ") as stopped:
        load_settings({"api_key": value})
    assert f"'{value}'" not in stopped.value.message


def test_keys_are_not_in_the_settings_text() -> None:
    settings = load_settings({"api_key": "the-only-secret-key,ci:the-other-secret-key"})
    assert "secret" not in repr(settings)
    assert [entry.name for entry in settings.access.api_key] == ["key 1", "ci"]


EVIL = {"origin": "https://evil.example"}


async def test_a_web_page_of_another_origin_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/embed", json={"inputs": "x"}, headers=EVIL)
    assert answer.status_code == 403
    assert "CORS_ORIGINS" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers
    for origin in ("null", "http://localhost:9999", "https://localhost.evil.example"):
        assert (await client.post("/embed", json={"inputs": "x"}, headers={"origin": origin})).status_code == 403


async def test_its_own_page_is_not(client: httpx.AsyncClient) -> None:
    answer = await client.post("/embed", json={"inputs": "x"}, headers={"origin": "http://localhost"})
    assert answer.status_code == 200


async def test_with_a_key_the_origin_does_not_matter(locked: httpx.AsyncClient) -> None:
    headers = {**EVIL, "api-key": "the-first-secret"}
    assert (await locked.post("/embed", json={"inputs": "x"}, headers=headers)).status_code == 200


async def test_allowed_origins_get_their_answers() -> None:
    async with serving(cors_origins="https://app.example, app://obsidian.md", api_key="a-quite-long-secret") as client:
        origin = {"origin": "https://app.example"}
        asked = {
            **origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = await client.options("/v1/embeddings", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for headers, status in ((origin, 401), ({**origin, "authorization": "Bearer a-quite-long-secret"}, 200)):
            answer = await client.post("/v1/embeddings", json={"input": "x"}, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.options("/v1/embeddings", headers={**asked, **EVIL})
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080", "spark.local", "host.docker.internal:1"])
async def test_local_names_are_answered(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example"]
)
async def test_a_name_that_only_a_web_page_would_use_is_refused(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.post("/embed", json={"inputs": "x"}, headers={"host": host})
    assert answer.status_code == 403
    assert "ALLOWED_HOSTS" in answer.json()["error"]


async def test_names_that_are_set_are_the_only_ones() -> None:
    async with serving(allowed_hosts="spark.example") as client:
        assert (await client.get("/health", headers={"host": "SPARK.example:8080"})).status_code == 200
        assert (await client.get("/health", headers={"host": "localhost"})).status_code == 403
        assert (await client.get("/stats", headers={"host": "10.1.2.3:8080"})).status_code == 403
        for probe in ("/health", "/ready"):  # a kubelet asks by the pod's address
            assert (await client.get(probe, headers={"host": "10.1.2.3:8080"})).status_code == 200


async def test_every_name_is_answered_once_there_are_keys() -> None:
    async with serving(host="0.0.0.0", api_key="a-long-secret-key") as client:
        assert (await client.get("/health", headers={"host": "spark.example"})).status_code == 200


async def test_an_address_of_the_network_makes_no_name_known() -> None:
    async with serving(host="0.0.0.0") as client:
        for host in ("spark.example", "evil.example:8080", "10.1.2.3.evil.example", "localhost.evil.example"):
            answer = await client.post("/embed", json={"inputs": "x"}, headers={"host": host})
            assert answer.status_code == 403
            assert "ALLOWED_HOSTS" in answer.json()["error"]
            assert "API_KEY" in answer.json()["error"]
        for host in ("10.1.2.3:8080", "[fd00::1]:8080", "vecmill:8080", "spark", "spark.local", "vecmill.default.svc"):
            assert (await client.post("/embed", json={"inputs": "x"}, headers={"host": host})).status_code == 200
        assert (await client.post("/embed", json={"inputs": "x"}, headers=EVIL)).status_code == 403
    async with serving(host="0.0.0.0", allowed_hosts="*") as client:
        assert (await client.get("/health", headers={"host": "spark.example"})).status_code == 200
