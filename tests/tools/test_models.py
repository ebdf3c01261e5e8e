"""`vecmill models`: what is listed, what each model takes, and whether it fits the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from tests.hardware import fake_nvml
from tests.hardware.fake_nvml import GB10, H100
from tests.hub_server import NAME, FakeHub, hub_here
from tests.servers import RunningServer, free_port
from vecmill.__main__ import cli
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.hardware.gpu import GpuMemory
from vecmill.hardware.memory_room import Fit, MemoryRoom, memory_room
from vecmill.models.card_examples import examples
from vecmill.models.families import FAMILIES, family_of
from vecmill.models.family import Family, HubModel
from vecmill.tools import models as listed
from vecmill.tools.pull import run_pull

GB = 1 << 30
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMALL, LARGE = MINILM, "nvidia/NV-Embed-v2"


@pytest.fixture(autouse=True)
def no_hub_and_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.load()
    monkeypatch.delenv("FAKE_NVML", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-hub"))


def run(*options: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, ["models", *options], env={"DEVICE": "auto", **environment})


def listing(*options: str, **environment: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The whole object, and its models by id."""
    result = run("--json", *options, **environment)
    assert (result.exit_code, result.stderr) == (0, "")
    whole = json.loads(result.stdout)
    return whole, {model["id"]: model for model in whole["models"]}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_names_models(family: Family) -> None:
    """Of the tasks that it is served for, and with what the list says of each."""
    assert family.examples, f"{family.model_type} names no example: see HubModel in models/family.py"
    for model in family.examples:
        assert model.task in family.tasks
        assert (model.width is None) == (model.task is Task.RERANK)
        assert model.id.count("/") == 1
        assert model.licence
        assert min(model.parameters, model.max_tokens) > 0


def test_no_model_is_named_twice() -> None:
    ids = [model.id for family in FAMILIES.values() for model in family.examples]
    assert len(ids) == len(set(ids))


def test_an_example_to_verify_is_of_the_task_that_is_listed() -> None:
    tasks = {model.id: model.task for family in FAMILIES.values() for model in family.examples}
    assert all(tasks.get(example.model, example.task) is example.task for example in examples())


def test_on_a_cpu() -> None:
    whole, models = listing(DEVICE="cpu", MEMORY_FLOOR_GB="0")
    assert (whole["machine"]["device"], whole["machine"]["dtypes"]) == ("cpu", ["bfloat16", "float32"])
    assert set(whole["families"]["embed"]) == {name for name, family in FAMILIES.items() if Task.EMBED in family.tasks}
    small = models[SMALL]
    assert small["memory_bytes"] == {"min": GB + 2 * 22_713_216, "max": GB + 4 * 22_713_216}
    assert (small["family"], small["license"], small["max_tokens"]) == ("bert", "apache-2.0", 256)
    assert (small["dimensions"], small["state"], small["verifiable"]) == ([384], "bundled", True)
    assert models["nomic-ai/nomic-embed-text-v1.5"]["dimensions"] == [64, 128, 256, 512, 768]
    assert models["Qwen/Qwen3-Embedding-4B"]["dimensions"] == {"min": 32, "max": 2560}
    assert models["BAAI/bge-reranker-base"]["dimensions"] == []
    assert models[LARGE]["note"].startswith("gated")


def test_tables_of_position_biases_count() -> None:
    """jina-v2's for 8192 tokens take three quarters of what its weights take; in float32 it has half the rows."""
    _, models = listing(DEVICE="cpu")
    table = 12 * 512 * 2 * 8192 * 2
    sizes = {"min": GB + 2 * 136_777_728 + table, "max": GB + 4 * 136_777_728 + table}
    assert models["jinaai/jina-embeddings-v2-base-en"]["memory_bytes"] == sizes
    biased = {name for name, model in models.items() if model["family"] in ("mpnet", "deberta-v2", "jina_bert")}
    listed = {model.id for family in FAMILIES.values() for model in family.examples if model.bias is not None}
    assert biased == listed


def test_the_settings_count() -> None:
    _, whole = listing(DEVICE="cpu", DTYPE="float32")
    assert whole[SMALL]["memory_bytes"]["min"] == GB + 4 * 22_713_216
    _, none = listing(DEVICE="cpu", MEMORY_FRACTION="0.0001")
    assert {model["fit"] for model in none.values()} == {"does not fit"}


@pytest.mark.parametrize(("card", "unified"), [(GB10, True), (H100, False)])
def test_on_a_gpu(card: Path, unified: bool) -> None:
    whole, models = listing(FAKE_NVML=str(card))
    machine = whole["machine"]
    assert (machine["device"], machine["dtypes"], machine["unified"]) == ("cuda", ["bfloat16"], unified)
    assert (machine["floor_bytes"] > 0) is unified
    assert models[LARGE]["memory_bytes"]["min"] == 4 * GB + 2 * 7_851_016_192
    if not unified:
        assert models[LARGE]["fit"] == "fits"


