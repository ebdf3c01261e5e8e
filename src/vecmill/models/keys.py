"""A checkpoint's JSON files: reading one, and which keys are known here with which values. Reads no tensors.

Every key that can change a vector or a score is either honoured or refused by name; so a key that no table lists is
refused, unless it is listed as one that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecmill.core.errors import StartupError, printable

LONGEST_VALUE = 80  # characters of a value that an error shows
LARGEST_NUMBER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key may say."""

    accepts: Callable[[Any], bool]
    supported: str = ""
    """The values that are accepted, for the error's text."""
    cure: str = ""
    """A sentence on what to do where it says something else."""


HONOURED = Rule(lambda value: True)
"""Read by what builds the model or the tokenizer, whatever it says."""
HARMLESS = Rule(lambda value: True)
"""Changes no vector and no score: training, generation, bookkeeping."""


def only(*values: Any, cure: str = "") -> Rule:
    """One of these values: what is implemented. None also stands for a key that is left out or null."""
    return Rule(
        lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values),
        ", ".join("null" if known is None else json.dumps(known) for known in values),
        cure,
    )


def whole(smallest: int = 1, largest: int = LARGEST_NUMBER, *, null: bool = False) -> Rule:
    """A whole number that is read; also null where that stands for a default."""

    def accepts(value: Any) -> bool:
        return (null and value is None) or (
            isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
        )

    bounds = f"from {smallest} on" if largest == LARGEST_NUMBER else f"from {smallest} to {largest:,}"
    return Rule(accepts, f"a whole number {bounds}" + (", null" if null else ""))


def positive(*, null: bool = False) -> Rule:
    """A finite number above 0 that is read; also null where that stands for a default."""

    def accepts(value: Any) -> bool:
        return (null and value is None) or (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_NUMBER
        )

    return Rule(accepts, "a number above 0" + (", null" if null else ""))


def rules(rule: Rule, names: Iterable[str]) -> dict[str, Rule]:
    """The same rule for several keys."""
    return dict.fromkeys(names, rule)


def read_json(named: str, file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file.

    Args:
        named: the setting that names the model, for the error.

    Raises:
        StartupError: it cannot be read, is no JSON, or no object.
    """
    try:
        if not file.is_file():
            return {}
    except OSError as error:
        raise StartupError(f"{named}: {file} cannot be read ({error.strerror}): give read access.") from None
    content = read_any_json(file)
    if not isinstance(content, dict):
        raise StartupError(f"{named}: {file} holds no JSON object; fetch the model again.")
    return content


def read_any_json(file: Path) -> Any:
    """What a file holds, of whatever type. Raises StartupError where it cannot be read or is no JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise StartupError(f"{file} cannot be read ({error.strerror}): give read access.") from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{file} is not valid JSON ({error}); fetch the model again.") from None


def check_keys(named: str, file: Path, content: Any, known: Mapping[str, Rule], *, within: str = "") -> None:
    """Every key of a JSON object is known and says what is supported.

    Args:
        named: the setting that names the model, for the error.
        file: what the object was read from.
        content: the object; anything else is refused.
        within: the key of the object, where it is a part of the file's.

    Raises:
        StartupError: it is no object, a key is not known, or its value is not supported.
    """
    prefix = f"{within}." if within else ""
    if not isinstance(content, Mapping):
        raise StartupError(f"{named}: {within or file.name} in {file} is no JSON object.")
    for key, value in content.items():
        rule = known.get(key)
        if rule is None:
            raise StartupError(
                f"{named}: {file.name} has the key `{prefix}{key}` ({shown(value)}), which is not known "
                f"here: what it changes would be missing from the vectors. If it changes nothing, remove it from "
                f"{file}."
            )
        if not rule.accepts(value):
            raise unsupported(named, file, f"{prefix}{key}", value, rule.supported, rule.cure)


def unsupported(named: str, file: Path, key: str, value: Any, supported: str, cure: str = "") -> StartupError:
    """The error for a key whose value is not implemented."""
    sentence = f"{named}: {file.name} has `{key}`: {shown(value)}; supported: {supported}."
    return StartupError(f"{sentence} {cure}".rstrip())


def honoured(content: Mapping[str, Any], known: Mapping[str, Rule]) -> dict[str, Any]:
    """The keys that are read, without those that change nothing."""
    return {key: value for key, value in content.items() if known.get(key) is not HARMLESS}


def shown(value: Any) -> str:
    """A value as JSON has it, cut to LONGEST_VALUE."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
