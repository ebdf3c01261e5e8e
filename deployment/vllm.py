"""qmd-vllm: vLLM in a container, for the text that QMD has generated."""

from __future__ import annotations

import re

from deployment import env_file, files, units
from deployment.actions import Action, MakeFolder, Run, WriteFile
from deployment.layout import VLLM_UNIT, Layout
from deployment.machine import Systemd, Unit
from deployment.neighbours import Docker
from deployment.options import IMAGE, MODEL, VLLM, VLLM_PORT, Options
from deployment.service import activation
from deployment.steps import Step
from deployment.waiting import Wait

CONTAINER_CACHE = "/root/.cache/huggingface"
GPU_SHARE = "0.2"
MAX_MODEL_LEN = "16384"
HEAD = """\
# qmd-vllm: what it runs and with how much. The container gets these too, so HF_TOKEN=... for a gated model goes here.
# Then: systemctl restart qmd-vllm. deploy.py changes only what its options name.
"""


class Vllm:
    """What is deployed of it, and what shall be."""

    def __init__(self, layout: Layout, systemd: Systemd, docker: Docker, options: Options) -> None:
        self._layout, self._systemd, self._docker, self._options = layout, systemd, docker, options
        self.unit: Unit = systemd.unit(VLLM_UNIT)
        self._env_path = layout.real(layout.vllm_env)
        before = files.text(self._env_path)
        self.before = env_file.values(before or "")
        defaults = {
            "IMAGE": IMAGE,
            "MODEL": MODEL,
            "HOST_PORT": str(VLLM_PORT),
            "GPU_MEMORY_UTILIZATION": GPU_SHARE,
            "MAX_MODEL_LEN": MAX_MODEL_LEN,
            "EXTRA_ARGS": "",
        }
        port = options.vllm_port and str(options.vllm_port)
        asked = {"IMAGE": options.image, "MODEL": options.vllm_model, "HOST_PORT": port}
        changes = {name: value for name, value in asked.items() if value}
        self.env = env_file.merged(HEAD if before is None else before, changes, defaults)
        self.settings = env_file.values(self.env)

    @property
    def port(self) -> int:
        return int(self.settings["HOST_PORT"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def replaces_container(self) -> bool:
        """Whether a container of that name was started by hand, as the guide that this replaces does."""
        return self._docker.container is not None and not self.unit.ours

    def pull(self) -> Step:
        """Fetch the image, which is many gigabytes."""
        image = self.settings["IMAGE"]
        title, undo = f"Fetch the image {image}", f"docker image rm {image}"
        if self._docker.path is None or self._docker.has(image):
            return Step(title, (), undo, done="already there")
        return Step(title, (Run(("docker", "pull", image), shown=True),), undo)

    def start(self) -> Step:
        """Configuration and unit in place, the container running and ready."""
        wait = Wait(self._systemd, VLLM_UNIT, self.url, "/health", self._options.wait)
        before: tuple[Action, ...] = ()
        if self.replaces_container:
            before = (Run(("docker", "rm", "--force", VLLM)),)
        return activation(
            self.unit,
            self._systemd,
            (self._env_file(), self._unit_file()),
            wait,
            before=(*before, *self._cache()),
            undo=self._layout.invocation("vllm", "--uninstall"),
        )

    def _env_file(self) -> WriteFile:
        return WriteFile(self._env_path, self.env, 0o600, self._layout.root_only, staged=self._layout.staged)

    def _unit_file(self) -> WriteFile:
        text = units.vllm_unit(self._layout, self._docker.path or "/usr/bin/docker", self._hub_cache())
        return WriteFile(self.unit.path, text, owner=self._layout.root_only, staged=self._layout.staged)

    def _hub_cache(self) -> str:
        """Where it keeps its models already, else a folder of its own."""
        told = re.search(rf" -v (\S+):{CONTAINER_CACHE} ", files.text(self.unit.path) or "") if self.unit.ours else None
        return told[1] if told else self._docker.mounted(CONTAINER_CACHE) or str(self._layout.vllm_cache)

    def _cache(self) -> tuple[Action, ...]:
        folder = self._layout.real(self._layout.vllm_cache)
        if self._hub_cache() != str(self._layout.vllm_cache) or files.exists(folder):
            return ()
        return (MakeFolder(folder),)
