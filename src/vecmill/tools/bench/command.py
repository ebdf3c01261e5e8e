"""`vecmill bench`: from the command line to the exit code."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from vecmill.tools.bench.load_generator import BulkLoad, Outcomes
from vecmill.tools.bench.progress import StageBars
from vecmill.tools.bench.report import (
    require_picture,
    show_cached,
    show_mixed,
    show_remarks,
    show_sweep,
    warnings,
    write_picture,
)
from vecmill.tools.bench.scenarios import (
    CONNECTIONS,
    QUERY_INTERVAL_S,
    SECONDS,
    WARM_UP_S,
    level_name,
    measure_mixed,
    measure_sweep,
)
from vecmill.tools.bench.target import BenchError, BenchTarget, Encoding, TargetApi
from vecmill.tools.bench.workload import LONGEST, Workload, read_workload
from vecmill.tools.console import INTERRUPTED, CommandError, messages, print_error, results

LEVELS = (1, 2, 4, 8, 16)
BATCH = 32
DIFFERENT_TEXTS = 2000  # where the time, not the number of texts, ends a level; after them each is sent changed


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """A measurement; see the help of `vecmill bench`."""

    target: BenchTarget
    folder: Path | None
    texts: int | None
    longest: int
    batch: int
    connections: tuple[int, ...] | None
    seconds: float | None
    warm_up_seconds: float
    mixed: bool
    query_interval: float
    plot: Path | None
    json: bool

    def check(self) -> None:
        """Say which options do not go together, or cannot be met.

        Raises:
            BenchError: some do not.
        """
        if self.texts is not None and self.seconds is not None:
            raise BenchError("--texts and --seconds each say when a level ends: give one of them.")
        if self.mixed:
            self._check_mixed()
        if self.plot is not None:
            require_picture(self.plot)

    def _check_mixed(self) -> None:
        if self.texts is not None:
            raise BenchError("--mixed measures for a time: give --seconds, not --texts.")
        if self.connections is not None and len(self.connections) > 1:
            raise BenchError("--mixed measures one bulk load: give one number of --connections.")
        if self.plot is not None:
            raise BenchError("--plot draws several levels of --connections, and --mixed has one.")

    @property
    def level_seconds(self) -> float | None:
        """None: a level ends with its texts."""
        return None if self.texts is not None else self.seconds or SECONDS


def bench(
    url: Annotated[str, typer.Argument(help="The server, like `http://127.0.0.1:8080`.")],
    dialect: Annotated[
        TargetApi,
        typer.Option(
            help="openai: /v1/embeddings; infinity: /embeddings; tei: /embed; ollama: /api/embed; rerank: /v1/rerank."
        ),
    ] = TargetApi.OPENAI,
    model: Annotated[str | None, typer.Option(help="The `model` of each request. Default: none is sent.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Sent as a bearer token.", envvar="API_KEY", show_default=False)
    ] = None,
    encoding_format: Annotated[Encoding, typer.Option(help="Of the vectors; openai and infinity.")] = Encoding.BASE64,
    folder: Annotated[
        Path | None,
        typer.Option(help="Send pieces of this folder's text files. Default: Python's standard library."),
    ] = None,
    longest: Annotated[int, typer.Option(min=1, help="Characters of a text, at the most.")] = LONGEST,
    batch: Annotated[int, typer.Option(min=1, help="Texts per request.")] = BATCH,
    connections: Annotated[
        str | None,
        typer.Option(help="Each a level, a point of the plot. \\[default: 1,2,4,8,16; with --mixed 4]"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="How long each level, or part of --mixed, takes. \\[default: 10]")
    ] = None,
    texts: Annotated[
        int | None, typer.Option(min=1, help="End each level after so many texts, not after a time.")
    ] = None,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before the clock starts.")] = WARM_UP_S,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached",
            help="Measure the server's cache: the same texts again and again, and leave to answer from it. Default: no "
            "text is sent twice, with `Cache-Control: no-store`.",
        ),
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="A person's queries alone, bulk alone, and both together.")
    ] = False,
    query_interval: Annotated[
        float, typer.Option(min=0.001, help="Seconds between the person's queries.")
    ] = QUERY_INTERVAL_S,
    plot: Annotated[
        Path | None, typer.Option(help="Write latency over throughput to a .png, .svg or .pdf file, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
) -> None:
    """Measure a server's throughput and latency: vecmill's or another's, over HTTP.

    Latencies count the waits that the server asks for with 429 or 503 and Retry-After. Exit code 0: every request was
    answered; 1: some were not; 2: nothing could be measured.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding has no letters for
    try:
        options = BenchOptions(
            BenchTarget(url, dialect, model, api_key, encoding_format, cached),
            folder=folder,
            texts=texts,
            longest=longest,
            batch=batch,
            connections=None if connections is None else _levels(connections),
            seconds=seconds,
            warm_up_seconds=warm_up,
            mixed=mixed,
            query_interval=query_interval,
            plot=plot,
            json=json,
        )
        options.check()
        workload = read_workload(options.folder, options.texts or DIFFERENT_TEXTS, options.longest)
        all_outcomes = (_run_mixed if options.mixed else _run_sweep)(options, workload)
    except CommandError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        messages.print("vecmill: stopped.")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(1 if any(outcomes.errors for outcomes in all_outcomes) else 0)


