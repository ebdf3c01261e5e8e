"""What is fuzzed: for each reader of foreign bytes a function that raises where one of its promises is broken.

`test_targets.py` gives each a few hundred changed seeds; `coverage_guided.py` searches with Atheris for as long as one
likes.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

import h11
import numpy as np
import orjson
import torch
import uvicorn
from uvicorn.server import ServerState

from tests.models.loaded import GOLDEN
from tests.tiny_checkpoints import add_heads, dense, tiny_cross_encoder, tiny_gemma3, tiny_xlm_roberta
from vecmill.batches.input import LineReader, validate
from vecmill.config import ModelSettings
from vecmill.core.errors import BodyTooLarge, InvalidInput, MalformedBody, StartupError, VecmillError
from vecmill.core.json_body import JsonLimits, parse
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Task
from vecmill.engine.loader import expected_card
from vecmill.http.body_limit import Decoder
from vecmill.http.compression import accepted_coding, accepts_gzip, offers, quality
from vecmill.http.encoding import BASE64, FLOAT, encode
from vecmill.http.files import UploadForm
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import load_model
from vecmill.models.rerank_prompt import check_form
from vecmill.models.tokenizer_loading import load_tokenizer
from vecmill.models.weights import Target as WeightTarget
from vecmill.serve.connection import Connection
from vecmill.tools.console import CommandError
from vecmill.tools.embed.batches import TextVector, result_of

Run = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One reader of bytes."""

    run: Run
    """Raises whatever the reader must not raise, and AssertionError where it is wrong."""
    seeds: Callable[[], Sequence[bytes]]
    """Inputs to begin with."""
    words: tuple[bytes, ...] = ()
    """Of its format."""


def check_sentence(message: str, word: str = "") -> None:
    """One line that can be written to any log, with a word in it."""
    assert message
    assert message.isprintable(), ascii(message)
    assert len(message) < 8000, message
    assert word in message


def pieces(data: bytes) -> tuple[bytes, list[bytes]]:
    """The first byte says how the others are cut."""
    seed, rest = data[:1] or b"\0", data[1:]
    size = (len(rest), 1, 2, 3, 7, 16, 64, 1000)[seed[0] % 8] or 1
    return rest, [rest[start : start + size] for start in range(0, len(rest), size)]


# JSON of request bodies.


def json_body(data: bytes) -> None:
    """In pieces the value is what orjson gives of the whole, and what orjson does not read is refused."""
    try:
        expected: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        expected = JSON_REFUSED
    for piece in (14, 33, 80):
        try:
            value = parse(data, JsonLimits(values=10_000, containers=5_000), piece=piece)
        except BodyTooLarge:
            assert data.count(b",") > 5_000 or sum(map(data.count, (b"[", b"{", b":"))) > 5_000
            return
        except (MalformedBody, InvalidInput) as error:
            check_sentence(error.message)
            # A number as long as a megabyte, which is the size of a piece elsewhere, is none.
            is_refused = expected is JSON_REFUSED or "no value is that long" in error.message
            assert is_refused, piece
        else:
            assert expected is not JSON_REFUSED, piece
            assert orjson.dumps(value) == orjson.dumps(expected)


JSON_REFUSED = object()


def json_seeds() -> list[bytes]:
    texts = [
        {"input": ["a", "b\\n\u00e9😀\ud7ff"], "model": "m", "dimensions": 3},
        {"query": "q", "documents": [{"text": "a"}, {"text": "b", "n": [1.5e3, -0, True, None]}], "top_n": 2},
        [[[[]]], {}, "", 0, [{"a": {"b": [1, 2, 3]}}]],
    ]
    long = {"input": ["word " * 30, [101, 2003, 102] * 20, "\\" * 40, '"' * 30], "k" * 50: "v" * 90}
    return [
        json.dumps(each, ensure_ascii=ascii_only).encode() for each in (*texts, long) for ascii_only in (True, False)
    ]


# Lines of batches.


