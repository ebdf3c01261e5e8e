"""The command that installs a package beside vecmill."""

from __future__ import annotations

import shlex
import sys
from importlib.machinery import PathFinder


def install(*arguments: str) -> str:
    """For the installer that this Python has; environments that uv makes have no pip."""
    # Not find_spec: setuptools watches for a search for pip, and then takes its replacement of distutils away.
    if PathFinder.find_spec("pip") is None:
        words = ["uv", "pip", "install", "--python", sys.executable]
        arguments = tuple("--reinstall" if argument == "--force-reinstall" else argument for argument in arguments)
    else:
        words = [sys.executable, "-m", "pip", "install"]
    return shlex.join([*words, *arguments])
