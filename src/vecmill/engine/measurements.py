"""What warm-up has found out about models, kept for the next start on the same machine.

It holds for the same files, type, device, number of threads, settings and releases of torch and vecmill; anything else
is measured anew. A file that cannot be read is as good as none: all that is lost is time.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from vecmill import __version__
from vecmill.config import EngineSettings
from vecmill.core.calibration import Calibration, Warmed
from vecmill.core.types import ModelCard
from vecmill.engine.compilation import CompileChoice
from vecmill.models.packing import Attention
from vecmill.storage.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = "vecmill-measurements 1"
MOST = 64  # models; the oldest go
LARGEST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Before:
    """What was measured of a model when it was loaded before."""

    warmed: Warmed
    single_up_to: int
    """Tokens of the largest pass that gets one thread (`CpuThreads`)."""
    choice: CompileChoice | None


class Measurements:
    """Those of one machine, in a file. Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._kept = _read(path)

    def of(self, identity: str) -> Before | None:
        """What is known of a model; None where it has to be measured."""
        with self._lock:
            found = self._kept.get(identity)
        try:
            return None if found is None else _before(found)
        except (TypeError, ValueError, LookupError):
            return None

    def keep(self, identity: str, before: Before) -> None:
        """Remember it, for later starts too. A file that cannot be written is left as it is."""
        warmed = asdict(replace(before.warmed, seconds=()))
        choice = None if before.choice is None else asdict(before.choice)
        with self._lock:
            self._kept.pop(identity, None)
            self._kept[identity] = {"warmed": warmed, "single_up_to": before.single_up_to, "choice": choice}
            for oldest in list(self._kept)[:-MOST]:
                del self._kept[oldest]
            try:
                write_atomically(self._path, json.dumps({"format": FORMAT, "models": self._kept}).encode())
            except OSError as error:
                logger.warning("what was measured cannot be written to %s (%s)", self._path, error.strerror)


def identity(card: ModelCard, engine: EngineSettings, attention: Attention, threads: int) -> str:
    """All that a measurement depends on, in a few letters."""
    parts = {
        "model": [card.fingerprint, card.task.value, card.dtype, card.max_model_len],
        "device": [card.device, threads, platform.machine(), platform.node(), os.cpu_count()],
        "attention": attention.value,
        "settings": [
            *(engine.max_batch_tokens, engine.max_batch_size, engine.max_batch_ms),
            *(engine.torch_compile, engine.cuda_graphs, engine.memory_fraction, engine.memory_floor_gb),
        ],
        "releases": [__version__, str(torch.__version__)],
    }
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(content, dict) and content.get("format") == FORMAT and isinstance(content.get("models"), dict)
    return dict(content["models"]) if known else {}


def _before(kept: Mapping[str, Any]) -> Before:
    """Raises TypeError, ValueError or LookupError for what `keep` has not written."""
    warmed = dict(kept["warmed"])
    line = dict(warmed.pop("calibration"))
    measured = tuple((int(tokens), float(seconds)) for tokens, seconds in line["measured"])
    calibration = Calibration(measured, float(line["fixed_seconds"]), float(line["seconds_per_token"]))
    numbers = {
        field.name: warmed[field.name] for field in fields(Warmed) if field.name not in ("calibration", "seconds")
    }
    positive = ("largest_tokens", "max_batch_tokens", "max_batch_size")
    if (
        calibration.seconds_per_token <= 0
        or calibration.fixed_seconds < 0
        or any(numbers[name] < 1 for name in positive)
    ):
        raise ValueError
    choice = kept["choice"]
    return Before(
        Warmed(calibration=calibration, seconds=(), **numbers),
        int(kept["single_up_to"]),
        None if choice is None else CompileChoice(bool(choice["compiled"]), str(choice["reason"])),
    )
