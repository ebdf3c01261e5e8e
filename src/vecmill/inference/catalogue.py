"""The models that an admin can have loaded, unloaded and fetched, by name.

They are those of the settings, those that lie whole in the hub's cache, and those that are fetched into it from here. A
name is looked up among them and never becomes a path, and nothing is fetched but by a hub id.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vecmill.core.errors import InvalidInput, ModelConflict, ModelNotFound, StartupError
from vecmill.core.own_python import OWN_PYTHON
from vecmill.core.types import ModelCard, Task
from vecmill.inference.residency import ModelEvent, ModelState, Residency, Resident, after

logger = logging.getLogger(__name__)

# The hub's rule for ids (huggingface_hub.utils.validate_repo_id); a revision is a branch, a tag, a commit or refs/pr/N.
HUB_ID = re.compile(r"(?=.{3,96}\Z)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
REVISION = re.compile(r"(?=.{1,200}\Z)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
FORBIDDEN = ("..", "--")
LONGEST_PULL = 12 * 3600.0  # seconds
LONGEST_LINE = 65_536  # bytes, of the fetching process's progress
MOST_LISTED = 200  # of the hub's cache
ENDED_PULLS = 16  # that failed, remembered to be shown
INVALID_ID = "must be a hub id, `owner/name`: letters, digits, `-`, `_` and `.`"


@dataclass(frozen=True, slots=True)
class Cached:
    """A model that lies whole in the hub's cache."""

    card: ModelCard
    weight_bytes: int


FindCached = Callable[[str, str | None, Task | None], Awaitable[Cached | None]]
"""By hub id and revision; None where it is not there. `task`: None leaves it to its files. May raise StartupError."""


@dataclass(slots=True)
class Pull:
    """A download from the hub."""

    model: str
    revision: str | None
    state: ModelState = ModelState.PULLING
    percent: float = 0.0
    message: str = "asking the hub"


