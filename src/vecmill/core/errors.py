"""Everything that can go wrong, named once.

    VecmillError
    ├── StartupError                 the process cannot serve with this configuration
    │   └── StartupObstacle          not now: a restart may find it otherwise
    ├── InvalidInput                 the client can correct it; `param` names the field
    │   ├── MalformedBody
    │   ├── EmptyInput
    │   ├── InputTooLong
    │   │   └── DoesNotFit
    │   ├── TooManyInputs
    │   └── NonFiniteEmbedding
    ├── MalformedRequest             it is no HTTP/1.1, or not within its limits
    │   └── HeadTooLarge
    ├── RequestTimedOut              the client did not send it in time
    ├── UnsupportedEncoding          of the body
    ├── InvalidApiKey
    ├── NotAllowed                   from where it comes, or by which name it calls the server
    ├── BodyTooLarge
    │   └── FilesFull
    ├── InsufficientStorage          the disk is full
    ├── NotFound
    │   ├── NotServed
    │   ├── ModelNotFound
    │   ├── JobNotFound
    │   ├── NoSuchFile
    │   └── NoSuchBatch
    ├── JobConflict                  the job's present state does not allow the call
    ├── BatchConflict                the batch's does not
    ├── ModelConflict                the model's does not
    ├── Overloaded                   no room now; try again
    ├── DeadlineExceeded             not answered in time
    │   └── GenerationTimeout
    └── Unavailable                  no answer possible now
        ├── MemoryLow                too little is free to begin
        ├── OutOfMemory              it ran out while the request was worked on
        ├── ModelLoading
        ├── ModelNotLoaded
        ├── ShuttingDown
        ├── BatchFailed
        ├── WorkLost
        ├── EngineFailed
        ├── StateUnavailable
        ├── JobsUnavailable
        └── GenerationUnavailable

Knows no HTTP: statuses and bodies are in `vecmill.http.errors`. A class's docstring is its message where the
raiser gives none.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import Self

logger = logging.getLogger(__name__)


class VecmillError(Exception):
    """Something went wrong."""

    reason: str | None = None
    """The same in words that hold nothing of what the client sent; None: what the class says of itself."""

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        """`message` is shown to the client; `param` is the request field at fault, as the client wrote it."""
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        super().__init__(self.message)

    def again(self) -> Self:
        """A copy to raise elsewhere: one exception raised many times would grow its traceback without end."""
        return type(self)(self.message, param=self.param)


def first_line(error: BaseException) -> str:
    """The first line of what any exception says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """On one line, and without halves of surrogate pairs, which no log and no answer can be written with."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class StartupError(VecmillError):
    """The server cannot start with this configuration."""

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        """As of every error; what the message repeats of a file is made printable."""
        super().__init__(message and printable(message), param=param)


class StartupObstacle(StartupError):
    """The server cannot start now, though its configuration may be right; a later start may succeed."""


class InvalidInput(VecmillError):
    """The request is not valid."""


class MalformedBody(InvalidInput):
    """The request body is not valid JSON."""


class EmptyInput(InvalidInput):
    """The list of inputs is empty; send at least one."""


class InputTooLong(InvalidInput):
    """An input is longer than the model's maximum context length."""


class DoesNotFit(InputTooLong):
    """The input alone does not fit into the device's memory; shorten it."""


class TooManyInputs(InvalidInput):
    """The request has more inputs than MAX_CLIENT_BATCH_SIZE; split it."""


class NonFiniteEmbedding(InvalidInput):
    """The model gave a value that is not finite for this input; shorten or change the text."""


class MalformedRequest(VecmillError):
    """The request is not valid HTTP/1.1."""


class HeadTooLarge(MalformedRequest):
    """The request's target and header fields are longer than 65536 bytes; send fewer or shorter ones."""


class RequestTimedOut(VecmillError):
    """timeout: the request did not arrive in time; send it again."""


class UnsupportedEncoding(VecmillError):
    """The Content-Encoding of the request body is not known here; use gzip or deflate, or none."""


class InvalidApiKey(VecmillError):
    """The API key is missing or wrong; send it as `Authorization: Bearer KEY`, `api-key` or `x-api-key`."""


class NotAllowed(VecmillError):
    """This server does not answer requests from there."""


class BodyTooLarge(VecmillError):
    """The request body is larger than MAX_BODY_BYTES; split the request."""


class FilesFull(BodyTooLarge):
    """The files of batches would take more than MAX_FILES_BYTES; delete some, or raise the limit."""


class InsufficientStorage(VecmillError):
    """The disk that holds STATE_DIR is full; make room there, or delete files (DELETE /v1/files/...)."""