def _levels(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers.

    Raises:
        BenchError: it is something else.
    """
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise BenchError(f"--connections {text}: expected numbers of 1 or more with commas between them, like 1,4,16.")
    return levels


def _run_sweep(options: BenchOptions, workload: Workload) -> list[Outcomes]:
    with StageBars() as progress:
        sweep = measure_sweep(
            options.target,
            workload.texts,
            batch=options.batch,
            levels=options.connections or LEVELS,
            seconds=options.level_seconds,
            longest=options.longest,
            repeat=options.target.cached,
            warm_up_seconds=options.warm_up_seconds,
            progress=progress,
        )
    outcomes = {level_name(load.connections): load.outcomes for load in sweep.levels}
    facts = _facts(options, workload, sweep.dimensions)
    if options.json:
        _print_json(facts, {"levels": [asdict(load) for load in sweep.levels]}, sweep.levels)
    else:
        _show_facts(facts)
        show_sweep(sweep)
        show_cached(outcomes)
        show_remarks(outcomes, sweep.levels)
    if options.plot is not None:
        write_picture(sweep.levels, f"{options.target.endpoint}, {options.batch} texts per request", options.plot)
    return [load.outcomes for load in sweep.levels]


def _run_mixed(options: BenchOptions, workload: Workload) -> list[Outcomes]:
    with StageBars() as progress:
        mixed = measure_mixed(
            options.target,
            workload.texts,
            batch=options.batch,
            connections=options.connections[0] if options.connections else CONNECTIONS,
            seconds=options.seconds or SECONDS,
            query_interval=options.query_interval,
            longest=options.longest,
            repeat=options.target.cached,
            warm_up_seconds=options.warm_up_seconds,
            progress=progress,
        )
    loads = [mixed.bulk_alone, mixed.bulk_beside_person]
    outcomes = {
        "the person alone": mixed.person_alone,
        "the person beside bulk": mixed.person_beside_bulk,
        "bulk alone": mixed.bulk_alone.outcomes,
        "bulk beside the person": mixed.bulk_beside_person.outcomes,
    }
    facts = _facts(options, workload, mixed.dimensions)
    if options.json:
        _print_json(facts, {**asdict(mixed), "bulk_loss_percent": mixed.bulk_loss_percent}, loads)
    else:
        _show_facts(facts)
        show_mixed(mixed)
        show_cached(outcomes)
        show_remarks(outcomes, loads)
    return list(outcomes.values())


def _facts(options: BenchOptions, workload: Workload, dimensions: int | None) -> dict[str, Any]:
    return {
        "url": options.target.endpoint,
        "dialect": options.target.dialect,
        "model": options.target.model,
        "dimensions": dimensions,
        "workload": {
            "source": workload.source,
            "texts": len(workload.texts),
            "mean_characters": round(sum(map(len, workload.texts)) / len(workload.texts)),
        },
        "batch": options.batch,
        "cached": options.target.cached,
    }


def _show_facts(facts: dict[str, Any]) -> None:
    workload, dimensions = facts["workload"], facts["dimensions"]
    answers = f"vectors of {dimensions} values" if dimensions else "scores"
    model = f", {facts['model']}" if facts["model"] else ""
    results.print(f"server    {facts['url']} ({facts['dialect']}{model}): {answers}", soft_wrap=True)
    again = "the same ones again and again" if facts["cached"] else "none of them twice, with Cache-Control: no-store"
    results.print(
        f"workload  {workload['texts']:,} texts of {workload['mean_characters']:,} characters on average "
        f"from {workload['source']}, {facts['batch']} per request, {again}\n",
        soft_wrap=True,
    )


def _print_json(facts: dict[str, Any], measured: dict[str, Any], loads: list[BulkLoad]) -> None:
    whole = {**facts, **measured, "warnings": warnings(loads)}
    sys.stdout.write(orjson.dumps(whole, option=orjson.OPT_INDENT_2).decode() + "\n")
    sys.stdout.flush()  # where the reader of a pipe has left, it is said here and not at the exit
