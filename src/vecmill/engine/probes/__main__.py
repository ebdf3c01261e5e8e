"""The process of the probes: a request on each line of stdin, a result on each line of stdout, until stdin ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import orjson

PROBES: Mapping[str, str] = {
    "build": "build.torch_build",
    "memory": "build.claimed_memory",
    "matmul": "matmul.matmul_speed",
    "load": "matmul.load",
    "attention": "attention.attention",
    "compiling": "compiling.compiling",
    "allocation": "allocation.allocation",
}


def main() -> None:
    """Answer until there are no more requests."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        answers.write(orjson.dumps(_answer(orjson.loads(line))) + b"\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, object]:
    try:
        # Imported when it is asked for: a part that cannot be imported here is one probe's failure, not every one's.
        module, function = PROBES[request["probe"]].split(".")
        probe = getattr(import_module(f"vecmill.engine.probes.{module}"), function)
        return {"result": probe(request["device"])}
    except Exception as error:  # whatever went wrong is what was asked for
        cause = getattr(error, "inner_exception", error)  # compilers wrap it
        return {"error": {"type": type(cause).__name__, "message": (str(cause).strip().splitlines() or [""])[0]}}


if __name__ == "__main__":
    main()
