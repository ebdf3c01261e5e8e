"""Which models are in memory: loaded when a request names one, unloaded when nobody needs it or another needs the room.

A model that is held, or whose rows wait for a batch, is never taken. Models are loaded and unloaded one at a time, in
the order in which they were asked for. Knows nothing of how that is done: it is handed two functions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, inf
from time import monotonic, time

from vecmill.config import ModelSettings
from vecmill.core.errors import (
    ModelConflict,
    ModelLoading,
    ModelNotFound,
    ModelNotLoaded,
    ShuttingDown,
    StartupObstacle,
    VecmillError,
)
from vecmill.core.types import Caller, ModelCard

logger = logging.getLogger(__name__)

GIGABYTE = 1e9
RETRY_SECONDS = 30.0  # after a failure, until a request has the model tried again
LOOK_EVERY = 0.05  # seconds, while rows wait that nobody waits for any more
LONGEST_SLEEP = 3600.0  # seconds
UNLOADING = "its memory is given back"  # said of the model meanwhile
FEWEST_RETRY, MOST_RETRY = 2.0, 60.0  # seconds, of Retry-After


class ModelState(StrEnum):
    """Where a model is. `unloading` is shown to clients as `unloaded`."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    SLEEPING = "sleeping"
    """Unloaded, its weights in the machine's memory."""
    FAILED = "failed"
    PULLING = "pulling"


AT_REST = (ModelState.UNLOADED, ModelState.SLEEPING)
UNDER_WAY = (ModelState.LOADING, ModelState.LOADED, ModelState.UNLOADING)


class ModelEvent(StrEnum):
    """What happens to a model."""

    LOAD = "load"
    LOADED = "loaded"
    FAIL = "fail"
    GIVE_UP = "give up"
    """Nobody waits for it any more."""
    UNLOAD = "unload"
    UNLOADED = "unloaded"
    SLEEP = "sleep"
    PULL = "pull"
    PULLED = "pulled"


TRANSITIONS: Mapping[ModelState, Mapping[ModelEvent, ModelState]] = {
    ModelState.UNLOADED: {
        ModelEvent.LOAD: ModelState.LOADING,
        ModelEvent.SLEEP: ModelState.SLEEPING,
        ModelEvent.PULL: ModelState.PULLING,
    },
    ModelState.SLEEPING: {
        ModelEvent.LOAD: ModelState.LOADING,
        ModelEvent.UNLOAD: ModelState.UNLOADING,
        ModelEvent.UNLOADED: ModelState.UNLOADED,
        ModelEvent.PULL: ModelState.PULLING,
    },
    ModelState.LOADING: {
        ModelEvent.LOADED: ModelState.LOADED,
        ModelEvent.FAIL: ModelState.FAILED,
        ModelEvent.GIVE_UP: ModelState.UNLOADED,
    },
    ModelState.LOADED: {ModelEvent.UNLOAD: ModelState.UNLOADING},
    ModelState.UNLOADING: {ModelEvent.UNLOADED: ModelState.UNLOADED},
    ModelState.FAILED: {
        ModelEvent.LOAD: ModelState.LOADING,
        ModelEvent.UNLOAD: ModelState.UNLOADED,
        ModelEvent.PULL: ModelState.PULLING,
    },
    ModelState.PULLING: {ModelEvent.PULLED: ModelState.UNLOADED, ModelEvent.FAIL: ModelState.FAILED},
}
"""What is not here is a conflict."""


