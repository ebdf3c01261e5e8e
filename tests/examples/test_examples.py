"""The examples beside code search: each works as its docstring says, from the command line against a real server."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.examples.command_line import EXAMPLES, run_example
from tests.generation_server import generation_server
from tests.servers import RunningServer, free_port

LINES = [
    "The keys of the house lie under the mat.",
    "Bread rises better in a warm kitchen.",
    "A cat sleeps for fourteen hours a day.",
    "Trains to Hamburg leave from platform seven.",
]
QUESTION = "where are the door keys hidden?"
PYTHON = sorted(path.name for path in EXAMPLES.glob("*.py"))
ARGUMENTS = {
    "batch.py": ("{file}", "{folder}/vectors.npy", "--url", "{url}"),
    "codebase_search.py": ("--url", "{url}"),
    "rag.py": ("{folder}", QUESTION, "--url", "{url}"),
    "rerank.py": (QUESTION, "{file}", "--url", "{url}"),
    "search.ts": ("{file}", QUESTION),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(LINES) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_rerank(server: RunningServer, file: Path, source: str) -> None:
    options = ("--url", server.url, "--top", "2")
    given = (str(file),) if source == "file" else ()
    ran = run_example("rerank.py", QUESTION, *given, *options, stdin=None if given else file.read_text("utf-8"))
    assert ran.returncode == 0, ran.stderr
    first, second = (line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert first[1].strip() == LINES[0]
    assert float(first[0]) > float(second[0])


def test_batch(server: RunningServer, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    ran = run_example("batch.py", str(file), str(out), "--url", server.url)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"wrote {out}: 4 vectors of 384 values\n"
    vectors = np.load(out)
    batch = re.search(r"--batch (\S+)", ran.stderr)
    assert batch, ran.stderr
    out.unlink()
    again = run_example("batch.py", str(file), str(out), "--url", server.url, "--batch", batch[1])
    assert again.returncode == 0, again.stderr
    assert np.array_equal(np.load(out), vectors)
    (tmp_path / "other.txt").write_text("only one line\n", "utf-8")
    other = run_example("batch.py", str(tmp_path / "other.txt"), str(out), "--url", server.url, "--batch", batch[1])
    assert (other.returncode, len(other.stderr.splitlines()[-1]) > 0) == (1, True)


def test_rag_without_a_chat_model(server: RunningServer, file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.md").write_text("# Animals\n\n" + "A dog needs a walk twice a day. " * 50, "utf-8")
    ran = run_example("rag.py", str(tmp_path), QUESTION, "--url", server.url, "--top", "2")
    assert ran.returncode == 0, ran.stderr
    assert [line[:3] for line in ran.stdout.splitlines()] == ["[1]", "[2]"]
    assert "notes.txt: The keys of the house" in ran.stdout.splitlines()[0]


def test_rag_with_a_chat_model(server: RunningServer, file: Path, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    async def generate(request: Request) -> Response:
        bodies.append(await request.json())
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "Under the mat [1]."},
            "finish_reason": "stop",
        }
        return JSONResponse({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    with generation_server() as chat:
        chat.generate = generate
        options = ("--url", server.url, "--chat-model", "m", "--chat-url", chat.url)
        ran = run_example("rag.py", str(tmp_path), QUESTION, *options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("\n\nUnder the mat [1].\n")
    assert bodies[0]["model"] == "m"
    assert LINES[0] in bodies[0]["messages"][1]["content"]
    assert QUESTION in bodies[0]["messages"][1]["content"]


def test_typescript(server: RunningServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECMILL_URL", server.url)
    ran = run_example("search.ts", str(file), QUESTION)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0].split("  ", 1)[1] == LINES[0]
    assert len(ran.stdout.splitlines()) == 4


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_that_no_server_answers_is_one_sentence(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("VECMILL_URL", nowhere)
    arguments = (part.format(file=file, folder=tmp_path, url=nowhere) for part in ARGUMENTS[name])
    ran = run_example(name, *arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"No server answers at {nowhere}")
    assert len(ran.stderr.splitlines()) == 1


def test_every_example_is_tested() -> None:
    assert sorted(ARGUMENTS) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ts"))


@pytest.mark.parametrize("name", PYTHON)
def test_an_example_needs_what_vecmill_is_installed_with(name: str) -> None:
    """Or what its docstring says to install. The same names stand in its header, which `uv run` reads (PEP 723)."""
    source = (EXAMPLES / name).read_text("utf-8")
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.M)
    assert header, "it has no header of PEP 723"
    declared = set(tomllib.loads(re.sub(r"^# ?", "", header[1], flags=re.M))["dependencies"])
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {module.split(".")[0] for module in modules}
    assert imported - sys.stdlib_module_names == declared
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text("utf-8"))["project"]
    ours = {Requirement(line).name for line in project["dependencies"]}
    docstring = ast.get_docstring(tree) or ""
    assert [package for package in declared - ours if f"pip install {package}" not in docstring] == []


def test_the_typescript_has_no_package() -> None:
    source = (EXAMPLES / "search.ts").read_text("utf-8")
    assert re.findall(r'from "([^"]+)"', source) == ["node:fs/promises"]
