"""Why texts could not be embedded."""

from __future__ import annotations


class EmbedError(Exception):
    """Nothing was written; the text is a sentence for the person at the terminal."""

    exit_code = 1


class UsageError(EmbedError):
    """The options or the input are no good; the server was not asked to work."""

    exit_code = 2


class NotThere(EmbedError):
    """The server has no such file or path (404)."""
