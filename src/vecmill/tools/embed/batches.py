"""The files and batches API, as far as embedding needs it.

Source: https://platform.openai.com/docs/api-reference/files, https://platform.openai.com/docs/api-reference/batch,
https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import orjson

from vecmill.tools.console import CommandError
from vecmill.tools.embed.requests import ENDPOINT, RequestFile
from vecmill.tools.http_client import HttpClient, NotThere, Unreachable

DIGEST = "vecmill_embed"  # in a batch's metadata: the digest of its requests
PAGE = 100
TRIES = 3  # at a call that must not be made twice

RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
ENDED_EARLY = frozenset({"expired", "cancelled"})

OK = 200
TIMEOUT, TOO_MANY = 408, 429

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteBatch:
    """A batch as the server describes it."""

    id: str
    status: str
    digest: str | None
    """The digest of its requests; None where another program made the batch."""
    input_file: str
    result_files: tuple[str, ...]
    """The output and error files that there are."""
    answered: int
    """Requests that are completed or failed."""
    message: str
    """Why it failed, where it did."""
    cached_tokens: int | None
    """None: the server does not say."""

    @property
    def running(self) -> bool:
        """Whether it is worth polling."""
        return self.status in RUNNING

    @property
    def of_use(self) -> bool:
        """Whether it has results, or will have."""
        if self.status in ENDED_EARLY:
            return bool(self.result_files)
        return self.status not in ("failed", "cancelling")


def batch_of(body: Mapping[str, Any]) -> RemoteBatch:
    """The batch that a JSON object of the API describes.

    Raises:
        CommandError: it is none.
    """
    try:
        counts = body.get("request_counts") or {}
        errors = (body.get("errors") or {}).get("data") or []
        details = (body.get("usage") or {}).get("input_tokens_details") or {}
        return RemoteBatch(
            id=body["id"],
            status=body["status"],
            digest=(body.get("metadata") or {}).get(DIGEST),
            input_file=body["input_file_id"],
            result_files=tuple(
                body[name] for name in ("output_file_id", "error_file_id") if body.get(name) is not None
            ),
            answered=counts.get("completed", 0) + counts.get("failed", 0),
            message="; ".join(str(error.get("message")) for error in errors[:3]),
            cached_tokens=details.get("cached_tokens"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"The server's batch is not one of OpenAI's: {body}") from error


class RemoteBatches:
    """The calls of the API. What an earlier run of the same command left on the server is taken up, not made again."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._batches: dict[str, RemoteBatch] = {}
        self._files: dict[str, str] = {}

    def look_around(self) -> None:
        """List the batches and files that are on the server.

        Raises:
            CommandError: the server has no batches API, or cannot be asked.
        """
        try:
            self._batches = self._find_batches()
            self._files = self._find_files()
        except NotThere as error:
            raise CommandError(
                f"{self._client.base} has no batches API (GET /v1/batches was answered with 404): "
                f"give the --url of a vecmill that has one."
            ) from error

    def take(self, digest: str) -> RemoteBatch | None:
        """The batch of these requests that `look_around` listed; None when asked for it again."""
        return self._batches.pop(digest, None)

    def submit(self, file: RequestFile) -> RemoteBatch:
        """Upload the requests, if they are not there, and have them worked through."""
        name = f"vecmill-embed-{file.digest}.jsonl"
        uploaded = self._files.pop(name, None) or self._once(
            lambda: self._upload(name, file), lambda: self._find_files().get(name)
        )
        return self._once(
            lambda: self._create(uploaded, file.digest),
            lambda: self._find_batches().get(file.digest),
        )

    def batch(self, batch_id: str) -> RemoteBatch:
        """The batch as it is now.

        Raises:
            CommandError: it is gone, or the server is.
        """
        return batch_of(self._client.ask("GET", f"/v1/batches/{batch_id}"))

    def download(self, file_id: str, collect: Callable[[Iterator[bytes]], T]) -> T:
        """Give a file's lines to `collect`, which starts again at the first line where the connection breaks.

        Raises:
            NotThere: the file is gone.
        """
        return self._client.patiently(lambda: collect(self._client.lines(f"/v1/files/{file_id}/content")))

    def delete(self, file_id: str) -> None:
        """Delete a file on the server; it may be gone already."""
        with suppress(NotThere):
            self._client.ask("DELETE", f"/v1/files/{file_id}")

    def _upload(self, name: str, file: RequestFile) -> str:
        with file.path.open("rb") as content:
            uploaded = self._client.ask_once(
                "POST", "/v1/files", data={"purpose": "batch"}, files={"file": (name, content, "application/jsonl")}
            )
        return str(uploaded["id"])

    def _create(self, file_id: str, digest: str) -> RemoteBatch:
        request = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
        return batch_of(self._client.ask_once("POST", "/v1/batches", json={**request, "metadata": {DIGEST: digest}}))

    def _once(self, make: Callable[[], T], find: Callable[[], T | None]) -> T:
        """Make something once: where the connection broke, see whether it was made before trying again."""
        for _ in range(TRIES - 1):
            try:
                return make()
            except Unreachable:
                existing = find()
                if existing is not None:
                    return existing
        return make()

    def _find_batches(self) -> dict[str, RemoteBatch]:
        """The batches of use by the digest of their requests; of several the newest."""
        batches: dict[str, RemoteBatch] = {}
        for batch in map(batch_of, self._pages("/v1/batches")):
            if batch.digest is not None and batch.of_use:
                batches.setdefault(batch.digest, batch)
        return batches

    def _find_files(self) -> dict[str, str]:
        return {
            str(file.get("filename")): str(file["id"])
            for file in self._pages("/v1/files", purpose="batch")
            if file.get("status") != "error"
        }

    def _pages(self, path: str, **query: str | int) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            page = self._client.ask("GET", path, params={"limit": PAGE, **query, **after})
            entries = page.get("data") or []
            yield from entries
            if not page.get("has_more") or not entries:
                return
            after = {"after": entries[-1]["id"]}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text has no vector."""

    status: int | None
    """None: there was no answer."""
    message: str

    @property
    def passing(self) -> bool:
        """True where the server is at fault, not the text: worth another try."""
        return self.status is None or self.status in (TIMEOUT, TOO_MANY) or self.status >= 500


@dataclass(frozen=True, slots=True)
class TextVector:
    """A text's vector."""

    values: bytes
    """Little-endian float32."""
    model: str
    tokens: int
    cached_tokens: int | None
    """None: the server does not say."""


