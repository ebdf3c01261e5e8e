"""Which models are in memory: by requests, by an admin, after a while, for want of room; whoever waits is answered."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vecmill.config import load_settings
from vecmill.core.clock import parse_duration
from vecmill.core.errors import ModelConflict, ModelLoading, ModelNotFound, ModelNotLoaded, ShuttingDown, StartupError
from vecmill.core.types import Caller, ModelCard, Task
from vecmill.inference.residency import (
    TRANSITIONS,
    ModelEvent,
    ModelState,
    Progress,
    Residency,
    Resident,
    after,
    least_recently_used,
)

GIGABYTE = 1_000_000_000
NAMES = ("a", "b", "c")


def card(name: str, size: int = GIGABYTE) -> ModelCard:
    return ModelCard(
        id=name,
        task=Task.EMBED,
        family="bert",
        revision="r",
        fingerprint="f",
        dimensions=8,
        supported_dimensions=(8,),
        max_model_len=64,
        vocab_size=100,
        pooling="mean",
        dtype="float32",
        dtype_reason="",
        device="cpu",
        weight_bytes=size,
    )


class Device:
    """Where models are, as the engine sees it: it fails on a model that is loaded twice, or taken while in use."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.in_use: Counter[str] = Counter()
        self.most = 0
        self.fails: Callable[[str], Exception | None] = lambda key: None
        self.gate: asyncio.Event | None = None
        self._is_busy = False

    async def load(self, key: str, progress: Progress) -> tuple[ModelCard, int]:
        await self._work()
        progress(50, "half")
        if (error := self.fails(key)) is not None:
            raise error
        assert key not in self.loaded
        self.loaded.add(key)
        self.most = max(self.most, len(self.loaded))
        return card(key.partition(":")[2]), GIGABYTE

    async def unload(self, key: str) -> None:
        assert not self.in_use[key], "a model in use was taken"
        self.loaded.remove(key)
        await self._work()

    async def _work(self) -> None:
        assert not self._is_busy, "two at a time"
        self._is_busy = True
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        self._is_busy = False


@asynccontextmanager
async def residency(device: Device, loaded: str = "", **flags: Any) -> AsyncIterator[Residency]:
    """With three models of a gigabyte each, those of `loaded` in memory."""
    most_waiting = flags.pop("most_waiting", 512)
    models = Residency(load_settings(flags).model, device.load, device.unload, most_waiting=most_waiting)
    for name in NAMES:
        models.add(card(name), GIGABYTE, is_loaded=name in loaded)
        device.loaded |= {f"embed:{name}"} if name in loaded else set()
    try:
        yield models
    finally:
        await models.close()


async def use(models: Residency, device: Device, name: str, caller: Caller | None = None, turns: int = 1) -> None:
    key = f"embed:{name}"
    async with models.hold(key, caller):
        assert key in device.loaded
        device.in_use[key] += 1
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            assert key in device.loaded
        finally:
            device.in_use[key] -= 1


async def begin_to_use(models: Residency, device: Device, name: str) -> asyncio.Task[None]:
    """A request for a model that waits by now, as long as the model is not there."""
    request = asyncio.create_task(use(models, device, name))
    await asyncio.sleep(0.01)
    return request


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@given(st.sampled_from(ModelState), st.lists(st.sampled_from(ModelEvent), max_size=30))
def test_only_the_tables_ways_are_taken(state: ModelState, events: list[ModelEvent]) -> None:
    resident = Resident(card("a"), 1, state=state)
    for event in events:
        before = resident.state
        if event in TRANSITIONS[before]:
            resident.move(event)
            assert resident.state is TRANSITIONS[before][event] is after("a", before, event)
            assert (resident.percent is None) == (resident.state not in (ModelState.LOADING, ModelState.PULLING))
        else:
            with pytest.raises(ModelConflict, match=f"a is {before.value}: `{event.value}`"):
                resident.move(event)
            assert resident.state is before


def test_every_state_can_be_left_and_leads_back_to_loaded() -> None:
    assert set(TRANSITIONS) == set(ModelState)
    reach: dict[ModelState, set[ModelState]] = {state: set(ways.values()) for state, ways in TRANSITIONS.items()}
    for _ in ModelState:
        reach = {state: near.union(*(reach[each] for each in near)) for state, near in reach.items()}
    assert all(ModelState.LOADED in near for near in reach.values())
    # In use or not, what is loaded leaves memory by one way alone.
    assert set(TRANSITIONS[ModelState.LOADED]) == {ModelEvent.UNLOAD}


