"""The dashboard in a real browser against a real server.

Knows what a person sees and presses. Does not know the page's scripts: it is only ever looked at from outside, by role,
label and the `data-field` names of its elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.http.conftest import Server, field, replicas_of, row, show, snapshot_of
from tests.redis_server import redis_server
from tests.servers import free_port, running, vecmill_command
from tests.tools.proxy_config.proxies import program
from vecmill.http import dashboard

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"
TURNED = "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe \N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}"
UNKNOWN = "\N{EN DASH}"
MOST_BYTES = 150_000

MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
FOLDER = files(dashboard)

SERVED = [
    ("/", "text/html; charset=utf-8"),
    *(
        (f"/static/{file.name}", MEDIA_TYPES[Path(file.name).suffix])
        for folder in (FOLDER, FOLDER.joinpath("vendor"))
        for file in folder.iterdir()
        if Path(file.name).suffix in MEDIA_TYPES
    ),
]

TURN = """hidden => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def api(server: Server) -> Iterator[httpx.Client]:
    """A client of the server, with no jobs left on it from other tests."""
    with httpx.Client(base_url=server.url) as client:
        while open_jobs := [job for state in ("active", "queued") for job in client.get("/jobs").json()[state]]:
            for job in open_jobs:
                client.delete(f"/jobs/{job['id']}").raise_for_status()
        client.delete("/jobs/recent").raise_for_status()
        yield client


def register(api: httpx.Client, project: str) -> str:
    body = {"project": project, "total_chunks": 100, "instance_id": "editor"}
    answer = api.post("/jobs", json=body).raise_for_status()
    return str(answer.json()["job_id"])


def confirm(page: Page, action: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()


def test_all_files_are_small_and_forbid_everything_but_the_services_own(server: Server) -> None:
    size = 0
    with httpx.Client(base_url=server.url) as client:
        for path, media_type in SERVED:
            answer = client.get(path)
            size += len(answer.content)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == media_type
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= {
                *policy
            }
            assert "unsafe" not in answer.headers["content-security-policy"]
    assert size < MOST_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "index.html",
        "page.py",
        "__init__.py",
        "types.d.ts",
        "uPlot.LICENSE",
        "",
        "..%2Fstats.py",
        "%2E%2E/stats.py",
    ],
)
def test_nothing_else_is_served(server: Server, name: str) -> None:
    answer = httpx.get(f"{server.url}/static/{name}")
    assert answer.status_code == 404
    assert "/docs" in answer.json()["detail"]


