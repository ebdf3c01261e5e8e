"""`deploy.py`: what is missing is made, what differs is changed, the rest is left alone.

The machine is looked at first: problems prevent the deployment, remarks do not.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from deployment import console, files, machine
from deployment.console import ask, ask_json
from deployment.layout import ACCOUNT, EMBED, EMBED_UNIT, IMAGE, VLLM, VLLM_UNIT, Layout, Options
from deployment.machine import Docker, Systemd, Tailscale
from deployment.services import Embed, Release, Vllm, build, is_port, loopback
from deployment.start import serve_in_tailnet
from deployment.steps import Step, carry_out, show


@dataclass(frozen=True)
class Situation:
    """Everything that is looked at before anything is done."""

    options: Options
    layout: Layout
    user: str
    tailscale: Tailscale | None
    docker: Docker | None
    embed: Embed | None
    vllm: Vllm | None
    builds: bool
    """Whether a release has to be built."""


def run(options: Options, layout: Layout) -> int:
    """Look, plan, then print the plan or carry it out. The exit code: 0, 1, or 130 where interrupted."""
    started = monotonic()
    console.say("Looking at this machine")
    release = Release.of_clone(layout, options.python)
    situation = _look(options, layout, release)
    console.detail(remarks(situation))
    if wrong := problems(situation):
        console.complain(
            f"{'One thing' if len(wrong) == 1 else f'{len(wrong)} things'} to mend first; nothing was changed:"
        )
        for sentence in wrong:
            console.complain(f"  - {sentence}")
        if not options.dry_run:
            return 1
    steps = _plan(situation, release)
    if options.dry_run:
        show(steps)
        return 1 if wrong else 0
    if (code := carry_out(steps)) != 0:
        return code
    changed = any(step.actions for step in steps)
    took = console.duration(monotonic() - started)
    console.say(f"Done in {took}." if changed else "Nothing had to be changed.")
    _tell_next_steps(situation)
    return 0


def _look(options: Options, layout: Layout, release: Release) -> Situation:
    systemd = Systemd(layout)
    tailscale = Tailscale.look() if options.tailscale else None
    docker = Docker.look(VLLM) if VLLM in options.services else None
    vllm = Vllm(layout, systemd, docker, options) if docker is not None else None
    embed = None
    if EMBED in options.services:
        name = tailscale.name(EMBED) if tailscale else None
        embed = Embed(layout, systemd, options, name, _generation_url(layout, systemd, options, vllm))
    builds = embed is not None and not release.complete
    return Situation(options, layout, account_name(), tailscale, docker, embed, vllm, builds)


def _generation_url(layout: Layout, systemd: Systemd, options: Options, vllm: Vllm | None) -> str | None:
    """The address of vLLM on this machine, if it is deployed or will be."""
    beside = vllm or Vllm(layout, systemd, Docker(None, "", False, None), options)
    return beside.url if vllm is not None or beside.unit.ours else None


def account_name() -> str:
    """The name of the account that runs this."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _plan(situation: Situation, release: Release) -> list[Step]:
    """The steps in order: what takes long and may fail comes before anything that runs is touched."""
    layout, options, embed, vllm = situation.layout, situation.options, situation.embed, situation.vllm
    steps = []
    if embed is not None:
        steps += [_account(embed, situation), build(release, layout, options.python)]
    if vllm is not None:
        steps.append(vllm.pull())
    if embed is not None:
        steps.append(embed.start(release))
    if vllm is not None:
        steps.append(vllm.start())
    tailscale = situation.tailscale or Tailscale(False, {}, {})
    if embed is not None:
        steps.append(serve_in_tailnet(EMBED, embed.port, embed.reached_at, tailscale, layout, options))
    if vllm is not None:
        steps.append(serve_in_tailnet(VLLM, vllm.port, "127.0.0.1", tailscale, layout, options))
    return steps


def _account(embed: Embed, situation: Situation) -> Step:
    if situation.layout.user:
        lingers = (situation.layout.root / "var/lib/systemd/linger" / situation.user).exists()
        return embed.linger(lingers, situation.user)
    return embed.account(ask("getent", "passwd", ACCOUNT).returncode == 0)


