"""What the routes call, put together by `app` and carried on the application's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated, cast

from fastapi import Depends, Request

from vecmill.batches.service import BatchService
from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.config import Settings
from vecmill.core.calibration import Warmed
from vecmill.core.health import Health
from vecmill.core.threads import WorkerThreads
from vecmill.hardware.monitor import Look
from vecmill.http.generation import Generation
from vecmill.inference.catalogue import Catalogue
from vecmill.inference.facade import Inference
from vecmill.jobs.queue import JobQueue
from vecmill.storage.state_folder import StateFolder
from vecmill.telemetry.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Services:
    """One server's parts, as far as HTTP may see them."""

    settings: Settings
    health: Health
    inference: Inference
    jobs: JobQueue
    batches: BatchService
    replica: str
    """The name of this server among its replicas."""
    cache: Callable[[], EmbeddingCache | None]
    """None where nothing is cached."""
    state: Callable[[], StateFolder | None]
    kept: Callable[[], Mapping[str, str | None]]
    """Why the jobs, the cache and the batches are not kept now, by their names; None where they are."""
    generation: Generation | None
    """None without GENERATION_URL."""
    telemetry: Telemetry
    threads: WorkerThreads
    """Parse, tokenize and encode, off the event loop."""
    gpu: Callable[[], Look]
    """What the monitor saw of the GPU. No route asks a driver itself: one that hangs would hold up the event loop."""
    gpu_in_use: Callable[[], bool]
    """Whether the models are on a GPU; false while loading."""
    hung: Callable[[], str | None]
    """Why the device is taken for hung; None while it gets on."""
    device_busy: Callable[[], bool]
    several_keys: Callable[[], bool]
    """Whether more than one API key opens the server now."""
    keys_in_use: Callable[[], bool]
    """Whether there are API keys."""
    key_name: Callable[[str | None], str | None]
    """What people know an owner's key by; None where there are no keys."""
    warmed: Callable[[], Mapping[str, Warmed]]
    """What warm-up found out about each model, by its key; empty while loading."""
    catalogue: Callable[[], Catalogue | None]
    """The models that can be loaded; None while the server starts."""


def services_of(request: Request) -> Services:
    """The services of the application that serves this request."""
    return cast(Services, request.app.state.services)


def shows_work_of_all(request: Request) -> bool:
    """Whether a request may be told what had to be computed, by counts and by times.

    With several keys and a common cache that would tell whether another key's texts are the same.
    """
    services = services_of(request)
    hidden = services.settings.cache.cache_across_keys and services.several_keys()
    return request.state.viewer.everything or not hidden


def address_of(request: Request) -> str:
    """The address that a request came from; empty where it is not known."""
    return _address(request.client.host) if request.client else ""


@lru_cache(maxsize=4096)
def _address(host: str) -> str:
    """One client has one address, also where the server listens to both families."""
    try:
        mapped = getattr(ip_address(host), "ipv4_mapped", None)
    except ValueError:
        return host
    return str(mapped or host)


async def _services(request: Request) -> Services:
    return services_of(request)


ServicesOf = Annotated[Services, Depends(_services)]
