"""Marks each test with the kinds of things its code starts: a process, a browser, an application, a reference library.

A test starts whatever is named by its own code, its fixtures or helpers under `tests`, directly or indirectly.
So no test has to be marked by hand, and `make quick` leaves out what takes long to start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

BY_MODULE: Mapping[str, str] = {
    "subprocess": "process",
    "multiprocessing": "process",
    "playwright": "browser",
    "sentence_transformers": "reference",
}
BY_FUNCTION: Mapping[str, str] = {
    "vecmill.app.create_app": "app",
    "vecmill.cluster.data.LocalServer": "app",
    "vecmill.engine.engine.Engine": "app",
    "vecmill.tools.pull.run_pull": "process",
    "vecmill.tools.verify.run_verify": "app",
    "tests.oracle._nomic": "reference",
}


def mark(items: Iterable[pytest.Item]) -> None:
    """Add the markers `process`, `browser`, `app` and `reference`."""
    for item in items:
        if isinstance(item, pytest.Function):
            for kind in sorted(_kinds(item)):
                item.add_marker(kind)


def _kinds(item: pytest.Function) -> set[str]:
    fixtures = item._fixtureinfo.name2fixturedefs
    # The last definition of a name is the nearest to the test.
    functions = [item.function, *(each.func for name in item.fixturenames for each in fixtures.get(name, ())[-1:])]
    kinds: set[str] = set().union(*(_reached(function) for function in functions))
    return kinds | {"process"} if "browser" in kinds else kinds


@cache
def _reached(start: Any) -> frozenset[str]:
    """The kinds of everything that a function's code names, directly or indirectly."""
    kinds, seen, ahead = set[str](), {id(start)}, [start]
    while ahead:
        kind, named = _look(ahead.pop())
        if kind:
            kinds.add(kind)
        new = [each for each in named if id(each) not in seen]
        seen.update(map(id, new))
        ahead += new
    return frozenset(kinds)


_LOOKED: dict[int, tuple[Any, str | None, tuple[Any, ...]]] = {}
"""By identity, for not everything has a hash: the thing, its own kind, and what it names."""


def _look(thing: Any) -> tuple[str | None, tuple[Any, ...]]:
    """A thing's own kind and what it names, found out once: thousands of tests reach the same helpers."""
    if id(thing) not in _LOOKED:
        _LOOKED[id(thing)] = (thing, _kind(thing), tuple(_named(thing)))
    return _LOOKED[id(thing)][1:]


def _kind(thing: Any) -> str | None:
    module = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or ""
    name = f"{module}.{getattr(thing, '__name__', '')}"
    return BY_FUNCTION.get(name) or BY_MODULE.get(module.partition(".")[0])


def _named(thing: Any) -> Iterator[Any]:
    """The objects that the code of a test's function or class names."""
    if isinstance(thing, type) and thing.__module__.startswith("tests."):
        yield from vars(thing).values()
    while hasattr(thing, "__wrapped__"):  # a context manager's function
        thing = thing.__wrapped__
    thing = getattr(thing, "__func__", thing)
    if isinstance(thing, FunctionType) and thing.__module__.startswith("tests"):
        yield from (thing.__globals__[name] for name in _names(thing.__code__) if name in thing.__globals__)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
