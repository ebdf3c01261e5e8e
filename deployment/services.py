"""qmd-embed: vecmill itself."""

from __future__ import annotations

from ipaddress import ip_address

from deployment import env_file, files, install, machine, units
from deployment.actions import Action, MakeFolder, Run, WriteFile
from deployment.layout import ACCOUNT, EMBED_UNIT, Layout
from deployment.machine import Systemd, Unit
from deployment.options import EMBED, PORT, Options
from deployment.service import activation
from deployment.steps import Step
from deployment.waiting import Wait

HEAD = """\
# qmd-embed: settings of vecmill. README.md has them all. Then: systemctl restart qmd-embed (keys and aliases: reload).
# deploy.py changes only what its options name.
"""
SHUTDOWN_SECONDS = 30.0
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
        self.before = env_file.values(files.text(self._env_path) or "")
        self.new = files.text(self._env_path) is None
        additions = self._defaults(generation_url) if self.new else {}
        if generation_url:
            additions["GENERATION_URL"] = generation_url
        changes = self._asked()
        if tailnet_name and self._local_names_only({**additions, **self.before, **changes}):
            additions["ALLOWED_HOSTS"] = f"localhost,127.0.0.1,{EMBED},{tailnet_name}"
        self.env = env_file.merged(HEAD if self.new else files.text(self._env_path) or "", changes, additions)
        self.settings = env_file.values(self.env)

    def _defaults(self, generation_url: str | None) -> dict[str, str]:
        defaults = {"HOST": "127.0.0.1", "PORT": str(PORT), "STATE_DIR": str(self._layout.state)}
        if generation_url:
            defaults["MEMORY_FRACTION"] = SHARE_BESIDE_VLLM
        return defaults

    def _asked(self) -> dict[str, str]:
        options = self._options
        asked = {
            "HOST": options.host,
            "PORT": options.port and str(options.port),
            "EMBED_MODEL": options.embed_model,
            "RERANK_MODEL": options.rerank_model,
            "API_KEY_FILE": options.api_key_file and str(self._layout.api_keys),
        }
        if options.vllm_port and self.before.get("GENERATION_URL", "").startswith("http://127.0.0.1:"):
            asked["GENERATION_URL"] = f"http://127.0.0.1:{options.vllm_port}"
        return {name: value for name, value in asked.items() if value}

    @staticmethod
    def _local_names_only(settings: dict[str, str]) -> bool:
        """Whether the server answers to no name but the machine's own, unless it is told others."""
        keys = settings.get("API_KEY") or settings.get("API_KEY_FILE")
        return loopback(settings.get("HOST", "127.0.0.1")) and not keys

    @property
    def host(self) -> str:
        return self.settings.get("HOST") or "127.0.0.1"

    @property
    def port(self) -> int:
        return int(self.settings.get("PORT") or PORT)

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
        return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(  # noqa: S104 - compared with, not bound
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )

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

    def start(self, release: install.Release) -> Step:
        """Configuration, unit and code in place, the process running and ready."""
        layout = self._layout
        link = install.switch(release, layout)
        wait = Wait(self._systemd, EMBED_UNIT, self.url, "/ready", self._options.wait, progress=True)
        keys = self._keys()
        return activation(
            self.unit,
            self._systemd,
            (self._env_file(), link, self._unit_file()),
            wait,
            before=(*self._backup(), *self._folders()),
            after=install.outdated(release, layout),
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
        text = units.embed_unit(self._layout, shutdown)
        return WriteFile(self.unit.path, text, owner=self._layout.root_only, staged=self._layout.staged)

    def _keys(self) -> tuple[WriteFile, ...]:
        given = self._options.api_key_file
        if given is None:
            return ()
        text = files.text(given) or ""
        return (WriteFile(self._keys_path, text, 0o640, self._layout.readers, secret=True, staged=self._layout.staged),)

    def _backup(self) -> tuple[Action, ...]:
        """The unit of the guide that this replaces."""
        if not self.unit.foreign:
            return ()
        kept = self.unit.path.with_name(f"{self.unit.path.name}.before-vecmill")
        return (WriteFile(kept, files.text(self.unit.path) or "", 0o644),)

    def _folders(self) -> tuple[Action, ...]:
        """The system's services get theirs from systemd."""
        wanted = (self._layout.state, self._layout.hub_cache) if self._layout.user else ()
        real = [self._layout.real(path) for path in wanted]
        return tuple(MakeFolder(path) for path in real if not files.exists(path))


def loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
