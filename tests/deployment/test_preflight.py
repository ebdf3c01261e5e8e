"""What is wrong with a machine is said at once and before anything is changed, each thing with its cure."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from deployment import console
from tests.deployment.world import World


def refused(world: World, *options: str) -> str:
    """What is said; nothing was changed."""
    before = world.snapshot()
    done = world.deploy(*options)
    assert done.returncode == 1, done.stdout
    assert world.changes() == []
    assert world.snapshot() == before
    assert "nothing was changed" in done.stderr
    return done.stderr


def test_everything_at_once(world: World) -> None:
    (world.root / "run/systemd/system").rmdir()
    world.without("docker")
    world.without("tailscale")
    message = refused(world)
    assert "3 things to mend first" in message
    assert "systemd does not run here" in message
    assert "sudo tailscale up; or deploy with --no-tailscale." in message
    assert "Docker is not installed" in message
    assert "or deploy with --no-vllm." in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"BackendState": "NeedsLogin"}, "Tailscale is not logged in: sudo tailscale up"),
        ({"Self": {}}, "This machine has no tag"),
    ],
)
def test_tailscale(world: World, change: dict[str, Any], sentence: str) -> None:
    world.set(tailscale={**world.state["tailscale"], **change})
    assert sentence in refused(world, "--no-vllm")


@pytest.mark.parametrize(
    ("at", "answer", "sentence"),
    [
        ("docker info", {"stderr": "Cannot connect to the Docker daemon"}, "sudo systemctl start docker"),
        ("docker info", {"stderr": "permission denied while trying"}, "sudo usermod -aG docker"),
        ("docker info", {"code": 0, "stdout": '{"Runtimes": {"runc": {}}}'}, "nvidia-ctk runtime configure"),
        ("ensurepip", {"stderr": "No module named 'ensurepip'"}, "sudo apt install python3-venv"),
        ("ensurepip", {}, "is older than 3.11"),
    ],
)
def test_docker_and_python(world: World, at: str, answer: dict[str, Any], sentence: str) -> None:
    world.fail(at, **answer)
    assert sentence in refused(world)


def test_a_port_that_something_else_uses(world: World) -> None:
    with socket.create_server(("127.0.0.1", world.port)), socket.create_server(("127.0.0.1", world.vllm_port)):
        message = refused(world)
    assert f"qmd-embed cannot listen on 127.0.0.1 port {world.port} (Address already in use)" in message
    assert f"qmd-vllm cannot listen on port {world.vllm_port}" in message
    assert "--port" in message


def test_a_gpu_without_what_its_layers_are_compiled_with(world: World) -> None:
    """Not a line in a log: half the speed is lost, and nobody reads why."""
    world.fail("Python.h", code=0, stdout="3.13 False\n")  # of the Python that is deployed with
    assert "sudo apt install python3.13-dev\n" in refused(world, "--no-vllm")
    world.without("gcc")
    assert "sudo apt install gcc python3.13-dev\n" in refused(world, "--no-vllm")
    world.mend()
    assert "sudo apt install gcc\n" in refused(world, "--no-vllm")
    settings = world.root / "etc/vecmill/embed.env"
    settings.parent.mkdir(parents=True)
    for setting in ("TORCH_COMPILE=false", "DEVICE=cpu"):
        settings.write_text(f"{setting}\nPORT={world.port}\n")
        assert "sudo apt install gcc" not in world.deploy("--no-vllm", "--dry-run").stderr
    settings.write_text("DEVICE=cuda\n")
    assert "or TORCH_COMPILE=false in /etc/vecmill/embed.env" in refused(world, "--no-vllm")


def test_an_address_that_is_not_of_this_machine(world: World) -> None:
    assert "cannot listen on 192.0.2.1" in refused(world, "--no-vllm", "--host", "192.0.2.1")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory"),
        (b"# none yet\n\n", "holds no key"),
        (b"good\nann:two words\n", "line 2: a key is printable ASCII without spaces and commas"),
        (b"a,b\n", "line 1"),
        (b"ann:\n", "line 1"),
        (b"ann:a-short-key\n", "of at least 16 characters"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"#" * 1_048_577, "larger than 1048576 bytes"),
    ],
)
def test_key_files(world: World, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_bytes(content)
    message = refused(world, "--no-vllm", "--api-key-file", str(keys))
    assert sentence in message
    assert "two words" not in message


def test_what_one_should_know_does_not_keep_it_from_going_on(world: World) -> None:
    world.without("nvidia-smi")
    world.set(tailscale={**world.state["tailscale"], "CertDomains": None})
    done = world.deploy("--no-vllm", "--wait", "0")
    assert done.returncode == 0, done.stderr
    assert "No NVIDIA GPU is seen" in done.stdout
    assert "enable them in the admin console under DNS" in done.stdout
    assert "torch.compile cannot be used" in done.stdout
    assert "sudo apt install g++\n" in done.stdout
    settings = world.root / "etc/vecmill/embed.env"
    settings.write_text(re.sub("ALLOWED_HOSTS=.*", "ALLOWED_HOSTS=search.example", settings.read_text()))
    assert "ALLOWED_HOSTS lacks qmd-embed.tail1234.ts.net" in world.deploy("--no-vllm", "--dry-run").stdout


def test_nothing_is_imported_from_the_folder_that_it_is_started_in(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may stand in /tmp, where anybody may have put a venv.py."""
    monkeypatch.chdir(tmp_path)
    for module in ("venv", "ensurepip", "sysconfig", "json"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "python").symlink_to(sys.executable)
    done = world.run("embed", "--no-tailscale", "--dry-run", "--python", "./python")
    assert f"$ {tmp_path}/python -m venv " in done.stdout
    assert "There is no" not in done.stderr
    console.tell([sys.executable, "-m", "venv", "--help"], shown=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["http", "99999", "-1", "8001x", "\u0663"])