@given(
    st.lists(st.tuples(st.sampled_from(ModelState), st.booleans(), st.integers(0, 2), st.floats(0, 100)), max_size=8)
)
def test_the_least_recently_used_goes_first(models: list[tuple[ModelState, bool, int, float]]) -> None:
    residents = [
        Resident(card(f"m{number}"), 1, state=state, is_pinned=pinned, held=held, idle_since=idle)
        for number, (state, pinned, held, idle) in enumerate(models)
    ]
    victim = least_recently_used(residents)
    going = [each for each in residents if each.state is ModelState.UNLOADING and not each.is_pinned]
    loaded = [each for each in residents if each.state is ModelState.LOADED and not each.is_pinned]
    candidates = going or loaded
    assert (victim is None) == (not candidates)
    if victim is not None:
        assert victim in candidates
        idle = [each for each in candidates if not each.held]
        assert not victim.held or not idle
        assert all(victim.idle_since <= each.idle_since for each in (idle or candidates))


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        ("0", 0.0),
        (300, 300.0),
        (0.5, 0.5),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("300ms", 0.3),
        ("24h0m0s", 86400.0),
        ("+10s", 10.0),
        ("90", 90.0),
        (-1, inf),
        ("-1", inf),
        ("-1m", inf),
        (10**400, inf),
    ],
)
def test_durations_are_ollamas(written: object, seconds: float) -> None:
    assert parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize("written", ["", "five", "5 minutes", "5d", True, [], {}, "m", "1h-5m", float("nan"), "9" * 99])
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="`5m`"):
        parse_duration(written)


async def test_a_request_loads_its_model_and_waits_for_it() -> None:
    device = Device()
    async with residency(device) as models:
        await asyncio.gather(*(use(models, device, name) for name in "abcabcabc"))
        assert device.loaded == {"embed:a", "embed:b", "embed:c"}
        resident = models.residents["embed:a"]
        assert (resident.state, resident.memory_bytes, resident.held) == (ModelState.LOADED, GIGABYTE, 0)
        assert resident.used_at is not None


async def test_a_request_waits_no_longer_than_load_timeout_and_loading_goes_on() -> None:
    device = Device()
    device.gate = asyncio.Event()
    async with residency(device, load_timeout=0.05) as models:
        models.load("embed:a")
        with pytest.raises(ModelLoading, match=r"LOAD_TIMEOUT.*try again") as caught:
            await use(models, device, "a")
        assert caught.value.retry_after >= 1
        device.gate.set()
        await use(models, device, "a")
        # Nobody asked for this one but the request that left.
        device.gate.clear()
        with pytest.raises(ModelLoading):
            await use(models, device, "b")


async def test_requests_that_leave_free_what_they_would_have_held() -> None:
    device = Device()
    device.gate = asyncio.Event()
    async with residency(device) as models:
        waiting = [asyncio.create_task(use(models, device, "a", turns=3)) for _ in range(20)]
        await asyncio.sleep(0.01)
        for task in waiting[:10]:
            task.cancel()
        device.gate.set()
        await until(lambda: models.residents["embed:a"].state is ModelState.LOADED)
        waiting[15].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert models.residents["embed:a"].held == 0
        models.unload("embed:a")
        await until(lambda: not device.loaded)


