"""How far the start is, then what is served, on what, and where to look."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from vecmill import __version__
from vecmill.config import Settings
from vecmill.core.health import Health, Phase
from vecmill.core.types import ModelCard, Task
from vecmill.http.access import is_loopback
from vecmill.http.capabilities import forward_pass
from vecmill.http.services import Services
from vecmill.inference.residency import ModelState
from vecmill.inference.vectors import describe_dimensions
from vecmill.scheduler.policy import Budget


def served(services: Services) -> list[str]:
    """A sentence for each model: what it is and how it runs."""
    return [
        _served(card, services.inference.budgets.get(card.key), is_loading=is_loading(services, card))
        for card in services.inference.cards
    ]


def is_loading(services: Services, card: ModelCard) -> bool:
    """Whether a model is being loaded now, or waits for its turn."""
    residency = services.inference.residency
    return residency is not None and residency.residents[card.key].state is ModelState.LOADING


def _served(card: ModelCard, budget: Budget | None, *, is_loading: bool) -> str:
    what = "embeds" if card.task is Task.EMBED else "reranks"
    if is_loading:
        return f"{card.id} (revision {card.revision}) {what} as soon as it is loaded"
    if budget is None:
        return f"{card.id} (revision {card.revision}) {what} once a request names it: it is loaded on demand"
    return (
        f"{card.id} (revision {card.revision}) {what} on {card.device} in {card.dtype}, in forward passes of up to "
        f"{budget.max_batch_tokens} tokens"
    )


def start_table(services: Services, address: str) -> Table:
    """The start log: what is served, on what, and where to look."""
    table = Table(title=f"vecmill {__version__}", title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    cards, settings = services.inference.cards, services.settings
    for card in cards:
        if (budget := services.inference.budgets.get(card.key)) is not None:
            _add_model(table, card, forward_pass(services, card.key), budget.max_batch_size)
        elif is_loading(services, card):
            table.add_row("loading", card.id)
        else:
            table.add_row("on demand", f"{card.id}, when a request names it (MAX_LOADED_GB)")
    table.add_row("device", cards[0].device)
    if not any(card.task is Task.RERANK for card in cards):
        how = {"cosine": "cosine", "dot": "dot product"}.get(cards[0].similarity, f"{cards[0].similarity} distance")
        table.add_row("reranker", f"none loaded: {how} of the embedding model, as 0..1")
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
        return f"{reach}, with a key ({', '.join(entry.name for entry in settings.access.api_key)})"
    return f"{reach}, no keys (API_KEY)"


def _add_model(table: Table, card: ModelCard, costs: dict[str, Any], max_batch_size: int) -> None:
    if card.task is Task.EMBED:
        table.add_row("model", f"{card.id} ({card.family}, {card.pooling} pooling)")
        table.add_row("dimensions", f"{describe_dimensions(card)}; up to {card.max_model_len} tokens per text")
    else:
        table.add_row("reranker", f"{card.id} ({card.family}), up to {card.max_model_len} tokens per document")
    if card.aliases:
        table.add_row("aliases", ", ".join(card.aliases))
    default = None if card.default_prompt_name is None else card.prompts.get(card.default_prompt_name, "")
    source = f"(from the model's {card.prompts_from})"
    if card.task is Task.RERANK and default is not None:
        table.add_row("instruction", f"{default!r} {source}")
    elif query := card.prompts.get("query"):
        table.add_row("query prompt", f"{query!r} {source}")
    if card.task is Task.EMBED and default is not None:
        table.add_row("default prompt", f"{default!r}, {card.default_prompt_name}, for plain requests {source}")
    table.add_row("revision", card.revision)
    table.add_row("dtype", f"{card.dtype}: {card.dtype_reason}")
    if card.numerics is not None:
        table.add_row("deterministic", f"the same bits whatever else is in a batch ({card.numerics})")
    table.add_row("weights", f"{card.weight_bytes / 1e9:.2f} GB")
    table.add_row(
        "forward pass",
        f"{costs['fixed_ms']:.1f} ms + {costs['us_per_token']:.1f} µs a token, {costs['best_tokens_per_second']:,.0f} "
        f"tokens/s at best, knee at {costs['knee_tokens']} tokens",
    )
    table.add_row(
        "budget",
        f"{costs['max_batch_tokens']} tokens ({costs['max_batch_tokens_ms']:.0f} ms) in {max_batch_size} rows; "
        + (
            f"bulk fills a search's pass up to {costs['free_tokens']} tokens"
            if costs["free_tokens"]
            else "a search goes first"
        ),
    )
    graphs = costs["cuda_graphs"]
    table.add_row("layers", costs["compile_reason"], end_section=not graphs["count"])
    if graphs["count"]:
        in_graphs = f"{graphs['count']}, for up to {graphs['max_tokens']} tokens, {graphs['memory_mb']} MB"
        table.add_row("CUDA graphs", in_graphs, end_section=True)


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
    if not console.is_terminal:
        for sentence in served(services):
            logger.info(sentence)
    logger.info("ready on %s", address)


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
