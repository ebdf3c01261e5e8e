"""When there is no room and nobody may wait for it: refused with a time, and everything goes on afterwards."""

from __future__ import annotations

import asyncio

from tests.conftest import serving


async def test_too_many_requests_are_refused_and_the_rest_is_answered() -> None:
    async with serving(max_concurrent_requests=3, queue_timeout=0) as client:
        body = {"input": ["some text " * 20] * 40}
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for _ in range(12)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert 0 < len(refused) < 12
        assert all(answer.status_code in (200, 503) for answer in answers)
        assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
        assert "temporarily" in refused[0].json()["error"]["message"]
        assert 1 <= int(refused[0].headers["retry-after"]) <= 60
        assert refused[0].headers["x-should-retry"] == "true"
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200


async def test_too_many_waiting_tokens_are_refused_but_a_lone_request_never() -> None:
    async with serving(max_queued_tokens=300, max_client_batch_size=200, queue_timeout=0) as client:
        body = {"inputs": ["some text " * 20] * 100}
        answers = await asyncio.gather(*(client.post("/embed", json=body) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503, 503]
        assert next(answer for answer in answers if answer.status_code == 503).json()["error_type"] == "Overloaded"
        assert (await client.post("/embed", json=body)).status_code == 200


async def test_bodies_in_memory_are_bounded_together() -> None:
    async with serving(max_body_bytes=20_000) as client:
        body = {"inputs": ["x" * 180] * 100}
        answers = await asyncio.gather(*(client.post("/embed", json=body) for _ in range(60)))
        assert {answer.status_code for answer in answers} == {200, 503}
        assert (await client.post("/embed", json=body)).status_code == 200
