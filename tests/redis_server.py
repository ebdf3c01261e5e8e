"""A Redis of its own for a test, on a port of this machine only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as NotYet
from redis.retry import Retry

from tests.servers import free_port


@contextmanager
def redis_server(folder: Path, *options: str, port: int | None = None) -> Iterator[str]:
    """Its address while the block runs. `options` are redis-server's; its data lie in `folder`, if it keeps any."""
    executable = shutil.which("redis-server")
    assert executable, "needs redis-server on the PATH; `make test` installs it where it can"
    port = port or free_port()
    command = [executable, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 200), retry_on_error=[NotYet]) as client:
                client.ping()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
