"""What every tool that calls a server shares: addresses, keys, and when a call is made again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from tests.tools.bench.command_line import bench
from tests.tools.bench.scripted_server import Reply, scripted, vectors
from tests.tools.embed.command_line import embed
from vecmill.tools.console import UsageError
from vecmill.tools.http_client import Patience, Retries, base_url, get_here, request_headers, retry_after

STATUSES = frozenset({503})


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("localhost:80", "http://localhost:80"),
        ("https://host/v1/", "https://host/v1"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["http://", "ftp://127.0.0.1", "http://127.0.0.1:port", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        base_url(url)


@pytest.mark.parametrize("run", [bench, lambda *options: embed("-", "-o", "out.npy", "--url", *options)])
def test_a_key_that_cannot_be_sent_is_one_sentence(run: object) -> None:
    result = run("http://127.0.0.1:1", "--api-key", "schlüssel")  # type: ignore[operator]
    assert result.exit_code == 2
    assert result.stderr == "vecmill: The API key is not plain ASCII, as a header must be.\n"
    assert "Authorization" not in request_headers(None)


def test_retry_after() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": later}) == pytest.approx(100, abs=5)
    assert retry_after({"retry-after": format_datetime(datetime(2026, 1, 1, tzinfo=UTC), usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None
    for nonsense in ("\u00b2", "-1", "1e9", "9" * 5000, "Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "\x1b[2J"):
        assert retry_after({"retry-after": nonsense}) is None


def test_waits_grow_until_patience_ends() -> None:
    retries = Retries(Patience(60.0, STATUSES))
    assert [retries.next_wait(None) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert retries.next_wait(30.0) == 30.0
    assert retries.next_wait(61.0) is None


def test_a_measurement_waits_only_when_told_to() -> None:
    retries = Retries(Patience(60.0, STATUSES, only_when_told=True))
    assert retries.next_wait(None) is None
    assert retries.next_wait(1.0) == 1.0


def test_an_answer_that_cannot_be_decompressed_is_an_error_that_counts() -> None:
    broken = Reply({"data": []}, headers={"Content-Encoding": "gzip"})
    with scripted(lambda number, body: broken if number == 1 else vectors(body)) as server:
        result = bench(server.url, "--texts", 4, "--batch", 2, "--connections", 1)
    assert result.exit_code == 1
    assert "errors    1 connection: 1 x DecodingError\n" in result.stdout


def test_one_look_at_what_does_not_speak_http() -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        url = server.url
        answer = get_here(f"{url}/health", 5.0)
        assert answer is not None
        assert answer.status_code == 501  # it has only POST
    assert get_here(f"{url}/health", 5.0) is None