def batch_lines(data: bytes) -> None:
    """A file is found wrong, with a sentence, or each of its lines can be read."""
    with tempfile.NamedTemporaryFile(dir=memory_folder()) as file:
        file.write(data)
        file.flush()
        path = Path(file.name)
        checked = validate(path, "/v1/embeddings", 4096, lambda: False)
        for error in checked.errors:
            assert error.code
            check_sentence(error.message)
        if checked.errors:
            return
        reader = LineReader(path, checked.first_offset, 0, checked.total)
        names = []
        while (group := reader.next(lambda body: 1, 3)) is not None:
            names += [line.custom_id for line in group.lines]
        reader.close()
        assert len(names) == len(set(names)) == checked.total > 0


def batch_seeds() -> list[bytes]:
    def line(number: int, **fields: Any) -> bytes:
        body = {"input": f"text {number}", "model": "m"}
        request = {"custom_id": f"{number}", "method": "POST", "url": "/v1/embeddings", "body": body, **fields}
        return json.dumps(request).encode()

    return [
        line(1),
        line(1) + b"\n" + line(2) + b"\r\n\n",
        b"\xef\xbb\xbf" + line(1, extra=[1, 2]),
        line(1) + b"\n" + line(1),
        b"\n".join(map(line, range(12))),
        line(1, custom_id="\ud83d"),
        line(1) + b"\n\n" + line(2),
    ]


# Codings of bodies.


def body_coding(data: bytes) -> None:
    """However it is cut, a body is decompressed to the same, and that is what the library makes of the whole."""
    coding = "deflate" if data[:1] > b"\x7f" else "gzip"
    whole, parts = pieces(data)
    given = [decompressed(coding, cut) for cut in (parts, [whole])]
    assert given[0] == given[1]
    expected = by_library(coding, whole)
    if given[1] is not None:
        assert expected is None or given[1] == expected
    else:
        assert expected is None or len(expected) > 1_048_576


def decompressed(coding: str, parts: Sequence[bytes]) -> bytes | None:
    """None: it is refused."""

    async def read() -> bytes:
        decoder = Decoder(coding, shared_threads(), 1_000_000)
        content, waiting, more = b"", [*parts] or [b""], True
        while more:
            part = b"" if decoder.more else waiting.pop(0)
            message = await decoder.decode({"type": "http.request", "body": part, "more_body": bool(waiting)})
            content, more = content + message["body"], message["more_body"]
        return content

    try:
        return loop().run_until_complete(read())
    except (MalformedBody, BodyTooLarge) as error:
        check_sentence(error.message, "Content-Encoding")
        return None


def by_library(coding: str, data: bytes) -> bytes | None:
    content, most = b"", 1000 if coding == "gzip" else 1
    with suppress(zlib.error):
        while data and most:
            member = zlib.decompressobj(wbits=31 if coding == "gzip" else 15)
            content += member.decompress(data)
            if not member.eof:
                return None
            data, most = member.unused_data, most - 1
        return None if data else content
    return None


def coding_seeds() -> list[bytes]:
    text = b'{"input": "' + b"word " * 300 + b'"}'
    gzipped = gzip.compress(text, mtime=0)
    raw = zlib.compressobj(wbits=-15)
    return [
        *(bytes([cut]) + gzipped for cut in range(4)),
        b"\x01" + gzipped + gzip.compress(b"", mtime=0),
        b"\x00" + gzip.compress(bytes(3_000_000), mtime=0),
        b"\x81" + zlib.compress(text),
        b"\x82" + raw.compress(text) + raw.flush(),
        b"\x00",
    ]


# Requests on a connection.


class Closed(Exception):
    """The server closed."""


