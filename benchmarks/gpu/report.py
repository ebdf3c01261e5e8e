"""What the GPU benchmark found, for people: a table for each model, and the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

LEAST_OF_MATMUL = 0.6
LEAST_RATIO = 3.0


def targets(models: Sequence[Mapping[str, Any]], first: str, busy_tokens: int) -> list[dict[str, Any]]:
    """One entry per target: the least value wanted and the value measured, None if it was not measured."""
    of_matmul = next((_worst_share(model, busy_tokens) for model in models if model["name"] == first), None)
    results = [_target(f"{first}: share of the matmul rate from {busy_tokens} tokens on", LEAST_OF_MATMUL, of_matmul)]
    for model in models:
        compared = model["against"]
        ratio = min(each["median"] for each in compared["ratio"].values()) if compared else None
        results.append(_target(f"{model['name']}: times as fast as sentence-transformers", LEAST_RATIO, ratio))
    return results


def _worst_share(model: Mapping[str, Any], busy_tokens: int) -> float | None:
    """The least share of the matmul rate in the mode that the server would choose; None if that was not measured."""
    mode = model["modes"].get(model["chosen"])
    if mode is None:
        return None
    return min(float(each["of_matmul"]["median"]) for each in mode["forwards"] if each["tokens"] >= busy_tokens)


def _target(name: str, wanted: float, value: float | None) -> dict[str, Any]:
    return {"target": name, "wanted": wanted, "found": value, "met": None if value is None else value >= wanted}


def bits_targets(proofs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per model that ran with DETERMINISTIC=true."""
    name = "share of answers with the same bits in every batch, DETERMINISTIC=true"
    return [_target(f"{model}: {name}", 1.0, found["bits"]["kept"]) for model, found in proofs.items()]


def print_machine(console: Console, result: Mapping[str, Any]) -> None:
    """The card and its rates."""
    for name, value in (result["card"] or {}).items():
        console.print(f"  {name}: {value}")
    if rates := result["rates"]:
        console.print(
            f"Large matmul in {result['dtype']}: {_range(rates['matmul_tflops'])} TFLOP/s; "
            f"copy {_range(rates['copy_gb_per_s'])} GB/s read and written; read {_range(rates['read_gb_per_s'])} GB/s",
            soft_wrap=True,
        )


def print_model(console: Console, model: Mapping[str, Any]) -> None:
    """One model's forward passes, its query, and the comparison."""
    console.print()
    console.print(
        f"{model['name']}: {model['weight_gb'] or 0:.2f} GB of matrices, {model['dtype']}; {_compile_line(model)}",
        style="bold",
        soft_wrap=True,
    )
    if model["modes"]:
        _print_forwards(console, model["modes"])
    for tokens, side in (model["matrix_products"] or {}).items():
        console.print(
            f"  its matrix products alone, {tokens} tokens: {_range(side['ms'])} ms, {side['tflops']:.4g} TFLOP/s, "
            f"{side['of_matmul']['median']:.0%} of the large matmul, weights at {side['weights_gb_per_s']:,.4g} GB/s",
            soft_wrap=True,
        )
    for mode, result in model["modes"].items():
        _print_query_and_fit(console, mode, result)
    if model["against"]:
        _print_comparison(console, model["against"])


def _compile_line(model: Mapping[str, Any]) -> str:
    return str(model["compile"]["reason"]) if model["compile"] else "not compiled"


def _print_forwards(console: Console, modes: Mapping[str, Any]) -> None:
    table = Table(box=SIMPLE)
    table.add_column("tokens", justify="right")
    for mode in modes:
        for heading in (f"{mode} ms", "min to max", "tokens/s", "of matmul"):
            table.add_column(heading, justify="right")
    for same in zip(*(result["forwards"] for result in modes.values()), strict=True):
        cells = [
            cell
            for each in same
            for cell in (
                f"{each['ms']['median']:.4g}",
                f"{each['ms']['min']:.4g} to {each['ms']['max']:.4g}",
                f"{each['tokens_per_s']:,.0f}",
                f"{each['of_matmul']['median']:.1%}",
            )
        ]
        table.add_row(str(same[0]["tokens"]), *cells)
    console.print(table)


def _print_query_and_fit(console: Console, mode: str, result: Mapping[str, Any]) -> None:
    query, fit = result["query"], result["fit"]
    console.print(
        f"  {mode}: one query {_range(query['ms'])} ms ({query['packed_anew_ms']['median']:.4g} with its packing), "
        f"{query['times_read_limit']:.3g} times the {query['read_limit_ms']:.4g} ms in which its weights are read, "
        f"{query['times_copy_limit']:.3g} times the {query['copy_limit_ms']:.4g} ms at the copy rate",
        soft_wrap=True,
    )
    console.print(
        f"  {mode}: {fit['fixed_ms']:.4g} ms + {fit['us_per_token']:.4g} µs a token, knee {fit['knee_tokens']} tokens, "
        f"{fit['budget_tokens']} tokens for MAX_BATCH_MS={fit['max_batch_ms']:.0f}",
        soft_wrap=True,
    )


