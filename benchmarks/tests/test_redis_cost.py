"""A tiny run of what Redis costs; the figures mean nothing."""

import pytest

from benchmarks.tests.runs import json_line, run_benchmark

pytestmark = pytest.mark.benchmark


def test_redis_and_files_are_asked_in_turns() -> None:
    done = run_benchmark(
        "cluster.redis_cost", "--calls", "20", "--entries", "500", "--serve", "--max-batch-tokens", "256"
    )
    result = json_line(done)

    assert {"benchmark", "measured_at", "host", "settings", "http", "stores"} <= result.keys()
    for figures in (*result["http"].values(), *result["stores"].values()):
        for side in ("redis", "files"):
            assert 0 < figures[side]["p50"] <= figures[side]["p99"]
        assert figures["added_ms"].keys() == {"p50", "p99", "median_of_pairs"}
    assert done.stderr.count("Redis adds") == 4
