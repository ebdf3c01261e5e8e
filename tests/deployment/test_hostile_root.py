"""deploy.py as root where others are at work: in a mount namespace, /etc, /opt, /var and /run are the test's.

There is no DESTDIR, so that what runs is what runs on a real machine, owners and all.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.test_dry_run import written
from tests.deployment.world import World

FOLDERS = ("etc", "opt", "var", "run")
NAMESPACE = ("unshare", "--mount", "--propagation", "private")
NOBODY, VECMILL = pwd.getpwnam("nobody").pw_uid, 61_999
ONLY_EMBED = ("embed", "--no-tailscale")
ENV, UNIT, KEYS = "etc/vecmill/embed.env", "etc/systemd/system/qmd-embed.service", "etc/vecmill/api-keys"
LOCK = "run/vecmill-deploy.lock"


def _namespaces() -> bool:
    return os.geteuid() == 0 and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _namespaces(), reason="needs root, and mount namespaces")


class Machine(World):
    """As a World, but deploy.py sees it as `/`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in FOLDERS:
            (self.root / name).mkdir(exist_ok=True)
        for name in ("passwd", "group", "nsswitch.conf"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), self.root / "etc" / name)
        for name, line in (("passwd", f"{VECMILL}:{VECMILL}::/:/bin/false"), ("group", f"{VECMILL}:")):
            with (self.root / "etc" / name).open("a") as accounts:
                accounts.write(f"vecmill:x:{line}\n")

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for name, value in super().environment.items() if name != "DESTDIR"}

    def command(self, *options: str) -> list[str]:
        binds = [f"mount --bind {self.root / name} /{name}" for name in FOLDERS]
        shell = " && ".join([*binds, f'PATH={self.environment["PATH"]} exec "$@"'])
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        outer = [str(shutil.which("unshare")), *NAMESPACE[1:], "/usr/bin/env", path, "/bin/sh", "-c", shell, "sh"]
        return [*outer, *super().command(*options)]

    def begin(self) -> subprocess.Popen[str]:
        """A run that hangs in the middle, once it does."""
        self.fail("pip install", hangs=True)
        command = self.command(*ONLY_EMBED, *self._chosen(ONLY_EMBED))
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 30
        while not (self._folder / "hanging").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return process


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def without_lock(snapshot: dict[str, tuple[int, int, str]]) -> dict[str, tuple[int, int, str]]:
    return {name: entry for name, entry in snapshot.items() if name not in (LOCK, "run")}


def test_what_is_written_is_what_the_dry_run_said_byte_for_byte(machine: Machine) -> None:
    said = machine.deploy(*ONLY_EMBED, "--dry-run")
    assert said.returncode == 0, said.stderr
    assert not (machine.root / LOCK).exists()
    done = machine.deploy(*ONLY_EMBED)
    assert done.returncode == 0, done.stderr
    files = written(said.stdout)
    assert {f"/{ENV}", f"/{UNIT}"} <= files.keys()
    for path, content in files.items():
        assert (machine.root / path.lstrip("/")).read_bytes() == content.encode(), path
    for path, mode, owner in re.findall(r"^ +write (\S+) \((\d+)(?: (\S+))?\)", said.stdout, re.M):
        status = (machine.root / path.lstrip("/")).lstat()
        group = VECMILL if owner.endswith(":vecmill") else 0
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, group, int(mode, 8)), path
    found = {f"/{path.relative_to(machine.root)}" for path in (machine.root / "etc").rglob("*") if path.is_file()}
    assert {path for path in found if re.search("vecmill|qmd", path)} == {path for path in files if "/etc/" in path}


@pytest.mark.parametrize(
    "path",
    [
        "etc/vecmill",
        *(pytest.param(path, marks=pytest.mark.nightly) for path in ("opt/vecmill", "opt/vecmill/releases")),
    ],
)
def test_a_folder_of_somebody_else_s_stops_it_before_anything_is_written(machine: Machine, path: str) -> None:
    (machine.root / path).mkdir(parents=True)
    os.chown(machine.root / path, NOBODY, -1)
    before = without_lock(machine.snapshot())
    refused = machine.deploy(*ONLY_EMBED)
    assert refused.returncode == 1
    assert f"/{path} belongs to nobody" in refused.stderr
    assert f"sudo chown root /{path}" in refused.stderr
    assert without_lock(machine.snapshot()) == before


@pytest.mark.parametrize("path", [ENV, pytest.param(UNIT, marks=pytest.mark.nightly)])
def test_a_file_of_somebody_else_s_is_neither_kept_nor_believed(machine: Machine, path: str) -> None:
    file = machine.root / path
    file.parent.mkdir(parents=True)
    file.write_text("PORT=1\nLD_PRELOAD=/tmp/evil.so\n")
    os.chown(file, NOBODY, -1)
    refused = machine.deploy(*ONLY_EMBED)
    assert refused.returncode == 1
    assert f"/{path} belongs to nobody" in refused.stderr


