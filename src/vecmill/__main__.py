"""The command line: `vecmill serve`, `models`, `pull`, `verify`, `bench`, `embed`, `doctor`, `status`, `top`,
`proxy-config` and `keys new`.

Each command's own module is imported when that command runs: none waits for what another needs, nor fails where that is
broken.
"""

from __future__ import annotations

import gc
import inspect
import sys
from functools import partial
from importlib import import_module
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from vecmill import __version__
from vecmill.config import load_settings, misspelt
from vecmill.config.key_file import key_line
from vecmill.config.reference import default_text
from vecmill.config.settings import GROUPS
from vecmill.core.errors import StartupError
from vecmill.core.types import KeyLimits
from vecmill.tools.console import UsageError, print_error

TOOLS = {
    "models": "models",
    "bench": "bench.command",
    "embed": "embed.command",
    "doctor": "doctor.command",
    "status": "status",
    "top": "status",
    "proxy-config": "proxy_config.command",
}
"""Commands beside the server, and the module of `tools` that has the function of that name."""


class Commands(TyperGroup):
    """The commands of this module, and the tools, whose modules are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        own = super().list_commands(ctx)
        groups = [name for name in own if isinstance(self.commands[name], TyperGroup)]
        return [*(name for name in own if name not in groups), *TOOLS, *groups]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; None where there is none."""
        if cmd_name not in TOOLS:
            return super().get_command(ctx, cmd_name)
        function = getattr(import_module(f"vecmill.tools.{TOOLS[cmd_name]}"), cmd_name.replace("-", "_"))
        tool = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        tool.command(cmd_name)(function)
        return typer.main.get_command(tool)


keys = typer.Typer(no_args_is_help=True, help="The API keys of a server.")
cli = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},  # of the commands below it too
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@cli.callback()
def vecmill(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Embeddings and reranking from one device, for every client that asks."""


@cli.command("version")
def print_version() -> None:
    """Print the version."""
    _print_version(True)


@cli.command()
def pull(
    model: Annotated[str, typer.Argument(help="A hub id, `owner/name`; with --convert-pickle also a folder.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag, commit or `refs/pr/N`. Default: the default branch.")
    ] = None,
    convert_pickle: Annotated[
        bool,
        typer.Option(
            "--convert-pickle",
            help="Where the weights are pickles only, make safetensors of them once, in a process that has no network.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress for programs, an object a line; without --convert-pickle.")
    ] = False,
) -> None:
    """Fetch a model from the hub: its size, memory and licence first, then the files, then a check of their sizes."""
    module = import_module("vecmill.tools.pull")
    if as_json:
        raise typer.Exit(module.run_pull_as_json(model, revision))
    raise typer.Exit(module.run_pull(model, revision, convert_pickle=convert_pickle))


@cli.command()
def verify(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or `auto`.")],
    rerank: Annotated[
        bool, typer.Option("--rerank", help="With `auto`: the reranker, not the embedding model.")
    ] = False,
    example: Annotated[str | None, typer.Option(help="The example to run, by its model's name; for folders.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As for `serve`.")] = None,
    device: Annotated[str | None, typer.Option(help="As for `serve`.")] = None,
) -> None:
    """Compare the loaded weights with numbers published of the model, or with sentence-transformers."""
    run_verify = import_module("vecmill.tools.verify").run_verify
    raise typer.Exit(run_verify(model, rerank=rerank, example=example, dtype=dtype, device=device))


@keys.command("new")
def new_key(
    name: Annotated[
        str | None, typer.Argument(help="Whose it is, for the log and for who owns jobs, files and batches.")
    ] = None,
    scopes: Annotated[str, typer.Option(help="`use`, `admin` or `use+admin`.")] = "use",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests in progress, at the most.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in progress, at the most.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Open jobs, at the most.")] = None,
) -> None:
    """Print a fresh key, and below it the line for API_KEY_FILE, which takes effect on SIGHUP."""
    try:
        key, line = key_line(name, scopes, KeyLimits(requests, tokens, jobs))
    except ValueError as error:
        print_error(f"this {error}.")
        raise typer.Exit(UsageError.exit_code) from None
    sys.stdout.write(f"{key}\n{line}\n")


EnvFile = Annotated[
    str | None,
    typer.Option("--env-file", help="File of settings to read in place of `.env`.", show_default=False),
]


def serve(*, env_file: str | None = None, **flags: object) -> None:
    """Run the server.

    Every flag is also an environment variable and a line of `.env` under the name in brackets. A flag wins over the
    environment, the environment over `.env`, and that over the default.

    SIGTERM: requests in progress are answered, new ones refused. SIGHUP: keys and aliases are read again.
    """
    gc.disable()  # until the first model is loaded: next to nothing of what is imported is garbage
    reread = partial(load_settings, flags, env_file)
    try:
        settings = reread()
    except StartupError as error:
        print_error(error.message)
        raise typer.Exit(UsageError.exit_code) from None
    raise typer.Exit(import_module("vecmill.serve").run_server(settings, reread, misspelt(env_file)))


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    """One setting as a flag. Left out it is None, so that environment, `.env` and default have their say."""
    shown = default_text(field.default)
    kind, words = _flag_type(field)
    option = typer.Option(
        *words(name),
        help=f"{field.description} [{name.upper()}{f'; default {shown}' if shown else ''}]".replace("[", "\\["),
        rich_help_panel=panel,
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag_type(field: FieldInfo) -> tuple[type, Any]:
    if field.annotation is bool:
        return bool, lambda name: (f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}",)
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (int, float)]
    return (kinds[0] if kinds else str), lambda name: (f"--{name.replace('_', '-')}",)


def _with_flags() -> Any:
    """`serve` with a flag for each setting, so that no setting is written down twice."""
    parameters = [
        _flag(name, field, f"{group.title}: {(group.__doc__ or '').strip()}")
        for group in GROUPS
        for name, field in group.model_fields.items()
    ]
    parameters.insert(
        0, inspect.Parameter("env_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=EnvFile)
    )
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return serve


cli.command()(_with_flags())
cli.add_typer(keys, name="keys")


def main() -> None:
    """The entry point of the `vecmill` script."""
    cli()


if __name__ == "__main__":
    main()
