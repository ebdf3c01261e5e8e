"""Docker, where it is installed: its engine, and on a machine with a GPU NVIDIA's runtime.

Source: https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, ok, warn
from vecmill.tools.doctor.timely import ended

START = "If containers are to be used: sudo systemctl start docker, and sudo usermod -aG docker $USER"
RUNTIME = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"


def check(context: Context) -> Finding:
    """Ask the engine."""
    if shutil.which("docker") is None:
        return ok("not installed, and not needed")
    said = ended("docker", "info", "--format", "{{json .}}")
    try:
        info = json.loads(said.stdout)
    except ValueError:
        info = {}
    if not isinstance(info, dict) or not info.get("ServerVersion"):
        errors = (info.get("ServerErrors") or [said.problem]) if isinstance(info, dict) else [said.problem]
        return warn(f"installed, and its engine does not answer: {str(errors[0]).splitlines()[0]}", START)
    return judge(info, has_gpu=context.has_gpu)


def judge(info: dict[str, Any], *, has_gpu: bool) -> Finding:
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
