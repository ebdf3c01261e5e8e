"""How far the start is, then the start log."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vecmill.core.health import Health, Phase
from vecmill.http.services import Services
from vecmill.serve.start_log import resolved, start_table

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1  # seconds between looks at the progress of the start
LINE_EVERY = 15.0  # seconds, at the most, between lines about a stage that goes on


async def announce(services: Services, address: str) -> None:
    """Progress while loading, then the start log."""
    console = Console(stderr=True)
    logger.info("listening on %s, loading models", address)
    if console.is_terminal and services.settings.log.log_format == "text":
        await _progress_bar(services.health, console)
    else:
        await _progress_lines(services.health)
    if not services.health.ready:
        return
    if services.settings.log.log_format == "text":
        console.print(start_table(services, address))
    logger.info("ready on %s", address, extra={} if console.is_terminal else resolved(services))


async def _progress_bar(health: Health, console: Console) -> None:
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} % {task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=100)
        while (snapshot := health.snapshot())[0] is Phase.LOADING:
            progress.update(task, completed=snapshot[1], description=snapshot[2])
            await asyncio.sleep(LOOK_EVERY)


async def _progress_lines(health: Health) -> None:
    """A line for each stage, each tenth of the way, and each quarter of a minute in which something moved."""
    stage, percent, message, shown_at = "", 0.0, "", 0.0
    while (snapshot := health.snapshot())[0] is Phase.LOADING:
        new_stage = snapshot[2].partition(":")[0]
        moved = snapshot[2] != message and monotonic() - shown_at > LINE_EVERY
        if new_stage != stage or snapshot[1] >= percent + 10 or moved:
            stage, percent, message, shown_at = new_stage, snapshot[1], snapshot[2], monotonic()
            logger.info("starting: %3.0f %% %s", percent, message)
        await asyncio.sleep(LOOK_EVERY)