def result_of(line: bytes) -> tuple[int, TextVector | Failure]:
    """A text's index, and what became of it.

    Raises:
        CommandError: it is not a line of the API.
    """
    try:
        entry = orjson.loads(line)
        return int(entry["custom_id"]), _result(entry)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, Base64Error) as error:
        shown = line[:200].decode(errors="replace")
        raise CommandError(f"A line of the results is not one of OpenAI's batches: {shown}") from error


def _result(entry: dict[str, Any]) -> TextVector | Failure:
    response, error = entry.get("response"), entry.get("error")
    if response is not None:
        return answer_of(int(response["status_code"]), response.get("body") or {})
    error = error or {}
    return Failure(None, str(error.get("message") or error.get("code") or "no answer"))


def answer_of(status: int, body: dict[str, Any]) -> TextVector | Failure:
    """What an answer of /v1/embeddings to one text says. KeyError, TypeError, ValueError: it says neither."""
    if status == OK:
        return vector_of(body)
    reason = body.get("error") or body.get("message") or body.get("detail") or body
    return Failure(status, str(reason.get("message", reason) if isinstance(reason, dict) else reason))


def vector_of(body: dict[str, Any]) -> TextVector:
    """The one vector of an answer to /v1/embeddings. KeyError, TypeError, ValueError: it is none."""
    return vectors_of(body)[0]


def vectors_of(body: dict[str, Any]) -> list[TextVector]:
    """The vectors of an answer to /v1/embeddings, in its order; all the tokens are the first one's.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    usage = body.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    none_cached = None if cached is None else 0
    vectors = [
        TextVector(_values(entry["embedding"]), str(body.get("model")), 0, none_cached) for entry in body["data"]
    ]
    vectors[0] = replace(vectors[0], tokens=int(usage.get("prompt_tokens") or 0), cached_tokens=cached)
    return vectors


def _values(embedding: Any) -> bytes:
    """Little-endian float32. TypeError, ValueError: it is no vector of finite numbers."""
    if isinstance(embedding, str):
        values = np.frombuffer(b64decode(embedding, validate=True), "<f4")
    else:  # some servers take no notice of `encoding_format`
        with np.errstate(over="ignore"):  # a value beyond float32 is found below
            values = np.asarray(embedding, "<f4")
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("it is no vector of finite numbers")
    return values.tobytes()
