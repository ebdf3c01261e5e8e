"""The dashboard's batches in a real browser against a real server: their progress, a file up, answers down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, expect

from tests.http.conftest import Server, field, row

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"
LONG = [[f"{line} {number} " * 100 for number in range(64)] for line in range(200)]


def lines(inputs: list[Any], url: str = "/v1/embeddings") -> bytes:
    requests = (
        {
            "custom_id": str(number),
            "method": "POST",
            "url": url,
            "body": value if isinstance(value, dict) else {"input": value},
        }
        for number, value in enumerate(inputs)
    )
    return "\n".join(map(json.dumps, requests)).encode()


def create(server: Server, content: bytes, name: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        files = {"file": ("input.jsonl", content)}
        file_id = client.post("/v1/files", files=files, data={"purpose": "batch"}).raise_for_status().json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        client.post("/v1/batches", json=body | {"metadata": {"name": name}}).raise_for_status()


def batch(page: Page, name: str) -> Locator:
    return row(page, "Batches", name)


def confirm(page: Page, action: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()


def downloaded(page: Page, button: str, folder: Path) -> list[dict[str, Any]]:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    download.value.save_as(folder / "answer.jsonl")
    assert download.value.suggested_filename.startswith("batch_")
    return [json.loads(line) for line in (folder / "answer.jsonl").read_text("utf-8").splitlines()]


def upload(page: Page, file: Path, name: str | None) -> None:
    page.get_by_role("button", name="Upload a file…").click()
    dialog = page.get_by_role("dialog", name="Upload a batch")
    dialog.get_by_label("File").set_input_files(file)
    if name is not None:
        dialog.get_by_label("Name").fill(name)
    dialog.get_by_role("button", name="Upload and start").click()


def test_a_file_is_uploaded_and_its_answers_and_errors_come_down(quiet_page: Page, tmp_path: Path) -> None:
    file = tmp_path / "three lines.jsonl"
    file.write_bytes(lines(["a", "b", []]))
    quiet_page.goto("/")
    upload(quiet_page, file, HOSTILE)
    shown = batch(quiet_page, HOSTILE)
    expect(field(shown, "status")).to_have_text("completed")
    expect(shown).to_contain_text("3 of 3 lines · 1 failed")
    answers = downloaded(quiet_page, f"Output of {HOSTILE}", tmp_path)
    assert [len(one["response"]["body"]["data"][0]["embedding"]) for one in answers] == [384, 384]
    errors = downloaded(quiet_page, f"Errors of {HOSTILE}", tmp_path)
    assert [one["custom_id"] for one in errors] == ["2"]
    expect(quiet_page).to_have_title("vecmill")
    expect(quiet_page.locator("img")).to_have_count(0)


def test_the_endpoint_is_the_one_that_the_file_names(quiet_page: Page, tmp_path: Path) -> None:
    file = tmp_path / "ranking.jsonl"
    file.write_bytes(lines([{"query": "a", "documents": ["b", "c"]}], "/v1/rerank"))
    quiet_page.goto("/")
    upload(quiet_page, file, None)
    shown = batch(quiet_page, "ranking.jsonl")
    expect(shown).to_contain_text("/v1/rerank")
    expect(field(shown, "status")).to_have_text("completed")


def test_a_batch_that_cannot_be_run_says_why(quiet_page: Page, server: Server) -> None:
    create(server, b"{}\n", "broken")
    quiet_page.goto("/")
    problem = "line 1: `custom_id` must be a string that is not empty."
    expect(field(batch(quiet_page, "broken"), "problem")).to_have_text(problem)
    quiet_page.get_by_role("button", name="broken", exact=True).click()
    expect(quiet_page.get_by_role("dialog", name="broken")).to_contain_text(problem)


def test_a_refused_upload_says_why_and_stays_open(page: Page, tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_bytes(lines(["a"]))
    page.route("**/v1/files", lambda route: route.fulfill(status=507, json={"error": {"message": "The disk is full."}}))
    page.goto("/")
    upload(page, tmp_path / "input.jsonl", "too much")
    expect(page.get_by_role("dialog").get_by_role("status")).to_have_text("This did not work: The disk is full.")


def test_a_batch_is_followed_and_cancelled(quiet_page: Page, server: Server) -> None:
    name = "to be cancelled"
    create(server, lines(LONG), name)
    quiet_page.goto("/")
    shown = batch(quiet_page, name)
    expect(shown.get_by_role("progressbar", name=f"Progress of {name}")).to_have_js_property("max", 200)
    quiet_page.get_by_role("button", name=f"Cancel {name}").click()
    confirm(quiet_page, "Cancel the batch")
    expect(field(shown, "status")).to_have_text("cancelled")
    expect(quiet_page.get_by_role("heading", name="Batches")).to_be_focused()


def test_says_when_a_cancellation_is_refused(page: Page, server: Server) -> None:
    create(server, lines(LONG), "kept batch")
    page.route("**/v1/batches/*/cancel", lambda route: route.fulfill(status=500, json={}))
    page.goto("/")
    page.get_by_role("button", name="Cancel kept batch").click()
    confirm(page, "Cancel the batch")
    expect(page.get_by_text("kept batch was not cancelled: HTTP 500")).to_be_visible()
    page.unroute("**/v1/batches/*/cancel")
    page.get_by_role("button", name="Cancel kept batch").click()
    confirm(page, "Cancel the batch")
    expect(field(batch(page, "kept batch"), "status")).to_have_text("cancelled")
