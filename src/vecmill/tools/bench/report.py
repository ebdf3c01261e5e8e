"""Results for people: tables, remarks, and latency over throughput as bars in the terminal or as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from warnings import catch_warnings, simplefilter

from rich import box
from rich.bar import Bar
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table

from vecmill.tools.bench.load_generator import BulkLoad, Latency, Outcomes
from vecmill.tools.bench.scenarios import MixedResult, SweepResult
from vecmill.tools.bench.target import BenchError
from vecmill.tools.console import CommandError, printable, results

BUSY_CLIENT = 0.8  # of a core: above it, the server waits for the load generator
SHORTEST_S = 1.0  # below it, opening connections is most of what the load generator did
MILLION = 1e6  # from it on a figure is shortened, so that the table fits 80 columns
LATENCIES = ("p50 ms", "p95 ms", "p99 ms", "max ms")

BAR_WIDTH = 30  # characters; two bars and the number of connections fit 80 columns
NARROWEST_BAR = 4  # where the terminal has less room for them
BESIDE_BARS = 11  # columns: the number of connections, and what is between
EIGHTHS = 8  # of a character, that bars are drawn in
SHORTEST_BAR = 2  # of those eighths
LEAST = 1e-9  # of what is drawn: the whole length of a bar is divided by it

PICTURES = (".pdf", ".png", ".svg")
INCHES = (8, 5)


def show_sweep(sweep: SweepResult) -> None:
    """Print a row for each level, and bars below them where there are several levels."""
    table = _table(["conns", "requests", "texts/s", "MB/s", "tokens/s", *LATENCIES])
    for load in sweep.levels:
        requests = f"{load.outcomes.requests:,}"
        table.add_row(f"{load.connections}", requests, *_rates(load), *_latency(load.outcomes))
    _print_whole(table)
    points = _points(sweep.levels)
    if len(points) > 1 and not results.options.ascii_only:  # the bars are drawn with block characters
        results.print()
        _print_whole(_bars(points))


def show_mixed(mixed: MixedResult) -> None:
    """Print the person's latency and the bulk's throughput, each alone and beside the other."""
    person = _table(["requests", *LATENCIES], first="person")
    for name, outcomes in (("alone", mixed.person_alone), ("beside bulk", mixed.person_beside_bulk)):
        person.add_row(name, f"{outcomes.requests:,}", *_latency(outcomes))
    _print_whole(person)
    results.print()
    bulk = _table(["requests", "texts/s", "MB/s", "tokens/s", "p50 ms", "p99 ms"], first="bulk")
    for name, load in (("alone", mixed.bulk_alone), ("beside person", mixed.bulk_beside_person)):
        p50, _, p99, _ = _latency(load.outcomes)
        bulk.add_row(name, f"{load.outcomes.requests:,}", *_rates(load), p50, p99)
    _print_whole(bulk)
    if (loss := mixed.bulk_loss_percent) is not None:
        results.print(f"\nThe person costs the bulk {loss:.1f} % of its texts/s.")


def show_cached(outcomes_by_name: Mapping[str, Outcomes]) -> None:
    """Print how much of the work the server's cache did, of each load that had answers."""
    answered = {name: outcomes for name, outcomes in outcomes_by_name.items() if outcomes.latency_ms is not None}
    shares = {name: _share(outcomes.cached_share) for name, outcomes in answered.items()}
    if not shares:
        return
    same = len(set(shares.values())) == 1
    summary = next(iter(shares.values())) if same else ", ".join(f"{name} {share}" for name, share in shares.items())
    results.print(f"\ncached    {summary}", soft_wrap=True)


def _share(share: float | None) -> str:
    return "unknown: the server does not say" if share is None else f"{share:.1%} of the tokens"


def show_remarks(outcomes_by_name: Mapping[str, Outcomes], loads: Sequence[BulkLoad]) -> None:
    """Print waits and errors, and a warning where the load generator was the bottleneck."""
    named = outcomes_by_name.items()
    first_errors = dict.fromkeys(outcomes.first_error for _, outcomes in named if outcomes.first_error)
    remarks = [
        *(("waited", f"{name}: {_counts(outcomes.retries)}", "yellow") for name, outcomes in named if outcomes.retries),
        *(("errors", f"{name}: {_counts(outcomes.errors)}", "red") for name, outcomes in named if outcomes.errors),
        *(("error", error, "red") for error in first_errors),
        *(("warning", warning, "yellow") for warning in warnings(loads)),
    ]
    if remarks:
        results.print()
    for kind, text, colour in remarks:
        line = printable(text).replace("\n", "\\n")  # a server's error stays one line
        results.print(f"{kind:<9} {line}", style=f"bold {colour}", soft_wrap=True)


