"""Files of `NAME=value` lines that administrators edit: read, and changed without losing what they wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping

LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=(.*)")


def values(text: str) -> dict[str, str]:
    """Names and values, without quotes and comments."""
    found = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            found[match[1]] = _value(match[2].strip())
    return found


def _value(raw: str) -> str:
    if raw[:1] in ("'", '"'):
        return raw[1:].partition(raw[0])[0]
    return re.split(r"\s+#", raw, maxsplit=1)[0].strip() if not raw.startswith("#") else ""


def merged(text: str, changes: Mapping[str, str], additions: Mapping[str, str]) -> str:
    """The same file with `changes` in place of what it says, and `additions` where it says nothing of them.

    Every other line stays as it is.
    """
    present = values(text)
    lines = []
    for line in text.splitlines():
        match = LINE.match(line)
        name = match[1] if match else ""
        if name in changes and present[name] != changes[name]:
            line = f"{name}={changes[name]}"
        lines.append(line)
    lines += [f"{name}={value}" for name, value in {**additions, **changes}.items() if name not in present]
    return "\n".join(lines) + "\n" if lines else ""


SECRET = re.compile(r"\s*(?:export\s+)?(\w*(?:KEY|TOKEN|SECRET|PASSWORD)|REDIS_URL)\s*=\s*\S")


def conceal(line: str) -> str:
    """A line of an env file without the value of a key or token."""
    found = SECRET.match(line)
    return f"{found[1]}=(not shown)" if found else line
