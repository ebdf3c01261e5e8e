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
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

from vecmill import __version__
from vecmill.config import EngineSettings
from vecmill.core.calibration import Calibration, Warmed
from vecmill.core.types import ModelCard
from vecmill.engine.compilation import CompileChoice
from vecmill.engine.device import CPU_DTYPES, ChosenDtype, dtype_name
from vecmill.models.packing import Attention
from vecmill.storage.files import write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = "vecmill-measurements 1"
MOST = 64  # models; the oldest go
LARGEST_BYTES = 2**20
# What no measurement is beyond: of a forward pass or a token of it, the shapes of a model, a choice's reason.
SHORTEST_SECONDS, LONGEST_SECONDS, MOST_SHAPES, LONGEST_REASON = 1e-12, 3600.0, 64, 1000
LATEST = 1e11  # Unix time


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
        content = _read(path)
        self._kept = _models(content)
        self._dtypes = _dtypes(content)

    def of(self, identity: str, *, most_tokens: int, most_rows: int) -> Before | None:
        """What is known of a model; None where it has to be measured.

        `most_tokens` and `most_rows`: of a forward pass, as warm-up would try them. More is not what it has found out.
        """
        with self._lock:
            found = self._kept.get(identity)
        if found is None or found.warmed.largest_tokens > most_tokens or found.warmed.max_batch_size > most_rows:
            return None
        return replace(found, warmed=replace(found.warmed, is_provisional=True))

    def dtype_of(self, width: int, threads: int) -> ChosenDtype | None:
        """The type that was found to be the fastest on this CPU for hidden states of so many values."""
        with self._lock:
            return self._dtypes.get(_of_machine(width, threads))

    def keep_dtype(self, width: int, threads: int, chosen: ChosenDtype) -> None:
        """Remember that type, for later starts."""
        with self._lock:
            if self._dtypes.get(machine := _of_machine(width, threads)) == chosen:
                return
            _put_last(self._dtypes, machine, chosen)
            self._write()

    def keep(self, identity: str, before: Before) -> None:
        """Remember it, for later starts too. A file that cannot be written is left as it is."""
        with self._lock:
            _put_last(self._kept, identity, replace(before, warmed=replace(before.warmed, seconds=())))
            self._write()

    def _write(self) -> None:
        models = {key: asdict(kept) for key, kept in self._kept.items()}
        dtypes = {key: {"dtype": dtype_name(each.dtype), "reason": each.reason} for key, each in self._dtypes.items()}
        content = {"format": FORMAT, "models": models, "dtypes": dtypes}
        try:
            write_atomically(self._path, json.dumps(content).encode())
        except OSError as error:
            logger.warning("what was measured cannot be written to %s (%s)", self._path, error.strerror)


def _put_last(kept: dict[str, T], key: str, value: T) -> None:
    """As the newest of at most MOST."""
    kept.pop(key, None)
    kept[key] = value
    for oldest in list(kept)[:-MOST]:
        del kept[oldest]


def identity(card: ModelCard, engine: EngineSettings, attention: Attention, threads: int) -> str:
    """All that a measurement depends on, in a few letters."""
    parts = {
        "model": [card.fingerprint, card.task.value, card.dtype, card.max_model_len, card.numerics],
        "device": [card.device, threads, platform.machine(), platform.node(), os.cpu_count()],
        "attention": attention.value,
        "settings": [
            *(engine.max_batch_tokens, engine.max_batch_size, engine.max_batch_ms),
            *(engine.torch_compile, engine.cuda_graphs, engine.memory_fraction, engine.memory_floor_gb),
        ],
        "releases": [__version__, str(torch.__version__)],
    }
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _of_machine(width: int, threads: int) -> str:
    """All that the fastest type of a CPU depends on, in a few letters."""
    parts = [width, threads, platform.machine(), platform.node(), os.cpu_count(), str(torch.__version__)]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _read(path: Path) -> Mapping[str, Any]:
    """What was written; empty where that cannot be what is in the file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return {}
        with path.open("rb") as file:
            written = file.read(LARGEST_BYTES + 1)
        content: Any = json.loads(written) if len(written) <= LARGEST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _models(content: Mapping[str, Any]) -> dict[str, Before]:
    """What `keep` has written, and of anything else as much as could be that."""
    models = content.get("models")
    pairs = list(models.items())[-MOST:] if isinstance(models, dict) else []
    return {key: before for key, kept in pairs if (before := _before_or_none(kept)) is not None}


def _dtypes(content: Mapping[str, Any]) -> dict[str, ChosenDtype]:
    """The same of `keep_dtype`."""
    dtypes = content.get("dtypes")
    pairs = list(dtypes.items())[-MOST:] if isinstance(dtypes, dict) else []
    return {
        key: ChosenDtype(CPU_DTYPES[kept["dtype"]], str(kept.get("reason"))[:LONGEST_REASON])
        for key, kept in pairs
        if isinstance(kept, dict) and isinstance(kept.get("dtype"), str) and kept["dtype"] in CPU_DTYPES
    }


def _before_or_none(kept: Any) -> Before | None:
    try:
        return _before(kept)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _before(kept: Any) -> Before:
    """Raises ArithmeticError, AttributeError, LookupError, TypeError or ValueError for what `keep` has not written."""
    warmed, choice = kept["warmed"], kept["choice"]
    line = warmed["calibration"]
    if len(line["measured"]) > MOST_SHAPES:
        raise ValueError
    measured = tuple((_whole(tokens, 1), _seconds(seconds)) for tokens, seconds in line["measured"])
    fixed = 0.0 if line["fixed_seconds"] == 0 else _seconds(line["fixed_seconds"])
    largest = _whole(warmed["largest_tokens"], 1)
    max_batch_tokens = _whole(warmed["max_batch_tokens"], 1, largest)
    return Before(
        Warmed(
            calibration=Calibration(measured, fixed, _seconds(line["seconds_per_token"])),
            largest_tokens=largest,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=_whole(warmed["max_batch_size"], 1),
            free_tokens=_whole(warmed["free_tokens"], 0, max_batch_tokens),
            # Each start finds these out.
            compiled=False,
            compile_reason="",
            graphs=0,
            graph_tokens=0,
            graph_memory_bytes=0,
            seconds=(),
            changed_at=_between(warmed["changed_at"], 0, LATEST),
            bulk_rate=_between(warmed["bulk_rate"], 0.5, 0.99),
        ),
        _whole(kept["single_up_to"], 0),
        None if choice is None else _choice(choice),
    )


def _choice(kept: Any) -> CompileChoice:
    reason = str(kept["reason"])[:LONGEST_REASON]
    return CompileChoice(kept["compiled"] is True, reason, kept.get("is_disturbed") is True)


def _whole(value: Any, least: int, most: int = 2**31) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def _seconds(value: Any) -> float:
    return _between(value, SHORTEST_SECONDS, LONGEST_SECONDS)


def _between(value: Any, least: float, most: float) -> float:
    if not isinstance(value, int | float) or not least <= value <= most:  # as no NaN is
        raise ValueError
    return float(value)
