"""docs/reliability.md: what is promised, the tests that hold it, and the latest figure of each promise.

    python -m benchmarks.reliability                    # write the page
    python -m benchmarks.reliability --check --days 14  # fail where something is missing, or a figure is too old
    python -m benchmarks.reliability --record           # run the promises' tests of the night, and keep how they ended

A figure is older than its code when a file that its promise names has another digest than when it was measured
(benchmarks/lib/code_digests.py): comments do not count, and no history is needed. Versions of dependencies do not count
either, nor, for a recorded run, tests that it did not have. Measuring takes minutes to hours of a quiet machine, so
three checks differ in what they ask for:

- every commit (benchmarks/tests/test_reliability.py): each named test and pattern exists, each figure has a result, and
  the page is what they give, but for the words "older than its code", which any change may make true;
- every night: also that no figure which is older than its code is of more than 14 days ago;
- a release: no figure is older than its code (`--days 0`), and the page says none is.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from benchmarks.lib.code_digests import changed_files, code_digests, code_files
from benchmarks.lib.figures import rounded
from benchmarks.lib.host import REPOSITORY, describe_host
from benchmarks.lib.results import publish
from benchmarks.reliability.promises import COMMANDS, GROUPS, RECORD, Figure, Promise

PAGE = Path("docs", "reliability.md")
RECORDED = "reliability"  # the name under which runs of the tests are kept
OLDER = " **older than its code**"
MOST_NAMED = 3  # changed files in a message
COMMIT, NIGHT = "every commit", "at night"
OF_THE_NIGHT = re.compile(r"pytest\.mark\.(nightly|benchmark)\b")

HEAD = """# Reliability

