"""Does the server retrieve as well as sentence-transformers does with the same weights in float32?

Embeds a retrieval set through HTTP and in process and compares nDCG@10, query by query.

    python -m benchmarks.quality                        # starts a server of its own
    python -m benchmarks.quality --url http://host:8080 --model /path/of/the/same/model
    python -m benchmarks.quality --serve --dtype bfloat16   # all after --serve goes to `vecmill serve`

Ends with status 1 when the two differ by 0.005 or more.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from benchmarks.lib.host import describe_host
from benchmarks.lib.load import embed_all, tei
from benchmarks.lib.minilm import bundled_model, encode, load_model
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from benchmarks.quality.corpus import FULL_DOCUMENTS, FULL_QUERIES, Corpus, build_corpus
from rich.console import Console
from rich.table import Table

ALLOWED_DIFFERENCE = 0.005  # of nDCG@10
BATCH = 32  # texts per request
SLICE = 256  # texts per call in process: few enough for a progress bar that moves
Vectors = npt.NDArray[np.float32]
Advance = Callable[[int], None]
CUTOFF = 10
Floats = npt.NDArray[np.float64]
Ranking = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """Means over all queries, each from 0 to 1, at a cutoff of 10."""

    ndcg: float
    mrr: float
    recall: float


def rank_documents(queries: npt.NDArray[np.float32], documents: npt.NDArray[np.float32]) -> Ranking:
    """Document indices by falling cosine, shape (queries, documents); ties keep the documents' order."""
    scores = _unit(queries) @ _unit(documents).T
    return np.argsort(-scores, axis=1, kind="stable")


def _unit(vectors: npt.NDArray[np.float32]) -> Floats:
    wide = vectors.astype(np.float64)
    unit: Floats = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def answer_ranks(ranking: Ranking, answers: list[int]) -> Ranking:
    """The 1-based rank of every query's answer, shape (queries,)."""
    ranks: Ranking = np.argmax(ranking == np.asarray(answers)[:, None], axis=1) + 1
    return ranks


def ndcg_per_query(ranks: Ranking) -> Floats:
    """nDCG@10 with one relevant document (ideal DCG 1): 1 / log2(rank + 1), or 0 below the cutoff."""
    gains: Floats = np.where(ranks <= CUTOFF, 1.0 / np.log2(ranks + 1.0), 0.0)
    return gains


def quality(ranks: Ranking) -> Quality:
    """nDCG@10, MRR@10 and recall@10."""
    hits = ranks <= CUTOFF
    return Quality(
        ndcg=float(ndcg_per_query(ranks).mean()),
        mrr=float(np.where(hits, 1.0 / ranks, 0.0).mean()),
        recall=float(hits.mean()),
    )


def paired_interval(difference: Floats, resamples: int = 10_000, seed: int = 1) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-query differences, shape (queries,)."""
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(difference), size=(resamples, len(difference)))
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Embedded:
    """One side's vectors: documents (documents, dimensions) and queries (queries, dimensions), float32."""

    documents: Vectors
    queries: Vectors


def embed_through(url: str, corpus: Corpus, advance: Advance = lambda _: None) -> Embedded:
    """The server's vectors."""
    documents = embed_all(url, corpus.documents, batch=BATCH, advance=advance)
    queries = embed_all(url, corpus.queries, batch=BATCH, dialect=tei(is_query=True), advance=advance)
    return Embedded(documents.vectors, queries.vectors)


def embed_in_process(model_folder: Path, corpus: Corpus, advance: Advance = lambda _: None) -> Embedded:
    """sentence-transformers' vectors with float32 weights."""
    model = load_model(model_folder)
    return Embedded(
        documents=encode(model.encode_document, corpus.documents, SLICE, advance),
        queries=encode(model.encode_query, corpus.queries, SLICE, advance),
    )


def compare(corpus: Corpus, server: Embedded, reference: Embedded) -> dict[str, Any]:
    """Both sides' quality, their difference (server minus reference), and how close the vectors are."""
    rankings = [rank_documents(side.queries, side.documents) for side in (server, reference)]
    ranks = [answer_ranks(ranking, corpus.answers) for ranking in rankings]
    difference = ndcg_per_query(ranks[0]) - ndcg_per_query(ranks[1])
    cosines = [_cosines(server.documents, reference.documents), _cosines(server.queries, reference.queries)]
    return {
        "corpus": corpus.hash,
        "documents": len(corpus.documents),
        "queries": len(corpus.queries),
        "server": asdict(quality(ranks[0])),
        "reference": asdict(quality(ranks[1])),
        "difference": float(difference.mean()),
        "interval_95": paired_interval(difference),
        "rankings_that_differ": int((rankings[0] != rankings[1])[:, :CUTOFF].any(axis=1).sum()),
        "min_cosine": float(np.concatenate(cosines).min()),
    }


def _cosines(first: Vectors, second: Vectors) -> npt.NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    cosines: npt.NDArray[np.float64] = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines


@contextmanager
def served(url: str | None, model_folder: Path, serve_options: Sequence[str]) -> Iterator[str]:
    """The address to measure: the one given, or that of a server started for the block."""
    if url is not None:
        yield url.rstrip("/")
        return
    port = free_port()
    command = vecmill_command(port, "--embed-model", str(model_folder), *serve_options)
    with running(command, port, "/ready") as server:
        yield server.url


def print_comparison(comparison: dict[str, Any]) -> None:
    """The comparison for people."""
    table = Table(
        title=f"{comparison['documents']:,} documents, {comparison['queries']:,} queries, set {comparison['corpus']}",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("nDCG@10", "MRR@10", "recall@10"):
        table.add_column(heading, justify="right")
    for label, side in (
        ("server", comparison["server"]),
        ("sentence-transformers, float32", comparison["reference"]),
    ):
        table.add_row(label, *(f"{side[measure]:.4f}" for measure in ("ndcg", "mrr", "recall")))
    low, high = comparison["interval_95"]
    difference = comparison["difference"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"difference of nDCG@10 {difference:+.5f} (95 % paired bootstrap {low:+.5f} to {high:+.5f}); "
        f"top {CUTOFF} differs for {comparison['rankings_that_differ']} of {comparison['queries']} queries; "
        f"lowest cosine between the two {comparison['min_cosine']:.6f}",
        soft_wrap=True,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: start one)")
    parser.add_argument("--model", type=Path, help="the served model's folder (default: the bundled MiniLM)")
    parser.add_argument("--documents", type=int, default=FULL_DOCUMENTS, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=FULL_QUERIES, help="default: %(default)s")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options for `vecmill serve`")
    return parser.parse_args()


def main() -> int:
    """Measure, print, store; the exit status."""
    options = parse_arguments()
    model_folder = options.model or bundled_model()
    corpus = build_corpus(options.documents, options.queries)
    texts = len(corpus.documents) + len(corpus.queries)
    with served(options.url, model_folder, options.serve) as url:
        health = httpx.get(f"{url}/health", timeout=10.0).json()
        with progress("server", texts) as advance:
            server = embed_through(url, corpus, advance)
    with progress("sentence-transformers", texts) as advance:
        reference = embed_in_process(model_folder, corpus, advance)
    comparison = compare(corpus, server, reference)
    print_comparison(comparison)
    passed = abs(comparison["difference"]) < ALLOWED_DIFFERENCE
    served_as = {key: health.get(key) for key in ("version", "model", "dtype", "dtype_reason", "device")}
    publish(
        "quality",
        {"host": describe_host(), "served": served_as, **comparison, "passed": passed},
        store=not options.no_store,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
