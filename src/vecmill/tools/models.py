"""`vecmill models`: which models can be served, what each takes, and whether it fits this machine. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer
from rich.filesize import decimal

from vecmill.config import Settings, load_settings
from vecmill.core.errors import StartupError
from vecmill.core.threads import within
from vecmill.core.types import Task
from vecmill.hardware.gpu import AMPERE, FLOAT8, GpuReading, gpu_memory, no_float8, nvidia_gpu_present
from vecmill.hardware.memory import GIGABYTE, meminfo
from vecmill.hardware.memory_room import Fit, MemoryRoom, allowance, memory_room
from vecmill.hardware.nvml import reading
from vecmill.models import hub
from vecmill.models.card_examples import find_example
from vecmill.models.families import FAMILIES, published_model
from vecmill.models.family import Family, HubModel
from vecmill.models.source import BUNDLED_ID, bundled_instead
from vecmill.tools.console import CommandError, UsageError, print_error, printable, results
from vecmill.tools.http_client import HttpClient, ServerAddress

NVML_SECONDS, ANSWER_SECONDS = 10.0, 10.0
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FLOAT8: 1}
# In fp8 the token embedding stays in bfloat16; of rerankers the width is not in the list.
LARGEST_VOCABULARY, USUAL_WIDTH = 262_144, 4096
NUMBERS = frozenset({"parameters", "download", "tokens", "memory"})
"""The columns that are set to the right."""
UNKNOWN = "?"


class Whereabouts(StrEnum):
    """Where a model is."""

    SERVED = "served"
    """By the server that was asked."""
    CACHED = "cached"
    """Its files are in the hub's cache."""
    PARTLY = "partly"
    """Some of its files are."""
    BUNDLED = "bundled"
    """Its files were installed with vecmill."""
    ON_HUB = ""


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """What would serve a model, as far as can be told without torch.

    `dtypes` are the types that the weights may get: several on a CPU, where they are measured when a model is loaded.
    """

    device: Literal["cuda", "mps", "cpu"]
    name: str
    dtypes: tuple[str, ...]
    room: MemoryRoom
    no_float8: str | None = None
    """Why it cannot have DTYPE=fp8; None where it can, and where its driver does not tell."""

    def memory(self, model: HubModel) -> tuple[int, int]:
        """Bytes that a model takes in the smallest and in the largest of the types, allowance included."""
        sizes = [model.memory_bytes(BYTES[dtype]) + allowance(on_gpu=self.room.of_gpu) for dtype in self.dtypes]
        embedding = min(model.parameters, LARGEST_VOCABULARY * (model.width or USUAL_WIDTH))
        return min(sizes), max(sizes) + (embedding if FLOAT8 in self.dtypes else 0)


@dataclass(frozen=True, slots=True)
class Listed:
    """A model with what this machine makes of it."""

    model: HubModel
    family: Family
    fit: Fit
    memory: tuple[int, int]
    state: Whereabouts

    @property
    def dimensions(self) -> Sequence[int]:
        """The sizes that vectors may have; empty for a reranker."""
        if self.model.width is None:
            return ()
        published = published_model(self.model.id)
        own = published.dimensions if published is not None else ()
        return own or self.family.dimensions(self.model.width)


Url = Annotated[str | None, typer.Option(help="A server to ask which of them it serves.", show_default=False)]
Key = Annotated[
    str | None, typer.Option("--api-key", "--key", help="Sent as a bearer token.", envvar="API_KEY", show_default=False)
]
OnlyTask = Annotated[Task | None, typer.Option("--task", help="Only those for it.", show_default=False)]
EnvFile = Annotated[
    str | None, typer.Option("--env-file", help="File of settings to read in place of `.env`.", show_default=False)
]


