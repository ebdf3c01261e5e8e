"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vecmill.tools.bench.mixed import MixedResult
from vecmill.tools.bench.results import Latency, Load, Outcomes
from vecmill.tools.bench.sweep import Sweep

BUSY_CLIENT = 0.8  # of a core: above it, the server waits for the load generator
SHORTEST_S = 1.0  # below it, opening connections is most of what the load generator did
LATENCIES = ("p50 ms", "p95 ms", "p99 ms", "max ms")

results = Console(markup=False, highlight=False, emoji=False)


def show_sweep(sweep: Sweep) -> None:
    """A row for each level."""
    table = _table(["conns", "requests", "texts/s", "MB/s", "tokens/s", *LATENCIES])
    for load in sweep.levels:
        requests = f"{load.outcomes.requests:,}"
        table.add_row(f"{load.connections}", requests, *_rates(load), *_latency(load.outcomes))
    results.print(table)


def show_mixed(found: MixedResult) -> None:
    """The person's latency and the bulk's throughput, each alone and beside the other."""
    person = _table(["requests", *LATENCIES], first="person")
    for name, one in (("alone", found.person_alone), ("beside bulk", found.person_beside_bulk)):
        person.add_row(name, f"{one.requests:,}", *_latency(one))
    results.print(person)
    results.print()
    bulk = _table(["requests", "texts/s", "MB/s", "tokens/s", "p50 ms", "p99 ms"], first="bulk")
    for name, load in (("alone", found.bulk_alone), ("beside person", found.bulk_beside_person)):
        p50, _, p99, _ = _latency(load.outcomes)
        bulk.add_row(name, f"{load.outcomes.requests:,}", *_rates(load), p50, p99)
    results.print(bulk)
    if (loss := found.bulk_loss_percent) is not None:
        results.print(f"\nThe person costs the bulk {loss:.1f} % of its texts/s.")


def show_remarks(outcomes: Mapping[str, Outcomes], loads: Sequence[Load]) -> None:
    """What went wrong where, and whether the load generator was what was measured."""
    remarks = [
        *(("waited", f"{name}: {_counts(one.retries)}", "yellow") for name, one in outcomes.items() if one.retries),
        *(("errors", f"{name}: {_counts(one.errors)}", "red") for name, one in outcomes.items() if one.errors),
        *(("error", one, "red") for one in dict.fromkeys(one.first_error for one in outcomes.values()) if one),
        *(("warning", one, "yellow") for one in warnings(loads)),
    ]
    if remarks:
        results.print()
    for kind, text, colour in remarks:
        results.print(f"{kind:<9} {text}", style=f"bold {colour}", soft_wrap=True)


def warnings(loads: Sequence[Load]) -> list[str]:
    """Sentences about loads in which the load generator itself was the bottleneck."""
    return [
        f"with {load.connections} connections the load generator itself used {load.client_cpu:.0%} of a core: the "
        f"server may be faster than this. Larger batches or another machine to measure from give its true speed."
        for load in loads
        if load.client_cpu > BUSY_CLIENT and load.seconds >= SHORTEST_S
    ]


def _table(columns: Sequence[str], first: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    if first is not None:
        table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rates(load: Load) -> tuple[str, str, str]:
    tokens = "-" if load.tokens_per_second is None else f"{load.tokens_per_second:,.0f}"
    return f"{load.texts_per_second:,.1f}", f"{load.megabytes_per_second:.3f}", tokens


def _latency(outcomes: Outcomes) -> tuple[str, str, str, str]:
    found: Latency | None = outcomes.latency_ms
    if found is None:
        return ("-",) * 4
    return _ms(found.p50), _ms(found.p95), _ms(found.p99), _ms(found.max)


def _ms(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _counts(by_status: dict[str, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in by_status.items())
