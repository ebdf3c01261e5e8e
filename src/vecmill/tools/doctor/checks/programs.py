"""Other programs, where they are installed: Tailscale, Docker and Ray.

Sources: https://tailscale.com/docs/reference/tailscale-cli (`status --json`, `serve status --json`);
https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vecmill.tools.doctor.context import DoctorContext, ended
from vecmill.tools.doctor.findings import Finding, fail, install, ok, together, warn


def check_tailscale(context: DoctorContext) -> Finding:
    """Ask the daemon."""
    if shutil.which("tailscale") is None:
        return ok("not installed, and not needed")
    answer = ended("tailscale", "status", "--json")
    status = _parsed(answer.stdout)
    if not status:
        return warn(f"installed, and its daemon does not answer: {answer.problem}", "sudo systemctl start tailscaled")
    if status.get("BackendState") != "Running":
        return warn(f"installed, and not connected ({status.get('BackendState')})", "sudo tailscale up")
    serving = _parsed(ended("tailscale", "serve", "status", "--json").stdout)
    return judge_tailscale(status, serving, context.settings.http.port)


def judge_tailscale(status: dict[str, Any], serving: dict[str, Any], port: int) -> Finding:
    """By what `tailscale status --json` and `tailscale serve status --json` say."""
    name = str((status.get("Self") or {}).get("DNSName") or "").rstrip(".")
    here = sorted({host for host, target in proxies(serving) if target.rstrip("/").endswith(f":{port}")})
    https = bool(status.get("CertDomains"))
    facts = {"name": name, "https": https, "serves": here}
    seen = f"connected as {name}"
    if not here:
        return ok(f"{seen}; port {port} is not served to the tailnet (tailscale serve --bg {port} would)", **facts)
    seen += f"; {', '.join(here)} leads to port {port}"
    if not https:
        return warn(
            f"{seen}, and HTTPS is off in this tailnet",
            "Turn on HTTPS certificates: https://login.tailscale.com/admin/dns",
            **facts,
        )
    return ok(seen, **facts)


def proxies(serving: Any, host: str = "") -> Iterator[tuple[str, str]]:
    """Name and target of every proxy, at any depth of the configuration."""
    if not isinstance(serving, dict):
        return
    for key, value in serving.items():
        if key == "Proxy":
            yield host, str(value)
        elif key == "Web" and isinstance(value, dict):
            for name, handlers in value.items():
                yield from proxies(handlers, name)
        else:
            yield from proxies(value, host)


def _parsed(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


START = "If containers are to be used: sudo systemctl start docker, and sudo usermod -aG docker $USER"
RUNTIME = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"


def check_docker(context: DoctorContext) -> Finding:
    """Ask the engine."""
    if shutil.which("docker") is None:
        return ok("not installed, and not needed")
    answer = ended("docker", "info", "--format", "{{json .}}")
    try:
        info = json.loads(answer.stdout)
    except ValueError:
        info = {}
    if not isinstance(info, dict) or not info.get("ServerVersion"):
        errors = (info.get("ServerErrors") or [answer.problem]) if isinstance(info, dict) else [answer.problem]
        reason = (str(errors[0]).splitlines() or ["it gives no reason"])[0]
        return warn(f"installed, and its engine does not answer: {reason}", START)
    return judge_docker(info, has_gpu=context.has_gpu)


def judge_docker(info: dict[str, Any], *, has_gpu: bool) -> Finding:
    """By what `docker info` says."""
    seen = f"engine {info['ServerVersion']} answers"
    if not has_gpu:
        return ok(seen, version=info["ServerVersion"])
    nvidia = "nvidia" in (info.get("Runtimes") or {}) or any(
        str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in info.get("DiscoveredDevices") or ()
    )
    if nvidia:
        return ok(f"{seen}, with NVIDIA's runtime", version=info["ServerVersion"])
    return warn(f"{seen}, without NVIDIA's runtime: containers see no GPU", RUNTIME, version=info["ServerVersion"])


OLDEST_RAY = (2, 60)
GPUS_OF_RAY = re.compile(r"^\s*([\d.]+)/([\d.]+) GPU", re.MULTILINE)
REDIS_SECONDS = 1.0


def check_ray(context: DoctorContext) -> Finding:
    """Ask the installation for its version, and the cluster for its GPUs."""
    try:
        installed = version("ray")
    except PackageNotFoundError:
        return ok("not installed, and not needed")
    command = Path(sys.executable).with_name("ray")
    answer = ended(str(command) if command.exists() else "ray", "status")
    running = answer.stdout if "Resources" in answer.stdout else None
    return together([judge_ray(installed, running, has_gpu=context.has_gpu), *judge_redis_of_ray(os.environ)])


def judge_ray(installed: str, status: str | None, *, has_gpu: bool) -> Finding:
    """By the version of the installation and what `ray status` says; None where no cluster is reached from here."""
    if tuple(map(int, installed.split(".")[:2])) < OLDEST_RAY:
        return warn(f"Ray {installed} is older than 2.60", install("--upgrade", "ray[serve]>=2.60"), version=installed)
    if status is None:
        return ok(f"Ray {installed}; no cluster runs here (`ray start --head`, or `serve run`)", version=installed)
    found = GPUS_OF_RAY.search(status)
    used, gpus = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    seen = f"Ray {installed}; a cluster answers, with {gpus:g} GPUs, {used:g} in use"
    if has_gpu and not gpus:
        return warn(f"{seen}, though this machine has one", "Start Ray with --num-gpus=1 on this machine", gpus=gpus)
    return ok(seen, version=installed, gpus=gpus, gpus_in_use=used)


def judge_redis_of_ray(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the Redis by which a cluster outlives its head node is reached; nothing where none is named."""
    address = environ.get("RAY_REDIS_ADDRESS")
    if address is None:
        return
    host, _, port = address.rpartition("//")[2].partition(",")[0].rpartition(":")
    try:
        socket.create_connection((host, int(port)), REDIS_SECONDS).close()
        yield ok("RAY_REDIS_ADDRESS is reached")
    except (OSError, ValueError, OverflowError):
        yield fail("RAY_REDIS_ADDRESS is not reached", "Set it to host:port of a Redis that runs, before `ray start`")
