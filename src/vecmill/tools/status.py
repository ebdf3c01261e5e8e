"""`vecmill status` and `vecmill top`: what a running server does now, as text, once or again and again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import floor
from time import sleep, time
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from vecmill.tools.console import INTERRUPTED, CommandError, print_error, results
from vecmill.tools.http_client import HttpClient, NotThere, ServerAddress

SNAPSHOT = "/dashboard/snapshot"
ANSWER_SECONDS = 10.0
JOBS_SHOWN, BATCHES_SHOWN, USERS_SHOWN, MODELS_SHOWN, REPLICAS_SHOWN = 10, 5, 8, 20, 16
WARNINGS_SHOWN = 10
LONGEST_TEXT = 500  # characters
NAME_CHARACTERS = 28
UNKNOWN = "?"
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
LEAST_RATE = 0.05
MS_A_SECOND = 1000
KILO, MINUTE, HOUR, DAY = 1024, 60, 3600, 86_400
LARGEST_NUMBER = 1e18
STATES_SHOWN = 10

Item = Mapping[str, Any]

Url = Annotated[str, typer.Option(help="The server.")]
Key = Annotated[
    str | None, typer.Option("--api-key", "--key", help="Sent as a bearer token.", envvar="API_KEY", show_default=False)
]


def status(
    url: Url = "http://127.0.0.1:8080",
    api_key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's own JSON in place of lines.")] = False,
) -> None:
    """Say what a running server does now: rates, latencies, queues, jobs, batches, users and the machine.

    Exit code 0: it is ready; 1: it is not, or cannot be reached; 2: the options are wrong.
    """
    try:
        with _client(url, api_key) as client:
            snapshot = _ask(client)
    except CommandError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        sys.stdout.write(json.dumps(snapshot, indent=2) + "\n")
    else:
        results.print("\n".join(screen(snapshot)), soft_wrap=True)
    raise typer.Exit(0 if snapshot.get("ready") else 1)


def top(
    url: Url = "http://127.0.0.1:8080",
    api_key: Key = None,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="End after so many looks.")] = None,
) -> None:
    """Show what `vecmill status` says again and again, until Ctrl-C; where there is no terminal, as plain lines.

    Exit code 0: after --count looks; 1: the server cannot be reached at first; 2: the options are wrong; 130: Ctrl-C.
    """
    try:
        with _client(url, api_key) as client:
            looks = _looks(lambda: _ask(client), interval, count)
            if results.is_terminal:
                _on_terminal(looks)
            else:
                for lines in looks:
                    results.print("\n".join(lines), end="\n\n", soft_wrap=True)
    except CommandError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _client(url: str, api_key: str | None) -> HttpClient:
    return HttpClient(ServerAddress(url, api_key, ANSWER_SECONDS, patience_seconds=None))


def _ask(client: HttpClient) -> dict[str, Any]:
    try:
        return client.ask("GET", SNAPSHOT)
    except NotThere:
        raise CommandError(
            f"{client.base} has no {SNAPSHOT}: it is not vecmill, or an earlier version of it."
        ) from None


def _looks(ask: Callable[[], Item], interval: float, count: int | None) -> Iterator[list[str]]:
    """The lines of each look. A server that goes away is waited for, once it has answered.

    Raises:
        CommandError: the first look fails.
    """
    lines = screen(ask())
    yield lines
    looked = 1
    while count is None or looked < count:
        sleep(interval)
        looked += 1
        try:
            lines = screen(ask())
            yield lines
        except CommandError as error:
            yield [f"{error} What follows is from before.", "", *lines]


def _on_terminal(looks: Iterator[list[str]]) -> None:
    with Live(console=results, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        for lines in looks:
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)


def screen(snapshot: Item) -> list[str]:
    """A snapshot as lines. What is not known is `?`, or left out; so is what is of another form than it should be."""
    return [
        *_head(snapshot),
        *_replicas(_object(snapshot.get("replicas")), snapshot.get("version")),
        *_now(_object(snapshot.get("now"))),
        *_machine(_object(snapshot.get("machine"))),
        *_models(_objects(snapshot.get("models"))),
        *_jobs(_object(snapshot.get("jobs"))),
        *_batches(_object(snapshot.get("batches"))),
        *_who(_objects(snapshot.get("who"))),
    ]


def _head(snapshot: Item) -> list[str]:
    state, ready = _plain(snapshot.get("status")), snapshot.get("ready")
    text = "" if ready else f" ({_plain(snapshot.get('status_text'))})"
    up = _duration(snapshot.get("uptime_seconds"))
    lines = [
        f"vecmill {_plain(snapshot.get('version'))} on {_plain(snapshot.get('replica'))}: "
        f"{'ready' if ready else state}{text}, up {up}"
    ]
    warnings = _objects(snapshot.get("warnings"))[:WARNINGS_SHOWN]
    return lines + [f"warning: {_plain(warning.get('text'))}" for warning in warnings]


def _replicas(replicas: Item, version: Any) -> list[str]:
    """Where there are several, or it is not known. What follows them is of the server that is asked alone."""
    items, problem = _objects(replicas.get("items")), replicas.get("problem")
    if len(items) < 2 and problem is None:
        return []
    totals = _object(replicas.get("totals"))
    lines = [
        "",
        f"replicas: {_count(totals.get('ready'))} of {_count(replicas.get('count'))} ready, together "
        f"{_rate(totals.get('texts_per_second'))} texts/s, "
        f"{_count(_object(totals.get('queue')).get('texts'))} texts waiting",
    ]
    if problem is not None:
        lines.append(f"warning: {_plain(problem)}")
    rows = [
        (
            _name(item.get("replica")) + (" (asked)" if item.get("this") else ""),
            _state_of_replica(item),
            f"{_rate(item.get('texts_per_second'))} texts/s",
            _ms(item.get("searches_p95_ms")),
            f"{_count(_object(item.get('queue')).get('texts'))} texts",
            _bytes(_object(item.get("memory")).get("ours_bytes")),
            _name(item.get("version")) + ("" if item.get("version") == version else " (differs)"),
        )
        for item in items[:REPLICAS_SHOWN]
    ]
    return [*lines, *_table(("name", "state", "rate", "search p95", "waiting", "memory", "version"), rows)]


def _state_of_replica(item: Item) -> str:
    state = _name(item.get("status"))
    since: Any = item.get("gone_since")
    if _is_number(since):
        return f"{state} for {_duration(max(0.0, time() - since))}"
    return "ready" if state == "ok" else state


def _now(now: Item) -> list[str]:
    latency, queue = _object(now.get("latency_ms")), _object(now.get("queue"))
    lines = [
        "",
        f"last minute  {_rate(now.get('texts_per_second'))} texts/s, {_rate(now.get('tokens_per_second'))} tokens/s, "
        f"{_rate(now.get('requests_per_second'))} requests/s, {_rate(now.get('searches_per_second'))} searches/s",
    ]
    for lane, name in (("interactive", "searches"), ("bulk", "bulk")):
        times, waiting = _object(latency.get(lane)), _object(queue.get(lane))
        lines.append(
            f"{name:<11}  p50 {_ms(times.get('p50'))}, p95 {_ms(times.get('p95'))}, waiting: "
            f"{_count(waiting.get('texts'))} texts, {_count(waiting.get('tokens'))} tokens"
        )
    if cache := _object(now.get("cache")):
        lines.append(
            f"cache        {_percent(cache.get('hit_ratio'))} of the texts, {_count(cache.get('tokens_saved'))} tokens "
            f"saved since the start, {_count(cache.get('entries'))} vectors in {_bytes(cache.get('bytes'))}"
        )
    fill = _object(now.get("batch_fill"))
    lines.append(
        f"device       busy {_percent(now.get('device_busy_ratio'))}, "
        f"{_count(fill.get('tokens_per_pass'))} tokens a pass ({_fill(fill.get('ratio'))}knee "
        f"{_count(fill.get('knee_tokens'))})"
    )
    errors = f"{_count(now.get('errors'))} of the server's own, refused for the load {_count(now.get('refused'))}"
    return [*lines, f"errors       {errors}, since the start"]


def _fill(ratio: Any) -> str:
    """A mean pass beside the knee, as the dashboard says it."""
    if not _is_number(ratio):
        return ""
    return f"{_percent(ratio)} of the " if ratio < 1 else f"full: {_rate(ratio)} times the "


def _machine(machine: Item) -> list[str]:
    memory, gpu = _object(machine.get("memory")), _object(machine.get("gpu"))
    lines = [f"memory       {_parts(memory)}"]
    if own := _object(memory.get("gpu")):
        lines.append(f"GPU memory   {_parts(own)}")
    if gpu:
        lines.append(
            f"GPU          {_plain(gpu.get('name'))}, {_percent(gpu.get('utilization_ratio'))} busy, "
            f"{_count(gpu.get('sm_clock_mhz'))} MHz ({_plain(gpu.get('clock_verdict'))}), "
            f"{_count(gpu.get('power_watts'))} W, {_count(gpu.get('temperature_c'))} °C"
        )
    return lines


def _parts(memory: Item) -> str:
    names = {"ours_bytes": "ours", "others_bytes": "others", "page_cache_bytes": "page cache", "free_bytes": "free"}
    parts = [f"{word} {_bytes(memory[name])}" for name, word in names.items() if name in memory]
    return f"{', '.join(parts)}, of {_bytes(memory.get('total_bytes'))}"


def _models(models: Sequence[Item]) -> list[str]:
    return [
        f"model        {_plain(model.get('id'))}: " + ", ".join(_facts_of_model(model))
        for model in models[:MODELS_SHOWN]
    ]


def _facts_of_model(model: Item) -> list[str]:
    known = [_plain(model[name]) for name in ("task", "dtype", "state") if model.get(name) is not None]
    return known if model.get("memory_bytes") is None else [*known, _bytes(model["memory_bytes"])]


def _jobs(jobs: Item) -> list[str]:
    lines = ["", f"jobs: {_counts(_object(jobs.get('counts')))}"]
    items = [job for job in _objects(jobs.get("items")) if job.get("status") in ("active", "queued")]
    rows = [
        (
            _name(job.get("project")),
            _plain(job.get("status")),
            f"{_count(job.get('current'))} of {_count(job.get('total_chunks'))}",
            *_pace(job),
            f"{_duration(job.get('silent_seconds'))}, given up in {_duration(job.get('given_up_in_seconds'))}",
        )
        for job in items[:JOBS_SHOWN]
    ]
    return [*lines, *_table(("project", "state", "chunks", "rate", "time left", "silent"), rows)]


def _pace(job: Item) -> tuple[str, str]:
    """Rate and time left of one that is worked on; of one that waits, when it is expected to start."""
    if job.get("status") != "queued":
        return f"{_rate(job.get('texts_per_second'))} texts/s", _duration(job.get("eta_seconds"))
    wait = job.get("estimated_wait")
    return f"position {_count(job.get('position'))}", f"starts in {_duration(wait)}" if _is_number(wait) else ""


def _batches(batches: Item) -> list[str]:
    lines = ["", f"batches: {_counts(_object(batches.get('counts')))}"]
    going = ("validating", "in_progress", "finalizing", "cancelling")
    items = [batch for batch in _objects(batches.get("items")) if batch.get("status") in going]
    rows = []
    for batch in items[:BATCHES_SHOWN]:
        lines_of = _object(batch.get("request_counts"))
        ended = [lines_of.get(name) or 0 for name in ("completed", "failed")]
        done = f"{_count(sum(ended) if all(map(_is_number, ended)) else None)} of "
        rows.append(
            (
                _name(batch.get("name") or batch.get("id")),
                _plain(batch.get("status")),
                done + _count(lines_of.get("total")),
                f"{_rate(batch.get('lines_per_second'))} lines/s",
                _duration(batch.get("eta_seconds")),
            )
        )
    return [*lines, *_table(("batch", "state", "lines", "rate", "time left"), rows)]


def _who(users: Sequence[Item]) -> list[str]:
    rows = [
        (
            _name(user.get("key") or "no key"),
            _name(user.get("client")),
            _name(user.get("job_name") or user.get("job") or "no job"),
            f"{_rate(user.get('texts_per_second'))} texts/s",
            f"{_rate(user.get('tokens_per_second'))} tokens/s",
        )
        for user in users[:USERS_SHOWN]
    ]
    return ["", *_table(("key", "client", "job", "rate", ""), rows)] if rows else []


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]


def _counts(counts: Item) -> str:
    shown = [f"{_count(number)} {_plain(state).replace('_', ' ')}" for state, number in counts.items() if number]
    return ", ".join(shown[:STATES_SHOWN]) or "none"


def _plain(value: object) -> str:
    """Text for a terminal: what a client has chosen must not move its cursor."""
    if not isinstance(value, str):
        return str(value) if _is_number(value) else UNKNOWN
    shown = value[:LONGEST_TEXT]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown)


def _name(value: object) -> str:
    text = _plain(value).strip()
    if not text:
        return "(no name)"
    return text if len(text) <= NAME_CHARACTERS else f"{text[: NAME_CHARACTERS - 1]}…"


def _object(value: object) -> Item:
    """An object of a snapshot; empty where it is something else."""
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Item]:
    """A list's objects; what else is in it is left out."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_number(value: object) -> bool:
    """Whether it can be shown as one: JSON's may have thousands of digits, Python's be infinite or none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def _count(value: Any) -> str:
    return f"{value:,.0f}" if _is_number(value) else UNKNOWN


def _rate(value: Any) -> str:
    if not _is_number(value):
        return UNKNOWN
    if 0 < value < LEAST_RATE:
        return "< 0.1"  # what is above 0 is not shown as 0
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(value: Any) -> str:
    if not _is_number(value):
        return UNKNOWN
    return f"{_rate(value)} ms" if value < MS_A_SECOND else f"{value / MS_A_SECOND:,.1f} s"


def _percent(value: Any) -> str:
    # Rounded down: unfinished work must not read as 100 %.
    return f"{floor(100 * value + 1e-9):,} %" if _is_number(value) else UNKNOWN


def _bytes(value: Any) -> str:
    if not _is_number(value):
        return UNKNOWN
    size, step = float(value), 0
    while size >= KILO and step < len(SIZES) - 1:
        size, step = size / KILO, step + 1
    return f"{size:,.{int(size < 100 and step > 1)}f} {SIZES[step]}"


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return UNKNOWN
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < 10 * MINUTE:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    return f"{whole // DAY} d {whole % DAY // HOUR} h"
