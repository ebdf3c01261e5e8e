"""Writes files atomically, and edits env files without losing what administrators wrote."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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


class Distrusted(OSError):
    """Somebody else could move or change what root writes there; the message names who, and the cure."""


strict = False
"""Whether only root may own, or write to, the folders that lead to a file: for root, on the machine itself."""
MOST_LINKS = 20
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _trust(path: Path, status: os.stat_result) -> None:
    """Raises Distrusted."""
    if not strict:
        return
    shared = status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
    if status.st_uid != 0:
        owner = _name(status.st_uid)
        raise Distrusted(f"{path} belongs to {owner}, who could exchange what is in it: sudo chown root {path}")
    if shared and not stat.S_ISLNK(status.st_mode):
        raise Distrusted(f"Others than root may write to {path}: sudo chmod go-w {path}")


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the account {uid}"


def open_folder(path: Path, *, make: bool = True, links: int = 0) -> int:
    """A descriptor of a folder, made if need be: whatever is renamed meanwhile, what is written by it lands there.

    Each folder above it is opened by the one before, and only links of root's own are followed.

    Raises:
        Distrusted, OSError.
    """
    handle = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    parts = path.absolute().parts[1:]
    try:
        for number, part in enumerate(parts):
            here = Path("/", *parts[: number + 1])
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=handle)
            status = os.stat(part, dir_fd=handle, follow_symlinks=False)
            _trust(here, status)
            if stat.S_ISLNK(status.st_mode):
                if links >= MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(here))
                target = here.parent / os.readlink(part, dir_fd=handle)
                rest = Path(os.path.normpath(target), *parts[number + 1 :])
                os.close(handle)
                handle = -1
                return open_folder(rest, make=make, links=links + 1)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
            os.close(handle)
            handle = inner
            _trust(here, os.fstat(handle))
    except BaseException:
        if handle >= 0:
            os.close(handle)
        raise
    return handle


def distrusted(path: Path) -> str | None:
    """Why root must not write a file there, or trust the one that is there; None where it may."""
    try:
        folder = open_folder(path.parent, make=False)
    except Distrusted as error:
        return str(error)
    except OSError:
        return None  # not there yet
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        _trust(path, status)
        if strict and not stat.S_ISREG(status.st_mode):
            return f"{path} is no file: move it away"
    except Distrusted as error:
        return str(error)
    except OSError:
        return None
    finally:
        os.close(folder)
    return None


def write(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """Atomically replace `path` by a file that has its rights from the start. Raises OSError."""
    folder = open_folder(path.parent)
    name = f".{path.name}.{secrets.token_hex(8)}"
    try:
        _sweep(folder, path.name)
        handle = os.open(name, CREATE, 0o600, dir_fd=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if owner is not None and os.geteuid() == 0:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def _sweep(folder: int, name: str) -> None:
    """What a run that was killed has left of this file: only one runs at a time."""
    left = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}")
    for entry in os.listdir(folder):
        if left.fullmatch(entry):
            with suppress(OSError):
                os.unlink(entry, dir_fd=folder)


def link(path: Path, target: Path) -> None:
    """Atomically make `path` a link to `target`."""
    folder = open_folder(path.parent)
    name = f".{path.name}.{secrets.token_hex(8)}"
    try:
        _sweep(folder, path.name)
        os.symlink(target, name, dir_fd=folder)
        try:
            os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(name, dir_fd=folder)
            raise
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Whether no other run has this lock; it goes with the process, however that ends. Raises OSError."""
    folder = open_folder(path.parent)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path.name, flags, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    with os.fdopen(handle, "rb+"):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _beside(path: Path) -> Iterator[int | None]:
    """A descriptor of the folder that a path is in; None where there is none. Raises Distrusted, OSError."""
    try:
        folder = open_folder(path.parent, make=False)
    except FileNotFoundError:
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if there is one. Raises Distrusted, OSError."""
    with _beside(path) as folder, suppress(FileNotFoundError):
        if folder is None:
            return
        _sweep(folder, path.name)
        if stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, dir_fd=folder)
        else:
            os.unlink(path.name, dir_fd=folder)


def remove_empty(path: Path) -> None:
    """Remove a folder, if there is one and nothing is in it. Raises Distrusted, OSError."""
    with _beside(path) as folder, suppress(FileNotFoundError):
        if folder is None:
            return
        try:
            os.rmdir(path.name, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def make_folder(path: Path, mode: int) -> None:
    """Make a folder with these rights, unless it is there, and those above it. Raises Distrusted, OSError."""
    folder = open_folder(path.parent)
    try:
        with suppress(FileExistsError):
            os.mkdir(path.name, mode, dir_fd=folder)
    finally:
        os.close(folder)


def read(path: Path) -> bytes | None:
    """The content of a file; None if there is none, it is a pipe or a device, or this account may not read it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(handle).st_mode) else None


def text(path: Path) -> str | None:
    """The content of a file as text, from which `encoded` makes the same bytes; None as in `read`."""
    content = read(path)
    return None if content is None else content.decode("utf-8", "surrogateescape")


def encoded(content: str) -> bytes:
    """The bytes of a text, also of one that `text` has read and that is no UTF-8."""
    return content.encode("utf-8", "surrogateescape")


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


# As systemd and the server see them; other line breaks of Unicode are characters like any.
LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=(.*)")


def settings(text: str) -> dict[str, str]:
    """Names and values of an env file, without quotes and comments."""
    values = {}
    for line in LINES.findall(text):
        if match := LINE.match(line.rstrip("\r\n")):
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
    for line in LINES.findall(content):
        text = line.rstrip("\r\n")
        end = line[len(text) :] or "\n"
        match = LINE.match(text)
        name = match[1] if match else ""
        if name in changes and present[name] != changes[name]:
            text = f"{name}={changes[name]}"
        lines.append(text + end)
    lines += [f"{name}={value}\n" for name, value in {**additions, **changes}.items() if name not in present]
    return "".join(lines)


SECRETS = (
    # Also in a comment, a unit's Environment=, and after an option; not where it ends with dots, as of an example.
    re.compile(r"([\w-]*(?:KEY|TOKEN|SECRET|PASSWORD|HEADERS)|REDIS_URL)\s*=\s*(?=\S)(?!\S*\.{3}(?:\s|$))", re.I),
    re.compile(r"(--[\w-]*(?:key|token|secret|password))\s+(?=\S)", re.I),
    re.compile(r"(\w+://)[^/\s]*@"),
)


def conceal(line: str) -> str:
    """A line of an env file or a unit up to the first value of a key, a token or a password."""
    for secret in SECRETS:
        if match := secret.search(line):
            return f"{line[: match.end(1)]}=(not shown)"
    return line
