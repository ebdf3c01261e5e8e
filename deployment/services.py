"""The services, qmd-embed and qmd-vllm: the code they run, their configuration, units and steps.

The code is a virtual environment for each release, and a link to the one in use. A release is built whole before the
link moves, so what runs goes on running until then, and a build that fails leaves nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from deployment import files, machine
from deployment.layout import (
    ACCOUNT,
    EMBED,
    EMBED_UNIT,
    IMAGE,
    MODEL,
    PORT,
    UNSET_PORT,
    VLLM,
    VLLM_PORT,
    VLLM_UNIT,
    Layout,
    Options,
)
from deployment.machine import Docker, Systemd, Unit
from deployment.start import Wait, activation
from deployment.steps import Action, Link, MakeFolder, Remove, Run, Scratch, Step, WriteFile

CLONE = Path(__file__).parents[1]
TEMPLATES = Path(__file__).parent / "units"
SYSTEM_ORDER = "Wants=network-online.target\nAfter=network-online.target nvidia-persistenced.service"
# Both talk to the engine's socket and need nothing else of the machine.
VLLM_CONFINEMENT = "NoNewPrivileges=yes\nPrivateTmp=yes\nProtectSystem=strict\nProtectHome=read-only\nUMask=0077"


def embed_unit(layout: Layout, shutdown_seconds: float) -> str:
    """The text of qmd-embed.service."""
    kind = "user" if layout.user else "system"
    return _fill(
        "qmd-embed.service.in",
        CONFINEMENT=_fill(f"embed-{kind}.conf.in", SECCOMP=_fill("seccomp.conf.in").rstrip()).rstrip(),
        ORDER="" if layout.user else SYSTEM_ORDER,
        VENV=layout.venv,
        CONFIG=layout.config,
        HUB_CACHE=layout.hub_cache,
        CACHE=layout.cache,
        STATE=layout.state,
        STOP_SECONDS=round(shutdown_seconds) + 15,
        TARGET=_target(layout),
    )


def vllm_unit(layout: Layout, docker: str, hub_cache: str) -> str:
    """The text of qmd-vllm.service."""
    engine = "Requires=docker.service\nWants=network-online.target\nAfter=docker.service network-online.target"
    return _fill(
        "qmd-vllm.service.in",
        ORDER=f"After={EMBED_UNIT}" + ("" if layout.user else f"\n{engine}"),
        CONFIG=layout.config,
        DOCKER=docker,
        HUB_CACHE=hub_cache,
        CONFINEMENT="NoNewPrivileges=yes" if layout.user else VLLM_CONFINEMENT,
        TARGET=_target(layout),
    )


def _target(layout: Layout) -> str:
    return "default.target" if layout.user else "multi-user.target"


def _fill(template: str, **parts: object) -> str:
    text = (TEMPLATES / template).read_text("utf-8")
    for _ in range(2):  # parts have parts
        text = re.sub(r"@([A-Z_]+)@", lambda match: str(parts.get(match[1], match[0])), text)
    return text


STAMP = "complete"
# Packages with the hashes of their files. What the bundled model's depends on (SciPy, scikit-learn) is not needed.
LOCKS = tuple(CLONE / name for name in ("locks/torch.txt", "locks/server.txt", "locks/build.txt"))
BUNDLED = CLONE / "requirements-bundled.txt"
LOCKED = ("--no-deps", "--require-hashes", "--only-binary", ":all:")
QUIET = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")


@dataclass(frozen=True)
class Release:
    """The release that this clone would install."""

    version: str
    folder: Path

    @classmethod
    def of_clone(cls, layout: Layout, python: str) -> Release:
        """The release of this clone, named after the version and a hash of all that goes into it."""
        match = re.search(r'__version__ = "(.*?)"', (CLONE / "src/vecmill/__init__.py").read_text("utf-8"))
        version = match[1] if match else "unknown"
        return cls(version, layout.real(layout.releases) / f"{version}-{_digest(python)}")

    @property
    def complete(self) -> bool:
        return (self.folder / STAMP).exists()


def _digest(python: str) -> str:
    digest = hashlib.sha256(os.path.realpath(python).encode())
    declared = [CLONE / "pyproject.toml", *LOCKS, BUNDLED]
    for path in [*declared, *sorted((CLONE / "src").rglob("*"))]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(CLONE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def build(release: Release, layout: Layout, python: str) -> Step:
    """Make the release's environment, unless it is there."""
    title = f"Install vecmill {release.version}"
    undo = layout.invocation("--uninstall")
    if release.complete:
        return Step(title, (), undo, done="already there")
    folder = str(release.folder)
    install = (f"{folder}/bin/python", "-m", "pip", "install", *QUIET)
    return Step(
        title,
        (
            Scratch(release.folder),
            Run((python, "-m", "venv", folder)),
            Run((*install, *LOCKED, *(word for lock in LOCKS for word in ("--requirement", str(lock)))), shown=True),
            Run((*install, *LOCKED, "--requirement", str(BUNDLED)), shown=True),
            Run((*install, "--no-deps", "--no-build-isolation", "--no-index", str(CLONE)), shown=True),
            Run((f"{folder}/bin/vecmill", "version")),
            WriteFile(release.folder / STAMP, f"{release.version}\n"),
        ),
        f"nothing to undo, the unfinished installation was removed; all of it: {undo}",
    )


