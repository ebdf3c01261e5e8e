"""Other names for the models that are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vecmill.core.errors import StartupError


def with_aliases(named: Mapping[str, str], model_aliases: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Every name to the id of its model: those there are, and MODEL_ALIASES.

    Raises:
        StartupError: an alias is another model's name, or of none that is loaded.
    """
    known, ids = dict(named), ", ".join(named)
    for alias, name in model_aliases:
        if name not in known:
            raise StartupError(f"MODEL_ALIASES={alias}={name}: {name} is not loaded; these are: {ids}.")
        if alias in known:
            raise StartupError(f"MODEL_ALIASES={alias}={name}: {alias} is a model's own name; choose another.")
        known[alias] = known[name]
    return known


def aliases_of(model_id: str, known: Mapping[str, str]) -> tuple[str, ...]:
    """The names of a model besides its id."""
    return tuple(name for name in known if known[name] == model_id != name)
