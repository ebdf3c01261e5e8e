"""`vecmill serve` as a process: what it prints, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from time import sleep

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.servers import Ended, free_port, run, start, vecmill_command
from tests.tiny_checkpoints import tiny_bert
from vecmill.storage.state_folder import StateFolder


def serve(*options: str, cwd: Path | None = None) -> Ended:
    return run([sys.executable, "-m", "vecmill", "serve", *options], env=os.environ, cwd=cwd)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--device", "gpu"], 2, "DEVICE='gpu'"),
        (["--max-batch-size", "64", "--max-batch-tokens", "32"], 2, "lower MAX_BATCH_SIZE"),
        (["--no-such-flag"], 2, "No such option"),
        (["--env-file", "./nowhere.env"], 2, "nowhere.env cannot be read"),
        (["--api-key-file", "./nowhere.keys"], 2, "nowhere.keys cannot be read"),
        (["--state-dir", "~nobody-here/state"], 2, "STATE_DIR"),
        (["--host", "256.1.1.1.1"], 2, "HOST=256.1.1.1.1 PORT=8080 cannot be bound"),
        (["--host", "a" * 70], 2, "set HOST to an address of this machine"),
        (["--host", "203.0.113.77", "--port", "0"], 1, "set HOST to an address of this machine"),
        (["--port", "0", "--embed-model", "./nowhere"], 2, "no such folder"),
        (["--port", "0", "--max-model-len", "100000"], 2, "above the 256 tokens"),
    ],
)
def test_a_wrong_start_ends_with_a_sentence(options: list[str], status: int, said: str) -> None:
    ended = serve(*options)
    assert ended.returncode == status
    assert said in " ".join(ended.output.split())
    assert "Traceback" not in ended.output


def test_a_model_that_cannot_be_loaded_ends_a_server_that_serves_another(tmp_path: Path, minilm_folder: Path) -> None:
    """With the exit code that it would have had as the first model."""
    folder = tiny_bert(tmp_path / "tiny", minilm_folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, folder / "model.safetensors")
    ended = serve("--port", "0", "--embed-model", f"auto,{folder}", "--state-dir", str(tmp_path / "state"))
    assert (ended.returncode, "Traceback" in ended.output) == (2, False)
    assert "all-MiniLM-L6-v2 answers requests now; still to be loaded: tiny" in ended.output
    assert "has values that are not finite" in ended.output.splitlines()[-1]


def test_a_dotenv_that_is_no_text_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"HOST=\xff\xfe")
    ended = serve(cwd=tmp_path)
    assert (ended.returncode, "Traceback" in ended.output) == (2, False)
    assert ".env is no text" in ended.output


def test_a_second_server_on_one_folder_may_come_later(tmp_path: Path) -> None:
    held = StateFolder.open(tmp_path)
    ended = serve("--port", "0", "--state-dir", str(tmp_path))
    held.close()
    assert (ended.returncode, "Traceback" in ended.output) == (1, False)
    assert "in use by another vecmill server" in ended.output


def test_a_port_in_use_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_MODLE", "somebody/model")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = serve("--port", str(taken.getsockname()[1]))
    assert ended.returncode == 1
    assert "another PORT" in ended.output
    assert "Traceback" not in ended.output


def test_the_start_log_tells_what_runs_and_sigterm_ends_it(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = start(vecmill_command(port), stdout=file, env=os.environ)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=20)) as client:
                while client.get("/health").status_code != 200 or "/docs" not in log.read_text():
                    assert process.poll() is None, log.read_text()
                secret = client.post("/embed", json={"inputs": "a secret text", "dimensions": 999})
                assert secret.status_code == 422
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    text = log.read_text("utf-8")
    for told in (
        "vecmill 0.",
        "all-MiniLM-L6-v2",
        "sha256:",
        "384",
        "dtype",
        "measured on this CPU",
        "cpu (",
        "limits",
        "state",
    ):
        assert told in text
    assert f"http://127.0.0.1:{port}/docs" in text
    assert "secret" not in text
    assert "Traceback" not in text


def test_the_json_log_is_one_object_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = vecmill_command(0, "--log-format", "json", "--log-level", "debug")
        process = start(command, stdout=file, env=os.environ)
        try:
            while (told := re.search(r"ready on http://127.0.0.1:(\d+)", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                sleep(0.05)
            port = int(told[1])
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                assert client.get("/ready").status_code == 200
                # Servers of one machine are told apart by the port that each was given.
                assert client.get("/health").json()["replica"].endswith(f":{port}")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert any(line.get("path") == "/ready" and line.get("status") == 200 for line in lines)
    messages = [line["message"] for line in lines]
    ready = messages.index(f"ready on http://127.0.0.1:{port}")
    assert re.fullmatch(
        r"sentence-transformers/all-MiniLM-L6-v2 \(revision [\w:]+\) embeds on cpu "
        r"\(\d+ threads\) in (float32|bfloat16), in forward passes of up to \d+ tokens",
        messages[ready - 1],
    )


def test_garbage_does_not_pile_up_to_the_size_of_what_was_there_at_the_start() -> None:
    # Objects in circles, each of which outlives two younger collections, as those of a slow request do.
    code = """if True:
        import gc
        from collections import deque
        from vecmill.serve.process import exclude_from_collections

        class Circle:
            def __init__(self):
                self.itself = self

        there_at_the_start = [[] for _ in range(1_000_000)]
        exclude_from_collections()
        alive, most = deque(maxlen=3_000), 0
        for number in range(400_000):
            alive.append(Circle())
            if number % 5_000 == 0:
                most = max(most, len(gc.get_objects()))
        print(most)
    """
    ended = run([sys.executable, "-c", code], env=os.environ)
    assert ended.returncode == 0, ended.output
    assert int(ended.output) < 100_000
