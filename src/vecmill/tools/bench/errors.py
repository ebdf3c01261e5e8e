"""Why a measurement could not be made."""

from __future__ import annotations


class BenchError(Exception):
    """No measurement is possible; the text is a sentence for the person at the terminal."""

    exit_code = 2


class BadAnswer(BenchError):
    """The server is there, and its first answer is an error or not what the dialect asks for."""

    exit_code = 1
