"""`--user`: services of an account without root."""

from __future__ import annotations

from tests.deployment.world import World

HOME = "home/ann"


def test_everything_is_the_users(world: World) -> None:
    world.set(operator=world.account)
    done = world.deploy("--user")
    assert done.returncode == 0, done.stderr
    calls = world.changes()
    assert f"loginctl enable-linger {world.account}" in calls
    assert all(call.startswith("systemctl --user ") for call in calls if call.startswith("systemctl"))
    assert not any(call.startswith("useradd") for call in calls)
    assert {path.split("/")[0] for path in world.snapshot()} == {"home", "run", "var"}
    unit = world.text(f"{HOME}/.config/systemd/user/qmd-embed.service")
    assert (
        "/home/ann/.local/share/vecmill/venv/bin/vecmill serve --env-file /home/ann/.config/vecmill/embed.env" in unit
    )
    assert "HF_HOME=/home/ann/.cache/huggingface" in unit
    assert "WantedBy=default.target" in unit
    assert "User=" not in unit
    assert "STATE_DIR=/home/ann/.local/state/vecmill\n" in world.text(f"{HOME}/.config/vecmill/embed.env")
    assert (world.root / HOME / ".local/state/vecmill").stat().st_mode & 0o777 == 0o700
    assert "python3 deploy.py --user --status" in done.stdout

    before = world.snapshot()
    assert world.deploy("--user").returncode == 0
    assert world.changes() == []
    assert world.snapshot() == before

    (world.root / HOME / ".cache/huggingface/weights").write_text("of others too\n")
    gone = world.run("--user", "--uninstall", "--purge")
    assert gone.returncode == 0, gone.stderr
    assert "Kept: /home/ann/.cache/huggingface" in gone.stdout
    assert [path for path in world.snapshot() if (world.root / path).is_file()] == [
        f"{HOME}/.cache/huggingface/weights",
        f"var/lib/systemd/linger/{world.account}",
    ]


def test_tailscale_needs_the_operators_right(world: World) -> None:
    world.set(operator="somebody-else")
    done = world.deploy("--user", "--no-vllm")
    assert done.returncode == 1
    assert f"sudo tailscale set --operator={world.account};" in done.stderr
    assert world.changes() == []
