"""What is counted, and which of it a holder of one key among several is shown."""

from __future__ import annotations

from vecmill.core.types import Lane
from vecmill.telemetry.telemetry import SAMPLES, Answered, Metrics, Rolling, Telemetry


def answered(total: float = 0.5, texts: int = 2) -> Answered:
    return Answered(
        operation="embed",
        model="m",
        lane=Lane.INTERACTIVE,
        texts=texts,
        tokens=10 * texts,
        truncated=1,
        cached=1,
        cached_tokens=10,
        total=total,
        tokenize=0.1,
        queue=0.1,
        infer=0.1,
        waited=False,
    )


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_one_report_reaches_the_metrics_and_the_rolling_statistics() -> None:
    telemetry = Telemetry()
    telemetry.answered(answered())
    telemetry.batch(Lane.BULK, 3, 40, 0.2, 1)
    telemetry.error(429, "Overloaded")
    metrics, rolling = telemetry.metrics, telemetry.rolling
    assert value(metrics, "vecmill_texts_total", operation="embed", model="m") == 2
    assert value(metrics, "vecmill_cached_tokens_total", operation="embed", model="m") == 10
    assert value(metrics, "vecmill_batch_rows_sum", lane="bulk") == 3
    assert value(metrics, "vecmill_out_of_memory_splits_total") == 1
    assert value(metrics, "vecmill_errors_total", status="429", error="Overloaded") == 1
    assert (rolling.requests, rolling.errors) == (1, 1)
    assert rolling.batch_distribution() == {"3": 1}


def test_only_the_whole_exposition_tells_how_much_had_to_be_computed() -> None:
    telemetry = Telemetry()
    telemetry.answered(answered())
    telemetry.batch(Lane.BULK, 3, 40, 0.2, 0)
    whole, less = telemetry.metrics.exposition().decode(), telemetry.metrics.exposition(work=False).decode()
    for name in ("vecmill_cached_texts_total", "vecmill_batch_rows_sum", 'stage="infer"'):
        assert name in whole
        assert name not in less
    assert 'stage="total"' in less
    assert "vecmill_texts_total" in less


def test_latencies_are_those_of_the_last_thousand_requests() -> None:
    rolling = Rolling()
    rolling.add_request(answered(total=9.0))
    for _ in range(SAMPLES):
        rolling.add_request(answered(total=0.5))
    assert rolling.requests == SAMPLES + 1
    latency = rolling.latency_ms("total")
    assert (latency["max"], latency["p50"]) == (500, 500)
