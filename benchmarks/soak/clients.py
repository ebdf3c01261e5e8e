"""A thousand clients of one server: callers in every dialect, some that leave, jobs, batches, open dashboards."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from benchmarks.soak.dialects import Comparison, Corpus, Exchange, vector_alone
from benchmarks.soak.wire import Broken, Call, Connection, Leave, Reply

ANSWER_S = 60.0  # longer is a hang: twice QUEUE_TIMEOUT
WORK_S = 300.0  # the same for a job and a batch, which wait for their turns
GAP_S = 30.0  # between two pieces of an event stream; that of the jobs says every 15 s at least that it is there
RAMP_S = 10.0
LONGEST_PAUSE_S = 60.0  # of a caller: the server closes a connection after IDLE_TIMEOUT without a request, 75 s
LEAVES_ONE_IN = 25
JOB_PAUSE_S, BATCH_PAUSE_S, LOOK_PAUSE_S, SCRAPE_PAUSE_S = 3.0, 5.0, 5.0, 15.0
JOB_REQUESTS, JOB_TEXTS, BATCH_LINES = 6, 8, 40
CANCELLED_ONE_IN = 4
TICK_S = 0.02
MOST_TOLD = 30
FILLED_AT_ONCE, FILLING = 32, 16  # texts of a request, and requests at a time

OPEN = {"validating", "in_progress", "finalizing", "cancelling"}


@dataclass
class Tally:
    """What became of the requests."""

    comparison: Comparison
    statuses: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    """Clients that left, by where."""
    ended: Counter[str] = field(default_factory=Counter)
    """Jobs and batches by what became of them, and what event streams sent."""
    problems: Counter[str] = field(default_factory=Counter)
    """`5xx`, `hang`, `broken`, `unexpected`, `wrong`."""
    told: list[str] = field(default_factory=list)
    """The first of them in words."""
    milliseconds: dict[str, array[float]] = field(default_factory=dict)
    """Of each answer, by dialect."""
    lag_ms: array[float] = field(default_factory=lambda: array("f"))
    """How late this process's own event loop was."""

    def problem(self, kind: str, what: str) -> None:
        """Count it, and keep what happened if it is among the first."""
        self.problems[kind] += 1
        if len(self.told) < MOST_TOLD:
            self.told.append(f"{kind}: {what}")