async def test_only_so_many_requests_wait() -> None:
    device = Device()
    device.gate = asyncio.Event()
    async with residency(device, most_waiting=3) as models:
        waiting = [asyncio.create_task(use(models, device, "ab"[number % 2])) for number in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(ModelLoading, match="MAX_CONCURRENT_REQUESTS"):
            await use(models, device, "c")
        device.gate.set()
        await asyncio.gather(*waiting)


async def test_a_failure_is_that_models_state_and_is_tried_again_later() -> None:
    device, now = Device(), 100.0
    device.fails = lambda key: StartupError("/secret/folder: config.json is damaged.") if key == "embed:a" else None
    models = Residency(load_settings().model, device.load, device.unload, clock=lambda: now)
    for name in NAMES:
        models.add(card(name), GIGABYTE, is_loaded=False)
    with pytest.raises(ModelNotLoaded, match=r"a could not be loaded.*GET /dashboard/models") as caught:
        await use(models, device, "a")
    assert "secret" not in caught.value.message
    resident = models.residents["embed:a"]
    assert (resident.state, resident.message) == (ModelState.FAILED, "/secret/folder: config.json is damaged.")
    await use(models, device, "b")
    device.fails = lambda key: None
    with pytest.raises(ModelNotLoaded) as caught:  # not yet: a broken model must not be read for every request
        await use(models, device, "a")
    assert 0 < caught.value.retry_after <= 30
    now += 31
    await use(models, device, "a")
    await models.close()


async def test_a_fault_is_a_failure_too_and_its_text_stays_in_the_log() -> None:
    device = Device()
    device.fails = lambda key: ZeroDivisionError("what the client must not see")
    async with residency(device) as models:
        with pytest.raises(ModelNotLoaded) as caught:
            await use(models, device, "a")
        assert "must not see" not in caught.value.message + models.residents["embed:a"].message


async def test_the_model_that_was_used_longest_ago_makes_room() -> None:
    device = Device()
    async with residency(device, loaded="ab", max_loaded_gb=2) as models:
        await use(models, device, "b")
        await use(models, device, "a")
        await use(models, device, "c")
        assert device.loaded == {"embed:a", "embed:c"}
        assert device.most == 2


async def test_a_model_in_use_is_waited_for_and_whoever_comes_meanwhile_is_served_after() -> None:
    device = Device()
    async with residency(device, loaded="a", max_loaded_gb=1) as models:
        release = asyncio.Event()

        async def hold() -> None:
            async with models.hold("embed:a"):
                await release.wait()
                assert "embed:a" in device.loaded

        holding = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        other = await begin_to_use(models, device, "b")
        again = asyncio.create_task(use(models, device, "a"))  # it does not keep the other from its turn
        await asyncio.sleep(0.1)
        assert device.loaded == {"embed:a"}
        assert not other.done()
        assert not again.done()
        release.set()
        async with asyncio.timeout(5):
            await asyncio.gather(holding, other, again)
        assert device.most == 1


async def test_a_model_stays_where_nobody_waits_for_the_other_any_more() -> None:
    device = Device()
    async with residency(device, loaded="a", max_loaded_gb=1) as models, models.hold("embed:a"):
        other = await begin_to_use(models, device, "b")
        same = asyncio.create_task(use(models, device, "a"))
        other.cancel()
        async with asyncio.timeout(5):
            await same
        assert models.residents["embed:b"].state is ModelState.UNLOADED


async def test_what_an_admin_asks_for_is_loaded_though_the_request_that_waited_for_it_has_left() -> None:
    device = Device()
    async with residency(device, loaded="a", max_loaded_gb=1) as models:
        async with models.hold("embed:a"):
            waiting = await begin_to_use(models, device, "b")
            assert models.load("embed:b").state is ModelState.LOADING  # it waits for the room of a
            waiting.cancel()
            await asyncio.sleep(0.1)
        await until(lambda: device.loaded == {"embed:b"})


async def test_what_an_admin_asks_for_while_it_makes_room_is_loaded_again() -> None:
    device = Device()
    async with residency(device, loaded="a", max_loaded_gb=1) as models:
        async with models.hold("embed:a"):
            waiting = await begin_to_use(models, device, "b")
            models.load("embed:a")
        await waiting
        await until(lambda: device.loaded == {"embed:a"})
        # That was once: after this it is gone until somebody asks again.
        models.unload("embed:a")
        await until(lambda: models.residents["embed:a"].state is ModelState.UNLOADED)
        await asyncio.sleep(0.01)
        assert not device.loaded


async def test_a_model_whose_time_ends_while_another_wants_its_room_goes_though_the_other_leaves() -> None:
    device, rows = Device(), {"embed:a"}
    settings = load_settings({"max_loaded_gb": 1, "unload_after": "20ms"}).model
    models = Residency(settings, device.load, device.unload, has_rows=lambda key: key in rows)
    for name in NAMES:
        models.add(card(name), GIGABYTE, is_loaded=name == "a")
    device.loaded.add("embed:a")
    waiting = asyncio.create_task(use(models, device, "b"))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.sleep(0.1)
    assert device.loaded == {"embed:a"}
    rows.clear()
    await until(lambda: not device.loaded)
    await models.close()


@pytest.mark.parametrize("how", ["time", "admin"])
async def test_a_model_that_goes_anyway_makes_room_before_any_other(how: str) -> None:
    """`c` is being loaded, `b` waits behind it, and then `a` is to go, whose turn comes last."""
    device = Device()
    device.gate = asyncio.Event()
    async with residency(device, loaded="a", max_loaded_gb=2, pinned_models="c") as models:
        first = await begin_to_use(models, device, "c")
        second = await begin_to_use(models, device, "b")
        if how == "admin":
            models.unload("embed:a")
        else:
            await use(models, device, "a", Caller(keep_alive=0.0))
        await until(lambda: models.residents["embed:a"].state is ModelState.UNLOADING)
        device.gate.set()
        async with asyncio.timeout(5):
            await asyncio.gather(first, second)
        assert device.loaded == {"embed:b", "embed:c"}
        await use(models, device, "b")
        assert device.most == 2


async def test_pinned_models_are_never_unloaded() -> None:
    device = Device()
    settings = {"max_loaded_gb": 1, "pinned_models": "a", "unload_after": "0"}
    async with residency(device, loaded="a", **settings) as models:
        await use(models, device, "a", Caller(keep_alive=0.0))
        with pytest.raises(ModelNotLoaded, match="PINNED_MODELS"):
            await use(models, device, "b")
        with pytest.raises(ModelConflict, match="PINNED_MODELS"):
            models.unload("embed:a")
        await asyncio.sleep(0.05)
        assert device.loaded == {"embed:a"}


async def test_no_model_is_unloaded_for_one_that_has_no_room_even_so() -> None:
    device = Device()
    async with residency(device, loaded="abc", max_loaded_gb=4, pinned_models="a") as models:
        models.add(card("huge", 5 * GIGABYTE), 5 * GIGABYTE, is_loaded=False)
        models.add(card("large", 3 * GIGABYTE), 3 * GIGABYTE, is_loaded=False)
        models.add(card("larger", 4 * GIGABYTE), 4 * GIGABYTE, is_loaded=False)
        for name in ("huge", "larger"):
            with pytest.raises(ModelNotLoaded, match=r"MAX_LOADED_GB.*raise the limit"):
                await use(models, device, name)
        assert device.loaded == {"embed:a", "embed:b", "embed:c"}
        await use(models, device, "large")
        assert device.loaded == {"embed:a", "embed:large"}


async def test_idle_models_are_unloaded_each_after_its_time() -> None:
    device = Device()
    async with residency(device, loaded="abc", unload_after="50ms,b=-1,c=0.2") as models:
        await until(lambda: device.loaded == {"embed:b", "embed:c"})
        await until(lambda: device.loaded == {"embed:b"})
        await use(models, device, "a")
        await until(lambda: device.loaded == {"embed:b"})


async def test_keep_alive_is_the_last_that_was_said_until_the_model_is_loaded_again() -> None:
    device = Device()
    async with residency(device, loaded="ab", unload_after="50ms") as models:
        await use(models, device, "a", Caller(keep_alive=inf))
        await use(models, device, "a")
        await until(lambda: device.loaded == {"embed:a"})
        await use(models, device, "a", Caller(keep_alive=0.0))
        await until(lambda: not device.loaded)
        await use(models, device, "a")
        assert models.residents["embed:a"].keep_alive == 0.05


async def test_a_key_among_several_cannot_take_a_model_from_the_others() -> None:
    device = Device()
    async with residency(device, loaded="a") as models:
        caller = Caller(keep_alive=0.0, may_unload=False)
        await use(models, device, "a", caller)
        await asyncio.sleep(0.05)
        assert device.loaded == {"embed:a"}
        await use(models, device, "a", replace(caller, may_unload=True))
        await until(lambda: not device.loaded)


async def test_a_model_in_use_is_not_unloaded_by_an_admin() -> None:
    device = Device()
    async with residency(device, loaded="a") as models:
        async with models.hold("embed:a"):
            with pytest.raises(ModelConflict, match="in use"):
                models.unload("embed:a")
        models.unload("embed:a")
        with pytest.raises(ModelConflict, match="unloading"):
            models.unload("embed:a")
        await use(models, device, "a")  # whoever comes while it goes has it loaded again
        with pytest.raises(ModelNotFound):
            models.unload("embed:nope")


async def test_rows_that_nobody_waits_for_any_more_keep_a_model_too() -> None:
    device, rows = Device(), {"embed:a"}
    models = Residency(
        load_settings({"unload_after": "0"}).model, device.load, device.unload, has_rows=lambda key: key in rows
    )
    models.add(card("a"), GIGABYTE, is_loaded=True)
    device.loaded.add("embed:a")
    with pytest.raises(ModelConflict, match="in use"):
        models.unload("embed:a")
    await asyncio.sleep(0.02)
    assert device.loaded
    rows.clear()
    await until(lambda: not device.loaded)
    await models.close()


async def test_the_stop_answers_whoever_waits() -> None:
    device = Device()
    device.gate = asyncio.Event()
    async with residency(device) as models:
        waiting = [asyncio.create_task(use(models, device, name)) for name in "abca"]
        await asyncio.sleep(0.01)
        await models.close()
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, ShuttingDown) for answer in answers)
        with pytest.raises(ShuttingDown):
            await use(models, device, "b")
        for late in (models.load, models.unload):  # an admin's call whose look into the cache took until now
            with pytest.raises(ShuttingDown):
                late("embed:b")