def in_use(layout: Layout) -> str | None:
    """The release that the link points at."""
    venv = layout.real(layout.venv)
    return venv.readlink().name if venv.is_symlink() else None


def switch(release: Release, layout: Layout) -> Link:
    """The link to the release."""
    return Link(layout.real(layout.venv), Path(release.folder.parent.name) / release.folder.name)


def outdated(release: Release, layout: Layout) -> tuple[Action, ...]:
    """Removals of all releases but this one and the one before, which is kept to go back to."""
    before, releases = in_use(layout), layout.real(layout.releases)
    if before == release.folder.name or not releases.is_dir():
        return ()
    kept = (release.folder.name, before)
    return tuple(Remove(path) for path in sorted(releases.iterdir()) if path.name not in kept)


EMBED_HEAD = """\
# qmd-embed: settings of vecmill. README.md has them all. Then: systemctl restart qmd-embed (keys and aliases: reload).
# deploy.py changes only what its options name.
"""
SHUTDOWN_SECONDS = 30.0
LONGEST_KEYS = 1_048_576  # bytes, as the server takes them
# vLLM takes 0.2 beside it, and the machine needs some for itself.
SHARE_BESIDE_VLLM = "0.5"


class Embed:
    """What is deployed of it, and what shall be."""

    def __init__(
        self, layout: Layout, systemd: Systemd, options: Options, tailnet_name: str | None, generation_url: str | None
    ) -> None:
        self._layout, self._systemd, self._options = layout, systemd, options
        self.unit: Unit = systemd.unit(EMBED_UNIT)
        self._env_path = layout.real(layout.embed_env)
        self._keys_path = layout.real(layout.api_keys)
        self.before = files.settings(files.text(self._env_path) or "")
        self.new = files.text(self._env_path) is None
        additions = self._defaults(generation_url) if self.new else {}
        if generation_url:
            additions["GENERATION_URL"] = generation_url
        self.keys, self.keys_fault = _given_keys(options.api_key_file)
        """What is checked is what is written: a pipe can be read once."""
        changes = self._changes()
        if tailnet_name and self._local_names_only({**additions, **self.before, **changes}):
            additions["ALLOWED_HOSTS"] = f"localhost,127.0.0.1,{EMBED},{tailnet_name}"
        self.env = files.merged(EMBED_HEAD if self.new else files.text(self._env_path) or "", changes, additions)
        self.settings = files.settings(self.env)

    def _defaults(self, generation_url: str | None) -> dict[str, str]:
        defaults = {"HOST": "127.0.0.1", "PORT": str(PORT), "STATE_DIR": str(self._layout.state)}
        if generation_url:
            defaults["MEMORY_FRACTION"] = SHARE_BESIDE_VLLM
        return defaults

    def _changes(self) -> dict[str, str]:
        options = self._options
        chosen = {
            "HOST": options.host,
            "PORT": options.port and str(options.port),
            "EMBED_MODEL": options.embed_model,
            "RERANK_MODEL": options.rerank_model,
            "API_KEY_FILE": options.api_key_file and str(self._layout.api_keys),
        }
        if options.vllm_port and self.before.get("GENERATION_URL", "").startswith("http://127.0.0.1:"):
            chosen["GENERATION_URL"] = f"http://127.0.0.1:{options.vllm_port}"
        return {name: value for name, value in chosen.items() if value}

    @staticmethod
    def _local_names_only(settings: dict[str, str]) -> bool:
        """Whether the server answers only to local names unless ALLOWED_HOSTS names others."""
        keys = settings.get("API_KEY") or settings.get("API_KEY_FILE")
        return loopback(settings.get("HOST", "127.0.0.1")) and not keys

    @property
    def host(self) -> str:
        return self.settings.get("HOST") or "127.0.0.1"

    @property
    def port(self) -> int:
        return port_of(self.settings.get("PORT"), UNSET_PORT)

    @property
    def has_keys(self) -> bool:
        return bool(self.settings.get("API_KEY") or self.settings.get("API_KEY_FILE"))

    @property
    def compiles(self) -> bool:
        """Whether layers may be compiled, on whatever device there is."""
        return self.settings.get("TORCH_COMPILE", "auto").lower() != "false"

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on an NVIDIA GPU, as far as the machine tells."""
        return self.settings.get("DEVICE", "auto") not in ("cpu", "mps") and machine.gpu(self._layout) is not None

    @property
    def reached_at(self) -> str:
        """The address by which this machine reaches it."""
        return reached_at(self.host)

    @property
    def url(self) -> str:
        return f"http://{self.reached_at}:{self.port}"

    def account(self, exists: bool) -> Step:
        """The account that it runs as."""
        title, undo = f"Account {ACCOUNT}", self._layout.invocation("--uninstall", "--purge")
        if exists:
            return Step(title, (), undo, done="already there")
        argv = ("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", str(self._layout.state))
        return Step(title, (Run((*argv, "--shell", "/usr/sbin/nologin", ACCOUNT)),), undo)

    def linger(self, lingers: bool, user: str) -> Step:
        """Services of a user run on after the user has left, and from boot."""
        title, undo = "Services without a login", f"loginctl disable-linger {user}"
        if lingers:
            return Step(title, (), undo, done="already so")
        return Step(title, (Run(("loginctl", "enable-linger", user)),), undo)

    def start(self, release: Release) -> Step:
        """Configuration, unit and code in place, the process running and ready."""
        layout = self._layout
        link = switch(release, layout)
        wait = Wait(self._systemd, EMBED_UNIT, self.url, "/ready", self._options.wait, progress=True)
        keys = self._keys()
        return activation(
            self.unit,
            self._systemd,
            (self._env_file(), link, self._unit_file()),
            wait,
            before=(*self._backup(), *self._folders()),
            after=outdated(release, layout),
            reloadable=keys,
            undo=layout.invocation("--uninstall"),
        )

    def _env_file(self) -> WriteFile:
        return WriteFile(self._env_path, self.env, 0o640, self._layout.readers, staged=self._layout.staged)

    def _unit_file(self) -> WriteFile:
        try:
            shutdown = float(self.settings.get("SHUTDOWN_SECONDS") or SHUTDOWN_SECONDS)
        except ValueError:  # the server says that it is wrong
            shutdown = SHUTDOWN_SECONDS
        text = embed_unit(self._layout, shutdown)
        return WriteFile(self.unit.path, text, owner=self._layout.root_only, staged=self._layout.staged)

    def _keys(self) -> tuple[WriteFile, ...]:
        if self._options.api_key_file is None:
            return ()
        owner, staged = self._layout.readers, self._layout.staged
        return (WriteFile(self._keys_path, self.keys, 0o640, owner, secret=True, staged=staged),)

    def _backup(self) -> tuple[Action, ...]:
        """A copy of the unit of the older guide, which this one replaces."""
        if not self.unit.foreign:
            return ()
        kept = self.unit.path.with_name(f"{self.unit.path.name}.before-vecmill")
        return (WriteFile(kept, files.text(self.unit.path) or "", 0o644),)

    def _folders(self) -> tuple[Action, ...]:
        """The system's services get theirs from systemd."""
        wanted = (self._layout.state, self._layout.hub_cache) if self._layout.user else ()
        real = [self._layout.real(path) for path in wanted]
        return tuple(MakeFolder(path) for path in real if not files.exists(path))


