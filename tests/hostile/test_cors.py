"""What web pages are told: patterns of origins, preflights, and refusals whose cure works."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.conftest import serving
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.http.origins import Origins

KEY = "a-key-of-enough-characters"


def preflight(origin: str, **more: str) -> dict[str, str]:
    return {"origin": origin, "access-control-request-method": "POST", **more}


def origins(listed: str) -> Origins:
    return Origins(load_settings({"cors_origins": listed}).access.cors_origins)


@pytest.mark.parametrize(
    ("listed", "allowed", "others"),
    [
        (
            "https://a.example",
            ["https://a.example"],
            ["http://a.example", "https://b.a.example", "https://a.example:1"],
        ),
        ("https://A.Example:443", ["https://a.example"], ["https://a.example:443", "https://aXexample"]),
        ("http://a.example:80", ["http://a.example"], ["https://a.example"]),
        (
            "https://*.example.org",
            ["https://a.example.org", "https://a.b.example.org"],
            [
                "https://example.org",
                "https://evilexample.org",
                "https://a.example.org.evil.example",
                "https://a.example.org:444",
                "https://evil.example/.example.org",
                "http://a.example.org",
            ],
        ),
        ("chrome-extension://*", ["chrome-extension://abcdef"], ["https://abcdef", "chrome-extension://a/b", "x"]),
        (
            "http://localhost:*",
            ["http://localhost", "http://localhost:3000"],
            ["http://localhost.evil:1", "http://a:1"],
        ),
        ("http://*:3000", ["http://a:3000", "http://a.b:3000"], ["http://a", "http://a:30001"]),
        ("http://[::1]:5173", ["http://[::1]:5173"], ["http://[::2]:5173"]),
        (
            "app://obsidian.md, capacitor://localhost",
            ["app://obsidian.md", "capacitor://localhost"],
            ["app://x", "null"],
        ),
        ("*", ["https://any.example", "null"], []),
        ("", [], ["https://a.example", "null", ""]),
    ],
)
def test_patterns_of_origins(listed: str, allowed: list[str], others: list[str]) -> None:
    known = origins(listed)
    assert [origin for origin in allowed if origin not in known] == []
    assert [origin for origin in others if origin in known] == []


@pytest.mark.parametrize(
    "listed",
    [
        "example.org",
        "https://example.org/",
        "https://example.org/path",
        "https://exa*mple.org",
        "https://*example.org",
        "https://a.*.example.org",
        "https://*.*.org",
        "https://example.*",
        "*.example.org",
        "*://example.org",
        "https://",
        "https://a b",
        "https://user@example.org",
        "https://example.org:http",
        "https://bücher.example",
        "null",
        "https://fine.example,https://not fine.example",
    ],
)
def test_what_no_browser_would_send_stops_the_start(listed: str) -> None:
    with pytest.raises(StartupError, match=re.escape("CORS_ORIGINS=")) as stopped:
        load_settings({"cors_origins": listed})
    assert "https://*.example.org" in stopped.value.message


async def test_a_page_below_a_pattern_gets_its_answers() -> None:
    async with serving(cors_origins="https://*.example.org,chrome-extension://*") as client:
        for origin in ("https://a.example.org", "chrome-extension://abcdef"):
            response = await client.options("/v1/embeddings", headers=preflight(origin))
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
            for body, status in (({"input": "x"}, 200), ({}, 400)):
                answer = await client.post("/v1/embeddings", json=body, headers={"origin": origin})
                assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
        refused = await client.post("/v1/embeddings", json={"input": "x"}, headers={"origin": "https://example.org"})
        assert refused.status_code == 403


@pytest.mark.parametrize("keys", ["", KEY])
async def test_preflights_are_answered_before_keys_are_asked_for(keys: str) -> None:
    async with serving(cors_origins="https://a.example", api_key=keys) as client:
        headers = preflight(
            "https://a.example",
            **{
                "access-control-request-headers": "authorization,content-type",
                "access-control-request-private-network": "true",
            },
        )
        for path in ("/v1/embeddings", "/jobs", "/health", "/nowhere", "//v1/embeddings/"):
            answer = await client.options(f"http://localhost{path}", headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-private-network"] == "true"
            assert "authorization" in answer.headers["access-control-allow-headers"]
            assert "POST" in answer.headers["access-control-allow-methods"]
        answer = await client.options("/embed", headers={**headers, "origin": "https://b.example"})
        assert answer.status_code == 403
        assert "add that origin to CORS_ORIGINS" in answer.json()["error"]
        assert not any(name.startswith("access-control-allow-origin") for name in answer.headers)


async def test_without_cors_origins_a_preflight_is_told_the_cure(client: httpx.AsyncClient) -> None:
    answer = await client.options("/v1/embeddings", headers=preflight("https://a.example"))
    assert answer.status_code == 403
    assert "'https://a.example'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["https://a.example", "chrome-extension://abcdef", "http://localhost:3000", "null"])
async def test_the_cure_that_a_refusal_names_works(client: httpx.AsyncClient, origin: str) -> None:
    refused = await client.post("/embed", json={"inputs": "x"}, headers={"origin": origin})
    assert refused.status_code == 403
    assert "API_KEY" not in refused.text  # its page would be asked for a preflight, which a key does not answer
    named = re.search("set CORS_ORIGINS=([^ ,]+)|'([^']+)': add that origin to CORS_ORIGINS", refused.json()["error"])
    assert named is not None
    async with serving(cors_origins=named[1] or named[2]) as cured:
        response = await cured.options("/embed", headers=preflight(origin))
        assert response.status_code == 200
        answer = await cured.post("/embed", json={"inputs": "x"}, headers={"origin": origin})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] in (origin, "*")
