"""Sends texts to a server the way several clients at once do."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
import numpy.typing as npt
from benchmarks.dialects import Dialect, tei

TIMEOUT_S = 300.0
# Client and server share the machine: to compress would take cores from the model and save nothing.
HEADERS = {"Accept-Encoding": "identity"}
EMBED = tei()


@dataclass(frozen=True)
class Answered:
    """The texts' vectors in their order, float32, shape (texts, dimensions), and the time for all of them."""

    vectors: npt.NDArray[np.float32]
    seconds: float


def embed_all(
    url: str,
    texts: Sequence[str],
    *,
    connections: int = 1,
    batch: int = 32,
    dialect: Dialect = EMBED,
    advance: Callable[[int], None] = lambda _: None,
) -> Answered:
    """Embed the texts in batches over so many connections.

    Each connection sends its next batch when its last one is answered; `advance` then gets that batch's size.
    """
    batches = [list(texts[start : start + batch]) for start in range(0, len(texts), batch)]
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S, limits=limits, headers=HEADERS) as client,
        ThreadPoolExecutor(connections) as pool,
    ):

        def send(inputs: list[str]) -> bytes:
            answer = client.post(dialect.path, json=dialect.body(inputs))
            if answer.is_error:
                raise RuntimeError(f"POST {url}{dialect.path}: {answer.status_code} {answer.text[:500]}")
            advance(len(inputs))
            return answer.content

        started = time.perf_counter()
        answers = list(pool.map(send, batches))
        seconds = time.perf_counter() - started
    # Parsed after the clock stopped: the client's own work is not the server's.
    return Answered(np.concatenate([dialect.vectors(answer) for answer in answers]), seconds)
