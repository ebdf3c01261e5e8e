"""The clients' own tests, each set run by its environment's interpreter: `make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.expected import expected
from tests.servers import free_port, running, vecmill_command

ENVIRONMENTS = Path(__file__).parent / "environments"
INSTALLED = Path(__file__).parents[2] / ".clients"
KEY = "a-quite-long-secret-key"

OPTIONS = ("--dtype", "float32", "--device", "cpu", "--torch-compile", "false")

CLIENT_ENVIRONMENT = {
    # huggingface_hub's offline mode, on for the other tests, forbids it every address.
    "HF_HUB_OFFLINE": "0",
    # What these packages would otherwise fetch from, or report to, the network.
    "HAYSTACK_TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    "NVIDIA_USAGE_TELEMETRY_ENABLED": "false",
}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def given(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file from which clients' tests learn where the servers are and what is right."""
    port, locked_port = free_port(), free_port()
    strict = {"API_KEY": f"test:{KEY}", "STRICT_MODEL": "true"}
    with (
        running(vecmill_command(port, *OPTIONS), port, "/ready") as server,
        running(vecmill_command(locked_port, *OPTIONS), locked_port, "/ready", strict) as locked,
    ):
        file = tmp_path_factory.mktemp("clients") / "given.json"
        servers = {"url": server.url, "locked_url": locked.url, "key": KEY}
        file.write_text(json.dumps({**expected(minilm_folder), **servers}), "utf-8")
        yield file


@pytest.mark.parametrize("name", ["langchain", "haystack_litellm", "llama_index"])
def test_python_clients(name: str, given: Path) -> None:
    python = INSTALLED / name / "bin" / "python"
    _run([str(python), "-m", "pytest", "--config-file", "pytest.ini", "common", name], given)


def test_node_clients(given: Path) -> None:
    _run(["node", "--test", *sorted(path.name for path in ENVIRONMENTS.glob("node/*.test.js"))], given, "node")


def _run(command: list[str], given: Path, folder: str = ".") -> None:
    """Their output is this test's: shown when it fails."""
    environment = {**os.environ, **CLIENT_ENVIRONMENT, "VECMILL_CLIENTS_GIVEN": str(given)}
    finished = subprocess.run(command, cwd=ENVIRONMENTS / folder, env=environment, check=False)
    assert finished.returncode == 0
