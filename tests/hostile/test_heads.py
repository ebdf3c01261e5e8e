"""Request heads: bounded in size and time, read strictly, and whatever HTTP/1.1 allows is understood."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.faults.service import Service
from tests.hostile.conftest import HEAD_TIMEOUT, IDLE_TIMEOUT
from tests.hostile.wire import answer_to, connected, request

BODY = b'{"input":"x"}'
EMBED = request("/v1/embeddings", BODY)
HEALTH = request("/health", method="GET")
POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "head",
    [
        request("/health", b"", *["a: b"] * 200, method="GET"),
        request("/v1/embeddings", BODY, *[f"a{number}: {'b' * 1000}" for number in range(80)]),
        b"GET /health HTTP/1.1\r\nA: " + b"x" * 200_000,
        b"GET /health?" + b"x" * 200_000,
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["fields", "bytes", "one without end", "target without end", "target"],
)
def test_a_head_over_the_limits_is_a_431(wired: Service, head: bytes) -> None:
    with connected(wired.url) as wire:
        wire.send(head)
        answer = wire.answer()
        assert answer.status == 431
        assert "send fewer" in answer.text
        assert answer.headers["connection"] == "close"
        assert wire.ended()


def test_the_refusal_is_in_the_dialects_shape(wired: Service) -> None:
    many = ["a: b"] * 200
    assert (
        answer_to(wired.url, request("/v1/embeddings", BODY, *many)).json()["error"]["type"] == "invalid_request_error"
    )
    assert answer_to(wired.url, request("/embed", BODY, *many)).json()["error_type"] == "Validation"


def test_a_head_within_the_limits_is_read(wired: Service) -> None:
    assert answer_to(wired.url, request("/v1/embeddings", BODY, *["a: " + "b" * 500] * 100)).status == 200


def test_sixty_megabytes_of_header_lines_take_no_memory(wired: Service) -> None:
    process = psutil.Process(wired.pid)
    before = process.memory_info().rss
    with connected(wired.url) as wire:
        wire.send(b"GET /health HTTP/1.1\r\n")
        lines = b"a: b\r\n" * 20_000
        wire.trickle([lines] * 500, 0)
        assert wire.answer().status == 431
    assert process.memory_info().rss - before < 20_000_000
    assert answer_to(wired.url, HEALTH).status == 200


@pytest.mark.parametrize("pieces", [[b""], [b"x"] * 40], ids=["silence", "a byte now and then"])
def test_a_head_that_does_not_come_to_its_end_is_a_408(wired: Service, pieces: list[bytes]) -> None:
    began = time.monotonic()
    with connected(wired.url) as wire:
        wire.send(b"POST /v1/embeddings HTTP/1.1\r\nA: ")
        wire.trickle(pieces, 0.1)
        answer = wire.answer()
        assert answer.status == 408
        assert "HEAD_TIMEOUT" in answer.text
        assert wire.ended()
    assert HEAD_TIMEOUT - 0.5 < time.monotonic() - began < HEAD_TIMEOUT + 10


@pytest.mark.parametrize("first", [b"", b"\r\n\r\n", HEALTH], ids=["new", "blank lines", "used"])
def test_an_idle_connection_is_closed_without_a_word(wired: Service, first: bytes) -> None:
    began = time.monotonic()
    with connected(wired.url) as wire:
        wire.send(first)
        if first == HEALTH:
            assert wire.answer().status == 200
        assert wire.ended()
    assert IDLE_TIMEOUT - 0.5 < time.monotonic() - began < IDLE_TIMEOUT + 10


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + BODY,
        POST + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + BODY,
        POST + b"Content-Length: 13, 13\r\n\r\n" + BODY,
        POST + b"Content-Length: +13\r\n\r\n" + BODY,
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 0x0d\r\n\r\n" + BODY,
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        POST + b"X: a\r\n b\r\n\r\n",
        POST + b"X: a\0b\r\n\r\n",
        POST + b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"X: y\n\r\n",
        POST.replace(b"\r\n", b"\n") + b"\n",
        POST + b"Host: elsewhere\r\n\r\n",
        b"POST /v1/embeddings\r\n\r\n",
        b"POST v1/embeddings HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/embeddings HTTP/3.7\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
        b"hello\r\n",
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(wired: Service, data: bytes) -> None:
    with connected(wired.url) as wire:
        wire.send(data + HEALTH)
        answer = wire.answer()
        assert answer.status == 400
        assert answer.json()
        assert answer.headers["connection"] == "close"
        assert wire.ended()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes.fromhex("160301020001000100fc0303"), "not HTTPS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "no HTTP/2"),
        (b"GET /health HTTP/2.0\r\nHost: a\r\n\r\n", "HTTP/2.0 is not spoken here: send HTTP/1.1"),
        (b"GET /health\n\r\n\r\n", "HTTP/0.9 is not spoken here: send HTTP/1.1"),
    ],
    ids=["TLS", "HTTP/2", "a version of HTTP/2", "HTTP/0.9"],
)
def test_another_protocol_is_told_so(wired: Service, data: bytes, message: str) -> None:
    answer = answer_to(wired.url, data)
    assert answer.status == 400
    assert message in answer.text


UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"),
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="),
}


@pytest.mark.parametrize("protocol", UPGRADES)
@pytest.mark.parametrize("cut", ["nowhere", "after the head", "within"])
def test_an_upgrade_is_not_done_and_the_body_kept(wired: Service, protocol: str, cut: str) -> None:
    asks = request("/v1/embeddings", BODY, *UPGRADES[protocol])
    end = asks.index(b"\r\n\r\n") + 4
    cuts = {"nowhere": [], "after the head": [end], "within": [12, end - 2, end + 3]}[cut]
    pieces = [asks[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(asks)], strict=True)]
    with connected(wired.url) as wire:
        for _ in range(2):
            wire.send(*pieces)
            answer = wire.answer()
            assert answer.status == 200
            assert "upgrade" not in answer.headers


def test_pipelined_requests_are_answered_in_their_order(wired: Service) -> None:
    with connected(wired.url) as wire:
        wire.send((request("/nowhere", BODY) + EMBED + HEALTH) * 20)
        assert [wire.answer().status for _ in range(60)] == [404, 200, 200] * 20


def test_hundreds_of_pipelined_requests_are_bounded_in_memory(wired: Service) -> None:
    before = psutil.Process(wired.pid).memory_info().rss
    with connected(wired.url) as wire:
        wire.send(b"GET /ready HTTP/1.1\r\n\r\n" * 300)
        assert {wire.answer().status for _ in range(300)} == {200}
    assert psutil.Process(wired.pid).memory_info().rss - before < 20_000_000


@pytest.mark.parametrize(
    "bad",
    [
        request("/v1/embeddings", b"{"),
        request("/v1/embeddings", BODY, "Content-Encoding: gzip"),
        request("/v1/embeddings", BODY, "Origin: https://elsewhere.example"),
        request("/v1/embeddings", method="PUT", body=BODY),
        request("/nowhere", BODY),
    ],
)
def test_a_connection_outlives_an_error(wired: Service, bad: bytes) -> None:
    with connected(wired.url) as wire:
        for _ in range(2):
            wire.send(bad)
            assert 400 <= wire.answer().status < 500
            wire.send(EMBED)
            assert wire.answer().status == 200


def test_who_expects_continue_is_told_to(wired: Service) -> None:
    expecting = request("/v1/embeddings", BODY, "Expect: 100-continue")
    head, body = expecting[: -len(BODY)], expecting[-len(BODY) :]
    with connected(wired.url) as wire:
        for _ in range(2):
            wire.send(head)
            assert wire.answer().status == 100
            wire.send(body)
            assert wire.answer().status == 200


def test_who_expects_continue_and_is_refused_sends_no_body(wired: Service) -> None:
    with connected(wired.url) as wire:
        wire.send(POST + b"Expect: 100-continue\r\nContent-Length: 9999999999\r\n\r\n")
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert wire.ended()


def test_an_absolute_target_is_a_path_and_its_host_the_one_that_counts(wired: Service) -> None:
    absolute = EMBED.replace(b"POST /", b"POST http://localhost/").replace(b"Host: localhost", b"Host: evil.example")
    assert answer_to(wired.url, absolute).status == 200
    assert answer_to(wired.url, EMBED.replace(b"POST /", b"POST http://evil.example/")).status == 403
    assert answer_to(wired.url, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 404


def test_an_answer_to_http_1_0_closes(wired: Service) -> None:
    with connected(wired.url) as wire:
        wire.send(EMBED.replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.ended()


@pytest.mark.parametrize("field", ["Connection: close", "connection: keep-alive , Close"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "POST"])
def test_a_connection_is_closed_after_the_request_that_asks_for_it(wired: Service, method: str, field: str) -> None:
    body = BODY if method == "POST" else b""
    last = request("/v1/embeddings" if body else "/health", body, field, method=method)
    with connected(wired.url) as wire:
        wire.send(HEALTH + last + HEALTH)
        assert "connection" not in wire.answer().headers
        assert wire.answer(head_only=method == "HEAD").headers["connection"] == "close"
        assert wire.ended()


def test_fields_behind_a_chunked_body_are_none_of_the_head(wired: Service) -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n5;of=x\r\n" + BODY[:5] + b"\r\n8\r\n" + BODY[5:] + b"\r\n0\r\n"
    with connected(wired.url) as wire:
        wire.send(chunked + b"X-Request-ID: from-a-trailer\r\n\r\n" + HEALTH)
        answer = wire.answer()
        assert answer.status == 200
        assert answer.headers["x-request-id"] != "from-a-trailer"
        assert wire.answer().status == 200
