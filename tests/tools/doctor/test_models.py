"""The configured models: here, on a hub, or nowhere; and the room they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub_server import NAME, FakeHub, hub_here
from tests.tools.doctor.command_line import check, checks
from vecmill.tools.pull import run_pull


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path / "hub") as fake:
        yield fake


def test_a_model_that_is_to_be_fetched(fake: FakeHub) -> None:
    results = checks("memory", "models", "disk", EMBED_MODEL=NAME)
    assert results["models"]["status"] == "ok"
    assert results["models"]["seen"] == (
        "EMBED_MODEL=owner/tiny: not here yet, 16.7 kB to fetch at the start; licence apache-2.0"
    )
    assert results["models"]["cure"] == "vecmill pull owner/tiny (fetches it now)"
    assert "16.7 kB to be fetched" in results["disk"]["seen"]
    assert results["memory"]["details"]["weights_bytes"] == 4_000_000 * 2
    assert fake.fetched() == []


def test_a_licence_that_forbids_commercial_use_is_a_warning(fake: FakeHub) -> None:
    fake.card = {"license": "cc-by-nc-4.0"}
    result = check("models", EMBED_MODEL=NAME)
    assert (result["status"], "forbids commercial use" in result["seen"]) == ("warn", True)


def test_a_gated_model_needs_a_valid_token_that_is_never_shown(fake: FakeHub) -> None:
    fake.token = "the-right-token"
    without = check("models", EMBED_MODEL=NAME)
    wrong = check("models", EMBED_MODEL=NAME, HF_TOKEN="the-wrong-token")
    right = check("models", EMBED_MODEL=NAME, HF_TOKEN="the-right-token")
    assert (without["status"], wrong["status"], right["status"]) == ("fail", "fail", "ok")
    assert "the model is gated" in without["seen"]
    assert "Accept its terms at" in without["cure"]
    assert [result["details"]["token"] for result in (without, wrong, right)] == ["none", "HF_TOKEN", "HF_TOKEN"]
    assert "-token" not in str((wrong, right))


def test_a_cached_model_is_served_without_the_hub(fake: FakeHub, minilm_folder: Path) -> None:
    names = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors")
    fake.files = {name: (minilm_folder / name).read_bytes() for name in names}
    assert run_pull(NAME) == 0
    fake.status = 500
    results = checks("memory", "models", "disk", EMBED_MODEL=NAME)
    assert {result["status"] for result in (results["memory"], results["models"])} == {"ok"}
    assert "EMBED_MODEL=owner/tiny: 90.9 MB in" in results["models"]["seen"]
    assert results["memory"]["details"]["weights_bytes"] == 22_713_728 * 2
    assert "nothing to be fetched" in results["disk"]["seen"]


def test_a_hub_that_fails_is_the_models_failure_and_not_the_memory_s(fake: FakeHub) -> None:
    fake.status = 503
    results = checks("memory", "models", EMBED_MODEL=NAME)
    assert (results["memory"]["status"], results["models"]["status"]) == ("ok", "fail")
    assert "the size of owner/tiny is not known before it is fetched" in results["memory"]["seen"]
    assert "the hub answered 503" in results["models"]["seen"]


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = check("models", EMBED_MODEL=NAME)
    assert (result["status"], fake.received) == ("fail", [])
    assert result["cure"] == "Unset HF_HUB_OFFLINE.\nvecmill pull owner/tiny"


@pytest.mark.parametrize(("model", "reason"), [("./nowhere", "no such folder"), ("{empty}", "has no config.json")])
def test_a_folder_that_is_no_model(model: str, reason: str, tmp_path: Path) -> None:
    result = check("models", EMBED_MODEL=model.format(empty=tmp_path))
    assert (result["status"], reason in result["seen"]) == ("fail", True), result


def test_weights_that_are_missing(tmp_path: Path, minilm_folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((minilm_folder / name).read_bytes())
    results = checks("memory", "models", EMBED_MODEL=str(tmp_path))
    assert (results["memory"]["status"], results["models"]["status"]) == ("ok", "fail")
    assert "has no model.safetensors" in results["models"]["seen"]
    assert results["memory"]["details"]["unknown"] == [str(tmp_path)]


def test_too_little_memory_is_a_failure_with_numbers() -> None:
    result = check("memory", MEMORY_FLOOR_GB="100000")
    assert result["status"] == "fail"
    assert "the models need 1.0: 0.04 of weights and an allowance of 1.0" in result["seen"]
    assert "100000.0 must stay free (MEMORY_FLOOR_GB)" in result["seen"]
    assert "GB are missing: stop what else holds memory" in result["cure"]


def test_a_share_that_is_too_small() -> None:
    result = check("memory", MEMORY_FRACTION="0.001")
    assert (result["status"], "MEMORY_FRACTION lets the process take" in result["cure"]) == ("fail", True)