def _given_keys(path: Path | None) -> tuple[str, str | None]:
    """The text of a file of keys, or of a pipe; and why there is none."""
    if path is None:
        return "", None
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_KEYS + 1)
        return content.decode(), f"it is larger than {LONGEST_KEYS} bytes" if len(content) > LONGEST_KEYS else None
    except OSError as error:
        return "", error.strerror or str(error)
    except UnicodeDecodeError:
        return "", "it is not UTF-8 text"


def is_port(value: str) -> bool:
    """Whether an env file's value is the number of one."""
    return value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65535


def port_of(value: str | None, usual: int) -> int:
    """The port that an env file's value gives; the usual one where it gives none, which `problems` tells."""
    return int(value) if value and is_port(value) else usual


def reached_at(host: str) -> str:
    """The address, as a URL has it, by which this machine reaches a server that binds `host`."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared with, not bound
    return everywhere.get(host, f"[{host}]" if ":" in host else host)


def loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


CONTAINER_CACHE = "/root/.cache/huggingface"
GPU_SHARE = "0.2"
MAX_MODEL_LEN = "16384"
VLLM_HEAD = """\
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
        self.before = files.settings(before or "")
        defaults = {
            "IMAGE": IMAGE,
            "MODEL": MODEL,
            "HOST_PORT": str(VLLM_PORT),
            "GPU_MEMORY_UTILIZATION": GPU_SHARE,
            "MAX_MODEL_LEN": MAX_MODEL_LEN,
            "EXTRA_ARGS": "",
        }
        port = options.vllm_port and str(options.vllm_port)
        chosen = {"IMAGE": options.image, "MODEL": options.vllm_model, "HOST_PORT": port}
        changes = {name: value for name, value in chosen.items() if value}
        self.env = files.merged(VLLM_HEAD if before is None else before, changes, defaults)
        self.settings = files.settings(self.env)

    @property
    def port(self) -> int:
        return port_of(self.settings.get("HOST_PORT"), VLLM_PORT)

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
        text = vllm_unit(self._layout, self._docker.path or "/usr/bin/docker", self.hub_cache)
        return WriteFile(self.unit.path, text, owner=self._layout.root_only, staged=self._layout.staged)

    @property
    def hub_cache(self) -> str:
        """The folder that has its models already, otherwise a folder of its own."""
        told = re.search(rf" -v (\S+):{CONTAINER_CACHE} ", files.text(self.unit.path) or "") if self.unit.ours else None
        return told[1] if told else self._docker.mounted(CONTAINER_CACHE) or str(self._layout.vllm_cache)

    def _cache(self) -> tuple[Action, ...]:
        folder = self._layout.real(self._layout.vllm_cache)
        if self.hub_cache != str(self._layout.vllm_cache) or files.exists(folder):
            return ()
        return (MakeFolder(folder),)
