"""The lines of a batch's output and error files.

Source: https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from vecmill.tools.embed.errors import EmbedError

OK = 200
TIMEOUT, TOO_MANY = 408, 429


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text has no vector."""

    status: int | None
    """None: there was no answer."""
    message: str

    @property
    def passing(self) -> bool:
        """It is the server's trouble rather than the text's: worth another try."""
        return self.status is None or self.status in (TIMEOUT, TOO_MANY) or self.status >= 500


@dataclass(frozen=True, slots=True)
class Vector:
    """A text's vector."""

    values: bytes
    """Little-endian float32."""
    model: str
    tokens: int
    cached_tokens: int | None
    """None: the server does not say."""


def result_of(line: bytes) -> tuple[int, Vector | Failure]:
    """A text's index, and what became of it.

    Raises:
        EmbedError: it is not a line of the API.
    """
    try:
        found = orjson.loads(line)
        return int(found["custom_id"]), _result(found)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, Base64Error) as error:
        shown = line[:200].decode(errors="replace")
        raise EmbedError(f"A line of the results is not one of OpenAI's batches: {shown}") from error


def _result(found: dict[str, Any]) -> Vector | Failure:
    response, error = found.get("response"), found.get("error")
    if response is not None and response["status_code"] == OK:
        return vector_of(response["body"])
    if response is not None:
        body = response.get("body") or {}
        reason = body.get("error") or body.get("message") or body.get("detail") or body
        message = reason.get("message", reason) if isinstance(reason, dict) else reason
        return Failure(int(response["status_code"]), str(message))
    error = error or {}
    return Failure(None, str(error.get("message") or error.get("code") or "no answer"))


def vector_of(body: dict[str, Any]) -> Vector:
    """The one vector of an answer to /v1/embeddings. KeyError, TypeError, ValueError: it is none."""
    embedding = body["data"][0]["embedding"]
    # Some servers take no notice of `encoding_format`.
    values = b64decode(embedding) if isinstance(embedding, str) else np.asarray(embedding, "<f4").tobytes()
    usage = body.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Vector(values, str(body.get("model")), int(usage.get("prompt_tokens") or 0), cached)