class Pipe(asyncio.Transport):
    """The server's end of a connection that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closing = b"", False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """What was understood of a request, as its answer."""
    body, more = b"", True
    while more:
        try:
            message = await receive()
        except VecmillError:
            await send({"type": "http.response.start", "status": 400, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
            return
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    seen = json.dumps([scope["method"], scope["raw_path"].decode("latin-1"), body.decode("latin-1")]).encode()
    headers = [(b"content-length", str(len(seen)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else seen})


def requests(data: bytes) -> None:
    """However bytes are cut, the same is answered; and what h11 understands too, it understands in the same way."""
    whole, parts = pieces(data)
    answers = [answered(cut) for cut in (parts, [whole])]
    assert answers[0] == answers[1]
    statuses = [status for status, _ in answers[0]]
    assert all(status in (100, 200, 400, 408, 431) for status in statuses), statuses
    understood = [seen for status, seen in answers[0] if status == 200 and seen]
    for ours, theirs in zip(understood, by_h11(whole), strict=False):
        assert ours == theirs


def answered(parts: Sequence[bytes]) -> list[tuple[int, Any]]:
    """Status and content of each answer."""

    async def serve() -> bytes:
        connection = Connection(
            echo_config(), ServerState(), {}, asyncio.get_running_loop(), head_seconds=60, idle_seconds=60
        )
        problems: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        pipe = Pipe()
        connection.connection_made(pipe)
        for part in parts:
            if part:
                connection.data_received(part)
            for _ in range(3):
                await asyncio.sleep(0)
        for _ in range(40 + 12 * pipe.written.count(b"HTTP/1.1") + 12 * b"".join(parts).count(b"\n\r\n")):
            await asyncio.sleep(0)
        written = pipe.written
        connection.connection_lost(None)
        for _ in range(4):
            await asyncio.sleep(0)
        assert not problems, problems
        return written

    return list(read_answers(loop().run_until_complete(serve())))


def read_answers(written: bytes) -> Iterator[tuple[int, Any]]:
    while written:
        head, _, written = written.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        size = int(fields.get("content-length", 0))
        content, rest = written[:size], written[size:]
        if content.startswith(b"HTTP/1.1 ") or (status == 200 and not content.startswith(b"[")):
            content, rest = b"", written  # of HEAD
        written = rest
        yield status, json.loads(content) if content and status == 200 else None


def by_h11(data: bytes) -> Iterator[list[str]]:
    """The requests up to the first that h11 does not take."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    with suppress(h11.RemoteProtocolError):
        connection.receive_data(data)
        while isinstance(request := connection.next_event(), h11.Request):
            body = b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += bytes(event.data)
            if not isinstance(event, h11.EndOfMessage):
                return
            yield [request.method.decode("latin-1"), path_of(request.target), body.decode("latin-1")]
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()


def path_of(target: bytes) -> str:
    if not target.startswith((b"/", b"*")):
        _, _, rest = target.partition(b"://")
        target = b"/" + rest.partition(b"/")[2] if b"/" in rest.partition(b"?")[0] else b"/?" + rest.partition(b"?")[2]
    return target.partition(b"#")[0].partition(b"?")[0].decode("latin-1")


def request_seeds() -> list[bytes]:
    plain = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n" + b'{"input":"x"}'
    chunked = (
        b"POST /a?b=c HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'5;of=x\r\n{"inp\r\n8\r\nut":"x"}\r\n0\r\nX-Trailer: 1\r\n\r\n'
    )
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    absolute = b"GET http://localhost/a%20b?c#d HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"
    expecting = plain.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
    old = b"GET / HTTP/1.0\r\n\r\n"
    upgrade = plain.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 1)
    return [
        bytes([cut]) + each
        for each in (plain, plain + get, chunked, chunked + plain, absolute, expecting, old, upgrade, get * 3)
        for cut in (0, 1, 4)
    ]


# Fields of headers that are read here.


def header_fields(data: bytes) -> None:
    """Whatever a field says, it is read as something."""
    text = data.decode("latin-1")
    accepted_coding(text)
    accepts_gzip(text)
    for offer in offers(text):
        liked = quality(offer)
        assert 0 <= liked <= 1
        assert not isnan(liked)


def field_seeds() -> list[bytes]:
    return [
        b"gzip, deflate, br, zstd",
        b"gzip;q=0.5, *;q=0",
        b"identity;q=1, *;q=0.001",
        b'application/octet-stream; dtype="float16"; q=0.9, */*',
        b"q=nan, gzip;q=inf, zstd;q=-1, gzip;q=1e400",
    ]


# Forms.


def upload_form(data: bytes) -> None:
    """However it is cut, a form is read or refused in the same way."""
    whole, parts = pieces(data)
    assert form_of(parts) == form_of([whole])


def form_of(parts: Sequence[bytes]) -> object:
    content = io.BytesIO()
    try:
        form = UploadForm("multipart/form-data; boundary=XX", lambda data: _keep(content, data))
        for part in parts:
            form.feed(part)
        return form.finish(), form.fields, content.getvalue()
    except (MalformedBody, InvalidInput) as error:
        return type(error)


