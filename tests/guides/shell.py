"""The commands of a shell script, wherever in it they stand: in pipes, loops, substitutions, here-documents."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ESCAPED = re.compile(r"\\(.)", re.S)


class NotShell(Exception):
    """The shell would not understand it."""


@dataclass(frozen=True)
class Command:
    """Words as the program gets them, without what the shell would fill in; no words where it only sets variables."""

    words: tuple[str, ...]
    assignments: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.assignments.items()), *self.words])


def tool(name: str) -> str:
    """A program that a development dependency has installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def commands(script: str) -> list[Command]:
    """All commands of a script for bash. Raises NotShell."""
    parsed = subprocess.run(
        [tool("shfmt"), "--language-dialect", "bash", "--to-json"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    if parsed.returncode != 0:
        raise NotShell(parsed.stderr.strip())
    return list(_commands(json.loads(parsed.stdout)))


def _commands(node: Any) -> Iterator[Command]:
    if isinstance(node, list):
        for child in node:
            yield from _commands(child)
    elif isinstance(node, dict):
        if node.get("Type") == "CallExpr":
            yield Command(tuple(map(_word, node.get("Args", ()))), _assignments(node.get("Assigns", ())))
        elif node.get("Type") == "DeclClause":
            yield Command((), _assignments(node["Args"]))
        for value in node.values():
            yield from _commands(value)


def _assignments(nodes: list[dict[str, Any]]) -> dict[str, str]:
    return {node["Name"]["Value"]: _word(node["Value"]) if "Value" in node else "" for node in nodes}


def _word(node: dict[str, Any]) -> str:
    return "".join(_part(part) for part in node["Parts"])


def _part(part: dict[str, Any]) -> str:
    match part["Type"]:
        case "Lit":
            return ESCAPED.sub(r"\1", part["Value"])
        case "SglQuoted":
            return str(part.get("Value", ""))
        case "DblQuoted":
            return "".join(_part(child) for child in part.get("Parts", ()))
        case "ParamExp":
            return f"${part['Param']['Value']}"
        case "CmdSubst":
            return "$(...)"
        case kind:
            raise NotShell(f"{kind} is not read here: write it in a plainer way")