def after(model_id: str, state: ModelState, event: ModelEvent) -> ModelState:
    """The state that an event leads to.

    Raises:
        ModelConflict: the present state does not allow it.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise ModelConflict(
            f"{model_id} is {state.value}: `{event.value}` is not possible now; wait for that to end, or see GET "
            f"/dashboard/models.",
            param="model",
        ) from None


@dataclass(eq=False, slots=True)
class Resident:
    """A model that the server lists. Belongs to the event loop's thread."""

    card: ModelCard
    weight_bytes: int
    """What its weights take, as far as that is known before it is loaded."""
    is_pinned: bool = False
    unload_after: float = inf
    """Seconds, of UNLOAD_AFTER."""
    is_named: bool = True
    """Whether requests may have it loaded: it is in the settings, or an admin has loaded it."""
    state: ModelState = ModelState.UNLOADED
    percent: float | None = None
    message: str = ""
    memory_bytes: int = 0
    sleeping_bytes: int = 0
    """Of the machine's memory, while it sleeps."""
    keep_alive: float = inf
    """Seconds after its last request, as it was last asked for."""
    idle_since: float = 0.0
    """By the monotonic clock."""
    used_at: float | None = None
    """Unix time of the last request; None: there was none."""
    loaded_at: float | None = None
    failed_at: float = -inf
    public_reason: str = ""
    """Why it could not be loaded, as every client may know it: without paths."""
    held: int = 0
    is_wanted_away: bool = False
    """Nobody new may hold it: another model needs its room."""
    goes_for_good: bool = False
    """It does not sleep once it is unloaded: an admin wants its memory back."""
    is_asked_for: bool = False
    """By an admin, or by the start: it is loaded though no request waits."""
    is_of_start: bool = False
    """The start waits for it; no other model is unloaded for it."""
    failure: VecmillError | None = None
    """Why it could not be loaded, as the log has it."""
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What scheduler and engine call it."""
        return self.card.key

    @property
    def can_be_held(self) -> bool:
        """Whether a request may use it at once."""
        return self.state is ModelState.LOADED and not self.is_wanted_away

    @property
    def is_here(self) -> bool:
        """Whether it is in memory, or on its way there."""
        return self.state in (ModelState.LOADED, ModelState.LOADING)

    def expires(self, now: float) -> float:
        """When it is unloaded if nobody uses it from `now` on, by the monotonic clock; `inf`: never."""
        return inf if self.is_pinned else (now if self.held else self.idle_since) + self.keep_alive

    def serve_waiters(self) -> None:
        """Let the requests that wait for it go on, as it is loaded."""
        for waiter in self.waiters:
            if not waiter.done():
                self.held += 1  # in its name: nobody may take the model before it wakes up
                waiter.set_result(None)
        self.waiters.clear()

    def fail_waiters(self, error: Callable[[], VecmillError]) -> None:
        """End the requests that wait for it, each with an error of its own."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error())
        self.waiters.clear()

    def move(self, event: ModelEvent, message: str = "") -> None:
        """Take the event's way.

        Raises:
            ModelConflict: there is none from here.
        """
        self.state = after(self.card.id, self.state, event)
        self.message, self.percent = message, 0.0 if self.state in (ModelState.LOADING, ModelState.PULLING) else None


def least_recently_used(residents: Iterable[Resident]) -> Resident | None:
    """The model that is unloaded first to make room.

    One that goes anyway and waits for its turn; else of the loaded ones that are not pinned one that nobody uses, idle
    longest.
    """
    in_memory = (ModelState.LOADED, ModelState.UNLOADING)
    candidates = [each for each in residents if each.state in in_memory and not each.is_pinned]
    return min(
        candidates, key=lambda each: (each.state is ModelState.LOADED, each.held > 0, each.idle_since), default=None
    )


Progress = Callable[[float, str], None]
Load = Callable[[str, Progress], Awaitable[tuple[ModelCard, int]]]
"""Loads the model of a key; gives its card, and the bytes that it takes. `Progress` may be called from any thread."""


