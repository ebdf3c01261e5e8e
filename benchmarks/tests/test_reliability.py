"""Each promise of docs/reliability.md has its tests and figure, and a figure that is older than its code is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.lib.code_digests import changed_files, code_digests, file_digest
from benchmarks.lib.host import REPOSITORY
from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability.__main__ import PAGE, RECORDED, Results, page, problems_of_age, problems_of_the_page, when
from benchmarks.reliability.promises import Figure, Promise

CODE = '"""About it."""\n\n\ndef double(value):\n    """Twice the value."""\n    return value * 2  # plain\n'
TEST = "import pytest\n\n\n@pytest.mark.nightly\ndef test_it():\n    pass\n\n\ndef test_at_once():\n    pass\n"
HOST = {"cpu": "a CPU", "gpu": None, "cores": 2, "commit": "0123456789ab"}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny clone with one promise, measured a day ago on the code that is there, and the page of it."""
    promise = Promise("It doubles.", ("tests/test_it.py",), ("src/vecmill/engine/*",), Figure("soak", "{seen/p99} ms"))
    monkeypatch.setattr(reliability, "GROUPS", {"Doubling": (promise,)})
    files = {"src/vecmill/engine/a.py": CODE, "src/vecmill/http/b.py": CODE}
    tests = {"tests/test_it.py": TEST, "tests/test_at_commits.py": "def test_more():\n    pass\n"}
    for name, text in (files | tests).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    measure(tmp_path, 12.3, datetime.now(UTC) - timedelta(days=1))
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text(page(tmp_path, Results(tmp_path)))
    return tmp_path


def measure(clone: Path, p99: float, at: datetime, **beside: float) -> None:
    result = {"benchmark": "soak", "measured_at": at.isoformat(), "host": HOST, "seen": {"p99": p99, **beside}}
    stored = clone / f"benchmarks/results/soak-{at:%Y-%m-%d-%H%M%S}.json"
    stored.write_text(json.dumps({**result, "code": code_digests(clone)}))


def problems(clone: Path, days: int = 0) -> list[str]:
    results = Results(clone)
    return problems_of_the_page(clone, results) or problems_of_age(clone, results, timedelta(days))


def edit(clone: Path, name: str, old: str, new: str) -> None:
    path = clone / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_each_promise_has_its_tests_and_its_figure_and_the_page_says_so() -> None:
    assert problems_of_the_page(REPOSITORY, Results(REPOSITORY)) == []


def test_what_was_just_measured_is_not_old(clone: Path) -> None:
    assert problems(clone) == []
    assert "| It doubles. | `tests/test_it.py` | every commit, more at night | 12.3 ms |" in (clone / PAGE).read_text()


def test_a_figure_that_misses_its_target_says_so(clone: Path) -> None:
    now = datetime.now(UTC)
    measure(clone, 12.3, now, target=20.0, met=True)
    assert "| 12.3 ms |" in page(clone, Results(clone))
    measure(clone, 20.4, now + timedelta(seconds=1), target=20.0, met=False)
    assert "| 20.4 (target 20, **missed**) ms |" in page(clone, Results(clone))
    measure(clone, 12.4, now + timedelta(seconds=2), met=False)  # the target is of something else
    assert "| 12.4 ms |" in page(clone, Results(clone))


def test_comments_docstrings_blanks_and_other_code_make_no_figure_old(clone: Path) -> None:
    edit(clone, "src/vecmill/engine/a.py", "plain", "as plain as can be")
    edit(clone, "src/vecmill/engine/a.py", "Twice the value.", "The value, twice.")
    edit(clone, "src/vecmill/engine/a.py", "value * 2", "(\n        value * 2\n    )")
    edit(clone, "src/vecmill/http/b.py", "value * 2", "value + value")
    assert problems(clone) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda clone: edit(clone, "src/vecmill/engine/a.py", "value * 2", "value * 3"),
        lambda clone: (clone / "src/vecmill/engine/new.py").write_text(CODE),
        lambda clone: (clone / "src/vecmill/engine/a.py").rename(clone / "src/vecmill/engine/moved.py"),
    ],
    ids=["changed", "new", "moved"],
)
def test_a_figure_is_older_than_its_code(clone: Path, change: Callable[[Path], object]) -> None:
    change(clone)

    old, unmarked = problems(clone)
    assert "It doubles." in old
    assert "src/vecmill/engine/" in old
    assert "python -m benchmarks.soak" in old, "the command that measures again"
    assert "does not say which figures are older" in unmarked
    assert problems(clone, days=14) == [], "two weeks are given at night"
    assert problems_of_the_page(clone, Results(clone)) == [], "no commit has to wait for a measurement"

    (clone / PAGE).write_text(page(clone, Results(clone)))
    assert "**older than its code**" in (clone / PAGE).read_text()
    assert problems(clone) == [old]

    measure(clone, 13.4, datetime.now(UTC))
    (unlike,) = problems(clone)
    assert "is not what promises and results give" in unlike
    (clone / PAGE).write_text(page(clone, Results(clone)))
    assert problems(clone) == []
    assert "13.4 ms" in (clone / PAGE).read_text()


