"""What runs where: the arguments of `serve run vecmill.cluster:build`, and the deployments made of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import click
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig

from vecmill.cluster.front import Front, PlacementNames
from vecmill.cluster.replica import ReplicaServer
from vecmill.config import Settings, load_settings
from vecmill.config.settings import GROUPS
from vecmill.core.errors import StartupError
from vecmill.core.types import Lane, Task
from vecmill.hardware.gpu import nvidia_gpu_present
from vecmill.inference.admission import MOST_WAITING

logger = logging.getLogger(__name__)

ROUTING = {
    "wait": "vecmill.cluster.router.WaitRouter",
    "power_of_two": "vecmill.cluster.router.PowerOfTwo",
    "round_robin": "vecmill.cluster.router.RoundRobin",
}
SMALL = "all-MiniLM-L6-v2"  # of the extra `bundled`
STATS_SECONDS = 1.0  # between two looks at what waits at a replica
HEALTH_SECONDS = 5.0  # between two looks at its health
HEALTH_PATIENCE = 30.0
LEAST_LOOK_BACK_S = 11.0  # Ray takes no less than its 10 seconds between two figures
STOP_SECONDS = 10.0  # for a replica to close, after those that its requests have
ADDRESS = re.compile(r"((redis|rediss)://)?[^\s:/@]+:\d{1,5}(,[^\s:/@]+:\d{1,5})*")


class Placement(BaseModel):
    """Models that are on one card together, on each of some replicas."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("models", pattern=r"^[a-z][a-z0-9-]{0,40}$", description="Of the deployment.")
    settings: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Settings of these replicas, by their names in the environment (EMBED_MODEL, RERANK_MODEL), over "
        "those of the environment and `.env` where `serve` runs.",
    )
    num_gpus: float | None = Field(
        None, ge=0, le=1, description="Of one replica; 0.5: two share a card. Default: 1, on a machine without GPU 0."
    )
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray counts for a replica.")
    replicas: int = Field(1, ge=1, le=1000, description="How many there always are.")
    min_replicas: int | None = Field(None, ge=0, description="With `max_replicas`: scaled by the tokens that wait.")
    max_replicas: int | None = Field(None, ge=1, le=1000, description="The most there may be.")
    max_surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="Upgrade: replicas beyond their number, in percent of it and at least one, so that an old one ends "
        "when a new one is ready. Each needs room of its own, or the upgrade waits for it for ever: a card, CPUs.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas and max_replicas go together; replicas alone is a fixed number")
        if self.min_replicas is not None and self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self

    @property
    def most(self) -> int:
        """The most replicas there may be."""
        return self.max_replicas or self.replicas


class Cluster(Placement):
    """The arguments. Those of a placement, given here, are those of the only one, where `placements` names none."""

    placements: list[Placement] = Field(
        default_factory=list,
        description="The first with an embedding model, and the first with a reranker, have the requests that name "
        "none of another's models.",
    )
    fronts: int = Field(1, ge=1, le=100, description="How many processes look at requests and pass them on.")
    front_cpus: float = Field(0.5, ge=0, description="CPUs that Ray counts for each of them.")
    routing: Literal["wait", "power_of_two", "round_robin"] = Field("wait", description="Others are for comparison.")
    queue_seconds: float = Field(
        5.0, gt=0, description="Scaling: more replicas where what waits takes them longer than this."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="Scaling: how long that must be so.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Scaling: how long fewer must be enough.")

    @property
    def all(self) -> list[Placement]:
        """The placements."""
        return self.placements or [Placement(**{name: getattr(self, name) for name in Placement.model_fields})]


def build(args: dict[str, Any]) -> Application:
    """The application; `args` as of `Cluster`.

    Raises:
        click.ClickException: it could not run; one sentence with the cure.
    """
    try:
        cluster = _read(args)
        check_redis_of_head(os.environ)
        placed = [(placement, _settings_of(placement)) for placement in cluster.all]
        for check in CHECKS:
            check(cluster, placed)
    except StartupError as error:
        raise click.ClickException(error.message) from None
    _warn(placed)
    return _application(cluster, placed)


Placed = Sequence[tuple[Placement, Settings]]


def _read(args: Mapping[str, Any]) -> Cluster:
    try:
        return Cluster.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = f"is no argument; there are {', '.join(Cluster.model_fields)}"
        raise StartupError(f"{name or 'The arguments'}: {problem}.") from None


def _settings_of(placement: Placement) -> Settings:
    known = {name for group in GROUPS for name in group.model_fields}
    given = {name.lower(): value for name, value in placement.settings.items()}
    for name in placement.settings:
        if name.lower() not in known:
            raise StartupError(f"{name}, in the settings of the placement `{placement.name}`, is no setting.")
    if _for_reranking(placement):
        given["embed_model"] = SMALL  # a server always has an embedding model
    settings = load_settings({name: str(value) for name, value in given.items()})
    device = settings.engine.device
    if re.fullmatch(r"cuda:\d+", device):
        raise StartupError(f"DEVICE={device} names a card, but Ray gives each replica its own: set DEVICE=cuda.")
    return settings


def _gpus(placement: Placement, settings: Settings) -> float:
    if placement.num_gpus is not None:
        return placement.num_gpus
    if settings.engine.device in ("cpu", "mps"):
        return 0
    if settings.engine.device == "cuda":
        return 1
    if ray.is_initialized():
        return 1 if ray.cluster_resources().get("GPU") else 0
    return int(nvidia_gpu_present())


