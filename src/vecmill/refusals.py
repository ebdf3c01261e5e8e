"""What the commands that call a server share, whichever server it is: how it is reached, and what its refusal says."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import orjson

# For `mounts` of an HTTP client: what is on this machine is not reached by way of the environment's proxy.
NOT_THROUGH_PROXIES: Mapping[str, None] = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
SHOWN_CHARACTERS = 500
SHOWN_START = 200  # of what is not JSON


def message_of(content: bytes) -> str:
    """What an error's answer says, shortened; its `message`, `detail` or `error` where it is JSON."""
    try:
        found = orjson.loads(content)
    except ValueError:
        return start_of(content).strip()
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return str(found)[:SHOWN_CHARACTERS]


def start_of(content: bytes) -> str:
    """The beginning of an answer, as far as it is shown."""
    return content[:SHOWN_START].decode(errors="replace")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds from now; it may be a number or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
