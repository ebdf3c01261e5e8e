"""What the routes call, put together by `app` and carried on the application's state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from vecmill.config import Settings
from vecmill.core.health import Health
from vecmill.hardware.memory import DeviceMemory
from vecmill.inference.facade import Inference
from vecmill.jobs.queue import JobQueue
from vecmill.telemetry.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Services:
    """One server's parts, as far as HTTP may see them."""

    settings: Settings
    health: Health
    inference: Inference
    jobs: JobQueue
    telemetry: Telemetry
    threads: ThreadPoolExecutor
    """Tokenizes and encodes, off the event loop."""
    device_memory: Callable[[], DeviceMemory | None]
    device_busy: Callable[[], bool]
    max_batch_tokens: Callable[[], int | None]
    """Tokens per forward pass; None until the device is known."""


def services_of(request: Request) -> Services:
    """The services of the application that serves this request."""
    return cast(Services, request.app.state.services)


ServicesOf = Annotated[Services, Depends(services_of)]
