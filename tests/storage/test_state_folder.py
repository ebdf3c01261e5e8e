"""One server to a folder, and what happens where nothing can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vecmill.core.errors import StartupError
from vecmill.storage.state_folder import StateFolder


def test_a_second_server_is_refused_with_the_cure(tmp_path: Path) -> None:
    first = StateFolder.open(tmp_path / "state")
    with pytest.raises(StartupError, match=r"in use by another vecmill server.*REDIS_URL"):
        StateFolder.open(tmp_path / "state")
    with pytest.raises(StartupError):
        StateFolder.open(tmp_path / "state", shared=True)
    first.close()
    StateFolder.open(tmp_path / "state").close()


def test_servers_that_share_let_each_other_in_and_nobody_else(tmp_path: Path) -> None:
    folders = [StateFolder.open(tmp_path, shared=True) for _ in range(2)]
    with pytest.raises(StartupError):
        StateFolder.open(tmp_path)
    for folder in folders:
        folder.close()


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path / "new" / "state")
    assert folder.problem is None
    assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0
    folder.close()


def test_where_nothing_can_be_written_it_says_so_and_serves(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = StateFolder.open(file)
    assert folder.problem is not None
    assert "cannot be written" in folder.problem
    folder.close()


def test_what_becomes_of_the_folder_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    folder = StateFolder.open(path)
    folder.look()
    assert folder.problem is None
    path.rename(tmp_path / "elsewhere")
    folder.look()
    assert folder.problem is not None
    assert "was removed" in folder.problem
    path.mkdir()
    folder.look()
    assert "replaced by another folder" in folder.problem
    path.rmdir()
    (tmp_path / "elsewhere").rename(path)
    folder.look()
    assert folder.problem is None
    folder.close()
