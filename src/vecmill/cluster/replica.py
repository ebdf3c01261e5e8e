"""One replica: the application that `vecmill serve` runs, with its own device, called by way of Ray.

A request comes as its ASGI scope and its body, and its answer leaves as ASGI messages. A body that is too large to be
sent at once follows in parts (`feed`), as fast as the application reads it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Scope

from vecmill.app import Server, create_app
from vecmill.cluster.routes import Route
from vecmill.cluster.scaling import BUSY, QUEUED_SECONDS
from vecmill.config import Settings
from vecmill.core.health import Phase
from vecmill.core.types import Lane, Task
from vecmill.http.health import status_of
from vecmill.storage.files import FileLock
from vecmill.telemetry.logs import configure_logging

logger = logging.getLogger(__name__)

MOST_ON_A_MACHINE = 256  # state folders that are tried
PARTS_AHEAD = 4  # of a body, that wait for the application to read them
MESSAGES_AHEAD = 16  # of an answer, that wait to be sent
LOOK_SECONDS = 1.0  # after which a part that waits looks whether its request is still there

Part = tuple[bytes, bool]
"""Bytes of a body, and whether more follow."""


class ReplicaServer:
    """The deployment of one placement. Belongs to the event loop in which Ray runs it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the models; a replica is there once it can answer.

        Raises:
            RuntimeError: it never can; the message is one sentence with the cure.
        """
        configure_logging(settings.log.log_format, settings.log.log_level)
        own, self._lock = with_folder(settings)
        self._app: FastAPI = create_app(own)
        self._server: Server = self._app.state.server
        self._uploads: dict[str, _Answer] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._server.load_ended.wait()
        await self.check_health()

    async def check_health(self) -> None:
        """What /health says. Ray replaces a replica whose device has failed or hangs.

        Raises:
            RuntimeError: it cannot answer.
        """
        status, message = status_of(self._server.services)
        if status not in ("ok", Phase.DRAINING.value):
            raise RuntimeError(message)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What `WaitRouter` knows of this replica: fits, what waits, and whether it takes work."""
        return {
            "at": time_ns(),
            "draining": status_of(self._server.services)[0] != "ok",
            "kind": self._kind(),
            "fits": self._fits(),
            "queued": {lane.value: self._queued(lane) for lane in Lane},
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `QueuedTokens` scales by."""
        queued = {f"queued_tokens:{model}": 0.0 for model in self._server.inference.budgets}
        for (model, _), (_, tokens) in self._server.inference.queued.items():
            queued[f"queued_tokens:{model}"] = queued.get(f"queued_tokens:{model}", 0.0) + tokens
        busy = float(self._server.services.device_busy())
        return {QUEUED_SECONDS: sum(map(self._queued_seconds, Lane)), BUSY: busy, **queued}

    def _queued_seconds(self, lane: Lane) -> float:
        """How long the device will work on what waits in a lane."""
        warmed = self._server.services.warmed()
        return sum(
            warmed[model].calibration.seconds_per_token * tokens
            for (model, its_lane), (_, tokens) in self._server.inference.queued.items()
            if its_lane is lane and model in warmed
        )

    def _queued(self, lane: Lane) -> dict[str, int]:
        """Tokens that wait in a lane, by task."""
        queued: dict[str, int] = {}
        for (model, its_lane), (_, tokens) in self._server.inference.queued.items():
            if its_lane is lane:
                task = model.partition(":")[0]
                queued[task] = queued.get(task, 0) + tokens
        return queued

    def _kind(self) -> str:
        """What takes as long for the same work: the card's name, or how many cores there are."""
        look = self._server.services.gpu()
        if self._server.services.gpu_in_use() and look.gpu is not None:
            return str(look.gpu.name)
        return f"{os.cpu_count()} cores"

    def _fits(self) -> dict[str, tuple[float, float, int]]:
        """By task, of its first model: seconds of a pass, seconds per token, tokens of a bulk pass."""
        fits: dict[str, tuple[float, float, int]] = {}
        for card in self._server.inference.cards:
            warmed = self._server.services.warmed().get(card.key)
            if warmed is not None:
                line = warmed.calibration
                fits.setdefault(card.task.value, (line.fixed_seconds, line.seconds_per_token, warmed.max_batch_tokens))
        if Task.EMBED.value in fits:  # it ranks where there is no reranker
            fits.setdefault(Task.RERANK.value, fits[Task.EMBED.value])
        return fits

    async def names(self, route: Route) -> list[tuple[str, str]]:
        """All names by which requests may call the models, each with its task."""
        return [(card.task.value, name) for card in self._server.inference.cards for name in card.names]

    async def answer(
        self, scope: Scope, body: bytes | None, waited: float, route: Route
    ) -> AsyncIterator[list[Message]]:
        """The application's messages, those together that are there together; none at first where a body follows.

        `body`: None where it follows in parts. `waited`: seconds that the request has taken so far.
        """
        exchange = _Answer()
        if body is None:
            self._uploads[route.identifier] = exchange
        else:
            exchange.parts.put_nowait((body, False))
        scope = {**scope, "state": {"began": monotonic() - waited}}
        running = asyncio.create_task(exchange.run(self._app, scope))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            if body is None:
                yield []  # the parts may come
            while (together := await exchange.sent()) is not None:
                yield together
            await running
        finally:
            self._uploads.pop(route.identifier, None)
            exchange.leave()

    async def feed(self, part: Part, route: Route) -> bool:
        """More of a body, once there is room for it; false where its request has ended."""
        while (exchange := self._uploads.get(route.upload or "")) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(exchange.parts.put(part), LOOK_SECONDS)
                return True
        return False

    async def __del__(self) -> None:
        """Called by Ray once nothing is in progress any more, or its patience is over."""
        if life := getattr(self, "_life", None):
            await life.aclose()


class _Answer:
    """One request, and its answer as far as it is not sent on."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[Part | None] = asyncio.Queue(PARTS_AHEAD)
        """None where its client has left."""
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(MESSAGES_AHEAD)
        self._left = asyncio.Event()
        self._more = True

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Have the application answer; to the end, also where nobody waits for it any more."""
        try:
            await app(scope, self._receive, self._send)
        finally:
            await self._put(None)

    async def sent(self) -> list[Message] | None:
        """The next messages, at least one; None after the last."""
        first = await self._messages.get()
        if first is None:
            return None
        together = [first]
        while not self._messages.empty():
            message = self._messages.get_nowait()
            if message is None:
                self._messages.put_nowait(None)
                break
            together.append(message)
        return together

    def leave(self) -> None:
        """The client has its answer, or has left: the application is told."""
        self._left.set()
        while not self._messages.empty():
            self._messages.get_nowait()
        if self._more and self.parts.empty():
            self.parts.put_nowait(None)

    async def _receive(self) -> Message:
        part = await self.parts.get() if self._more and not self._left.is_set() else None
        if part is not None:
            body, self._more = part
            return {"type": "http.request", "body": body, "more_body": self._more}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._put(message)

    async def _put(self, message: Message | None) -> None:
        if not self._left.is_set():
            await self._messages.put(message)


def with_folder(settings: Settings) -> tuple[Settings, FileLock | None]:
    """The settings with a state folder of this replica's own, the first in STATE_DIR that is free; and what holds it.

    So a replica that takes another's place finds its cache, jobs and files. Servers with REDIS_URL share STATE_DIR.

    Raises:
        RuntimeError: none is free.
    """
    if settings.state.redis_url is not None:
        return settings, None
    top = Path(settings.state.state_dir)
    for number in range(MOST_ON_A_MACHINE):
        path = top / f"replica-{number}"
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock.take(path / "replica.lock", create=True, shared=False)
        except OSError:
            return settings, None  # the server says why it keeps nothing
        if lock is not None:
            return replace(settings, state=settings.state.model_copy(update={"state_dir": path})), lock
    raise RuntimeError(
        f"All of {MOST_ON_A_MACHINE} state folders in STATE_DIR={top} are in use: set another STATE_DIR."
    )
