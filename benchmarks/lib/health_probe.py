"""Asks GET /health at fixed times, in a process of its own, so that no other client's queue is in the durations.

    python -m benchmarks.lib.health_probe http://127.0.0.1:8080

It ends with its standard input, and then prints one line of JSON. Only the standard library: a probe must cost nothing.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

EVERY_S = 0.05
WITHIN_S = 10.0
NEW_CONNECTION = 10  # every so many probes, as a load balancer's are


@dataclass
class Probes:
    """What the probing process tells at its end."""

    milliseconds: list[float] = field(default_factory=list)
    """Of each answer, from when it was due: a probe that an earlier one held up counts what it waited."""
    late_ms: list[float] = field(default_factory=list)
    """How long after its time the probe itself woke: what the machine, not the server, takes. Not in `milliseconds`."""
    failed: list[str] = field(default_factory=list)
    """What was no 200: the status, or the name of what broke the connection; at most 100."""


@contextmanager
def probed(url: str) -> Iterator[Probes]:
    """Probe while the block runs; the probes are filled in at its end."""
    probes = Probes()
    command = [sys.executable, "-m", "benchmarks.lib.health_probe", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield probes
        finally:
            told, _ = process.communicate(timeout=2 * WITHIN_S)
    vars(probes).update(json.loads(told))


def probe(url: str, ended: Event) -> dict[str, Any]:
    """Probe until told to end; the fields of `Probes`."""
    milliseconds: list[float] = []
    late_ms: list[float] = []
    failed: list[str] = []
    connection, due, number = HTTPConnection(urlsplit(url).netloc, timeout=WITHIN_S), time.perf_counter(), 0
    while not ended.is_set():
        due, number = due + EVERY_S, number + 1
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
            late_ms.append(1000 * (time.perf_counter() - due))
            due = time.perf_counter()
        if number % NEW_CONNECTION == 0:
            connection.close()
        what = _asked(connection)
        milliseconds.append(1000 * (time.perf_counter() - due))
        if what is not None and len(failed) < 100:
            failed.append(what)
    connection.close()
    return {"milliseconds": milliseconds, "late_ms": late_ms, "failed": failed}


def _asked(connection: HTTPConnection) -> str | None:
    """None: it answered with 200."""
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
    except (OSError, HTTPException) as error:
        connection.close()
        return type(error).__name__
    return None if response.status == 200 else str(response.status)


def main() -> None:
    """Probe until standard input ends."""
    ended = Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    Thread(target=wait, name="end", daemon=True).start()
    print(json.dumps(probe(sys.argv[1], ended)), flush=True)


if __name__ == "__main__":
    main()
