"""The dashboard's list of batches in a real browser against a real server."""

from __future__ import annotations

import json

import httpx
from playwright.sync_api import Page, expect

from tests.http.conftest import Server

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"


def create(server: Server, inputs: list[object], name: str) -> None:
    lines = (
        {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": {"input": value}}
        for number, value in enumerate(inputs)
    )
    content = "\n".join(map(json.dumps, lines)).encode()
    with httpx.Client(base_url=server.url) as client:
        files = {"file": ("input.jsonl", content)}
        file_id = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        client.post("/v1/batches", json=body | {"metadata": {"name": name}}).raise_for_status()


def test_a_batch_with_a_hostile_name_and_a_failed_line(quiet_page: Page, server: Server) -> None:
    create(server, ["a", "b", []], HOSTILE)
    quiet_page.goto("/")
    batch = quiet_page.get_by_role("list", name="Batches").get_by_role("listitem").filter(has_text=HOSTILE)
    expect(batch.locator('[data-field="status"]')).to_have_text("completed")
    expect(batch).to_contain_text("/v1/embeddings · 3 of 3 lines · 1 failed")
    expect(batch.get_by_role("button")).to_have_count(0)
    expect(quiet_page).to_have_title("vecmill")
    expect(quiet_page.locator("img")).to_have_count(0)


def test_a_batch_that_cannot_be_run_says_why(quiet_page: Page, server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        files = {"file": ("input.jsonl", b"{}\n")}
        file_id = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        client.post("/v1/batches", json=body | {"metadata": {"name": "broken"}}).raise_for_status()
    quiet_page.goto("/")
    batch = quiet_page.get_by_role("list", name="Batches").get_by_role("listitem").filter(has_text="broken")
    expect(batch.locator('[data-field="error"]')).to_have_text(
        "line 1: `custom_id` must be a string that is not empty."
    )


def test_a_batch_is_followed_and_cancelled(quiet_page: Page, server: Server) -> None:
    create(server, [[f"{line} {number} " * 100 for number in range(64)] for line in range(200)], "to be cancelled")
    quiet_page.goto("/")
    batch = quiet_page.get_by_role("list", name="Batches").get_by_role("listitem").filter(has_text="to be cancelled")
    expect(batch.get_by_role("progressbar", name="Progress of to be cancelled")).to_have_js_property("max", 200)
    quiet_page.get_by_role("button", name="Cancel to be cancelled").click()
    expect(batch.locator('[data-field="status"]')).to_have_text("cancelled")
    expect(quiet_page.get_by_role("heading", name="Batches")).to_be_focused()


def test_says_when_a_cancellation_is_refused(page: Page, server: Server) -> None:
    create(server, [[f"{line} {number} " * 100 for number in range(64)] for line in range(200)], "kept")
    page.route("**/v1/batches/*/cancel", lambda route: route.fulfill(status=500, json={}))
    page.goto("/")
    page.get_by_role("button", name="Cancel kept").click()
    expect(page.get_by_text("Cancelling kept was refused (HTTP 500).")).to_be_visible()
    page.unroute("**/v1/batches/*/cancel")
    page.get_by_role("button", name="Cancel kept").click()
    batch = page.get_by_role("list", name="Batches").get_by_role("listitem").filter(has_text="kept")
    expect(batch.locator('[data-field="status"]')).to_have_text("cancelled")
