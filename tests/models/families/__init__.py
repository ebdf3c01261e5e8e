"""A test file for each family's file. Each lists its checkpoints in TINY, for what holds for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest

from vecmill.core.types import Row, Task


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint of a family, and which rows it gets when it is served."""

    task: Task
    model_type: str
    write: Callable[[Path], Path]
    """Given a path where nothing is; returns the folder of the checkpoint, which need not be there."""
    unpooled: bool = False
    """Whether leading tokens are left out of the pooling."""
    second_text: bool = False
    """Whether rows are pairs with token types."""
    prefixes: bool = False
    """Whether rows share prefixes."""
    adapters: int = 0
    """Tasks with weights of their own."""
    layer_kinds: int = 1
    """Kinds of layers: each is compiled by itself."""
    layout: str = ""
    """What tells it from others of its family and task."""
    flash: bool = True
    """Whether it runs through flash kernels on a card that has them."""
    layer_runs: int = 1
    """How often each layer runs in one pass."""

    def __str__(self) -> str:
        """Of a test's parameter, and a name for its folder."""
        return "-".join(filter(None, (self.task.value, self.model_type, self.layout)))

    def row(self, length: int, vocab_size: int, random: np.random.Generator) -> Row:
        """Random token ids, and a random place where the unpooled tokens end or the second text begins, or task."""
        token_ids = random.integers(0, vocab_size, length).astype(np.int32)
        second = int(random.integers(0, length)) if self.second_text else None
        unpooled = int(random.integers(0, length)) if self.unpooled else 0
        task = int(random.integers(-1, self.adapters)) if self.adapters else -1
        return Row(token_ids, unpooled=unpooled, second_text=second, adapter=None if task < 0 else task)


@cache
def tiny_models() -> tuple[TinyModel, ...]:
    """Those of every file here."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    return tuple(tiny for module in modules for tiny in getattr(module, "TINY", ()))


def tiny_model(task: Task, model_type: str) -> TinyModel:
    """That of a family for a task."""
    return next(tiny for tiny in tiny_models() if (tiny.task, tiny.model_type) == (task, model_type))


def every_family(*, prefixes: bool | None = None, flash: bool | None = None) -> list[Any]:
    """A parameter for each tiny model; with `prefixes` only those that share prefixes or do not, so with `flash`."""
    chosen = (
        tiny
        for tiny in tiny_models()
        if (prefixes is None or tiny.prefixes is prefixes) and (flash is None or tiny.flash is flash)
    )
    return [pytest.param(tiny, id=str(tiny)) for tiny in chosen]
