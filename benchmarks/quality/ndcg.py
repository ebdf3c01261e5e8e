"""How well rankings place the one relevant document, and how sure a difference between two systems is."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    found = ranks <= CUTOFF
    return Quality(
        ndcg=float(ndcg_per_query(ranks).mean()),
        mrr=float(np.where(found, 1.0 / ranks, 0.0).mean()),
        recall=float(found.mean()),
    )


def paired_interval(difference: Floats, resamples: int = 10_000, seed: int = 1) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-query differences, shape (queries,)."""
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(difference), size=(resamples, len(difference)))
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
