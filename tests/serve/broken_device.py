"""The real server, but every forward pass after the start ends as on a GPU after an illegal memory access."""

from __future__ import annotations

import sys
from pathlib import Path

from vecmill.config import load_settings
from vecmill.engine import engine
from vecmill.serve import run_server


def broken_device_command(model: Path, port: int, then: str) -> list[str]:
    """Serves `model` on `port`; once the device has failed it ends (`exit`) or stays (`stay`)."""
    return [sys.executable, "-m", "tests.serve.broken_device", str(model), str(port), then]


def broken(*args: object, **flags: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def main() -> int:
    """What the command does; the exit code."""
    setattr(engine, "launch", broken)  # noqa: B010 - mypy would have it be what it was
    model, port, then = sys.argv[1:]
    return run_server(load_settings({"embed_model": model, "port": int(port), "exit_on_failure": then == "exit"}))


if __name__ == "__main__":
    sys.exit(main())
