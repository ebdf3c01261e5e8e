"""Finds mistakes in the commands of the guides. For our own programs the programs themselves are asked."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from functools import cache
from importlib.machinery import PathFinder
from itertools import pairwise
from pathlib import Path

import typer
from deployment.layout import EMBED_UNIT, VLLM_UNIT
from fastapi import FastAPI
from opentelemetry import environment_variables as variables_of_api
from opentelemetry.sdk import environment_variables as variables_of_sdk
from starlette.routing import Match

from deployment import cli as deploy_cli
from docker import pin
from examples import codebase_search
from tests.guides import curl, programs
from tests.guides.shell import Command, NotShell, commands
from vecmill.__main__ import cli
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.config.settings import GROUPS
from vecmill.core.errors import StartupError

ROOT = Path(__file__).parents[2]
SETTINGS = frozenset(name.upper() for group in GROUPS for name in group.model_fields)
# Other programs' variables, each with whose it is.
VARIABLES = {
    "HF_HOME": "huggingface_hub",
    "HF_ENDPOINT": "huggingface_hub",
    "HF_HUB_OFFLINE": "huggingface_hub",
    "HF_XET_HIGH_PERFORMANCE": "hf_xet",
    "HF_HUB_ENABLE_HF_TRANSFER": "huggingface_hub before 1.0; named to say that it does nothing",
    "TRITON_PTXAS_PATH": "triton before 3.6; named to say that it is not needed",
    "CUDA_VISIBLE_DEVICES": "CUDA",
    "CXX": "the name of the C++ compiler, of make and of all that compiles",
    "SO_REUSEPORT": "Linux",
    "RAY_ADDRESS": "Ray",
    "RAY_AUTH_MODE": "Ray",
    "RAY_REDIS_ADDRESS": "Ray",
    "RAY_REDIS_PASSWORD": "Ray",
    "RAY_external_storage_namespace": "Ray",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "Ray",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "Ray",
    "RAY_SERVE_ENABLE_HA_PROXY": "Ray",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "Ray",
    "RAY_USE_TLS": "Ray",
    "OLLAMA_KEEP_ALIVE": "Ollama",
    "OLLAMA_MAX_LOADED_MODELS": "Ollama",
}
# Made by whoever follows the guides.
MADE = {"docker/.env"}
# In a virtual environment of the README's or of deploy.py's.
VENV = re.compile(r"(\.venv|/opt/vecmill/venv|~/\.local/share/vecmill/venv)/bin/(?=[\w.]+$)")
OURS = re.compile(
    r"(\./)?((docs|docker|examples|benchmarks|tests|src|deployment|\.ci)/[\w./-]*\w|\.env\.example|constraints\.txt|deploy\.py)"
)
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
UNITS = {
    EMBED_UNIT,
    VLLM_UNIT,
    "tailscaled.service",
    "docker.service",
    "haproxy.service",
    "nginx.service",
    "redis-server.service",
}
SYSTEMCTL = {"cat", "daemon-reload", "edit", "reload", "reset-failed", "restart", "start", "status", "stop"}
UNITLESS = {"daemon-reload"}
JOURNALCTL = {"-u": True, "-n": True, "-f": False, "--since": True, "--user": False, "-o": True}
OUR_PORTS = {8001, 8080}
VLLM_PORT = 8000
# Ray Serve has vLLM's port, and our routes.
VLLM_PATHS = {"/v1/models", "/health", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"}
PIP_FLAGS = {
    "-c",
    "-e",
    "-r",
    "--constraint",
    "--editable",
    "--force-reinstall",
    "--no-build-isolation",
    "--group",
    "--index-url",
    "--no-deps",
    "--require-hashes",
    "--upgrade",
}

Check = Callable[[Command], Iterator[str]]


def problems(script: str) -> list[str]:
    """Everything that is wrong with a script, one sentence each."""
    try:
        parsed = commands(script)
    except NotShell as error:
        return [str(error)]
    return [f"{command.shown}: {problem}" for command in parsed for problem in of_command(command)]


def of_command(command: Command) -> Iterator[str]:
    """The mistakes in one command. An unknown program is one, so that nothing goes unchecked by accident."""
    yield from _paths(command.words)
    if not command.words:
        yield from _variables(command.assignments)
        return
    name = VENV.sub("", command.words[0])
    if name in CHECKS:
        yield from CHECKS[name](Command((name, *command.words[1:]), command.assignments))
    elif name in programs.PROGRAMS:
        yield from programs.problems(name, command.words[1:])
    else:
        yield f"{name!r} is not known here: add it to CHECKS or PROGRAMS"


def _paths(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if OURS.fullmatch(word) and not exists(word):
            yield f"{word} does not exist"


def exists(path: str) -> bool:
    """Whether the file is in the repository, or is one that the guides tell people to make."""
    return path in MADE or (ROOT / path).exists()


def _variables(assignments: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{name} is no setting" for name in assignments if not is_variable(name))
    yield from wrong_values(assignments)


def is_variable(name: str) -> bool:
    """Whether it is a setting, or another program's variable that is known."""
    traces = hasattr(variables_of_api, name) or hasattr(variables_of_sdk, name)
    return traces or name in SETTINGS or name in VARIABLES or name in _of_neighbours()