def test_shows_a_ready_service_and_its_tabs(quiet_page: Page, api: httpx.Client) -> None:
    health = api.get("/health").json()
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    expect(field(quiet_page, "version")).to_have_text(health["version"])
    expect(quiet_page.get_by_text("No jobs.")).to_be_visible()
    tabs = quiet_page.get_by_role("navigation", name="Dashboard").get_by_role("link")
    expect(tabs).to_have_text(["Now", "Playground", "Models", "Machine"])
    headings = {"Now": "Jobs", "Playground": "Compare texts", "Models": "Models", "Machine": "Memory"}
    for name, heading in headings.items():
        tabs.get_by_text(name, exact=True).click()
        expect(quiet_page.locator("nav [aria-current=page]")).to_have_text(name)
        expect(quiet_page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        expect(quiet_page.get_by_role("heading", name="Jobs")).to_be_visible(visible=name == "Now")
    expect(quiet_page).to_have_title("Machine · vecmill")
    quiet_page.go_back()
    expect(quiet_page.locator("nav [aria-current=page]")).to_have_text("Models")
    quiet_page.reload()
    expect(quiet_page.get_by_role("heading", name="sentence-transformers/all-MiniLM-L6-v2")).to_be_visible()
    expect(quiet_page.get_by_text("384", exact=True)).to_be_visible()


@pytest.fixture
def below_a_path(server: Server, tmp_path: Path) -> Iterator[str]:
    """The server's address at an nginx that serves it below a path."""
    port = free_port()
    folders = " ".join(f"{name}_temp_path {name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(f"""
        daemon off; pid pid; error_log stderr; events {{}}
        http {{
            access_log off; {folders}
            server {{
                listen 127.0.0.1:{port};
                location /below/ {{ proxy_pass {server.url}/; proxy_buffering off; }}
            }}
        }}
    """)
    command = [program("nginx"), "-p", f"{tmp_path}/", "-c", "nginx.conf", "-e", "stderr"]
    with running(command, port, "/below/ready") as proxy:
        yield f"{proxy.url}/below"


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/"])
def test_is_found_by_its_name_also_below_a_path(browser: Browser, below_a_path: str, path: str) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(below_a_path + path)
        expect(page).to_have_url(f"{below_a_path}/")
        expect(field(page, "state")).to_have_text("Ready")


def test_a_job_live_from_progress_to_its_end_with_a_hostile_name(quiet_page: Page, api: httpx.Client) -> None:
    identifier = register(api, HOSTILE)
    quiet_page.goto("/")
    job = row(quiet_page, "Jobs", HOSTILE)
    expect(field(job, "name")).to_have_text(HOSTILE)
    expect(field(job, "about")).to_have_text("editor")
    expect(field(job, "status")).to_have_text("active")

    api.post(f"/jobs/{identifier}/progress", json={"current": 40}).raise_for_status()
    expect(job).to_contain_text("40 of 100 chunks · 40 %")
    expect(job.get_by_role("progressbar", name=f"Progress of {HOSTILE}")).to_have_js_property("value", 40)

    job.get_by_role("button", name=HOSTILE, exact=True).click()
    dialog = quiet_page.get_by_role("dialog", name=HOSTILE)
    expect(dialog).to_contain_text(identifier)
    api.post(f"/jobs/{identifier}/complete").raise_for_status()
    expect(dialog).to_contain_text("completed")
    dialog.get_by_role("button", name="Close").click()
    expect(field(job, "status")).to_have_text("completed")
    expect(job.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(quiet_page).to_have_title("vecmill")
    expect(quiet_page.locator("img")).to_have_count(0)


def test_any_name_is_shown_in_its_place_and_an_empty_one_is_called_so(page: Page, api: httpx.Client) -> None:
    names = ["", "\N{ZERO WIDTH SPACE}\N{WORD JOINER} ", TURNED, "x" * 500]
    for name in names:
        register(api, name)
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto("/")
    shown = ["(no name)", "(no name)", *names[2:]]
    expect(page.locator('#jobs-table [data-field="name"]')).to_have_text(shown)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert max(page.locator("#jobs-table tbody tr").evaluate_all("rows => rows.map(row => row.offsetHeight)")) < 200
    for name in shown[1:]:
        page.get_by_role("button", name=f"Cancel {name}").first.click()
        expect(page.get_by_role("dialog")).to_contain_text(f"Cancel {name}?")
        confirm(page, "Cancel the job")
        expect(page.get_by_text(f"{name} is cancelled.").first).to_be_visible()


def test_cancelling_asks_first(quiet_page: Page, api: httpx.Client) -> None:
    register(api, "to be cancelled")
    quiet_page.goto("/")
    job = row(quiet_page, "Jobs", "to be cancelled")
    cancel = job.get_by_role("button", name="Cancel to be cancelled")
    cancel.click()
    confirm(quiet_page, "Leave it")
    assert len(api.get("/jobs").json()["active"]) == 1
    expect(cancel).to_be_focused()

    cancel.click()
    confirm(quiet_page, "Cancel the job")
    expect(field(job, "status")).to_have_text("failed")
    expect(field(job, "problem")).to_have_text("cancelled")
    expect(quiet_page.get_by_role("heading", name="Jobs")).to_be_focused()
    assert api.get("/jobs").json()["active"] == []

    quiet_page.get_by_role("button", name="Forget ended").click()
    confirm(quiet_page, "Forget them")
    expect(job).to_have_count(0)
    assert api.get("/jobs").json()["recent"] == []


def test_says_why_a_cancellation_was_refused(page: Page, api: httpx.Client) -> None:
    identifier = register(api, "kept")
    page.route(f"**/jobs/{identifier}", lambda route: route.fulfill(status=500, json={"detail": "the disk is full"}))
    page.goto("/")
    page.get_by_role("button", name="Cancel kept").click()
    confirm(page, "Cancel the job")
    expect(page.get_by_text("kept was not cancelled: the disk is full")).to_be_visible()


def test_many_jobs_are_pages_that_can_be_searched(quiet_page: Page, api: httpx.Client) -> None:
    for number in range(60):
        register(api, f"project {number}")
    quiet_page.goto("/")
    pager = quiet_page.locator("#jobs-pager")
    rows = quiet_page.locator("#jobs-table tbody tr")
    expect(pager).to_contain_text(f"1{UNKNOWN}25 of 60 jobs")
    expect(rows).to_have_count(25)
    assert quiet_page.evaluate("document.documentElement.scrollHeight") < 3000
    quiet_page.get_by_role("button", name="Next page of jobs").click()
    expect(pager).to_contain_text(f"26{UNKNOWN}50 of 60 jobs")
    search = quiet_page.get_by_role("searchbox", name="Search jobs")
    search.fill("PROJECT 4")
    expect(pager).to_contain_text("11 jobs")  # 4 and 40 to 49
    quiet_page.get_by_role("combobox", name="State of the jobs shown").select_option("completed")
    expect(quiet_page.get_by_text("No job is like this.")).to_be_visible()
    quiet_page.get_by_role("button", name="Show all jobs").click()
    expect(pager).to_contain_text(f"1{UNKNOWN}25 of 60 jobs")


def changed(server: Server, **changes: Any) -> dict[str, Any]:
    return snapshot_of(server) | changes


def test_a_silent_job_says_when_it_is_given_up(page: Page, api: httpx.Client, server: Server) -> None:
    register(api, "quiet")
    snapshot = snapshot_of(server)
    snapshot["jobs"]["items"][0] |= {"silent_seconds": 51.2, "given_up_in_seconds": 248.8, "texts_per_second": 0}
    show(page, snapshot)
    page.goto("/")
    job = row(page, "Jobs", "quiet")
    expect(job).to_contain_text("silent for 51 s, given up in 4 min 9 s")
    expect(field(job, "rate")).to_have_text("0 texts/s")
    expect(field(job, "left")).to_have_text(UNKNOWN)
    page.set_viewport_size({"width": 360, "height": 700})
    expect(field(job, "pace")).to_have_text("0 texts/s")


LOADING = {"status": "loading", "status_text": "reading weights", "ready": False, "percent": 43.7, "models": []}


def test_shows_how_far_loading_is(page: Page, server: Server) -> None:
    show(page, changed(server, **LOADING))
    page.goto("/")
    expect(page.get_by_role("status").first).to_have_text("Loading reading weights")
    expect(page.get_by_role("progressbar", name="Loading")).to_have_js_property("value", 43.7)
    expect(field(page, "loading-percent")).to_have_text("43 %")


def test_shows_why_loading_failed_and_what_is_wrong(page: Page, server: Server) -> None:
    warnings = [{"name": "memory", "text": "Little memory is left: stop what else holds it."}]
    show(page, changed(server, status="failed", status_text="out of memory", warnings=warnings))
    page.goto("/")
    expect(page.get_by_role("status").first).to_have_text("Failed out of memory")
    expect(page.get_by_role("list", name="Warnings").get_by_role("listitem")).to_have_text(warnings[0]["text"])


def emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: emptied(one) for name, one in value.items()}
    return None


def test_unknown_is_not_shown_as_zero(quiet_page: Page, server: Server) -> None:
    now = emptied(snapshot_of(server)["now"])
    show(quiet_page, changed(server, now=now, jobs=None, batches=None, who=None, models=None, machine=None))
    quiet_page.goto("/")
    numbers = quiet_page.locator(".chart .numbers strong")
    expect(numbers).to_have_count(6)
    for text in numbers.all_text_contents():
        assert re.findall(r"\d+", text.replace("p95", "")) == []
        assert UNKNOWN in text
    expect(quiet_page.get_by_text("The list of jobs is not available.")).to_be_visible()
    expect(quiet_page.get_by_text("The list of batches is not available.")).to_be_visible()
    quiet_page.get_by_role("link", name="Machine", exact=True).click()
    expect(quiet_page.get_by_text("The memory is shown to keys with the scope admin.")).to_be_visible()
    assert "0" not in quiet_page.locator("#device").inner_text()


def test_zero_is_zero(page: Page, server: Server) -> None:
    snapshot = snapshot_of(server)
    snapshot["now"] |= {"texts_per_second": 0.0, "tokens_per_second": 0.0, "errors": 0, "refused": 0}
    snapshot["now"]["queue"] = {lane: {"texts": 0, "tokens": 0} for lane in ("interactive", "bulk")}
    show(page, snapshot | {"refusals": []})
    page.goto("/")
    expect(page.locator(".chart", has_text="Throughput").locator("strong")).to_have_text("0 texts/s")
    expect(page.locator(".chart", has_text="Waiting").locator("strong")).to_have_text("0 texts")
    expect(field(page, "refusals-summary")).to_have_text(
        "0 errors of the server's own · 0 refused for the load · since the start"
    )


def test_replicas_are_shown_where_there_are_several(quiet_page: Page, server: Server) -> None:
    snapshot = snapshot_of(server)
    several = replicas_of(snapshot)
    several["items"][2] |= {"replica": HOSTILE, "models": [{"id": TURNED}]}
    show(quiet_page, snapshot | {"replicas": several})
    quiet_page.goto("/")
    expect(field(quiet_page, "replicas-summary")).to_have_text(
        "together: 2 of 3 ready · 1,235 texts/s · 70 texts waiting"
    )
    expect(quiet_page.get_by_text("2 records in Redis cannot be read.")).to_be_visible()
    own, other, gone = (row(quiet_page, "Replicas", text) for text in ("this one", "1,235", HOSTILE))
    expect(own).to_contain_text("ready")
    expect(own.get_by_role("link")).to_have_count(0)
    expect(other.get_by_role("link", name="two")).to_have_attribute("href", "http://two.example:8080")
    expect(other).to_contain_text("99.0another version")
    expect(gone).to_contain_text("gone")
    expect(gone.locator("time")).to_have_attribute("datetime", "2026-09-21T14:13:20.000Z")
    expect(quiet_page.locator("img")).to_have_count(0)
    for name in ("Load", "Who uses it", "Refused and failed"):
        expect(quiet_page.get_by_role("heading", name=f"{name}, this replica", exact=True)).to_be_visible()
    expect(quiet_page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()  # they are everybody's


def test_one_server_alone_is_no_list_of_replicas(page: Page, server: Server) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", name="Load", exact=True)).to_be_visible()
    expect(page.get_by_role("heading", name="Replicas")).to_have_count(0)


def test_replicas_that_are_not_known_are_no_empty_list(page: Page, server: Server) -> None:
    snapshot = snapshot_of(server)
    snapshot["replicas"] |= {"problem": "Redis cannot be used."}
    show(page, snapshot)
    page.goto("/")
    expect(page.get_by_text("Redis cannot be used.")).to_be_visible()
    expect(row(page, "Replicas", "this one")).to_be_visible()


@pytest.mark.nightly
def test_two_servers_at_one_redis_show_each_other(browser: Browser, tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, ExitStack() as stack:
        shared = {"REDIS_URL": url, "STATE_DIR": str(tmp_path)}
        one, two = (
            stack.enter_context(running(vecmill_command(port, "--replica", name), port, "/", shared))
            for name, port in (("one", free_port()), ("two", free_port()))
        )
        with browser.new_context(base_url=one.url) as context:
            page = context.new_page()
            page.goto("/")
            expect(row(page, "Replicas", "this one")).to_contain_text("one", timeout=20_000)
            expect(row(page, "Replicas", "two")).to_contain_text("ready", timeout=20_000)
            two.process.terminate()
            expect(page.get_by_role("heading", name="Replicas")).to_have_count(0, timeout=20_000)


def test_each_number_says_what_it_is_of(page: Page, api: httpx.Client, server: Server) -> None:
    register(api, "first")
    register(api, "second")
    snapshot = snapshot_of(server)
    now = snapshot["now"] | {"errors": 1, "refused": 2}
    now["batch_fill"] = {"tokens_per_pass": 3661.0, "knee_tokens": 512.0, "ratio": 7.15}
    now["queue"] = {"interactive": {"texts": 1, "tokens": 1}, "bulk": {"texts": 0, "tokens": 0}}
    now["cache"] = {"hit_ratio": 0.5, "tokens_saved": 12_345, "entries": 1, "bytes": 2048, "max_bytes": None}
    waiting = {"status": "queued", "position": 1, "waiting_seconds": 75, "started_at": None}
    snapshot["jobs"]["items"][1] |= waiting
    user = {
        "key": None,
        "client": "editor",
        "texts_per_second": 1,
        "tokens_per_second": 9,
        "requests": 1,
        "last_seen": 1,
    }
    who = [user | {"job": "job-1", "job_name": None}, user | {"job": "job-2", "job_name": ""}]
    show(page, snapshot | {"now": now, "who": who})
    page.goto("/")
    numbers = page.locator(".chart .numbers")
    expect(numbers.nth(3)).to_have_text("1 textsearches 1 · bulk 0 · 1 token")
    expect(numbers.nth(4)).to_contain_text("12.3K tokens saved since the start · 1 kept in 2 KiB")
    expect(numbers.nth(5)).to_contain_text("full: 7.2 times the knee of 512 tokens")
    counts = "1 error of the server's own · 2 refused for the load · since the start"
    expect(field(page, "refusals-summary")).to_have_text(counts)
    jobs = page.locator("#jobs-table tbody tr td:nth-child(6)")
    expect(jobs.nth(0).locator("time")).to_be_visible()
    expect(jobs.nth(1)).to_have_text("waiting for 1 min 15 s")
    expect(page.locator("#who-table tbody td:nth-child(2)")).to_have_text(["job-1", "(no name)"])


def test_load_who_and_refusals_follow_the_work_done(quiet_page: Page, api: httpx.Client) -> None:
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    secret = "a text that must not be shown"
    api.post("/v1/embeddings", json={"input": [secret] * 3}).raise_for_status()
    refused = api.post("/v1/embeddings", json={"input": secret, "dimensions": 10_000})
    assert refused.status_code == 400
    throughput = quiet_page.locator(".chart", has_text="Throughput")
    expect(throughput.locator("strong")).to_have_text(re.compile(r"^(< )?[0-9.]+ texts/s$"))
    expect(throughput.get_by_role("img", name=re.compile("^Throughput over the last 15 minutes"))).to_be_visible()
    expect(row(quiet_page, "Who uses it", "127.0.0.1").first).to_be_visible()
    refusal = row(quiet_page, "Refused and failed", refused.headers["x-request-id"])
    expect(refusal).to_contain_text("400")
    expect(refusal).to_contain_text("/v1/embeddings")
    moment = refusal.locator("time")
    assert re.fullmatch(r"\d+ \w+, \d\d:\d\d:\d\d", moment.inner_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", moment.get_attribute("datetime") or "")
    assert secret not in quiet_page.content()


def test_the_charts_can_be_read_by_hovering(quiet_page: Page, server: Server) -> None:
    at = [1_790_000_000 + 10 * step for step in range(90)]
    quiet_page.clock.install(time=at[-1])
    series = {"texts_per_second": [*([7.5] * 60), *([None] * 30)], "interactive_p95_ms": [12.0] * 90}
    asked: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(json={"step_seconds": 10, "at": at, "series": series})

    quiet_page.route("**/dashboard/history?*", answer)
    show(quiet_page, snapshot_of(server))
    quiet_page.goto("/")
    chart = quiet_page.locator(".chart", has_text="Throughput")
    expect(chart.locator(".legend")).to_have_text("7.5 texts/s")
    box = chart.locator(".u-over").bounding_box()
    assert box
    quiet_page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    expect(chart.locator(".legend")).to_have_text(re.compile(r"^\d+ \w+, \d\d:\d\d:\d\d: 7.5 texts/s$"))
    searches = quiet_page.locator(".chart", has_text="searches/s").locator(".legend")
    expect(searches).to_have_text(re.compile(f": p95 12 ms, p50 {UNKNOWN}$"))
    quiet_page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    expect(chart.locator(".legend")).to_have_text(re.compile(f": {UNKNOWN}$"))
    quiet_page.get_by_text("24 hours").click()
    expect(chart.get_by_role("img", name=re.compile("24 hours"))).to_be_visible()
    assert asked[-1].endswith("span=24h")


def test_without_a_gpu_none_is_shown(quiet_page: Page) -> None:
    quiet_page.goto("/#machine")
    expect(quiet_page.get_by_text("none in use")).to_be_visible()
    expect(quiet_page.get_by_text("GPU clock")).to_have_count(0)
    expect(quiet_page.locator("#memory figcaption")).to_contain_text("GiB in all")
    expect(quiet_page.locator("#memory dt")).to_have_text(["this server", "others", "page cache", "free"])


def test_memory_is_one_bar_whose_parts_are_named(page: Page, server: Server) -> None:
    sizes = {"total": 128, "ours": 32, "others": 16, "page_cache": 48, "free": 32, "floor": 12}
    memory = {f"{name}_bytes": size * 2**30 for name, size in sizes.items()}
    gpu = {
        "name": "NVIDIA GB10",
        "utilization_ratio": 0.0,
        "sm_clock_mhz": 612,
        "clock_verdict": "throttled",
        "clock_text": "throttled by power",
        "power_watts": None,
        "temperature_c": 84,
    }
    machine = {
        "memory": {"unified": True, **memory, "gpu": None},
        "gpu": gpu,
        "cpu": {"cores": 20, "process_ratio": 0.5},
    }
    show(page, changed(server, machine=machine))
    page.goto("/#machine")
    expect(page.locator("#memory dd")).to_have_text(["32 GiB", "16 GiB", "48 GiB", "32 GiB"])
    widths = page.locator(".stack-bar span").evaluate_all("spans => spans.map(one => one.offsetWidth)")
    assert [round(32 * width / widths[0]) for width in widths] == [32, 16, 48, 32]
    expect(page.locator("#memory")).to_contain_text("12 GiB")
    tiles = page.locator("#device > div")
    expect(tiles.nth(0)).to_contain_text("0 %")
    expect(tiles.nth(1)).to_contain_text("612 MHz")
    expect(tiles.nth(1)).to_contain_text("throttled by power")
    expect(tiles.nth(2)).to_contain_text(UNKNOWN)
    expect(tiles.nth(3)).to_contain_text("84 °C")


def test_what_programs_read_is_shown_in_the_page(quiet_page: Page) -> None:
    quiet_page.goto("/#machine")
    shown = quiet_page.locator("#page-shown")
    expect(shown).to_contain_text("# HELP ")
    for name, text in {"Models": "all-MiniLM-L6-v2", "Health": '"status": "ok"', "Capabilities": "batch"}.items():
        quiet_page.locator("#pages").get_by_text(name, exact=True).click()
        expect(shown).to_contain_text(text)
        expect(shown.get_by_role("button", name="Copy")).to_be_visible()


def test_one_stream_in_place_of_polls(quiet_page: Page) -> None:
    asked: list[str] = []
    quiet_page.on("request", lambda request: asked.append(request.url))
    quiet_page.goto("/")
    before = field(quiet_page, "uptime").inner_text()
    expect(field(quiet_page, "uptime")).not_to_have_text(before)
    before = field(quiet_page, "uptime").inner_text()
    expect(field(quiet_page, "uptime")).not_to_have_text(before)
    dynamic = [url.partition("?")[0].rpartition("/")[2] for url in asked if "/static/" not in url]
    assert sorted(name for name in dynamic if name) == ["events", "history"]


def test_snapshots_are_polled_where_no_stream_comes_through(page: Page) -> None:
    page.route("**/dashboard/events?*", lambda route: route.fulfill(status=503, json={"detail": "too many readers"}))
    with page.expect_request("**/dashboard/snapshot?*"):
        page.goto("/")
    expect(field(page, "state")).to_have_text("Ready")


def test_says_why_it_is_not_answered(page: Page) -> None:
    refused = {"detail": "This server does not answer to the name 'spark'."}
    page.route("**/dashboard/*", lambda route: route.fulfill(status=403, json=refused))
    page.goto("/")
    expect(page.get_by_role("status").first).to_have_text(f"Refused, retrying {refused['detail']}")


def test_asks_nothing_while_hidden(quiet_page: Page) -> None:
    quiet_page.clock.install()
    quiet_page.goto("/")
    expect(field(quiet_page, "state")).to_have_text("Ready")
    quiet_page.evaluate(TURN, True)
    asked: list[str] = []
    quiet_page.on("request", lambda request: asked.append(request.url))
    quiet_page.clock.run_for(60_000)
    assert asked == []
    quiet_page.route("**/dashboard/events?*", lambda route: None)  # which takes its time
    with quiet_page.expect_request("**/dashboard/events?*"):
        quiet_page.evaluate(TURN, False)
    quiet_page.clock.run_for(3000)
    expect(field(quiet_page, "state")).to_have_text("Ready")
    expect(quiet_page.locator("#stale")).to_be_hidden()
    quiet_page.clock.run_for(5000)
    expect(quiet_page.locator("#stale")).to_be_visible()


def test_says_how_old_it_is_when_the_network_is_gone(page: Page) -> None:
    page.clock.install()
    page.goto("/")
    expect(field(page, "state")).to_have_text("Ready")
    page.context.set_offline(True)
    expect(field(page, "state")).to_have_text("Not reachable, retrying")
    page.clock.fast_forward("03:10")
    expect(page.get_by_text("3 min old: the server does not answer.")).to_be_visible()
    page.context.set_offline(False)
    expect(field(page, "state")).to_have_text("Ready")
    expect(page.get_by_text("the server does not answer")).to_be_hidden()


@pytest.fixture
def idle(page: Page) -> Callable[[], float]:
    """Seconds of the processor that the page's thread has taken."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # not what other processes take meanwhile

    def taken() -> float:
        metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
        return float(metrics["TaskDuration"])

    return taken


def test_a_page_left_open_takes_next_to_nothing(page: Page, idle: Callable[[], float]) -> None:
    page.goto("/")
    expect(field(page, "uptime")).not_to_be_empty()
    page.wait_for_timeout(500)
    before = idle()
    page.wait_for_timeout(2500)  # one snapshot at the least
    assert idle() - before < 0.25


def test_models_are_loaded_unloaded_and_pulled_where_that_is_possible(quiet_page: Page, server: Server) -> None:
    snapshot = snapshot_of(server)
    [model] = snapshot["models"]
    loaded = model | {"pinned": False, "memory_bytes": 8 * 2**30, "last_used": None, "aliases": ["embed"]}
    pulling = {"id": "org/pulled", "task": None, "state": "pulling", "progress": 43, "message": "2 of 5 files"}
    unloaded = model | {"id": "org/other", "state": "unloaded", "pinned": False, "memory_bytes": None}
    failed = {"id": "org/failed", "task": "rerank", "state": "failed", "message": "no room", "pinned": False}
    gone = {"id": "org/gone", "task": None, "state": "failed", "message": "no such repository", "revision": "v2"}
    show(quiet_page, snapshot | {"models": [loaded, pulling, unloaded, failed, gone], "is_admin": True})
    sent: list[Any] = []

    def answer(route: Any) -> None:
        sent.append((route.request.url.rpartition("/")[2], route.request.post_data_json))
        route.fulfill(status=202, json={})

    quiet_page.route("**/models/*load", answer)
    quiet_page.route("**/models/pull", answer)
    quiet_page.goto("/#models")
    cards = quiet_page.locator("#models article")
    expect(cards.nth(0)).to_contain_text("8 GiB")
    expect(cards.nth(0)).to_contain_text("not yet")
    expect(cards.nth(0)).to_contain_text(model["dtype"])
    expect(cards.nth(1).get_by_role("progressbar", name="Progress of org/pulled")).to_have_js_property("value", 43)
    expect(cards.nth(1)).to_contain_text("43 % · 2 of 5 files")
    expect(cards.nth(3)).to_contain_text("no room")
    quiet_page.get_by_role("button", name="Pull again org/gone").click()
    expect(quiet_page.get_by_text("org/gone is being pulled.")).to_be_visible()
    quiet_page.get_by_role("button", name="Load org/other").click()
    expect(quiet_page.get_by_text("org/other is being loaded.")).to_be_visible()
    quiet_page.get_by_role("button", name=f"Unload {model['id']}").click()
    confirm(quiet_page, "Unload it")
    expect(quiet_page.get_by_text(f"{model['id']} is being unloaded.")).to_be_visible()
    quiet_page.get_by_label("Model to pull").fill("org/new")
    quiet_page.get_by_role("button", name="Pull", exact=True).click()
    expect(quiet_page.get_by_text("org/new is being pulled.")).to_be_visible()
    assert sent == [
        ("pull", {"model": "org/gone", "revision": "v2"}),
        ("load", {"model": "org/other", "task": "embed"}),
        ("unload", {"model": model["id"], "task": "embed"}),
        ("pull", {"model": "org/new"}),
    ]


def test_doctor_is_run_and_run_again(quiet_page: Page) -> None:
    check = {"seconds": 0.1, "details": {}}
    checks = [
        check | {"name": "python", "status": "ok", "seen": "3.12", "cure": None},
        check | {"name": "memory", "status": "warn", "seen": "11 GB left", "cure": "systemctl stop ollama"},
    ]
    states = [
        {"running": False, "started_at": None, "ended_at": None, "result": None, "error": None},
        {"running": True, "started_at": 1.79e9, "ended_at": None, "result": None, "error": None},
        {
            "running": False,
            "started_at": 1.79e9,
            "ended_at": 1.79e9,
            "result": {"ok": True, "checks": checks},
            "error": None,
        },
    ]

    def answer(route: Any) -> None:
        if route.request.method == "POST":
            states.pop(0)
        route.fulfill(json=states[0] if len(states) != 2 else states.pop(0))

    quiet_page.route("**/dashboard/doctor", answer)
    quiet_page.goto("/#machine")
    expect(quiet_page.get_by_text(re.compile("has not been run since the start"))).to_be_visible()
    quiet_page.get_by_role("button", name="Run", exact=True).click()
    expect(field(quiet_page, "doctor-summary")).to_contain_text("1 of 2 checks found something")
    rows = quiet_page.locator("#doctor tbody tr")
    expect(rows.first).to_contain_text("systemctl stop ollama")
    expect(quiet_page.get_by_role("button", name="Run again")).to_be_enabled()
