"""NVML without a GPU: a shared library that answers as a recorded card did, under the real nvidia-ml-py."""

from __future__ import annotations

import subprocess
from ctypes import CDLL
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

HERE = Path(__file__).parent
LIBRARY = "libnvidia-ml.so.1"
GB10, H100 = HERE / "gb10.txt", HERE / "h100.txt"


@cache
def library_folder() -> Path:
    """A folder with libnvidia-ml.so.1, compiled once in a process."""
    folder = Path(mkdtemp(prefix="fake-nvml-"))
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY), str(HERE / "nvml.c")]
    subprocess.run(command, check=True)
    return folder


def load() -> None:
    """For this process: NVML is found by its name from now on, and has no driver unless FAKE_NVML names a recording."""
    CDLL(str(library_folder() / LIBRARY))


def environment(recording: Path) -> dict[str, str]:
    """What a process needs in its environment to see the recorded card; it is `python -m tests.hardware.fake_nvml`."""
    return {"FAKE_NVML_LIBRARY": str(library_folder() / LIBRARY), "FAKE_NVML": str(recording)}
