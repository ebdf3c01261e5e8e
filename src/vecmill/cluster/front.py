"""What stands before the replicas: looks at a request, finds the models it is for, and passes it on as it is.

Each request is answered by the application of one replica; a front adds only the answers that no replica can give: 503
while there is none, 429 where Ray's queue is full, both in the shape of the request's dialect. A replica that dies
before it has answered costs nothing but time: what may be done twice goes to another one.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import orjson
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vecmill.cluster.routes import ROUTE, ROUTERS, SENT, Route
from vecmill.config import Settings
from vecmill.core.errors import (
    ModelLoading,
    NotFound,
    Overloaded,
    RequestTimedOut,
    Unavailable,
    VecmillError,
)
from vecmill.core.json_body import JsonLimits, parse
from vecmill.core.routing import RoutedRequest, affinity_key
from vecmill.core.types import Caller, Lane, Task
from vecmill.http.access import PROBES, ApiKeys, presented_key
from vecmill.http.dialects.bodies import CHOICES
from vecmill.http.dialects.registry import RERANK, rerank_spoken, shape_for
from vecmill.http.errors import ErrorShape, error_response
from vecmill.http.middleware import ENDLESS, plain_path
from vecmill.http.route import parse_priority
from vecmill.inference.schedule import CHARACTERS_PER_TOKEN, expected_lane

ATTEMPTS = 3  # of a request whose replica dies
PATIENCE = 2.0  # seconds that a request waits for a replica that nobody needed until now, before it is refused
FIRST_LOOKS = 20  # that a front takes at its start, until Ray has said which replicas there are
START_SECONDS = 10.0  # Retry-After while a replica starts
LOOK_SECONDS = 0.25
GRACE_SECONDS = 10.0  # that a replica has for its own answer to a request that is over its time
BUFFERED_BODIES = 8  # of the largest size; what comes beyond them is passed on in parts
PART_BYTES = 1_048_576
PARSED_HERE_BYTES = 65_536  # larger bodies are parsed in a thread

# State that one replica keeps unless it is shared. What is sent there may not be done twice.
KEPT = ("/jobs", "/v1/jobs", "/v1/files", "/v1/batches", "/models/load", "/models/unload", "/cache", "/dashboard")
# Of an ASGI scope; the rest is the connection's own.
PASSED = ("type", "asgi", "http_version", "scheme", "method", "path", "raw_path", "query_string", "root_path")
# Where several placements have a part of the answer each: a list under one of these names.
LISTS = {"/v1/models": "data", "/api/tags": "models"}
SCORING = ("rerank", "reranking", "ranking", "score", "classify")
TEXT_FIELDS = ("input", "inputs", "texts", "prompt", "content", "documents", "passages", "sentences", "text", "query")


@dataclass(frozen=True, slots=True)
class PlacementNames:
    """What is known of a placement before its replicas have said more."""

    deployment: str
    tasks: frozenset[Task]
    names: frozenset[str]
    always: bool = True
    """Whether there always is a replica: where there is none for a moment, another one is on its way."""


@dataclass(frozen=True, slots=True)
class Destination:
    """What a request is for, as far as it can be seen without understanding it."""

    task: Task
    model: str | None
    work: RoutedRequest
    body: object = None
    """Parsed, where it is JSON."""


class Front:
    """The deployment that HTTP reaches. Belongs to the event loop in which Ray runs it."""

    def __init__(
        self, settings: Settings, placements: Sequence[PlacementNames], handles: Mapping[str, DeploymentHandle]
    ) -> None:
        """`placements`: the first of a task has the requests that name none of another's models."""
        self._settings = settings
        self._placements = placements
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._calls = dict(handles)
        self._names: dict[tuple[Task, str], str] = {
            (task, name): each.deployment for each in reversed(placements) for task in each.tasks for name in each.names
        }
        self._keys = ApiKeys(settings.access)
        self._asked = float("-inf")
        self._buffered = 0

    def __serve_build_asgi_app__(self) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Called by Ray. A function: uvicorn takes methods for applications of ASGI 2."""

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await receive()
                await self._know_replicas()
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})
            elif scope["type"] == "http":
                await _Passage(self, scope, receive, send).run()

        return application

    async def _know_replicas(self) -> None:
        """Wait, for a while, until Ray has said which replicas there are: a front that knows of none would refuse."""
        expected = [each.deployment for each in self._placements if each.always]
        for _ in range(FIRST_LOOKS):
            if all(map(running, expected)):
                break
            await asyncio.sleep(LOOK_SECONDS)

    def patience(self, deployment: str) -> float:
        """Seconds that a request waits while its deployment has no replica.

        The only one may have died, or those of an upgrade may be loading: that is worth as long a wait as a full server
        is. What is scaled to zero is not there for minutes.
        """
        always = any(each.always for each in self._placements if each.deployment == deployment)
        return max(PATIENCE, self._settings.inference.queue_timeout) if always else PATIENCE

    @property
    def settings(self) -> Settings:
        """Those of the first placement."""
        return self._settings

    @property
    def deployments(self) -> list[str]:
        """All placements' deployments, the first one's first."""
        return [each.deployment for each in self._placements]

    def handle(self, deployment: str, *, stream: bool = True) -> DeploymentHandle:
        """The way to a deployment."""
        return (self._handles if stream else self._calls)[deployment]

    def take(self, count: int) -> bool:
        """Have room for so many bytes of a body more (fewer, below 0); false where there is none."""
        if count > 0 and self._buffered + count > BUFFERED_BODIES * self._settings.http.max_body_bytes:
            return False
        self._buffered += count
        return True

    def knows(self, headers: Headers) -> bool:
        """Whether a replica will let the request in, as far as it can be told: others are not looked at."""
        return self._keys.holder_of(presented_key(headers)) is not None

    def having(self, replica: str) -> str | None:
        """The deployment that has a replica of that name."""
        return next((name for name in self.deployments if replica in running(name)), None)

    async def placement_of(self, task: Task, model: str | None) -> str:
        """The deployment for a task and, where the request names one that is known, a model."""
        if model is not None and len(self._placements) > 1:
            found = self._names.get((task, model.lower()))
            if found is None and monotonic() - self._asked > PATIENCE:
                self._asked = monotonic()
                await self._ask()
                found = self._names.get((task, model.lower()))
            if found is not None:
                return found
        able = (each.deployment for each in self._placements if task in each.tasks)
        return next(able, self._placements[0].deployment)

    async def _ask(self) -> None:
        """Have the replicas say which models they have."""
        for deployment in filter(running, self.deployments):
            with suppress(RayError, TimeoutError, BackPressureError, DeploymentUnavailableError):
                call = self._calls[deployment].names.remote(**{ROUTE: Route(RoutedRequest(Lane.INTERACTIVE, 1, 0))})
                for task, name in await asyncio.wait_for(call, PATIENCE):
                    self._names.setdefault((Task(task), name.lower()), deployment)


def running(deployment: str) -> Collection[str]:
    """The replicas of a deployment that take requests, by name."""
    router = ROUTERS.get(deployment)
    return () if router is None else router.names


class _ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class _Passage:
    """One request on its way."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front, self._receive, self._send = front, receive, send
        self._scope = {name: scope[name] for name in PASSED if name in scope}
        for address in ("client", "server"):
            self._scope[address] = tuple(scope[address]) if scope.get(address) else None
        self._scope["headers"] = list(scope["headers"])
        self._headers = Headers(scope=scope)
        self._path, self._method = plain_path(scope["path"]), scope["method"]
        self._began = monotonic()
        self._held = 0
        self._body: bytes | None = None
        self._begun = bytearray()
        self._more = True
        self._started = self._ended = False
        """Whether the answer's first message was sent, and its last."""
        self._tried: frozenset[str] = frozenset()
        """The replicas that had the request and have not answered it."""
        self._accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The replica that has the request, where its body follows in parts."""
        self._shape: ErrorShape = shape_for(self._path, self._method)

    async def run(self) -> None:
        """Answer, always."""
        try:
            try:
                await self._read()
                await self._answer()
            except VecmillError as error:
                if self._started:
                    raise
                response = error_response(self._shape, error, self._headers)
                await response({**self._scope}, self._receive, self._send)
        except _ClientLeftError:
            pass  # nobody waits for an answer
        finally:
            self._front.take(-self._held)

    async def _read(self) -> None:
        """The body, as long as it is no larger than a request's may be: what is larger is passed on in parts."""
        most = self._front.settings.http.max_body_bytes
        if self._method == "POST" and not self._front.knows(self._headers):
            return
        until = self._began + self._front.settings.scheduler.request_timeout
        while self._more:
            part = await self._part(until)
            self._begun += part
            if self._held + len(part) > most or not self._front.take(len(part)):
                return
            self._held += len(part)
        self._body = bytes(self._begun)
        self._begun.clear()

    async def _part(self, until: float = inf) -> bytes:
        pause = min(self._front.settings.http.body_timeout, until - monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), pause)
        except TimeoutError:
            raise RequestTimedOut("408: the rest of the request's body did not come in time (BODY_TIMEOUT).") from None
        if message["type"] == "http.disconnect":
            raise _ClientLeftError
        self._more = message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def _answer(self) -> None:
        look = await self._look()
        home = self._path.startswith(KEPT)
        route = Route(look.work, look.task, home=home)
        if (named := self._headers.get("x-replica")) is not None:
            if (deployment := self._front.having(named)) is None:
                raise NotFound("X-Replica names no replica that runs; leave it out, and any answers.")
            await self._pass_on(deployment, replace(route, replica=named))
        elif self._path in LISTS and len(self._front.deployments) > 1:
            await self._merge(LISTS[self._path], route)
        else:
            deployment = self._front.deployments[0]
            if not home:
                deployment = await self._front.placement_of(look.task, look.model)
            await self._pass_on(deployment, route)

    async def _look(self) -> Destination:
        body = self._body or b""
        look = partial(look_at, self._path, self._headers, body, self._front.settings)
        found = look() if len(body) <= PARSED_HERE_BYTES else await asyncio.to_thread(look)
        if found.task is Task.RERANK and self._path.rpartition("/")[2].startswith("rerank"):
            self._shape = RERANK[rerank_spoken(found.body)].errors
        return found

    async def _pass_on(self, deployment: str, route: Route) -> None:
        """Have a replica answer; another one if that dies before it has begun to, and it may be done twice."""
        repeatable = self._body is not None and (self._method in ("GET", "HEAD") or not route.home)
        for attempt in range(ATTEMPTS):
            try:
                async for message in self._messages(deployment, route):
                    self._started = True
                    self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
                    await self._send(message)
            except (RayError, RequestCancelledError):
                if self._started:
                    raise
                if repeatable and route.replica is None and attempt + 1 < ATTEMPTS:
                    route = Route(route.work, route.task, home=route.home, tried=self._tried)
                    continue
                raise Unavailable("503: the replica that had this request has ended; try again.") from None
            return

    async def _messages(self, deployment: str, route: Route) -> AsyncIterator[Message]:
        """The answer of one replica; the head waits for the body's beginning, as long as another may answer.

        Raises:
            ModelLoading: there is no replica. Overloaded: too many wait for one. RayError: the replica died.
        """
        with SENT[deployment].counted(route):
            waited = monotonic() - self._began
            handle = self._front.handle(deployment)
            answer = handle.answer.remote(self._scope, self._body, waited, **{ROUTE: route})
            others = [asyncio.create_task(self._gone() if self._body is not None else self._feed(deployment, route))]
            try:
                head: list[Message] = []
                while (together := await self._next(answer, deployment, route, others)) is not None:
                    if not together:
                        self._accepted.set_result(SENT[deployment].replica_of(route) or "")
                    head += [self._named(message, deployment, route) for message in together]
                    if len(head) > 1 or self._started or _open_ended(head):
                        for message in head:
                            yield message
                        head = []
                for message in head:
                    yield message
            except (RayError, RequestCancelledError):
                self._tried |= {SENT[deployment].replica_of(route) or ""}
                raise
            finally:
                answer.cancel()
                for other in others:
                    other.cancel()
                await asyncio.gather(*others, return_exceptions=True)

    @staticmethod
    def _named(message: Message, deployment: str, route: Route) -> Message:
        """The message; an answer's head says which replica it is from, by the name that `X-Replica` may ask for."""
        if message["type"] != "http.response.start" or (name := SENT[deployment].replica_of(route)) is None:
            return message
        headers = dict(message["headers"])
        if (took := headers.get(b"x-total-time")) is not None:
            SENT[deployment].answered(route, float(took) / 1e3, float(headers.get(b"x-rest-of-pass", 0)) / 1e3)
        others = [(key, value) for key, value in message["headers"] if key.lower() != b"x-replica"]
        return {**message, "headers": [*others, (b"x-replica", name.encode())]}

    async def _next(
        self, answer: Any, deployment: str, route: Route, others: Sequence[asyncio.Task[None]]
    ) -> list[Message] | None:
        """The next messages of an answer; None after the last."""
        coming: asyncio.Task[list[Message]] = asyncio.ensure_future(anext(answer))
        until = monotonic() + (PATIENCE if self._path in PROBES else self._front.patience(deployment))
        try:
            while True:
                timeout = None if self._started or self._path in ENDLESS else LOOK_SECONDS
                # Once all is sent the client's side says that it is gone, whether it is or not.
                seen = {coming} if self._ended else {coming, *others}
                await asyncio.wait(seen, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if coming.cancelled():  # not by the client
                    raise RequestCancelledError(route.identifier)
                if coming.done():
                    return coming.result()
                self._check_wait(deployment, route, until, others)
        except StopAsyncIteration:
            return None
        except BackPressureError:
            raise Overloaded("The server is temporarily overloaded: too many requests wait for a replica.") from None
        except DeploymentUnavailableError:
            raise Unavailable("503: the models cannot be served now; `serve status` says why.") from None
        finally:
            coming.add_done_callback(_heard)
            coming.cancel()

    def _check_wait(self, deployment: str, route: Route, until: float, others: Sequence[asyncio.Task[None]]) -> None:
        """Whether there is still something to wait for.

        Raises:
            ModelLoading, Unavailable. _ClientLeftError. RequestTimedOut: the client's body stays out.
        """
        for other in others:
            if other.done():
                other.result()
        if monotonic() > until and SENT[deployment].replica_of(route) is None and not running(deployment):
            error = ModelLoading("503: no replica with this model runs yet; one is being started, try again.")
            error.retry_after = START_SECONDS
            raise error
        if monotonic() - self._began > self._front.settings.scheduler.request_timeout + GRACE_SECONDS:
            raise Unavailable("503: the request found no replica that answered in time (REQUEST_TIMEOUT); try again.")

    async def _gone(self) -> None:
        """Return never; end once the client has left.

        Raises:
            _ClientLeftError: it has.
        """
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise _ClientLeftError

    async def _feed(self, deployment: str, route: Route) -> None:
        """Send the body in parts to the replica that has the request, as fast as that reads them."""
        name = await self._accepted
        call = self._front.handle(deployment, stream=False).feed
        pinned = Route(RoutedRequest(Lane.INTERACTIVE, 0, 0), replica=name, upload=route.identifier)
        going = True
        while going:
            while self._more and len(self._begun) < PART_BYTES:
                self._begun += await self._part()
            part = bytes(self._begun), self._more
            self._begun.clear()
            going = await call.remote(part, **{ROUTE: pinned}) and self._more
        await self._gone()

    async def _merge(self, name: str, route: Route) -> None:
        """The first placement's answer with what the others list, too."""
        answers = [
            await self._whole(deployment, route) for deployment in self._front.deployments if running(deployment)
        ]
        if not answers or answers[0][0]["status"] != 200:
            await self._pass_on(self._front.deployments[0], route)
            return
        (start, first), *others = answers
        merged = orjson.loads(first)
        for _, body in others:
            known = {each.get("id", each.get("name")) for each in merged[name]}
            listed = orjson.loads(body).get(name, [])
            merged[name] += [each for each in listed if each.get("id", each.get("name")) not in known]
        body = orjson.dumps(merged)
        kept = [(key, value) for key, value in start["headers"] if key.lower() not in (b"content-length", b"etag")]
        await self._send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    async def _whole(self, deployment: str, route: Route) -> tuple[Message, bytes]:
        self._scope["headers"] = [each for each in self._scope["headers"] if each[0] != b"accept-encoding"]
        own = Route(route.work, route.task)
        start, *bodies = [message async for message in self._messages(deployment, own)]
        return start, b"".join(message.get("body", b"") for message in bodies)


def _heard(task: asyncio.Task[Any]) -> None:
    """Nobody asks any more what became of it."""
    if not task.cancelled():
        task.exception()


def _open_ended(head: Sequence[Message]) -> bool:
    """Whether nothing need follow the head of an answer soon: a stream says no length."""
    return any(all(name.lower() != b"content-length" for name, _ in message["headers"]) for message in head)


def look_at(path: str, headers: Headers, body: bytes, settings: Settings) -> Destination:
    """What a request is for. A body that cannot be read says nothing: the replica says what is wrong with it."""
    parsed = _parsed(body, headers.get("content-encoding"), settings)
    fields = parsed if isinstance(parsed, dict) else {}
    task = Task.RERANK if any(part in SCORING for part in path.split("/")) else Task.EMBED
    texts = [text for name in TEXT_FIELDS for text in _texts(fields.get(name))]
    if not texts and isinstance(parsed, list):
        texts = _texts(parsed)
    characters = sum(map(len, texts)) or len(body)
    job = headers.get("x-job-id") or fields.get("job_id")
    work = RoutedRequest(
        lane=_lane(headers, fields, task, job, len(texts), characters),
        tokens=max(1, characters // CHARACTERS_PER_TOKEN),
        # Not the job's id: that is new at each run of an index, and the second run would find nothing warm.
        key=affinity_key(texts, job="" if texts else "state"),
    )
    model = fields.get("model")
    if model is None and path.startswith("/v1/models/"):
        model = path.removeprefix("/v1/models/")
    return Destination(task, model if isinstance(model, str) else None, work, parsed)


def _lane(headers: Headers, fields: Mapping[str, Any], task: Task, job: object, texts: int, characters: int) -> Lane:
    """As the replica will choose it, or nearly: a wrong guess costs a worse choice of the replica, no more."""
    use = fields.get("input_type") or fields.get("task")
    choice = CHOICES.get(use.lower()) if isinstance(use, str) else None
    asks = fields.get("prompt_name") == "query" or (choice is not None and choice.is_query is True)
    named = None
    for value in (fields.get("priority"), headers.get("x-priority")):
        with suppress(ValueError):
            named = named or parse_priority(value)
    caller = Caller(lane=named, job_id=str(job) if job else None)
    hint = task is Task.RERANK or asks
    return expected_lane(caller, interactive_hint=hint, texts=texts, estimated_tokens=characters)


def _parsed(body: bytes, encoding: str | None, settings: Settings) -> object:
    try:
        if encoding in ("gzip", "deflate"):
            body = zlib.decompressobj(47).decompress(body, settings.http.max_body_bytes)
        return parse(body, JsonLimits.for_inputs(settings.inference.max_client_batch_size)) if body else None
    except (VecmillError, zlib.error):
        return None


def _texts(value: object) -> list[str]:
    """The texts in one of the shapes that bodies have them in."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    texts = (entry.get("text") if isinstance(entry, dict) else entry for entry in value)
    return [text for text in texts if isinstance(text, str)]
