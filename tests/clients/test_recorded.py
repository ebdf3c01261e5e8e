"""Requests of clients that no test can install, sent as they send them; each record says what its client reads.

A file of `recorded/` is one client's conversation: its requests in order, with those headers and no others. What
`needs` of a request may have:

- `status`: the status that the client takes;
- `fields`: the type of what is at a path, with `?` where it may be null or missing;
- `values`: what may be at a path; `contains`: a phrase in the text there;
- `absent`: paths that must be null or missing; `only`: the keys that an object may have;
- `vectors`: where they are, which part of the body they are of, `floats` or `base64`, and `unit` or `any` length;
- `ranking`: where scores, indexes and documents are, which parts of the body they are of, their order, and their scale:
  `0..1`, `raw`, or `any` that sorts documents as cosine does;
- `tokens`: the part of the body that TEI's tokens are of.

A path is keys and `*` for every element; the empty path is the whole answer. `keep` names parts of an answer that
later requests have in their path. `known_not_to_work` says why a client does not find what it needs, as docs/clients.md
does; once it finds it, both are out of date.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracle import st_encode
from tests.servers import RunningServer

RECORDED = {
    file.stem: json.loads(file.read_text("utf-8")) for file in (Path(__file__).parent / "recorded").glob("*.json")
}
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
DIMENSIONS = 384
LEAST_COSINE = 0.9995  # in bfloat16
SCORE_TOLERANCE = 5e-3  # in bfloat16: processors round sums at other places
TIMEOUT_S = 60

# What is said to clients that have another word for something, or send what their own server does not read either.
HINTS: Mapping[str, set[str]] = {
    "llama_cpp": {"`texts` is not read here: `documents` is."},
    "r2r": {"`model-id` is not read here: did you mean `model`?"},
    "roo_code": {
        "`input` is not read here: did you mean `inputs`? `encoding_format` is not read here: vectors are answered as "
        "the call's own dialect has them."
    },
    "sglang": {"`instruct` is not read here: did you mean `instruction`?"},
}

TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
}


@dataclass(frozen=True)
class Answer:
    """What came back, as far as a client sees it."""

    status: int
    content: bytes
    hint: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.content)


CASES = [
    pytest.param(file, index, id=f"{file}: {request['name']}")
    for file, record in sorted(RECORDED.items())
    for index, request in enumerate(record["requests"])
]


@pytest.fixture(scope="module")
def conversations(server: RunningServer) -> dict[str, list[Answer | Exception]]:
    """Each client's answers; where a request could not be sent or answered, why."""
    return {file: _converse(server.url, record["requests"]) for file, record in RECORDED.items()}


def _converse(url: str, requests: list[dict[str, Any]]) -> list[Answer | Exception]:
    kept: dict[str, str] = {}
    answers: list[Answer | Exception] = []
    for request in requests:
        try:
            answer = _send(url, request, kept)
            kept |= {name: _at(answer.json, path)[0] for name, path in request.get("keep", {}).items()}
            answers.append(answer)
        except Exception as error:
            answers.append(error)
    return answers


def _send(url: str, request: dict[str, Any], kept: Mapping[str, str]) -> Answer:
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)) as connection:
        connection.putrequest(request["method"], request["path"].format(**kept), skip_accept_encoding=True)
        for name, value in request["headers"].items():
            connection.putheader(name, value)
        body = None
        if request["body"] is not None:
            body = json.dumps(request["body"], ensure_ascii=False, separators=(",", ":")).encode()
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        if response.headers["Content-Encoding"] == "gzip":
            content = gzip.decompress(content)
        return Answer(response.status, content, response.headers["X-Vecmill-Hint"])


def _at(answer: Any, path: str) -> list[Any]:
    """Everything at a path; where a key is missing, None."""
    found = [answer]
    for part in path.split(".") if path else ():
        if part == "*":
            assert all(isinstance(entry, list) and entry for entry in found), f"no list with anything in it at {path}"
            found = [inner for entry in found for inner in entry]
        else:
            found = [entry.get(part) if isinstance(entry, dict) else None for entry in found]
    return found


@pytest.mark.parametrize(("file", "index"), CASES)
def test_the_client_finds_what_it_needs(
    file: str, index: int, conversations: dict[str, list[Answer | Exception]], minilm_folder: Path
) -> None:
    request = RECORDED[file]["requests"][index]
    answer = conversations[file][index]
    assert isinstance(answer, Answer), answer
    if "known_not_to_work" in request:
        with pytest.raises((AssertionError, LookupError, TypeError)):
            _check(answer, request, minilm_folder)
    else:
        _check(answer, request, minilm_folder)


