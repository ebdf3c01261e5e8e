"""What code a result was measured on: a digest of each file, which no comment and no docstring changes.

A result keeps the digests instead of relying on its commit: a checkout without history (CI's) can compare them, and so
can one whose commits were rewritten, and a result of a working tree with changes says truly what was measured.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.lib.host import REPOSITORY

MEASURED = ("src/vecmill/**/*.py", "benchmarks/**/*.py", "deployment/**/*.py", "deploy.py")
DIGITS = 12
NOT_CODE = {"ctx", "kind", "type_comment"}


def code_digests(root: Path = REPOSITORY, *, also: Iterable[str] = ()) -> dict[str, str]:
    """A digest for each of the Python files below `root` that are measured, and for those that `also` names."""
    return {name: file_digest(root / name) for name in sorted({*code_files(root), *also})}


def code_files(root: Path) -> list[str]:
    """The Python files below `root` that are measured."""
    return sorted(path.relative_to(root).as_posix() for pattern in MEASURED for path in root.glob(pattern))


def changed_files(code: Iterable[str], then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that match a pattern of `code` and are not the same in both: changed, new or gone."""
    patterns = tuple(code)
    files = (name for name in then.keys() | now.keys() if any(fnmatch(name, pattern) for pattern in patterns))
    return sorted(name for name in files if then.get(name) != now.get(name))


def file_digest(path: Path) -> str:
    """The first digits of a SHA-256 over the syntax tree, the same for every version of Python that reads the file."""
    tree = json.dumps(_plain(ast.parse(path.read_text("utf-8"))), separators=(",", ":"))
    return hashlib.sha256(tree.encode()).hexdigest()[:DIGITS]


def _plain(node: object) -> Any:
    """A node as its name and its fields. What is empty is left out: newer Pythons have fields that older ones lack."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in _fields(node))
        return [type(node).__name__, *(field for field in fields if field[1] not in (None, []))]
    if isinstance(node, list):
        return [_plain(item) for item in node if not _says_only(item)]
    return node if node is None else f"{type(node).__name__} {node!r}"


def _fields(node: ast.AST) -> Iterator[tuple[str, object]]:
    for name, value in ast.iter_fields(node):
        if name == "values" and isinstance(node, ast.JoinedStr):
            yield name, [part for part in value if not _empty(part)]  # Python 3.12 has one behind a nested format
        elif name not in NOT_CODE:
            yield name, value


def _says_only(item: object) -> bool:
    """Whether it is a statement of nothing but a string: a docstring, or the description of a field."""
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)


def _empty(part: ast.expr) -> bool:
    return isinstance(part, ast.Constant) and part.value == ""
