"""A disk that is full or cannot be written: clear errors, and batches that wait in place of failing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ON_A_DISK_OF_ITS_OWN = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" -m tests.batches.full_disk "$1" "$3"'


@pytest.mark.parametrize("what", ["full", "read_only"])
def test_a_batch_waits_for_the_disk_and_loses_no_line(tmp_path: Path, what: str) -> None:
    command = ["unshare", "-Urm", "sh", "-c", ON_A_DISK_OF_ITS_OWN, "sh", str(tmp_path), sys.executable, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
