"""Which keys of a checkpoint's JSON files are known here, and with which values. Reads no tensors.

Every key that can change a vector or a score is either honoured or refused by name; so a key that no table lists is
refused, unless it is listed as one that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError

LONGEST_VALUE = 80  # characters of a value that an error shows


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key may say."""

    accepts: Callable[[Any], bool]
    supported: str = ""
    """The values that are accepted, for the error's text."""


HONOURED = Rule(lambda value: True)
"""Read by what builds the model or the tokenizer, whatever it says."""
HARMLESS = Rule(lambda value: True)
"""Changes no vector and no score: training, generation, bookkeeping."""


def only(*values: Any) -> Rule:
    """One of these values: what is implemented. None also stands for a key that is left out or null."""
    return Rule(
        lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values),
        ", ".join("null" if one is None else repr(one) for one in values),
    )


def rules(rule: Rule, names: Iterable[str]) -> dict[str, Rule]:
    """The same rule for several keys."""
    return dict.fromkeys(names, rule)


def check_keys(
    named: str, file: Path, found: Mapping[str, Any], known: Mapping[str, Rule], *, within: str = ""
) -> None:
    """Every key of a JSON object is known and says what is supported.

    Args:
        named: the setting that names the model, for the error.
        file: what the object was read from.
        within: the key of the object, where it is a part of the file's.

    Raises:
        StartupError: a key is not known, or its value is not supported.
    """
    prefix = f"{within}." if within else ""
    for key, value in found.items():
        rule = known.get(key)
        if rule is None:
            raise StartupError(
                f"{named}: {file.name} has the key `{prefix}{key}` ({_shown(value)}), which is not known here: what it "
                f"changes would be missing from the vectors. If it changes nothing, remove it from {file}."
            )
        if not rule.accepts(value):
            raise StartupError(
                f"{named}: {file.name} has `{prefix}{key}`: {_shown(value)}; supported: {rule.supported}."
            )


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
