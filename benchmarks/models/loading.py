"""How much memory loading takes: a random checkpoint, and a process of its own for each load of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from benchmarks.lib.figures import spread
from benchmarks.lib.host import REPOSITORY, forget
from benchmarks.lib.results import progress
from benchmarks.lib.timing import Machine
from benchmarks.models.builds import RandomValues
from benchmarks.models.shapes import Shape
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

GOLDEN = REPOSITORY / "tests" / "golden" / "qwen3" / "embedding"
ALLOWED_PEAK = 1.3
SHARDS = 4
CHUNK = 2**24
WAYS = ("vecmill", "transformers")


def loading(machine: Machine, shape: Shape, gigabytes: float) -> dict[str, Any]:
    """Peak memory and time of vecmill's loading and of transformers', beside plainly reading the files."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        room = min(shutil.disk_usage(folder).free / 3e9, psutil.virtual_memory().available / 4e9)
        write_checkpoint(folder, shape, min(gigabytes, room))
        files = sorted(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        with progress(f"loading {size / 1e9:.2f} GB", machine.rounds * (len(WAYS) + 1)) as advance:
            rounds = []
            for _ in range(machine.rounds):
                measured: dict[str, dict[str, Any]] = {}
                for way in WAYS:
                    measured[way] = _load_in_child(way, folder, machine.device)
                    advance(1)
                measured["plain read"] = {"seconds": _read(files)}
                advance(1)
                rounds.append(measured)
    return _summary(size, len(files), rounds)


def _summary(size: int, files: int, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    seconds = {name: [each[name]["seconds"] for each in rounds] for name in rounds[0]}
    weights = rounds[0][WAYS[0]]["weight_bytes"]
    sides: dict[str, Any] = {
        name: {"seconds": spread(each), "gb_per_s": spread([size / 1e9 / value for value in each])}
        for name, each in seconds.items()
    }
    for way in WAYS:
        of_read = [read / each for read, each in zip(seconds["plain read"], seconds[way], strict=True)]
        sides[way]["of_read"] = spread(of_read)
        for part in ("host_bytes", "host_bytes_with_cache", "device_bytes"):
            sides[way][part] = max(each[way][part] for each in rounds)
        for peak, part in (("peak", "host_bytes"), ("peak_with_cache", "host_bytes_with_cache")):
            sides[way][f"{peak}_of_weights"] = spread(
                [(each[way][part] + each[way]["device_bytes"]) / weights for each in rounds]
            )
    digests = {each[way]["digest"] for each in rounds for way in WAYS}
    return {
        "file_bytes": size,
        "files": files,
        "weight_bytes": weights,
        "dtype": "bfloat16",
        "memory": rounds[0][WAYS[0]]["memory"],
        "sides": sides,
        "check": {
            "same": len(digests) == 1,
            "peak": sides[WAYS[0]]["peak_of_weights"]["max"],
            "allowed_peak": ALLOWED_PEAK,
            "peak_allowed": sides[WAYS[0]]["peak_of_weights"]["max"] < ALLOWED_PEAK,
        },
    }


def write_checkpoint(folder: Path, shape: Shape, gigabytes: float) -> None:
    """A Qwen3-Embedding in bfloat16 with as many layers as fit, in the hub's layout."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {**shape, "num_hidden_layers": _layers(shape, gigabytes)}
    base_config = json.loads((GOLDEN / "config.json").read_text("utf-8"))
    dtype = {"torch_dtype": "bfloat16", "max_window_layers": shape["num_hidden_layers"]}
    (folder / "config.json").write_text(json.dumps({**base_config, **shape, **dtype}), "utf-8")
    shapes = list(_tensor_shapes(shape))
    values = RandomValues(torch.device("cpu"), torch.bfloat16)
    index: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        own = shapes[len(shapes) * shard // SHARDS : len(shapes) * (shard + 1) // SHARDS]
        save_file({key: values.parameter(key, size) for key, size in own}, folder / name, metadata={"format": "pt"})
        index |= {key: name for key, _ in own}
    total = sum(size.numel() for _, size in shapes) * torch.bfloat16.itemsize
    weight_index = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_index), "utf-8")


def _layers(shape: Shape, gigabytes: float) -> int:
    one_layer, two_layers = (
        sum(size.numel() for _, size in _tensor_shapes({**shape, "num_hidden_layers": layers})) for layers in (1, 2)
    )
    wanted = int(gigabytes * 1e9 / torch.bfloat16.itemsize)
    return max(1, 1 + (wanted - one_layer) // (two_layers - one_layer))


def _tensor_shapes(shape: Shape) -> Iterator[tuple[str, torch.Size]]:
    with torch.device("meta"):
        model: Any = Qwen3Model(Qwen3Config(**shape))
    for name, parameter in model.named_parameters():
        yield name, parameter.shape


def _load_in_child(way: str, folder: Path, device: torch.device) -> dict[str, Any]:
    for path in folder.glob("*.safetensors"):
        forget(path)
    command = [sys.executable, "-m", "benchmarks.models.load_child", way, str(folder), str(device)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way} could not load the checkpoint:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _read(files: list[Path]) -> float:
    for path in files:
        forget(path)
    buffer = bytearray(CHUNK)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started
