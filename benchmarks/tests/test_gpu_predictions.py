"""What a pass should take on a card: the model behind it, and the table in docs/gpu.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.predictions import (
    CARDS,
    COMPILED,
    EAGER,
    GRAPH,
    MODELS,
    TOKENS,
    WAYS,
    CardRates,
    Figure,
    Layers,
    measured,
    predict,
    table,
)

DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"
# 1 TFLOP/s and 1 TB/s: a layer of a million parameters takes 2 us a token, or 2 us for the read of its weights.
ROUND = CardRates("round", 1.0, 1000.0, measured=False)


def layers(kernels: int = 0, element_wise: int = 0) -> Layers:
    return Layers(10, 1_000_000, dict.fromkeys(WAYS, kernels), dict.fromkeys(WAYS, element_wise))


def test_the_table_in_the_docs_is_what_is_computed() -> None:
    assert table() in DOCS.read_text()


def test_bulk_is_bound_by_the_products() -> None:
    prediction = predict(ROUND, layers(), 1000, GRAPH)

    assert prediction.milliseconds == pytest.approx(20 / 0.97)
    assert prediction.of_matmul == pytest.approx(0.97)


def test_a_query_is_bound_by_the_read_of_the_weights() -> None:
    assert predict(ROUND, layers(), 1, GRAPH).milliseconds == pytest.approx(0.020 / 0.97)
    fast = CardRates("fast", 1000.0, 1000.0, measured=False)
    assert predict(fast, layers(), 1, GRAPH).milliseconds == pytest.approx(0.020)


def test_a_graph_is_not_launched_kernel_by_kernel() -> None:
    """100 kernels: 1.6 ms to launch them eagerly, and 0.33 ms on the card at least."""
    fast = CardRates("fast", 1000.0, 1000.0, measured=False)

    assert predict(fast, layers(kernels=10), 1, EAGER).milliseconds == pytest.approx(1.6)
    assert predict(fast, layers(kernels=10), 1, COMPILED).milliseconds == pytest.approx(4.0)
    assert predict(fast, layers(kernels=10), 1, GRAPH).milliseconds == pytest.approx(0.33 + 0.020)


def test_element_wise_kernels_take_the_time_of_their_bytes() -> None:
    with_them, without = (predict(ROUND, layers(element_wise=each), 1000, GRAPH) for each in (7000, 0))

    assert with_them.milliseconds - without.milliseconds == pytest.approx(2 * 10 * 7000 * 1000 / 0.7e12 * 1000)


def test_the_models_have_as_many_parameters_as_were_measured() -> None:
    """`weight_gb` in the results is what a pass reads."""
    weights = {name: model.weight_bytes / 1e9 for name, model in MODELS.items()}

    assert weights["Qwen3-Embedding-0.6B"] == pytest.approx(0.88080384)
    assert weights["Qwen3-Embedding-4B"] == pytest.approx(7.26663168)


@pytest.mark.parametrize("card", [card for card in CARDS if card.measured], ids=lambda card: card.name)
def test_the_prediction_is_near_what_was_measured(card: CardRates) -> None:
    """Within half as long again, of models whose projections were merged or whose host was not the bound."""
    figures = {key[1:]: figure for key, figure in measured().items() if key[0] == card.name}
    ratios = {
        (name, tokens, way): figure.milliseconds / predict(card, MODELS[name], tokens, way).milliseconds
        for (name, tokens, way), figure in figures.items()
        if tokens in TOKENS
    }

    assert len(ratios) >= 4
    assert all(0.66 < ratio < 1.5 for ratio in ratios.values()), ratios


def test_the_latest_result_of_a_card_is_shown(tmp_path: Path) -> None:
    def write(name: str, measured_at: str, card: str, milliseconds: float) -> None:
        forwards = [{"tokens": 16, "ms": {"median": milliseconds}, "of_matmul": {"median": 0.5}}]
        model = {"name": "BERT-base", "modes": {"graphs": {"forwards": forwards}}}
        run = {"measured_at": measured_at, "card": {"name": card}, "models": [model]}
        (tmp_path / name).write_text(json.dumps(run))

    write("gpu-b.json", "2026-01-02T00:00:00+00:00", "NVIDIA GB10", 2.0)
    write("gpu-a.json", "2026-01-01T00:00:00+00:00", "NVIDIA GB10", 3.0)
    write("gpu-c.json", "2026-01-01T00:00:00+00:00", "another card", 4.0)

    assert measured(tmp_path) == {("GB10", "BERT-base", 16, GRAPH): Figure(2.0, 0.5)}
    (row,) = (line for line in table(tmp_path).splitlines() if line.startswith("| BERT-base | 16 | graph"))
    assert row.endswith("| 2 ms |")
    assert "not measured yet" in row
