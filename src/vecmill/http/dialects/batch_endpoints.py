"""Which endpoints batches may have: what answers their lines is what answers the routes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal, get_args

from vecmill.batches.endpoint import Endpoint
from vecmill.config import InferenceSettings
from vecmill.core.threads import WorkerThreads
from vecmill.http.dialects.batch_embeddings import EmbeddingsEndpoint
from vecmill.http.dialects.batch_rerank import RerankEndpoint
from vecmill.http.dialects.line_requests import LARGEST_SHARE
from vecmill.inference.facade import Inference

EndpointName = Literal["/v1/embeddings", "/v1/rerank"]


def batch_endpoints(
    inference: Inference, threads: WorkerThreads, settings: InferenceSettings
) -> Mapping[str, Endpoint]:
    """The endpoints of one server, by path."""
    places = asyncio.Semaphore(max(1, settings.max_concurrent_requests // LARGEST_SHARE))
    found: dict[str, Endpoint] = {
        "/v1/embeddings": EmbeddingsEndpoint(inference, threads, places, settings.max_client_batch_size),
        "/v1/rerank": RerankEndpoint(inference, threads, places, settings.max_client_batch_size),
    }
    assert set(found) == set(get_args(EndpointName))
    return found
