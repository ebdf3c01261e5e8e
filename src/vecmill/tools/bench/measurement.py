"""A measurement from options to exit code."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import orjson

from vecmill.tools.bench import mixed, sweep
from vecmill.tools.bench.errors import BenchError
from vecmill.tools.bench.options import DIFFERENT_TEXTS, LEVELS, Options
from vecmill.tools.bench.plot import require_picture, terminal_plot, write_picture
from vecmill.tools.bench.progress import Progress, said
from vecmill.tools.bench.report import results, show_mixed, show_remarks, show_sweep, warnings
from vecmill.tools.bench.results import Load, Outcomes
from vecmill.tools.bench.sweep import level_name
from vecmill.tools.bench.workload import Workload, load


def run_bench(options: Options) -> int:
    """Measure and show; the exit code: 0, 1 there were errors or a wrong answer, 2 it cannot be measured, 130 ^C."""
    try:
        options.check()
        if options.plot is not None:
            require_picture(options.plot)
        workload = load(options.folder, options.texts or DIFFERENT_TEXTS, options.longest)
        outcomes = (_mixed if options.mixed else _sweep)(options, workload)
    except BenchError as error:
        said.print(f"vecmill: {error}", style="bold red")
        return error.exit_code
    except KeyboardInterrupt:
        said.print("vecmill: stopped.")
        return 130
    return 1 if any(one.errors for one in outcomes) else 0


def _sweep(options: Options, workload: Workload) -> list[Outcomes]:
    with Progress() as progress:
        found = sweep.measure(
            options.target,
            workload.texts,
            batch=options.batch,
            levels=options.connections or LEVELS,
            seconds=options.level_seconds,
            warm_up_seconds=options.warm_up_seconds,
            progress=progress,
        )
    outcomes = {level_name(one.connections): one.outcomes for one in found.levels}
    facts = _facts(options, workload, found.dimensions)
    if options.json:
        _print_json(facts, {"levels": [asdict(one) for one in found.levels]}, found.levels)
    else:
        _show_facts(facts)
        show_sweep(found)
        if drawn := terminal_plot(found.levels, colours=results.is_terminal):
            sys.stdout.write(f"\n{drawn}\n")
        show_remarks(outcomes, found.levels)
    if options.plot is not None:
        write_picture(found.levels, f"{options.target.endpoint}, {options.batch} texts per request", options.plot)
    return list(outcomes.values())


def _mixed(options: Options, workload: Workload) -> list[Outcomes]:
    with Progress() as progress:
        found = mixed.measure(
            options.target,
            workload.texts,
            batch=options.batch,
            connections=options.connections[0] if options.connections else mixed.CONNECTIONS,
            seconds=options.seconds or mixed.SECONDS,
            query_interval=options.query_interval,
            warm_up_seconds=options.warm_up_seconds,
            progress=progress,
        )
    loads = [found.bulk_alone, found.bulk_beside_person]
    outcomes = {
        "the person alone": found.person_alone,
        "the person beside bulk": found.person_beside_bulk,
        "bulk alone": found.bulk_alone.outcomes,
        "bulk beside the person": found.bulk_beside_person.outcomes,
    }
    facts = _facts(options, workload, found.dimensions)
    if options.json:
        _print_json(facts, {**asdict(found), "bulk_loss_percent": found.bulk_loss_percent}, loads)
    else:
        _show_facts(facts)
        show_mixed(found)
        show_remarks(outcomes, loads)
    return list(outcomes.values())


def _facts(options: Options, workload: Workload, dimensions: int | None) -> dict[str, Any]:
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
    }


def _show_facts(facts: dict[str, Any]) -> None:
    workload, dimensions = facts["workload"], facts["dimensions"]
    answers = f"vectors of {dimensions} values" if dimensions else "scores"
    model = f", {facts['model']}" if facts["model"] else ""
    results.print(f"server    {facts['url']} ({facts['dialect']}{model}): {answers}", soft_wrap=True)
    results.print(
        f"workload  {workload['texts']:,} texts of {workload['mean_characters']:,} characters on average "
        f"from {workload['source']}, {facts['batch']} per request\n",
        soft_wrap=True,
    )


def _print_json(facts: dict[str, Any], found: dict[str, Any], loads: list[Load]) -> None:
    whole = {**facts, **found, "warnings": warnings(loads)}
    sys.stdout.write(orjson.dumps(whole, option=orjson.OPT_INDENT_2).decode() + "\n")
