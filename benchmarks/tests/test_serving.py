"""The benchmarks of load must run and say what they found: a tiny version of each; the figures mean nothing."""

from typing import Any

import pytest

from benchmarks.lib.figures import in_turns, judged, shown
from benchmarks.tests.runs import json_line, run_benchmark

pytestmark = pytest.mark.benchmark

SPREAD = {"median", "min", "max", "rounds"}
JUDGED = SPREAD | {"target", "met"}
QUICK_START = ("--serve", "--torch-compile", "false", "--dtype", "float32", "--max-batch-tokens", "256")
FEW = ("--rounds", "1")


def run(name: str, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON line, and all that was printed."""
    done = run_benchmark(f"serving.{name}", *FEW, *options, *QUICK_START)
    result = json_line(done)
    assert {"benchmark", "measured_at", "host", "settings"} <= result.keys()
    assert result["benchmark"] == name
    return result, done.stdout


def test_isolation_sets_a_person_beside_bulk_against_alone() -> None:
    result, printed = run(
        "isolation", "--servers", "vecmill", "--seconds", "0.5", "--passes", "1", "--texts", "24", "--batch", "4"
    )

    side = result["sides"]["vecmill"]
    for latencies in (side["person_alone_ms"], side["person_beside_bulk_ms"]):
        assert latencies.keys() == {"p50", "p95", "p99"}
        assert 0 < latencies["p50"]["median"] <= latencies["p95"]["median"] <= latencies["p99"]["median"]
    assert side["person_beside_bulk_ms"]["p95"].keys() == JUDGED
    assert side["bulk_loss_percent"].keys() == JUDGED
    assert side["p95_in_bulk_forwards"].keys() == JUDGED
    assert side["bulk_alone_texts_per_s"]["min"] > 0
    assert result["failed"] == {}
    assert printed.count("target at most") == 3


def test_overhead_is_what_the_client_waited_less_the_models_time() -> None:
    result, printed = run("overhead", "--texts", "1,64", "--wide", "128", "--repeats", "2", "--large-repeats", "1")

    assert len(result["cases"]) == 2 * 2 * 7  # widths, sizes, ways to write a vector
    for case in result["cases"].values():
        times = {name: each["median"] for name, each in case["ms"].items()}
        assert times.keys() == {"whole", "outside", "rest", "inference", "queue", "tokenization"}
        assert 0 < times["outside"] < times["whole"]
        assert case["texts"] == 64 or "others_waited_ms" not in case  # the small ones are over before anybody asks
    assert result["cases"]["64 x 384 base64"]["ms"]["outside"].keys() == JUDGED
    assert result["cases"]["64 x 384 float gzip"]["answer_bytes"] < result["cases"]["64 x 384 float"]["answer_bytes"]
    assert result["cases"]["64 x 384 float32"]["answer_bytes"] == 64 * 384 * 4
    assert result["over_plain_floats"]["64 x 384 float zstd"].keys() == SPREAD
    assert "longest that others waited" in printed
    for by in result["compressed"].values():
        assert by.keys() >= {"gzip, zlib", "zstd"}
        assert all(each["ms"]["min"] > 0 and each["times_zlib"].keys() == SPREAD for each in by.values())
    plain = result["cases"]["64 x 384 float"]["answer_bytes"]
    assert all(each["bytes"] < plain for each in result["compressed"]["64 x 384 float"].values())


def test_scaling_measures_connections_jobs_and_the_queue() -> None:
    result, printed = run(
        "scaling",
        *("--texts", "64", "--connections", "1,4", "--jobs", "1,2", "--waiting", "10,100", "--clients", "1,16"),
        *("--batch", "10", "--seconds", "0.3", "--job-seconds", "0.5", "--cuts", "5"),
    )

    assert list(result["connections"]) == ["1", "4"]
    assert list(result["jobs"]) == ["1", "2"]
    assert result["connections"]["4"]["latency_ms"].keys() == {"p50", "p95", "p99", "max"}
    assert 0 < result["jobs"]["2"]["fairness_tokens"]["median"] <= 1
    assert result["jobs"]["1"]["fairness_tokens"]["median"] == 1
    single, many = result["queue"]["1"], result["queue"]["16"]
    assert list(single["us_per_cut"]) == ["10", "100"]
    assert single["most_over_fewest"].keys() == JUDGED
    assert many["most_over_fewest_in_all_lines"] is None, "only the deeper queue has a text for each client"
    assert "target at most 2" in printed


def test_a_figure_is_told_beside_its_target() -> None:
    figure = {"median": 4.0, "min": 3.0, "max": 6.0, "rounds": [3.0, 4.0, 6.0]}

    assert shown(judged(figure, 5), " ms") == "4 ms (3 to 6), target at most 5 ms: met"
    assert shown(judged(figure, 3.9)) == "4 (3 to 6), target at most 3.9: MISSED"
    assert list(in_turns("ab", 3)) == ["a", "b", "b", "a", "a", "b"]


def test_dialect_cost_is_told_for_each_dialect_beside_the_machines_limit() -> None:
    done = run_benchmark("serving.dialect_cost", "--texts", "4", "--dimensions", "128", *FEW, "--repeats", "2")
    dialects = json_line(done)["dialects"]
    for dialect in dialects.values():
        assert dialect["ms"].keys() == JUDGED
        assert 0 < dialect["orjson_alone_ms"]["median"] < dialect["ms"]["median"]
    assert {"OpenAI, base64", "Cohere v2, four types", "TEI", "Ollama", "NIM ranking"} <= dialects.keys()
    assert dialects["TEI, gzip"]["answer_bytes"] < dialects["TEI"]["answer_bytes"]
    assert "target at most 2 ms" in done.stdout


def test_answer_memory_is_told_in_results() -> None:
    done = run_benchmark("serving.answer_memory", "--texts", "256", "--wide", "1024", *FEW, *QUICK_START)
    result = json_line(done)
    assert result["result_mb"] == 1.0
    for encoding in result["encodings"].values():
        assert encoding["results"].keys() == JUDGED
        assert encoding["mb"]["min"] >= 0
    # Four bytes as base64: exactly a third more, and what stands around the vectors.
    answer, vectors = result["encodings"]["base64"]["answer_bytes"], 256 * 4096 * 4 // 3
    assert vectors < answer < 1.1 * vectors
    assert "target at most 3 results" in done.stdout


def test_cache_tells_of_hits_the_store_and_a_batch_beside_their_targets() -> None:
    tiny = (
        "--wide",
        "128",
        "--batch",
        "8",
        "--texts",
        "16",
        "--entries",
        "2000",
        "--lines",
        "20",
        "--loop-texts",
        "16",
    )
    short = (*FEW, "--seconds", "0.3", "--limit-seconds", "0.1")
    done = run_benchmark("serving.cache", "--parts", "hits", "store", "batch", *tiny, *short, *QUICK_START)
    result = json_line(done)
    assert result["hits"]["384"]["texts_per_second"].keys() == JUDGED
    for hits in result["hits"].values():
        assert 0 < hits["percent_of_echo"]["median"] < 100
    assert 817 < result["store"]["bytes_per_entry"] < 3000
    assert result["store"]["look_up_ms"].keys() == {"cold", "warm"}
    assert result["batch"]["lines"] == 20
    assert result["batch"]["overhead_percent"].keys() == JUDGED
    assert result["batch"]["percent_of_loop"]["median"] > 0
    assert done.stdout.count("target at") == 3


def test_hostile_tells_of_every_case_how_long_the_loop_was_held() -> None:
    done = run_benchmark("serving.hostile", "--tiny", "--serve", *QUICK_START[1:])
    result = json_line(done)
    assert result["all"]["attacks"] == len(result["cases"]) > 50
    assert result["all"]["stall_ms"]["longest"] == max(
        case["stall_ms"]["longest"] for sizes in result["cases"].values() for case in sizes.values()
    )
    for name, sizes in result["cases"].items():
        for case in sizes.values():
            assert case["status"]["met"], name
            assert case["stall_ms"].keys() == {"longest", "target", "met"}
            assert case["memory_mb"].keys() == {"grown", "target", "met"}
            assert not case["killed"]
    assert "within the targets" in done.stdout
