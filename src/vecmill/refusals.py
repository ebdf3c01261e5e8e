"""The sentence in another server's error answer, for the server's proxy and for the tools."""

from __future__ import annotations

import orjson

SHOWN_CHARACTERS = 500
SHOWN_START = 200  # of what is not JSON


def message_of(content: bytes) -> str:
    """The `message`, `detail` or `error` of an error's answer where it is JSON, else its beginning; shortened."""
    try:
        message = orjson.loads(content)
    except ValueError:
        return start_of(content).strip()
    for name in ("error", "message", "detail"):
        if isinstance(message, dict) and name in message:
            message = message[name]
    return str(message)[:SHOWN_CHARACTERS]


def start_of(content: bytes) -> str:
    """The beginning of an answer, as far as it is shown."""
    return content[:SHOWN_START].decode(errors="replace")
