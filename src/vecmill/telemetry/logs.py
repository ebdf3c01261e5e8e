"""The log: readable lines, or one JSON object a line. Never texts, never secrets.

What clients say may stand in it, in a path or the name of a field. So nothing in it ends a line, moves a terminal's
cursor or turns the direction of writing, and nothing is long.
Source: https://cheatsheetseries.owasp.org/cheatsheets/Logging_Cheat_Sheet.html (event data, log injection)
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime

import orjson

# What a LogRecord carries of itself; everything else came in through `extra`.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
LONGEST_MESSAGE, LONGEST_VALUE = 2000, 500  # characters
LONGEST_LINE, MOST_LINES = 500, 200  # of a traceback
DEEPEST = 4  # of values within values
NUMBERS = (bool, int, float)
QUOTED = re.compile('[ ="]')


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and whatever `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), LONGEST_MESSAGE),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = "\n".join(_traceback(self.formatException(record.exc_info)))
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """time level message key=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        pairs = "".join(f" {key}={_value(value)}" for key, value in extras(record).items())
        line = f"{time} {record.levelname.lower():<8} {printable(record.getMessage(), LONGEST_MESSAGE)}{pairs}"
        if not record.exc_info:
            return line
        # Indented, so that no line of an exception's text can be taken for one of the log.
        return "\n    ".join([line, *_traceback(self.formatException(record.exc_info))])


def extras(record: logging.LogRecord) -> dict[str, object]:
    """The fields that the caller put into `extra`, and the replica's name, as they may be written."""
    return {key: _bounded(value) for key, value in vars(record).items() if key not in STANDARD}


def printable(text: str, longest: int) -> str:
    """The text on one line: what does not print is escaped, what is too long is cut, and says so."""
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _bounded(value: object, depth: int = 0) -> object:
    if value is None or isinstance(value, NUMBERS):
        return value
    if isinstance(value, str):
        return printable(value, LONGEST_VALUE)
    if isinstance(value, (dict, list, tuple)) and depth == DEEPEST:
        return "..."
    if isinstance(value, dict):
        return {printable(str(key), LONGEST_VALUE): _bounded(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bounded(inner, depth + 1) for inner in value]
    return printable(str(value), LONGEST_VALUE)


def _value(value: object) -> object:
    """In quotes where it would be taken for several fields; lists and objects as JSON."""
    if isinstance(value, (dict, list)):
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()
    if isinstance(value, str) and QUOTED.search(value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value


def _traceback(text: str) -> list[str]:
    lines = [printable(line, LONGEST_LINE) for line in text.split("\n")]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines = [*lines[:half], f"... ({len(lines) - 2 * half} lines)", *lines[-half:]]
    return lines


def configure_logging(log_format: str, level: str, replica: str | None = None) -> None:
    """Send vecmill's and uvicorn's log to stderr in one format; everything else from `warning` on.

    `replica`: a field of each line, where it is given.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    if replica is not None:
        handler.addFilter(lambda record: _with_replica(record, replica))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("vecmill").setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _with_replica(record: logging.LogRecord, replica: str) -> bool:
    record.replica = replica
    return True
