"""A machine for each test."""

from __future__ import annotations

import compileall
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.world import REPOSITORY, World


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """deploy.py leaves no compiled code behind, and it is started a hundred times."""
    compileall.compile_dir(REPOSITORY / "deployment", quiet=1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Bare: Tailscale logged in, Docker running, nothing deployed."""
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def deployed(world: World) -> World:
    """Both services deployed and ready."""
    return _deploy(world)


@pytest.fixture
def embedder(world: World) -> World:
    """Only the embedder, deployed and ready."""
    world.usual = ("--no-vllm", "--no-tailscale")
    return _deploy(world)


def _deploy(world: World) -> World:
    world.set(loading=0)
    done = world.deploy()
    assert done.returncode == 0, done.stdout + done.stderr
    world.changes()
    return world