def models(
    task: OnlyTask = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of lines.")] = False,
    env_file: EnvFile = None,
) -> None:
    """List the families of models that can be served, with models of the hub and whether each fits this machine.

    A model of a listed family that is not in the list is served as well. DEVICE, DTYPE, MEMORY_FRACTION and
    MEMORY_FLOOR_GB count, from the environment and `.env`. Exit code 0; 1: the server at --url does not answer; 2: the
    options or the settings are wrong.
    """
    try:
        settings = load_settings(env_file=env_file)
    except StartupError as error:
        print_error(error.message)
        raise typer.Exit(UsageError.exit_code) from None
    try:
        served = frozenset[str]() if url is None else _served(url, api_key)
    except CommandError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    machine = this_machine(settings)
    if settings.model.dtype == FLOAT8 and machine.no_float8 is not None:
        print_error(machine.no_float8)
        raise typer.Exit(UsageError.exit_code)
    tasks = tuple(Task) if task is None else (task,)
    listed = [each for each in _listed(machine, served) if each.model.task in tasks]
    if as_json:
        sys.stdout.write(json.dumps(_as_json(machine, listed, tasks), indent=2) + "\n")
    else:
        results.print("\n".join(_lines(machine, listed, tasks)), soft_wrap=True)


def this_machine(settings: Settings) -> ThisMachine:
    """The device that DEVICE names or `auto` would choose, and its memory."""
    engine = settings.engine
    gpu = _gpu() if engine.device == "auto" or engine.device.startswith("cuda") else None
    memory = None if gpu is None else gpu_memory(gpu, None, meminfo(), os.getpid())
    room = memory_room(memory, engine.memory_floor_gb, engine.memory_fraction).in_control_groups()
    device: Literal["cuda", "mps", "cpu"] = "cpu"
    if engine.device.startswith("cuda") or gpu is not None:
        device = "cuda"
    elif engine.device == "mps" or (engine.device == "auto" and _is_apple()):
        device = "mps"
    name = {"cuda": (gpu and gpu.name) or "a GPU", "mps": "Apple's GPU", "cpu": "a CPU"}[device]
    unknown = device == "cuda" and (gpu is None or gpu.capability is None)
    refusal = None if unknown else no_float8(name, gpu.capability if gpu is not None and device == "cuda" else None)
    return ThisMachine(device, name, _dtypes(settings.model.dtype, device, gpu), room, refusal)


def _gpu() -> GpuReading | None:
    """The first GPU; None where there is none. One whose driver says nothing has no name and no memory."""
    seen = within(NVML_SECONDS, lambda: reading(None))
    if isinstance(seen, GpuReading):
        return seen
    return GpuReading() if nvidia_gpu_present() else None


def _is_apple() -> bool:
    return (sys.platform, platform.machine()) == ("darwin", "arm64")


def _dtypes(wanted: str, device: str, gpu: GpuReading | None) -> tuple[str, ...]:
    """The types that the engine may choose; on a CPU it measures which is faster."""
    if wanted != "auto":
        return (wanted,)
    if device == "cpu":
        return ("bfloat16", "float32")
    if device == "mps":
        return ("float32",)
    capability = (gpu.capability if gpu is not None else None) or AMPERE  # unknown: most have it
    return ("bfloat16",) if capability >= AMPERE else ("float32",)


def _served(url: str, api_key: str | None) -> frozenset[str]:
    """The names of /v1/models of a server, folded."""
    address = ServerAddress(url, api_key, answer_seconds=ANSWER_SECONDS, patience_seconds=None)
    with HttpClient(address) as client:
        data = client.ask("GET", "/v1/models").get("data")
    entries = data if isinstance(data, list) else []
    return frozenset(str(entry["id"]).casefold() for entry in entries if isinstance(entry, Mapping) and "id" in entry)


def _listed(machine: ThisMachine, served: frozenset[str]) -> Iterator[Listed]:
    here = frozenset(hub.listed_in_cache())
    for family in FAMILIES.values():
        for model in family.examples:
            memory = machine.memory(model)
            yield Listed(model, family, machine.room.fit(*memory), memory, _state(model, served, here))


def _state(model: HubModel, served: frozenset[str], here: frozenset[str]) -> Whereabouts:
    if model.id.casefold() in served:
        return Whereabouts.SERVED
    if model.id in here:
        return Whereabouts.CACHED if hub.cached(model.id) is not None else Whereabouts.PARTLY
    bundled = model.id == BUNDLED_ID and bundled_instead(model.id, model.task, None) is not None
    return Whereabouts.BUNDLED if bundled else Whereabouts.ON_HUB


