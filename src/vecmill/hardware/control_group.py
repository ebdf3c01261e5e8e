"""What the control groups of this process let it have of the memory: systemd's `MemoryMax=`, a container's limit.

A limit holds for all below it, so those of the groups above count too. Of version 2 and of version 1.
Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current) and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.limit_in_bytes, memory.usage_in_bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

LOOK_SECONDS = 10.0  # between two looks at which groups have a limit; `systemctl set-property` changes one
# Version 1 writes "no limit" as the largest multiple of a page: more than any machine has.
UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class _Version:
    """What a version of control groups calls its files."""

    limit: str
    usage: str
    inactive: str
    """File cache that nobody has used lately, in memory.stat, with what is below."""


V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = _Version("memory.max", "memory.current", "inactive_file")


class ControlGroups:
    """The groups of this process from its own up to the highest one that it sees. For any thread."""

    def __init__(self, mounted: Path, own: Path) -> None:
        """`mounted`: where the kernel shows the groups; `own`: where it says which are this process's."""
        self._groups = _groups(mounted, own)
        self._limited: list[tuple[Path, _Version]] = []
        self._looked_at: float | None = None

    def limit(self) -> int | None:
        """Bytes that the strictest group allows; None where none limits."""
        self._look()
        return min((limit for group, version in self._limited if (limit := _limit(group, version))), default=None)

    def left(self) -> int | None:
        """Bytes that can still be had, whichever group is the fullest; None where none limits."""
        if self._looked_at is None or monotonic() - self._looked_at > LOOK_SECONDS:
            self._look()
        return min(
            (
                limit - _held(group, version)
                for group, version in self._limited
                if (limit := _limit(group, version)) is not None
            ),
            default=None,
        )

    def _look(self) -> None:
        self._limited = [one for one in self._groups if _limit(*one) is not None]
        self._looked_at = monotonic()


def _groups(mounted: Path, own: Path) -> list[tuple[Path, _Version]]:
    """Of lines `hierarchy:controllers:path`; version 2's has no controllers."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    found = [*_upwards(mounted, "/", V2), *_upwards(mounted / "memory", "/", V1)]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            found += _upwards(mounted, path, V2)
        elif "memory" in controllers.split(","):
            found += _upwards(mounted / "memory", path, V1)
    return list(dict.fromkeys(found))


def _upwards(mounted: Path, path: str, version: _Version) -> list[tuple[Path, _Version]]:
    """A group and those above it. A container may see another part of the tree than the path is from."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    return [(mounted.joinpath(*parts[:count]), version) for count in range(len(parts), -1, -1)]


def _limit(group: Path, version: _Version) -> int | None:
    limit = _number(group / version.limit)
    return limit if limit is not None and limit < UNLIMITED else None


def _held(group: Path, version: _Version) -> int:
    """Bytes that count against the limit; what is inactive is given up before anything is refused."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        inactive = int(stat.get(version.inactive, 0))
    except (OSError, ValueError):
        inactive = 0
    return (_number(group / version.usage) or 0) - inactive


def _number(file: Path) -> int | None:
    try:
        said = file.read_text().strip()
    except (OSError, ValueError):
        return None
    return int(said) if said.isdecimal() else None
