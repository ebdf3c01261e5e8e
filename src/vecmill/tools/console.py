"""What the commands print, and where: results on stdout, all else on stderr."""

from __future__ import annotations

from rich.console import Console

messages = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
"""Progress, warnings and errors."""
results = Console(markup=False, highlight=False, emoji=False)
"""What a command was run for; a line that must not be wrapped is printed with `soft_wrap=True`."""

LONGEST_SENTENCE = 4000  # characters: it may repeat what a server says
INTERRUPTED = 130  # the exit code after Ctrl-C


def printable(text: str) -> str:
    """What a server or a file says, without what a terminal would take for a command; lines stay lines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


class CommandError(Exception):
    """Why a command ends without its result; the text is a sentence for the person at the terminal."""

    exit_code = 1

    def __init__(self, sentence: object) -> None:
        super().__init__(printable(str(sentence)[:LONGEST_SENTENCE]))


class UsageError(CommandError):
    """The options or the input are wrong: nothing was done."""

    exit_code = 2


def print_error(sentence: object) -> None:
    """The sentence with which a command ends."""
    messages.print(f"vecmill: {printable(str(sentence))}", style="bold red")