class Load:
    """All the clients of one server. Runs until `stop`."""

    def __init__(self, url: str, keys: Sequence[str], admin: str, corpus: Corpus, comparison: Comparison) -> None:
        self.tally = Tally(comparison)
        self.began = 0.0
        self._url, self._keys, self._admin, self._corpus = url, keys, admin, corpus
        self._ended = asyncio.Event()
        self._random = corpus.random

    async def run(self, connections: int, per_second: float, seconds: float) -> None:
        """Load the server over so many connections with so many requests a second, until the seconds are over."""
        look = self._admin
        others: list[Coroutine[Any, Any, None]] = [
            self._repeated("job", self._job, JOB_PAUSE_S, key) for key in (self._keys[0], self._keys[1], self._keys[0])
        ]
        others += [self._repeated("batch", self._batch, BATCH_PAUSE_S, key) for key in self._keys[:2]]
        streams = (("/dashboard/events", look), ("/dashboard/events", self._keys[0]), ("/jobs/events", look))
        others += [self._follower(path, key) for path, key in streams]
        for path in ("/dashboard/snapshot", "/dashboard/history", "/ready"):
            others.append(self._looker(path, LOOK_PAUSE_S, look))
        others.append(self._looker("/metrics", SCRAPE_PAUSE_S, look))
        callers = max(1, connections - len(others))
        others += [self._caller(number, RAMP_S * number / callers, callers / per_second) for number in range(callers)]
        self.began = perf_counter()
        async with asyncio.TaskGroup() as group:
            for client in (*others, self._own_lag()):
                group.create_task(client)
            await asyncio.sleep(seconds)
            self._ended.set()

    async def fill(self, jobs: int, texts: int) -> None:
        """What the server keeps up to a bound: ended jobs, the last requests, vectors. Full, it grows no more."""
        connection = Connection(self._url, self._keys[0])
        for number in range(jobs):
            body = {"project": f"filled-{number}", "total_chunks": 1, "instance_id": "soak"}
            job = await self._asked(connection, "filling", Call.json("/jobs", body))
            await self._asked(connection, "filling", Call("POST", f"/jobs/{job['job_id']}/complete"))
        connection.close()

        # Several at a time, so that the server has begun all its threads before memory is measured.
        starts = iter(range(0, texts, FILLED_AT_ONCE))
        await asyncio.gather(*(self._fill_from(starts) for _ in range(FILLING)))

    async def _fill_from(self, starts: Iterator[int]) -> None:
        async with self._connection(self._keys[0]) as connection:
            for first in starts:
                body = {"inputs": [f"filled {number}" for number in range(first, first + FILLED_AT_ONCE)]}
                await self._exchange(connection, Exchange("filling", Call.json("/embed", body)))

    async def alone(self, kept: Sequence[tuple[str, Any]]) -> None:
        """Compare what was kept of new texts with what each gives alone, now that the load is over."""
        connection = Connection(self._url, self._keys[0])
        for text, vector in kept:
            wanted = await vector_alone(connection, text)
            if not self.tally.comparison.vectors_are([vector], wanted[None]):
                self.tally.problem("wrong", f"the vector of a new text {text[:40]!r}")
        connection.close()

    async def _pause(self, seconds: float) -> bool:
        """Wait; whether the load goes on."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        return not self._ended.is_set()

    @asynccontextmanager
    async def _connection(self, key: str) -> AsyncIterator[Connection]:
        connection = Connection(self._url, key)
        try:
            yield connection
        finally:
            connection.close()

    async def _caller(self, number: int, first: float, pause: float) -> None:
        async with self._connection(self._keys[number % len(self._keys)]) as connection:
            going = await self._pause(first)
            with suppress(OSError):  # the first request tells what is wrong
                await connection.open()
            while going and await self._pause(min(LONGEST_PAUSE_S, self._random.expovariate(1 / pause))):
                if self._random.random() < 1 / LEAVES_ONE_IN:
                    await self._leaver(connection)
                else:
                    await self._exchange(connection, self._corpus.exchange(self.tally.comparison))

    async def _leaver(self, connection: Connection) -> None:
        where = self._random.choice(list(Leave))
        try:
            async with asyncio.timeout(ANSWER_S):
                await connection.leave(self._corpus.large(), where, self._random.random() * 0.05)
                await connection.open()  # another client, in place of the one that left
        except (TimeoutError, Broken, OSError) as error:
            self.tally.problem("hang" if isinstance(error, TimeoutError) else "broken", f"leaving {where.value}")
        self.tally.left[where.value] += 1

    async def _exchange(self, connection: Connection, exchange: Exchange) -> Reply | None:
        """The answer, counted and looked at; None where there was none that was expected."""
        tally, began = self.tally, perf_counter()
        what = f"{exchange.dialect} ({exchange.call.path}) after {began - self.began:.1f} s"
        try:
            async with asyncio.timeout(ANSWER_S):
                reply = await connection.send(exchange.call)
        except TimeoutError:
            connection.close()
            tally.problem("hang", f"{what}: nothing within {ANSWER_S:.0f} s")
            return None
        except Broken as error:
            tally.problem("broken", f"{what}: {error}")
            return None
        tally.milliseconds.setdefault(exchange.dialect, array("f")).append(1000 * (perf_counter() - began))
        tally.statuses[str(reply.status)] += 1
        if reply.status not in exchange.statuses:
            kind = "5xx" if reply.status >= 500 else "unexpected"
            tally.problem(kind, f"{what}: {reply.status} {reply.content[:300].decode(errors='replace')}")
            return None
        try:
            right = exchange.right(reply)
        except (LookupError, TypeError, ValueError) as error:
            right = False
            tally.problem("unexpected", f"{what}: cannot be read: {error!r}")
        if not right:
            tally.problem("wrong", what)
        return reply

    async def _repeated(
        self, name: str, work: Callable[[Connection], Awaitable[str | None]], pause: float, key: str
    ) -> None:
        async with self._connection(key) as connection:
            while await self._pause(pause * (0.5 + self._random.random())):
                try:
                    async with asyncio.timeout(WORK_S):
                        ended = await work(connection)
                    self.tally.ended[f"{name} {ended}"] += 1
                except TimeoutError:
                    connection.close()
                    self.tally.problem("hang", f"a {name} was not done within {WORK_S:.0f} s")

    async def _asked(self, connection: Connection, name: str, call: Call) -> Any:
        """The JSON of the answer; None where it is none that was expected."""
        reply = await self._exchange(connection, Exchange(name, call))
        return None if reply is None else reply.json()

    async def _job(self, connection: Connection) -> str | None:
        """An indexing client: register, wait for the turn, send texts, report, complete or cancel."""
        total = JOB_REQUESTS * JOB_TEXTS
        body = {"project": f"project-{self._random.randrange(8)}", "total_chunks": total, "instance_id": "soak"}
        job = await self._asked(connection, "jobs", Call.json("/jobs", body))
        if job is None:
            return "refused"
        path = f"/jobs/{job['job_id']}"
        while job and job["status"] == "queued":
            await asyncio.sleep(0.5)
            job = await self._asked(connection, "jobs", Call("GET", path))
        cancelled = self._random.random() < 1 / CANCELLED_ONE_IN
        for number in range(JOB_REQUESTS // 2 if cancelled else JOB_REQUESTS):
            places = [self._random.randrange(len(self._corpus.texts)) for _ in range(JOB_TEXTS)]
            wanted = self._corpus.vectors[places]
            texts = {"inputs": [self._corpus.texts[place] for place in places], "job_id": path.removeprefix("/jobs/")}
            call = Call.json("/embed", texts, cache_control="no-store")

            def right(reply: Reply, wanted: Any = wanted) -> bool:
                return self.tally.comparison.vectors_are(reply.json(), wanted)

            await self._exchange(connection, Exchange("CodeCartographer, of a job", call, right))
            await self._asked(connection, "jobs", Call.json(f"{path}/progress", {"current": (number + 1) * JOB_TEXTS}))
        await self._asked(connection, "jobs", Call("DELETE", path) if cancelled else Call("POST", f"{path}/complete"))
        job = await self._asked(connection, "jobs", Call("GET", path))
        expected = "failed" if cancelled else "completed"
        if job is None or job["status"] != expected:
            self.tally.problem("unexpected", f"a job should be {expected}: {job}")
        return "cancelled" if cancelled else "completed"

    async def _batch(self, connection: Connection) -> str | None:
        """A file of requests: upload, run, poll, read the answers, delete both files."""
        places = [self._random.randrange(len(self._corpus.texts)) for _ in range(BATCH_LINES)]
        upload = await self._asked(connection, "files", _upload(self._lines(places)))
        if upload is None:
            return "refused"
        about = {"input_file_id": upload["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = await self._asked(connection, "batches", Call.json("/v1/batches", about))
        while batch and batch["status"] in OPEN:
            await asyncio.sleep(1)
            batch = await self._asked(connection, "batches", Call("GET", f"/v1/batches/{batch['id']}"))
        if batch is None or batch["status"] != "completed" or not batch["output_file_id"]:
            self.tally.problem("unexpected", f"a batch should be completed: {batch}")
            return "not completed"

        def right(reply: Reply) -> bool:
            got = {int(line["custom_id"]): line for line in map(json.loads, reply.content.splitlines())}
            rows = [got[number]["response"]["body"]["data"][0]["embedding"] for number in range(len(places))]
            return self.tally.comparison.vectors_are(rows, self._corpus.vectors[places])

        output = f"/v1/files/{batch['output_file_id']}"
        await self._exchange(connection, Exchange("batch's output", Call("GET", f"{output}/content"), right))
        for path in (output, f"/v1/files/{upload['id']}"):
            await self._asked(connection, "files", Call("DELETE", path))
        return "completed"

    def _lines(self, places: Sequence[int]) -> bytes:
        lines: list[Mapping[str, Any]] = [
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": "any", "input": self._corpus.texts[place]},
            }
            for number, place in enumerate(places)
        ]
        return "\n".join(map(json.dumps, lines)).encode()

    async def _follower(self, path: str, key: str) -> None:
        """Somebody whose page is open: the event stream, read as it comes."""
        while not self._ended.is_set():
            stream = Connection(self._url, key).stream(path)
            try:
                while not self._ended.is_set():
                    async with asyncio.timeout(GAP_S):
                        await anext(stream)
                    self.tally.ended[f"pieces of {path}"] += 1
            except TimeoutError:
                self.tally.problem("hang", f"{path} sent nothing for {GAP_S:.0f} s")
            except (Broken, StopAsyncIteration) as error:
                self.tally.problem("broken", f"{path}: {error!r}")
                await self._pause(1)
            finally:
                await stream.aclose()

    async def _looker(self, path: str, pause: float, key: str) -> None:
        async with self._connection(key) as connection:
            while await self._pause(pause):
                await self._exchange(connection, Exchange(f"GET {path}", Call("GET", path)))

    async def _own_lag(self) -> None:
        while not self._ended.is_set():
            due = perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.tally.lag_ms.append(1000 * max(0.0, perf_counter() - due))


def _upload(content: bytes) -> Call:
    boundary = "soak-boundary"
    fields = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="input.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    body = fields.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return Call("POST", "/v1/files", body, {"content-type": f"multipart/form-data; boundary={boundary}"})
