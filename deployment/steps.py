"""A deployment is a list of steps, each done wholly or not at all.

A step is a list of actions. An action can be described, carried out and, if it changes a file, taken back.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Protocol

from deployment import console, files
from deployment.console import Failed, tell

CAUSES = (
    (
        r"ensurepip is not available|No module named '?ensurepip",
        "Python lacks its module ensurepip: sudo apt install python3-venv",
    ),
    (r"No space left on device", "The disk is full: df -h shows which, then run this again."),
    (
        r"Temporary failure in name resolution|Could not resolve host|Network is unreachable|NewConnectionError"
        r"|no such host|i/o timeout|TLS handshake timeout",
        "This machine cannot reach the internet (or its DNS): mend that, then run this again.",
    ),
    (
        r"No matching distribution found|requires a different Python",
        "There is no build of a package for this Python: choose 3.12 with --python /usr/bin/python3.12",
    ),
    (
        r"permission denied while trying to connect to the [Dd]ocker|dial unix .*permission denied",
        "This account may not use Docker: sudo usermod -aG docker $USER, then log in again.",
    ),
    (r"Cannot connect to the Docker daemon", "Docker does not run: sudo systemctl start docker"),
    (
        r"unauthorized|denied: requested access|pull access denied",
        "The registry refuses the image: check the name given to --image, or docker login nvcr.io",
    ),
    (r"manifest unknown|manifest for .* not found", "There is no such image: choose another tag with --image"),
    (r"toomanyrequests", "The registry limits how often it is asked: try again in some minutes."),
    (
        r"could not select device driver|unknown or invalid runtime name: nvidia|nvidia-container-cli",
        "Docker has no NVIDIA runtime: sudo nvidia-ctk runtime configure --runtime=docker && "
        "sudo systemctl restart docker",
    ),
    (
        r"must be tagged nodes",
        "Tailscale lets only tagged machines host services: give this one a tag in the admin console (Machines, Edit "
        "ACL tags), and define the services svc:qmd-embed and svc:qmd-vllm there with the endpoint tcp:443.",
    ),
    (
        r"[Aa]ccess denied: serve config denied|[Uu]se 'sudo tailscale",
        "Tailscale takes this from root or its operator only: sudo tailscale set --operator=$USER",
    ),
    (r"Logged out|NeedsLogin|not logged in", "Tailscale is not logged in: sudo tailscale up"),
    (
        r"HTTPS.*(not enabled|disabled|must be enabled)|enable HTTPS",
        "The tailnet has no HTTPS certificates: enable them in the admin console under DNS.",
    ),
    (
        r"flag provided but not defined: -service",
        "This Tailscale is too old for services: sudo tailscale update",
    ),
    (
        r"Failed to connect to (user scope )?bus",
        "There is no systemd of this user: log in with ssh or at the console, not with su or sudo.",
    ),
    (r"is masked", "The unit is masked: systemctl unmask it, then run this again."),
    (
        r"cannot be bound|[Aa]ddress already in use|port is already allocated",
        "Something else uses the port: sudo ss -ltnp shows what; --port (--vllm-port) chooses another.",
    ),
    (
        r"Free memory on device|less than desired GPU memory utilization|No available memory for the cache",
        "vLLM finds too little free memory: lower GPU_MEMORY_UTILIZATION in vllm.env, or stop what else uses it.",
    ),
    (
        r"OutOfMemoryError|out of memory",
        "The memory does not hold the models: choose smaller ones, or lower what else runs (vLLM, Ollama).",
    ),
    (
        r"401 Client Error|GatedRepoError|Access to model .* is restricted",
        "The hub refuses the model: write HF_TOKEN=... of an account that may read it into the service's env file.",
    ),
    (r"no such option|No such option|No such command", "The unit and the installed version do not fit: deploy again."),
)


def likely_cause(output: str) -> str | None:
    """The cause and cure of the first known message in a program's output."""
    return next((sentence for pattern, sentence in CAUSES if re.search(pattern, output)), None)


Undo = Callable[[], None]


class Action(Protocol):
    """One thing to do."""

    def describe(self) -> list[str]:
        """Lines that describe it completely, without secrets."""
        ...

    def apply(self) -> Undo | None:
        """Do it; returns a function that takes it back, if anything can. Raises Failed, OSError."""
        ...


@dataclass(frozen=True)
class Run:
    """A program."""

    argv: tuple[str, ...]
    shown: bool = False
    refusal: str | None = None
    """Output that means a refusal although the exit code is 0."""
    remarks: tuple[tuple[str, str], ...] = ()
    """Pairs: output to look for, and the remark for the user."""

    def describe(self) -> list[str]:
        return [f"$ {shlex.join(self.argv)}"]

    def apply(self) -> Undo | None:
        output = tell(self.argv, self.shown)
        if self.refusal and self.refusal in output:
            raise Failed("exit code 0, but it refused", output)
        console.detail(remark for sign, remark in self.remarks if sign in output)
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
        shown = [line.rstrip("\r\n") for line in files.LINES.findall(self.content)]
        lines = [f"{len(shown)} lines, not shown"] if self.secret else [files.conceal(line) for line in shown]
        return [f"write {self.path} ({rights})", *(f"  | {line}" for line in lines)]

    def apply(self) -> Undo | None:
        before = files.Before.of(self.path)
        files.write(self.path, files.encoded(self.content), self.mode, self.owner_ids())
        return before.restore

    def owner_ids(self) -> tuple[int, int] | None:
        """Of the file; None: whoever runs this. Raises Failed where there is no such account."""
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
        files.make_folder(self.path, 0o700)
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
class RemoveEmpty:
    """A folder, unless something is in it: what other actions leave there is somebody else's."""

    path: Path

    def describe(self) -> list[str]:
        return [f"remove {self.path}, if nothing else is in it"]

    def apply(self) -> Undo | None:
        files.remove_empty(self.path)
        return None