def _tell_next_steps(situation: Situation) -> None:
    """Print the addresses, a curl call, and the configuration of QMD and CodeCartographer."""
    console.say()
    names = {service: situation.tailscale.name(service) if situation.tailscale else None for service in (EMBED, VLLM)}
    if situation.embed is not None:
        _tell_embed(situation.embed, names[EMBED])
    if situation.vllm is not None:
        reached = f", in the tailnet https://{names[VLLM]}" if names[VLLM] else ""
        console.say(f"vLLM       {situation.vllm.settings['MODEL']} on {situation.vllm.url}{reached}")
    console.say(f"Later      {situation.layout.invocation('--status')} (--logs, --restart, --stop, --uninstall)")


def _tell_embed(embed: Embed, name: str | None) -> None:
    here = embed.url
    address = f"https://{name}" if name else here
    keys = embed.has_keys
    key = ' -H "Authorization: Bearer $VECMILL_API_KEY"' if keys else ""
    console.say(f"Here       {here} (dashboard {here}/)")
    if name:
        console.say(f"Tailnet    {address}")
    console.say("Try it")
    console.detail(
        [f"curl {address}/v1/embeddings{key} -H 'Content-Type: application/json' -d '{{\"input\": [\"hello world\"]}}'"]
    )
    console.say("QMD, in ~/.config/qmd/index.yml")
    console.detail(["remote:", f"  embed_url: {address}"])
    if embed.settings.get("GENERATION_URL"):
        console.detail([f"  generation_url: {address}"])
    else:
        console.detail(["  generation_url: http://...  # a server that generates text: without one QMD stays local"])
    console.detail([f"  api_key: {'${VECMILL_API_KEY}' if keys else 'none'}"])
    console.say("CodeCartographer")
    console.detail([f'set_project with provider: "dgx" and dgx_endpoint: "{address}/embed"'])


SAFE_KEY = re.compile(r"[!-~]{16,}")
KEY_OPTION = re.compile(r"scopes=(use|admin)([+,](use|admin))*|(requests|tokens|jobs)=[1-9][0-9]*")


def problems(situation: Situation) -> list[str]:
    """Problems that prevent the deployment, each with its cure."""
    checks = (
        _rights,
        _owners,
        _systemd,
        _python,
        _compiler,
        _disk,
        _keys,
        _values,
        _embed_port,
        _tailscale,
        _docker,
        _vllm_port,
    )
    return [sentence for check in checks for sentence in check(situation)]


def _rights(situation: Situation) -> Iterator[str]:
    if situation.layout.staged or situation.options.dry_run:
        return
    if situation.layout.user and os.geteuid() == 0:
        yield "--user is for an account without root: run it as that account, without sudo."
    if not situation.layout.user and os.geteuid() != 0:
        yield "It needs root: sudo python3 deploy.py (or --user, for services of your own)."


def _owners(situation: Situation) -> Iterator[str]:
    """Nobody but root decides what is written, and what the service reads."""
    layout = situation.layout
    units = (layout.units / EMBED_UNIT, layout.units / VLLM_UNIT)
    for path in (layout.embed_env, layout.vllm_env, layout.api_keys, layout.releases / "any", *units):
        if sentence := files.distrusted(layout.real(path)):
            yield f"{sentence}."


# Prints where it lies; a virtual environment's Python is only a link to that.
WHAT_PYTHON = (
    "import os, sys, venv, ensurepip; print(os.path.realpath(sys.base_prefix)); sys.exit(sys.version_info < (3, 11))"
)


def _systemd(situation: Situation) -> Iterator[str]:
    if not sys.platform.startswith("linux") or not situation.layout.real(Path("/run/systemd/system")).is_dir():
        yield "systemd does not run here: use the containers in docker/, or `make serve`."
    elif situation.layout.user and not os.environ.get("XDG_RUNTIME_DIR"):
        yield "There is no systemd of this user (XDG_RUNTIME_DIR is not set): log in with ssh or at the console."


