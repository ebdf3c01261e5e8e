"""The settings as text: `.env.example` and the tables of `docs/settings.md`, both written from the declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from vecmill.config.settings import GROUPS


def default_text(default: object) -> str:
    """A default as it would be written in `.env`; empty for None."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)


def env_example() -> str:
    """The text of `.env.example`: every setting, commented out at its default."""
    lines = [
        "# Settings of vecmill. Copy to `.env` and uncomment what you change.",
        "# A flag of `vecmill serve` wins over the environment, the environment over this file.",
    ]
    for group in GROUPS:
        lines += ["", f"# --- {group.title}: {(group.__doc__ or '').strip()}"]
        for name, field in group.model_fields.items():
            lines += ["", *_comment(field.description or ""), f"#{name.upper()}={default_text(field.default)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def settings_tables() -> str:
    """Markdown: a heading and a table for each group of settings."""
    return "\n".join(_tables())


def _tables() -> Iterator[str]:
    for group in GROUPS:
        yield f"## {group.title}\n\n{(group.__doc__ or '').strip()}\n"
        yield "| setting | default | what it does |\n|---|---|---|"
        for name, field in group.model_fields.items():
            default = default_text(field.default)
            yield f"| `{name.upper()}` | {f'`{default}`' if default else ''} | {field.description} |"
        yield ""