@pytest.mark.nightly
def test_a_folder_that_anybody_may_write_stops_it(machine: Machine) -> None:
    (machine.root / "etc/vecmill").mkdir()
    (machine.root / "etc/vecmill").chmod(0o777)
    refused = machine.deploy(*ONLY_EMBED)
    assert refused.returncode == 1
    assert "sudo chmod go-w /etc/vecmill" in refused.stderr


@pytest.mark.nightly
def test_a_link_of_somebody_else_s_leads_nowhere_and_root_s_own_is_followed(machine: Machine) -> None:
    (machine.root / "var/elsewhere").mkdir()
    link = machine.root / "opt/vecmill"
    link.symlink_to("/var/elsewhere")
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    refused = machine.deploy(*ONLY_EMBED)
    assert refused.returncode == 1
    assert "/opt/vecmill belongs to nobody" in refused.stderr
    assert list((machine.root / "var/elsewhere").iterdir()) == []
    os.chown(link, 0, 0, follow_symlinks=False)
    done = machine.deploy(*ONLY_EMBED)
    assert done.returncode == 0, done.stderr
    assert (machine.root / "var/elsewhere/releases").is_dir()


@pytest.mark.parametrize("kind", [pytest.param("link", marks=pytest.mark.nightly), "pipe"])
def test_what_is_no_file_in_a_file_s_place_is_neither_followed_nor_waited_for(machine: Machine, kind: str) -> None:
    (machine.root / "etc/vecmill").mkdir()
    victim, place = machine.root / "etc/victim", machine.root / ENV
    victim.write_text("precious")
    if kind == "link":
        place.symlink_to("/etc/victim")
    else:
        os.mkfifo(place)
    refused = machine.deploy(*ONLY_EMBED)
    assert refused.returncode == 1
    assert f"/{ENV} is no file" in refused.stderr
    assert victim.read_text() == "precious"


def test_a_second_run_at_the_same_time_changes_nothing(machine: Machine) -> None:
    first = machine.begin()
    try:
        before = machine.snapshot()
        second = machine.deploy(*ONLY_EMBED)
        assert second.returncode == 1
        assert "Another deploy.py is at work" in second.stderr
        assert machine.snapshot() == before
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)
    machine.mend()
    assert machine.deploy(*ONLY_EMBED).returncode == 0


@pytest.mark.nightly
def test_what_a_killed_run_left_half_written_goes(machine: Machine) -> None:
    (machine.root / "etc/vecmill").mkdir()
    half = machine.root / f"etc/vecmill/.embed.env.{'0' * 16}"
    half.write_text("PORT=")
    others = machine.root / "etc/vecmill/.embed.env.swp"
    others.write_text("an editor's")
    assert machine.deploy(*ONLY_EMBED).returncode == 0
    assert not half.exists()
    assert others.exists()
    assert f"PORT={machine.port}\n" in machine.text(ENV)


def test_a_folder_that_is_exchanged_while_it_runs_gets_nothing(machine: Machine) -> None:
    """Between the look and the writing: a link of somebody else's stands where the folder was to be."""
    trap = machine.root / "var/trap"
    trap.mkdir()
    os.chown(trap, NOBODY, -1)
    machine.fail("vecmill version", code=0)
    place = machine.root / "etc/vecmill"
    program = machine._bin / "systemd-link"
    program.write_text(f"#!/bin/sh\nln -s /var/trap {place}\nchown -h {NOBODY} {place}\n")
    program.chmod(0o755)
    (machine._bin / "useradd").unlink()
    (machine._bin / "useradd").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin exec {program}\n")
    (machine._bin / "useradd").chmod(0o755)
    done = machine.deploy(*ONLY_EMBED)
    assert done.returncode == 1, done.stdout
    assert "/etc/vecmill belongs to nobody" in done.stderr
    assert list(trap.iterdir()) == []


def test_a_file_with_the_right_content_gets_the_right_owner(machine: Machine) -> None:
    """An editor that writes a new file gives it the group of whoever edits: that group then reads the keys."""
    assert machine.deploy(*ONLY_EMBED).returncode == 0
    os.chown(machine.root / ENV, 0, pwd.getpwnam("nobody").pw_gid)
    done = machine.deploy(*ONLY_EMBED)
    assert done.returncode == 0, done.stderr
    assert (machine.root / ENV).stat().st_gid == VECMILL
    assert machine.deploy(*ONLY_EMBED).stdout.count("Nothing had to be changed.") == 1


@pytest.mark.parametrize("link", [False, True])
def test_what_is_removed_is_not_reached_by_way_of_somebody_else(machine: Machine, link: bool) -> None:
    """Who owns a folder, or a link, on the way decides what is at its end."""
    assert machine.deploy(*ONLY_EMBED).returncode == 0
    place = machine.root / "opt/vecmill"
    if link:
        place.rename(machine.root / "var/elsewhere")
        place.symlink_to("/var/elsewhere")
    os.chown(place, NOBODY, -1, follow_symlinks=False)
    done = machine.run("embed", "--uninstall", "--no-tailscale")
    assert done.returncode == 1
    assert "/opt/vecmill belongs to nobody" in done.stderr
    assert (machine.root / ("var/elsewhere" if link else "opt/vecmill") / "releases").is_dir()
