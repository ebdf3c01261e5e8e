"""The files and batches API, as far as embedding needs it.

Source: https://platform.openai.com/docs/api-reference/files, https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from vecmill.tools.embed.client import Client, Unreachable
from vecmill.tools.embed.errors import EmbedError, NotThere
from vecmill.tools.embed.requests import ENDPOINT, RequestFile

DIGEST = "vecmill_embed"  # in a batch's metadata: the digest of its requests
PAGE = 100
TRIES = 3  # at a call that must not be made twice

RUNNING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
ENDED_EARLY = frozenset({"expired", "cancelled"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as the server describes it."""

    id: str
    status: str
    digest: str | None
    """Of its requests; None: somebody else's."""
    input_file: str
    result_files: tuple[str, ...]
    """The output and error files that there are."""
    answered: int
    """Requests, whether or not they failed."""
    message: str
    """Why it failed, where it did."""
    cached_tokens: int | None
    """None: the server does not say."""

    @property
    def running(self) -> bool:
        """Worth polling."""
        return self.status in RUNNING

    @property
    def of_use(self) -> bool:
        """It has results, or will have."""
        if self.status in ENDED_EARLY:
            return bool(self.result_files)
        return self.status not in ("failed", "cancelling")


def batch_of(found: Mapping[str, Any]) -> Batch:
    """From the API's object.

    Raises:
        EmbedError: it is none.
    """
    try:
        counts = found.get("request_counts") or {}
        errors = (found.get("errors") or {}).get("data") or []
        details = (found.get("usage") or {}).get("input_tokens_details") or {}
        return Batch(
            id=found["id"],
            status=found["status"],
            digest=(found.get("metadata") or {}).get(DIGEST),
            input_file=found["input_file_id"],
            result_files=tuple(
                found[name] for name in ("output_file_id", "error_file_id") if found.get(name) is not None
            ),
            answered=counts.get("completed", 0) + counts.get("failed", 0),
            message="; ".join(str(error.get("message")) for error in errors[:3]),
            cached_tokens=details.get("cached_tokens"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise EmbedError(f"The server's batch is not one of OpenAI's: {found}") from error


class Batches:
    """The calls. What an earlier run of the same command has left on the server is found, not made again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._batches: dict[str, Batch] = {}
        self._files: dict[str, str] = {}

    def look_around(self) -> None:
        """Find what there is.

        Raises:
            EmbedError: the server has no batches API, or cannot be asked.
        """
        try:
            self._batches = self._find_batches()
            self._files = self._find_files()
        except NotThere as error:
            raise EmbedError(
                f"{self._client.base} has no batches API (GET /v1/batches was answered with 404): "
                f"give the --url of a vecmill that has one."
            ) from error

    def take(self, digest: str) -> Batch | None:
        """The batch of these requests that was found, the first time it is asked for."""
        return self._batches.pop(digest, None)

    def submit(self, file: RequestFile) -> Batch:
        """Upload the requests, if they are not there, and have them worked through."""
        name = f"vecmill-embed-{file.digest}.jsonl"
        uploaded = self._files.pop(name, None) or self._once(
            lambda: self._upload(name, file), lambda: self._find_files().get(name)
        )
        return self._once(
            lambda: self._create(uploaded, file.digest),
            lambda: self._find_batches().get(file.digest),
        )

    def batch(self, batch_id: str) -> Batch:
        """How far it is.

        Raises:
            EmbedError: it is gone, or the server is.
        """
        return batch_of(self._client.ask("GET", f"/v1/batches/{batch_id}"))

    def download(self, file_id: str, collect: Callable[[Iterator[bytes]], T]) -> T:
        """Hand a file's lines to `collect`, from the first again where the connection breaks.

        Raises:
            NotThere: the file is gone.
        """
        return self._client.patiently(lambda: collect(self._client.lines(f"/v1/files/{file_id}/content")))

    def delete(self, file_id: str) -> None:
        """Free the server of a file; it may be gone already."""
        with suppress(NotThere):
            self._client.ask("DELETE", f"/v1/files/{file_id}")

    def _upload(self, name: str, file: RequestFile) -> str:
        with file.path.open("rb") as content:
            found = self._client.ask_once(
                "POST", "/v1/files", data={"purpose": "batch"}, files={"file": (name, content, "application/jsonl")}
            )
        return str(found["id"])

    def _create(self, file_id: str, digest: str) -> Batch:
        asked = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
        return batch_of(self._client.ask_once("POST", "/v1/batches", json={**asked, "metadata": {DIGEST: digest}}))

    def _once(self, make: Callable[[], T], find: Callable[[], T | None]) -> T:
        """Make it; where the connection broke, see whether it was made."""
        for _ in range(TRIES - 1):
            try:
                return make()
            except Unreachable:
                found = find()
                if found is not None:
                    return found
        return make()

    def _find_batches(self) -> dict[str, Batch]:
        """Those of use that have a digest, by it; of several the newest."""
        found: dict[str, Batch] = {}
        for batch in map(batch_of, self._pages("/v1/batches")):
            if batch.digest is not None and batch.of_use:
                found.setdefault(batch.digest, batch)
        return found

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
