"""The GPU benchmark's smoke run on a CPU: the same code, tiny models; it checks the numbers, never the times."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.__main__ import Stage, run_stage
from benchmarks.gpu.determinism import compared, deterministic_kernels, nearest
from benchmarks.gpu.lanes import LANES, ONE_STREAM, Counted, one_stream
from benchmarks.gpu.lanes import summary as summary_of_lanes
from benchmarks.gpu.proofs import VALUES
from benchmarks.gpu.report import targets
from benchmarks.gpu.stages import Samples, Stages, sampled, summary
from benchmarks.gpu.subjects import FULL, TINY
from benchmarks.tests.runs import REPOSITORY, json_line, run_benchmark
from vecmill.core.types import Lane
from vecmill.engine.determinism import WORKSPACE
from vecmill.engine.forward import Streams

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]  # a run is a dozen processes, one after the other

CPU = torch.device("cpu")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """A tiny run in a process of its own, without a GPU."""
    return run_benchmark("gpu", "--tiny", *options)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The JSON line of a smoke run."""
    return json_line(run())


def test_the_json_line_holds_the_machine_every_model_and_every_stage(result: dict[str, Any]) -> None:
    assert result.keys() == {
        *("benchmark", "measured_at", "host", "settings", "card", "dtype", "rates", "proofs", "models"),
        *("targets", "stages", "same_vectors", "seconds"),
    }
    assert result["rates"].keys() == {"matmul_tflops", "copy_gb_per_s", "read_gb_per_s"}
    assert [model["name"] for model in result["models"]] == list(TINY.models)
    assert {stage["status"] for stage in result["stages"]} == {"done"}


def test_what_must_be_true_is_proven_first(result: dict[str, Any]) -> None:
    assert list(result["proofs"]) == ["values", "engine", "http", "determinism", "fp8", "lanes"]
    assert all(proof["ok"] for stage in result["proofs"].values() for proof in stage.values())
    assert result["proofs"]["http"]["as it starts"]["person_beside_bulk"]["requests"] > 0


def test_bits_are_compared_and_what_keeping_them_costs_is_measured(result: dict[str, Any]) -> None:
    """On a CPU, where the tiny embedders keep their bits without the setting, too."""
    engine, *models = result["proofs"]["determinism"].values()
    rows, twice = TINY.compared_rows + 1, 2 * TINY.compositions  # with the long one
    for proof in (engine, *models):
        assert proof["dtype"] == "bfloat16"
        assert proof["bits"]["other_bits"] == {"interactive": 0, "bulk": 0}
        assert all(proof["bits"]["answers"].values())
    for model in models:
        assert sum(model["bits"]["answers"].values()) == twice * rows
        assert (model["moved"]["queries"], model["moved"]["documents"]) == TINY.searched
        assert model["moved"]["least_cosine"] > 0.999
        assert model["packed"]["compiled"]
        rates = [model[side]["rows_per_s"] for side in ("deterministic", "packed")]
        assert all(len(rate["rounds"]) == TINY.rounds and rate["min"] > 0 for rate in rates)
        assert model["rate_kept"] == pytest.approx(rates[0]["median"] / rates[1]["median"], rel=1e-3)
    targets = [target for target in result["targets"] if "DETERMINISTIC=true" in target["target"]]
    assert [target["met"] for target in targets] == [True] * (1 + len(TINY.models))


def test_each_answer_with_other_bits_than_the_row_alone_is_counted() -> None:
    moved = Counter[str]()

    def answers(chosen: Sequence[Sequence[int]], first: int) -> Iterator[tuple[Lane, Sequence[int], list[Any]]]:
        for number, batch in enumerate(chosen):
            lane = (Lane.BULK, Lane.INTERACTIVE)[(first + number) % 2]
            bit = np.spacing(np.float32(7)) if 7 in batch and len(batch) > 1 else np.float32(0)
            moved[lane.value] += bool(bit)
            yield lane, batch, [np.array([1, index + bit * (index == 7)], np.float32) for index in batch]

    found = compared(answers, rows=20, compositions=5)

    assert found["bits"]["other_bits"] == moved
    assert 0 < moved.total() <= 10, "each composition has the row twice"
    assert found["bits"]["kept"] == 1 - moved.total() / 200
    assert not found["ok"]