@pytest.mark.parametrize("seed", range(5))
async def test_at_random_every_request_is_answered_and_no_model_in_use_is_taken(seed: int) -> None:
    """`Device` fails on a model that is taken while it is used; `use` on one that is not there."""
    choose, device = random.Random(seed), Device()
    device.fails = lambda key: StartupError("now and then") if choose.random() < 0.05 else None
    outcomes: Counter[str] = Counter()
    async with residency(device, loaded="a", max_loaded_gb=choose.choice([1, 2])) as models:

        async def request() -> None:
            await asyncio.sleep(choose.random() / 20)
            caller = Caller(keep_alive=choose.choice([None, None, 0.0, 0.01, inf]))
            try:
                async with asyncio.timeout(choose.choice([None, None, 0.01])):
                    await use(models, device, choose.choice(NAMES), caller, turns=choose.randrange(20))
            except (ModelNotLoaded, ModelLoading, TimeoutError) as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes["answered"] += 1

        async def meddle() -> None:
            for _ in range(40):
                await asyncio.sleep(choose.random() / 200)
                change = choose.choice([models.load, models.unload])
                try:
                    change(f"embed:{choose.choice(NAMES)}")
                except ModelConflict:
                    outcomes["conflict"] += 1

        async with asyncio.timeout(20):
            await asyncio.gather(meddle(), *(request() for _ in range(200)))
        assert outcomes["answered"] > 20
        assert not any(resident.held or resident.waiters for resident in models.residents.values())
        assert device.most <= 2


