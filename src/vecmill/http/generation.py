"""The server at GENERATION_URL (vLLM, Ollama): its client, its models, its state.

Both answer GET /v1/models, POST /v1/completions and POST /v1/chat/completions as OpenAI does.
Sources: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/ and
https://github.com/ollama/ollama/blob/main/docs/api/openai-compatibility.mdx.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import monotonic
from typing import Any

import httpx2

from vecmill import __version__
from vecmill.config import GenerationSettings
from vecmill.core.errors import GenerationTimeout, GenerationUnavailable, Overloaded, VecmillError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
# Seconds that a request waits where MAX_CONCURRENT_REQUESTS are with the generation server.
FREE_CONNECTION_SECONDS = 1.0
# Seconds that an idle connection is kept. vLLM closes its own after 5, and a request that is sent just then breaks.
KEEP_ALIVE_SECONDS = 2.0
LOOK_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class GenerationState:
    """What the generation server answered when it was last asked."""

    ok: bool
    message: str
    models: tuple[dict[str, Any], ...] = ()
    """As it describes them."""


class Generation:
    """One client of one generation server, which is looked at when somebody asks for its models or state."""

    def __init__(self, settings: GenerationSettings, max_connections: int) -> None:
        """`settings.generation_url` is set."""
        self._settings = settings
        self._max_connections = max_connections
        self.url = settings.generation_url or ""
        # By it a request is recognised that comes back because GENERATION_URL leads here (RFC 9110, section 7.6.3).
        self._via = f"1.1 vecmill-{secrets.token_hex(4)}"
        self._client: httpx2.AsyncClient | None = None
        self._state = GenerationState(False, "not asked yet")
        self._looked_at = -LOOK_AGAIN_SECONDS
        self._look: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Make the client."""
        key = self._settings.generation_api_key
        self._client = httpx2.AsyncClient(
            headers={
                # Bytes pass through as they come; a compressed stream would be held back by whoever compresses.
                "Accept-Encoding": "identity",
                "User-Agent": f"vecmill/{__version__}",
                **({"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}),
            },
            timeout=httpx2.Timeout(
                self._settings.generation_timeout, connect=CONNECT_SECONDS, pool=FREE_CONNECTION_SECONDS
            ),
            limits=httpx2.Limits(max_connections=self._max_connections, keepalive_expiry=KEEP_ALIVE_SECONDS),
            follow_redirects=False,
            # HTTP_PROXY, which hub downloads may need, would send prompts elsewhere; ~/.netrc would add credentials.
            trust_env=False,
            # SSL_CERT_FILE alone stays: a private authority is a reason to trust, not a way around.
            verify=httpx2.create_ssl_context(),
            # A cookie set for one client's request would be sent with the next one's.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    async def close(self) -> None:
        """Close every connection."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def post(self, path: str, headers: Mapping[str, str], body: AsyncIterable[bytes]) -> httpx2.Response:
        """Send a request; its answer, the body unread, for the caller to close. `path` is fixed, never a client's.

        Raises:
            GenerationUnavailable, GenerationTimeout, Overloaded: there is no answer. And whatever `body` raises.
        """
        via = headers.get("via", "")
        if self._via in via:
            raise GenerationUnavailable("GENERATION_URL leads back to this server; it must name another one.")
        sent = {**headers, "via": f"{via}, {self._via}" if via else self._via}
        try:
            request = self._open_client.build_request("POST", self.url + path, headers=sent, content=body)
            return await self._open_client.send(request, stream=True)
        except httpx2.RequestError as error:
            raise self.failure(error) from error

    @property
    def _open_client(self) -> httpx2.AsyncClient:
        assert self._client is not None, "open() comes first"
        return self._client

    def failure(self, error: httpx2.RequestError) -> VecmillError:
        """What broke, for the client; the log gets its kind."""
        kind = type(error).__name__
        logger.warning("the generation server gave no answer", extra={"url": self.url, "error": kind})
        server = f"the generation server at {self.url} (GENERATION_URL)"
        match error:
            case httpx2.PoolTimeout():
                return Overloaded(
                    f"The server is temporarily overloaded: {self._max_connections} requests (MAX_CONCURRENT_REQUESTS) "
                    f"are with {server} already."
                )
            case httpx2.ConnectTimeout():
                return GenerationTimeout(f"timeout: {server} took no connection within {CONNECT_SECONDS:g} s.")
            case httpx2.TimeoutException():
                seconds = self._settings.generation_timeout
                return GenerationTimeout(f"timeout: {server} sent nothing for {seconds:g} s (GENERATION_TIMEOUT).")
            case httpx2.ConnectError():
                return GenerationUnavailable(f"502: {server} cannot be reached; is it running?")
        return GenerationUnavailable(f"502: {server} broke the connection ({kind}); try again.")

    async def models(self) -> tuple[dict[str, Any], ...]:
        """Its models, as it describes them; none while it does not answer. Takes LOOK_SECONDS at the most."""
        return (await self.state(LOOK_SECONDS)).models

    async def state(self, patience: float) -> GenerationState:
        """What the last look found; one that is too old is repeated, and waited for `patience` seconds."""
        idle = self._look is None or self._look.done()
        if idle and monotonic() - self._looked_at >= LOOK_AGAIN_SECONDS:
            self._look = asyncio.create_task(self._look_again(), name="look at the generation server")
        if self._look is not None:
            await asyncio.wait({self._look}, timeout=patience)
        return self._state

    async def _look_again(self) -> None:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                response = await self._open_client.get(self.url + "/v1/models", headers={"via": self._via})
            state = _read(response)
        except TimeoutError:
            state = GenerationState(False, f"no answer within {LOOK_SECONDS:g} s")
        except httpx2.RequestError as error:
            state = GenerationState(False, f"cannot be reached: {type(error).__name__}")
        except Exception as error:  # whatever it answers with, the next look may find it well
            logger.warning("the generation server's answer cannot be read", exc_info=error)
            state = GenerationState(False, f"cannot be read: {type(error).__name__}")
        if (state.ok, state.message) != (self._state.ok, self._state.message):
            level = logging.INFO if state.ok else logging.WARNING
            logger.log(level, "generation server: %s", state.message, extra={"url": self.url})
        self._state, self._looked_at = state, monotonic()


def _read(response: httpx2.Response) -> GenerationState:
    status = response.status_code
    if status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
        return GenerationState(False, f"GET /v1/models answers {status}: set GENERATION_API_KEY to a key it takes")
    if status != httpx2.codes.OK:
        return GenerationState(False, f"GET /v1/models answers {status}")
    try:
        listed = response.json()["data"] or []  # Ollama without models: null
        return GenerationState(True, "ok", tuple(model for model in listed if isinstance(model["id"], str)))
    except (ValueError, LookupError, TypeError):
        return GenerationState(False, "GET /v1/models answers with no list of models")