class NotFound(VecmillError):
    """There is nothing at this address."""


class NotServed(NotFound):
    """This is not served here: the server embeds and reranks text, as dense vectors."""


class ModelNotFound(NotFound):
    """The model does not exist here."""


class JobNotFound(NotFound):
    """There is no such job; register it with POST /jobs."""


class NoSuchFile(NotFound):
    """There is no such file; upload it with POST /v1/files."""


class NoSuchBatch(NotFound):
    """There is no such batch; create it with POST /v1/batches."""


class JobConflict(VecmillError):
    """The job's present state does not allow this."""


class BatchConflict(VecmillError):
    """The batch's present state does not allow this."""


class ModelConflict(VecmillError):
    """The model's present state does not allow this."""


class Overloaded(VecmillError):
    """The server is temporarily overloaded; try again after the time in Retry-After."""

    retry_after: float = 1  # seconds


class DeadlineExceeded(VecmillError):
    """timeout: the request was not answered in time; send less at once, or raise X-Request-Timeout."""


class GenerationTimeout(DeadlineExceeded):
    """timeout: the server at GENERATION_URL did not answer in time."""


class Unavailable(VecmillError):
    """503: the server is temporarily unavailable; try again."""

    retry_after: float = 2  # seconds


class MemoryLow(Unavailable):
    """503: the machine is short of memory, the server is temporarily unavailable; try again."""

    retry_after = 5


class OutOfMemory(Unavailable):
    """503: out of memory: the server had too little for this request and goes on; try again, or send less at once."""

    retry_after = 5


class ModelLoading(Unavailable):
    """503: the model is still loading, the server is temporarily unavailable; try again."""


class ModelNotLoaded(Unavailable):
    """503: the model could not be loaded and is temporarily unavailable; try again later."""

    retry_after = 30


class ShuttingDown(Unavailable):
    """503: the server is shutting down and takes no new work; try again."""

    retry_after = 5


class BatchFailed(Unavailable):
    """503: the batch that held this input failed on the device; the failure is temporary, try again."""


class WorkLost(Unavailable):
    """503: the thread that worked on this request ended; others take its place, try again."""


class EngineFailed(Unavailable):
    """503: the device has failed and the server must be restarted."""

    retry_after = 30


class StateUnavailable(Unavailable):
    """503: STATE_DIR cannot be used, so files and batches are temporarily unavailable; embedding is not."""


class JobsUnavailable(Unavailable):
    """503: the jobs are temporarily unavailable, embedding is not; try again."""


class GenerationUnavailable(Unavailable):
    """502: the server at GENERATION_URL is temporarily unavailable; try again."""


# In whatever case they are written. Of the allocators of CUDA, HIP, XPU and MPS, of the driver and what is called on it
# ("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"); of NVIDIA's
# libraries; of a GPU without memory of its own, where torch's allocator fails over its own report, for which NVML has
# nothing to say; of the CPU's allocator, of oneDNN and of the C library; of Python, where the
# system has no memory for a thread's stack.
OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "out_of_memory",
    "cudaerrormemoryallocation",
    "status_alloc_failed",
    "status_internal_error_device_allocation_failed",
    "status_internal_error_host_allocation_failed",
    "insufficient memory",
    "nvml_success == r internal assert failed",
    "invalid buffer size",
    "defaultcpuallocator",
    "could not create a primitive",
    "could not create a memory",
    "cannot allocate memory",
    "can't allocate memory",
    "std::bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once may work: by the type, or by the words of who ran out, which torch passes on or wraps."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is unknown here
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, BaseExceptionGroup) and any(map(is_out_of_memory, error.exceptions)):
        return True
    message = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY_WORDS):
        return True
    cause = getattr(error, "inner_exception", None) or error.__cause__
    return cause is not None and is_out_of_memory(cause)


def as_refusal(error: Exception) -> Exception:
    """What clients are told: OutOfMemory for a lack of memory, whoever ran out; any other error as it is."""
    if isinstance(error, VecmillError) or not is_out_of_memory(error):
        return error
    logger.warning("out of memory: %s: %.200s", type(error).__name__, error)
    clear_frames(error.__traceback__)  # they hold what was allocated so far
    return OutOfMemory()


@contextmanager
def lack_of_memory_refused() -> Iterator[None]:
    """A block in which memory may run out.

    Raises:
        OutOfMemory: in place of whatever the block raised because memory ran out.
    """
    try:
        yield
    except Exception as error:
        refusal = as_refusal(error)
        if refusal is error:
            raise
        raise refusal from None