def warnings(loads: Sequence[BulkLoad]) -> list[str]:
    """Sentences about loads in which the load generator itself was the bottleneck."""
    return [
        f"with {load.connections} connections the load generator itself used {load.client_cpu:.0%} of a core: the "
        f"server may be faster than this. Larger batches or another machine to measure from give its true speed."
        for load in loads
        if load.client_cpu > BUSY_CLIENT and load.seconds >= SHORTEST_S
    ]


def _print_whole(table: Table) -> None:
    """The table with every figure in it, however narrow the terminal is, or wide a figure."""
    unlimited = results.options.update(width=10_000)
    width = max(results.width, Measurement.get(results, unlimited, table).maximum)
    # Rendered first: a console gives what it prints no more than its own width.
    results.print(Segments(list(results.render(table, results.options.update(width=width)))), crop=False, end="")


def _table(columns: Sequence[str], first: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    if first is not None:
        table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rates(load: BulkLoad) -> tuple[str, str, str]:
    tokens = "-" if load.tokens_per_second is None else _short(load.tokens_per_second, 0)
    return _short(load.texts_per_second, 1), _short(load.megabytes_per_second, 3), tokens


def _latency(outcomes: Outcomes) -> tuple[str, str, str, str]:
    latency: Latency | None = outcomes.latency_ms
    if latency is None:
        return ("-",) * 4
    return _ms(latency.p50), _ms(latency.p95), _ms(latency.p99), _ms(latency.max)


def _ms(value: float) -> str:
    return _short(value, 1 if value < 1000 else 0)


def _short(value: float, decimals: int) -> str:
    if value < MILLION:
        return f"{value:,.{decimals}f}"
    return f"{value / MILLION:.4g}M" if value < 1000 * MILLION else f"{value:.1e}"


def _counts(by_status: dict[str, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in by_status.items())


@dataclass(frozen=True, slots=True)
class _Point:
    connections: int
    throughput: float
    p50: float
    p99: float


def _points(loads: Sequence[BulkLoad]) -> list[_Point]:
    """The loads that have answers, in order of connections."""
    return [
        _Point(load.connections, load.texts_per_second, latency.p50, latency.p99)
        for load in sorted(loads, key=lambda load: load.connections)
        if (latency := load.outcomes.latency_ms) is not None
    ]


def _bars(points: Sequence[_Point]) -> Table:
    """A row for each level: its throughput, and the span from p50 to p99; no bar is too short to be seen."""
    fastest = max(LEAST, *(point.throughput for point in points))
    slowest = max(LEAST, *(point.p99 for point in points))
    width = max(NARROWEST_BAR, min(BAR_WIDTH, (results.width - BESIDE_BARS) // 2))
    shortest = SHORTEST_BAR / (EIGHTHS * width)  # of the longest
    table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("conns", justify="right", no_wrap=True)
    for heading in (f"texts/s, 0 to {_short(fastest, 0)}", f"p50 to p99, 0 to {_ms(slowest)} ms"):
        table.add_column(heading, width=width, overflow="fold")
    for point in points:
        begin = max(0.0, min(point.p50, point.p99 - slowest * shortest))
        end = max(point.p99, slowest * shortest)
        table.add_row(
            f"{point.connections}",
            Bar(fastest, 0, max(point.throughput, fastest * shortest), width=width, color="cyan"),
            Bar(slowest, begin, end, width=width, color="yellow"),
        )
    return table


def require_picture(path: Path) -> None:
    """Say before the measurement what would keep its picture from being written.

    Raises:
        BenchError: there is no such folder, no such kind of picture, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURES:
        raise BenchError(f"--plot {path}: the name must end in one of {', '.join(PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {path.absolute().parent}.")
    if find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'vecmill[plot]'.")


def write_picture(loads: Sequence[BulkLoad], title: str, path: Path) -> None:
    """Latency over throughput as a picture, of the kind that the path's ending says.

    Raises:
        CommandError: it cannot be drawn or written.
    """
    try:
        with catch_warnings():
            simplefilter("ignore")  # letters that the font has not, and the like
            _draw(loads, title, path)
    except Exception as error:  # whatever a library does: the figures are measured, and shown already
        why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        raise CommandError(f"--plot {path} cannot be written: {why}.") from error


def _draw(loads: Sequence[BulkLoad], title: str, path: Path) -> None:
    from matplotlib.figure import Figure  # an extra, and half a second to import

    points = _points(loads)
    throughputs = [point.throughput for point in points]
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.plot(throughputs, [point.p99 for point in points], marker="o", label="p99")
    axes.plot(throughputs, [point.p50 for point in points], marker="o", label="p50")
    for point in points:
        axes.annotate(
            f"{point.connections}",
            (point.throughput, point.p99),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="texts/s", ylabel="latency, ms")
    axes.set_title(title, parse_math=False)  # a `$` in an address is no formula
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="at each number\nof connections")
    figure.savefig(path)
