#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx2", "numpy", "rich"]
# ///
"""Index a folder of Python code through a vecmill server, then search it in plain words.

It talks to the server as an editor's indexer does: it registers a job, waits its turn, sends one batch after
another to `POST /embed`, reports progress, closes the job, and puts the best hits of every query through
`POST /v1/rerank`. Needs httpx2, numpy and rich, which vecmill is installed with; nothing of vecmill itself.

    vecmill serve &
    python examples/codebase_search.py ~/src/myproject --query "where are passwords hashed"
"""

import argparse
import ast
import os
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

DEFAULT_QUERIES = (
    "parse an ISO 8601 date",
    "copy a directory tree recursively",
    "open a temporary file that is deleted on close",
)
SKIPPED_FOLDERS = frozenset({"site-packages", "node_modules", "test", "tests", "idle_test", "__pycache__"})
RETRY_AFTER_S = (1.0, 2.0, 4.0)
BATCH_WITHOUT_ADVICE = 32  # texts per request when the server recommends nothing
EMBED_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 10.0
QUEUE_POLL_S = 2.0
QUEUE_PATIENCE_S = 300.0
RERANKED = 20  # hits of the vector search that the reranker sees


class SearchError(Exception):
    """What went wrong, in one sentence for the person at the terminal."""


@dataclass(frozen=True)
class Chunk:
    """One function or class: where it is (path relative to the folder, 1-based line) and its source."""

    path: str
    line: int
    name: str
    headline: str
    source: str


def extract_chunks(folder: Path) -> list[Chunk]:
    """All functions and classes of the Python files below `folder`, in order of path and line.

    A class stands for its header (everything before its first method); its methods are chunks of their own.
    Files that this Python cannot parse are left out.
    """
    chunks: list[Chunk] = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if any(part in SKIPPED_FOLDERS or part.startswith(".") for part in relative.parts[:-1]):
            continue
        with suppress(SyntaxError, UnicodeDecodeError, OSError):
            chunks.extend(_chunks_of_file(path, relative.as_posix()))
    return chunks


def _chunks_of_file(path: Path, shown_path: str) -> list[Chunk]:
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    # Not splitlines(): that also splits at form feeds, which ast does not count as line ends.
    return list(_walk(tree.body, source.split("\n"), shown_path, ""))


def _walk(body: Sequence[ast.stmt], lines: list[str], path: str, prefix: str) -> Iterator[Chunk]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = prefix + node.name
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef):
            last = _class_header_end(node, last)
        source = "\n".join(lines[first - 1 : last])
        yield Chunk(path, node.lineno, name, lines[node.lineno - 1].strip(), source)
        if isinstance(node, ast.ClassDef):
            yield from _walk(node.body, lines, path, name + ".")


def _class_header_end(node: ast.ClassDef, last: int) -> int:
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            starts = [member.lineno, *(decorator.lineno for decorator in member.decorator_list)]
            return max(node.lineno, min(starts) - 1)
    return last


