"""/cache: what is kept of vectors that were computed, and forgetting it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request

from vecmill.core.errors import NotAllowed, StateUnavailable
from vecmill.http.services import Services, ServicesOf
from vecmill.storage.errors import StoreFailed

logger = logging.getLogger(__name__)

router = APIRouter(tags=["Cache"])


def cache_facts(services: Services) -> dict[str, Any] | None:
    """How full the cache is and what it was good for; None where there is none."""
    cache = services.cache()
    if cache is None:
        return None
    rolling = services.telemetry.rolling
    return {
        "entries": cache.size.entries,
        "bytes": cache.size.bytes,
        "max_bytes": services.settings.cache.cache_max_bytes if services.settings.state.redis_url is None else None,
        "hits": rolling.cached_texts,
        "hit_tokens": rolling.cached_tokens,
        "written": cache.stats.written,
        "dropped": cache.stats.dropped,
        "lost": cache.stats.lost,
        "failing": cache.failing,
    }


@router.get("/cache", summary="Cache statistics")
async def get_cache(services: ServicesOf) -> dict[str, Any]:
    """Entries and bytes kept; hits, entries written, dropped and lost since the start."""
    return {"enabled": services.cache() is not None, **(cache_facts(services) or {})}


@router.delete("/cache", summary="Empty the cache")
async def delete_cache(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Forget every vector; needs ADMIN_API_KEY where there are keys."""
    if not getattr(request.state, "admin", False):
        raise NotAllowed("DELETE /cache is for the holder of ADMIN_API_KEY: set it, and send it as the API key.")
    cache = services.cache()
    if cache is None:
        return {"deleted": 0}
    try:
        return {"deleted": await asyncio.to_thread(cache.clear)}
    except StoreFailed as error:
        logger.error("the cache cannot be emptied (%s)", error)
        raise StateUnavailable("503: the cache is temporarily unavailable; the log says why. Try again.") from None
