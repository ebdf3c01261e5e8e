"""Small files that are whole, and locks that go with their holder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vecmill.storage.files import FileLock, sync_folder, write_atomically

HOLDER = """
import sys
from pathlib import Path
from vecmill.storage.files import FileLock
lock = FileLock.take(Path(sys.argv[1]), create=True)
assert lock is not None
sys.stdout.write("held\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"first", b"", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    sync_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(OSError, match=r"file\.json"):
        write_atomically(path, b"x")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "file.json", b"x")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert FileLock.take(path) is None  # there is no such file
    first = FileLock.take(path, create=True)
    assert first is not None
    assert FileLock.take(path) is None
    first.release()
    first.release()
    second = FileLock.take(path)
    assert second is not None
    second.release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert FileLock.take(path) is None
        holder.kill()
    lock = FileLock.take(path)
    assert lock is not None
    lock.release()
