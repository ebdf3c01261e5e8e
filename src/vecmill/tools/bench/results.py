"""The numbers of a measurement, as the table and `--json` show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vecmill.tools.bench.client import Answer

PERCENTILES = (50, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Latency:
    """Of answered requests, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of some requests."""

    requests: int
    latency_ms: Latency | None
    """None: no request was answered."""
    retries: dict[str, int]
    """Waits for Retry-After, by status. The latency counts them."""
    errors: dict[str, int]
    """By status, or by the name of what broke the connection."""
    first_error: str | None


@dataclass(frozen=True, slots=True)
class Load:
    """Bulk requests over some connections."""

    connections: int
    outcomes: Outcomes
    texts: int
    """Answered."""
    seconds: float
    """From the first request to the last answer: the rates are over these."""
    texts_per_second: float
    megabytes_per_second: float
    """Of UTF-8 text, in units of a million bytes."""
    tokens_per_second: float | None
    """None: the server does not say how many tokens it computed."""
    client_cpu: float
    """The load generator's use of one core, 0 to 1 and, with its threads, a little over."""


def outcomes_of(answers: Sequence[Answer]) -> Outcomes:
    """Count the answers, and take the percentiles of those without an error."""
    retries: Counter[str] = Counter()
    for answer in answers:
        retries.update(answer.retries)
    failed = [answer for answer in answers if answer.error is not None]
    took = [answer.seconds * 1e3 for answer in answers if answer.error is None]
    return Outcomes(
        requests=len(answers),
        latency_ms=Latency(*np.percentile(took, PERCENTILES).tolist()) if took else None,
        retries=dict(retries),
        errors=dict(Counter(str(answer.error) for answer in failed)),
        first_error=f"{failed[0].error}: {failed[0].message}" if failed else None,
    )