@cache
def _of_neighbours() -> frozenset[str]:
    """What compose.yaml and the unit of vLLM read, and the arguments of the images."""
    docker, units = ROOT / "docker", ROOT / "deployment" / "units"
    files = [*docker.glob("*.yaml"), *docker.glob("Dockerfile*"), *units.glob("qmd-vllm.*"), docker / ".env.example"]
    text = "\n".join(file.read_text("utf-8") for file in files)
    named = re.findall(r"(?:\$\{|^ARG |^#(?=\w+=))([A-Z][A-Z0-9_]*)", text, re.M)
    return frozenset({*named, "COMPOSE_PROFILES"})


def wrong_values(values: Mapping[str, object]) -> Iterator[str]:
    """The server's error message for these settings, if any. The file of keys need not exist."""
    names = SETTINGS - {"API_KEY_FILE"}
    try:
        load_settings({name.lower(): value for name, value in values.items() if name.upper() in names})
    except StartupError as error:
        yield error.message


def _vecmill(command: Command) -> Iterator[str]:
    """Parsed by the command line itself, and its settings read as `serve` reads them; nothing is run."""
    group = typer.main.get_command(cli)
    context = group.make_context("vecmill", [], resilient_parsing=True)
    name, *rest = *command.words[1:], ""
    if any(name in option.opts for option in group.params):
        return
    subcommand = group.get_command(context, name)  # type: ignore[attr-defined]  # typer's group has it
    if subcommand is None:
        yield f"vecmill has no command {name!r}"
        return
    flags: dict[str, object] = {}
    try:
        flags = subcommand.make_context(name, rest[:-1]).params
    except typer.Exit:  # --help
        pass
    except Exception as error:  # typer gives its errors no public name
        yield f"{error.__class__.__name__}: {getattr(error, 'message', error)}"
    yield from _variables(command.assignments)
    if name == "serve":
        yield from wrong_values({**command.assignments, **{key.upper(): value for key, value in flags.items()}})


def _make(command: Command) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for word in command.words[1:]:
        variable, is_assignment, value = word.partition("=")
        if is_assignment and variable == "ARGS" and "serve" in command.words:
            yield from _vecmill(Command(("vecmill", "serve", *shlex.split(value))))
        elif is_assignment and variable not in ("ARGS", "DAYS", "PYTHON", "SECONDS", "TARGETS", "TORCH_INDEX", "VENV"):
            yield f"the Makefile has no variable {variable}"
        elif not is_assignment and word not in targets:
            yield f"the Makefile has no target {word!r}"


def _python(command: Command) -> Iterator[str]:
    match command.words[1:]:
        case ["-m", "venv", _]:
            pass
        case ["-m", module, *arguments]:
            yield from _module(module, arguments)
        case ["deploy.py", *arguments]:
            yield from _exits(deploy_cli.parse, arguments)
        case ["examples/codebase_search.py", *arguments]:
            yield from _exits(codebase_search.parse_arguments, arguments)
        case ["docker/pin.py", *arguments]:
            yield from _exits(pin.options, arguments)
        case ["--version"]:
            pass
        case words:
            yield f"what {' '.join(words)!r} does is not known here"


