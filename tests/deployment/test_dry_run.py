"""`--dry-run` says all that would be done, and does none of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.deployment.world import World


def commands(text: str) -> list[str]:
    return re.findall(r"^ +\$ (.*)$", text, re.M)


def written(text: str) -> dict[str, str]:
    """Files by path, with their content, out of what a dry run prints."""
    blocks = re.findall(r"^ +write (\S+) \(.*\)\n((?: +\|.*\n)*)", text, re.M)
    return {path: re.sub(r"^ +\| ?", "", content, flags=re.M) for path, content in blocks}


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--user",), marks=pytest.mark.nightly),
        pytest.param(("--no-tailscale", "--no-vllm"), marks=pytest.mark.nightly),
    ],
)
def test_it_touches_nothing_and_says_what_a_run_does(world: World, options: tuple[str, ...]) -> None:
    world.set(operator=world.account)
    before = world.snapshot()
    dry_run = world.deploy(*options, "--dry-run")
    assert dry_run.returncode == 0, dry_run.stderr
    assert "Nothing was done (--dry-run)." in dry_run.stdout
    assert world.snapshot() == before
    assert world.changes() == []

    done = world.deploy(*options)
    assert done.returncode == 0, done.stderr
    assert commands(dry_run.stdout) == commands(done.stdout)
    assert commands(dry_run.stdout) == world.changes()
    for path, content in written(dry_run.stdout).items():
        assert Path(path).read_text() == content
    planned_files, files = written(dry_run.stdout), {path for path in world.root.rglob("*") if path.is_file()}
    assert {str(path) for path in files if path.suffix in (".env", ".service")} <= set(planned_files)


def test_a_deployment_that_is_there_has_an_empty_plan(deployed: World) -> None:
    dry_run = deployed.deploy("--dry-run")
    assert commands(dry_run.stdout) == []
    assert written(dry_run.stdout) == {}


@pytest.mark.nightly
def test_uninstall_restart_and_stop_can_be_tried_too(deployed: World) -> None:
    for options in (("--restart",), ("--stop",), ("--uninstall", "--purge")):
        before = deployed.snapshot()
        dry_run = deployed.run(*options, "--dry-run")
        assert dry_run.returncode == 0
        assert deployed.changes() == []
        assert deployed.snapshot() == before
        assert deployed.run(*options).returncode == 0
        assert commands(dry_run.stdout) == deployed.changes()


def test_secrets_are_not_in_it(deployed: World, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame-number-1\n")
    with (deployed.root / "etc/vecmill/embed.env").open("a") as settings:
        settings.write("HF_TOKEN=hf_tahini\nADMIN_API_KEY='tahini'\nREDIS_URL=redis://:tahini@host\n")
    printed = deployed.deploy("--api-key-file", str(keys), "--dry-run").stdout
    assert "HF_TOKEN=(not shown)" in printed
    assert "API_KEY_FILE=/etc/vecmill/api-keys" in printed
    assert "1 lines, not shown" in printed
    assert "sesame" not in printed
    assert "tahini" not in printed


def test_it_needs_no_root_but_the_deployment_does(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(world.clone, Path(folder, "clone"), symlinks=False)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        command = [_readable_python(), str(Path(folder, "clone/deploy.py")), "--no-tailscale", "--no-vllm"]
        nobody = 65534 if os.geteuid() == 0 else None
        runs = [
            subprocess.run(
                [*command, *more],
                env={"PATH": "/nowhere", "HOME": "/nowhere"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                user=nobody,
                group=nobody,
                extra_groups=None if nobody is None else [],
            )
            for more in (["--dry-run"], [], ["--stop"], ["--uninstall"], ["--user"])
        ]
    assert "/etc/systemd/system/qmd-embed.service" in runs[0].stdout
    assert "It needs root: sudo python3 deploy.py" in runs[1].stderr
    assert [done.returncode for done in runs[1:]] == [1, 1, 1, 1]
    assert "to mend first" in runs[4].stderr  # without XDG_RUNTIME_DIR it has no lock
    assert "Traceback" not in "".join(done.stderr for done in runs)


def _readable_python() -> str:
    """This Python, or the system's where others may not read this one."""
    for python in (Path(sys.executable), Path(sys.executable).resolve()):
        if all(parent.stat().st_mode & 0o001 for parent in (*python.parents, *python.resolve().parents)):
            return str(python)
    return "/usr/bin/python3"
