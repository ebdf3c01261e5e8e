"""The dashboard of a server that has keys, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.http.conftest import field, row
from tests.http.test_docs_page import expect_status, tried_out
from tests.servers import RunningServer, free_port, running, vecmill_command

KEY = "a-long-enough-secret"
OTHER = "another-long-secret"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    port = free_port()
    keys = {"API_KEY": f"person:{KEY},guest:{OTHER}", "ADMIN_API_KEY": "the-longest-secret-of-all"}
    with running(vecmill_command(port), port, "/ready", keys) as server:
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


def test_asks_for_a_key_and_shows_what_needs_none(page: Page, api: httpx.Client) -> None:
    page.goto("/")
    expect(form(page)).to_be_visible()
    expect(field(page, "state")).to_have_text("Ready")
    expect(field(page, "version")).to_have_text(api.get("/health").json()["version"])
    expect(page.get_by_role("main")).to_be_hidden()
    key = form(page).get_by_label("API key")
    expect(key).to_be_focused()
    expect(key).to_have_attribute("type", "password")
    expect(key).to_have_accessible_description(
        "This server has keys. Its numbers and jobs are shown to those who have one."
    )


def test_a_wrong_key_is_said_to_be_wrong_and_dropped(page: Page) -> None:
    page.goto("/")
    enter(page, "wrong")
    expect(form(page).get_by_role("status")).to_have_text("The server does not know this key.")
    expect(form(page).get_by_label("API key")).to_be_focused()
    expect(form(page).get_by_label("API key")).to_have_value("")
    expect(page.get_by_role("main")).to_be_hidden()
    page.reload()
    expect(form(page)).to_be_visible()
    expect(form(page).get_by_role("status")).to_have_text("")


@pytest.mark.parametrize("key", ["", "two words", "ключ"])
def test_what_cannot_be_a_key_is_not_sent(page: Page, key: str) -> None:
    page.goto("/")
    enter(page, key)
    expect(form(page).locator(":invalid")).to_have_count(1)


def test_after_one_sign_in_every_tab_and_page_works(page: Page, api: httpx.Client) -> None:
    api.post("/jobs", json={"project": "mine", "total_chunks": 10}).raise_for_status()
    page.goto("/")
    enter(page, "wrong")
    expect(form(page).get_by_role("status")).not_to_be_empty()
    refused: list[str] = []
    page.on("response", lambda response: refused.append(response.url) if response.status == 401 else None)
    enter(page, f" {KEY} ")  # as a paste may bring it
    expect(form(page)).to_be_hidden()
    expect(row(page, "Jobs", "mine")).to_be_visible()
    expect(page.get_by_role("navigation").get_by_role("link", name="Now")).to_be_focused()
    page.get_by_role("link", name="Playground").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-outcome")).to_contain_text("4 texts")
    page.get_by_role("link", name="Models", exact=True).click()
    expect(page.get_by_role("heading", name="sentence-transformers/all-MiniLM-L6-v2")).to_be_visible()
    page.get_by_role("link", name="Machine").click()
    for name in ("Metrics", "Models", "Health", "Statistics", "Capabilities"):
        page.locator("#pages").get_by_text(name, exact=True).click()
        expect(page.locator("#page-shown pre")).to_be_visible()
    page.get_by_role("link", name="API documentation").click()
    call = tried_out(page, "Statistics", "GET", "/stats")
    expect_status(call, "200")
    page.goto("/#machine")
    expect(page.get_by_role("heading", name="Memory")).to_be_visible()
    assert refused == []


def test_a_job_is_cancelled_with_the_key(page: Page, api: httpx.Client) -> None:
    api.post("/jobs", json={"project": "to be cancelled", "total_chunks": 10}).raise_for_status()
    page.goto("/")
    enter(page, KEY)
    page.get_by_role("button", name="Cancel to be cancelled").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(field(row(page, "Jobs", "to be cancelled"), "problem")).to_have_text("cancelled")


def test_a_key_without_admin_sees_its_own_and_changes_nothing(page: Page, api: httpx.Client) -> None:
    api.post("/jobs", json={"project": "somebody else's", "total_chunks": 10}).raise_for_status()
    page.goto("/")
    enter(page, OTHER)
    expect(page.get_by_text("No jobs.")).to_be_visible()
    page.get_by_role("link", name="Models", exact=True).click()
    expect(page.get_by_role("heading", name="sentence-transformers/all-MiniLM-L6-v2")).to_be_visible()
    expect(page.get_by_role("button", name="Unload")).to_have_count(0)
    expect(page.get_by_role("button", name="Pull")).to_have_count(0)
    page.get_by_role("link", name="Machine").click()
    expect(page.get_by_text("Doctor is for keys with the scope admin.")).to_be_visible()
    expect(page.locator("#doctor-run")).to_be_hidden()


def test_the_key_is_in_no_address_and_gone_with_its_tab(page: Page) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto("/")
    enter(page, KEY)
    expect(page.get_by_role("main")).to_be_visible()
    page.reload()
    expect(page.get_by_role("main")).to_be_visible()
    expect(form(page)).to_be_hidden()
    assert not [url for url in [page.url, *requested] if KEY in url]
    page.get_by_role("button", name="Sign out").click()
    expect(form(page)).to_be_visible()
    expect(page.get_by_role("main")).to_be_hidden()
    enter(page, KEY)
    expect(page.get_by_role("main")).to_be_visible()
    page.close()

    another = page.context.new_page()
    another.goto("/")
    expect(form(another)).to_be_visible()
    assert another.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_nothing_is_refused_again_and_again_while_no_key_is_typed_in(page: Page) -> None:
    refused: list[str] = []
    page.on("response", lambda response: refused.append(response.url) if response.status == 401 else None)
    page.clock.install()
    page.goto("/")
    expect(form(page)).to_be_visible()
    for _ in range(3):
        with page.expect_response("**/health"):
            page.clock.run_for(5500)
    assert len(refused) == 1


@pytest.mark.nightly
def test_a_restart_is_seen_and_without_keys_takes_the_form_away(browser: Browser) -> None:
    port = free_port()
    command = vecmill_command(port)
    with browser.new_context() as one, browser.new_context() as other:
        inside, outside = one.new_page(), other.new_page()
        with running(command, port, "/ready", {"API_KEY": KEY}) as server:
            outside.goto(server.url)
            expect(form(outside)).to_be_visible()
            inside.goto(server.url)
            enter(inside, KEY)
            body = {"project": "before", "total_chunks": 1}
            httpx.post(f"{server.url}/jobs", json=body, headers={"authorization": f"Bearer {KEY}"}).raise_for_status()
            expect(row(inside, "Jobs", "before")).to_be_visible()
        for page in (inside, outside):
            expect(field(page, "state")).to_have_text("Not reachable, retrying", timeout=15_000)
        expect(row(inside, "Jobs", "before")).to_be_visible()
        with running(command, port, "/ready"):
            for page in (inside, outside):
                expect(page.get_by_text("No jobs.")).to_be_visible(timeout=20_000)
                expect(field(page, "state")).to_have_text("Ready")
                expect(form(page)).to_be_hidden()