def _keep(content: io.BytesIO, data: bytes) -> None:
    content.write(data)


def form_seeds() -> list[bytes]:
    def part(name: str, content: str, more: str = "") -> str:
        return f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{content}\r\n'

    file = part("file", '{"custom_id": "1"}\n', '; filename="a.jsonl"\r\nContent-Type: application/jsonl')
    forms = (part("purpose", "batch") + file, file + part("purpose", "batch"), file + file, part("a", "b" * 100) * 3)
    return [bytes([cut]) + form.encode() + b"--XX--\r\n" for form in forms for cut in (0, 1, 3)]


# Vectors in base64, as they are written and as the tools read those of any server.


def base64_vectors(data: bytes) -> None:
    """What is written is read again, bit by bit."""
    vector = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
    if len(vector) and np.isfinite(vector).all():
        written = orjson.loads(encode(vector, BASE64))
        assert base64.b64decode(written, validate=True) == vector.tobytes()
        assert np.array_equal(np.array(orjson.loads(encode(vector, FLOAT)), "<f4"), vector)


def base64_seeds() -> list[bytes]:
    vector = np.array([0.5, -0.25, 1e-38, 3.4e38, -0.0, 1e-45], "<f4")
    return [vector.tobytes(), vector[:1].tobytes(), b""]


def batch_results(data: bytes) -> None:
    """A line of any server's results is read, or found to be none in one sentence; a vector that is read is finite."""
    try:
        _, result = result_of(data)
    except CommandError as error:
        check_sentence(str(error).splitlines()[0])
    else:
        if isinstance(result, TextVector):
            assert np.isfinite(np.frombuffer(result.values, "<f4")).all()
            assert result.values


def result_seeds() -> list[bytes]:
    vector = np.array([0.5, -0.25], "<f4")
    return [
        orjson.dumps({"custom_id": "7", "response": {"status_code": status, "body": body}, "error": None})
        for status, body in (
            (200, {"data": [{"embedding": base64.b64encode(vector.tobytes()).decode()}], "model": "m"}),
            (200, {"data": [{"embedding": [0.1, 2, -3e5]}], "model": "m", "usage": {"prompt_tokens": 3}}),
            (200, {"data": [{"embedding": [1.0]}], "usage": {"prompt_tokens_details": {"cached_tokens": 1}}}),
            (400, {"error": {"message": "no", "code": "x"}}),
        )
    ] + [b'{"custom_id": "7", "response": null, "error": {"code": "batch_expired"}}']


# Files of checkpoints.


@dataclass(frozen=True)
class Base:
    """A checkpoint whose files are changed, one at a time."""

    write: Callable[[Path], Any]
    task: Task = Task.EMBED


def _xlm_roberta(folder: Path) -> None:
    tiny_xlm_roberta(folder, prompts={"query": "query: "})
    add_heads(folder, dense(32, 16))


def _golden(*parts: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copytree(GOLDEN.joinpath(*parts), folder, dirs_exist_ok=True)


BASES: tuple[Base, ...] = (
    Base(_xlm_roberta),
    Base(_golden("qwen3", "embedding")),
    Base(lambda folder: tiny_cross_encoder(folder, kind="xlm-roberta"), Task.RERANK),
    Base(lambda folder: tiny_gemma3(folder)),
    Base(_golden("qwen3", "reranker"), Task.RERANK),
)
# Beside those that a base has.
OTHER_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
)
WEIGHTS = "model.safetensors"


@cache
def written_base(number: int) -> tuple[Path, dict[str, bytes]]:
    """The folder of a base, and its files by their names."""
    folder = memory_folder() / f"base-{number}"
    folder.mkdir()
    BASES[number].write(folder)
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".json", ".safetensors") and path.is_file()
    }
    return folder, files


def names_of(number: int) -> list[str]:
    return sorted({*written_base(number)[1], *OTHER_FILES})


