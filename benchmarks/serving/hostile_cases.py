"""Requests that are meant to hurt, of any size, and how each is sent."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Event, Thread
from urllib.parse import urlsplit

ANSWERED_WITHIN_S = 120.0
BATCH_WITHIN_S = 120.0
HEADER_LINE = b"X-Padding: " + b"a" * 4000 + b"\r\n"
# Followers of the jobs, and jobs, for each megabyte of the other cases: 300 x 1,000 at 33.
FOLLOWERS_PER_MB, JOBS_PER_MB = 9.1, 30.3

Attack = Callable[[str], int]
"""Given the server's URL; the status of the answer, 0 where there was none."""


@dataclass(frozen=True)
class HostileCase:
    """One kind of request."""

    group: str
    name: str
    prepared: Callable[[int], Attack]
    """Given a size in bytes. What it takes to make the request is not part of the attack."""


def repeated(unit: str, size: int, before: str = "[", after: str = "]") -> bytes:
    """Equal parts with commas between them, as a list unless said otherwise: about `size` bytes."""
    count = max(1, (size - len(before) - len(after) + 1) // (len(unit.encode()) + 1))
    return (before + ",".join([unit] * count) + after).encode()


def _in(before: str, unit: str, after: str) -> Callable[[int], bytes]:
    return lambda size: repeated(unit, size, before, after)


def _run(before: str, unit: str, after: str) -> Callable[[int], bytes]:
    """Equal parts with nothing in between."""
    return lambda size: (
        before + unit * max(1, (size - len(before) - len(after)) // len(unit.encode())) + after
    ).encode()


def _numbered(before: str, value: str, after: str) -> Callable[[int], bytes]:
    """An object whose keys all differ."""

    def body(size: int) -> bytes:
        count = max(1, size // (len(value) + 12))
        return (before + ",".join(f'"{index:08d}":{value}' for index in range(count)) + after).encode()

    return body


def _nested(size: int) -> bytes:
    block = '{"a":' * 500 + "1" + "}" * 500
    return repeated(block, size, '{"input":"x","other":[', "]}")


def _posted(group: str, name: str, path: str, body: Callable[[int], bytes]) -> HostileCase:
    return HostileCase(group, name, lambda size: _post(path, body(size)))


def _post(path: str, body: bytes) -> Attack:
    return lambda url: post(url, path, body)[0]


def post(url: str, path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    """The status and body of the answer; status 0 where the connection broke or the time was up."""
    return _ask(url, "POST", path, body, {"Content-Type": kind})


def get(url: str, path: str) -> tuple[int, bytes]:
    """The same for a GET."""
    return _ask(url, "GET", path)


def _ask(
    url: str, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=ANSWERED_WITHIN_S)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before it is read
            connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


RERANK = '{"query":"q","documents":'
PARAMETERS = '{"input":"x","other":'
JSON_SHAPES: dict[str, Callable[[int], bytes]] = {
    "numbers": _in(PARAMETERS + "[", "1", "]}"),
    "long numbers": _in(PARAMETERS + "[", "1." + "123456789" * 20, "]}"),
    "one number": _run(PARAMETERS, "9", "}"),
    "lists in a list": _in(PARAMETERS + "[", "[1]", "]}"),
    "empty lists": _in(PARAMETERS + "[", "[]", "]}"),
    "empty objects": _in(PARAMETERS + "[", "{}", "]}"),
    "objects": _in(PARAMETERS + "[", '{"a":1}', "]}"),
    "short texts": _in(PARAMETERS + "[", '"a"', "]}"),
    "one key again and again": _in(PARAMETERS + "{", '"a":1', "}}"),
    "different keys": _numbered(PARAMETERS + "{", "1", "}}"),
    "deep": _nested,
    "brackets alone": _run("", "[", ""),
    "one text": _run(PARAMETERS + '"', "a", '"}'),
    "one text beside a wide character": _run(PARAMETERS + '"😀', "a", '"}'),
    "escapes": _run(PARAMETERS + '"', "\\u0041", '"}'),
    "escaped line ends": _run(PARAMETERS + '"', "\\n", '"}'),
    "white space": _run('{"input":"x"', " ", "}"),
    "NaN at the end": _run(PARAMETERS + '["', "a", '",NaN]}'),
    "half a pair at the end": _run(PARAMETERS + '"', "a", '\\ud800"}'),
    "no UTF-8": lambda size: b'{"input":"' + b"\xff" * size + b'"}',
}
MISTAKES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "texts": ("/rerank", _in('{"query":"q","texts":[', "{}", "]}")),
    "text_2": ("/v1/score", _in('{"text_1":"q","text_2":[', "{}", "]}")),
    "passages": ("/v1/ranking", _in('{"query":{"text":"q"},"passages":[', "1", "]}")),
    "texts of Cohere": ("/v2/embed", _in('{"texts":[', "1", "]}")),
    "inputs of Cohere": ("/v2/embed", _in('{"inputs":[', "{}", "]}")),
    "embedding_types": ("/v2/embed", _in('{"texts":["x"],"embedding_types":[', "1", "]}")),
    "sentences": ("/similarity", _in('{"inputs":{"source_sentence":"q","sentences":[', "1", "]}}")),
    "rank_fields": ("/v1/rerank", _in(RERANK + '["a"],"rank_fields":[', "1", "]}")),
    "documents": ("/v1/rerank", _in(RERANK + "[", "1", "]}")),
    "metadata": (
        "/v1/batches",
        _numbered('{"input_file_id":"f","endpoint":"/v1/embeddings","completion_window":"24h","metadata":{', "1", "}}"),
    ),
    "input of Ollama": ("/api/embed", _in('{"input":[', "1", "]}")),
    "content": ("/embedding", _in('{"content":["a",', "1", "]}")),
    "texts of Weaviate": ("/vectors", _in('{"texts":[', "{}", "]}")),
}
TOO_MANY: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "input": ("/v1/embeddings", _in('{"input":[', '"a"', "]}")),
    "lists of ids": ("/v1/embeddings", _in('{"input":[', "[1]", "]}")),
    "inputs": ("/embed", _in('{"inputs":[', '"a"', "]}")),
    "documents": ("/v2/rerank", _in(RERANK + "[", '"a"', "]}")),
    "texts": ("/rerank", _in('{"query":"q","texts":[', '"a"', "]}")),
    "rank_fields": ("/v1/rerank", _in(RERANK + '[{"a":"b"}],"rank_fields":[', '"a"', "]}")),
}
LONG_WORDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "input": ("/v1/embeddings", _run('{"input":"', "a", '"}')),
    "wide characters": ("/v1/embeddings", _run('{"input":"', "漢", '"}')),
    "query": ("/rerank", _run('{"texts":["a"],"query":"', "a", '"}')),
    "a document": ("/rerank", _run('{"query":"q","texts":["', "a", '"]}')),
    "tokenize": ("/tokenize", _run('{"inputs":"', "a", '"}')),
}
TOKEN_IDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "input": ("/v1/embeddings", _in('{"input":[', "1", "]}")),
    "long ids": ("/v1/embeddings", _in('{"input":[', "15339", "]}")),
    "the model's own": ("/embed", _in('{"inputs":[', "2088", "]}")),
    "decode": ("/decode", _in('{"ids":[', "2088", "]}")),
    "detokenize": ("/detokenize", _in('{"tokens":[', "2088", "]}")),
}