@dataclass(frozen=True)
class Scratch:
    """A fresh folder for what follows in the step; it goes again if the step fails."""

    path: Path

    def describe(self) -> list[str]:
        return [f"fresh folder {self.path}"]

    def apply(self) -> Undo | None:
        files.remove(self.path)
        files.make_folder(self.path, 0o755)
        return lambda: files.remove(self.path)


def same(action: WriteFile | Link) -> bool:
    """Whether the disk already has the same content, with the same rights."""
    if isinstance(action, Link):
        return action.path.is_symlink() and os.readlink(action.path) == str(action.target)
    if files.text(action.path) != action.content:
        return False
    try:
        owner = action.owner_ids()
    except Failed:  # its account is made by an earlier step
        return False
    status = action.path.stat()
    return stat.S_IMODE(status.st_mode) == action.mode and owner in (None, (status.st_uid, status.st_gid))


INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """Actions that are done together or not at all."""

    title: str
    actions: tuple[Action, ...]
    undo: str
    """How the user undoes it, as a sentence or a command."""
    done: str = "nothing to do"
    """Why there is nothing to do, where there is not."""
    restores: bool = True
    """Whether a failure puts back the files that it changed."""
    recovery: tuple[Run, ...] = ()
    """What then lets that which ran before run again."""


def show(steps: Sequence[Step]) -> None:
    """Print every command and every file; do nothing."""
    for number, step in enumerate(steps, 1):
        console.say(_heading(number, steps, step, "" if step.actions else f": {step.done}"))
        for action in step.actions:
            console.detail(action.describe())
    console.say("Nothing was done (--dry-run).")


def carry_out(steps: Sequence[Step], keep_going: bool = False) -> int:
    """Do them; the exit code: 0, 1 where a step failed, 130 where somebody interrupted.

    `keep_going`: a step that fails does not keep the later ones from being tried.
    """
    code = 0
    for number, step in enumerate(steps, 1):
        if not step.actions:
            console.say(_heading(number, steps, step, f": {step.done}"))
            continue
        console.say(_heading(number, steps, step))
        started = monotonic()
        outcome = _carry_out(step)
        if outcome == INTERRUPTED or (outcome != 0 and not keep_going):
            return outcome
        if outcome == 0:
            console.detail([f"done in {console.duration(monotonic() - started)}"])
        code = max(code, outcome)
    return code


def _heading(number: int, steps: Sequence[Step], step: Step, end: str = "") -> str:
    return f"[{number}/{len(steps)}] {step.title}{end}"


def _carry_out(step: Step) -> int:
    undo: list[Undo] = []
    for action in step.actions:
        try:
            # Contents of files are for --dry-run.
            console.detail(action.describe()[:1])
            taken_back = action.apply()
        except (Failed, OSError) as error:
            _take_back(step, undo)
            _report(step, action, error)
            return 1
        except KeyboardInterrupt:
            _take_back(step, undo)
            console.complain(f"Interrupted in the step {step.title!r}, at: {action.describe()[0]}")
            _advise(step)
            return INTERRUPTED
        if taken_back is not None:
            undo.append(taken_back)
    return 0


def _take_back(step: Step, undo: Sequence[Undo]) -> None:
    """A second Ctrl-C must not leave half of it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for taken_back in reversed(undo if step.restores else ()):
            try:
                taken_back()
            except OSError as error:
                console.complain(f"Not put back: {error}")
        for run in step.recovery:
            console.detail(["back to what was before:", *run.describe()])
            with suppress(Failed, OSError):
                run.apply()
    finally:
        signal.signal(signal.SIGINT, before)


def _report(step: Step, action: Action, error: Failed | OSError) -> None:
    output = error.output if isinstance(error, Failed) else ""
    named = isinstance(error, OSError) and error.strerror and error.filename
    what = f"{error.strerror}: {error.filename}" if named and isinstance(error, OSError) else str(error)
    console.complain(f"The step {step.title!r} failed at: {action.describe()[0]}")
    console.complain(f"  {what}")
    for line in output.splitlines():
        console.complain(f"  | {line}")
    if cause := likely_cause(f"{output}\n{what}"):
        console.complain(f"Why: {cause}")
    _advise(step)


def _advise(step: Step) -> None:
    if step.recovery:
        console.complain("What ran before was put back.")
    console.complain("Running the same command again goes on from here.")
    console.complain(f"Undo: {step.undo}")