def test_the_nearest_documents_are_those_of_the_largest_cosines() -> None:
    angles = np.radians([0, 90, *range(5, 95, 6)])
    vectors = np.stack((np.cos(angles), np.sin(angles)), axis=1)

    assert nearest(vectors, 2) == [list(range(10)), list(range(14, 4, -1))]


def test_torchs_switches_are_afterwards_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    matmul = torch.backends.cuda.matmul

    def switches() -> tuple[bool, ...]:
        reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
        filled: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        return torch.are_deterministic_algorithms_enabled(), filled, *reduced

    before = switches()
    with deterministic_kernels(torch.device("cuda")):
        assert switches() == (True, False, False, False)

    assert switches() == before == (False, True, True, True)


def test_what_a_stream_for_each_lane_costs_bulk_is_measured(result: dict[str, Any]) -> None:
    lanes = result["proofs"]["lanes"]["lanes"]
    assert list(lanes["ways"]) == ["a stream for each lane", "one stream"]
    for way in lanes["ways"].values():
        assert way["bulk_alone_tokens_per_s"]["min"] > 0
        assert way["bulk_beside_a_person_tokens_per_s"]["min"] > 0
        assert way["query_ms"]["p50"] > 0
    assert all(len(lanes[name]["rounds"]) == TINY.rounds for name in ("cost_alone", "cost_beside_a_person"))


def test_fp8_is_measured_beside_bfloat16(result: dict[str, Any]) -> None:
    """On a CPU, whose kernels take as long as they will."""
    kernels, *models = result["proofs"]["fp8"].values()
    assert kernels["off"][kernels["chosen"]] < 0.01
    assert kernels["off"].keys() == {"scaled_by_row", "scaled_afterwards", "in_bfloat16"}
    for model in models:
        assert model["weights_gb"]["fp8"] < model["weights_gb"]["bfloat16"]
        assert 0.9 < model["least_cosine"] < 1
        assert all(side["tokens_per_s"]["fp8"] > 0 for side in model["forwards"])


def test_what_lanes_cost_is_the_share_of_bulks_tokens() -> None:
    def rounds(*tokens: int) -> list[Counted]:
        return [Counted(each, 2.0, [0.010]) for each in tokens]

    summary = summary_of_lanes(
        {
            LANES: {False: rounds(98, 99), True: rounds(80, 90)},
            ONE_STREAM: {False: rounds(100, 100), True: rounds(100, 100)},
        }
    )

    assert summary["ways"][LANES]["bulk_alone_tokens_per_s"]["rounds"] == [49, 49.5]
    assert summary["cost_alone"]["rounds"] == pytest.approx([0.02, 0.01])
    assert summary["cost_beside_a_person"]["median"] == pytest.approx(0.15)
    assert summary["ways"][ONE_STREAM]["query_ms"] == {"p50": 10, "p95": 10}


def test_without_the_rule_both_lanes_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: (object(), priority))

    assert len({id(stream) for stream in one_stream(CPU).run.values()}) == 1
    assert len({id(stream) for stream in Streams.on(CPU).run.values()}) == 2


