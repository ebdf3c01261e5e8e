"""The end of a process whose threads do not end."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import threading
from vecmill.serve.stopping import LastResort

threading.Thread(target=threading.Event().wait).start()  # Python would wait for it for ever
ending = LastResort(lambda: 3)
ending.within(3600)
ending.within(0.05)  # the later word counts
"""


def test_it_ends_with_the_exit_code_whatever_still_runs() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    assert "did not come to its end in time" in ended.stderr
