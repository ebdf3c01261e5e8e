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
    found = re.findall(r"^ +write (\S+) \(.*\)\n((?: +\|.*\n)*)", text, re.M)
    return {path: re.sub(r"^ +\| ?", "", content, flags=re.M) for path, content in found}


@pytest.mark.parametrize("options", [(), ("--user",), ("--no-tailscale", "--no-vllm")])
def test_it_touches_nothing_and_says_what_a_run_does(world: World, options: tuple[str, ...]) -> None:
    world.set(operator=world.account)
    before = world.snapshot()
    told = world.deploy(*options, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "Nothing was done (--dry-run)." in told.stdout
    assert world.snapshot() == before
    assert world.changes() == []

    done = world.deploy(*options)
    assert done.returncode == 0, done.stderr
    assert commands(told.stdout) == commands(done.stdout)
    assert commands(told.stdout) == world.changes()
    for path, content in written(told.stdout).items():
        assert Path(path).read_text() == content
    told_files, found = written(told.stdout), {path for path in world.root.rglob("*") if path.is_file()}
    assert {str(path) for path in found if path.suffix in (".env", ".service")} <= set(told_files)


def test_a_deployment_that_is_there_has_an_empty_plan(deployed: World) -> None:
    told = deployed.deploy("--dry-run")
    assert commands(told.stdout) == []
    assert written(told.stdout) == {}


def test_uninstall_restart_and_stop_can_be_tried_too(deployed: World) -> None:
    for options in (("--restart",), ("--stop",), ("--uninstall", "--purge")):
        before = deployed.snapshot()
        told = deployed.run(*options, "--dry-run")
        assert told.returncode == 0
        assert deployed.changes() == []
        assert deployed.snapshot() == before
        assert deployed.run(*options).returncode == 0
        assert commands(told.stdout) == deployed.changes()


def test_secrets_are_not_in_it(deployed: World, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame-number-1\n")
    with (deployed.root / "etc/vecmill/embed.env").open("a") as settings:
        settings.write("HF_TOKEN=hf_tahini\nADMIN_API_KEY='tahini'\nREDIS_URL=redis://:tahini@host\n")
    told = deployed.deploy("--api-key-file", str(keys), "--dry-run").stdout
    assert "HF_TOKEN=(not shown)" in told
    assert "API_KEY_FILE=/etc/vecmill/api-keys" in told
    assert "1 lines, not shown" in told
    assert "sesame" not in told
    assert "tahini" not in told


def test_it_needs_no_root_but_the_deployment_does(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(world.clone, Path(folder, "clone"), symlinks=False)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        command = [_readable_python(), str(Path(folder, "clone/deploy.py")), "--no-tailscale", "--no-vllm"]
        nobody = 65534 if os.geteuid() == 0 else None
        found = [
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
            for more in (["--dry-run"], [], ["--stop"], ["--uninstall"])
        ]
    assert "/etc/systemd/system/qmd-embed.service" in found[0].stdout
    assert "It needs root: sudo python3 deploy.py" in found[1].stderr
    assert [done.returncode for done in found[1:]] == [1, 1, 1]
    assert "Traceback" not in "".join(done.stderr for done in found)


def _readable_python() -> str:
    """This Python, or the system's where others may not read this one."""
    for python in (Path(sys.executable), Path(sys.executable).resolve()):
        if all(parent.stat().st_mode & 0o001 for parent in (*python.parents, *python.resolve().parents)):
            return str(python)
    return "/usr/bin/python3"
