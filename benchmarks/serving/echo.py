"""A server that reads each request and gives the same stored bytes for an answer: what the sockets and the client take.

In a process of its own, with uvloop and httptools as vecmill's.

    python -m benchmarks.serving.echo --port 9000 --answer answer.json
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from benchmarks.lib.servers import free_port, running
from starlette.types import Receive, Scope, Send


class Echo:
    """An ASGI application that answers every request with the stored bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self._answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._answer})


@contextmanager
def echo_server(answer: bytes) -> Iterator[str]:
    """Its address while the block runs."""
    port = free_port()
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(answer)
        command = [sys.executable, "-m", "benchmarks.serving.echo", "--port", str(port), "--answer", file.name]
        with running(command, port, "/") as server:
            yield server.url


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer", type=Path, required=True, help="file with the bytes")
    options = parser.parse_args()
    echo = Echo(options.answer.read_bytes())
    uvicorn.run(echo, port=options.port, lifespan="off", access_log=False, log_level="warning", timeout_keep_alive=300)


if __name__ == "__main__":
    main()
