"""Ray's request router by `core.routing`: what is known of each replica, and what was sent to it since.

Ray sends this module's classes to the front by value, globals included. So what they share with the front is in
`routes`, and is looked up there: a name imported from it would be a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from vecmill.cluster import routes
from vecmill.cluster.routes import Route
from vecmill.core.routing import Policy, Replica, RoutedRequest, choose, expected_wait
from vecmill.core.types import Lane, Task

# Until a replica has said what it can do; all are then thought equal.
UNKNOWN_FIT = (0.01, 1e-4, 4096)
COMPARED_TOKENS = 512  # of a pass by which fits are compared


@dataclass(slots=True)
class Reported:
    """What one replica has said of itself, see `replica.Server.record_routing_stats`."""

    stats: Mapping[str, Any] = field(default_factory=dict)
    sent_then: Mapping[Lane, int] = field(default_factory=dict)
    """Tokens that were with it when that came."""


class KnownToFront:
    """A router that `Front` can ask, and that says which replica has taken a request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        deployment: str = self._deployment_id.name  # type: ignore[attr-defined]  # Ray's
        self._sent = routes.SENT[deployment]
        routes.ROUTERS[deployment] = self

    @property
    def names(self) -> tuple[str, ...]:
        """Of all replicas that take requests. May be asked from any thread."""
        return tuple(identifier.unique_id for identifier in list(self._replicas))  # type: ignore[attr-defined]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called by Ray once a replica has accepted a request."""
        if (route := pending_request.kwargs.get(routes.ROUTE)) is not None:
            self._sent.went(route, replica_id.unique_id)


class PowerOfTwo(KnownToFront, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Ray's own: the one with fewer requests of two replicas at random."""


class RoundRobin(KnownToFront, RoundRobinRouter):  # type: ignore[misc]
    """Ray's own: each in turn."""


class WaitRouter(KnownToFront, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Searches to the shortest expected wait, bulk to the keeper of its cache: `core.routing.choose`.

    Belongs to the event loop in which Ray runs it.
    """

    policy: Policy = staticmethod(choose)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[str, Reported] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray whenever a replica comes, goes or says something new of itself."""
        self._known = {each.replica_id.unique_id: self._heard(each) for each in replicas}
        self._sent.keep_only(self._known)
        super().update_replicas(replicas)

    def _heard(self, running: RunningReplica) -> Reported:
        name, stats = running.replica_id.unique_id, running.routing_stats
        before = self._known.get(name, Reported())
        if not stats or stats.get("at") == before.stats.get("at"):
            return before
        return Reported(stats, {lane: self._sent.tokens(name, lane) for lane in Lane})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The policy's choice, and after it, for when that is full or gone, the others by their expected wait."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # sleeps between two rounds of all replicas
        route = pending_request.kwargs.get(routes.ROUTE) or Route(RoutedRequest(Lane.INTERACTIVE, 1, 0))
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        if route.replica is not None:
            names = [route.replica] if route.replica in by_name else []
        else:
            names = self._ranked(by_name, route)
        if names:  # before anybody else chooses
            self._sent.went(route, names[0])
        return [[by_name[name]] for name in names]

    def _ranked(self, running: Mapping[str, RunningReplica], route: Route) -> list[str]:
        replicas, work = [self._replica(name, route.task) for name in running], route.work
        if route.home:
            replicas = [replace(each, queued_interactive=0, queued_bulk=0) for each in replicas]
            work = replace(work, lane=Lane.BULK)
        first = self.policy(replicas, work)
        rest = sorted(replicas, key=lambda each: (each.draining, expected_wait(each, work)))
        ranked = ([] if first is None else [first]) + [each for each in rest if each is not first]
        return sorted((each.name for each in ranked), key=lambda name: name in route.tried)

    def _replica(self, name: str, task: Task) -> Replica:
        """As the policy sees it, for a model of a task. What waits for other models counts by the time it takes."""
        known = self._known.get(name, Reported())
        fixed, per_token, batch_tokens = self._fit(known, task)
        queued = {lane: self._queued(name, known, lane, per_token) for lane in Lane}
        answer = self._sent.last_answer(name)
        return Replica(
            name,
            fixed,
            per_token,
            queued[Lane.INTERACTIVE],
            queued[Lane.BULK],
            batch_tokens,
            draining=bool(known.stats.get("draining")),
            since_answer=answer.since(monotonic()),
            rest_of_pass=answer.rest_of_pass,
            overhead_seconds=answer.overhead_seconds,
        )

    def _fit(self, known: Reported, task: Task) -> tuple[float, float, int]:
        """The best that a replica of the same kind has measured. Other work on the machine makes warm-up slower, never
        faster, and what it has measured then would keep requests away for as long as the replica lives."""
        alike = (each.stats for each in self._known.values() if each.stats.get("kind") == known.stats.get("kind"))
        fits = [stats["fits"][task.value] for stats in alike if task.value in stats.get("fits", {})]
        return min(fits, key=lambda fit: fit[0] + fit[1] * COMPARED_TOKENS, default=UNKNOWN_FIT)

    def _queued(self, name: str, known: Reported, lane: Lane, per_token: float) -> int:
        """Tokens: what it said and was sent since; never less than what is sent and not answered."""
        waiting = known.stats.get("queued", {}).get(lane.value, {})
        said = sum(tokens * self._fit(known, Task(task))[1] / per_token for task, tokens in waiting.items())
        sent = self._sent.tokens(name, lane)
        return int(max(sent, said + sent - known.sent_then.get(lane, 0)))
