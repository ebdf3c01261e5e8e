"""The dashboard in a real browser against a real server.

Knows what a person sees and presses. Does not know the page's script: it is only ever looked at from
outside, by role, label and the `data-field` names of `index.html`.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.http.conftest import Server
from tests.models.loaded import GOLDEN
from tests.servers import free_port, running, vecmill_command
from vecmill.http import dashboard

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"

MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}

SERVED = [
    ("/", "text/html; charset=utf-8"),
    *(
        (f"/static/{file.name}", MEDIA_TYPES[Path(file.name).suffix])
        for file in files(dashboard).iterdir()
        if Path(file.name).suffix in MEDIA_TYPES
    ),
]


@pytest.fixture
def api(server: Server) -> Iterator[httpx.Client]:
    """A client of the server, with no jobs left on it from other tests."""
    with httpx.Client(base_url=server.url) as client:
        jobs = client.get("/jobs").json()
        for job in jobs["active"] + jobs["queued"]:
            client.delete(f"/jobs/{job['id']}").raise_for_status()
        client.delete("/jobs/recent").raise_for_status()
        yield client


def register(api: httpx.Client, project: str) -> str:
    api.post("/jobs", json={"project": project, "total_chunks": 100, "instance_id": "t"}).raise_for_status()
    jobs = api.get("/jobs").json()
    [identifier] = [job["id"] for job in jobs["active"] if job["project"] == project]
    return str(identifier)


def field(page: Page, name: str) -> Locator:
    return page.locator(f'[data-field="{name}"]')


def jobs_in(page: Page, which: str) -> Locator:
    return page.get_by_role("list", name=f"{which} jobs").get_by_role("listitem")


def answer_with(page: Page, path: str, status: int, body: dict[str, Any]) -> None:
    def answer(route: Route) -> None:
        route.fulfill(status=status, json=body)

    page.route(f"**{path}", answer)


@pytest.mark.parametrize(("path", "media_type"), SERVED)
def test_files_forbid_everything_but_the_services_own(server: Server, path: str, media_type: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["nothing.js", "index.html", "page.py", "__init__.py", "", "..%2Fstats.py", "%2E%2E/stats.py"]
)
def test_nothing_else_is_served(server: Server, name: str) -> None:
    answer = httpx.get(f"{server.url}/static/{name}")
    assert answer.status_code == 404
    assert "/docs" in answer.json()["detail"]


def test_shows_a_ready_service(quiet_page: Page, api: httpx.Client) -> None:
    health = api.get("/health").json()
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    expect(field(quiet_page, "version")).to_have_text(health["version"])
    expect(field(quiet_page, "embed-model")).to_have_text(health["models"]["embed"])
    expect(field(quiet_page, "dimensions")).to_have_text(str(health["dimensions"]))
    expect(quiet_page.get_by_text("No jobs.")).to_be_visible()


def test_several_models_are_all_named(browser: Browser) -> None:
    port = free_port()
    models = f"{GOLDEN / 'nvembed' / 'checkpoint'},{GOLDEN / 'qwen3' / 'embedding'}"
    command = vecmill_command(port, "--embed-model", models, "--rerank-model", str(GOLDEN / "qwen3" / "reranker"))
    with running(command, port, "/ready") as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        expect(field(page, "embed-model")).to_have_text("checkpoint, embedding")
        expect(field(page, "rerank-model")).to_have_text("reranker")


def test_links_lead_somewhere(quiet_page: Page, api: httpx.Client) -> None:
    quiet_page.goto("/")
    links = quiet_page.get_by_role("navigation").get_by_role("link")
    expect(links).to_have_count(4)
    for link in links.all():
        api.get(f"/{link.get_attribute('href')}").raise_for_status()


def test_counts_rise_with_the_work_done(quiet_page: Page, api: httpx.Client) -> None:
    before = api.get("/stats").json()["texts_embedded"]
    quiet_page.goto("/")
    expect(field(quiet_page, "texts-embedded")).to_have_text(f"{before:,}")
    api.post("/embed", json={"inputs": ["x"]}).raise_for_status()
    after = api.get("/stats").json()["texts_embedded"]
    assert after > before
    expect(field(quiet_page, "texts-embedded")).to_have_text(f"{after:,}")


def test_job_from_progress_to_recent_with_a_hostile_name(quiet_page: Page, api: httpx.Client) -> None:
    identifier = register(api, HOSTILE)
    quiet_page.goto("/")
    active = jobs_in(quiet_page, "Active")
    expect(active.locator('[data-field="project"]')).to_have_text(HOSTILE)

    api.post(f"/jobs/{identifier}/progress", json={"current": 40}).raise_for_status()
    expect(active).to_contain_text("40 of 100 chunks")
    expect(active).to_contain_text("40 %")
    expect(active.get_by_role("progressbar", name=HOSTILE)).to_have_js_property("value", 40)

    api.post(f"/jobs/{identifier}/complete").raise_for_status()
    recent = jobs_in(quiet_page, "Recent")
    expect(recent.locator('[data-field="project"]')).to_have_text(HOSTILE)
    expect(recent).to_contain_text("completed")
    expect(active).to_have_count(0)
    expect(quiet_page).to_have_title("vecmill")
    expect(quiet_page.locator("img")).to_have_count(0)


def test_cancels_a_job_and_clears_the_recent(quiet_page: Page, api: httpx.Client) -> None:
    register(api, "to be cancelled")
    quiet_page.goto("/")
    quiet_page.get_by_role("button", name="Cancel to be cancelled").click()
    recent = jobs_in(quiet_page, "Recent")
    expect(recent.locator('[data-field="status"]')).to_have_text("failed")
    expect(recent.locator('[data-field="error"]')).to_have_text("cancelled")
    heading = quiet_page.get_by_role("heading", name="Jobs")
    expect(heading).to_be_focused()
    assert api.get("/jobs").json()["active"] == []

    quiet_page.get_by_role("button", name="Clear recent").click()
    expect(recent).to_have_count(0)
    expect(heading).to_be_focused()
    assert api.get("/jobs").json()["recent"] == []


def test_says_when_a_cancellation_is_refused(page: Page, api: httpx.Client) -> None:
    identifier = register(api, "kept")
    answer_with(page, f"/jobs/{identifier}", 500, {})
    page.goto("/")
    page.get_by_role("button", name="Cancel kept").click()
    expect(page.get_by_text("Cancelling kept was refused (HTTP 500).")).to_be_visible()


def test_shows_how_far_loading_is(page: Page) -> None:
    answer_with(page, "/health", 503, {"status": "loading", "message": "reading weights", "percent": 43.7})
    page.goto("/")
    expect(page.get_by_role("status").first).to_have_text("Loading reading weights")
    expect(page.get_by_role("progressbar", name="Loading")).to_have_js_property("value", 43.7)
    expect(field(page, "loading-percent")).to_have_text("43 %")


def test_shows_why_loading_failed(page: Page) -> None:
    answer_with(page, "/health", 503, {"status": "failed", "message": "out of memory", "percent": None})
    page.goto("/")
    expect(page.get_by_role("status").first).to_have_text("Failed out of memory")
    expect(page.get_by_role("progressbar", name="Loading")).to_be_hidden()


def test_unknown_is_not_shown_as_zero(quiet_page: Page, api: httpx.Client) -> None:
    names = api.get("/stats").json()
    answer_with(quiet_page, "/stats", 200, dict.fromkeys(names))
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    tiles = quiet_page.locator(".tiles strong:visible, .tiles.wide [data-field$=memory]:visible")
    expect(tiles).to_have_text(["\N{EN DASH}"] * 10)
    expect(quiet_page.get_by_role("progressbar")).to_have_count(0)


def test_without_a_gpu_there_is_no_section_for_one(quiet_page: Page) -> None:
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    expect(quiet_page.get_by_role("heading", name="GPU")).to_be_hidden()


def test_says_when_the_service_is_gone_and_recovers(page: Page) -> None:
    page.goto("/")
    expect(field(page, "state")).to_have_text("Ready")
    page.context.set_offline(True)
    expect(field(page, "state")).to_have_text("Not reachable, retrying")
    page.context.set_offline(False)
    expect(field(page, "state")).to_have_text("Ready")


def test_asks_nothing_while_hidden(quiet_page: Page) -> None:
    quiet_page.clock.install()
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")

    turn = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    turn += " document.dispatchEvent(new Event('visibilitychange')); }"
    quiet_page.evaluate(turn, True)
    asked: list[str] = []
    quiet_page.on("request", lambda request: asked.append(request.url))
    quiet_page.clock.run_for(60_000)
    assert asked == []

    with quiet_page.expect_request("**/health"):
        quiet_page.evaluate(turn, False)


@pytest.mark.parametrize(
    ("cache", "shown"),
    [
        ({"entries": 12_345, "bytes": 3 * 2**30, "failing": False}, "12,345 kept in 3 GiB"),
        ({"entries": 1, "bytes": 1, "failing": True}, "cannot be used now"),
        (None, "nothing is kept"),
    ],
)
def test_shows_what_the_cache_holds(page: Page, cache: dict[str, Any] | None, shown: str) -> None:
    answer_with(page, "/stats", 200, {"texts_cached": 678, "cache": cache})
    page.goto("/")
    expect(field(page, "texts-cached")).to_have_text("678")
    expect(field(page, "cache-size")).to_have_text(shown)
