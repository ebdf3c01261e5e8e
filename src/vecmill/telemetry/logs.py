"""The log: readable lines, or one JSON object a line. Never texts, never secrets."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

# What a LogRecord carries of itself; everything else came in through `extra`.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and whatever `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class TextFormatter(logging.Formatter):
    """time level message key=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        pairs = "".join(f" {key}={value}" for key, value in extras(record).items())
        line = f"{time} {record.levelname.lower():<8} {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def extras(record: logging.LogRecord) -> dict[str, object]:
    """The fields that the caller put into `extra`."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD}


def configure_logging(log_format: str, level: str) -> None:
    """Send vecmill's and uvicorn's log to stderr in one format; everything else from `warning` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("vecmill").setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
