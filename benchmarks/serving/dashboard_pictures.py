"""Pictures of the dashboard of a server at work, in both themes: those of the README, and any tab at any width.

A server on the bundled model is given what a machine at work is given: three indexing jobs, somebody who searches, a
batch, and now and then a request that it refuses. What is seen is what it did in that time.

    python -m benchmarks.serving.dashboard_pictures
    python -m benchmarks.serving.dashboard_pictures --minutes 1 --out /tmp/pictures --tabs now models --widths 360 1440
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import httpx
from benchmarks.lib.servers import free_port, running, vecmill_command
from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parents[2] / "docs" / "images"
HEIGHT = 1000
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
JOBS = {"vecmill": 4200, "cpython-stdlib": 9100, "notes": 1200, "website": 600}
SEARCHES = (
    "parse an ISO 8601 date",
    "copy a directory tree",
    "open a temporary file",
    "sort by key",
    "retry a request",
)
BATCH_LINES, TEXTS_A_LINE = 200, 4
TEXTS_A_REQUEST = 24


def chunks(seed: int) -> Iterator[str]:
    """Pieces of Python's own library, the same for a seed."""
    chosen = random.Random(seed)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text("utf-8", "replace") for path in sources[:150]]
    while True:
        text = chosen.choice(texts)
        start = chosen.randrange(max(1, len(text) - 700))
        yield text[start : start + chosen.randrange(150, 600)] or "pass"


@contextmanager
def work(url: str) -> Iterator[None]:
    """Clients that work until the block ends."""
    stopped = threading.Event()
    doings: list[Callable[[httpx.Client, threading.Event], None]] = [
        *(
            lambda client, stop, number=number, name=name, total=total: index(client, stop, name, total, number)
            for number, (name, total) in enumerate(JOBS.items())
        ),
        search,
        run_batch,
    ]

    def forever(do: Callable[[httpx.Client, threading.Event], None]) -> None:
        with httpx.Client(base_url=url, timeout=120) as client, suppress(httpx.TransportError):
            do(client, stopped)

    threads = [threading.Thread(target=forever, args=(do,), daemon=True) for do in doings]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(10)


def index(client: httpx.Client, stopped: threading.Event, project: str, total: int, seed: int) -> None:
    """As CodeCartographer does: register, wait for the turn, embed, report."""
    stopped.wait(0.3 * seed)
    body = {"project": project, "total_chunks": total, "instance_id": f"codecart-{4711 + seed}"}
    job = client.post("/jobs", json=body).json()["job_id"]
    source, done = chunks(seed), 0
    while not stopped.is_set() and done < total:
        if client.get(f"/jobs/{job}").json()["status"] != "active":
            stopped.wait(5)
            continue
        texts = [next(source) for _ in range(TEXTS_A_REQUEST)]
        if client.post("/embed", json={"inputs": texts, "job_id": job}).is_success:
            done = min(total, done + TEXTS_A_REQUEST)
            client.post(f"/jobs/{job}/progress", json={"current": done})
    if done == total:
        client.post(f"/jobs/{job}/complete")


def search(client: httpx.Client, stopped: threading.Event) -> None:
    """Somebody who asks twice a second, at times the same, and once a minute for what is not possible."""
    number = 0
    while not stopped.wait(0.5):
        text = f"{SEARCHES[number % len(SEARCHES)]} {random.Random(number).randrange(50)}"
        client.post("/v1/embeddings", json={"input": text, "input_type": "query"})
        if number % 120 == 30:
            client.post("/v1/embeddings", json={"input": text, "dimensions": 1536})
        number += 1


def run_batch(client: httpx.Client, stopped: threading.Event) -> None:
    """One that has long ended and one that goes on."""
    for name, lines in (("titles", 20), ("nightly", BATCH_LINES)):
        source = chunks(lines)
        requests = (
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"input": [next(source) for _ in range(TEXTS_A_LINE)]},
            }
            for number in range(lines)
        )
        file = {"file": ("input.jsonl", "\n".join(map(json.dumps, requests)).encode())}
        file_id = client.post("/v1/files", files=file, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        client.post("/v1/batches", json=body | {"metadata": {"name": name}})
        stopped.wait(20)


def take(browser: Browser, url: str, out: Path, tabs: Sequence[str], widths: Sequence[int]) -> Iterator[Path]:
    """A picture of each tab in each width and theme: of a window of `Now`, of the whole page of others."""
    for width in widths:
        for tab in tabs:
            for scheme in SCHEMES:
                size = "" if (tab, width) == ("now", widths[0]) else f"-{tab}-{width}"
                path = out / f"dashboard{size}-{scheme}.png"
                picture(browser, f"{url}/#{tab}", width, scheme, path, whole=bool(size))
                yield path


def picture(
    browser: Browser, url: str, width: int, scheme: Literal["light", "dark"], path: Path, *, whole: bool
) -> None:
    viewport = {"width": width, "height": HEIGHT}
    with browser.new_context(viewport=viewport, color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(url)
        page.locator("main").wait_for()
        if url.endswith("playground"):
            page.get_by_role("button", name="Compare").click()
            page.get_by_role("button", name="Rank").click()
            page.locator(".outcome table").nth(1).wait_for(timeout=60_000)
        page.wait_for_timeout(3000)
        page.screenshot(path=path, full_page=whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16, help="of work before the pictures; a chart has 15")
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--tabs", nargs="+", default=["now"], choices=["now", "playground", "models", "machine"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1280])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    port = free_port()
    with (
        running(vecmill_command(port), port, "/ready", {"CACHE_MAX_BYTES": "1000000000"}) as server,
        work(server.url),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        time.sleep(60 * arguments.minutes)
        for path in take(browser, server.url, arguments.out, arguments.tabs, arguments.widths):
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
