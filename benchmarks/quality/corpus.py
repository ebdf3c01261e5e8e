"""A retrieval set made of installed code: a docstring's first sentence must find its function's body.

The functions are those of networkx and sympy (both BSD-3-Clause). Their versions decide the set, so its hash
goes into every result; constraints.txt pins them.
"""

import ast
import hashlib
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

PACKAGES = ("networkx", "sympy")
SKIPPED_FOLDERS = frozenset({"tests", "benchmarks", "testing"})
MIN_BODY_CHARACTERS = 240
MIN_QUERY_WORDS = 5
MAX_QUERY_WORDS = 30
FULL_DOCUMENTS = 4000
FULL_QUERIES = 1000


@dataclass(frozen=True)
class Corpus:
    """Documents, queries, and for every query the index of the one document that answers it."""

    document_ids: list[str]
    documents: list[str]
    queries: list[str]
    answers: list[int]

    @property
    def hash(self) -> str:
        """16 hex digits over all ids and queries: equal hashes mean the same set."""
        digest = hashlib.sha256()
        for document_id in self.document_ids:
            digest.update(f"{document_id}\n".encode())
        for query, answer in zip(self.queries, self.answers, strict=True):
            digest.update(f"{self.document_ids[answer]}\t{query}\n".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Function:
    id: str
    body: str
    query: str | None


def build_corpus(max_documents: int = FULL_DOCUMENTS, max_queries: int = FULL_QUERIES) -> Corpus:
    """The set, the same on every machine with the same two packages.

    Queries and the documents that answer none are drawn in the order of a hash of their ids, so that a
    smaller set is a fair sample and not the first modules of the alphabet.
    """
    functions = sorted(_unique(_functions()), key=lambda function: _shuffled(function.id))
    queried = [function for function in functions if function.query is not None][: min(max_queries, max_documents)]
    queried_ids = {function.id for function in queried}
    others = [function for function in functions if function.id not in queried_ids]
    kept = sorted([*queried, *others[: max_documents - len(queried)]], key=lambda function: function.id)
    index = {function.id: number for number, function in enumerate(kept)}
    return Corpus(
        document_ids=[function.id for function in kept],
        documents=[function.body for function in kept],
        queries=[function.query or "" for function in queried],
        answers=[index[function.id] for function in queried],
    )


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unique(functions: Iterator[_Function]) -> list[_Function]:
    """Without repeated bodies, and without the sentences that describe several functions."""
    by_body: dict[str, _Function] = {}
    for function in functions:
        by_body.setdefault(" ".join(function.body.split()), function)
    query_counts = Counter(_plain(function.query) for function in by_body.values() if function.query is not None)
    return [
        function if function.query is None or query_counts[_plain(function.query)] == 1 else _without_query(function)
        for function in by_body.values()
    ]


def _without_query(function: _Function) -> _Function:
    return _Function(function.id, function.body, None)


def _functions() -> Iterator[_Function]:
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"The package {package} is missing: pip install --group benchmarks")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root.parent)
            if not SKIPPED_FOLDERS.intersection(relative.parts):
                yield from _functions_of_file(path, relative.with_suffix("").as_posix().replace("/", "."))


def _functions_of_file(path: Path, module: str) -> Iterator[_Function]:
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in LaTeX docstrings
        tree = ast.parse(source)
    yield from _walk(tree.body, source.split("\n"), module)


def _walk(body: list[ast.stmt], lines: list[str], prefix: str) -> Iterator[_Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _walk(node.body, lines, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef):
            text = _body(node, lines)
            if len(text) >= MIN_BODY_CHARACTERS:
                yield _Function(f"{prefix}.{node.name}:{node.lineno}", text, _query(node, text))


def _body(node: ast.FunctionDef, lines: list[str]) -> str:
    """The source below the signature and the docstring, dedented."""
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        return ""
    first = statements[0].lineno
    if first == node.lineno:
        return ""  # def and body on one line
    return dedent("\n".join(lines[first - 1 : node.end_lineno])).strip()


def _query(node: ast.FunctionDef, body: str) -> str | None:
    """The docstring's first sentence on one line; None if it is no sentence or gives the answer away."""
    docstring = ast.get_docstring(node) or ""
    paragraph = " ".join(docstring.split("\n\n", 1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0].strip()
    if not MIN_QUERY_WORDS <= len(sentence.split()) <= MAX_QUERY_WORDS:
        return None
    if ">>>" in sentence or "::" in sentence or _plain(sentence) in _plain(body):
        return None
    return sentence


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


if __name__ == "__main__":
    whole = build_corpus()
    print(f"{len(whole.documents)} documents, {len(whole.queries)} queries, hash {whole.hash}")