@pytest.mark.parametrize("file", RECORDED)
def test_nothing_that_a_client_sends_is_taken_for_a_mistake(
    file: str, conversations: dict[str, list[Answer | Exception]]
) -> None:
    answers = [answer for answer in conversations[file] if isinstance(answer, Answer)]
    assert {answer.hint for answer in answers if answer.hint} <= HINTS.get(file, set())


def test_every_recorded_client_is_in_the_compatibility_page() -> None:
    page = PAGE.read_text("utf-8")
    sections = [line for line in page.splitlines() if line.startswith("## ")]
    for record in RECORDED.values():
        assert any(record["client"] in section for section in sections), record["client"]


def _check(answer: Answer, request: dict[str, Any], folder: Path) -> None:
    needs, body = request["needs"], request["body"]
    assert answer.status == needs["status"], answer.content[:1000]
    _check_fields(answer, needs)
    if "vectors" in needs:
        _check_vectors(answer.json, needs["vectors"], body, folder)
    if "ranking" in needs:
        _check_ranking(answer.json, needs["ranking"], body, folder)
    if "tokens" in needs:
        _check_tokens(answer.json, _texts(body, needs["tokens"]))


def _check_fields(answer: Answer, needs: dict[str, Any]) -> None:
    for path, kind in needs.get("fields", {}).items():
        for value in _at(answer.json, path):
            fits = isinstance(value, TYPES[kind.rstrip("?")]) and not isinstance(value, bool)
            assert fits or (kind.endswith("?") and value is None), f"{path} must be {kind}, but is {value!r}"
    for path, allowed in needs.get("values", {}).items():
        assert all(value in allowed for value in _at(answer.json, path)), path
    for path, phrase in needs.get("contains", {}).items():
        assert all(phrase in value for value in _at(answer.json, path)), path
    for path in needs.get("absent", []):
        assert set(_at(answer.json, path)) == {None}, path
    for path, keys in needs.get("only", {}).items():
        assert all(set(value) <= set(keys) for value in _at(answer.json, path)), path


def _texts(body: Any, path: str) -> list[str]:
    """A part of a request's body: one text, or texts."""
    found = _at(body, path)
    return found[0] if isinstance(found[0], list) else found


def _check_vectors(answer: Any, needs: dict[str, str], body: Any, folder: Path) -> None:
    texts = _texts(body, needs["of"])
    found = _at(answer, needs["at"])
    if needs["encoding"] == "base64":
        found = [np.frombuffer(base64.b64decode(value, validate=True), "<f4") for value in found]
    vectors = np.array(found)
    assert vectors.shape == (len(texts), DIMENSIONS)
    lengths = np.linalg.norm(vectors, axis=1)
    if needs["length"] == "unit":
        assert lengths == pytest.approx(1, abs=1e-3)
    cosines = (vectors * _encoded(folder, tuple(texts))).sum(axis=1) / lengths
    assert cosines.min() > LEAST_COSINE


def _check_ranking(answer: Any, needs: dict[str, Any], body: Any, folder: Path) -> None:
    """Without a reranker loaded, documents are ranked by cosine."""
    documents = _texts(body, needs["documents"])
    encoded = _encoded(folder, (*_texts(body, needs["query"]), *documents))
    cosines = encoded[1:] @ encoded[0]
    best_first = np.argsort(-cosines)[: needs.get("count")].tolist()
    expected = best_first if needs["order"] == "best first" else list(range(len(documents)))

    [items] = _at(answer, needs["items"])
    if "index" in needs:
        assert [item[needs["index"]] for item in items] == expected
    scores = np.array([item[needs["score"]] for item in items])
    assert len(scores) == len(expected)
    if needs["scale"] == "any":
        assert np.argsort(-scores).tolist() == np.argsort(-cosines[expected]).tolist()
    else:
        scale = (1 + cosines) / 2 if needs["scale"] == "0..1" else cosines
        assert scores == pytest.approx(scale[expected], abs=SCORE_TOLERANCE)
    if "document" in needs:
        assert [item[needs["document"]] for item in items] == [documents[index] for index in expected]


def _check_tokens(answer: Any, texts: list[str]) -> None:
    """Offsets from which the client cuts a text: those of a token that is not special are its place in the text."""
    assert len(answer) == len(texts)
    for tokens, text in zip(answer, texts, strict=True):
        assert [token["special"] for token in tokens] == [True, *[False] * (len(tokens) - 2), True]
        words = [text[token["start"] : token["stop"]] for token in tokens[1:-1]]
        assert "".join(words) == text.replace(" ", "")
        assert all(isinstance(token["id"], int) and isinstance(token["text"], str) for token in tokens)


@cache
def _encoded(folder: Path, texts: tuple[str, ...]) -> NDArray[np.float32]:
    return st_encode(folder, texts)