def test_each_stage_keeps_what_it_finds_in_the_folder_that_out_names(tmp_path: Path) -> None:
    """In a process that is cut off: what was found before is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUT", str(tmp_path))
        done = run("--stages", "values", "--minutes", "0.6")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "gpu-values.json").read_text())
    assert kept["proofs"].keys() == VALUES.keys()
    assert json.loads((tmp_path / "gpu.json").read_text())["proofs"]["values"] == kept["proofs"]


def test_a_stage_says_what_it_lacks_before_it_starts(tmp_path: Path) -> None:
    record = run_stage(Stage("http", 60, ("no_such_package", "json")), [], tmp_path, 60)
    assert record["status"] == "skipped"
    assert record["reason"] == "needs the Python packages no_such_package"


def test_a_stage_that_hangs_is_cut_off_with_what_it_had_found(tmp_path: Path) -> None:
    (tmp_path / "gpu-values.json").write_text('{"proofs": {"first": {"ok": true}}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)")
        record = run_stage(Stage("values", 5), ["--tiny"], tmp_path, 60)
    assert record["status"] == "failed"
    assert "cut off after 5 s" in record["reason"]
    assert record["found"] == {"proofs": {"first": {"ok": True}}}


def test_both_sides_give_the_same_vectors(result: dict[str, Any]) -> None:
    assert result["same_vectors"]
    for model in result["models"]:
        assert all(cosine["min"] > 0.99999 for cosine in model["against"]["cosine"].values()), model["name"]


def test_every_mode_is_measured_at_every_size(result: dict[str, Any]) -> None:
    for model in result["models"]:
        assert model["modes"].keys() == {"eager", "compiled"}
        assert model["chosen"] in model["modes"]
        assert model["matrix_products"].keys() == {str(tokens) for tokens in TINY.matrix_tokens}
        for mode in model["modes"].values():
            assert [each["tokens"] for each in mode["forwards"]] == list(TINY.tokens)
            assert all(len(each["ms"]["rounds"]) == TINY.rounds for each in mode["forwards"])
            assert 1 <= mode["fit"]["budget_tokens"] <= max(TINY.tokens)
            assert mode["query"]["weight_bytes"] == pytest.approx(1e9 * model["weight_gb"])
            assert mode["new_graphs"] == 0, "a size that compiles anew is not measured warm"


def test_the_comparison_names_the_package_and_its_padding(result: dict[str, Any]) -> None:
    for model in result["models"]:
        against = model["against"]
        assert against["package"].startswith("sentence-transformers ")
        assert against["texts"] == TINY.texts[1]
        assert list(against["texts_per_s"]) == ["vecmill", *against["ratio"]]
        assert against["tokens"] < against["padded_tokens"]["32"] <= against["padded_tokens"]["64"]


def test_what_there_is_no_time_for_is_named() -> None:
    done = run("--minutes", "0")
    result = json.loads(done.stdout.splitlines()[-1])

    assert done.returncode == 0, done.stderr
    assert [stage["status"] for stage in result["stages"]] == ["skipped"] * len(result["stages"])
    assert "http: skipped there was no time left" in done.stdout
    assert all(target["met"] is None for target in result["targets"])


def test_a_gpu_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import __main__ as gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert gpu.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_benchmark_needs_nothing_of_the_server() -> None:
    unwanted = "[name for name in sys.modules if name.startswith(('vecmill.config', 'fastapi'))]"
    code = f"import sys, benchmarks.gpu.__main__; print({unwanted})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_stage_that_fails_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(time.perf_counter() + 60, CPU, [])

    assert stages.run("bad", 0, _raising(torch.OutOfMemoryError("no room"))) is None
    assert stages.run("good", 0, lambda: 5) == 5
    assert stages.run("too long", 1000, lambda: 5) is None
    stages.guard("fine", lambda: None)
    assert [record["status"] for record in stages.records] == ["failed", "done", "skipped"]
    assert stages.records[0]["reason"] == "OutOfMemoryError: no room"
    assert stages.failed
    assert "no room" in capsys.readouterr().err


def _raising(error: Exception) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def test_the_cards_readings_are_summed_up_without_those_it_does_not_give() -> None:
    samples: Samples = [["1980", "3201", "[N/A]", "41"], ["1200", "3201", "[N/A]", "44"]]

    assert summary(samples)["sm_mhz"] == {"median": 1590, "min": 1200, "max": 1980}
    assert "watts" not in summary(samples)
    assert summary([]) == {}
    with sampled(CPU) as nothing:
        assert nothing == []


def test_the_targets_judge_the_mode_that_the_server_runs() -> None:
    def forwards(*shares: float) -> dict[str, Any]:
        sizes = zip((1024, 4096, 8192), shares, strict=True)
        return {"forwards": [{"tokens": tokens, "of_matmul": {"median": share}} for tokens, share in sizes]}

    model = {
        "name": "one",
        "modes": {"eager": forwards(0.9, 0.9, 0.9), "compiled": forwards(0.1, 0.65, 0.7)},
        "chosen": "compiled",
        "against": {"ratio": {"32": {"median": 3.5}, "64": {"median": 2.5}}},
    }

    busy, ratio = targets([model], "one", 4096)

    assert (busy["found"], busy["met"]) == (0.65, True)
    assert (ratio["found"], ratio["met"]) == (2.5, False), "against the faster of the others"


def test_the_full_run_has_the_hubs_models() -> None:
    assert list(FULL.models) == ["Qwen3-Embedding-0.6B", "Qwen3-Embedding-4B", "BERT-base", "NV-Embed-v2"]
    assert FULL.first == "Qwen3-Embedding-4B"
    assert FULL.models["Qwen3-Embedding-4B"][1]["num_hidden_layers"] == 36
