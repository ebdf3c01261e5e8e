"""vecmill against sentence-transformers on the very same weights, over the same ragged texts.

It is the package's own encode(): sorted by length, padded to the longest of each batch, transformers' SDPA attention.
Only its tokenizer is replaced, so that neither side tokenizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.gpu.forward import START_SECONDS, Timing, timed
from benchmarks.gpu.subjects import Subject, estimate
from benchmarks.lib.figures import significant
from benchmarks.lib.timing import Machine, TimedSide
from benchmarks.models.plain import PlainLatentAttention, pad_right, pooled, with_sdpa
from benchmarks.models.workloads import CAUSAL, batches
from torch import Tensor, nn

from vecmill.core.types import Row, TokenIds

BATCH_SIZES = (32, 64)  # its default, and twice that
ROUNDS = 2
LATENT_HEADS = 8
# Rounding through full depth leaves cosines of 0.999; a wrong mask or position takes several times more.
LEAST_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.99}


class PaddedModel(nn.Module):
    """The first module of a SentenceTransformer: turns token ids, written one character each, into pooled vectors."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        # A tuple hides the module from torch: .to() would otherwise move weights that vecmill's side uses too.
        self._backbone = (with_sdpa(subject.model.modules[0]),)
        self._pooling = "lasttoken" if subject.kind in CAUSAL else "mean"
        self._latent_attention = None
        if subject.kind == "nvembed":
            self._latent_attention = PlainLatentAttention(
                subject.folder / "model.safetensors", LATENT_HEADS, subject.target.device, subject.target.dtype
            )

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Instead of a tokenizer."""
        ids, mask = pad_right([_read(text) for text in inputs])
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Adds the pooled vectors, float32."""
        mask = features["attention_mask"]
        hidden: Tensor = self._backbone[0](input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        if self._latent_attention is not None:
            hidden = self._latent_attention(hidden.flatten(0, 1)).view_as(hidden)
        return {**features, "sentence_embedding": pooled(hidden, mask, self._pooling)}


def compare(subject: Subject, timing: Timing, mode: Mapping[str, Any]) -> dict[str, Any] | None:
    """Texts per second of both, and their vectors' cosines; `mode` holds the measurements of the chosen mode."""
    texts = subject.texts[: _how_many(subject, timing, mode["fit"]["us_per_token"])]
    packs = batches([Row(text) for text in texts], mode["fit"]["budget_tokens"])
    ours = TimedSide(
        partial(subject.run_all, packs),
        subject.operations(packs),
        subject.weight_bytes * len(packs),
    )
    needs = estimate({"": ours}, ROUNDS + 1, 0, timing.matmul_rate) * (1 + 2 * len(BATCH_SIZES))
    run = partial(_compare, subject, timing.machine, texts, ours)
    comparison = timing.stages.run(f"{subject.name}: against sentence-transformers", START_SECONDS + needs, run)
    return {**comparison, "budget_tokens": mode["fit"]["budget_tokens"], "packs": len(packs)} if comparison else None


def _how_many(subject: Subject, timing: Timing, microseconds_per_token: float) -> int:
    """Texts that vecmill embeds in the seconds wanted."""
    mean = float(np.mean([len(text) for text in subject.texts]))
    wanted = timing.sizes.encode_seconds / (mean * microseconds_per_token / 1e6)
    return int(np.clip(wanted, *timing.sizes.texts))


def _compare(subject: Subject, machine: Machine, texts: Sequence[TokenIds], ours: TimedSide) -> dict[str, Any]:
    package, encode = _encoder(subject, texts)
    theirs = {f"sentence-transformers, batches of {size}": replace(ours, run=encode(size)) for size in BATCH_SIZES}
    expected, cosines = ours.run(), {}
    for name, side in theirs.items():
        similarities = F.cosine_similarity(expected, side.run(), dim=1).nan_to_num(nan=-1)
        cosines[name] = {"min": float(similarities.min()), "mean": float(similarities.mean())}
    rounds = replace(machine, rounds=min(machine.rounds, ROUNDS))
    measured = timed(
        f"{subject.name}, both", rounds, subject.target.dtype, {"vecmill": ours, **theirs}, items=len(texts)
    )
    lengths = [len(text) for text in texts]
    least = LEAST_COSINE[subject.target.dtype]
    return {
        "package": package,
        "texts": len(texts),
        "tokens": sum(lengths),
        "lengths": {
            "median": float(np.median(lengths)),
            "mean": significant(sum(lengths) / len(lengths)),
            "max": max(lengths),
        },
        "padded_tokens": {str(size): _padded_tokens(lengths, size) for size in BATCH_SIZES},
        "texts_per_s": {name: side["per_s"] for name, side in measured["sides"].items()},
        "of_matmul": {name: side["of_matmul"] for name, side in measured["sides"].items()},
        "ratio": measured["ratio"],
        "cosine": cosines,
        "least_cosine": least,
        "same": all(cosine["min"] >= least for cosine in cosines.values()),
        "other_cores": measured["other_cores"],
    }


def _encoder(subject: Subject, texts: Sequence[TokenIds]) -> tuple[str, Callable[[int], Callable[[], Tensor]]]:
    """The package with its version, and what encodes the texts in batches of a size."""
    import sentence_transformers  # here: where it is missing, only this stage fails

    model = sentence_transformers.SentenceTransformer(modules=[PaddedModel(subject)], device=str(subject.target.device))
    written = [_write(text) for text in texts]

    def encode(size: int) -> Tensor:
        vectors = model.encode(
            written, batch_size=size, show_progress_bar=False, convert_to_numpy=True, device=str(subject.target.device)
        )
        return torch.from_numpy(vectors)

    return f"sentence-transformers {sentence_transformers.__version__}", lambda size: partial(encode, size)


def _write(token_ids: TokenIds) -> str:
    """One character a token: the package sorts by characters."""
    return "".join(map(chr, token_ids.tolist()))


def _read(text: str) -> TokenIds:
    """The ids of a text that `_write` made, decoded in one step so that this does not slow the package down."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def _padded_tokens(lengths: Sequence[int], size: int) -> int:
    """The number of tokens computed when each batch is padded to its longest text."""
    longest_first = sorted(lengths, reverse=True)
    starts = range(0, len(lengths), size)
    return sum(longest_first[start] * len(longest_first[start : start + size]) for start in starts)
