"""`vecmill pull`: fetching a model from the hub, shown to a person."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.models.checkpoint import Source, read
from vecmill.models.hub import Plan, Report, converted, converted_folder, fetch, plan, require_space
from vecmill.models.pickles import convert
from vecmill.models.rerank_prompt import check_form
from vecmill.models.weight_files import list_folder
from vecmill.tools.console import INTERRUPTED, messages, print_error, results

LINE_EVERY = 10  # percent between lines of progress where there is no terminal


def run_pull_as_json(model: str, revision: str | None = None) -> int:
    """As `run_pull`, for programs: one JSON object a line on stdout, each with some of `fetched` and `size` (bytes),
    `files` (complete), and in the last one `folder` and `revision`, or `error`.
    """
    shown = -1
    try:
        secret = load_settings().model.hf_token
        token = secret.get_secret_value() if secret else None
        _check_id(model)
        fetch_plan = plan(model, hf_token=token, revision=revision)
        require_space(fetch_plan)
        size = max(fetch_plan.missing_size, 1)

        def report(fetched: int, complete: int) -> None:
            nonlocal shown
            if (permille := 1000 * fetched // size) > shown:
                shown = permille
                _tell(fetched=fetched, size=size, files=complete)

        folder = fetch(fetch_plan, hf_token=token, revision=revision, report=report)
    except StartupError as error:
        _tell(error=error.message)
        return 1
    _tell(fetched=size, size=size, folder=str(folder), revision=fetch_plan.commit)
    return 0


def _tell(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def run_pull(model: str, revision: str | None = None, *, convert_pickle: bool = False) -> int:
    """Fetch a model into the hub's cache; the process's exit code: 0, 1 refused or failed, 2 bad settings, 130 ^C.

    `convert_pickle`: where its weights are pickled only, write them as safetensors into a folder beside that cache.
    """
    try:
        secret = load_settings().model.hf_token
    except StartupError as error:
        return _fail(error, 2)
    try:
        token = secret.get_secret_value() if secret else None
        if convert_pickle and Path(model).expanduser().is_dir():
            _convert_folder(Path(model).expanduser())
        else:
            _pull(model, revision, token, convert_pickle=convert_pickle)
    except StartupError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        messages.print("vecmill: stopped; complete files are kept, run the same command again for the rest.")
        return INTERRUPTED
    return 0


def _fail(error: StartupError, code: int) -> int:
    print_error(error.message)
    return code


def _check_id(model: str) -> None:
    if model == "auto":
        raise StartupError(
            "auto is the bundled model, whose files come with vecmill[bundled]: there is nothing to pull."
        )
    if model.count("/") != 1:
        raise StartupError(f"{model}: not a hub id, which would be `owner/name`.")


def _pull(model: str, revision: str | None, hf_token: str | None, *, convert_pickle: bool) -> None:
    _check_id(model)
    fetch_plan = plan(model, hf_token=hf_token, revision=revision, pickles=convert_pickle)
    _describe(fetch_plan)
    require_space(fetch_plan, beside=0 if fetch_plan.readable else fetch_plan.weights_size)
    with _interruptible() as stopped, _progress(fetch_plan) as show:

        def report(fetched: int, complete: int) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            show(fetched, complete)

        folder = fetch(fetch_plan, hf_token=hf_token, revision=revision, report=report)
    if fetch_plan.missing:
        messages.print("checked   every file has the size that the hub says")
    else:
        messages.print("checked   everything is there already, with the right sizes; nothing was fetched")
    if not fetch_plan.readable:
        folder = _converted(model, folder, converted(model, fetch_plan.commit))
    elif convert_pickle:
        messages.print("convert   nothing: the model has safetensors")
    results.print(f"folder    {folder}", soft_wrap=True)
    results.print(f"revision  {fetch_plan.commit}", soft_wrap=True)
    pinned = f" --revision {model}={fetch_plan.commit}" if revision else ""
    results.print(f"serve     vecmill serve {_flag(model, folder)} {model}{pinned}", soft_wrap=True)


def _convert_folder(folder: Path) -> None:
    if list_folder(folder.name, folder, str(folder)).readable:
        raise StartupError(f"{folder}: it has safetensors already: there is nothing to convert.")
    made = _converted(str(folder), folder, converted_folder(folder))
    results.print(f"folder    {made}", soft_wrap=True)
    results.print(f"serve     vecmill serve {_flag(folder.name, made)} {made}", soft_wrap=True)


def _converted(named: str, folder: Path, target: Path) -> Path:
    """The folder with safetensors that are made of a folder's pickles."""
    if convert(named, folder, target, lambda message: messages.print(f"convert   {message}")):
        messages.print("convert   done: the pickles are not read again; the hub's cache is as it was")
    else:
        messages.print("convert   this was done before")
    return target


def _flag(model: str, folder: Path) -> str:
    """The flag of `vecmill serve` that takes the model: --embed-model or --rerank-model."""
    for task in Task:
        with suppress(StartupError):
            check_form(checkpoint := read(Source(model, folder, task)))
            return f"--{checkpoint.task}-model"
    return "--embed-model"


def _describe(fetch_plan: Plan) -> None:
    messages.print(f"model     {fetch_plan.name} at {fetch_plan.commit}")
    messages.print(f"licence   {fetch_plan.licence}")
    if fetch_plan.non_commercial:
        messages.print("warning   non-commercial use only: the licence forbids commercial use.", style="bold yellow")
    to_fetch = f"{decimal(fetch_plan.missing_size)} in {_files(len(fetch_plan.missing))} to fetch"
    messages.print(f"size      {decimal(fetch_plan.size)} in {_files(len(fetch_plan.sizes))}; {to_fetch}")
    if fetch_plan.parameters is not None:
        reason = f"{fetch_plan.parameters:,} parameters of 2 bytes"
    else:
        reason = "the weight files' size; half of it where they hold float32"
    messages.print(
        f"memory    about {decimal(fetch_plan.memory)} for the weights in bfloat16 (an estimate: {reason}), "
        f"and room for the batches besides"
    )


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C also sets the event: the library waits for its threads, which would go on to their files' end.

    Where it is ignored, as in a script's background, it stays ignored.
    """
    stopped = threading.Event()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(fetch_plan: Plan) -> Iterator[Report]:
    """Show progress: a bar on a terminal, else a line at every tenth."""
    if not fetch_plan.missing:
        yield lambda fetched, complete: None
    elif not messages.is_terminal:
        yield _lines(fetch_plan)
    else:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=messages) as progress:
            task = progress.add_task("starting", total=fetch_plan.missing_size)
            yield lambda fetched, complete: progress.update(
                task, completed=fetched, description=f"{complete} of {_files(len(fetch_plan.sizes))}"
            )


def _lines(fetch_plan: Plan) -> Report:
    shown = -1

    def report(fetched: int, complete: int) -> None:
        nonlocal shown
        tenth = 100 * fetched // max(fetch_plan.missing_size, 1) // LINE_EVERY
        last = complete == len(fetch_plan.sizes)
        if tenth > shown or last:
            shown = tenth
            messages.print(
                f"fetched   {decimal(fetched)} of {decimal(fetch_plan.missing_size)}, "
                f"{complete} of {_files(len(fetch_plan.sizes))} complete"
            )

    return report
