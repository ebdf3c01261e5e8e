"""Functions and classes of the Python standard library: a workload that every machine with Python has."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from vecmill.tools.bench.text_files import cut

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def files() -> list[Path]:
    """Its modules, without its tests, sorted."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = folder.rglob("*.py")
    return sorted(path for path in found if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1]))


def chunks(path: Path, longest: int) -> Iterator[str]:
    """A file's functions, methods and class headers, cut off at a line end; none where it is no valid Python."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    # Not splitlines(): that also splits at form feeds, which ast does not count as line ends.
    for text in _definitions(tree.body, source.split("\n")):
        yield cut(text, longest)


def _definitions(body: Sequence[ast.stmt], lines: list[str]) -> Iterator[str]:
    """A class stands for its header: everything before its first method."""
    for node in body:
        if not isinstance(node, Definition):
            continue
        inner = [member for member in node.body if isinstance(member, Definition)]
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef) and inner:
            last = max(node.lineno, _first_line(inner[0]) - 1)
        yield "\n".join(lines[_first_line(node) - 1 : last]).rstrip()
        if isinstance(node, ast.ClassDef):
            yield from _definitions(inner, lines)


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