def _python(situation: Situation) -> Iterator[str]:
    if not situation.builds:
        return
    python = situation.options.python
    answer = ask(python, "-c", WHAT_PYTHON)
    if answer.returncode == 127:
        yield f"There is no {python}: --python names the Python to install with."
    elif "ensurepip" in answer.stderr or "venv" in answer.stderr:
        yield f"{python} cannot make virtual environments: sudo apt install python3-venv"
    elif answer.returncode != 0:
        yield f"{python} is older than 3.11: --python names a newer one."
    elif not situation.layout.user and answer.stdout.startswith(("/home/", "/root/")):
        yield (
            f"{python} lies in {answer.stdout.strip()}, and the service cannot see home folders: --python "
            f"/usr/bin/python3 is the system's."
        )


def _compiler(situation: Situation) -> Iterator[str]:
    embed = situation.embed
    if embed is None or not embed.compiles or not embed.on_gpu:
        return
    if missing := machine.missing_to_compile(situation.options.python, on_gpu=True):
        without = "" if embed.new else f"; or TORCH_COMPILE=false in {situation.layout.embed_env}"
        yield (
            f"On a GPU the models' layers are compiled, which takes a C compiler and Python's headers; without them a "
            f"search takes up to twice as long: sudo apt install {' '.join(missing)}{without}"
        )


def _disk(situation: Situation) -> Iterator[str]:
    path = situation.layout.real(situation.layout.releases)
    if situation.builds and (free := files.bytes_free(path)) < VENV_BYTES:
        yield f"{path} has {free / 1e9:.1f} GB free, the installation takes {VENV_BYTES / 1e9:.0f}: make room."


def _keys(situation: Situation) -> Iterator[str]:
    path, embed = situation.options.api_key_file, situation.embed
    if path is None or embed is None:
        return
    if embed.keys_fault is not None:
        yield f"--api-key-file {path} cannot be read: {embed.keys_fault}."
        return
    lines = [line.strip() for line in embed.keys.splitlines()]
    entries = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not entries:
        yield f"--api-key-file {path} holds no key: write one on each line, `name:key` or `key`."
    for number, line in entries:
        name, colon, key = line.partition(":")
        value, *options = (key if colon else name).split() or [""]
        if not SAFE_KEY.fullmatch(value) or "," in line or not all(map(KEY_OPTION.fullmatch, options)):
            yield (
                f"--api-key-file {path}, line {number}: a key is printable ASCII without spaces and commas, of at "
                f"least 16 characters; after it may stand `scopes=use+admin`, `requests=N`, `tokens=N`, `jobs=N`."
            )


# As a unit has them: systemd reads blanks, quotes, `%` and `$` otherwise, and Docker `:`.
PLAIN_PATH = re.compile(r"/[\w./+,@-]*")


def _values(situation: Situation) -> Iterator[str]:
    """What files and the environment say that cannot be meant."""
    layout, embed, vllm = situation.layout, situation.embed, situation.vllm
    ports = ((embed, "PORT", layout.embed_env), (vllm, "HOST_PORT", layout.vllm_env))
    for service, name, path in ports:
        value = service.settings.get(name) if service is not None else None
        if value and not is_port(value):
            yield f"{name}={value} in {path} is no port: a number from 1 to 65535."
    paths = {
        "HOME": str(layout.home or "/"),
        "the container's folder of models": vllm.hub_cache if vllm is not None else "/",
    }
    for source, named in paths.items():
        if not PLAIN_PATH.fullmatch(named):
            yield f"{named} ({source}): in a path, units here take letters, digits and ./_+,@- only; move or link it."


def _embed_port(situation: Situation) -> Iterator[str]:
    embed = situation.embed
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


def _vllm_port(situation: Situation) -> Iterator[str]:
    vllm, docker = situation.vllm, situation.docker
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


def _tailscale(situation: Situation) -> Iterator[str]:
    tailscale = situation.tailscale
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
    elif situation.layout.user and _tailscale_operator() != situation.user:
        yield f"Tailscale is not yours to set up: sudo tailscale set --operator={situation.user}; {without}"


def _tailscale_operator() -> object:
    return (ask_json("tailscale", "debug", "prefs") or {}).get("OperatorUser")


