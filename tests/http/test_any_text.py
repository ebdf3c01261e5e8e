"""Every dialect with all of Unicode in its texts: vectors and scores are numbers, or it is the client's mistake."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.test_bad_input import BODIES
from tests.unicode_texts import texts, with_halves

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
QUICK = settings(ANY, derandomize=True)
JSON = {"content-type": "application/json"}


def places_of_texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all strings in a body."""
    if isinstance(value, str):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_of_texts(inner, (*path, key))


def with_text(body: Any, path: tuple[Any, ...], text: str) -> Any:
    changed = copy.deepcopy(body)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = text
    return changed


def check_numbers(value: Any) -> None:
    """orjson writes what is not finite as null."""
    if isinstance(value, list) and any(isinstance(each, float) for each in value):
        assert all(isinstance(each, float | int) for each in value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_numbers(inner)


async def check_any_text(client: httpx.AsyncClient, name: str, data: st.DataObject) -> None:
    path, example, _ = BODIES[name]
    place = data.draw(st.sampled_from(sorted(places_of_texts(example), key=str)))
    is_half = data.draw(st.sampled_from([False, False, True]))
    text = data.draw(with_halves if is_half else texts)
    content = json.dumps(with_text(example, place, text)).encode()
    answer = await client.post(path, content=content, headers=JSON)
    assert answer.status_code < 500, answer.text
    assert not is_half or answer.status_code >= 400, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        check_numbers(answer.json())


WITH_TEXTS = [name for name in BODIES if next(places_of_texts(BODIES[name][1]), None) is not None]


@settings(QUICK, max_examples=40)
@given(name=st.sampled_from(WITH_TEXTS), data=st.data())
async def test_any_text_in_any_dialect(client: httpx.AsyncClient, name: str, data: st.DataObject) -> None:
    await check_any_text(client, name, data)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", WITH_TEXTS)
@settings(ANY, max_examples=300)
@given(data=st.data())
async def test_many_texts_in_any_dialect(client: httpx.AsyncClient, name: str, data: st.DataObject) -> None:
    await check_any_text(client, name, data)


@settings(QUICK, max_examples=8)
@given(inputs=st.lists(texts, min_size=2, max_size=5))
async def test_a_text_among_others_has_the_vector_it_has_alone(client: httpx.AsyncClient, inputs: list[str]) -> None:
    async def vectors(some: list[str]) -> Any:
        answer = await client.post("/embed", json={"inputs": some})
        assert answer.is_success, answer.text
        return np.array(answer.json())

    together, alone = await vectors(inputs), await vectors(inputs[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5, rtol=0)
