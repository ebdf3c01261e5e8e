"""Against `vecmill serve` on the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RunningServer, free_port, running, vecmill_command
from tests.tools.bench.command_line import bench, bench_json

SMALL = ("--longest", 200, "--batch", 4)


def check_latency(latency: dict[str, float]) -> None:
    assert list(latency) == ["p50", "p95", "p99", "max"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]


def check_load(load: dict[str, Any], *, tokens: bool) -> None:
    assert load["outcomes"]["errors"] == {}
    assert load["outcomes"]["first_error"] is None
    check_latency(load["outcomes"]["latency_ms"])
    rates = [load["texts_per_second"], load["megabytes_per_second"], load["seconds"], load["client_cpu"]]
    assert all(rate > 0 for rate in rates)
    assert (load["tokens_per_second"] is not None) == tokens
    assert not tokens or load["tokens_per_second"] > load["texts_per_second"]


@pytest.mark.parametrize(
    ("options", "path", "dimensions", "tokens"),
    [
        ((), "/v1/embeddings", 384, True),
        (("--encoding-format", "float"), "/v1/embeddings", 384, True),
        (("--dialect", "tei"), "/embed", 384, None),
        (("--dialect", "rerank"), "/v1/rerank", None, True),
    ],
)
def test_a_level_in_each_dialect(
    server: RunningServer, options: tuple[str, ...], path: str, dimensions: int | None, tokens: bool | None
) -> None:
    found = bench_json(server.url, *SMALL, "--texts", 10, "--connections", "1,2", *options)
    assert found["url"] == server.url + path
    assert found["dimensions"] == dimensions
    assert found["batch"] == 4
    assert found["workload"]["texts"] == 10
    assert [load["connections"] for load in found["levels"]] == [1, 2]
    for load in found["levels"]:
        assert load["texts"] == 10
        assert load["outcomes"]["requests"] == 3  # of 4, 4 and 2 texts
        check_load(load, tokens=load["tokens_per_second"] is not None if tokens is None else tokens)


def test_table_and_plot_for_a_time(server: RunningServer, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    result = bench(server.url, *SMALL, "--seconds", 0.2, "--connections", "1,2", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert f"server    {server.url}/v1/embeddings (openai): vectors of 384 values" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r" +[12] +\d+ ", line)]
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(len(row) == 9 for row in rows)
    bars = result.stdout[result.stdout.index("texts/s, 0 to ") :].splitlines()
    assert "p50 to p99, 0 to " in bars[0]
    assert [line.split()[0] for line in bars[1:3]] == ["1", "2"]
    assert all("█" in line for line in bars[1:3])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_level_has_no_plot(server: RunningServer) -> None:
    result = bench(server.url, *SMALL, "--texts", 4, "--connections", 1)
    assert result.exit_code == 0, result.output
    assert "p50 to p99" not in result.stdout


def test_a_folder_is_the_workload(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Berlin has 3.5 million inhabitants.\n", "utf-8")
    found = bench_json(server.url, "--folder", tmp_path, "--texts", 3, "--connections", 1)
    assert found["workload"] == {"source": str(tmp_path), "texts": 3, "mean_characters": 35}


def test_mixed(server: RunningServer) -> None:
    found = bench_json(server.url, *SMALL, "--mixed", "--seconds", 0.5, "--connections", 2, "--query-interval", 0.05)
    assert found["query_interval"] == 0.05
    for name in ("person_alone", "person_beside_bulk"):
        assert found[name]["requests"] == 10
        assert found[name]["errors"] == {}
        check_latency(found[name]["latency_ms"])
    for name in ("bulk_alone", "bulk_beside_person"):
        assert found[name]["connections"] == 2
        check_load(found[name], tokens=True)
    assert found["bulk_loss_percent"] < 100


def test_mixed_table(server: RunningServer) -> None:
    result = bench(server.url, *SMALL, "--mixed", "--seconds", 0.2)
    assert result.exit_code == 0, result.output
    assert re.search(r"^person .*^alone +2 .*^beside bulk +2 ", result.stdout, re.M | re.S)
    assert re.search(r"^bulk .*^alone .*^beside person ", result.stdout, re.M | re.S)
    assert re.search(r"The person costs the bulk -?[\d.]+ % of its texts/s\.", result.stdout)


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    port = free_port()
    state = {"CACHE_MAX_BYTES": "100000000", "STATE_DIR": str(tmp_path_factory.mktemp("state"))}
    with running(vecmill_command(port), port, "/ready", state) as server:
        yield server


@pytest.mark.parametrize("dialect", ["openai", pytest.param("tei", marks=pytest.mark.nightly)])
def test_a_server_with_a_cache_computes_every_text(caching: RunningServer, dialect: str) -> None:
    run = (caching.url, *SMALL, "--dialect", dialect, "--connections", "1,2", "--texts", 12)
    for _ in range(2):
        for level in bench_json(*run)["levels"]:
            assert level["outcomes"]["cached_share"] == 0.0
    bench_json(*run, "--cached")
    first, again = bench_json(*run, "--cached")["levels"]
    assert first["outcomes"]["cached_share"] == again["outcomes"]["cached_share"] == 1.0


def test_mixed_computes_every_query(caching: RunningServer) -> None:
    found = bench_json(caching.url, *SMALL, "--mixed", "--seconds", 0.5, "--query-interval", 0.02)
    shares = [found[name]["cached_share"] for name in ("person_alone", "person_beside_bulk")]
    assert shares == [0.0, 0.0]
    assert found["bulk_beside_person"]["outcomes"]["cached_share"] == 0.0


@pytest.mark.parametrize("option", ["--json", pytest.param("--mixed", marks=pytest.mark.nightly)])
def test_a_reader_that_has_left(server: RunningServer, option: str) -> None:
    command = [sys.executable, "-m", "vecmill", "bench", server.url, *map(str, SMALL), "--warm-up", "0", option]
    ends = ("--seconds", "0.1", "--connections", "1")
    with subprocess.Popen([*command, *ends], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == b""


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"},
        pytest.param({"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "FORCE_COLOR": ""}, marks=pytest.mark.nightly),
    ],
)
def test_any_terminal_gets_every_figure(server: RunningServer, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vecmill", "bench", server.url, *map(str, SMALL), "--warm-up", "0"]
    level = ("--texts", "8", "--connections", "1,2", "--model", "grün")
    done = subprocess.run([*command, *level], env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.replace(b"|", b" ") for line in done.stdout.splitlines()]  # what ASCII draws a table with
    rows = [line.split() for line in lines if re.match(rb" +[12] +\d+ ", line)]
    assert [len(row) for row in rows] == [9, 9]
    assert done.stderr == b""


def test_a_server_here_is_not_asked_by_way_of_a_proxy(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = bench_json(server.url, *SMALL, "--connections", 1, "--texts", 8)
    check_load(found["levels"][0], tokens=True)
