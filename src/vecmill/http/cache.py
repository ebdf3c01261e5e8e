"""/cache: what is kept of vectors that were computed, and forgetting it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request

from vecmill.core.errors import NotAllowed, StateUnavailable
from vecmill.core.protocols import StoreFailed
from vecmill.http.caller import ViewerOf
from vecmill.http.services import Services, ServicesOf, shows_work_of_all

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
async def get_cache(request: Request, services: ServicesOf) -> dict[str, Any]:
    """Entries and bytes kept; hits, entries written, dropped and lost since the start.

    With several keys and a common cache the counts are for the scope `admin`: they tell of other keys' texts.
    """
    counts = cache_facts(services) if shows_work_of_all(request) else None
    return {"enabled": services.cache() is not None, **(counts or {})}


@router.delete("/cache", summary="Empty the cache")
async def delete_cache(services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Forget every vector; needs a key with the scope `admin` where there are keys."""
    if not viewer.everything:
        raise NotAllowed("DELETE /cache is for keys with the scope `admin`: send such a key, or that of ADMIN_API_KEY.")
    cache = services.cache()
    if cache is None:
        return {"deleted": 0}
    try:
        return {"deleted": await asyncio.to_thread(cache.clear)}
    except StoreFailed as error:
        logger.error("the cache cannot be emptied (%s)", error)
        raise StateUnavailable("503: the cache is temporarily unavailable; the log says why. Try again.") from None
