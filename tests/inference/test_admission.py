"""Admission: whole requests or none, and no room is ever lost."""

from __future__ import annotations

import pytest

from vecmill.core.errors import Overloaded
from vecmill.inference.admission import Admission


def admission(requests: int = 10, tokens: int = 100, rate: float = 0.0) -> Admission:
    return Admission(requests, tokens, lambda: rate)


def test_room_is_given_back_also_after_an_error() -> None:
    room = admission()
    with pytest.raises(KeyError), room.admit(60):
        raise KeyError
    assert (room.requests, room.tokens) == (0, 0)


def test_what_does_not_fit_is_refused_whole() -> None:
    room = admission()
    with room.admit(60):
        with pytest.raises(Overloaded, match="MAX_QUEUED_TOKENS"), room.admit(41):
            pass
        with room.admit(40):
            assert room.tokens == 100


def test_an_estimate_is_settled_by_the_count() -> None:
    room = admission()
    with room.admit(90) as permit:
        permit.settle(30)
        with room.admit(70):
            assert room.tokens == 100
    assert room.tokens == 0


def test_a_lone_request_is_admitted_whatever_its_size() -> None:
    room = admission()
    with room.admit(5000):
        assert room.tokens == 5000


def test_the_number_of_requests_is_bounded() -> None:
    room = admission(requests=1)
    with room.admit(1), pytest.raises(Overloaded, match="MAX_CONCURRENT_REQUESTS"), room.admit(1):
        pass


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1), (1000.0, 1), (5.0, 5), (0.01, 60)])
def test_retry_after_follows_the_backlog(rate: float, seconds: int) -> None:
    room = admission(rate=rate)
    with room.admit(100), pytest.raises(Overloaded) as refused, room.admit(1):
        pass
    assert refused.value.retry_after == seconds
