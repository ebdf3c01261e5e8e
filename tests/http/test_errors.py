"""Every error has a status and a body in every dialect."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
import pytest

from vecmill.core.errors import Overloaded, StartupError, Unavailable, VecmillError
from vecmill.http.errors import SHAPES, error_response


def every_error(base: type[VecmillError] = VecmillError) -> Iterator[type[VecmillError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from every_error(kind)


# A StartupError ends the process before there is anybody to answer.
SERVED = [kind for kind in every_error() if kind is not StartupError]


@pytest.mark.parametrize("prefix", [prefix for prefix, _ in SHAPES])
@pytest.mark.parametrize("kind", SERVED)
def test_every_error_is_answered_in_every_dialect(kind: type[VecmillError], prefix: str) -> None:
    response = error_response(prefix, kind())
    assert 400 <= response.status_code < 600
    assert response.status_code != 500
    body = orjson.loads(bytes(response.body))
    assert kind().message in orjson.dumps(body).decode()
    if issubclass(kind, Overloaded | Unavailable):
        assert int(response.headers["retry-after"]) >= 1
        # CodeCartographer tries again only where the text says one of these.
        assert "temporarily" in kind().message or "503" in kind().message


def test_the_messages_are_sentences() -> None:
    assert all(len(kind().message) > 15 for kind in SERVED)
