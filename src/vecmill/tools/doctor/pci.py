"""NVIDIA's GPUs on the PCI bus, as Linux lists them: there even without a driver."""

from __future__ import annotations

from pathlib import Path

NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor; first byte of the class


def nvidia_cards(root: Path = Path("/")) -> list[str]:
    """Their bus addresses. `root` is the file system to look at."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # it has just been taken away
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            found.append(device.name)
    return found
