"""Whatever fails: which step, which command, why, the cure; nothing half done, and what ran before runs on."""

from __future__ import annotations

import pytest

from tests.deployment.world import World

NEVER = 1_000_000
STEPS = [
    ("useradd", "Account vecmill"),
    ("-m venv", "Install vecmill"),
    ("pip install", "Install vecmill"),
    ("vecmill version", "Install vecmill"),
    ("docker pull", "Fetch the image"),
    ("systemctl daemon-reload", "Start qmd-embed.service"),
    ("systemctl enable qmd-embed", "Start qmd-embed.service"),
    ("systemctl restart --no-block qmd-embed", "Start qmd-embed.service"),
    ("systemctl enable qmd-vllm", "Start qmd-vllm.service"),
    ("systemctl restart --no-block qmd-vllm", "Start qmd-vllm.service"),
    ("--service=svc:qmd-embed", "Serve https://qmd-embed"),
    ("--service=svc:qmd-vllm", "Serve https://qmd-vllm"),
]


def half_written(world: World) -> list[str]:
    """Temporary files, and releases that are not complete."""
    releases = world.root / "opt/vecmill/releases"
    unfinished = [path for path in releases.glob("*") if not (path / "complete").exists()]
    hidden = [path for path in world.root.rglob(".*") if path.is_file() or path.is_symlink()]
    return [str(path) for path in (*unfinished, *hidden)]


AT_NIGHT = [
    pytest.param(at, marks=pytest.mark.nightly) for at in ("pip install", "systemctl restart --no-block qmd-embed")
]


# One of each kind: what the account, the code, the image, a unit and an address need.
BY_DAY = ("useradd", "pip install", "docker pull", "systemctl restart --no-block qmd-vllm", "--service=svc:qmd-embed")


@pytest.mark.parametrize(
    ("at", "title"),
    [pytest.param(*step, marks=() if step[0] in BY_DAY else pytest.mark.nightly) for step in STEPS],
)
def test_a_step_that_fails_says_which_and_leaves_nothing_half_done(world: World, at: str, title: str) -> None:
    world.fail(at, code=7, stderr="the disk ate it\n")
    failed = world.deploy("--wait", "0")
    assert failed.returncode == 1
    assert f"The step '{title}" in failed.stderr
    assert "failed at: $ " in failed.stderr
    assert at in failed.stderr
    assert "exit code 7" in failed.stderr
    assert "| the disk ate it" in failed.stderr
    assert "Undo: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert half_written(world) == []


@pytest.mark.parametrize("at", [*AT_NIGHT, "--service=svc:qmd-vllm"])
def test_the_next_run_goes_on_from_there(world: World, at: str) -> None:
    world.fail(at)
    assert world.deploy("--wait", "0").returncode == 1
    done = {call for call in world.changes() if at not in call and not call.startswith("systemctl")}
    world.mend()
    assert world.deploy("--wait", "0").returncode == 0
    again = set(world.changes())
    assert any(at in call for call in again)
    # A release is built anew, from an empty folder.
    assert {call for call in done & again if "-m venv" not in call} == set()


@pytest.mark.parametrize(
    ("at", "message", "why"),
    [
        ("-m venv", "ensurepip is not available", "sudo apt install python3-venv"),
        pytest.param(
            "-m venv", "OSError: [Errno 28] No space left on device", "The disk is full", marks=pytest.mark.nightly
        ),
        ("pip install", "Temporary failure in name resolution", "cannot reach the internet"),
        pytest.param("docker pull", "manifest unknown", "choose another tag with --image", marks=pytest.mark.nightly),
        ("--service=svc:qmd-embed", "Access denied: serve config denied", "sudo tailscale set --operator=$USER"),
        ("--service=svc:qmd-embed", "flag provided but not defined: -service", "sudo tailscale update"),
    ],
)
def test_known_causes_are_told_in_a_sentence(world: World, at: str, message: str, why: str) -> None:
    world.fail(at, stderr=f"{message}\n")
    failed = world.deploy("--wait", "0")
    assert failed.returncode == 1
    assert f"| {message}" in failed.stderr
    assert "Why: " in failed.stderr
    assert why in failed.stderr


def test_a_refusal_with_exit_code_0_is_a_failure(world: World) -> None:
    world.fail("--service=svc:qmd-embed", code=0, stdout="service hosts must be tagged nodes\n")
    failed = world.deploy("--no-vllm", "--wait", "0")
    assert failed.returncode == 1
    assert "Tailscale lets only tagged machines host services" in failed.stderr


def test_a_service_that_does_not_start_shows_its_log(world: World) -> None:
    world.set(broken=["qmd-embed.service"], journal="HOST=127.0.0.1 PORT=8001 cannot be bound\n")
    failed = world.deploy("--no-vllm")
    assert failed.returncode == 1
    assert "qmd-embed.service is failed (result: exit-code)" in failed.stderr
    assert "| HOST=127.0.0.1 PORT=8001 cannot be bound" in failed.stderr
    assert "Why: Something else uses the port" in failed.stderr
    assert "Undo: sudo python3 deploy.py --uninstall" in failed.stderr
    # For whoever wants to look: nothing is taken away from a first deployment.
    assert (world.root / "etc/systemd/system/qmd-embed.service").exists()
    world.mend()
    assert world.deploy("--no-vllm").returncode == 0
    assert "systemctl reset-failed qmd-embed.service" in world.changes()


def test_a_service_that_is_never_ready_is_given_up(world: World) -> None:
    world.set(loading=NEVER)
    failed = world.deploy("--no-vllm", "--wait", "0.3")
    assert failed.returncode == 1
    assert "not ready within 0.3 s" in failed.stderr


def upgrade(world: World) -> dict[str, tuple[int, int, str]]:
    """A change of the code; what is on the machine but releases, before it is deployed."""
    (world.clone / "src/vecmill/new.py").write_text("2\n")
    return lasting(world)


def lasting(world: World) -> dict[str, tuple[int, int, str]]:
    """The modes and contents of all files outside the folder of releases."""
    return {
        path: (mode, 0, content) for path, (mode, _, content) in world.snapshot().items() if "/releases/" not in path
    }


@pytest.mark.parametrize("at", [*AT_NIGHT, "not ready"])
def test_an_upgrade_that_fails_leaves_what_ran_running(embedder: World, at: str) -> None:
    before = upgrade(embedder)
    if at == "not ready":
        embedder.set(loading=NEVER)
    else:
        embedder.fail(at)
    failed = embedder.deploy("--rerank-model", "none", "--wait", "0.3")
    assert failed.returncode == 1
    assert lasting(embedder) == before
    assert half_written(embedder) == []
    if at == "pip install":
        assert not any("systemctl" in call for call in embedder.changes())
    else:
        assert "What ran before was put back." in failed.stderr
        assert embedder.changes()[-2:] == ["systemctl daemon-reload", "systemctl restart --no-block qmd-embed.service"]
    assert embedder.state["units"]["qmd-embed.service"]["ActiveState"] == "active"


@pytest.mark.parametrize(
    "at", [pytest.param("pip install", marks=pytest.mark.nightly), "systemctl restart --no-block qmd-embed"]
)
def test_ctrl_c_leaves_what_ran_running(embedder: World, at: str) -> None:
    before = upgrade(embedder)
    stopped = embedder.interrupt(at)
    assert stopped.returncode == 130
    assert "Interrupted in the step" in stopped.stderr
    assert "Undo: " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert lasting(embedder) == before
    assert half_written(embedder) == []