def _families(task: Task) -> list[str]:
    return [family.model_type for family in FAMILIES.values() if task in family.tasks]


def _as_json(machine: ThisMachine, listed: Sequence[Listed], tasks: Sequence[Task]) -> dict[str, Any]:
    room = machine.room
    return {
        "machine": {
            "device": machine.device,
            "name": machine.name,
            "dtypes": list(machine.dtypes),
            "total_bytes": room.total,
            "available_bytes": room.available,
            "floor_bytes": room.floor,
            "most_bytes": room.most,
            "unified": room.unified,
        },
        "families": {task.value: _families(task) for task in tasks},
        "models": [_object(each) for each in listed],
    }


def _object(listed: Listed) -> dict[str, Any]:
    model, sizes = listed.model, listed.dimensions
    return {
        "id": model.id,
        "task": model.task.value,
        "family": listed.family.model_type,
        "parameters": model.parameters,
        "download_bytes": model.download_bytes,
        "license": model.licence,
        "dimensions": {"min": sizes[0], "max": sizes[-1]} if isinstance(sizes, range) else list(sizes),
        "max_tokens": model.max_tokens,
        "memory_bytes": {"min": listed.memory[0], "max": listed.memory[1]},
        "fit": listed.fit.value,
        "state": listed.state.value or "on the hub",
        "note": model.note or None,
        "verifiable": find_example([model.id]) is not None,
    }


def _lines(machine: ThisMachine, listed: Sequence[Listed], tasks: Sequence[Task]) -> list[str]:
    lines = [_about(machine)]
    for task in tasks:
        rows = [_row(each) for each in listed if each.model.task is task]
        lines += ["", f"{task.value}: {', '.join(_families(task))}", *_table(rows)]
    notes = [f"{each.model.id}: {each.model.note}" for each in listed if each.model.note]
    lines += ["", *notes] if notes else []
    return [printable(line) for line in [*lines, "", *HELP]]


HELP = (
    "memory: weights and an allowance for all else. tight: only once other programs give memory back, or only in",
    "bfloat16. Other models of these families are served as well: `vecmill pull OWNER/NAME` says what one takes,",
    "`vecmill serve --embed-model OWNER/NAME` (or --rerank-model) serves it, `vecmill verify` checks its numbers.",
)


def _about(machine: ThisMachine) -> str:
    room = machine.room
    owner = "shared with the machine" if room.unified else "the GPU's own" if room.of_gpu else "the machine's"
    kept = f", {room.floor / GIGABYTE:.1f} of which stay free (MEMORY_FLOOR_GB)" if room.floor else ""
    types = " or ".join(machine.dtypes) + (", whichever is faster" if len(machine.dtypes) > 1 else "")
    return (
        f"{machine.name}: {room.available / GIGABYTE:.1f} of {room.total / GIGABYTE:.1f} GB are available ({owner})"
        f"{kept}; weights in {types}"
    )


def _row(listed: Listed) -> dict[str, str]:
    model = listed.model
    smallest, largest = (f"{size / GIGABYTE:.1f}" for size in listed.memory)
    return {
        "model": model.id,
        "family": listed.family.model_type,
        "parameters": _count(model.parameters),
        "download": decimal(model.download_bytes),
        "licence": model.licence,
        **({} if model.width is None else {"dimensions": _sizes(listed.dimensions)}),
        "tokens": f"{model.max_tokens:,}",
        "memory": f"{smallest} GB" if smallest == largest else f"{smallest}-{largest} GB",
        "fit": listed.fit.value,
        "here": listed.state.value,
    }


def _sizes(sizes: Sequence[int]) -> str:
    return f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else str(sizes[-1])


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    titles = {name: name for name in columns}
    return ["  ".join(_cell(name, row[name], widths[name]) for name in columns).rstrip() for row in (titles, *rows)]


def _cell(column: str, text: str, width: int) -> str:
    return text.rjust(width) if column in NUMBERS else text.ljust(width)
