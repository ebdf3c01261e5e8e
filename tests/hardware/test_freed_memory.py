"""What malloc does with memory that forward passes free, in processes of its own: its settings are the process's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping

import pytest

PASSES, PIECES, PIECE = 20, 6, 4_000_000
ONE_PASS = f"""
def one_pass():
    pieces = [bytearray({PIECE}) for _ in range({PIECES})]
    for piece in pieces:
        piece[::4096] = bytes(len(piece[::4096]))
"""
CHILD = f"""
import resource
import threading
from vecmill.hardware.memory import give_back_memory, keep_freed_memory
import psutil

{ONE_PASS}
def passes():
    for _ in range({PASSES}):
        one_pass()

def in_a_thread():
    thread = threading.Thread(target=passes)
    thread.start()
    thread.join()

keep_freed_memory()
in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_a_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
give_back_memory()
print(psutil.Process().memory_info().rss)
"""
PAGES = PIECES * PIECE // 4096
THREADS = 12
ONE_AFTER_ANOTHER = f"""
import threading
from vecmill.hardware.memory import keep_freed_memory
import psutil

keep_freed_memory()
before, ends, done = psutil.Process().memory_info().rss, threading.Event(), threading.Semaphore(0)

{ONE_PASS}
def work():
    one_pass()
    done.release()
    ends.wait()

for _ in range({THREADS}):
    threading.Thread(target=work).start()
    done.acquire()
print(psutil.Process().memory_info().rss - before)
ends.set()
"""


def printed(program: str, variables: Mapping[str, str]) -> list[int]:
    """The numbers that a program prints, with these settings of malloc and no others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(("variables", "mapped_anew"), [({}, False), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True)])
def test_passes_find_the_memory_of_those_before(variables: dict[str, str], mapped_anew: bool) -> None:
    faults, resident = printed(CHILD, variables)
    assert (faults > PASSES * PAGES / 2) is mapped_anew
    assert faults <= 2 * PAGES or mapped_anew
    assert resident < 100_000_000  # all is given back when it is asked for


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_thread_that_begins_late_finds_what_others_have_freed() -> None:
    [kept] = printed(ONE_AFTER_ANOTHER, {})
    assert kept < THREADS / 2 * PIECES * PIECE
