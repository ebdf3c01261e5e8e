"""A server runs nothing that lies in a model's folder, whatever its files say, and loads no pickle."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.servers import free_port, run, running, vecmill_command
from tests.tiny_checkpoints import tiny_nomic
from vecmill.core.own_python import OWN_PYTHON
from vecmill.core.types import Task
from vecmill.models.checkpoint import read
from vecmill.models.rerank_prompt import rerank_form
from vecmill.models.source import find

GOLDEN = Path(__file__).parents[1] / "golden"
MODULES = ("modeling_hf_nomic_bert", "configuration_hf_nomic_bert", "tokenization_own", "custom_st", "sitecustomize")


class Shell:
    """Pickled, it is a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    """A checkpoint whose configuration names classes of its own, which lie beside it, as pickles of every name do."""
    folder = tiny_nomic(tmp_path_factory.mktemp("hostile"), minilm_folder)
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    (folder / "__init__.py").write_text("")
    command = pickle.dumps(Shell(folder / "ran"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "1_Pooling/pytorch_model.bin", "vocab.pkl"):
        (folder / name).write_bytes(command)
    return folder


def watched(hostile: Path, report: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.checkpoints.watched_server", str(report), str(hostile), *options]


@pytest.mark.nightly
def test_the_hook_sees_both(hostile: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    run(watched(hostile, report, "--try"), env=os.environ)
    said = report.read_text()
    assert "import 'modeling_hf_nomic_bert'" in said or f"open {hostile}/modeling_hf_nomic_bert.py" in said
    assert "pickle pathlib" in said
    assert (hostile / "ran").exists()
    (hostile / "ran").unlink()


def test_nothing_of_a_model_s_folder_is_run(hostile: Path, tmp_path: Path) -> None:
    report, port = tmp_path / "report", free_port()
    options = vecmill_command(port, "--embed-model", str(hostile))[4:]
    with running(watched(hostile, report, *options), port, "/ready") as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": str(hostile), "input": ["hello", "world"]})
        assert answer.status_code == 200
        assert len(answer.json()["data"]) == 2
    assert not report.exists(), report.read_text()
    assert not (hostile / "ran").exists()


def test_a_folder_with_pickles_alone_is_refused_and_none_is_opened(hostile: Path, tmp_path: Path) -> None:
    report, port = tmp_path / "report", free_port()
    (hostile / "model.safetensors").rename(tmp_path / "model.safetensors")
    try:
        done = run(watched(hostile, report, *vecmill_command(port, "--embed-model", str(hostile))[4:]), env=os.environ)
    finally:
        (tmp_path / "model.safetensors").rename(hostile / "model.safetensors")
    assert done.returncode != 0
    assert "only pickled weights" in done.output
    assert not report.exists(), report.read_text()
    assert not (hostile / "ran").exists()


def test_nothing_of_the_folder_is_run_where_the_server_is_started_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cd model; vecmill serve --rerank-model .`: the process of its own that renders a template starts there too."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3" / "reranker", folder)
    for module in ("json", "jinja2", "resource", "torch"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{# one that was not rendered before #}")
    monkeypatch.chdir(folder)
    assert rerank_form(read(find(".", Task.RERANK))).prompt is not None
    subprocess.run([*OWN_PYTHON, "-m", "vecmill", "version"], check=True, capture_output=True)
    assert not (tmp_path / "ran").exists()
