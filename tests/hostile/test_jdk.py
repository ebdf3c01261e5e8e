"""Java's own HTTP client with its default settings: it asks every plain-text server for HTTP/2, beside its request."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.service import Service

CLIENT = Path(__file__).with_name("JavaClient.java")


def test_the_jdks_client_is_answered(wired: Service) -> None:
    java = shutil.which("java")
    if java is None:
        pytest.skip("needs a JDK on the PATH (Debian: default-jdk-headless); `make test` installs it where it can")
    ended = subprocess.run([java, str(CLIENT), wired.url], capture_output=True, text=True, timeout=150)
    assert ended.stdout.splitlines() == ["200 HTTP_1_1 true"] * 6 + ["200"], ended.stderr
