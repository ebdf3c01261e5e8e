"""Writes files atomically, and edits env files without losing what administrators wrote."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Before:
    """What was at a path before it was changed: a file's bytes and rights, a link's target, or nothing."""

    path: Path
    content: bytes | None = None
    target: str | None = None
    mode: int = 0
    owner: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, path: Path) -> Before:
        if path.is_symlink():
            return cls(path, target=os.readlink(path))
        if not path.is_file():
            return cls(path)
        status = path.stat()
        return cls(path, path.read_bytes(), None, status.st_mode & 0o7777, (status.st_uid, status.st_gid))

    def restore(self) -> None:
        """Restore the path."""
        if self.target is not None:
            link(self.path, Path(self.target))
        elif self.content is not None:
            write(self.path, self.content, self.mode, self.owner)
        else:
            self.path.unlink(missing_ok=True)


def write(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """Atomically replace `path` by a file that has its rights from the start. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            if owner is not None and os.geteuid() == 0:
                os.fchown(file.fileno(), *owner)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def link(path: Path, target: Path) -> None:
    """Atomically make `path` a link to `target`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read(path: Path) -> bytes | None:
    """The content of a file; None if there is none, or this account may not read it."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def text(path: Path) -> str | None:
    """The content of a file as text; None as in `read`."""
    content = read(path)
    return None if content is None else content.decode("utf-8", "replace")


def exists(path: Path) -> bool:
    """Whether something is there; true if this account may not look."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def bytes_free(path: Path) -> int:
    """Free bytes of the file system that `path` will be on."""
    while True:
        try:
            return shutil.disk_usage(path).free
        except OSError:  # not there yet, or hidden from this account
            path = path.parent


def mode(path: Path) -> int:
    """A file's permission bits."""
    return path.stat().st_mode & 0o7777


def account(user: str, group: str) -> tuple[int, int]:
    """The ids of a user and a group. Raises KeyError."""
    return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid


LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=(.*)")


def settings(text: str) -> dict[str, str]:
    """Names and values of an env file, without quotes and comments."""
    values = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            values[match[1]] = _value(match[2].strip())
    return values


def _value(raw: str) -> str:
    if raw[:1] in ("'", '"'):
        return raw[1:].partition(raw[0])[0]
    return re.split(r"\s+#", raw, maxsplit=1)[0].strip() if not raw.startswith("#") else ""


def merged(content: str, changes: Mapping[str, str], additions: Mapping[str, str]) -> str:
    """An env file with `changes` set, and `additions` set where the file has no value for them.

    Every other line stays as it is.
    """
    present = settings(content)
    lines = []
    for line in content.splitlines():
        match = LINE.match(line)
        name = match[1] if match else ""
        if name in changes and present[name] != changes[name]:
            line = f"{name}={changes[name]}"
        lines.append(line)
    lines += [f"{name}={value}" for name, value in {**additions, **changes}.items() if name not in present]
    return "\n".join(lines) + "\n" if lines else ""


SECRET = re.compile(r"\s*(?:export\s+)?(\w*(?:KEY|TOKEN|SECRET|PASSWORD)|REDIS_URL)\s*=\s*\S")


def conceal(line: str) -> str:
    """A line of an env file without the value of a key or token."""
    match = SECRET.match(line)
    return f"{match[1]}=(not shown)" if match else line