def test_a_gpu_without_bfloat16(tmp_path: Path) -> None:
    text = H100.read_text()
    line = next(line for line in text.splitlines() if line.startswith("compute_capability"))
    turing = tmp_path / "turing.txt"
    turing.write_text(text.replace(line, "compute_capability 7.5"))
    whole, _ = listing(FAKE_NVML=str(turing))
    assert whole["machine"]["dtypes"] == ["float32"]


def test_in_fp8_linear_layers_take_one_byte(tmp_path: Path) -> None:
    whole, models = listing(FAKE_NVML=str(H100), DTYPE="fp8")
    memory, parameters = models["Qwen/Qwen3-Embedding-8B"]["memory_bytes"], 7_567_295_488
    assert whole["machine"]["dtypes"] == ["fp8"]
    assert memory["min"] == 4 * GB + parameters
    assert memory["min"] + 151_665 * 4096 <= memory["max"] < 4 * GB + 1.2 * parameters  # the embedding stays
    text = H100.read_text()
    line = next(line for line in text.splitlines() if line.startswith("compute_capability"))
    ampere = tmp_path / "ampere.txt"
    ampere.write_text(text.replace(line, "compute_capability 8.6"))
    for environment in ({"FAKE_NVML": str(ampere)}, {"DEVICE": "auto"}):
        refused = run(DTYPE="fp8", **environment)
        assert refused.exit_code == 2
        assert "compute capability 8.9 or newer" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("smallest", "largest", "fit"),
    [
        (10, 20, Fit.FITS),
        (39, 39, Fit.FITS),
        (30, 60, Fit.TIGHT),  # in bfloat16 alone
        (60, 60, Fit.TIGHT),  # once others give memory back
        (81, 81, Fit.DOES_NOT_FIT),  # MEMORY_FRACTION
    ],
)
def test_what_fits(smallest: int, largest: int, fit: Fit) -> None:
    room = MemoryRoom(100 * GB, 44 * GB, 4 * GB, 80 * GB, unified=True, of_gpu=True)
    assert room.fit(smallest * GB, largest * GB) is fit


def test_a_gpu_whose_driver_tells_no_memory_counts_as_the_machine() -> None:
    room = memory_room(GpuMemory(), 1.0, 0.9)
    assert (room.of_gpu, room.floor, room.total > 0) == (False, GB, True)


def test_as_text() -> None:
    result = run("--task", "rerank", DEVICE="cpu")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].startswith("a CPU: ")
    assert "; weights in bfloat16 or float32, whichever is faster" in lines[0]
    assert "embed: " not in result.stdout
    row = next(line for line in lines if line.startswith("BAAI/bge-reranker-v2-m3"))
    assert row.split()[1:8] == ["xlm-roberta", "568", "M", "2.3", "GB", "apache-2.0", "8,192"]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path / "hub") as fake:
        yield fake


def test_what_the_hub_s_cache_has(fake: FakeHub, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors")
    fake.files = {name: (minilm_folder / name).read_bytes() for name in names}
    tiny = replace(FAMILIES["bert"], examples=(HubModel(NAME, Task.EMBED, 22_713_216, "mit", 256, 384),))
    monkeypatch.setattr(listed, "FAMILIES", {"bert": tiny})
    assert listing(DEVICE="cpu")[1][NAME]["state"] == "on the hub"
    assert run_pull(NAME) == 0
    asked = len(fake.received)
    assert listing(DEVICE="cpu")[1][NAME]["state"] == "cached"
    next(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/model.safetensors")).unlink()
    assert listing(DEVICE="cpu")[1][NAME]["state"] == "partly"
    assert len(fake.received) == asked


def test_what_a_server_serves(server: RunningServer) -> None:
    _, models = listing("--url", server.url, DEVICE="cpu")
    assert [name for name, model in models.items() if model["state"] == "served"] == [MINILM]


def test_a_server_that_is_not_there() -> None:
    result = run("--url", f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "127.0.0.1" in result.stderr


def test_a_setting_that_is_wrong() -> None:
    result = run(DTYPE="int3")
    assert (result.exit_code, "DTYPE" in result.stderr) == (2, True)


@pytest.mark.parametrize("task", Task)
def test_the_start_with_a_model_that_is_not_supported_points_to_the_list(task: Task, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"model_type 'gpt2' is not supported; .*`vecmill models` lists them"):
        family_of("EMBED_MODEL=x", tmp_path / "config.json", {"model_type": "gpt2"}, task)


def test_torch_is_not_imported() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from vecmill.__main__ import cli; "
        "code = CliRunner().invoke(cli, ['models']).exit_code; sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
