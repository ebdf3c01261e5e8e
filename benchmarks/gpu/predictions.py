"""What a forward pass should take on a card, from the card's rates and the model's shape, beside what was measured.

    python -m benchmarks.gpu.predictions    # the table in docs/gpu.md

A pass takes the longer of two times. The host's: kernels, times what it takes to launch one; a graph is launched whole.
The card's: the matrix products, or the read of their weights where that takes longer; what element-wise kernels read
and write; and for each kernel the least that one takes. Left out are what attention computes (with texts of a chunk's
length it is a hundredth of the products) and NV-Embed's latent attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.results import RESULTS
from benchmarks.models.shapes import BERT_BASE, NV_EMBED_V2, QWEN3_0_6B, QWEN3_4B, Shape

EAGER, COMPILED, GRAPH = "eager", "compiled", "graph"
WAYS = (EAGER, COMPILED, GRAPH)
MODES = {EAGER: "eager", COMPILED: "compiled", GRAPH: "graphs"}  # in the results
TOKENS = (16, 4096)
BYTES = 2  # of a value in bfloat16

# Microseconds. The hosts of the H100 and the H200 took 15 to 21 for a kernel of an eager layer; of a compiled one it is
# the call of the layer that costs, 37 to 56 for each of its kernels.
LAUNCH = {EAGER: 16.0, COMPILED: 40.0, GRAPH: 0.0}
# Microseconds that the smallest kernel takes on the card, with the gap before the next one, in a graph.
LEAST_KERNEL = 3.3
# Of the rate of a large square product, for the products of a model; of the copy rate, for element-wise kernels.
PRODUCTS, ELEMENT_WISE = 0.97, 0.7


@dataclass(frozen=True)
class CardRates:
    """What a card can do at most."""

    name: str
    matmul_tflops: float
    gb_per_s: float
    """Read, or read and written."""
    measured: bool
    """Its rates are; else they are assumed."""


CARDS = (
    CardRates("H100", 721.0, 3055.0, measured=True),
    CardRates("H200", 707.0, 4279.0, measured=True),
    # 75 % of the 125 TFLOP/s, and 80 % of the 273 GB/s that its data sheet names.
    CardRates("GB10", 94.0, 220.0, measured=False),
)


@dataclass(frozen=True)
class Layers:
    """The work in a model's layers, with projections merged if its family merges them."""

    layers: int
    parameters: int
    """Parameters of one layer's matrices."""
    kernels: Mapping[str, int]
    """Kernels of one layer, by the way it runs."""
    element_wise: Mapping[str, int]
    """Values that a layer's element-wise kernels and attention read and write for a token, by way."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices of all layers."""
        return BYTES * self.layers * self.parameters


def decoder(shape: Shape, *, norms_heads: bool) -> Layers:
    """Qwen3's layers, which norm each head of queries and keys, or Mistral's."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = shape.get("head_dim", hidden // shape["num_attention_heads"])
    query, key = (shape[name] * width for name in ("num_attention_heads", "num_key_value_heads"))
    normed = query + key if norms_heads else 0
    attention = 2 * query + 2 * key
    # An RMS norm is six kernels, in float32 for the most part; rotation four of both halves; then SwiGLU and residuals.
    eager = 18 * (2 * hidden + normed) + 10 * (query + key) + 6 * hidden + 5 * inner + attention
    fused = 8 * hidden + 2 * (query + key) + 3 * inner + attention
    kernels = {EAGER: 52, COMPILED: 12, GRAPH: 12} if norms_heads else {EAGER: 36, COMPILED: 12, GRAPH: 12}
    return Layers(
        shape["num_hidden_layers"],
        hidden * (2 * query + 2 * key) + 3 * hidden * inner,
        kernels,
        {EAGER: eager, COMPILED: fused, GRAPH: fused},
    )


def encoder(shape: Shape) -> Layers:
    """BERT's layers: norms and GELU are one kernel each even where they run as they are written."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    eager, fused = 14 * hidden + 2 * inner, 10 * hidden + 2 * inner
    return Layers(
        shape["num_hidden_layers"],
        4 * hidden**2 + 2 * hidden * inner,
        {EAGER: 13, COMPILED: 11, GRAPH: 11},
        {EAGER: eager, COMPILED: fused, GRAPH: fused},
    )


MODELS: Mapping[str, Layers] = {
    "Qwen3-Embedding-0.6B": decoder(QWEN3_0_6B, norms_heads=True),
    "Qwen3-Embedding-4B": decoder(QWEN3_4B, norms_heads=True),
    "BERT-base": encoder(BERT_BASE),
    "NV-Embed-v2": decoder(NV_EMBED_V2["text_config"], norms_heads=False),
}


@dataclass(frozen=True)
class Figure:
    """The time of one forward pass."""

    milliseconds: float
    of_matmul: float
    """Share of the rate of a large matrix product."""


def predict(card: CardRates, model: Layers, tokens: int, way: str) -> Figure:
    """The predicted time of a forward pass of so many tokens; see the module's docstring."""
    kernels = model.layers * model.kernels[way]
    host = kernels * LAUNCH[way] / 1e6
    alone = 2.0 * model.layers * model.parameters * tokens / (card.matmul_tflops * 1e12)
    bandwidth = card.gb_per_s * 1e9
    element_wise = BYTES * model.layers * model.element_wise[way] * tokens / (ELEMENT_WISE * bandwidth)
    on_card = max(alone / PRODUCTS, model.weight_bytes / bandwidth) + element_wise + kernels * LEAST_KERNEL / 1e6
    seconds = max(host, on_card)
    return Figure(1000 * seconds, alone / seconds)


def measured(results: Path = RESULTS) -> dict[tuple[str, str, int, str], Figure]:
    """The measured times by card, model, tokens and way, from the latest results that hold them."""
    figures: dict[tuple[str, str, int, str], Figure] = {}
    runs = [json.loads(path.read_text()) for path in results.glob("gpu-*.json")]
    for run in sorted(runs, key=lambda run: str(run["measured_at"])):
        card = next((card.name for card in CARDS if card.name in str((run.get("card") or {}).get("name"))), None)
        if card is not None:
            figures |= {(card, *key): figure for model in run["models"] for key, figure in _figures(model)}
    return figures


def _figures(model: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int, str], Figure]]:
    for way, mode in MODES.items():
        for each in model["modes"].get(mode, {}).get("forwards", ()):
            figure = Figure(each["ms"]["median"], each["of_matmul"]["median"])
            yield (model["name"], each["tokens"], way), figure


def table(results: Path = RESULTS) -> str:
    """Markdown: predicted and measured milliseconds, and from 1,024 tokens on the share of the matmul rate."""
    figures = measured(results)
    heads = [f"{card.name} {column}" for card in CARDS for column in ("predicted", "measured")]
    lines = [_line(["model", "tokens", "way", *heads]), _line(["---"] * (3 + len(heads)))]
    for name, model in MODELS.items():
        for tokens in TOKENS:
            for way in WAYS:
                cells = [name, f"{tokens:,}", way]
                for card in CARDS:
                    seen = figures.get((card.name, name, tokens, way))
                    cells.append(_shown(predict(card, model, tokens, way), tokens))
                    cells.append(_shown(seen, tokens) if seen else "not measured yet")
                lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(figure: Figure, tokens: int) -> str:
    milliseconds = f"{figure.milliseconds:.3g}" if figure.milliseconds < 100 else f"{figure.milliseconds:,.0f}"
    return f"{milliseconds} ms, {figure.of_matmul:.0%}" if tokens >= 1024 else f"{milliseconds} ms"


if __name__ == "__main__":
    print(table())
