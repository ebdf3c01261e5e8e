"""A machine that was set up by the guide which this replaces."""

from __future__ import annotations

from tests.deployment.world import World

OLD_UNIT = "[Service]\nExecStart=/home/ann/qmd/.venv/bin/uvicorn embed_rerank:app --port {port}\n"


def old_guide(world: World) -> None:
    units = world.root / "etc/systemd/system"
    units.mkdir(parents=True)
    (units / "qmd-embed.service").write_text(OLD_UNIT.format(port=world.port))
    mounts = [{"Source": "/home/ann/.cache/huggingface", "Destination": "/root/.cache/huggingface"}]
    running = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled"}
    world.set(container={"Mounts": mounts}, units={"qmd-embed.service": running})


def test_unit_and_container_are_taken_over(world: World) -> None:
    old_guide(world)
    done = world.deploy()
    assert done.returncode == 0, done.stderr
    assert "is of an earlier guide: it is replaced, and kept beside as *.before-vecmill" in done.stdout
    assert "The container qmd-vllm was started by hand" in done.stdout
    assert world.text("etc/systemd/system/qmd-embed.service.before-vecmill") == OLD_UNIT.format(port=world.port)
    assert "/opt/vecmill/venv/bin/vecmill serve" in world.text("etc/systemd/system/qmd-embed.service")
    calls = world.changes()
    removed = calls.index("docker rm --force qmd-vllm")
    assert removed < calls.index("systemctl restart --no-block qmd-vllm.service")
    # Its models are there already, also for the second run, when the container is gone.
    mount = " -v /home/ann/.cache/huggingface:/root/.cache/huggingface "
    assert mount in world.text("etc/systemd/system/qmd-vllm.service")
    assert world.deploy().returncode == 0
    assert world.changes() == []
    assert "Kept: " in world.run("--uninstall").stdout
    assert (world.root / "etc/systemd/system/qmd-embed.service.before-vecmill").exists()


def test_a_takeover_that_fails_leaves_the_old_service(world: World) -> None:
    old_guide(world)
    world.set(broken=["qmd-embed.service"])
    assert world.deploy("--no-vllm").returncode == 1
    assert world.text("etc/systemd/system/qmd-embed.service") == OLD_UNIT.format(port=world.port)
    assert not (world.root / "opt/vecmill/venv").exists()
    assert not (world.root / "etc/vecmill/embed.env").exists()
    assert world.changes()[-1] == "systemctl restart --no-block qmd-embed.service"
