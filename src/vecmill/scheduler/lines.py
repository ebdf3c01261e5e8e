"""The lines that sequences stand in, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator

from vecmill.core.types import Lane
from vecmill.scheduler.policy import Client, Cut, Line
from vecmill.scheduler.sequence import Sequence

MOST_CLIENTS = 1024  # remembered though nothing of theirs waits


class Lines:
    """Every line in which something waits."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, Lane, str], Line[Sequence]] = {}
        self._clients: dict[tuple[Lane, str], Client] = {}

    def __iter__(self) -> Iterator[Line[Sequence]]:
        return iter(self._lines.values())

    def waits(self, lane: Lane) -> bool:
        """Whether anything waits in a lane."""
        return any(line.lane is lane for line in self._lines.values())

    def join(self, model: str, lane: Lane, client: str, now: float) -> Line[Sequence]:
        """The line of a client; it must be given a sequence."""
        key = model, lane, client
        if key not in self._lines:
            self._lines[key] = Line(model, lane, self._client(lane, client), now)
        return self._lines[key]

    def _client(self, lane: Lane, name: str) -> Client:
        """A client that comes (back) begins level with the one served least: time away earns no turns."""
        active = {line.client for line in self._lines.values() if line.lane is lane}
        client = self._clients.setdefault((lane, name), Client())
        if client not in active:
            client.served = max(client.served, min((one.served for one in active), default=0.0))
            self._forget(lane)
        return client

    def _forget(self, lane: Lane) -> None:
        if len(self._clients) > MOST_CLIENTS:
            active = {line.client for line in self._lines.values()}
            self._clients = {key: one for key, one in self._clients.items() if one in active or key[0] is not lane}

    def leave(self, cut: Cut[Sequence], now: float) -> None:
        """Take a batch off the fronts."""
        for line, count in cut.popped.items():
            for _ in range(count):
                line.waiting.popleft()
            line.front_since = now
        for client, tokens in cut.served.items():
            client.served += tokens
        self._lines = {key: line for key, line in self._lines.items() if line.waiting}

    def clear(self) -> list[Sequence]:
        """Everything that waits, once for each line it stands in; the lines are gone."""
        waiting = [sequence for line in self._lines.values() for sequence in line.waiting]
        self._lines.clear()
        return waiting