def _module(module: str, arguments: Sequence[str]) -> Iterator[str]:
    # importlib's find_spec("pip") makes setuptools remove its distutils, for every later test too.
    spec = importlib.util.find_spec(module) if "." in module else PathFinder.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    if spec is None or spec.origin is None:
        yield f"there is no module {module}"
        return
    source = Path(spec.origin).read_text("utf-8")
    yield from (f"{module} has no {flag}" for flag in arguments if flag.startswith("--") and f'"{flag}"' not in source)


def _exits(parse: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> Iterator[str]:
    """The last line of argparse's error, if any."""
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            parse(arguments)
    except SystemExit:
        yield stderr.getvalue().strip().splitlines()[-1]


def _pip(command: Command) -> Iterator[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    if command.words[1:2] != ("install",):
        yield "only pip install is known here"
    for word in command.words[2:]:
        if word.startswith("-") and word not in PIP_FLAGS:
            yield f"pip has no flag {word!r} that is known here"
        if ours := re.fullmatch(r"(?:vecmill|\.)\[(.+)\]", word):
            yield from (f"there is no extra {extra!r}" for extra in ours[1].split(",") if extra not in extras)
    for flag, file in pairwise(command.words):
        if flag in ("-c", "-r", "--constraint") and "/" not in file and not (ROOT / file).is_file():
            yield f"there is no {file}"


def _curl(command: Command) -> Iterator[str]:
    try:
        request = curl.request(command.words[1:])
    except ValueError as error:
        yield str(error)
        return
    yield from _body(request)
    host, port = request.url.hostname or "", request.url.port
    if port == VLLM_PORT or host.startswith("qmd-vllm."):
        if request.url.path not in VLLM_PATHS:
            yield f"vLLM's {request.url.path} is not known here"
    elif port not in OUR_PORTS and not host.startswith("qmd-embed."):
        yield f"whose {request.url.netloc} is, is not known here"
    elif not is_route(request.method, request.url.path or "/"):
        yield f"there is no {request.method} {request.url.path}"


def _body(request: curl.Request) -> Iterator[str]:
    if request.data is None:
        return
    if not any(header.lower().startswith("content-type: application/json") for header in request.headers):
        yield "JSON needs the header Content-Type: application/json"
    try:
        json.loads(request.data)
    except ValueError as error:
        yield f"its body is no JSON: {error}"


@cache
def _app() -> FastAPI:
    return create_app(load_settings({"generation_url": "http://127.0.0.1:8000"}))


def is_route(method: str, path: str) -> bool:
    """Whether the server answers such a call."""
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in _app().router.routes)


def _systemctl(command: Command) -> Iterator[str]:
    words = [word for word in command.words[1:] if word not in ("--user", "--now", "--no-pager")]
    verb, units = (words[0] if words else ""), words[1:]
    if verb not in SYSTEMCTL:
        yield f"systemctl {verb!r} is not known here"
    if not units and verb not in UNITLESS:
        yield "no unit"
    yield from _unknown_units(units)


def _journalctl(command: Command) -> Iterator[str]:
    rest = list(command.words[1:])
    while rest:
        flag = rest.pop(0)
        if flag not in JOURNALCTL:
            yield f"journalctl has no flag {flag!r} that is known here"
            continue
        value = rest.pop(0) if JOURNALCTL[flag] and rest else ""
        if flag == "-u":
            yield from _unknown_units([value])


def _unknown_units(units: Sequence[str]) -> Iterator[str]:
    for unit in units:
        if (unit if "." in unit else f"{unit}.service") not in UNITS:
            yield f"nothing here has a unit {unit!r}"


def _sudo(command: Command) -> Iterator[str]:
    words = list(command.words[1:])
    assignments = dict(command.assignments)
    if words[:1] == ["-u"]:
        del words[:2]
    while words and (assignment := ASSIGNMENT.fullmatch(words[0])):
        assignments[assignment[1]] = assignment[2]
        del words[0]
    if not words or words[0].startswith("-"):
        yield f"what {command.shown!r} runs is not known here"
    else:
        yield from of_command(Command(tuple(words), assignments))


CHECKS: Mapping[str, Check] = {
    "vecmill": _vecmill,
    "make": _make,
    "python": _python,
    "python3": _python,
    "pip": _pip,
    "curl": _curl,
    "systemctl": _systemctl,
    "journalctl": _journalctl,
    "sudo": _sudo,
}
