"""The requests before the clock starts, and the check that the server answers what was asked."""

from __future__ import annotations

from itertools import cycle

from vecmill.tools.bench.answers import dimensions_of
from vecmill.tools.bench.bulk import Bulk
from vecmill.tools.bench.client import Client
from vecmill.tools.bench.errors import BadAnswer, BenchError
from vecmill.tools.bench.workload import Payload


async def warm_up(client: Client, payloads: list[Payload], connections: int, seconds: float) -> int | None:
    """Check the first answer, then load the server for so many seconds; the size of its vectors, None for scores.

    Raises:
        BenchError: the server cannot be reached.
        BadAnswer: the first answer is an error or not one of the dialect.
    """
    first = payloads[0]
    answer = await client.post(first.body)
    endpoint = client.target.endpoint
    if answer.error is not None and not answer.error.isdigit():
        raise BenchError(f"{endpoint} cannot be reached: {answer.message}.")
    if answer.error is not None:
        raise BadAnswer(f"POST {endpoint} was answered with {answer.error}: {answer.message}")
    dimensions = dimensions_of(answer.content, client.target.dialect, first.texts)
    if seconds > 0:
        await Bulk(client, cycle(payloads)).run(connections, seconds)
    return dimensions
