"""The dashboard for everyone: both themes, from a phone's width up, without jumps, by keyboard or screen reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.http.conftest import Server, field, replicas_of, row, show, snapshot_of

AXE = Path(__file__).parent / "page" / "node_modules" / "axe-core" / "axe.min.js"
TABS = ("now", "playground", "models", "machine")
SHIFTS = """window.shifts = [];
new PerformanceObserver(list => window.shifts.push(...list.getEntries().filter(one => !one.hadRecentInput)))
    .observe({type: "layout-shift", buffered: true});"""
SPILLS = """() => [...document.querySelectorAll("body *")].filter(one => one.checkVisibility()
    && one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".room, .scroll, .unseen, .u-wrap")).length"""


@pytest.fixture(scope="module")
def busy(server: Server) -> dict[str, Any]:
    """A snapshot with something in every place."""
    with httpx.Client(base_url=server.url) as client:
        for number in range(3):
            body = {"project": f"project {number}", "total_chunks": 100, "instance_id": "editor"}
            client.post("/jobs", json=body).raise_for_status()
        client.post("/v1/embeddings", json={"input": ["a", "b"]}).raise_for_status()
        client.post("/v1/embeddings", json={"input": "a", "dimensions": 10_000})
    snapshot = snapshot_of(server)
    ours = [job for job in snapshot["jobs"]["items"] if job["project"].startswith("project ")]
    snapshot["jobs"] |= {"items": ours, "counts": {"active": 1, "queued": 2}}  # without what other tests have left
    job = ours[0]
    job |= {"silent_seconds": 51, "given_up_in_seconds": 249}
    ended = {"id": "b", "status": "failed", "project": "", "error": "its client has not been heard of for 300 s"}
    snapshot["jobs"]["items"] += [job | ended, job | {"id": "c", "status": "completed", "project": "x" * 500}]
    batch = {  # ids that no batch of the server's own can begin with
        "id": "batch_shown",
        "endpoint": "/v1/embeddings",
        "model": None,
        "status": "completed",
        "errors": None,
        "input_file_id": "file-1",
        "output_file_id": "file-2",
        "error_file_id": "file-3",
        "created_at": 1_790_000_000,
        "request_counts": {"total": 1000, "completed": 990, "failed": 10},
        "metadata": None,
        "output_bytes": 123_456,
    }
    running = {"id": "batch_other", "status": "in_progress", "output_file_id": None, "error_file_id": None}
    snapshot["batches"] = {
        "counts": {"in_progress": 1},
        "total": 2,
        "page": 1,
        "pages": 1,
        "items": [batch, batch | running],
    }
    model = snapshot["models"][0]
    loading = {"id": "other/model", "state": "loading", "progress": 43, "message": "reading weights", "pinned": False}
    snapshot["models"] = [
        model | {"pinned": True},
        model | loading,
        model | loading | {"id": "third", "state": "unloaded"},
    ]
    snapshot["replicas"] = replicas_of(snapshot)
    snapshot["warnings"] = [{"name": "memory", "text": "Little memory is left: stop what else holds it."}]
    return snapshot


def serious(page: Page) -> list[str]:
    """What axe finds, as `rule: where`."""
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    bad = [one for one in found["violations"] if one["impact"] in ("serious", "critical", "moderate")]
    return [f"{one['id']}: {json.dumps([node['target'] for node in one['nodes'][:5]])}" for one in bad]


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.nightly)])
def test_axe_finds_nothing(
    browser: Browser, server: Server, busy: dict[str, Any], scheme: Literal["light", "dark"]
) -> None:
    # axe is added past the page's policy, which forbids every script but the server's own.
    with browser.new_context(base_url=server.url, color_scheme=scheme, bypass_csp=True) as context:
        page = context.new_page()
        show(page, busy)
        page.goto("/")
        expect(field(page, "state")).to_have_text("Ready")
        page.add_script_tag(path=AXE)
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
        found = {}
        for tab in TABS:
            page.locator(f"nav a[href='#{tab}']").click()
            if tab == "playground":
                page.get_by_role("button", name="Compare").click()
                page.get_by_role("button", name="Rank").click()
                expect(page.locator(".outcome table")).to_have_count(2)
            found[tab] = serious(page)
        page.locator("nav a[href='#now']").click()
        for opener in ("Upload a file…", "Cancel project 0", "project 0"):
            page.get_by_role("button", name=opener, exact=True).click()
            found[opener] = serious(page)
            page.keyboard.press("Escape")
        assert [problem for problems in found.values() for problem in problems] == []


def test_nothing_jumps_when_it_loads_and_while_work_comes_and_goes(
    page: Page, server: Server, busy: dict[str, Any]
) -> None:
    page.add_init_script(SHIFTS)
    page.set_viewport_size({"width": 1280, "height": 900})
    show(page, busy | {"warnings": [], "replicas": snapshot_of(server)["replicas"]})
    page.goto("/")
    expect(row(page, "Jobs", "project 0")).to_be_visible()
    expect(page.locator(".u-over").first).to_be_visible()
    page.unroute("**/dashboard/events?*")
    expect(row(page, "Batches", "batch_shown")).to_have_count(0)  # from here on the server's own
    identifier = httpx.post(f"{server.url}/jobs", json={"project": "new", "total_chunks": 9}).json()["job_id"]
    expect(row(page, "Jobs", "new")).to_be_visible()
    httpx.delete(f"{server.url}/jobs/{identifier}").raise_for_status()
    httpx.post(f"{server.url}/v1/embeddings", json={"input": ["c"] * 20}).raise_for_status()
    expect(field(row(page, "Jobs", "new"), "status")).to_have_text("failed")
    shifts = page.evaluate("window.shifts.map(one => one.value)")
    assert sum(shifts) < 0.05


@pytest.mark.parametrize("width", [360, pytest.param(800, marks=pytest.mark.nightly), 1920])
def test_nothing_is_cut_off(page: Page, busy: dict[str, Any], width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    show(page, busy)
    for tab in TABS:
        page.goto(f"/#{tab}")
        expect(page.locator(f"#panel-{tab}")).to_be_visible()
        if tab == "playground":
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#compare-outcome table")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(SPILLS) == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 4000


def test_a_keyboard_is_enough(page: Page, busy: dict[str, Any]) -> None:
    show(page, busy)
    page.goto("/")
    expect(row(page, "Jobs", "project 0")).to_be_visible()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
    tabs, tools = ["Now", "Playground", "Models", "Machine"], ["Search jobs", "State of the jobs shown"]
    assert reached[:9] == [*tabs, *tools, "List of jobs", "project 0", "Cancel project 0"]
    page.get_by_role("button", name="Cancel project 0").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("button", name="Leave it")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Cancel project 0")).to_be_focused()
    page.locator("nav a[href='#playground']").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Compare texts")).to_be_visible()


def test_nothing_moves_by_itself(page: Page, busy: dict[str, Any]) -> None:
    show(page, busy)
    page.goto("/")
    expect(row(page, "Jobs", "project 0")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
