"""The units as systemd itself sees them: the real `systemd-analyze`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deployment.world import World

# systemd's own measure, 0 (confined) to 10: it came to 1.5 with systemd 252.
MOST_EXPOSED = 2.0


@pytest.fixture
def units(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The units as deploy.py writes them, with programs that are there: systemd looks whether they are."""
    options = ["--user", "--no-tailscale"] if request.param == "user" else ["--no-tailscale"]
    assert world.deploy(*options, "--wait", "0").returncode == 0
    folder = tmp_path / "units"
    folder.mkdir()
    for path in world.root.rglob("qmd-*.service"):
        if path.is_file() and not path.is_symlink():
            text = re.sub(r"/\S*/venv/bin/vecmill|/\S*/docker\b", "/bin/true", path.read_text())
            (folder / path.name).write_text(text)
    (folder / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    return folder


def analyze(*words: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime), "HOME": str(runtime)},
    )


@pytest.mark.parametrize(("units", "scope"), [("system", "--system"), ("user", "--user")], indirect=["units"])
def test_systemd_finds_nothing_to_complain_about(units: Path, scope: str) -> None:
    services = [str(units / name) for name in ("qmd-embed.service", "qmd-vllm.service")]
    result = analyze(scope, "verify", "--man=no", *services, runtime=units)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0


@pytest.mark.parametrize("units", ["system"], indirect=True)
def test_the_embedder_is_confined(units: Path) -> None:
    limit = str(round(MOST_EXPOSED * 10))
    unit = str(units / "qmd-embed.service")
    result = analyze("security", "--offline=true", f"--threshold={limit}", "--no-pager", unit, runtime=units)
    overall = re.search(r"Overall exposure level for qmd-embed.service: ([\d.]+)", result.stdout)
    assert overall, result.stderr
    assert float(overall[1]) < MOST_EXPOSED
    assert result.returncode == 0


@pytest.mark.parametrize("units", ["system"], indirect=True)
def test_what_the_embedder_relies_on(units: Path) -> None:
    lines = (units / "qmd-embed.service").read_text().splitlines()
    for line in ("Type=notify", "WatchdogSec=60", "Restart=on-failure", "User=vecmill", "StateDirectory=vecmill"):
        assert line in lines
    gate = "/bin/true doctor --only memory --wait 120 --env-file /etc/vecmill/embed.env"
    assert f"ExecStartPre=/bin/sh -c '{gate}; test $$? -ne 1'" in lines
    # CUDA needs these left open.
    for name in ("MemoryDenyWriteExecute=", "PrivateDevices=", "ProcSubset="):
        assert not any(line.startswith(name) for line in lines)
