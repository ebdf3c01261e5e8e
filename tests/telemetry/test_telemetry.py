"""The rolling statistics of /stats."""

from __future__ import annotations

from vecmill.core.types import Lane, RequestRecord
from vecmill.telemetry.telemetry import SAMPLES, Telemetry


def test_latencies_are_those_of_the_last_thousand_requests() -> None:
    telemetry = Telemetry()
    telemetry.ended(RequestRecord("embed", lane=Lane.BULK, total=9.0))
    for _ in range(SAMPLES):
        telemetry.ended(RequestRecord("embed", lane=Lane.BULK, total=0.5))
    assert telemetry.rates.all_work.requests == SAMPLES + 1
    latency = telemetry.rolling.latency_ms("total")
    assert (latency["max"], latency["p50"]) == (500, 500)