class SleepingDevice(Device):
    """Whoever is unloaded sleeps, one model at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep: dict[str, int] = {}

    async def load(self, key: str, progress: Progress) -> tuple[ModelCard, int]:
        loaded = await super().load(key, progress)
        self.asleep.pop(key, None)
        return loaded

    async def unload(self, key: str) -> None:
        self.asleep.pop(key, None)
        if key in self.loaded:
            await super().unload(key)

    async def put_to_sleep(self, key: str) -> None:
        await super().unload(key)
        self.asleep = {key: GIGABYTE}


async def test_who_makes_room_sleeps_until_it_is_needed_or_another_sleeps() -> None:
    device = SleepingDevice()
    models = Residency(
        load_settings({"max_loaded_gb": 1.2}).model,
        device.load,
        device.unload,
        put_to_sleep=device.put_to_sleep,
        asleep=lambda: device.asleep,
    )
    for name in NAMES:
        models.add(card(name), GIGABYTE, is_loaded=name == "a")
    device.loaded = {"embed:a"}

    def states() -> list[str]:
        return [resident.state.value for resident in models.residents.values()]

    await use(models, device, "b")
    assert states() == ["sleeping", "loaded", "unloaded"]
    assert models.residents["embed:a"].sleeping_bytes == GIGABYTE
    await use(models, device, "c")
    assert states() == ["unloaded", "sleeping", "loaded"]
    device.fails = lambda key: StartupError("no room") if key == "embed:b" else None
    with pytest.raises(ModelNotLoaded):
        await use(models, device, "b")
    assert states()[1:] == ["failed", "sleeping"]
    device.fails = lambda key: None
    models.load("embed:b")
    await until(lambda: states()[1] == "loaded")
    models.unload("embed:b")  # an admin's: for good
    await until(lambda: states()[1] == "unloaded")
    await asyncio.gather(*(use(models, device, name) for name in NAMES * 3))
    sleeping = next(resident for resident in models.residents.values() if resident.state is ModelState.SLEEPING)
    models.unload(sleeping.key)
    await until(lambda: sleeping.state is ModelState.UNLOADED)
    assert not device.asleep
    await models.close()