def _names_are_their_own(cluster: Cluster, placed: Placed) -> None:
    names = [placement.name for placement, _ in placed]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise StartupError(f"Two placements are named `{twice}`: give each a name of its own.")
    if "front" in names:
        raise StartupError("`front` is the name of what passes requests on: give the placement another.")


def _replicas_share_a_card(cluster: Cluster, placed: Placed) -> None:
    for placement, settings in placed:
        gpus, share = _gpus(placement, settings), settings.engine.memory_fraction
        if 0 < gpus < 1 and share > gpus:
            raise StartupError(
                f"num_gpus={gpus:g} of the placement `{placement.name}` puts several replicas on a card, but each may "
                f"take MEMORY_FRACTION={share:g} of its memory: set MEMORY_FRACTION to {gpus:g} or less."
            )


def _gpu_without_gpu(cluster: Cluster, placed: Placed) -> None:
    for placement, settings in placed:
        if settings.engine.device == "cuda" and placement.num_gpus == 0:
            raise StartupError(
                f"DEVICE=cuda, but num_gpus=0 lets the placement `{placement.name}` see no card: set num_gpus=1."
            )


CHECKS: tuple[Callable[[Cluster, Placed], None], ...] = (
    _names_are_their_own,
    _replicas_share_a_card,
    _gpu_without_gpu,
)


def check_redis_of_head(environ: Mapping[str, str]) -> None:
    """RAY_REDIS_ADDRESS, by which a cluster outlives its head node, is one that Ray reads.

    Raises:
        StartupError: it is none. The value is not repeated: it may hold a password.
    """
    address = environ.get("RAY_REDIS_ADDRESS")
    if address is not None and not ADDRESS.fullmatch(address):
        raise StartupError(
            "RAY_REDIS_ADDRESS is no address of a Redis: write host:port, and the password, if any, into "
            "RAY_REDIS_PASSWORD, in the environment of `ray start --head`."
        )


def _warn(placed: Placed) -> None:
    if placed[0][1].state.redis_url is None and (len(placed) > 1 or placed[0][0].most > 1):
        logger.warning(
            "REDIS_URL is not set: cached vectors are each replica's own, and jobs, files and batches are on one "
            "replica of the first placement, and are gone where that moves to another machine."
        )


def _application(cluster: Cluster, placed: Placed) -> Application:
    replicas = {placement.name: _deployment(cluster, placement, settings) for placement, settings in placed}
    names = [_names_of(placement, settings) for placement, settings in placed]
    settings = placed[0][1]
    most = sum(_most_ongoing(settings) * placement.most for placement, settings in placed)
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front",
        num_replicas=cluster.fronts,
        max_ongoing_requests=most,
        ray_actor_options={"num_cpus": cluster.front_cpus},
        graceful_shutdown_timeout_s=settings.http.shutdown_seconds + STOP_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
    )
    return front.bind(settings, names, replicas)


def _deployment(cluster: Cluster, placement: Placement, settings: Settings) -> Application:
    return (
        serve.deployment(ReplicaServer)
        .options(
            name=placement.name,
            **_numbers(cluster, placement),
            max_surge_percent=placement.max_surge_percent,
            # The server itself says when it is full, in the words of each dialect. Ray's limits are beyond that.
            max_ongoing_requests=_most_ongoing(settings),
            max_queued_requests=_most_ongoing(settings),
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
            ray_actor_options={"num_gpus": _gpus(placement, settings), "num_cpus": placement.num_cpus},
            health_check_period_s=HEALTH_SECONDS,
            health_check_timeout_s=HEALTH_PATIENCE,
            graceful_shutdown_timeout_s=settings.http.shutdown_seconds + STOP_SECONDS,
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTING[cluster.routing], request_routing_stats_period_s=STATS_SECONDS
            ),
        )
        .bind(settings)
    )


def _numbers(cluster: Cluster, placement: Placement) -> dict[str, Any]:
    if placement.min_replicas is None or placement.max_replicas is None:
        return {"num_replicas": placement.replicas}
    policy = AutoscalingPolicy(
        policy_function="vecmill.cluster.scaling:QueuedTokens", policy_kwargs={"seconds": cluster.queue_seconds}
    )
    scaling = AutoscalingConfig(
        min_replicas=placement.min_replicas,
        max_replicas=placement.max_replicas,
        upscale_delay_s=cluster.upscale_delay_s,
        downscale_delay_s=cluster.downscale_delay_s,
        look_back_period_s=max(LEAST_LOOK_BACK_S, min(30.0, cluster.upscale_delay_s)),
        policy=policy,
    )
    return {"autoscaling_config": scaling}


def _most_ongoing(settings: Settings) -> int:
    """Requests that one replica can have: those in progress, those that wait for room, and that many that only read."""
    return 2 * (settings.inference.max_concurrent_requests + MOST_WAITING * len(Lane))


def _names_of(placement: Placement, settings: Settings) -> PlacementNames:
    models = settings.model
    tasks = {Task.EMBED, Task.RERANK} - ({Task.RERANK} if models.rerank_model == ("none",) else set())
    if _for_reranking(placement):
        tasks = {Task.RERANK}
    named = (*models.embed_model, *models.rerank_model, *(alias for alias, _ in models.model_aliases))
    names = frozenset(name.lower() for name in named if name not in ("auto", "none"))
    return PlacementNames(placement.name, frozenset(tasks), names, always=placement.min_replicas != 0)


def _for_reranking(placement: Placement) -> bool:
    """Whether a placement names a reranker and no embedding model."""
    given = {name.lower(): value for name, value in placement.settings.items()}
    return given.get("rerank_model", "none") != "none" and "embed_model" not in given
