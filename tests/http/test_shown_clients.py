"""What the README and the page of batches show of clients runs as it stands, against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.servers import RunningServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BATCHES = (ROOT / "docs" / "jobs-and-batches.md").read_text("utf-8").partition("\n## Batches\n")[2]


def shown(language: str, server: RunningServer, page: str = BATCHES) -> str:
    block: str
    [block] = (
        found for found in re.findall(rf"```{language}\n(.*?)```", page, re.S) if "http://127.0.0.1:8080" in found
    )
    return block.replace("http://127.0.0.1:8080", server.url)


def test_the_upload_with_curl(server: RunningServer, tmp_path: Path) -> None:
    command = ["sh", "-e", "-c", shown("sh", server)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "input.jsonl").stat().st_size


def test_the_batch_with_openais_client(server: RunningServer) -> None:
    command = [sys.executable, "-c", shown("python", server)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "a 384\nb 384\n"


def test_embeddings_with_openais_client(server: RunningServer) -> None:
    command = [sys.executable, "-c", shown("python", server, README)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 384\n"
