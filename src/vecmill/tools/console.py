"""What the commands print, and where: results on stdout, all else on stderr."""

from __future__ import annotations

from rich.console import Console

messages = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
"""Progress, warnings and errors."""
results = Console(markup=False, highlight=False, emoji=False)
"""What a command was run for; a line that must not be wrapped is printed with `soft_wrap=True`."""

INTERRUPTED = 130  # the exit code after Ctrl-C


class CommandError(Exception):
    """Why a command ends without its result; the text is a sentence for the person at the terminal."""

    exit_code = 1


class UsageError(CommandError):
    """The options or the input are wrong: nothing was done."""

    exit_code = 2


def print_error(sentence: object) -> None:
    """The sentence with which a command ends."""
    messages.print(f"vecmill: {sentence}", style="bold red")