class Catalogue:
    """Finds what an admin names. Belongs to the event loop's thread."""

    def __init__(
        self,
        residency: Residency,
        find_cached: FindCached,
        list_cached: Callable[[], Awaitable[Sequence[str]]],
        hf_token: str | None = None,
    ) -> None:
        self._residency = residency
        self._find_cached, self._list_cached = find_cached, list_cached
        self._hf_token = hf_token
        self._pulls: dict[str, Pull] = {}
        self._pulling: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Resident]:
        """All that are listed, those of the settings first."""
        yield from self._residency.residents.values()

    @property
    def pulls(self) -> Sequence[Pull]:
        """Downloads that go on or have failed, of models that are not listed."""
        listed = {resident.card.id for resident in self}
        return [pull for pull in self._pulls.values() if pull.model not in listed]

    async def look_around(self) -> None:
        """List what lies in the hub's cache."""
        try:
            names = await self._list_cached()
        except OSError as error:
            logger.warning("the hub's cache cannot be listed (%s): its models are not", error.strerror)
            return
        for name in names[:MOST_LISTED]:
            if all(resident.card.id != name for resident in self):
                with suppress(StartupError):  # not a model for this server
                    await self._add_cached(name, None, None)

    async def load(self, name: str, task: Task | None = None) -> Resident:
        """Have a model loaded; returns before it is.

        Raises:
            ModelNotFound: it is neither listed nor in the hub's cache. InvalidInput: the name means two models.
            ModelConflict: its state does not allow that.
        """
        resident = self._listed(name, task)
        if resident is None and HUB_ID.fullmatch(name) and not any(part in name for part in FORBIDDEN):
            try:
                resident = await self._add_cached(name, None, task)
            except StartupError as error:
                raise InvalidInput(error.message, param="model") from None
        if resident is None:
            raise self._unknown(name)
        return self._residency.load(resident.key)

    def unload(self, name: str, task: Task | None = None) -> Resident:
        """Have a model unloaded; returns before it is.

        Raises:
            ModelNotFound, InvalidInput: as `load`. ModelConflict: it is in use, pinned or not loaded.
        """
        resident = self._listed(name, task)
        if resident is None:
            raise self._unknown(name)
        return self._residency.unload(resident.key)

    def _listed(self, name: str, task: Task | None) -> Resident | None:
        named = [each for each in self if name in (each.key, *each.card.names) and task in (None, each.card.task)]
        if len(named) > 1:
            raise InvalidInput(
                f"{name[:200]} is an embedding model and a reranker: say which one (`task`: `embed` or `rerank`).",
                param="task",
            )
        return named[0] if named else None

    def _unknown(self, name: str) -> ModelNotFound:
        known = ", ".join(resident.card.id for resident in self)
        return ModelNotFound(
            f"The model `{name[:200]}` is neither listed here nor whole in the hub's cache; listed are: {known}. POST "
            f"/models/pull fetches one by its hub id.",
            param="model",
        )

    async def _add_cached(self, name: str, revision: str | None, task: Task | None) -> Resident | None:
        """Raises StartupError: its files are not those of a model for this server, or are broken in whatever way."""
        try:
            cached = await self._find_cached(name, revision, task)
        except StartupError:
            raise
        except Exception as fault:
            logger.debug("%s cannot be read", name, exc_info=True)
            raise StartupError(f"{name}: its files cannot be read ({type(fault).__name__}): fetch it again.") from fault
        if cached is None:
            return None
        residents = self._residency.residents
        if cached.card.key in residents:
            return residents[cached.card.key]
        return self._residency.add(cached.card, cached.weight_bytes, is_loaded=False, is_named=False)

    def pull(self, name: str, revision: str | None = None) -> Pull:
        """Begin to fetch a model from the hub into its cache, in a process of its own; one at a time.

        Raises:
            InvalidInput: not a hub id, or not a revision. ModelConflict: one is being fetched, or the model is loaded.
        """
        for value, pattern, param, rule in (
            (name, HUB_ID, "model", INVALID_ID),
            (revision, REVISION, "revision", "must be a branch, a tag, a commit or refs/pr/N"),
        ):
            if value is not None and (not pattern.fullmatch(value) or any(part in value for part in FORBIDDEN)):
                raise InvalidInput(f"`{param}` {rule}.", param=param)
        if self._pulling is not None:
            going_on = next(pull.model for pull in self._pulls.values() if pull.state is ModelState.PULLING)
            raise ModelConflict(f"{going_on} is being fetched, one at a time: try again when it is.", param="model")
        for resident in self._of(name):
            after(name, resident.state, ModelEvent.PULL)  # of two tasks neither moves unless both can
        for resident in self._of(name):
            resident.move(ModelEvent.PULL)
        pull = Pull(name, revision)
        self._pulls.pop(name, None)
        for oldest in list(self._pulls)[: max(0, len(self._pulls) - ENDED_PULLS + 1)]:
            del self._pulls[oldest]
        self._pulls[name] = pull
        self._pulling = asyncio.create_task(self._fetch(pull), name="pull")
        return pull

    def _of(self, name: str) -> list[Resident]:
        return [resident for resident in self if resident.card.id == name]

    async def _fetch(self, pull: Pull) -> None:
        error: str | None = "it was stopped"
        try:
            async with asyncio.timeout(LONGEST_PULL):
                error = await self._run(pull)
            if error is None and await self._add_cached(pull.model, pull.revision, None) is None:
                error = "it is not whole in the hub's cache; the log says why."
        except TimeoutError:
            error = f"it was not fetched within {LONGEST_PULL / 3600:.0f} hours; complete files are kept, try again."
        except StartupError as unfit:
            error = unfit.message
        except Exception as fault:
            logger.exception("%s could not be fetched", pull.model)
            error = f"it could not be fetched ({type(fault).__name__}); the log says why."
        finally:
            self._pulling = None
            self._fetched(pull, error)

    def _fetched(self, pull: Pull, error: str | None) -> None:
        if error is None:
            del self._pulls[pull.model]
        else:
            logger.warning("%s could not be fetched: %s", pull.model, error)
            pull.state, pull.message = ModelState.FAILED, error
        for resident in self._of(pull.model):
            if resident.state is ModelState.PULLING:
                resident.move(ModelEvent.PULLED if error is None else ModelEvent.FAIL, error or "")

    async def _run(self, pull: Pull) -> str | None:
        """What went wrong; None where nothing did. The process ends with this call."""
        command = [*OWN_PYTHON, "-m", "vecmill", "pull", "--json"]
        if pull.revision is not None:
            command += ["--revision", pull.revision]
        token = {"HF_TOKEN": self._hf_token} if self._hf_token else {}
        process = await asyncio.create_subprocess_exec(
            *command,
            "--",
            pull.model,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **token},
            limit=LONGEST_LINE,
        )
        last: dict[str, Any] = {}
        try:
            async for last in _objects(process):
                self._report(pull, last)
            await process.wait()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0 and "folder" in last:
            return None
        return str(last.get("error", f"the fetching process ended with status {process.returncode}"))

    def _report(self, pull: Pull, progress: dict[str, Any]) -> None:
        if "size" not in progress:
            return
        fetched, size = progress["fetched"], progress["size"]
        scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
        pull.percent = 100 * min(1.0, fetched / max(1, size))
        pull.message = f"fetching: {fetched / scale:.1f} of {size / scale:.1f} {unit}"
        for resident in self._of(pull.model):
            if resident.state is ModelState.PULLING:
                resident.percent, resident.message = pull.percent, pull.message

    async def close(self) -> None:
        """End the download; complete files are kept."""
        if self._pulling is not None:
            self._pulling.cancel()
            with suppress(asyncio.CancelledError):
                await self._pulling


async def _objects(process: asyncio.subprocess.Process) -> AsyncIterator[dict[str, Any]]:
    assert process.stdout is not None
    async for line in process.stdout:
        with suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict):
                yield parsed