class Server:
    """The calls to the server, with the patience and retries of an editor's indexer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx2.Client(base_url=self.url, timeout=EMBED_TIMEOUT_S)
        self.cached = 0
        """Texts of batches so far whose vectors the server had already; 0 where a server does not say."""

    def check(self) -> None:
        """Raise SearchError unless something answers at the address."""
        try:
            self._http.get("/health", timeout=JOB_TIMEOUT_S)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise SearchError(
                f"No server answers at {self.url} ({error}); start `vecmill serve` or name one with --url."
            ) from error

    def embed(self, texts: Sequence[str], *, is_query: bool, job_id: str | None = None) -> np.ndarray:
        """Unit vectors of the texts, float32, shape (texts, dimensions)."""
        headers = {} if job_id is None else {"X-Job-ID": job_id}
        answer = self._post("/embed", {"inputs": list(texts), "is_query": is_query}, headers)
        self.cached += 0 if is_query else int(answer.headers.get("X-Cached-Inputs", "0"))
        return np.asarray(answer.json(), dtype=np.float32)

    def rerank(self, query: str, documents: Sequence[str], top: int) -> list[tuple[int, float]]:
        """The `top` best documents as (index into documents, score), best first."""
        body = {"query": query, "documents": list(documents), "top_n": top}
        results = self._post("/v1/rerank", body, {}).json()["results"]
        return [(int(result["index"]), float(result["relevance_score"])) for result in results]

    def job_call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """A call about a job: None when it fails, for bookkeeping must never stop an index."""
        with suppress(httpx2.TransportError, ValueError, TypeError):
            answer = self._http.request(method, path, json=body, timeout=JOB_TIMEOUT_S)
            if answer.status_code == 404:
                return {"status": "unknown"}
            if answer.is_success:
                return dict(answer.json())
        return None

    def _post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx2.Response:
        for wait_s in (*RETRY_AFTER_S, None):
            trouble: str
            try:
                answer = self._http.post(path, json=body, headers=headers)
            except httpx2.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    return answer
                trouble = f"status {answer.status_code}: {answer.text[:200]}"
                if answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                    wait_s = None  # the same request would fail the same way
            if wait_s is None:
                raise SearchError(f"{self.url}{path} failed with {trouble}")
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


class Job:
    """One index run as the server knows it; does nothing where the server keeps no jobs."""

    def __init__(self, server: Server, project: str, total: int) -> None:
        self._server = server
        self._registration = {
            "project": project,
            "total_chunks": total,
            "instance_id": f"codecart-{os.getpid()}",
        }
        self.id: str | None = None
        self.batch = BATCH_WITHOUT_ADVICE

    def register(self) -> None:
        """Announce the run and take over the batch size that the server recommends."""
        answer = self._server.job_call("POST", "/jobs", self._registration)
        if answer is not None and "job_id" in answer:
            self.id = str(answer["job_id"])
            self.batch = int(answer.get("recommended_batch_size") or BATCH_WITHOUT_ADVICE)

    def wait_for_turn(self, console: Console) -> None:
        """Return once the job is no longer queued; register anew if the server has forgotten it."""
        deadline = time.monotonic() + QUEUE_PATIENCE_S
        with console.status("waiting for the server") as status:
            while (state := self._state()).get("status") in ("queued", "unknown"):
                if time.monotonic() > deadline:
                    raise SearchError(f"The server was busy with other jobs for {QUEUE_PATIENCE_S:.0f} s.")
                if state["status"] == "unknown":
                    self.register()
                status.update(f"queued, position {state.get('queue_position', '?')}")
                time.sleep(QUEUE_POLL_S)

    def report(self, done: int) -> None:
        """Tell the server how many chunks are done."""
        self._call("progress", {"current": done})

    def complete(self) -> None:
        """Close the job as done."""
        self._call("complete")

    def fail(self, error: str) -> None:
        """Close the job with what went wrong."""
        self._call("fail", {"error": error})

    def _state(self) -> dict[str, Any]:
        if self.id is None:
            return {}
        return self._server.job_call("GET", f"/jobs/{self.id}") or {}

    def _call(self, action: str, body: dict[str, Any] | None = None) -> None:
        if self.id is not None:
            self._server.job_call("POST", f"/jobs/{self.id}/{action}", body)


@contextmanager
def running_job(server: Server, project: str, total: int, console: Console) -> Iterator[Job]:
    """A job that is its turn; completed at the end, failed when the block raises or is interrupted."""
    job = Job(server, project, total)
    job.register()
    try:
        job.wait_for_turn(console)
        yield job
    except BaseException as error:
        job.fail("interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or repr(error))
        raise
    job.complete()


class RateColumn(ProgressColumn):
    """Texts per second so far."""

    def render(self, task: Task) -> Text:
        """The rate of a progress bar's task, blank until there is one."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.0f} texts/s", style="cyan")


