"""What a step is made of. Each can be described, carried out, and, where it changes a file, taken back."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deployment import console, files
from deployment.commands import Failed, tell
from deployment.env_file import conceal

Undo = Callable[[], None]


class Action(Protocol):
    """One thing to do."""

    def describe(self) -> list[str]:
        """The lines that say all of it, without a secret."""
        ...

    def apply(self) -> Undo | None:
        """Do it; what takes it back, if anything can. `Failed`, OSError."""
        ...


@dataclass(frozen=True)
class Run:
    """A program."""

    argv: tuple[str, ...]
    shown: bool = False
    refusal: str | None = None
    """What it says, with exit code 0, when it did not do it."""
    remarks: tuple[tuple[str, str], ...] = ()
    """What it may say, and what that means for the user."""

    def describe(self) -> list[str]:
        return [f"$ {shlex.join(self.argv)}"]

    def apply(self) -> Undo | None:
        said = tell(self.argv, self.shown)
        if self.refusal and self.refusal in said:
            raise Failed("exit code 0, but it refused", said)
        console.detail(remark for sign, remark in self.remarks if sign in said)
        return None


@dataclass(frozen=True)
class WriteFile:
    """A file with its full content."""

    path: Path
    content: str
    mode: int = 0o644
    owner: str | None = None
    """`user:group`; None: whoever runs this."""
    secret: bool = False
    staged: bool = field(default=False, repr=False)

    def describe(self) -> list[str]:
        rights = f"{self.mode:04o}{f' {self.owner}' if self.owner else ''}"
        shown = self.content.splitlines()
        lines = [f"{len(shown)} lines, not shown"] if self.secret else [conceal(line) for line in shown]
        return [f"write {self.path} ({rights})", *(f"  | {line}" for line in lines)]

    def apply(self) -> Undo | None:
        before = files.Before.of(self.path)
        files.write(self.path, self.content.encode(), self.mode, self._owner())
        return before.restore

    def _owner(self) -> tuple[int, int] | None:
        if self.owner is None or self.staged:
            return None
        user, _, group = self.owner.partition(":")
        try:
            return files.account(user, group)
        except KeyError as error:
            raise Failed(f"{self.path}: no such account ({error})") from None


@dataclass(frozen=True)
class Link:
    """A symbolic link, replaced in one step."""

    path: Path
    target: Path

    def describe(self) -> list[str]:
        return [f"link {self.path} -> {self.target}"]

    def apply(self) -> Undo | None:
        before = files.Before.of(self.path)
        files.link(self.path, self.target)
        return before.restore


@dataclass(frozen=True)
class MakeFolder:
    """A folder that nobody else may look into."""

    path: Path

    def describe(self) -> list[str]:
        return [f"folder {self.path} (0700)"]

    def apply(self) -> Undo | None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return None


@dataclass(frozen=True)
class Remove:
    """A file, a link or a folder with all that is in it."""

    path: Path

    def describe(self) -> list[str]:
        return [f"remove {self.path}"]

    def apply(self) -> Undo | None:
        files.remove(self.path)
        return None


@dataclass(frozen=True)
class Scratch:
    """A fresh folder for what follows in the step; it goes again if the step fails."""

    path: Path

    def describe(self) -> list[str]:
        return [f"fresh folder {self.path}"]

    def apply(self) -> Undo | None:
        files.remove(self.path)
        self.path.mkdir(mode=0o755, parents=True)
        return lambda: shutil.rmtree(self.path, ignore_errors=True)


def same(action: WriteFile | Link) -> bool:
    """Whether the disk already has it."""
    if isinstance(action, Link):
        return action.path.is_symlink() and os.readlink(action.path) == str(action.target)
    return files.text(action.path) == action.content and files.mode(action.path) == action.mode
