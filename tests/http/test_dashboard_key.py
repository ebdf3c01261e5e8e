"""The dashboard of a server that has keys, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.http.test_dashboard import field, jobs_in, register
from tests.servers import RunningServer, free_port, running, vecmill_command

KEY = "a-long-enough-secret"
UNKNOWN = "\N{EN DASH}"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    port = free_port()
    with running(vecmill_command(port), port, "/ready", {"API_KEY": f"person:{KEY}"}) as server:
        yield server


@pytest.fixture
def api(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


def form(page: Page) -> Locator:
    return page.get_by_role("form", name="API key")


def enter(page: Page, key: str) -> None:
    form(page).get_by_label("API key").fill(key)
    form(page).get_by_role("button", name="Use key").click()


def test_asks_for_a_key_and_shows_what_needs_none(page: Page) -> None:
    page.goto("/")
    expect(form(page)).to_be_visible()
    expect(field(page, "state")).to_have_text("Ready")
    expect(field(page, "embed-model")).to_have_text("sentence-transformers/all-MiniLM-L6-v2")
    expect(field(page, "texts-embedded")).to_have_text(UNKNOWN)
    expect(page.get_by_text("The list of jobs is not available.")).to_be_visible()
    key = form(page).get_by_label("API key")
    expect(key).to_have_attribute("type", "password")
    expect(key).to_have_accessible_description(
        "This service has keys. Its numbers and jobs are shown to those who have one."
    )


def test_a_wrong_key_is_said_to_be_wrong_and_dropped(page: Page) -> None:
    page.goto("/")
    enter(page, "wrong")
    expect(form(page).get_by_role("status")).to_have_text("The service does not know this key.")
    expect(form(page).get_by_label("API key")).to_be_focused()
    expect(form(page).get_by_label("API key")).to_have_value("")
    expect(field(page, "texts-embedded")).to_have_text(UNKNOWN)
    page.reload()
    expect(form(page)).to_be_visible()
    expect(form(page).get_by_role("status")).to_have_text("")


@pytest.mark.parametrize("key", ["", "two words", "ключ"])
def test_what_cannot_be_a_key_is_not_sent(page: Page, key: str) -> None:
    page.goto("/")
    enter(page, key)
    expect(form(page).locator(":invalid")).to_have_count(1)
    expect(field(page, "state")).to_have_text("Ready")


def test_the_right_key_shows_the_numbers(page: Page, api: httpx.Client) -> None:
    api.post("/embed", json={"inputs": ["x"]}).raise_for_status()
    page.goto("/")
    enter(page, "wrong")
    expect(form(page).get_by_role("status")).not_to_be_empty()
    enter(page, f" {KEY} ")  # as a paste may bring it
    expect(form(page)).to_be_hidden()
    expect(field(page, "texts-embedded")).to_have_text(f"{api.get('/stats').json()['texts_embedded']:,}")
    expect(page.get_by_role("heading", name="Load")).to_be_focused()


def test_a_job_is_cancelled_with_the_key(page: Page, api: httpx.Client) -> None:
    register(api, "to be cancelled")
    page.goto("/")
    enter(page, KEY)
    page.get_by_role("button", name="Cancel to be cancelled").click()
    expect(jobs_in(page, "Recent").locator('[data-field="error"]')).to_have_text("cancelled")
    assert api.get("/jobs").json()["active"] == []


def test_the_key_is_in_no_address_and_gone_with_its_tab(page: Page) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto("/")
    enter(page, KEY)
    expect(form(page)).to_be_hidden()
    page.reload()
    expect(field(page, "texts-embedded")).not_to_have_text(UNKNOWN)
    expect(form(page)).to_be_hidden()
    assert not [url for url in [page.url, *requested] if KEY in url]
    page.close()

    another = page.context.new_page()
    another.goto("/")
    expect(form(another)).to_be_visible()
    assert another.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_nothing_is_refused_again_and_again_while_no_key_is_typed_in(page: Page, api: httpx.Client) -> None:
    page.goto("/")
    expect(form(page)).to_be_visible()
    errors = api.get("/stats").json()["errors"]
    for _ in range(2):
        with page.expect_response("**/health"):
            pass
    assert api.get("/stats").json()["errors"] == errors


def test_a_restart_without_keys_takes_the_form_away(browser: Browser) -> None:
    port = free_port()
    command = vecmill_command(port)
    with browser.new_context() as context:
        page = context.new_page()
        with running(command, port, "/ready", {"API_KEY": KEY}) as server:
            page.goto(server.url)
            expect(form(page)).to_be_visible()
        expect(field(page, "state")).to_have_text("Not reachable, retrying")
        with running(command, port, "/ready"):
            expect(field(page, "texts-embedded")).to_have_text("0")
            expect(form(page)).to_be_hidden()
