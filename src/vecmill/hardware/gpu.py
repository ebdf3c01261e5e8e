"""Whether there is an NVIDIA GPU, found without torch: the point is to notice when torch cannot see it."""

from __future__ import annotations

from pathlib import Path


def nvidia_gpu_present(root: Path = Path("/")) -> bool:
    """True where the NVIDIA kernel driver has a GPU (Linux). `root` is the file system to look at."""
    return any((root / "proc/driver/nvidia/gpus").glob("*")) or any((root / "dev").glob("nvidia[0-9]*"))