What vecmill promises, the tests that hold it, and the latest figure. `python -m benchmarks.reliability` writes this
page from `benchmarks/reliability/promises.py` and `benchmarks/results`; `make reliability` fails when a figure is older
than its code ([how](releases.md#figures)). A figure that misses its target says so. Tests that run at every commit
have no figure: a commit that fails one is not merged. "Cases" are those of the tests that run at night, when they were
last recorded.
"""

TAIL = """
## What is not promised

- **GPUs**: no figure above is of a GPU. What was measured on an H100 and an H200, on one day, is in [GPUs](gpu.md).
  Nothing has run on a GB10, and the tests of commits and nights have no card.
- **Eight hours of load** have never been run; `python -m benchmarks.soak --minutes 480` does it. Memory
  is flat within 20 MB/h over [ten minutes](benchmarks.md#held-under-load); so short a run shows no slope of few MB/h.
- **More than one machine**: replicas and proxies were measured on the cores of one; [scale](scale.md) is simulated.
- **The machine below**: a disk that lies about what it has written, memory with errors, a kernel or driver that hangs.
- **Confidentiality on the wire, and limits on how often a key calls**: a proxy's or a tailnet's
  ([security](https://github.com/vecmill/vecmill/blob/main/SECURITY.md)).
"""


@dataclass(frozen=True)
class Measurement:
    """A promise's latest figure."""

    text: str
    measured_at: datetime
    where: str
    again: str
    """The command that measures it."""
    code: tuple[str, ...]
    """Patterns of files."""
    then: Mapping[str, str] | None
    """The digests of the code that was measured; None: the result does not have them."""


class Results:
    """The stored results of a clone, and the digests of its code as it is now."""

    def __init__(self, root: Path) -> None:
        found = [json.loads(path.read_text("utf-8")) for path in sorted((root / "benchmarks/results").glob("*.json"))]
        self._newest_first = sorted(found, key=lambda result: str(result["measured_at"]), reverse=True)
        self._root = root

    @cached_property
    def _now(self) -> dict[str, str]:
        tests = {test for promise in promises() for test in promise.tests}
        return code_digests(self._root, also=[name for name in _test_files(self._root) if _is_named(name, tests)])

    def changed(self, measurement: Measurement) -> list[str] | None:
        """What has changed since in the code of a measurement, which is older then; None: it is not known."""
        then = measurement.then
        return None if then is None else changed_files(measurement.code, then, self._now)

    def latest(self, promise: Promise) -> Measurement | None:
        """The figure that a promise names, or the last recorded run of its tests; None without either."""
        figure = promise.figure
        if figure is None:
            text, again, result = self._recorded(promise)
            ran = result["tests"] if result else {}
            code: tuple[str, ...] = (*promise.code, *(_pattern(test) for test in promise.tests if test in ran))
        else:
            text, again = "", COMMANDS[figure.benchmark]
            result = next((each for each in self._of(figure.benchmark) if _filled(figure, each)), None)
            text = _filled(figure, result) or "" if result else ""
            code = promise.code
        return self._measurement(text, again, result, code) if result else None

    def _of(self, benchmark: str) -> Iterator[dict[str, Any]]:
        return (result for result in self._newest_first if result["benchmark"] == benchmark)

    def _recorded(self, promise: Promise) -> tuple[str, str, dict[str, Any] | None]:
        for result in self._of(RECORDED):
            runs = [result["tests"][test] for test in promise.tests if test in result["tests"]]
            if runs:
                return _of_runs(runs), RECORD, result
        return "", RECORD, None

    def _measurement(self, text: str, again: str, result: Mapping[str, Any], code: tuple[str, ...]) -> Measurement:
        host = result["host"]
        where = f"{host['gpu'] or host['cpu']}, {host['cores']} cores, {host['commit']}"
        return Measurement(text, datetime.fromisoformat(result["measured_at"]), where, again, code, result.get("code"))


def promises() -> list[Promise]:
    """All, in the page's order."""
    return [promise for group in GROUPS.values() for promise in group]


def _of_runs(runs: Iterable[Mapping[str, Any]]) -> str:
    sums = {name: sum(run[name] for run in runs) for name in ("passed", "failed", "skipped", "seconds")}
    failed = f", **{sums['failed']} failed**" if sums["failed"] else ""
    skipped = f", {sums['skipped']} skipped" if sums["skipped"] else ""
    return f"{sums['passed']} cases passed{failed}{skipped} in {rounded(sums['seconds'])} s"


def _filled(figure: Figure, result: Mapping[str, Any]) -> str | None:
    """The figure's text with the result's values; None where one of them is missing."""
    try:
        return re.sub(r"\{([^}]+)\}", lambda found: _value(result, found[1]), figure.text)
    except (KeyError, TypeError):
        return None


def _value(result: Any, path: str) -> str:
    *above, last = path.split("/")
    for name in above:
        result = result[name]
    text = _shown(result[last])
    missed = "target" in result and not result["met"]
    return f"{text} (target {_shown(result['target'])}, **missed**)" if missed else text


def _shown(value: str | float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    # A cosine is about its distance from 1.
    return f"{value:.7g}" if 0.99 < value < 1 else rounded(value)


def page(root: Path, results: Results, *, marked: bool = True) -> str:
    """The page as it should be now; `marked`: with what is older than its code."""
    return "\n".join([HEAD, *(line for title in GROUPS for line in _table(root, title, results, marked))]) + TAIL


def _table(root: Path, title: str, results: Results, marked: bool) -> Iterator[str]:
    yield f"## {title}\n"
    yield "| promise | held by | runs | latest figure | measured |\n|---|---|---|---|---|"
    for promise in GROUPS[title]:
        held = "<br>".join(f"`{test}`" for test in promise.tests)
        cells = (promise.text, held, when(root, promise), *_cells(root, promise, results, marked))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _cells(root: Path, promise: Promise, results: Results, marked: bool) -> tuple[str, str]:
    latest = results.latest(promise)
    if latest is None:
        return ("not recorded" if NIGHT in when(root, promise) else ""), ""
    older = OLDER if marked and results.changed(latest) != [] else ""
    return latest.text, f"{latest.measured_at:%Y-%m-%d}, {latest.where}{older}"


def when(root: Path, promise: Promise) -> str:
    """Whether the tests of a promise run at every commit, at night, or some of them at each."""
    times = {time for test in promise.tests for times in _found(root, test).values() for time in times}
    return "every commit, more at night" if len(times) > 1 else "".join(times)


def problems_of_the_page(root: Path, results: Results) -> list[str]:
    """What must hold at every commit."""
    found = [f"{test}: there is no such test" for each in promises() for test in each.tests if not _found(root, test)]
    files = code_files(root)
    found += [
        f"{code}: no file" for each in promises() for code in each.code if not any(fnmatch(f, code) for f in files)
    ]
    found += [f"{each.figure}: no result has it" for each in promises() if each.figure and not results.latest(each)]
    if not found and (root / PAGE).read_text("utf-8").replace(OLDER, "") != page(root, results, marked=False):
        found.append(f"{PAGE} is not what promises and results give: python -m benchmarks.reliability")
    return found


def problems_of_age(root: Path, results: Results, grace: timedelta) -> list[str]:
    """Figures that are older than their code and than `grace`, with what changed; without grace also the marks."""
    found = []
    for promise in promises():
        latest = results.latest(promise)
        changed = results.changed(latest) if latest else []
        if latest and changed != [] and datetime.now(UTC) - latest.measured_at > grace:
            found.append(
                f"{promise.text} Measured {latest.measured_at:%Y-%m-%d}; {_since(changed)} Again: {latest.again}"
            )
    if not grace and (root / PAGE).read_text("utf-8") != page(root, results):
        found.append(f"{PAGE} does not say which figures are older than their code: python -m benchmarks.reliability")
    return found


def _since(changed: list[str] | None) -> str:
    if changed is None:
        return "on which code was not recorded."
    more = len(changed) - MOST_NAMED
    return f"changed since: {', '.join(changed[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}."


@cache
def _test_files(root: Path) -> list[str]:
    folders = (root / "tests", root / "benchmarks/tests")
    return sorted(path.relative_to(root).as_posix() for each in folders for path in each.rglob("test_*.py"))


def _pattern(test: str) -> str:
    file = test.partition("::")[0]
    return file if file.endswith(".py") else f"{file}/*"


def _is_named(file: str, names: Iterable[str]) -> bool:
    return any(fnmatch(file, _pattern(name)) for name in names)


def _found(root: Path, test: str) -> dict[str, frozenset[str]]:
    """The tests that `file`, `folder` or `file::test` names, and when each runs."""
    file, _, name = test.partition("::")
    files = [each for each in _test_files(root) if fnmatch(each, _pattern(file))]
    found = {f"{each}::{one}": times for each in files for one, times in tests_of(root / each).items()}
    return {one: times for one, times in found.items() if not name or one == test}


@cache
def tests_of(file: Path) -> dict[str, frozenset[str]]:
    """The names of a file's tests, and when each runs: a marker is of the file, of a test, or of some of its cases."""
    tree = ast.parse(file.read_text("utf-8"))
    lists = {
        ast.unparse(node.targets[0]): ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
    }
    with_cases = [name for name, value in lists.items() if OF_THE_NIGHT.search(value)]
    return {
        node.name: _times([ast.unparse(each) for each in node.decorator_list], with_cases)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def _times(decorators: Iterable[str], with_cases: Iterable[str]) -> frozenset[str]:
    if "pytestmark" in with_cases or any(OF_THE_NIGHT.match(each) for each in decorators):
        return frozenset({NIGHT})
    some = re.compile("|".join([OF_THE_NIGHT.pattern, *(rf"\b{name}\b" for name in with_cases)]))
    return frozenset({NIGHT, COMMIT} if any(some.search(each) for each in decorators) else {COMMIT})


def record(root: Path, only: str, *, store: bool) -> int:
    """Run the tests of the night of promises without a measured figure; pytest's exit status. Kept if all pass."""
    wanted = dict.fromkeys(
        test
        for promise in promises()
        if promise.figure is None
        for test in promise.tests
        if test.startswith(only) and any(NIGHT in times for times in _found(root, test).values())
    )
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        chosen = ("-m", "nightly", "--numprocesses", "2", "--dist", "loadfile", f"--junitxml={report}")
        started = time.perf_counter()
        ended = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen, *wanted], cwd=root, check=False)
        seconds = time.perf_counter() - started
        cases = ElementTree.parse(report).iter("testcase")
        tests = _by_entry(cases, wanted)
    result = {"host": describe_host(), "seconds": round(seconds, 1), "tests": tests}
    also = [file for file in _test_files(root) if _is_named(file, wanted)]
    publish(RECORDED, result, store=store and ended.returncode == 0, also=also)
    return ended.returncode


def _by_entry(cases: Iterable[ElementTree.Element], wanted: Iterable[str]) -> dict[str, dict[str, float]]:
    """How the cases of each entry of `wanted` ended."""
    entries: dict[str, dict[str, float]] = defaultdict(
        lambda: dict.fromkeys(("passed", "failed", "skipped", "seconds"), 0)
    )
    for case in cases:
        file = str(case.get("classname")).replace(".", "/") + ".py"
        name = f"{file}::{str(case.get('name')).partition('[')[0]}"
        kinds = {child.tag for child in case}
        end = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        for entry in wanted:
            if entry in (file, name) or ("::" not in entry and _is_named(file, [entry])):
                entries[entry][end] += 1
                entries[entry]["seconds"] = round(entries[entry]["seconds"] + float(case.get("time", 0)), 1)
    return {entry: ends for entry, ends in entries.items() if ends["passed"] or ends["failed"]}


def main(root: Path = REPOSITORY) -> int:
    """Write, check or record; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where something is wrong")
    parser.add_argument("--days", type=int, default=0, help="how old a figure that is older than its code may be")
    parser.add_argument("--record", nargs="?", const="", metavar="FOLDER", help="run tests, or only those of a folder")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    options = parser.parse_args()
    if options.record is not None:
        return record(root, options.record, store=not options.no_store)
    results = Results(root)
    if not options.check:
        (root / PAGE).write_text(page(root, results), "utf-8")
        return 0
    problems = problems_of_the_page(root, results) or problems_of_age(root, results, timedelta(options.days))
    print("\n".join(problems) or "Every promise has its tests, and no figure is older than it may be.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
