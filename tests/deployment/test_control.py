"""`--status`, `--logs`, `--restart`, `--stop`, and options that make no sense."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.deployment.world import World


def test_status(deployed: World) -> None:
    done = deployed.run("--status")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][:3] == ["qmd-embed", "active,", "ready"]
    assert rows[1][-4:] == [f"http://127.0.0.1:{deployed.port}", "all-MiniLM-L6-v2", "on", "cpu"]
    assert rows[2][-1] == "Qwen/Qwen3-4B"
    assert f"https://qmd-embed.tail1234.ts.net -> http://127.0.0.1:{deployed.port}" in done.stdout

    deployed.set(loading=1000)
    done = deployed.run("embed", "--status")
    assert done.returncode == 1
    assert "not ready" in done.stdout
    assert "%: loading part" in done.stdout

    assert deployed.run("vllm", "--stop").returncode == 0
    done = deployed.run("vllm", "--status")
    assert done.returncode == 1
    assert "inactive, not ready" in done.stdout
    assert deployed.changes() == ["systemctl stop qmd-vllm.service"]


def test_status_of_what_is_not_there(world: World) -> None:
    done = world.run("--status")
    assert done.returncode == 1
    assert "not deployed" in done.stdout
    assert world.run("vllm", "--status").returncode == 1
    assert world.run("--restart").returncode == 1


def test_vllm_need_not_be_there(world: World) -> None:
    assert world.deploy("--no-vllm").returncode == 0
    assert world.run("--status").returncode == 0


def test_restart_waits_for_the_new_process_and_stop_goes_backwards(deployed: World) -> None:
    deployed.set(loading=3)
    done = deployed.run("--restart")
    assert done.returncode == 0
    assert "80 % loading part 2" in done.stdout
    assert deployed.run("--stop").returncode == 0
    assert deployed.changes() == [
        "systemctl restart --no-block qmd-embed.service",
        "systemctl restart --no-block qmd-vllm.service",
        "systemctl stop qmd-vllm.service",
        "systemctl stop qmd-embed.service",
    ]


def test_logs(deployed: World) -> None:
    deployed.set(journal="ready on http://127.0.0.1:8001\n")
    assert deployed.run("--logs").stdout == "ready on http://127.0.0.1:8001\n"
    assert deployed.run("embed", "--logs", "-n", "5", "--user").returncode == 0
    both, embedder = (call for call in deployed.calls() if call.startswith("journalctl"))
    assert both == "journalctl --unit qmd-embed.service --unit qmd-vllm.service --follow --lines 100"
    assert embedder == "journalctl --user --unit qmd-embed.service --follow --lines 5"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("nginx",), "invalid choice: 'nginx'"),
        (("--status", "--stop"), "not allowed with"),
        (("--port", "443"), "a number from 1024 to 65535"),
        (("--model", "a b"), "letters, digits"),
        (("--model", "a\nAPI_KEY=x"), "letters, digits"),
        (("--restart", "--model", "a"), "--model cannot be used with --restart"),
        (("--no-vllm", "--model", "a"), "say `embed --model`"),
        (("vllm", "--no-vllm"), "contradict"),
        (("vllm", "--host", "0.0.0.0"), "--host does not concern vllm"),
        (("embed", "--image", "a"), "--image does not concern embed"),
        (("embed", "--model", "/home/ann/model"), "cannot see home folders"),
        (("--purge",), "belongs to --uninstall"),
        (("-n", "5"), "belongs to --logs"),
        (("--logs", "-n", "0"), "a number from 1 on"),
        (("--status", "--dry-run"), "changes nothing"),
    ],
)
def test_wrong_options_are_a_sentence(world: World, options: tuple[str, ...], sentence: str) -> None:
    done = world.run(*options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert world.calls() == []


def test_what_speaks_no_http_is_not_ready(deployed: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = deployed.root / "etc/vecmill/embed.env"
        settings.write_text(settings.read_text().replace(f"PORT={deployed.port}", f"PORT={port}"))

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        speaking = threading.Thread(target=answer, daemon=True)
        speaking.start()
        done = deployed.run("embed", "--status", "--no-tailscale")
        speaking.join(10)
    assert done.returncode == 1
    assert f"http://127.0.0.1:{port} does not answer" in done.stdout
