"""Nothing that a client says can write a line of the log, move the reader's terminal, or fill the disk."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import serving
from vecmill.telemetry.logs import JsonFormatter, TextFormatter

FORGED = "12:00:00 critical the server was opened"
HOSTILE = [
    f"x\n{FORGED}",
    f"x\r{FORGED}",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\u2028x\u2029",
    "\u202egnp.exe",
    "\x00\x7f",
    "\ud800",
]
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")
FORMATTERS = [TextFormatter(), JsonFormatter()]


@contextmanager
def written(formatter: logging.Formatter, level: int = logging.DEBUG) -> Iterator[io.StringIO]:
    """What vecmill logs meanwhile, as it goes to stderr."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("vecmill")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # pytest would keep the records, and cannot send half a character from process to process
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = True


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_value_stays_on_its_line(value: str, formatter: logging.Formatter) -> None:
    with written(formatter) as log:
        for name in ("path", "param"):
            logging.getLogger("vecmill.x").info(
                "refused %s", value, extra={name: value, "deep": {value: [value, {value}]}}
            )
        assert not CONTROLS.search(log.getvalue())
        lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert all("refused" in line for line in lines)


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
@pytest.mark.parametrize(
    "message", [*HOSTILE, "y" * 8_000_000, "z\n" * 100_000], ids=lambda message: ascii(message)[:20]
)
def test_an_exception_says_nothing_hostile(message: str, formatter: logging.Formatter) -> None:
    with written(formatter) as log:
        try:
            raise ValueError(message)
        except ValueError:
            logging.getLogger("vecmill.x").exception("a fault")
        text = log.getvalue()
    assert not CONTROLS.search(text)
    assert "ValueError" in text
    assert len(text) < 150_000
    assert not any(line.startswith((FORGED, "z", "\\x")) for line in text.splitlines())
    if isinstance(formatter, TextFormatter):
        assert all(line.startswith("    ") for line in text.splitlines()[1:])


def test_a_value_with_spaces_is_one_value() -> None:
    with written(TextFormatter()) as log:
        logging.getLogger("vecmill.x").info("request", extra={"path": '/x" status=200 key="admin', "status": 404})
        assert log.getvalue().endswith(r' request path="/x\" status=200 key=\"admin" status=404' + "\n")


def test_json_stays_json() -> None:
    with written(JsonFormatter()) as log:
        extra = {"models": [{"id": "m", "ms": 1.5}], "none": None, "ok": True, 7: "seven"}
        logging.getLogger("vecmill.x").info("ready", extra=extra)  # type: ignore[arg-type]
        entry = json.loads(log.getvalue())
    assert (entry["models"], entry["none"], entry["ok"], entry["7"]) == ([{"id": "m", "ms": 1.5}], None, True, "seven")


@pytest.mark.parametrize("formatter", FORMATTERS, ids=["text", "json"])
async def test_a_refused_request_writes_little(formatter: logging.Formatter) -> None:
    long = "k" * 8_000_000
    async with serving(strict_model=True) as client:
        with written(formatter) as log:
            answers = [
                await client.post("/v1/embeddings", json={"input": "x", long: 1, "dimensions": {long: 1}}),
                await client.post("/v1/embeddings", json={"input": {long: "x"}}),
                await client.post("/v1/embeddings", json={"input": "x", "model": long}),
                await client.post("/embed", json={"inputs": ["x"], "truncation_direction": long}),
                await client.post("/jobs", json={"project": long, "total_chunks": 1}),
                await client.post(f"/jobs/{'%0a12:00:00' * 1000}/fail", json={"error": "x"}),
                await client.get("/%0d%0a12:00:00%20critical%20forged%1b[2J" + "x" * 50_000),
                await client.post(
                    "/embed", json={"inputs": "x"}, headers={"x-job-id": "j" * 50_000, "x-priority": "p" * 9}
                ),
            ]
            text = log.getvalue()
        assert {answer.status_code for answer in answers} <= {200, 400, 404, 422}
        assert len(text) < 8 * 4000
        assert not CONTROLS.search(text)
        assert text.count("request") >= 8
        for answer in answers:
            assert len(answer.content) <= 4096 or answer.is_success, answer.content[:200]