def cases() -> list[HostileCase]:
    """All cases."""
    return [
        *(_posted("token ids", name, *how) for name, how in TOKEN_IDS.items()),
        *(_posted("mistakes", name, *how) for name, how in MISTAKES.items()),
        *(_posted("too many", name, *how) for name, how in TOO_MANY.items()),
        *(_posted("one word", name, *how) for name, how in LONG_WORDS.items()),
        *(_posted("JSON", name, "/v1/embeddings", body) for name, body in JSON_SHAPES.items()),
        HostileCase("heads", "header lines", _header_lines),
        HostileCase("heads", "one header", _one_header),
        HostileCase("heads", "target", _long_target),
        HostileCase("batches", "a line of token ids", lambda size: _batch('{"input":[', "1", "]}", size)),
        HostileCase("batches", "a line of mistakes", lambda size: _batch('{"input":["a",', "{}", "]}", size)),
        HostileCase("followers", "of jobs", _followers),
    ]


def _header_lines(size: int) -> Attack:
    return _raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + HEADER_LINE * (size // len(HEADER_LINE)) + b"\r\n")


def _one_header(size: int) -> Attack:
    return _raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Padding: " + b"a" * size + b"\r\n\r\n")


def _long_target(size: int) -> Attack:
    return _raw(b"GET /health?" + b"a" * size + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")


def _raw(request: bytes) -> Attack:
    def attack(url: str) -> int:
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=ANSWERED_WITHIN_S) as connection:
            with suppress(OSError):  # refused while it is sent
                connection.sendall(request)
            try:
                line = connection.recv(65_536).split(b" ", 2)
            except OSError:
                return 0
        return int(line[1]) if len(line) > 1 else 0

    return attack


def _batch(before: str, unit: str, after: str, size: int) -> Attack:
    body = repeated(unit, size, before, after).decode()
    line = f'{{"custom_id":"1","method":"POST","url":"/v1/embeddings","body":{body}}}'
    part = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
    form = part.format("purpose", "", "batch") + part.format("file", '; filename="f"', line) + "--b--\r\n"
    upload = form.encode()

    def attack(url: str) -> int:
        status, answer = post(url, "/v1/files", upload, "multipart/form-data; boundary=b")
        if status != 200:
            return status
        batch = {"input_file_id": json.loads(answer)["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        status, answer = post(url, "/v1/batches", json.dumps(batch).encode())
        return _ended(url, json.loads(answer)["id"]) if status == 200 else status

    return attack


def _ended(url: str, batch: str) -> int:
    """200 once a batch has ended, well or not; else 0."""
    deadline = time.monotonic() + BATCH_WITHIN_S
    while time.monotonic() < deadline:
        status, answer = get(url, f"/v1/batches/{batch}")
        if status == 200 and json.loads(answer)["status"] in ("completed", "failed", "expired", "cancelled"):
            return 200
        time.sleep(0.1)
    return 0


def _followers(size: int) -> Attack:
    followers = max(2, round(FOLLOWERS_PER_MB * size / 1e6))
    jobs = max(2, round(JOBS_PER_MB * size / 1e6))

    def attack(url: str) -> int:
        job = b'{"project":"p","total_chunks":1}'
        statuses = set()
        with _following(url, followers):
            registered = [post(url, "/jobs", job) for _ in range(jobs)]
            statuses |= {status for status, _ in registered}
            for status, answer in registered:
                if status == 200:
                    statuses.add(post(url, f"/jobs/{json.loads(answer)['job_id']}/cancel", b"")[0])
        return max(statuses) if 0 not in statuses else 0

    return attack


@contextmanager
def _following(url: str, followers: int) -> Iterator[None]:
    """Keep so many connections open, each of which reads every change of a job."""
    host, port = urlsplit(url).netloc.split(":")
    connections = [socket.create_connection((host, int(port))) for _ in range(followers)]
    over = Event()

    def read() -> None:
        while not over.is_set():
            for connection in connections:
                with suppress(BlockingIOError, ConnectionError):
                    connection.recv(65_536)
            over.wait(0.05)

    for connection in connections:
        connection.sendall(b"GET /jobs/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.setblocking(False)
    reader = Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()
        for connection in connections:
            connection.close()
