"""The files of `docker/`, and the tools that read them as an engine or a cluster would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vecmill.config.settings import GROUPS

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
K8S = DOCKER / "k8s"
DOCKERFILES = ("Dockerfile", "Dockerfile.ngc")

SETTINGS = {name.upper() for group in GROUPS for name in group.model_fields}
DEFAULTS = {name.upper(): field.default for group in GROUPS for name, field in group.model_fields.items()}
# What those beside vecmill read in its containers: Python, Hugging Face's hub, torch, NVIDIA's runtime, the shell.
OTHERS = {
    "HF_HOME",
    "HF_XET_HIGH_PERFORMANCE",
    "HOME",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PATH",
    "PYTHONUNBUFFERED",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}
UNITS = {"s": 1, "m": 60, "h": 3600}


def tool(name: str) -> str:
    """The executable that a development dependency installed beside this Python."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{name} is missing: make .venv/.dev brings it"
    return str(path)


def run(
    command: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with only PATH, and what is given, in its environment."""
    variables = {"PATH": os.environ["PATH"], **(environment or {})}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, check=False)


def output(command: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """What a command says that must succeed."""
    done = run(command, cwd, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seconds(duration: str) -> float:
    """Of a duration as `docker compose config` and Dockerfiles write it: 45s, 30m0s."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", duration)
    assert parts, duration
    return sum(float(number) * UNITS[unit] for number, unit in parts)


@dataclass(frozen=True)
class Dockerfile:
    """Its instructions in order, line continuations joined."""

    instructions: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """The arguments of every instruction of a kind."""
        return [arguments for kind, arguments in self.instructions if kind == name]

    def one(self, name: str) -> str:
        """The arguments of the only one."""
        (arguments,) = self.all(name)
        return arguments

    @property
    def stages(self) -> list[list[tuple[str, str]]]:
        """The instructions from each FROM on."""
        starts = [number for number, (kind, _) in enumerate(self.instructions) if kind == "FROM"]
        ends = [*starts[1:], len(self.instructions)]
        return [list(self.instructions[start:end]) for start, end in zip(starts, ends, strict=True)]

    @property
    def environment(self) -> dict[str, str]:
        """What the last stage sets."""
        pairs = (pair for kind, arguments in self.stages[-1] if kind == "ENV" for pair in shlex.split(arguments))
        return dict(pair.split("=", 1) for pair in pairs)

    @property
    def build_arguments(self) -> set[str]:
        """What `--build-arg` may say."""
        return {arguments.split("=")[0] for arguments in self.all("ARG")}


@cache
def dockerfile(name: str) -> Dockerfile:
    """One of `docker/`."""
    lines = [line for line in (DOCKER / name).read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    instructions = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return Dockerfile(tuple((kind, arguments) for kind, arguments in instructions))


def compose(
    folder: Path, *options: str, files: Sequence[str] = ("compose.yaml",), environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What Docker Compose makes of the files in a folder."""
    chosen = [option for file in files for option in ("--file", file)]
    command = [tool("docker-compose"), *chosen, *options, "config", "--format", "json"]
    parsed: dict[str, Any] = json.loads(output(command, folder, {"HOME": str(folder), **(environment or {})}))
    return parsed


def compose_folder(parent: Path) -> Path:
    """A copy of `docker/` without the `.env` that somebody may have there."""
    folder = parent / "docker"
    shutil.copytree(DOCKER, folder, ignore=shutil.ignore_patterns(".env"))
    return folder


def documents(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML stream."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


@cache
def _kustomized(folder: str) -> str:
    return output([tool("kubectl"), "kustomize", str(K8S / folder)])


def manifests(folder: str) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder of `docker/k8s`."""
    return documents(_kustomized(folder))


def of_kind(objects: Iterable[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Those of a kind, by name."""
    return {manifest["metadata"]["name"]: manifest for manifest in objects if manifest["kind"] == kind}


def selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels are what a selector asks for."""
    return selector.items() <= labels.items()
