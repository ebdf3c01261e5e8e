"""`vecmill embed` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vecmill.tools.console import UsageError, print_error
from vecmill.tools.embed.outputs import OutputFile
from vecmill.tools.embed.requests import BATCH_FILE_BYTES
from vecmill.tools.embed.rows import TextSource
from vecmill.tools.embed.run import EmbedOptions, run_embed
from vecmill.tools.http_client import ANSWER_S, PATIENCE_S, ServerAddress


def embed(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A .jsonl, .csv, .tsv or .parquet file (all but the last also .gz), a folder of text files, "
            "or - for JSONL on stdin.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .parquet, .npy or .npz file.", show_default=False)],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8080",
    api_key: Annotated[
        str | None, typer.Option(help="Sent as a bearer token.", envvar="API_KEY", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the server's.")] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="Which field or column has the texts. Default: `text`, `content`, `input`, `body`, `document`, or the "
            "only one with strings."
        ),
    ] = None,
    id_field: Annotated[
        str | None, typer.Option(help="Which has the ids. Default: `id` if there is one, else they are row numbers.")
    ] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Of the vectors. Default: all.")] = None,
    input_type: Annotated[
        str | None,
        typer.Option(help="`query`, `passage`, ...: the texts get the model's prompt for it. Default: none."),
    ] = None,
    query: Annotated[bool, typer.Option("--query", help="The same as --input-type query.")] = False,
    prompt_name: Annotated[
        str | None, typer.Option(help="One of the model's prompts by name; /v1/models lists them.")
    ] = None,
    glob: Annotated[
        str | None, typer.Option(help="Of a folder, only these files: `*.txt,docs/*.md`. Default: all.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows without a text. Default: the first one ends it.")
    ] = False,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Write the texts too; Parquet only.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="Leave the batches' files on the server at the end.")
    ] = False,
    batch_file_bytes: Annotated[
        int, typer.Option(min=1024, help="Of a batch's file, at most; the server's limit is MAX_FILE_BYTES.")
    ] = BATCH_FILE_BYTES,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte from the server in a call.")
    ] = ANSWER_S,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is busy or being restarted.")
    ] = PATIENCE_S,
) -> None:
    """Embed the texts of a file or a folder through a server's batches API.

    The server works by itself: after an interruption on either side, the same command goes on where it was. Exit code
    0: all texts have a vector; 1: some have none, or the server was given up; 2: the options or the input are wrong;
    130: interrupted.
    """
    try:
        options = EmbedOptions(
            server=ServerAddress(url, api_key, timeout, patience),
            source=TextSource(source, field, id_field, _patterns(glob), skip_bad),
            output=OutputFile(output, overwrite, text),
            fields=request_fields(model, dimensions, "query" if query else None, input_type, prompt_name),
            batch_file_bytes=batch_file_bytes,
            keep=keep,
        )
    except UsageError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    raise typer.Exit(run_embed(options))


def _patterns(glob: str | None) -> tuple[str, ...]:
    return tuple(pattern.strip() for pattern in (glob or "").split(",") if pattern.strip())


def request_fields(
    model: str | None, dimensions: int | None, query: str | None, input_type: str | None, prompt_name: str | None
) -> dict[str, Any]:
    """What every request carries beside its text."""
    if sum(value is not None for value in (query, input_type, prompt_name)) > 1:
        raise UsageError("--query, --input-type and --prompt-name each say what the texts are: give one of them.")
    fields = {
        "model": model,
        "dimensions": dimensions,
        "input_type": query or input_type,
        "prompt_name": prompt_name,
    }
    return {name: value for name, value in fields.items() if value is not None}
