"""A real browser for the pages that the server gives to people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any, Protocol

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

# Without a sandbox it runs in containers too; the rest keeps it from asking the network for anything.
CHROMIUM_ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# How soon a page shows something is up to the machine, which may be busy.
expect.set_options(timeout=30_000)


class Server(Protocol):
    @property
    def url(self) -> str: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One per module, not per session: Playwright's event loop would be in the way of async tests."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    candidates = (shutil.which(name) for name in names)
    executable = next(filter(None, candidates), None)
    assert executable, "needs Chromium on the PATH; `make test` installs it where it can"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with browser.new_context(base_url=server.url) as context:
        yield context.new_page()


@pytest.fixture
def quiet_page(page: Page, server: Server) -> Iterator[Page]:
    """A page that must neither complain nor ask anybody but the server for anything."""
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    yield page
    assert complaints == []
    assert [url for url in requested if not url.startswith((f"{server.url}/", "data:"))] == []


def field(page: Page | Locator, name: str) -> Locator:
    """The elements of the dashboard that show this."""
    return page.locator(f'[data-field="{name}"]')


def row(page: Page, table: str, text: str) -> Locator:
    """A row of one of the dashboard's tables."""
    return page.get_by_role("table", name=table).get_by_role("row").filter(has_text=text)


def show(page: Page, snapshot: dict[str, Any]) -> None:
    """Have the dashboard shown this in place of the server's own snapshots."""

    def answer(route: Route) -> None:
        body = f"event: snapshot\ndata: {json.dumps(snapshot)}\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/dashboard/events?*", answer)


def snapshot_of(server: Server) -> dict[str, Any]:
    """What the server tells the dashboard now."""
    answer: dict[str, Any] = httpx.get(f"{server.url}/dashboard/snapshot").raise_for_status().json()
    return answer


def replicas_of(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The replicas of a snapshot as if there were others: one of another version, one that was killed."""
    (own,) = snapshot["replicas"]["items"]
    other = {"this": False, "url": "http://two.example:8080", "version": "99.0", "texts_per_second": 1234.5}
    gone = {"this": False, "status": "gone", "gone_since": 1_790_000_000, "queue": {"texts": None, "tokens": None}}
    items = [own, own | other | {"replica": "two", "id": "2"}, own | gone | {"replica": "x" * 128, "id": "3"}]
    totals = {"ready": 2, "texts_per_second": 1234.5, "requests_per_second": 3, "queue": {"texts": 70, "tokens": 9000}}
    return {"count": 3, "unreadable": 2, "problem": None, "totals": totals, "items": items}
