"""`.env.example`, written from the declarations: `python -m vecmill.config.env_example > .env.example`."""

from __future__ import annotations

import sys
import textwrap

from vecmill.config.settings import GROUPS


def env_example() -> str:
    """The text of `.env.example`: every setting, commented out at its default."""
    lines = [
        "# Settings of vecmill. Copy to `.env` and uncomment what you change.",
        "# A flag of `vecmill serve` wins over the environment, the environment over this file.",
    ]
    for group in GROUPS:
        lines += ["", f"# --- {group.title}: {(group.__doc__ or '').strip()}"]
        for name, field in group.model_fields.items():
            lines += [
                "",
                *textwrap.wrap(
                    field.description or "",
                    100,
                    initial_indent="# ",
                    subsequent_indent="# ",
                    break_on_hyphens=False,
                ),
            ]
            lines.append(f"#{name.upper()}={default_text(field.default)}")
    return "\n".join(lines) + "\n"


def default_text(default: object) -> str:
    """A default as one would write it in `.env`."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)


if __name__ == "__main__":
    sys.stdout.write(env_example())