def build_index(server: Server, project: str, chunks: Sequence[Chunk], console: Console) -> np.ndarray:
    """Embed all chunks, one batch after another; float32, shape (chunks, dimensions)."""
    bar = Progress(
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    parts: list[np.ndarray] = []
    with running_job(server, project, len(chunks), console) as job, bar:
        task = bar.add_task("embedding", total=len(chunks))
        for start in range(0, len(chunks), job.batch):
            texts = [chunk.source for chunk in chunks[start : start + job.batch]]
            parts.append(server.embed(texts, is_query=False, job_id=job.id))
            done = start + len(texts)
            job.report(done)
            bar.update(task, completed=done)
    return np.concatenate(parts)


def search(
    server: Server, query: str, chunks: Sequence[Chunk], vectors: np.ndarray, top: int
) -> list[tuple[float, Chunk]]:
    """The `top` best chunks as (reranker's score, chunk), best first; cosine picks what the reranker sees."""
    query_vector = server.embed([query], is_query=True)[0]
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query_vector)
    candidates = np.argsort(-(vectors @ query_vector) / norms, kind="stable")[: max(RERANKED, top)]
    found = [chunks[index] for index in candidates]
    ranked = server.rerank(query, [chunk.source for chunk in found], top)
    return [(score, found[index]) for index, score in ranked[:top]]


def where(chunk: Chunk) -> str:
    """Path and line as editors and terminals make a link of."""
    return f"{chunk.path}:{chunk.line}"


def print_hits(console: Console, query: str, hits: Sequence[tuple[float, Chunk]]) -> None:
    """One table per query."""
    table = Table(title=Text(query), title_justify="left", title_style="bold", box=None, pad_edge=False)
    # Only the first line gives way where the terminal is narrow: score and place must stay whole.
    table.add_column("score", justify="right", style="cyan", min_width=5)
    table.add_column("where", no_wrap=True, min_width=max((len(where(chunk)) for _, chunk in hits), default=0))
    table.add_column("name", style="green", overflow="ellipsis", no_wrap=True)
    table.add_column("first line", style="dim", overflow="ellipsis", no_wrap=True, max_width=60)
    for score, chunk in hits:
        table.add_row(f"{score:.3f}", Text(where(chunk)), Text(chunk.name), Text(chunk.headline))
    console.print()
    console.print(table)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description="Index Python code through a vecmill server and search it.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python files (default: this Python's standard library)",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server (default: %(default)s)")
    parser.add_argument("--query", action="append", metavar="TEXT", help="what to look for; repeatable")
    parser.add_argument("--top", type=int, default=5, help="hits shown per query (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="index only the first N functions and classes")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Index and search as the options say; raises SearchError with what stopped it."""
    server = Server(options.url)
    server.check()
    folder: Path = options.folder.expanduser().resolve()
    with console.status(f"reading {folder}"):
        chunks = extract_chunks(folder)[: options.limit]
    if not chunks:
        raise SearchError(f"There are no functions or classes in the Python files below {folder}.")
    console.print(f"{len(chunks):,} functions and classes in {folder}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    vectors = build_index(server, folder.name, chunks, console)
    indexed_s = time.perf_counter() - started

    queries: Sequence[str] = options.query or DEFAULT_QUERIES
    started = time.perf_counter()
    hits = [search(server, query, chunks, vectors, options.top) for query in queries]
    search_ms = (time.perf_counter() - started) / len(queries) * 1000
    for query, found in zip(queries, hits, strict=True):
        print_hits(console, query, found)
    if server.cached:
        console.print(
            f"\n{server.cached:,} of {len(chunks):,} chunks were in the server's cache already: computed before, not "
            f"again",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"\n{len(chunks):,} chunks in {indexed_s:.1f} s, {len(chunks) / indexed_s:.0f} texts/s; "
        f"{search_ms:.0f} ms per search (embed, top {max(RERANKED, options.top)} by cosine, rerank)",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1 with one sentence on stderr if not, 130 if interrupted."""
    try:
        run(parse_arguments(arguments), Console())
    except SearchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the job is closed.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