def test_a_result_that_does_not_say_its_code_is_old(clone: Path) -> None:
    (stored,) = (clone / "benchmarks/results").iterdir()
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "code": None}))
    assert "not recorded" in problems(clone)[0]


def test_a_recorded_run_is_of_the_tests_that_ran(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promise = Promise("It halves.", ("tests/test_it.py", "tests/test_at_commits.py"), ("src/vecmill/engine/*",))
    monkeypatch.setattr(reliability, "GROUPS", {"Halving": (promise,)})
    passed = {"tests/test_it.py": {"passed": 1, "failed": 0, "skipped": 0, "seconds": 1.5}}
    run = {"benchmark": RECORDED, "measured_at": datetime.now(UTC).isoformat(), "host": HOST, "tests": passed}
    stored = clone / "benchmarks/results/recorded.json"
    stored.write_text(json.dumps({**run, "code": code_digests(clone, also=["tests/test_it.py"])}))
    (clone / PAGE).write_text(page(clone, Results(clone)))
    assert "1 cases passed in 1.5 s" in (clone / PAGE).read_text()
    edit(clone, "tests/test_at_commits.py", "pass", "assert True")
    assert problems(clone) == []
    edit(clone, "tests/test_it.py", "pass", "assert True")
    assert "tests/test_it.py" in problems(clone)[0]


def test_after_two_weeks_the_night_fails_too(clone: Path) -> None:
    shutil.rmtree(clone / "benchmarks/results")
    (clone / "benchmarks/results").mkdir()
    measure(clone, 12.3, datetime.now(UTC) - timedelta(days=15))
    (clone / PAGE).write_text(page(clone, Results(clone)))
    assert problems(clone, days=14) == []
    edit(clone, "src/vecmill/engine/a.py", "value * 2", "value * 3")
    assert len(problems(clone, days=14)) == 1


def test_what_a_promise_names_must_be_there(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Promise("It halves.", ("tests/test_it.py::test_gone",), ("src/vecmill/gone/*",), Figure("soak", "{gone} ms"))
    monkeypatch.setattr(reliability, "GROUPS", {"Halving": (gone,)})
    no_test, no_code, no_figure = problems(clone)
    assert "tests/test_it.py::test_gone" in no_test
    assert "src/vecmill/gone/*" in no_code
    assert "soak" in no_figure


def test_when_a_test_runs_is_read_from_its_markers() -> None:
    def of(*tests: str) -> str:
        return when(REPOSITORY, Promise("", tests, ()))

    assert of("tests/http/test_non_finite.py") == "every commit"
    assert of("benchmarks/tests/test_quality.py") == "at night"
    assert of("benchmarks/tests/test_soak.py") == "every commit, more at night"


def test_a_digest_is_of_what_a_file_does(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        (tmp_path / "a.py").write_text(text)
        return file_digest(tmp_path / "a.py")

    assert digest("x = f'{a:{b}}'\n") == digest("x = f'{a:{b}}'  # why\n")
    assert digest("x = 1\n") != digest("x = 1.0\n") != digest("x = '1.0'\n")
    assert digest("class A:\n    'a docstring'\n    x = 1\n") == digest("class A:\n    x = 1\n")
    assert digest("class A:\n    x = 1\n    'what x is'\n") == digest("class A:\n    x = 1\n")
    assert digest("x = 'a'\n'b'\n") == digest("x = 'a'\n") != digest("x = 'a' 'b'\n")
    assert changed_files(["a/*"], {"a/b.py": "1", "c.py": "1"}, {"a/b.py": "1", "c.py": "2"}) == []
