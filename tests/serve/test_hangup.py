"""SIGHUP of a closed terminal ends a server that was started in it, and is a wish to reload everywhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

# A session of its own on the terminal that it is given, as a shell's; without one, as a service's.
SCRIPT = """
import asyncio, os, signal, sys
from vecmill.serve.stopping import on_hangup

def say(word):
    print(word, flush=True)

async def main():
    if terminal:
        os.open(terminal, os.O_RDWR)
    on_hangup(lambda: say("reload"), lambda: say("stop"))
    say("waits")
    await asyncio.Event().wait()

terminal = sys.argv[1]
asyncio.run(main())
"""


def started(terminal: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, terminal], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


def test_a_terminal_that_closes_is_no_wish_to_reload() -> None:
    master, slave = os.openpty()
    with started(os.ttyname(slave)) as in_terminal, started("") as service:
        assert in_terminal.stdout is not None
        assert service.stdout is not None
        try:
            for process in (in_terminal, service):
                process.send_signal(signal.SIGHUP)
            assert in_terminal.stdout.readline() == "reload\n"
            assert service.stdout.readline() == "reload\n"
            os.close(slave)
            os.close(master)
            assert in_terminal.stdout.readline() == "stop\n"
        finally:
            in_terminal.kill()
            service.kill()
