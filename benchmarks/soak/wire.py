"""One HTTP/1.1 connection for each client, cheap enough for a thousand of them beside the server on the same cores.

Pools of connections hand a request to whichever is free, and cannot leave in the middle of an answer. Here each client
keeps its own connection open between its requests, and breaks it as it likes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as a process that is killed may
LONGEST_HEAD = 2**18


class Broken(Exception):
    """The connection ended before the whole answer had come."""


class Leave(Enum):
    """Where a client leaves."""

    MID_BODY = "in the middle of its body"
    BEFORE_ANSWER = "before the answer"
    MID_ANSWER = "in the middle of the answer"


@dataclass(frozen=True)
class Call:
    """One request, as bytes but for the head."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] | None = None

    @classmethod
    def json(cls, path: str, body: Any, **headers: str) -> Call:
        """A POST of JSON; `headers` with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls("POST", path, json.dumps(body).encode(), {"content-type": "application/json", **named})


@dataclass(frozen=True)
class Reply:
    """An answer, whole."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case."""
    content: bytes

    def json(self) -> Any:
        """The content, parsed."""
        return json.loads(self.content)


class Connection:
    """A client's connection, opened when it is needed and kept."""

    def __init__(self, url: str, key: str | None) -> None:
        self._host = urlsplit(url).netloc
        self._key = {} if key is None else {"authorization": f"Bearer {key}"}
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, unless a connection is there that the server has not closed."""
        if self._writer is None or self._reader is None or self._reader.at_eof():
            self.close()
            address, _, port = self._host.partition(":")
            self._reader, self._writer = await asyncio.open_connection(address, int(port), limit=LONGEST_HEAD)
        return self._reader, self._writer

    def close(self, *, reset: bool = False) -> None:
        """End it; with `reset`, without saying goodbye."""
        if self._writer is not None:
            if reset:
                connected: socket.socket = self._writer.get_extra_info("socket")
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._writer.transport.abort() if reset else self._writer.close()
        self._reader = self._writer = None

    async def send(self, call: Call) -> Reply:
        """The whole answer.

        Raises:
            Broken: the connection ended first.
        """
        try:
            reader = await self._begin(call)
            status, headers = await _head(reader)
            content = b"".join([piece async for piece in _pieces(reader, headers)])
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise Broken(type(error).__name__) from error
        if headers.get("connection") == "close":
            self.close()
        return Reply(status, headers, content)

    async def leave(self, call: Call, where: Leave, seconds: float) -> None:
        """Send the call, or half of it, and break the connection after so many seconds or the answer's first bytes."""
        try:
            reader, writer = await self.open()
            encoded = self._encoded(call)
            writer.write(encoded[: len(encoded) - len(call.body) // 2] if where is Leave.MID_BODY else encoded)
            await writer.drain()
            if where is Leave.MID_ANSWER:
                await reader.read(100)
            else:
                await asyncio.sleep(seconds)
        except OSError as error:
            raise Broken(type(error).__name__) from error
        finally:
            self.close(reset=seconds > 0.01)

    async def stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """What an event stream sends, piece by piece, until it ends; an answer other than 200 raises Broken."""
        try:
            reader = await self._begin(Call("GET", path, headers={"accept": "text/event-stream"}))
            status, headers = await _head(reader)
            if status != 200:
                raise Broken(f"status {status}")
            async for piece in _pieces(reader, headers):
                yield piece
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken(type(error).__name__) from error
        finally:
            self.close()

    async def _begin(self, call: Call) -> asyncio.StreamReader:
        reader, writer = await self.open()
        writer.write(self._encoded(call))
        await writer.drain()
        return reader

    def _encoded(self, call: Call) -> bytes:
        fields = {"host": self._host, "content-length": str(len(call.body)), **self._key, **(call.headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{call.method} {call.path} HTTP/1.1\r\n{head}\r\n".encode() + call.body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines if line)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in fields}


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """The content, as it comes."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
