"""The address that the server is reached at."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import sys
from contextlib import suppress

from vecmill.core.address import url_here
from vecmill.core.errors import StartupError, StartupObstacle

# What may be otherwise at the next start: the port is free, the address is there, names can be looked up.
OBSTACLES = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, socket.EAI_AGAIN})
SO_ATTACH_FILTER, BPF_RET = 26, 0x06  # asm-generic/socket.h, linux/bpf_common.h
BACKLOG = 2048  # uvicorn's, which sets it again


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they wait until somebody serves them.

    Raises:
        StartupError: HOST is no address, or this user may not have the port. StartupObstacle: somebody else has the
            port, or the address is not this machine's, which it may become (a network that is not up yet).
    """
    try:
        return _listening(host, port)
    except (OSError, UnicodeError) as error:
        later = isinstance(error, OSError) and error.errno in OBSTACLES
        reason = getattr(error, "strerror", None) or "no name or address"
        raise (StartupObstacle if later else StartupError)(
            f"HOST={host} PORT={port} cannot be bound ({reason}): {_cure(error)}."
        ) from None


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _cure(error: OSError | UnicodeError) -> str:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            return "stop what uses it or set another PORT"
        case errno.EACCES:
            return "set a PORT from 1024 on"
    return "set HOST to an address of this machine"


def take_no_more(listener: socket.socket) -> None:
    """Have the kernel complete no further connection; those that it has completed still wait to be accepted.

    To close a socket resets those that wait, and under load there are always some. A filter that drops every packet
    is dropped with its socket; whoever connected meanwhile tries again a second later and is refused.
    Source: https://docs.kernel.org/networking/filter.html (struct sock_fprog, SO_ATTACH_FILTER)
    """
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RET, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))
    with suppress(OSError):  # a kernel without filters
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def connected(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0 where the kernel does not tell.

    Source: https://man7.org/linux/man-pages/man7/tcp.7.html (TCP_INFO; of a listener tcpi_unacked is its queue)
    """
    if sys.platform != "linux":
        return 0
    try:
        (waiting,) = struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)
    except (OSError, struct.error):
        return 0
    return int(waiting)


def address_of(listener: socket.socket) -> str:
    """The URL to open on this machine."""
    host, port = listener.getsockname()[:2]
    return url_here(host, port)
