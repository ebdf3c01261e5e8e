#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx2", "rich"]
# ///
"""Put the lines of a file, or of stdin, in order of how well they answer a question: `POST /v1/rerank`.

What a keyword search found in no order, a reranker puts in order. Needs httpx2 and rich, which vecmill is installed
with; nothing of vecmill itself.

    vecmill serve &
    grep -rhE '^ *(async )?def ' ~/src/myproject | python examples/rerank.py "where are passwords checked?"
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table
from rich.text import Text

ANSWER_S = 120.0
MOST_LINES = 1000  # of one request


class RerankError(Exception):
    """What went wrong, in one sentence for the person at the terminal."""


def rerank(url: str, query: str, documents: Sequence[str], top: int) -> list[tuple[float, str]]:
    """The `top` best documents as (score, document), best first."""
    body = {"query": query, "documents": list(documents), "top_n": min(top, len(documents))}
    try:
        answer = httpx2.post(f"{url.rstrip('/')}/v1/rerank", json=body, timeout=ANSWER_S)
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise RerankError(
            f"No server answers at {url} ({error}); start `vecmill serve` or name one with --url."
        ) from error
    if not answer.is_success:
        raise RerankError(f"{url}/v1/rerank was answered with status {answer.status_code}: {answer.text[:300]}")
    return [(float(result["relevance_score"]), documents[result["index"]]) for result in answer.json()["results"]]


def read_lines(path: Path | None) -> list[str]:
    """The lines that are not blank, each once, in their order; from None: of stdin."""
    text = sys.stdin.read() if path is None else path.read_text("utf-8")
    return list(dict.fromkeys(stripped for line in text.splitlines() if (stripped := line.strip())))[:MOST_LINES]


def print_ranked(ranked: Sequence[tuple[float, str]]) -> None:
    """A row for each, the score first."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="cyan", min_width=5)
    table.add_column(overflow="fold")
    for score, document in ranked:
        table.add_row(f"{score:.3f}", Text(document))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1 with one sentence on stderr if not."""
    parser = argparse.ArgumentParser(description="Rank the lines of a file or of stdin with a vecmill server.")
    parser.add_argument("query", help="the question")
    parser.add_argument("file", nargs="?", type=Path, help="a text file (default: stdin)")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="lines shown (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        lines = read_lines(options.file)
        if not lines:
            raise RerankError("There is no line to rank.")
        print_ranked(rerank(options.url, options.query, lines, options.top))
    except (RerankError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