class Residency:
    """The models that are listed, and who holds them. Belongs to the event loop's thread."""

    def __init__(
        self,
        settings: ModelSettings,
        load: Load,
        unload: Callable[[str], Awaitable[None]],
        *,
        has_rows: Callable[[str], bool] = lambda key: False,
        shortage: Callable[[int], Awaitable[str | None]] | None = None,
        put_to_sleep: Callable[[str], Awaitable[None]] | None = None,
        asleep: Callable[[], Mapping[str, int]] = dict,
        most_waiting: int = 512,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`has_rows`: whether rows of a model wait or run; `shortage`: why so many bytes of weights do not fit now;
        `most_waiting`: requests that may wait for models.

        Args:
            put_to_sleep: unloads a model for which nobody has asked to be unloaded; None: `unload` does.
            asleep: the machine's memory that sleeping models take, by key.
        """
        self.residents: dict[str, Resident] = {}
        self._settings = settings
        self._load_model, self._unload_model = load, unload
        self._has_rows, self._shortage, self._most_waiting, self._clock = has_rows, shortage, most_waiting, clock
        self._put_to_sleep, self._asleep = put_to_sleep or unload, asleep
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._start(self._unload_idle())

    def add(self, card: ModelCard, weight_bytes: int, *, is_loaded: bool, is_named: bool = True) -> Resident:
        """List a model."""
        unload_after = self._settings.unload_after_of(card.names)
        resident = Resident(
            card,
            weight_bytes,
            is_pinned=any(name in self._settings.pinned_models for name in card.names),
            unload_after=unload_after,
            keep_alive=unload_after,
            is_named=is_named,
            idle_since=self._clock(),
        )
        if is_loaded:
            resident.state, resident.loaded_at, resident.memory_bytes = ModelState.LOADED, time(), weight_bytes
        self.residents[card.key] = resident
        self._changed.set()
        return resident

    def warn_of_unknown(self) -> None:
        """Say which names of UNLOAD_AFTER and PINNED_MODELS mean no model that is listed."""
        known = {name for each in self.residents.values() for name in each.card.names}
        durations = [name for name, _ in self._settings.unload_after if name]
        for setting, names in (("UNLOAD_AFTER", durations), ("PINNED_MODELS", self._settings.pinned_models)):
            if unknown := [name for name in names if name not in known]:
                ids = ", ".join(each.card.id for each in self.residents.values())
                logger.warning("%s names no model of the settings: %s; these are: %s", setting, unknown[0], ids)

    @asynccontextmanager
    async def hold(self, key: str, caller: Caller | None = None) -> AsyncIterator[None]:
        """Have a model loaded as long as the block runs; waits for that up to LOAD_TIMEOUT.

        Raises:
            ModelLoading, ModelNotLoaded: it is not loaded in time, or cannot be.
        """
        resident = self.residents[key]
        if resident.can_be_held:
            resident.held += 1
        else:
            await self._wait(resident)
        try:
            yield
        finally:
            resident.held -= 1
            resident.idle_since, resident.used_at = self._clock(), time()
            if caller is not None and caller.keep_alive is not None:
                shortest = 0.0 if caller.may_unload else resident.unload_after
                resident.keep_alive = max(caller.keep_alive, shortest)
            if resident.is_wanted_away or resident.keep_alive < inf:
                self._changed.set()

    async def _wait(self, resident: Resident) -> None:
        """Until the model is loaded, and held for whoever waits."""
        self._check_can_wait(resident)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        resident.waiters.append(waiter)
        if resident.state in (*AT_REST, ModelState.FAILED):
            self._begin(resident)
        try:
            async with asyncio.timeout(self._settings.load_timeout):
                await waiter
        except BaseException as error:
            with suppress(ValueError):
                resident.waiters.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                resident.held -= 1  # its time was over just when it was loaded
            if isinstance(error, TimeoutError):
                raise self._too_late(resident) from None
            raise

    def _check_can_wait(self, resident: Resident) -> None:
        if self._is_closed:
            raise ShuttingDown
        if sum(len(each.waiters) for each in self.residents.values()) >= self._most_waiting:
            raise self._loading(resident, f"and {self._most_waiting} requests wait already (MAX_CONCURRENT_REQUESTS)")
        if resident.state is ModelState.PULLING:
            raise self._loading(resident, "it is fetched from the hub")
        left = resident.failed_at + RETRY_SECONDS - self._clock()
        if resident.state is ModelState.FAILED and left > 0:
            raise _failed(resident, left)

    def _loading(self, resident: Resident, reason: str) -> ModelLoading:
        error = ModelLoading(
            f"503: {resident.card.id} is temporarily unavailable, the model is loading: {reason}; try again after "
            f"Retry-After seconds."
        )
        error.retry_after = min(MOST_RETRY, max(FEWEST_RETRY, self._settings.load_timeout / 4))
        return error

    def _too_late(self, resident: Resident) -> ModelLoading:
        done = f"{resident.percent:.0f} %, " if resident.percent else ""
        return self._loading(
            resident,
            f"timeout, it was not ready within {self._settings.load_timeout:g} s (LOAD_TIMEOUT; "
            f"{done}{resident.message or resident.state.value})",
        )

    def load(self, key: str) -> Resident:
        """Have a model loaded; returns at once, also where it is loaded or being loaded.

        Raises:
            ModelNotFound: it is not listed. ModelConflict: its state does not allow that.
            ShuttingDown: nothing is loaded any more.
        """
        if self._is_closed:
            raise ShuttingDown
        resident = self._listed(key)
        if resident.can_be_held:
            return resident
        if resident.state not in UNDER_WAY:  # else it is loaded when what goes on has ended
            self._begin(resident)
        resident.is_named = resident.is_asked_for = True
        return resident

    async def complete_start(self, keys: Iterable[str]) -> None:
        """Load the models that belong to the start, in their order, while others are served.

        Raises:
            VecmillError: one cannot be loaded; of the first such model.
        """
        residents = [self.load(key) for key in keys]
        for resident in residents:
            resident.is_of_start = True
        for resident in residents:
            await self._settled(resident)
            if resident.failure is not None:
                raise resident.failure

    @staticmethod
    async def _settled(resident: Resident) -> None:
        """Until a model is not being loaded any more."""
        if resident.state is not ModelState.LOADING:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        resident.waiters.append(waiter)
        with suppress(ModelNotLoaded, ShuttingDown):
            await waiter
            resident.held -= 1

    @asynccontextmanager
    async def undisturbed(self) -> AsyncIterator[None]:
        """No model is loaded or unloaded as long as the block runs."""
        async with self._turn:
            yield

    def unload(self, key: str) -> Resident:
        """Have a model unloaded, and its sleep ended; returns at once.

        Raises:
            ModelNotFound: it is not listed. ModelConflict: it is pinned, in use, or not loaded.
            ShuttingDown: nothing is unloaded any more.
        """
        if self._is_closed:
            raise ShuttingDown
        resident = self._listed(key)
        name = resident.card.id
        if resident.is_pinned:
            raise ModelConflict(
                f"{name} is pinned and is not unloaded: take it out of PINNED_MODELS and restart.", param="model"
            )
        if resident.state is ModelState.FAILED:
            resident.move(ModelEvent.UNLOAD)
            resident.failed_at = -inf
            self._note_who_sleeps()
            if not resident.sleeping_bytes:
                return resident
        if resident.state is ModelState.LOADED and self._is_in_use(resident):
            raise ModelConflict(
                f"{name} is in use ({resident.held} requests): it is not unloaded; try again when they are answered, "
                f"or set UNLOAD_AFTER.",
                param="model",
            )
        self._begin_to_unload(resident, for_good=True)
        return resident

    def _listed(self, key: str) -> Resident:
        if key not in self.residents:
            raise ModelNotFound
        return self.residents[key]

    def _is_in_use(self, resident: Resident) -> bool:
        return resident.held > 0 or self._has_rows(resident.key)

    def _begin(self, resident: Resident) -> None:
        resident.move(ModelEvent.LOAD, "waits for its turn")
        self._start(self._load(resident))

    def _begin_to_unload(self, resident: Resident, *, for_good: bool = False) -> None:
        """From here on nobody can hold it. `for_good`: it does not sleep."""
        resident.move(ModelEvent.UNLOAD, UNLOADING)
        resident.goes_for_good = for_good
        self._start(self._unload_in_turn(resident))

    async def _load(self, resident: Resident) -> None:
        loop, key = asyncio.get_running_loop(), resident.key

        def progress(percent: float, message: str) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._progressed, resident, percent, message)

        try:
            async with self._turn:
                if not await self._made_room(resident):
                    resident.move(ModelEvent.GIVE_UP)
                    return
                card, memory_bytes = await self._load_model(key, progress)
        except ModelNotLoaded as error:
            resident.failure = error
            self._fail(resident, error.message, public_reason=error.message)
        except VecmillError as error:
            resident.failure = error
            self._fail(resident, error.message)
        except asyncio.CancelledError:
            self._fail(resident, "the server stopped")
            raise
        except Exception as error:
            logger.exception("%s could not be loaded", resident.card.id)
            reason = f"it could not be loaded ({type(error).__name__}); the log says why."
            resident.failure = StartupObstacle(f"{resident.card.id}: {reason}")
            self._fail(resident, reason)
        else:
            self._loaded(resident, card, memory_bytes)
        finally:
            self._note_who_sleeps()

    def _note_who_sleeps(self) -> None:
        """Models fall asleep, wake up and are forgotten when others come and go."""
        asleep = self._asleep()
        for key, resident in self.residents.items():
            resident.sleeping_bytes = asleep.get(key, 0)
            if key in asleep and resident.state is ModelState.UNLOADED:
                resident.move(ModelEvent.SLEEP)
            elif key not in asleep and resident.state is ModelState.SLEEPING:
                resident.move(ModelEvent.UNLOADED)

    def _progressed(self, resident: Resident, percent: float, message: str) -> None:
        if resident.state is ModelState.LOADING:
            resident.percent, resident.message = percent, message

    def _loaded(self, resident: Resident, card: ModelCard, memory_bytes: int) -> None:
        resident.move(ModelEvent.LOADED)
        resident.card, resident.memory_bytes, resident.loaded_at = card, memory_bytes, time()
        resident.weight_bytes = max(card.weight_bytes, resident.weight_bytes)
        resident.keep_alive, resident.idle_since = resident.unload_after, self._clock()
        resident.is_asked_for = resident.is_of_start = False
        resident.failure = None
        resident.serve_waiters()
        self._changed.set()
        logger.info("%s is loaded, %.2f GB", card.id, memory_bytes / GIGABYTE)

    def _fail(self, resident: Resident, reason: str, public_reason: str = "") -> None:
        resident.move(ModelEvent.FAIL, reason)
        resident.public_reason = public_reason
        resident.failed_at, resident.is_asked_for = self._clock(), False
        logger.warning("%s could not be loaded: %s", resident.card.id, reason)
        resident.fail_waiters(ShuttingDown if self._is_closed else lambda: _failed(resident, RETRY_SECONDS))

    async def _made_room(self, resident: Resident) -> bool:
        """Unload others until there is room for a model; False: nobody waits for it any more.

        Raises:
            ModelNotLoaded: there is none, and nothing left to unload.
        """
        if resident.is_of_start:  # its room was counted before anything was loaded
            return True
        resident.message = "waits for room"
        while self._is_wanted(resident):
            if (reason := await self._no_room(resident.weight_bytes)) is None:
                return True
            victim = least_recently_used(self.residents.values())
            if victim is None or not self._has_room_alone(resident.weight_bytes):
                raise ModelNotLoaded(
                    f"{reason}, and unloading others does not make room for it (PINNED_MODELS): raise the limit, or "
                    f"pin fewer."
                )
            await self._evict(victim, resident)
        return False

    @staticmethod
    def _is_wanted(resident: Resident) -> bool:
        return bool(resident.waiters) or resident.is_asked_for

    async def _no_room(self, weight_bytes: int) -> str | None:
        """Why weights of so many bytes cannot be loaded now."""
        if (most := self._settings.max_loaded_gb) is not None:
            taken = sum(each.memory_bytes for each in self.residents.values())
            if taken + weight_bytes > most * GIGABYTE:
                return (
                    f"its weights take {weight_bytes / GIGABYTE:.2f} GB, the loaded models "
                    f"{taken / GIGABYTE:.2f} of {most:g} GB (MAX_LOADED_GB)"
                )
        return None if self._shortage is None else await self._shortage(weight_bytes)

    def _has_room_alone(self, weight_bytes: int) -> bool:
        """Whether MAX_LOADED_GB has room for so many bytes beside what is never unloaded."""
        pinned = sum(each.memory_bytes for each in self.residents.values() if each.is_pinned)
        most = self._settings.max_loaded_gb
        return most is None or pinned + weight_bytes <= most * GIGABYTE

    async def _evict(self, victim: Resident, newcomer: Resident) -> None:
        """Unload a model as soon as what uses it now has ended, unless nobody waits for the newcomer any more."""
        victim.is_wanted_away = True
        try:
            while self._is_in_use(victim) and self._is_wanted(newcomer):
                await self._sleep(LOOK_EVERY)
            if self._is_wanted(newcomer):
                if victim.state is ModelState.LOADED:
                    victim.move(ModelEvent.UNLOAD, UNLOADING)
                await self._unload(victim)
        finally:
            victim.is_wanted_away = False
            self._grant_again(victim)
            self._changed.set()  # its time may have been over meanwhile

    def _grant_again(self, resident: Resident) -> None:
        """Serve whoever came meanwhile: by the model, if it stayed, else by loading it."""
        if resident.state is ModelState.LOADED:
            resident.is_asked_for = False
            resident.serve_waiters()
        elif resident.state in AT_REST and self._is_wanted(resident) and not self._is_closed:
            self._begin(resident)

    async def _unload_in_turn(self, resident: Resident) -> None:
        try:
            async with self._turn:
                if resident.state is ModelState.UNLOADING:  # else it has made room for another
                    await self._unload(resident)
        finally:
            self._grant_again(resident)

    async def _unload(self, resident: Resident) -> None:
        try:
            await (self._unload_model if resident.goes_for_good else self._put_to_sleep)(resident.key)
        except VecmillError as error:
            logger.warning("%s could not be unloaded cleanly: %s", resident.card.id, error.message)
        finally:
            resident.move(ModelEvent.UNLOADED)
            resident.memory_bytes, resident.loaded_at, resident.goes_for_good = 0, None, False
            self._note_who_sleeps()
        logger.info("%s %s", resident.card.id, "sleeps" if resident.sleeping_bytes else "is unloaded")

    async def _unload_idle(self) -> None:
        """Unload what nobody has used for long enough, until cancelled."""
        while True:
            now, soonest = self._clock(), inf
            for resident in list(self.residents.values()):
                expires = resident.expires(now)
                if not resident.can_be_held or resident.held or expires == inf:
                    continue
                if expires > now:
                    soonest = min(soonest, expires)
                elif self._has_rows(resident.key):
                    soonest = min(soonest, now + LOOK_EVERY)
                else:
                    self._begin_to_unload(resident)
            await self._sleep(min(LONGEST_SLEEP, soonest - now))

    async def _sleep(self, seconds: float) -> None:
        """Until something changes, at the longest for so many seconds.

        Whoever calls it has looked at everything in the same turn of the event loop, so no change is missed.
        """
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("loading or unloading a model failed", exc_info=error)

    async def close(self) -> None:
        """Load and unload nothing more; whoever waits is told so."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for resident in self.residents.values():
            resident.fail_waiters(ShuttingDown)


def _failed(resident: Resident, left: float) -> ModelNotLoaded:
    reason = resident.public_reason or "GET /dashboard/models says why."
    error = ModelNotLoaded(
        f"503: {resident.card.id} could not be loaded and is temporarily unavailable: {reason} A request after "
        f"Retry-After seconds has it tried again."
    )
    error.retry_after = max(1, ceil(left))
    return error
