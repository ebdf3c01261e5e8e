"""Loads one checkpoint and prints what that took as one line of JSON; started by `benchmarks.models.loading`.

Loading ends when every weight was looked at once: what is mapped and never read would cost its time and memory later.
Memory is the highest resident set that the system noted for this process between the imports and the end of loading,
pages of mapped files included, less what it was before; where the system keeps no such mark, a thread samples. Beside
it the thread samples what the process took together with the whole system's cache of files, which other programs can
disturb: where CPU and GPU share their memory, that cache is in the way of CUDA.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.models.plain import unmerged
from torch import nn
from transformers import Qwen3Model

from vecmill.core.types import Task
from vecmill.models import checkpoint as checkpoints
from vecmill.models.checkpoint import Source
from vecmill.models.networks import load_model
from vecmill.models.weights import Target

DTYPE = torch.bfloat16
SAMPLE_SECONDS = 0.002
PAGE = 4096
STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


@dataclass
class Peak:
    """Above what was taken before the block; filled in when it ends."""

    resident: int = 0
    with_cache: int = 0
    how: str = ""


@contextmanager
def watched() -> Iterator[Peak]:
    """Fill in the peak of this process when the block ends."""
    peak, before, done = Peak(), _taken(), threading.Event()
    highest = list(before)

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            highest[:] = map(max, highest, _taken())

    marked = _reset_mark()
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        resident = _kilobytes(STATUS, "VmHWM") if marked else highest[0]
        peak.resident, peak.with_cache = max(0, resident - before[0]), highest[1] - before[1]
        peak.how = "VmHWM" if marked else "sampled RSS"


def _taken() -> tuple[int, int]:
    """Resident bytes; those of its own together with the system's file cache, in which mapped files are."""
    resident = psutil.Process().memory_info().rss
    if not STATUS.exists():
        return resident, resident
    return resident, _kilobytes(STATUS, "RssAnon") + _kilobytes(MEMINFO, "Cached")


def _reset_mark() -> bool:
    """Reset the system's mark of the peak to what is resident now; False if it keeps no such mark."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _kilobytes(path: Path, key: str) -> int:
    """An entry of a table under /proc, in bytes."""
    match = re.search(rf"^{key}:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def load(way: str, folder: Path, device: torch.device) -> nn.Module:
    """The decoder, in bfloat16 as it is stored."""
    if way == "vecmill":
        checkpoint = checkpoints.read(Source("random", folder, Task.EMBED))
        return load_model(checkpoint, Target(DTYPE, device)).modules[0]
    model: Any = Qwen3Model.from_pretrained(folder, dtype=DTYPE, local_files_only=True).to(device)
    module: nn.Module = model.eval()
    return module


def touch(module: nn.Module) -> None:
    """Look at every weight once, one value of each page."""
    for parameter in module.parameters():
        parameter.detach().view(-1)[:: PAGE // parameter.element_size()].sum().item()


def digest(module: nn.Module) -> int:
    """The same for the same weights."""
    checksum = 0
    for name, parameter in sorted(unmerged(module).items()):
        values: Any = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
        checksum = zlib.crc32(values, zlib.crc32(name.encode(), checksum))
    return checksum


def main() -> None:
    """Load, measure, print."""
    way, folder, device = sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3])
    torch.ones(8, device=device).sum().item()  # a GPU's own context is no part of the loading
    started = time.perf_counter()
    with watched() as peak:
        module = load(way, folder, device)
        touch(module)
        seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "host_bytes": peak.resident,
        "host_bytes_with_cache": peak.with_cache,
        "device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "memory": peak.how,
        "weight_bytes": sum(each.numel() * each.element_size() for each in module.parameters()),
        "digest": digest(module),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