def _print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    same = "the same vectors" if comparison["same"] else "NOT THE SAME VECTORS"
    lengths = comparison["lengths"]
    console.print(
        f"  {comparison['texts']} texts of {lengths['median']:.0f} tokens (median; mean {lengths['mean']:.0f}, longest "
        f"{lengths['max']}) in packs of {comparison['budget_tokens']}, against {comparison['package']}: {same}",
        soft_wrap=True,
    )
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("texts/s", "min to max", "vecmill faster by", "of matmul", "least cosine"):
        table.add_column(heading, justify="right")
    for name, rate in comparison["texts_per_s"].items():
        table.add_row(
            name,
            f"{rate['median']:,.4g}",
            f"{rate['min']:,.4g} to {rate['max']:,.4g}",
            _range(comparison["ratio"][name]) if name in comparison["ratio"] else "",
            f"{comparison['of_matmul'][name]['median']:.1%}",
            f"{comparison['cosine'][name]['min']:.6f}" if name in comparison["cosine"] else "",
        )
    console.print(table)


def print_lanes(console: Console, lanes: Mapping[str, Any]) -> None:
    """Bulk and a person's queries, with a stream for each lane and without."""
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("bulk alone tokens/s", "beside a person", "a query p50 ms", "p95"):
        table.add_column(heading, justify="right")
    for way, side in lanes["ways"].items():
        rates = (side["bulk_alone_tokens_per_s"], side["bulk_beside_a_person_tokens_per_s"])
        cells = [f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})" for rate in rates]
        table.add_row(way, *cells, *(f"{milliseconds:.4g}" for milliseconds in side["query_ms"].values()))
    console.print(table)
    costs = (lanes["cost_alone"], lanes["cost_beside_a_person"])
    alone, beside = (f"{cost['median']:.1%} ({cost['min']:.1%} to {cost['max']:.1%})" for cost in costs)
    console.print(f"  A stream for each lane costs bulk {alone} alone, {beside} beside a person.", soft_wrap=True)


def print_determinism(console: Console, proofs: Mapping[str, Any]) -> None:
    """With DETERMINISTIC=true, and without: a row for each model."""
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("answers", "other bits", "rows/s", "packed", "rate kept", "least cosine packed", "other top ten"):
        table.add_column(heading, justify="right")
    for name, found in proofs.items():
        counts = (sum(found["bits"][key].values()) for key in ("answers", "other_bits"))
        sides = (found[side]["rows_per_s"]["median"] for side in ("deterministic", "packed") if side in found)
        cells = [*(f"{count:,}" for count in counts), *(f"{rate:,.4g}" for rate in sides)]
        if moved := found.get("moved"):
            cells += [f"{found['rate_kept']:.1%}", f"1 - {moved['one_minus_cosine']:.2g}"]
            cells.append(f"{moved['other_top_ten']} of {moved['queries']}")
        table.add_row(name, *cells)
    console.print(table)


def print_targets(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """One line per target: met, not met or not measured."""
    console.print()
    for each in results:
        verdict = {True: "met", False: "NOT MET", None: "NOT MEASURED"}[each["met"]]
        value = "-" if each["found"] is None else f"{each['found']:.3g}"
        console.print(f"{each['target']}: {value}, at least {each['wanted']:g} is wanted: {verdict}", soft_wrap=True)


def print_stages(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """Each one's seconds, memory and clocks; and last what was left out or failed."""
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("seconds", "peak memory GB", "SM MHz", "watts", "°C"):
        table.add_column(heading, justify="right")
    for record in records:
        if record["status"] == "done":
            clocks = [_median(record["card"], reading) for reading in ("sm_mhz", "watts", "celsius")]
            table.add_row(record["stage"], f"{record['seconds']:.1f}", str(record["peak_memory_gb"] or ""), *clocks)
    console.print(table)
    for record in records:
        if record["status"] != "done":
            console.print(f"{record['status'].upper()}: {record['stage']}: {record['reason']}", soft_wrap=True)


def _median(card: Mapping[str, Any], reading: str) -> str:
    return f"{card[reading]['median']:.0f}" if reading in card else ""


def _range(values: Mapping[str, Any]) -> str:
    return f"{values['median']:.4g} ({values['min']:.4g} to {values['max']:.4g})"
