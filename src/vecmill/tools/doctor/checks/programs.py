"""Other programs, where they are installed: Tailscale, Docker, Ray, and HAProxy and nginx before several servers.

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vecmill.core.threads import within
from vecmill.tools.doctor.context import DoctorContext, ended
from vecmill.tools.doctor.findings import Finding, fail, install, ok, together, warn
from vecmill.tools.http_client import get_here


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


# What the configurations of `vecmill proxy-config` need, and where Debian reads them.
LEAST = {"haproxy": (2, 6), "nginx": (1, 18)}
PLACES = {"haproxy": "/etc/haproxy/haproxy.cfg", "nginx": "/etc/nginx/nginx.conf"}
CHECKS_OWN = {"haproxy": ("-c", "-f"), "nginx": ("-t", "-q", "-c")}
OURS = "# Written by `vecmill proxy-config`"
SERVER = re.compile(r"^ *server (?:\S+:\d+ )?([\w.:\[\]-]+:\d+)(?: id | max_fails)(?!.* ssl )", re.MULTILINE)
MOST_ASKED, ASK_SECONDS = 32, 2.0
BESIDE_PATH = "/usr/sbin"
FIRST_ERROR = '"$0" "$@" 2>&1 | grep -E -m 1 "ALERT|emerg"'


def check_proxies(context: DoctorContext) -> Finding:
    """Ask each for its version, and for its opinion of a configuration that this project wrote."""
    found = {name: path for name in LEAST if (path := _program(name)) is not None}
    if not found:
        return ok("neither HAProxy nor nginx is installed; several servers need one of them, or Ray")
    trusted = bool(context.settings.access.trusted_proxies)
    return together(_proxy(name, path, Path(PLACES[name]), trusted=trusted) for name, path in found.items())


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=BESIDE_PATH)


def _proxy(name: str, path: str, place: Path, *, trusted: bool) -> Finding:
    answer = ended(path, "-v")
    # nginx writes it to stderr, of which the first line is kept only where it failed.
    release = _version_in(answer.stdout) or _version_in(ended("sh", "-c", '"$0" -v 2>&1', path).stdout)
    if release is None:
        return warn(f"{name} is installed, and does not say its version: {answer.problem or answer.stdout[:100]}")
    seen = f"{name} {'.'.join(map(str, release))}"
    if release < LEAST[name]:
        least = ".".join(map(str, LEAST[name]))
        return warn(f"{seen} is too old for `vecmill proxy-config`, which needs {least}", f"Install {name} {least}")
    text = _text(place)
    if not text.startswith(OURS):
        return ok(f"{seen}; {place} is not one of `vecmill proxy-config`", **{name: seen})
    if os.access(place, os.W_OK):  # to check it, both open what only root may
        command = (path, *CHECKS_OWN[name], str(place))
        if problem := ended(*command).problem:
            # Both begin with what is no error.
            problem = ended("sh", "-c", FIRST_ERROR, *command).stdout.strip() or problem
            return warn(f"{seen} refuses {place}: {problem}", " ".join(word for word in command if word != "-q"))
    return judge_replicas(seen, replicas_of(text), trusted=trusted)


def judge_replicas(seen: str, replicas: Sequence[str], *, trusted: bool) -> Finding:
    """By the servers that the configuration names: whether they are ready, and whether they are told who asks."""
    asked = replicas[:MOST_ASKED]
    with ThreadPoolExecutor(MOST_ASKED) as pool:
        unready = [replica for replica, ready in zip(asked, pool.map(_ready, asked), strict=True) if not ready]
    seen += f" before {len(replicas)} servers, {len(asked) - len(unready)} of {len(asked)} ready"
    if unready:
        return warn(f"{seen}; not: {', '.join(unready)}", f"curl http://{unready[0]}/ready", unready=unready)
    if not trusted:
        return warn(
            f"{seen}; TRUSTED_PROXIES is not set here, so that all its clients are one address to a server",
            "Set TRUSTED_PROXIES to the proxy's address on every server, so that clients take turns",
        )
    return ok(seen, replicas=list(replicas))


def replicas_of(text: str) -> list[str]:
    """The addresses of the servers in a configuration, each once, but for those over TLS."""
    return list(dict.fromkeys(SERVER.findall(text)))


def _ready(replica: str) -> bool:
    answer = within(ASK_SECONDS, lambda: get_here(f"http://{replica}/ready", ASK_SECONDS))
    return answer is not None and answer.is_success


def _version_in(text: str) -> tuple[int, int] | None:
    found = re.search(r"(?:version|nginx/)\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _text(place: Path) -> str:
    try:
        return place.read_text("utf-8", errors="replace")
    except OSError:
        return ""


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
