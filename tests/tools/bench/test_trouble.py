"""Servers that are busy, broken, something else, or not there; options that contradict."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.servers import free_port
from tests.tools.bench.command_line import bench, bench_json
from tests.tools.bench.scripted_server import Reply, scripted, vectors

LEVEL = ("--texts", 4, "--batch", 2, "--connections", 1)
BUSY = {"error": {"message": "busy"}}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", ["0", format_datetime(datetime(2026, 1, 1, tzinfo=UTC), usegmt=True)])
def test_a_busy_server_is_waited_for(status: int, retry_after: str) -> None:
    def answer(number: int, body: Any) -> Reply:
        return Reply(BUSY, status, {"Retry-After": retry_after}) if number in (0, 2, 3) else vectors(body)

    with scripted(answer) as server:
        report = bench_json(server.url, *LEVEL)
    outcomes = report["levels"][0]["outcomes"]
    assert outcomes["retries"] == {str(status): 2}  # the first was the warm-up's
    assert outcomes["errors"] == {}
    assert outcomes["requests"] == 2
    assert [body for _, _, body in server.asked[2:5]] == [server.asked[2][2]] * 3


def test_other_errors_are_counted_and_shown() -> None:
    def answer(number: int, body: Any) -> Reply:
        return Reply({"error": {"message": "the device failed"}}, 500) if number == 1 else vectors(body)

    with scripted(answer) as server:
        result = bench(server.url, *LEVEL)
    assert result.exit_code == 1
    assert "errors    1 connection: 1 x 500\n" in result.stdout
    assert "error     500: the device failed" in result.stdout


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "soon"}, {"Retry-After": "86400"}])
def test_busy_for_longer_than_one_waits_is_an_error(headers: dict[str, str]) -> None:
    def answer(number: int, body: Any) -> Reply:
        return Reply(BUSY, 429, headers) if number == 1 else vectors(body)

    with scripted(answer) as server:
        result = bench("--json", server.url, *LEVEL)
    assert result.exit_code == 1
    outcomes = orjson.loads(result.stdout)["levels"][0]["outcomes"]
    assert outcomes["errors"] == {"429": 1}
    assert outcomes["first_error"] == "429: busy"
    assert outcomes["retries"] == {}


DIGITS = b"9" * 400


@pytest.mark.parametrize(
    "nonsense",
    [
        Reply(b'{"data": [{"embedding": [1]}, {"embedding": [1]}], "usage": {"prompt_tokens": %b}}' % DIGITS),
        Reply(b'{"usage": {"prompt_tokens": 9}, "cached_tokens": -%b, "data": 1}' % DIGITS),
        Reply([], headers={"X-Compute-Tokens": "9" * 5000, "X-Cached-Tokens": "\u00b2"}),
        Reply(b"[" * 100_000),
        Reply(b"\x1b[2J\xff", 500),
        Reply(b'{"error": "\\u001b[2J"}', 429, {"Retry-After": "\u00b2"}),
        Reply(b"", 302, {"Location": "http://[", "Set-Cookie": "\x1b[2J=;;;"}),
    ],
)
def test_nonsense_is_counted_or_said_in_a_sentence(nonsense: Reply) -> None:
    for good in (0, 1):
        answers = [vectors] * good

        def answer(number: int, body: Any, answers: list[Any] = answers) -> Reply:
            return answers[number](body) if number < len(answers) else nonsense

        with scripted(answer) as server:
            result = bench(server.url, *LEVEL)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert (result.stdout + result.stderr).replace("\n", "").isprintable()


def test_an_answer_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmill.tools.http_client.LARGEST_VECTORS", 10_000)
    with scripted(lambda number, body: vectors(body) if number == 0 else Reply(b" " * 1_000_000)) as server:
        result = bench(server.url, *LEVEL)
    assert (result.exit_code, "error     TooLarge: the answer is larger than 10000 bytes" in result.stdout) == (1, True)


def test_a_server_that_only_fails_is_not_asked_on() -> None:
    with scripted(lambda number, body: vectors(body) if number == 0 else Reply("gone", 500)) as server:
        result = bench("--json", server.url, "--connections", 1, "--seconds", 600)
    assert result.exit_code == 1
    load = orjson.loads(result.stdout)["levels"][0]
    assert load["outcomes"]["errors"] == {"500": 100}
    assert load["outcomes"]["latency_ms"] is None
    assert load["texts_per_second"] == 0


def test_a_server_that_fails_both_times_in_mixed_mode_still_gets_its_tables() -> None:
    with scripted(lambda number, body: vectors(body) if number == 0 else Reply("gone", 500)) as server:
        result = bench(server.url, "--mixed", "--seconds", 0.6, "--query-interval", 0.3)
    assert result.exit_code == 1
    assert re.search(r"^errors    the person alone: 2 x 500\n", result.stdout, re.M)
    assert re.search(r"^errors    bulk alone: 10\d x 500\n", result.stdout, re.M)
    assert "error     500: gone" in result.stdout
    assert "costs the bulk" not in result.stdout


def test_an_unreachable_server_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = bench(url)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"vecmill: {url}/v1/embeddings cannot be reached: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply({"error": "no such path"}, 404), "was answered with 404: no such path"),
        (Reply({"detail": "Unauthorized"}, 401), "was answered with 401: Unauthorized"),
        (Reply("hello"), "is not one of the dialect openai"),
        (Reply({"data": [{"embedding": [1.0]}]}), "2 texts were sent and 1 vectors came back."),
        (Reply({"data": [{"embedding": [1.0]}, {"embedding": [1.0, 0.0]}]}), "have [1, 2] values"),
        (Reply({"data": [{"embedding": "%"}, {"embedding": "%"}]}), "is not one of the dialect openai"),
    ],
)
def test_a_wrong_first_answer_ends_it(reply: Reply, reason: str) -> None:
    with scripted(lambda number, body: reply) as server:
        result = bench(server.url, *LEVEL)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert reason in result.stderr
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--connections", "1,none"), "--connections 1,none: expected numbers"),
        (("--connections", "0"), "--connections 0: expected numbers"),
        (("--texts", "5", "--seconds", "1"), "give one of them"),
        (("--mixed", "--texts", "5"), "give --seconds, not --texts"),
        (("--mixed", "--connections", "1,2"), "give one number of --connections"),
        (("--mixed", "--plot", "plot.png"), "--mixed has one"),
        (("--plot", "plot.txt"), "the name must end in one of .pdf, .png, .svg"),
        (("--plot", "nowhere/plot.png"), "there is no folder"),
        (("--folder", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_options_that_do_not_fit_are_said_before_anything_is_sent(options: tuple[str, ...], reason: str) -> None:
    with scripted(lambda number, body: vectors(body)) as server:
        result = bench(server.url, *options)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert server.asked == []


@pytest.mark.parametrize("url", ["http://", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_an_address_that_is_none(url: str) -> None:
    result = bench(url)
    assert result.exit_code == 2
    assert f"vecmill: {url} is not an address" in result.stderr


def test_a_folder_without_text(tmp_path: Path) -> None:
    result = bench("http://127.0.0.1:1", "--folder", tmp_path)
    assert result.exit_code == 2
    assert f"There are no text files in {tmp_path}." in result.stderr


def test_waits_are_shown() -> None:
    def answer(number: int, body: Any) -> Reply:
        return Reply(BUSY, 503, {"Retry-After": "0"}) if number == 1 else vectors(body)

    with scripted(answer) as server:
        result = bench(server.url, *LEVEL)
    assert result.exit_code == 0, result.output
    assert "waited    1 connection: 1 x 503\n" in result.stdout
