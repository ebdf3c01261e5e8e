"""Running the server in a process: the socket, the start log, the exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from vecmill import __version__
from vecmill.app import create_app
from vecmill.config import Settings
from vecmill.core.health import Health, Phase
from vecmill.core.types import ModelCard, Task
from vecmill.http.access import is_loopback
from vecmill.http.capabilities import forward_pass
from vecmill.http.services import Services
from vecmill.inference.finish import describe_dimensions
from vecmill.telemetry.logs import configure_logging

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.1  # seconds between looks at the progress of the start
# Seconds that an idle connection stays open: longer than clients keep theirs, or one would send on a connection that is
# just being closed.
KEEP_ALIVE = 75
# Seconds between the device's failure and the end: whoever is just sending a request is told why it fails.
LAST_ANSWERS = 1.0
LINE_EVERY = 15.0  # seconds, at the most, between lines about a stage that goes on


def run_server(settings: Settings) -> int:
    """Serve until stopped; the process's exit code: 0, or 1 where the server could not serve."""
    configure_logging(settings.log.log_format, settings.log.log_level)
    failures: list[str] = []

    def on_failure(reason: str) -> None:
        failures.append(reason)
        if settings.http.exit_on_failure:  # a supervisor can restart the process, not a thread in it
            asyncio.get_running_loop().call_later(LAST_ANSWERS, setattr, server, "should_exit", True)

    app = create_app(settings, on_failure, _freeze)
    try:
        listener = _listen(settings.http.host, settings.http.port)
    except OSError as error:
        logger.error(
            "HOST=%s PORT=%d cannot be bound (%s): stop what uses it or set another PORT.",
            settings.http.host,
            settings.http.port,
            error.strerror,
        )
        return 1
    server = _Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=settings.http.shutdown_seconds,
            server_header=False,
        ),
        app.state.services.jobs.end_following,
    )
    # uvicorn raises the signal that stopped it once more when it is done; a stop that was asked for is no failure.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, frame: None)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(server, listener, app.state.services))
    for reason in failures:
        logger.error(reason)
    return 1 if failures else 0


class _Server(uvicorn.Server):
    """uvicorn's, which waits until every answer has ended: `end_streams` ends those that do not by themselves."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        self._end_streams()
        await super().shutdown(sockets)


def _freeze() -> None:
    """Leave all that is there to stay out of garbage collections.

    One that looks through it takes a quarter of a second, and nobody is answered meanwhile.
    """
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


async def _serve(server: uvicorn.Server, listener: socket.socket, services: Services) -> None:
    address = _address(listener)
    settings = services.settings
    if not is_loopback(settings.http.host) and not settings.access.api_key:
        logger.warning(
            "HOST=%s without API_KEY: everyone who reaches this address may use the server", settings.http.host
        )
    announcing = asyncio.create_task(_announce(services, address))
    await server.serve(sockets=[listener])
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


async def _announce(services: Services, address: str) -> None:
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


def resolved(services: Services) -> dict[str, object]:
    """The configuration as it turned out, for the log."""
    cards = services.inference.cards
    return {
        "models": [{"id": card.id, "revision": card.revision, "dtype": card.dtype} for card in cards],
        "device": cards[0].device,
        "max_batch_tokens": {card.key: forward_pass(services, card.key)["max_batch_tokens"] for card in cards},
    }


def start_table(services: Services, address: str) -> Table:
    """The start log: what is served, on what, and where to look."""
    table = Table(title=f"vecmill {__version__}", title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    cards, settings = services.inference.cards, services.settings
    for card in cards:
        _add_model(table, card, forward_pass(services, card.key), settings.engine.max_batch_size)
    table.add_row("device", cards[0].device)
    if not any(card.task is Task.RERANK for card in cards):
        table.add_row("reranker", "none loaded: cosine of the embedding model, as 0..1")
    limits = settings.inference
    table.add_row(
        "limits",
        f"{limits.max_client_batch_size} texts and {settings.http.max_body_bytes:,} bytes per request, "
        f"{limits.max_concurrent_requests} requests and {limits.max_queued_tokens:,} tokens in progress",
    )
    table.add_row("access", _access(settings))
    table.add_row("state", _state(services))
    if settings.generation.generation_url:
        table.add_row("generation", f"passed through to {settings.generation.generation_url}")
    table.add_row("dashboard", f"{address}/")
    table.add_row("API", f"{address}/docs")
    return table


def _state(services: Services) -> str:
    """What outlives the process, and where."""
    settings, folder = services.settings, services.state()
    where = str(settings.state.state_dir)
    if folder is None or folder.problem is not None:
        return f"nothing is kept: {where} cannot be written"
    if settings.state.redis_url is not None:
        where += ", cache and jobs in Redis"
    elif services.cache() is not None:
        where += f", cache up to {settings.cache.cache_max_bytes / 1e9:.1f} GB (CACHE_MAX_BYTES)"
    return where if services.cache() is not None else f"{where}, no cache (CACHE_MAX_BYTES)"


def _access(settings: Settings) -> str:
    reach = "this machine only" if is_loopback(settings.http.host) else "everyone who reaches it"
    if settings.access.api_key:
        return f"{reach}, with a key of API_KEY ({', '.join(name for name, _ in settings.access.api_key)})"
    return f"{reach}, no keys (API_KEY)"


def _add_model(table: Table, card: ModelCard, costs: dict[str, Any], max_batch_size: int) -> None:
    if card.task is Task.EMBED:
        table.add_row("model", f"{card.id} ({card.family}, {card.pooling} pooling)")
        table.add_row("dimensions", f"{describe_dimensions(card)}; up to {card.max_model_len} tokens per text")
    else:
        table.add_row("reranker", f"{card.id} ({card.family}), up to {card.max_model_len} tokens per document")
    if card.aliases:
        table.add_row("aliases", ", ".join(card.aliases))
    if query := card.prompts.get("query"):
        table.add_row("query prompt", repr(query))
    table.add_row("revision", card.revision)
    table.add_row("dtype", f"{card.dtype}: {card.dtype_reason}")
    table.add_row("weights", f"{card.weight_bytes / 1e9:.2f} GB")
    table.add_row(
        "forward pass",
        f"{costs['fixed_ms']:.1f} ms + {costs['us_per_token']:.1f} µs a token, {costs['best_tokens_per_second']:,.0f} "
        f"tokens/s at best, knee at {costs['knee_tokens']} tokens",
    )
    table.add_row(
        "budget",
        f"{costs['max_batch_tokens']} tokens ({costs['max_batch_tokens_ms']:.0f} ms) in {max_batch_size} rows; "
        f"up to {costs['free_tokens']} bulk rides free with a search",
    )
    table.add_row("layers", costs["compile_reason"], end_section=True)