def checkpoint_files(data: bytes) -> None:
    """A model whose files are changed is loaded, or refused in one sentence."""
    number = data[:1][0] % len(BASES) if data else 0
    folder, files = written_base(number)
    names = names_of(number)
    name = names[(data[1:2] or b"\0")[0] % len(names)]
    check_changed(folder, files, name, data[2:], BASES[number].task)


def check_changed(folder: Path, files: Mapping[str, bytes], name: str, content: bytes, task: Task) -> None:
    path = folder / name
    fresh = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):  # the header is changed, the tensors stay as they are
        whole = files.get(name, b"")
        start = 8 + int.from_bytes(whole[:8], "little")
        content = len(content).to_bytes(8, "little") + content + whole[start:]
    path.write_bytes(content)
    try:
        load(folder, task)
    except StartupError as error:
        check_sentence(error.message)
    finally:
        if name in files:
            path.write_bytes(files[name])
        else:
            path.unlink()
        if fresh:
            path.parent.rmdir()


def load(folder: Path, task: Task) -> None:
    """As at a start of the server: what it reads, in its order."""
    checkpoint = read(Source("tiny", folder, task))
    check_form(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    expected_card(checkpoint, (), ModelSettings(), torch.device("cpu"))
    model = load_model(checkpoint, WeightTarget(torch.float32, torch.device("cpu")))
    TokenizerPool(tokenizer, model.vocab_size, checkpoint.max_model_len, shared_threads())


def checkpoint_seeds() -> list[bytes]:
    seeds = []
    for number in range(len(BASES)):
        _, files = written_base(number)
        for place, name in enumerate(names_of(number)):
            content = files.get(name, b"{}")
            if name.endswith(".safetensors"):
                content = content[8 : 8 + int.from_bytes(content[:8], "little")]
            if len(content) < 40_000:
                seeds.append(bytes([number, place]) + content)
    return seeds


# What all have in common.


@cache
def shared_threads() -> WorkerThreads:
    """Threads that nobody ends."""
    return WorkerThreads(1)


@cache
def loop() -> asyncio.AbstractEventLoop:
    """The event loop of targets that need one."""
    return asyncio.new_event_loop()


@cache
def echo_config() -> uvicorn.Config:
    config = uvicorn.Config(echo, log_config=None, server_header=False, date_header=False)
    config.load()
    return config


@cache
def memory_folder() -> Path:
    """A folder that costs no disk, where there is one; removed at the end of the process."""
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    KEPT.append(folder)
    return Path(folder.name)


KEPT: list[Any] = []

JSON_WORDS = (b"null", b"true", b"1e400", b"\\ud83d", b"\\u0000", b"[[", b"]]", b'{"a":', b"NaN", b'"\\"', b"\xf0\x9f")
HTTP_WORDS = (
    *(b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n"),
    *(b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0", b"HTTP/1.1", b"HEAD", b"0\r\n\r\n"),
    *(b"\r\n\r\n", b"\n", b"\r", b":", b"GET / HTTP/1.1\r\n\r\n", b"\r\n ", b"\r\n\t", b"http://", b"ffffffff\r\n"),
)

TARGETS: Mapping[str, Target] = {
    "json_body": Target(json_body, json_seeds, JSON_WORDS),
    "batch_lines": Target(batch_lines, batch_seeds, (*JSON_WORDS, b"\n", b"\r\n", b"\xef\xbb\xbf", b"custom_id")),
    "body_coding": Target(body_coding, coding_seeds, (b"\x1f\x8b\x08\0", b"\x78\x9c")),
    "requests": Target(requests, request_seeds, HTTP_WORDS),
    "header_fields": Target(header_fields, field_seeds, (b"q=", b";", b",", b"*", b"zstd", b"gzip", b"nan", b"1e5")),
    "upload_form": Target(upload_form, form_seeds, (b"--XX\r\n", b"--XX--\r\n", b"\r\n", b'name="file"', b"filename=")),
    "base64_vectors": Target(base64_vectors, base64_seeds, (b"\0\0\x80\x7f", b"\1\0\0\0")),
    "batch_results": Target(batch_results, result_seeds, (*JSON_WORDS, b"AAAA", b"=", b'"embedding"', b"1e39")),
    "checkpoint_files": Target(checkpoint_files, checkpoint_seeds, JSON_WORDS),
}
