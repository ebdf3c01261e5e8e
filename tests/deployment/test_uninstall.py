"""`--uninstall`: what was deployed goes, what was gathered stays until `--purge`."""

from __future__ import annotations

import pytest

from tests.deployment.world import World


def files(world: World) -> list[str]:
    return [path for path in world.snapshot() if (world.root / path).is_file() or (world.root / path).is_symlink()]


def gather(world: World) -> None:
    """What the services leave while they run."""
    for path in ("var/lib/vecmill/jobs.db", "var/cache/vecmill/huggingface/weights"):
        (world.root / path).parent.mkdir(parents=True, exist_ok=True)
        (world.root / path).write_text("much work\n")


def test_code_and_configuration_go_state_and_models_stay(deployed: World) -> None:
    gather(deployed)
    done = deployed.run("--uninstall")
    assert done.returncode == 0, done.stderr
    assert files(deployed) == ["var/cache/vecmill/huggingface/weights", "var/lib/vecmill/jobs.db"]
    assert deployed.state["served"] == {}
    assert "Kept: /var/lib/vecmill\n" in done.stdout
    assert "Kept: /var/cache/vecmill\n" in done.stdout
    calls = deployed.changes()
    assert "systemctl disable qmd-embed.service" in calls
    assert "userdel vecmill" not in calls

    again = deployed.run("--uninstall")
    assert again.returncode == 0
    assert deployed.changes() == []

    purged = deployed.run("--uninstall", "--purge")
    assert purged.returncode == 0
    assert files(deployed) == []
    assert deployed.state["accounts"] == []


@pytest.mark.nightly
def test_one_service(deployed: World) -> None:
    assert deployed.run("vllm", "--uninstall").returncode == 0
    assert not (deployed.root / "etc/vecmill/vllm.env").exists()
    assert (deployed.root / "etc/vecmill/embed.env").exists()
    assert list(deployed.state["served"]) == ["svc:qmd-embed"]
    assert not any("qmd-embed" in call for call in deployed.changes())


def test_what_fails_does_not_keep_the_rest_from_going(deployed: World) -> None:
    deployed.fail("serve clear", stderr="Logged out.\n")
    done = deployed.run("--uninstall")
    assert done.returncode == 1
    assert "Tailscale is not logged in" in done.stderr
    assert files(deployed) == []


@pytest.mark.nightly
def test_with_half_of_it_missing(deployed: World) -> None:
    (deployed.root / "etc/systemd/system/qmd-embed.service").unlink()
    (deployed.root / "opt/vecmill/venv").unlink()
    deployed.without("tailscale")
    deployed.without("docker")
    assert deployed.run("--uninstall").returncode == 0
    assert files(deployed) == []


def test_a_service_of_somebody_else_is_left_alone(world: World) -> None:
    path = world.root / "etc/systemd/system/qmd-embed.service"
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/usr/bin/uvicorn embed_rerank:app\n")
    done = world.run("--uninstall")
    assert done.returncode == 0
    assert "deploy.py did not write it" in done.stdout
    assert path.exists()
    assert world.changes() == []


def test_on_a_bare_machine(world: World) -> None:
    assert world.run("--uninstall").returncode == 0
    assert world.changes() == []


def test_what_others_put_beside_it_stays(deployed: World) -> None:
    """A certificate for a proxy, a clone in /opt/vecmill, a person who has the account's name."""
    for path in ("etc/vecmill/tls.pem", "opt/vecmill/.git/config"):
        (deployed.root / path).parent.mkdir(exist_ok=True)
        (deployed.root / path).write_text("not ours\n")
    deployed.set(accounts=["vecmill:x:1000:1000:Vic Mill:/home/vecmill:/bin/bash\n"])
    done = deployed.run("--uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert files(deployed) == ["etc/vecmill/tls.pem", "opt/vecmill/.git/config"]
    assert f"Kept: {deployed.root}/etc/vecmill\n" in done.stdout
    assert "deploy.py did not make it" in done.stdout
    assert "userdel vecmill" not in deployed.changes()


def test_what_a_killed_run_left_goes_too(deployed: World) -> None:
    (deployed.root / f"etc/vecmill/.embed.env.{'0' * 16}").write_text("HF_TOKEN=hf_")
    assert deployed.run("--uninstall").returncode == 0
    assert files(deployed) == []
