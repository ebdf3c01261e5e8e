"""What a server says of its GPU: a real server beside a driver that answers as a recorded card does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect
from prometheus_client.parser import text_string_to_metric_families

from tests.hardware.fake_nvml import GB10, environment
from tests.servers import free_port, running
from vecmill.http.capabilities import READINGS

SLOW = {"sm_clock 2190": "sm_clock 612", "temperature 71": "temperature 84"}


@dataclass
class Spark:
    """A server, and the recording that its driver answers from."""

    url: str
    recording: Path

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/{path}").raise_for_status().json()

    def play(self, changes: dict[str, str]) -> None:
        text = GB10.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        self.recording.write_text(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spark]:
    spark = Spark("", tmp_path_factory.mktemp("nvml") / "recording.txt")
    spark.play({})
    port = free_port()
    command = [sys.executable, "-m", "tests.hardware.fake_nvml", "serve", "--port", str(port)]
    with running(command, port, "/ready", environment(spark.recording)) as process:
        spark.url = process.url
        yield spark


def gauges(server: Spark) -> dict[str, dict[str, float]]:
    """Every gauge of the machine with a value, by name and by its label's value."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        family.name: {sample.labels.get("kind", ""): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
        if family.samples and family.name.startswith(("vecmill_gpu", "vecmill_memory"))
    }


def test_every_answer_has_the_same_readings(server: Spark) -> None:
    health, stats, capabilities = (server.get(path) for path in ("health", "stats", "capabilities"))
    gpu = stats["gpu"]
    for other in (health["gpu"], capabilities["gpu"]):
        del other["memory"]["available_mb"], other["age_seconds"]
    assert health["gpu"] == capabilities["gpu"]
    assert {name: gpu[name] for name in READINGS} == {name: health["gpu"][name] for name in READINGS}
    assert (gpu["name"], gpu["in_use"], gpu["sm_clock_mhz"]) == ("NVIDIA GB10", False, 2190)
    assert gpu["clock"] == {"state": "ok", "message": "2190 MHz under load"}
    memory = gpu["memory"]
    assert (memory["unified"], memory["total_mb"]) == (True, stats["memory"]["total_mb"])
    assert 0 < memory["available_mb"] < memory["total_mb"]
    assert (memory["this_process_mb"], memory["other_processes_mb"], memory["allocated_mb"]) == (9216, 60970, None)
    assert gpu["power_limit_watts"] is None  # not available is not zero
    assert "power_limit_watts" in gpu["not_available"]
    assert (stats["warnings"], health["warnings"]) == ([], [])
    # The server runs on the CPU: what clients read of the GPU it uses stays null.
    assert (health["cuda_available"], capabilities["gpu_total_mb"], capabilities["unified_memory"]) == (
        False,
        None,
        None,
    )


def test_prometheus_gets_what_is_known(server: Spark) -> None:
    found = gauges(server)
    assert found["vecmill_gpu_utilization_ratio"] == {"": 0.96}
    assert found["vecmill_gpu_sm_clock_hertz"] == {"": 2.19e9}
    assert found["vecmill_gpu_temperature_celsius"] == {"": 71}
    assert found["vecmill_gpu_power_watts"] == {"": 82.4}
    assert found["vecmill_gpu_throttled"] == {"": 0}
    assert set(found["vecmill_gpu_memory_bytes"]) == {"total", "available", "this_process", "other_processes"}
    assert found["vecmill_gpu_memory_bytes"]["this_process"] == 9 * 2**30
    assert set(found["vecmill_memory_bytes"]) == {"total", "available", "swap_used"}


@pytest.mark.nightly
def test_the_dashboard_shows_the_gpu_and_warns(server: Spark, quiet_page: Page) -> None:
    quiet_page.goto("/#machine")
    tiles = quiet_page.locator("#device > div")
    shown = ["96 %", "2,190 MHz", "82 W", "71 °C"]
    for number, text in enumerate(shown):
        expect(tiles.nth(number).locator("strong")).to_have_text(text)
    expect(tiles.first).to_contain_text("NVIDIA GB10 · not used by this server")
    expect(quiet_page.locator("#memory")).to_contain_text("Memory, shared by CPU and GPU")
    warnings = quiet_page.get_by_role("list", name="Warnings")
    expect(warnings).to_be_hidden()

    server.play(SLOW)
    expect(warnings).to_contain_text("612 MHz under load and 84 °C", timeout=20_000)
    expect(tiles.nth(1).locator("strong")).to_have_class("bad")
    [warning] = server.get("health")["warnings"]
    assert "unplug the supply" in warning
    assert server.get("stats")["warnings"] == [warning]
    assert gauges(server)["vecmill_gpu_throttled"] == {"": 1}

    server.play({})
    expect(warnings).to_be_hidden(timeout=20_000)


def test_a_driver_that_goes_away_leaves_no_numbers_behind(server: Spark) -> None:
    server.play({"uuid GPU-6e0b2f7c-0000-4000-8000-00000000gb10": "", "sm_clock 2190": "", "utilization 96": ""})
    while server.get("stats")["gpu"]["sm_clock_mhz"] is not None:
        time.sleep(0.01)
    assert "vecmill_gpu_sm_clock_hertz" not in gauges(server)
    assert server.get("health")["gpu"]["clock"]["state"] == "unknown"
    server.play({})


def field(page: Page, name: str) -> Locator:
    return page.locator(f'[data-field="{name}"]')
