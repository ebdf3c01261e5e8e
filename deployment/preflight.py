"""What has to be so before anything is changed. All that is wrong is said at once, each with its cure."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from deployment import files, machine
from deployment.commands import ask, ask_json
from deployment.situation import VENV_BYTES, Situation

SAFE_KEY = re.compile(r"[!-~]{16,}")
KEY_OPTION = re.compile(r"scopes=(use|admin)([+,](use|admin))*|(requests|tokens|jobs)=[1-9][0-9]*")


def problems(found: Situation) -> list[str]:
    """Sentences that say what is wrong and what to do."""
    checks = (_rights, _systemd, _python, _compiler, _disk, _keys, _embed_port, _tailscale, _docker, _vllm_port)
    return [sentence for check in checks for sentence in check(found)]


def _rights(found: Situation) -> Iterator[str]:
    if found.layout.staged or found.options.dry_run:
        return
    if found.layout.user and os.geteuid() == 0:
        yield "--user is for an account without root: run it as that account, without sudo."
    if not found.layout.user and os.geteuid() != 0:
        yield "It needs root: sudo python3 deploy.py (or --user, for services of your own)."


# Prints where it lies; a virtual environment's Python is only a link to that.
WHAT_PYTHON = (
    "import os, sys, venv, ensurepip; print(os.path.realpath(sys.base_prefix)); sys.exit(sys.version_info < (3, 11))"
)


def _systemd(found: Situation) -> Iterator[str]:
    if not sys.platform.startswith("linux") or not found.layout.real(Path("/run/systemd/system")).is_dir():
        yield "systemd does not run here: use the containers in docker/, or `make serve`."
    elif found.layout.user and not os.environ.get("XDG_RUNTIME_DIR"):
        yield "There is no systemd of this user (XDG_RUNTIME_DIR is not set): log in with ssh or at the console."


def _python(found: Situation) -> Iterator[str]:
    if not found.builds:
        return
    python = found.options.python
    asked = ask(python, "-c", WHAT_PYTHON)
    if asked.returncode == 127:
        yield f"There is no {python}: --python names the Python to install with."
    elif "ensurepip" in asked.stderr or "venv" in asked.stderr:
        yield f"{python} cannot make virtual environments: sudo apt install python3-venv"
    elif asked.returncode != 0:
        yield f"{python} is older than 3.11: --python names a newer one."
    elif not found.layout.user and asked.stdout.startswith(("/home/", "/root/")):
        yield (
            f"{python} lies in {asked.stdout.strip()}, and the service cannot see home folders: --python "
            f"/usr/bin/python3 is the system's."
        )


def _compiler(found: Situation) -> Iterator[str]:
    embed = found.embed
    if embed is None or not embed.compiles or not embed.on_gpu:
        return
    if missing := machine.missing_to_compile(found.options.python, on_gpu=True):
        without = "" if embed.new else f"; or TORCH_COMPILE=false in {found.layout.embed_env}"
        yield (
            f"On a GPU the models' layers are compiled, which takes a C compiler and Python's headers; without them a "
            f"search takes up to twice as long: sudo apt install {' '.join(missing)}{without}"
        )


def _disk(found: Situation) -> Iterator[str]:
    path = found.layout.real(found.layout.releases)
    if found.builds and (free := files.bytes_free(path)) < VENV_BYTES:
        yield f"{path} has {free / 1e9:.1f} GB free, the installation takes {VENV_BYTES / 1e9:.0f}: make room."


def _keys(found: Situation) -> Iterator[str]:
    path = found.options.api_key_file
    if path is None:
        return
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        yield f"--api-key-file {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}."
        return
    entries = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not entries:
        yield f"--api-key-file {path} holds no key: write one on each line, `name:key` or `key`."
    for number, line in entries:
        name, colon, key = line.partition(":")
        value, *options = (key if colon else name).split() or [""]
        if not SAFE_KEY.fullmatch(value) or "," in line or not all(map(KEY_OPTION.fullmatch, options)):
            yield (
                f"--api-key-file {path}, line {number}: a key is printable ASCII of at least 16 characters without "
                f"spaces and commas; after it may stand `scopes=use+admin`, `requests=N`, `tokens=N`, `jobs=N`."
            )


def _embed_port(found: Situation) -> Iterator[str]:
    embed = found.embed
    if embed is None:
        return
    holds = embed.before.get("PORT") or files.text(embed.unit.path) or ""
    if embed.unit.runs and re.search(rf"\b{embed.port}\b", holds):
        return
    if why := machine.listen_error(embed.host, embed.port):
        yield (
            f"qmd-embed cannot listen on {embed.host} port {embed.port} ({why}): `sudo ss -ltnp` shows what does; stop "
            f"it, or choose others with --host and --port."
        )


def _vllm_port(found: Situation) -> Iterator[str]:
    vllm, docker = found.vllm, found.docker
    if vllm is None:
        return
    holds = vllm.unit.runs or (docker is not None and docker.container is not None)
    if holds and vllm.before.get("HOST_PORT") in (None, str(vllm.port)):
        return
    if why := machine.listen_error("127.0.0.1", vllm.port):
        yield (
            f"qmd-vllm cannot listen on port {vllm.port} ({why}): `sudo ss -ltnp` shows what does; stop it, or choose "
            f"another with --vllm-port."
        )


def _tailscale(found: Situation) -> Iterator[str]:
    tailscale = found.tailscale
    if tailscale is None:
        return
    without = "or deploy with --no-tailscale."
    if not tailscale.installed:
        yield f"Tailscale is not installed: https://tailscale.com/download/linux, then sudo tailscale up; {without}"
    elif not tailscale.running:
        yield f"Tailscale is not logged in: sudo tailscale up; {without}"
    elif not tailscale.tagged:
        yield (
            "This machine has no tag, and Tailscale lets only tagged machines host services: in the admin console "
            "define svc:qmd-embed and svc:qmd-vllm (endpoint tcp:443) and give this machine a tag (Machines, Edit ACL "
            "tags); " + without
        )
    elif found.layout.user and (ask_json("tailscale", "debug", "prefs") or {}).get("OperatorUser") != found.user:
        yield f"Tailscale is not yours to set up: sudo tailscale set --operator={found.user}; {without}"


def _docker(found: Situation) -> Iterator[str]:
    docker = found.docker
    if docker is None:
        return
    without = "or deploy with --no-vllm."
    if docker.path is None:
        yield f"Docker is not installed: sudo apt install docker.io nvidia-container-toolkit; {without}"
    elif "permission denied" in docker.answered:
        yield f"This account may not use Docker: sudo usermod -aG docker {found.user}, log in again; {without}"
    elif docker.answered:
        yield f"Docker does not answer: sudo systemctl start docker; {without}"
    elif not docker.nvidia:
        yield (
            "Docker has no NVIDIA runtime: sudo apt install nvidia-container-toolkit && sudo nvidia-ctk runtime "
            f"configure --runtime=docker && sudo systemctl restart docker; {without}"
        )
