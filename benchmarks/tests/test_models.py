"""The models' benchmark must compare equals: its smoke run checks the numbers, never the times."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.models.builds import build
from benchmarks.models.cases import worst_error
from benchmarks.models.plain import PlainLatentAttention, with_sdpa
from benchmarks.models.shapes import QUICK
from benchmarks.models.workloads import BEFORE_DOCUMENT, attended, batches, ragged_rows, run_model
from benchmarks.tests.runs import json_line, run_benchmark
from vecmill.core.types import Prefix, Row
from vecmill.models.weights import Target

SMOKE_DOCUMENTS, SMOKE_DOCUMENT_TOKENS, AFTER_DOCUMENT = 5, 20, 9


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The JSON line of a smoke run."""
    return json_line(run_benchmark("models", "--quick"))


@pytest.mark.benchmark
def test_every_comparison_gives_the_same_numbers_on_all_sides(result: dict[str, Any]) -> None:
    assert result["same_numbers"]
    checks = {comparison["name"]: comparison["check"] for comparison in result["comparisons"]}
    assert {name.split(",")[0] for name in checks} == {
        "latent attention",
        "shared prefix",
        "packed rows",
        "merged projections",
        "whole model",
        "family",
    }
    assert all(check["error"] < 1e-5 for check in checks.values()), checks


@pytest.mark.benchmark
def test_every_side_is_set_against_the_machine_and_the_first_side(result: dict[str, Any]) -> None:
    assert {"benchmark", "measured_at", "host", "settings", "comparisons", "loading"} <= result.keys()
    for comparison in result["comparisons"]:
        ours, *others = comparison["sides"]
        assert list(comparison["ratio"]) == others
        assert comparison["limits"].keys() == {"matmul_tflops", "copy_gb_per_s"}
        for side in comparison["sides"].values():
            assert side.keys() == {"per_s", "of_matmul", "of_limit"}
            assert all(spread["min"] <= spread["median"] <= spread["max"] for spread in side.values())
            assert len(side["per_s"]["rounds"]) == result["settings"]["rounds"]
        assert comparison["sides"][ours]["per_s"]["min"] > 0


@pytest.mark.benchmark
def test_a_shared_prefix_saves_it_for_all_documents_but_one(result: dict[str, Any]) -> None:
    (comparison,) = (
        comparison for comparison in result["comparisons"] if comparison["name"].startswith("shared prefix")
    )
    whole = SMOKE_DOCUMENTS * (BEFORE_DOCUMENT + SMOKE_DOCUMENT_TOKENS + AFTER_DOCUMENT)

    assert comparison["items"] == SMOKE_DOCUMENTS
    assert comparison["about"]["computed_tokens"]["each pair whole"] == whole
    assert comparison["about"]["saved_share"] == pytest.approx((SMOKE_DOCUMENTS - 1) * BEFORE_DOCUMENT / whole)


@pytest.mark.benchmark
def test_both_ways_of_loading_end_with_the_same_weights(result: dict[str, Any]) -> None:
    loading = result["loading"]

    assert loading["check"]["same"]
    assert loading["check"]["peak"] < loading["check"]["allowed_peak"]
    assert loading["files"] == 4
    assert 0 < loading["weight_bytes"] < loading["file_bytes"] < 1.01 * loading["weight_bytes"]
    assert loading["sides"]["vecmill"]["host_bytes"] > 0.9 * loading["weight_bytes"], "the weights must be seen at all"


@pytest.mark.benchmark
def test_passes_on_a_cpu_are_set_against_the_machine_in_every_way() -> None:
    # DistilBERT's config.json has names of its own for the sizes that operations are counted from.
    result = json_line(run_benchmark("models.cpu_passes", "--texts", "2", "--rounds", "1", "--models", "DistilBERT"))
    (found,) = result["models"].values()
    for of_malloc in found.values():
        assert of_malloc["ways"].keys() == {"plain", "parts", "prepacked", "attention", "all"}
        assert all(way["of_limit"]["min"] > 0 for way in of_malloc["ways"].values())


@torch.inference_mode()
def test_the_built_nv_embed_is_the_plain_one(tmp_path: Path) -> None:
    kind, shape = QUICK.whole["tiny NV-Embed"]
    target = Target(torch.float32, torch.device("cpu"))
    model = build(kind, shape, target, tmp_path)
    ids = np.arange(50, dtype=np.int32)
    plain: Any = with_sdpa(model.modules[0])
    latent_attention = PlainLatentAttention(tmp_path / "model.safetensors", 8, target.device, target.dtype)

    hidden = plain(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
    expected = latent_attention(hidden).mean(dim=0, keepdim=True)

    assert plain.config.is_causal is False
    assert worst_error(run_model(model, [[Row(ids)]], target.device), expected) < 1e-5


def test_attended_pairs_are_counted_as_each_token_sees_them() -> None:
    prefix = Prefix(np.zeros(3, dtype=np.int32))
    rows = [Row(np.zeros(size, dtype=np.int32), prefix=prefix) for size in (1, 2)]

    assert attended(rows, causal=True) == (1 + 2 + 3) + 4 + (4 + 5)
    assert attended(rows, causal=True, window=3) == (1 + 2 + 3) + 3 + (3 + 3)
    four = [Row(np.zeros(4, dtype=np.int32))]
    assert attended(four, causal=False) == 16
    assert attended(four, causal=False, window=2) == 2 + 3 + 3 + 2


def test_ragged_rows_have_the_lengths_of_code() -> None:
    rows = ragged_rows(2048, vocab_size=100)
    lengths = [len(row) for row in rows]

    assert 88 < np.median(lengths) < 102
    assert 120 < np.mean(lengths) < 140
    packs = batches([Row(row) for row in rows], tokens=2048)
    packed = (row for pack in packs for row in pack)
    assert all(row.token_ids is own for row, own in zip(packed, rows, strict=True))
    assert max(sum(map(len, pack)) for pack in packs) <= 2048


def test_an_answer_that_is_not_a_number_is_no_equal() -> None:
    row = torch.tensor([[1.0, float("nan")]])

    assert worst_error(row, row) == float("inf")
