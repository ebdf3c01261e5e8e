"""`vecmill bench` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.measurement import run_bench
from vecmill.tools.bench.mixed import QUERY_INTERVAL_S
from vecmill.tools.bench.options import BATCH, Options, levels_of
from vecmill.tools.bench.progress import said
from vecmill.tools.bench.target import Dialect, Encoding, Target
from vecmill.tools.bench.workload import LONGEST


def bench(
    url: Annotated[str, typer.Argument(help="The server, like `http://127.0.0.1:8080`.")],
    dialect: Annotated[
        Dialect,
        typer.Option(help="openai: /v1/embeddings; infinity: /embeddings; tei: /embed; rerank: /v1/rerank."),
    ] = Dialect.OPENAI,
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
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before the clock starts.")] = 1.0,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="A person's queries alone, bulk alone, and both together.")
    ] = False,
    query_interval: Annotated[
        float, typer.Option(min=0.001, help="Seconds between the person's queries.")
    ] = QUERY_INTERVAL_S,
    plot: Annotated[
        Path | None, typer.Option(help="Write latency over throughput to a .png, .svg or .pdf file, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of table and plot.")] = False,
) -> None:
    """Measure a server's throughput and latency: vecmill's or another's, over HTTP.

    Latencies count the waits that the server asks for with 429 or 503 and Retry-After. Exit code 0: every request was
    answered; 1: some were not; 2: nothing could be measured.
    """
    try:
        levels = None if connections is None else levels_of(connections)
    except BenchError as error:
        said.print(f"vecmill: {error}", style="bold red")
        raise typer.Exit(error.exit_code) from None
    options = Options(
        Target(url, dialect, model, api_key, encoding_format),
        folder=folder,
        texts=texts,
        longest=longest,
        batch=batch,
        connections=levels,
        seconds=seconds,
        warm_up_seconds=warm_up,
        mixed=mixed,
        query_interval=query_interval,
        plot=plot,
        json=json,
    )
    raise typer.Exit(run_bench(options))