def _docker(situation: Situation) -> Iterator[str]:
    docker = situation.docker
    if docker is None:
        return
    without = "or deploy with --no-vllm."
    if docker.path is None:
        yield f"Docker is not installed: sudo apt install docker.io nvidia-container-toolkit; {without}"
    elif "permission denied" in docker.answered:
        yield f"This account may not use Docker: sudo usermod -aG docker {situation.user}, log in again; {without}"
    elif docker.answered:
        yield f"Docker does not answer: sudo systemctl start docker; {without}"
    elif not docker.nvidia:
        yield (
            "Docker has no NVIDIA runtime: sudo apt install nvidia-container-toolkit && sudo nvidia-ctk runtime "
            f"configure --runtime=docker && sudo systemctl restart docker; {without}"
        )


VENV_BYTES = 8_000_000_000
MODEL_BYTES = 25_000_000_000
IMAGE_BYTES = 25_000_000_000


def remarks(situation: Situation) -> list[str]:
    """Remarks that do not prevent the deployment."""
    checks = (_gpu, _cpu_compiler, _reach, _names, _image, _space, _takeover)
    return [sentence for check in checks for sentence in check(situation)]


def _gpu(situation: Situation) -> Iterator[str]:
    name = machine.gpu(situation.layout)
    yield f"GPU: {name}" if name else "No NVIDIA GPU is seen: qmd-embed will run on the CPU, with the bundled model."


def _cpu_compiler(situation: Situation) -> Iterator[str]:
    """Without a GPU a missing compiler is no problem; with one it is (`_compiler`)."""
    if situation.embed is None or not situation.embed.compiles or situation.embed.on_gpu:
        return
    if missing := machine.missing_to_compile(situation.options.python, on_gpu=False):
        packages = " ".join(missing)
        yield f"torch.compile cannot be used without a compiler and Python's headers: sudo apt install {packages}"


def _reach(situation: Situation) -> Iterator[str]:
    embed = situation.embed
    if embed is None:
        return
    if not loopback(embed.host) and not embed.has_keys:
        yield f"HOST={embed.host} without keys: everyone who reaches it may use it. --api-key-file gives it keys."
    given = situation.options.api_key_file
    if given is not None and files.text(given) is not None and files.mode(given) & 0o077:
        yield f"{given} can be read by other accounts: chmod 600 {given}"


def _names(situation: Situation) -> Iterator[str]:
    name = situation.tailscale and situation.tailscale.name("qmd-embed")
    allowed = situation.embed.settings.get("ALLOWED_HOSTS") if situation.embed else None
    if name and allowed and name not in allowed.split(",") and "*" not in allowed:
        yield f"ALLOWED_HOSTS lacks {name}: add it to {situation.layout.embed_env}, or that address is refused."
    if situation.tailscale is not None and situation.tailscale.running and not situation.tailscale.https:
        yield "The tailnet gives no HTTPS certificates: enable them in the admin console under DNS."


def _image(situation: Situation) -> Iterator[str]:
    """What an env file has stays, also where it was the default of the version that wrote it."""
    if situation.vllm is not None and (image := situation.vllm.settings["IMAGE"]) != IMAGE:
        yield f"{situation.layout.vllm_env} has the image {image}; this version's is {IMAGE}: --image takes it."


def _space(situation: Situation) -> Iterator[str]:
    free = files.bytes_free(situation.layout.real(situation.layout.hub_cache))
    wanted = VENV_BYTES * situation.builds + MODEL_BYTES + IMAGE_BYTES * (situation.vllm is not None)
    if free < wanted:
        yield f"{free / 1e9:.0f} GB are free; code, models and image may take {wanted / 1e9:.0f}."


def _takeover(situation: Situation) -> Iterator[str]:
    if situation.embed is not None and situation.embed.unit.foreign:
        path = situation.embed.unit.path
        yield f"{path} is of an earlier guide: it is replaced, and kept beside as *.before-vecmill."
    if situation.vllm is not None and situation.vllm.replaces_container:
        yield "The container qmd-vllm was started by hand: it is replaced by a service, which uses its models."