def test_a_port_that_is_none(world: World, value: str) -> None:
    for name, path in (("PORT", "etc/vecmill/embed.env"), ("HOST_PORT", "etc/vecmill/vllm.env")):
        (world.root / path).parent.mkdir(parents=True, exist_ok=True)
        (world.root / path).write_text(f"{name}={value}\n")
    done = world.run("--no-tailscale", "--python", str(world.python), "--dry-run")
    assert f"PORT={value} in /etc/vecmill/embed.env is no port" in done.stderr
    assert f"HOST_PORT={value} in /etc/vecmill/vllm.env is no port" in done.stderr
    assert "Traceback" not in done.stderr + world.run("--status").stderr


@pytest.mark.parametrize("home", ["/home/ann b", "/home/50%h", "/home/o'neil", "/home/a$b", "/home/a:b"])
def test_a_path_that_a_unit_would_read_otherwise(world: World, home: str) -> None:
    world.home = Path(home)
    world.usual = ("--no-tailscale",)
    assert f"{home} (HOME): in a path" in refused(world, "--user")
    world.home = Path("/home/ann")
    mounts = [{"Source": f"{home}/models", "Destination": "/root/.cache/huggingface"}]
    world.set(container={"Name": "/qmd-vllm", "Mounts": mounts})
    assert f"{home}/models (the container's folder of models): in a path" in refused(world)


def test_without_a_port_it_is_the_server_s_own(world: World) -> None:
    settings = world.root / "etc/vecmill/embed.env"
    settings.parent.mkdir(parents=True)
    settings.write_text("HOST=localhost\n")
    done = world.run("embed", "--no-tailscale", "--python", str(world.python), "--dry-run")
    assert "wait for http://localhost:8080/ready" in done.stdout


def test_a_host_that_is_no_name(world: World) -> None:
    settings = world.root / "etc/vecmill/embed.env"
    settings.parent.mkdir(parents=True)
    settings.write_bytes(b"HOST=a\x00b\n")
    assert "cannot listen on a" in refused(world, "--no-vllm")
