"""/docs in a real browser: what it fills in runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.servers import RunningServer, free_port, running, vecmill_command

TAGS = [
    "OpenAI",
    "Infinity",
    "Rerank",
    "TEI and CodeCartographer",
    "vLLM",
    "NIM",
    "Weaviate",
    "Cohere",
    "Ollama",
    "llama-server",
    "Batches",
    "Jobs",
    "Models",
    "Health",
    "Cache",
    "Statistics",
    "Dashboard",
]

# With a body, one of several bodies, a parameter in the path, neither; tests/http/test_openapi.py runs them all.
CALLS = [
    ("OpenAI", "POST", "/v1/embeddings"),
    ("OpenAI", "GET", "/v1/models/{model}"),
    ("vLLM", "POST", "/tokenize"),
    ("NIM", "POST", "/v1/retrieval/nvidia/{hosted_model}/reranking"),
    ("Statistics", "GET", "/stats"),
]

# A key that only the dialect's own answer has.
ANSWERED = {
    "RerankBody": "results",
    "TeiRerankBody": "score",
    "RankingBody": "rankings",
    "WeaviateRerankBody": "scores",
    "VoyageRerankBody": "data",
}


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    port = free_port()
    with running(vecmill_command(port), port, "/ready", {"API_KEY": "a-long-enough-secret"}) as server:
        yield server


def tried_out(page: Page, tag: str, method: str, path: str) -> Locator:
    """The call's block, open and filled in."""
    section = page.locator(".opblock-tag-section", has=page.locator(f'[data-tag="{tag}"]'))
    call = section.locator(".opblock", has=page.locator(f'[data-path="{path}"]'))
    call = call.filter(has=page.locator(".opblock-summary-method", has_text=method))
    call.locator(".opblock-summary-control").click()
    call.get_by_role("button", name="Try it out").click()
    return call


def expect_status(call: Locator, status: str) -> None:
    call.get_by_role("button", name="Execute").click()
    expect(call.locator(".live-responses-table tbody td.response-col_status")).to_have_text(re.compile(rf"^{status}\b"))


@pytest.mark.nightly
def test_calls_are_answered_with_what_is_filled_in(quiet_page: Page) -> None:
    quiet_page.goto("/docs")
    expect(quiet_page.locator("[data-tag]")).to_have_text(TAGS)
    for tag, method, path in CALLS:
        expect_status(tried_out(quiet_page, tag, method, path), "200")


@pytest.mark.nightly
def test_every_dialect_of_a_shared_path_can_be_chosen(quiet_page: Page) -> None:
    quiet_page.goto("/docs")
    call = tried_out(quiet_page, "Rerank", "POST", "/rerank")
    examples = call.locator(".examples-select select")
    expect(examples.locator("option")).to_have_text(list(ANSWERED))
    for name, key in ANSWERED.items():
        examples.select_option(label=name)
        with quiet_page.expect_response("**/rerank") as answer:
            call.get_by_role("button", name="Execute").click()
        body = answer.value.json()
        assert key in (body[0] if isinstance(body, list) else body)


@pytest.mark.nightly
def test_the_key_is_sent_once_it_is_given(browser: Browser, locked: RunningServer) -> None:
    with browser.new_context(base_url=locked.url) as context:
        page = context.new_page()
        page.goto("/docs")
        call = tried_out(page, "OpenAI", "POST", "/v1/embeddings")
        expect_status(call, "401")
        page.locator(".auth-wrapper .authorize").click()
        dialog = page.locator(".dialog-ux")
        dialog.get_by_role("textbox").fill("a-long-enough-secret")
        dialog.get_by_role("button", name="Apply credentials").click()
        dialog.get_by_role("button", name="Close").click()
        expect_status(call, "200")
