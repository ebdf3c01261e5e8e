"""What the guides tell people to type: every command is read, and what needs no GPU and no tailnet is run."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import crossplane
import promql_parser
import pytest
import yaml

from tests.guides import checks, curl
from tests.guides.markdown import Block, Page
from tests.guides.shell import commands, tool
from tests.servers import RunningServer

ROOT = Path(__file__).parents[2]
FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = {path.name: Page(path) for path in (*(ROOT / name for name in FRONT), *sorted((ROOT / "docs").glob("*.md")))}
GUIDES = [name for name in PAGES if name not in (*FRONT, "clients.md")]
# What other programs are to be told is no setting of ours.
OTHERS_SETTINGS = {"clients.md"}
# Codes that do not concern a few lines which a person types: https://www.shellcheck.net/wiki/
NOT_OF_SNIPPETS = (
    "SC2034",  # a variable that is set and not used: lines of an env file
    "SC2164",  # cd without `|| exit`
)
RUNNABLE = re.compile(
    r"(sudo|vecmill|make|python3?|systemctl|journalctl|tailscale|docker|kubectl|curl|\.venv/bin/\w+) [^<\[…]+"
)
# A sentence may name a command without all that it needs.
UNFINISHED = ("MissingParameter: ", "no unit")
CALL = re.compile(r"(?:(GET|POST|DELETE) )?(/(?!etc/|opt/|var/|proc/|tmp/|srv/)[a-z][\w/.-]*)")
FILE = re.compile(r"(?:docs|docker|examples|benchmarks|tests|src|deployment)/[\w./-]+|[\w-]+\.md|deploy\.py")
NAME = re.compile(r"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*)(?:=(\S*))?")
# In capitals, and no settings.
NO_SETTINGS = {
    "ARGS": "make's",
    "CUBLAS_WORKSPACE_CONFIG": "cuBLAS's",
    "SHA256SUMS": "a file of a release",
    "NIGHTLY_AUDIT": ".ci/nightly's",
    "GET": "a method of HTTP",
    "TAILNET": "stands for the reader's",
    "START": "a value of TEI's truncation_direction",
    "END": "a value of NIM's and Cohere's truncate",
    "NONE": "the same",
}


def blocks(language: str) -> Iterator[Block]:
    return (block for page in PAGES.values() for block in page.blocks if block.language == language)


@pytest.mark.parametrize("name", PAGES)
def test_commands(name: str) -> None:
    wrong = []
    for block in PAGES[name].blocks:
        if block.language == "sh" and not (name in OTHERS_SETTINGS and only_assigns(block.text)):
            wrong += [f"{block.place}: {problem}" for problem in checks.problems(block.text)]
    assert not wrong


def only_assigns(script: str) -> bool:
    return not any(command.words for command in commands(script))


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_sentences(name: str) -> None:
    spans = [span for span in PAGES[name].spans if RUNNABLE.fullmatch(span) and "..." not in span]
    wrong = [problem for span in spans for problem in checks.problems(span)]
    assert not [problem for problem in wrong if not problem.endswith(UNFINISHED)]


def test_scripts_by_bash_and_shellcheck(tmp_path: Path) -> None:
    written = []
    for number, block in enumerate(blocks("sh")):
        script = tmp_path / f"{number:03}-{block.place}.sh"
        script.write_text(f"#!/usr/bin/env bash\n{block.text}")
        written.append(str(script))
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, block.place
    excluded = f"--exclude={','.join(NOT_OF_SNIPPETS)}"
    checked = subprocess.run(
        [tool("shellcheck"), "--format=gcc", excluded, *written], capture_output=True, text=True, check=False
    )
    assert written
    assert checked.stdout == ""


def read_ini(text: str) -> None:
    """Part of a unit, or lines of an env file."""
    if text.startswith("["):
        configparser.ConfigParser().read_string(text)
    else:
        assert only_assigns(text)
        assert not checks.problems(text)


def read_nginx(text: str) -> None:
    """As a file of conf.d, which nginx reads within `http`."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(f"events {{}}\nhttp {{\n{text}}}\n")
        file.flush()
        assert crossplane.parse(file.name, strict=True)["errors"] == []


def no_check(text: str) -> None:
    """JavaScript, and what programs print."""


READERS: dict[str, Callable[[str], object]] = {
    "sh": no_check,  # above
    "json": json.loads,
    "yaml": yaml.safe_load,
    "toml": tomllib.loads,
    "python": ast.parse,
    "ini": read_ini,
    "nginx": read_nginx,
    "js": no_check,
    "promql": lambda text: [promql_parser.parse(line) for line in text.splitlines()],
    "": no_check,
}


@pytest.mark.parametrize("name", PAGES)
def test_other_blocks_can_be_read(name: str) -> None:
    for block in PAGES[name].blocks:
        assert block.language in READERS, f"{block.place}: nobody reads {block.language!r}"
        READERS[block.language](block.text)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for link in page.links:
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), f"{name}: {link}"
        assert not anchor or path.suffix != ".md" or anchor in Page(path).anchors, f"{name}: {link}"


def test_every_guide_is_reached_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in PAGES["README.md"].links}
    assert {f"docs/{name}" for name in PAGES if name not in (*FRONT, "index.md")} | {*FRONT[1:]} <= linked


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    named = [span for span in PAGES[name].spans if FILE.fullmatch(span)]
    assert not [span for span in named if not checks.exists(span) and not checks.exists(f"docs/{span}")]


@pytest.mark.parametrize("name", GUIDES)
def test_calls_that_are_named_exist(name: str) -> None:
    for span in PAGES[name].spans:
        if found := CALL.fullmatch(span):
            methods = [found[1]] if found[1] else ["GET", "POST", "DELETE"]
            assert any(checks.is_route(method, found[2]) for method in methods), f"{name}: {span}"


@pytest.mark.parametrize("name", ["README.md", *GUIDES])
def test_settings_that_are_named_exist(name: str) -> None:
    for span in PAGES[name].spans:
        found = NAME.fullmatch(span)
        if found is None or found[1] in NO_SETTINGS:
            continue
        assert checks.is_variable(found[1]), f"{name}: {span}"
        if found[2] and "..." not in found[2]:
            assert not list(checks.wrong_values({found[1]: found[2]})), f"{name}: {span}"


def shown_requests() -> Iterator[tuple[str, Sequence[str], str | None]]:
    """Every call of this server that is shown: where, its words, and the error that the block after it shows."""
    for page in PAGES.values():
        for block, after in pairwise([*page.blocks, None]):
            assert block is not None  # only the last one has none after it
            refused = after.text if after is not None and after.text.startswith('{"error"') else None
            for command in commands(block.text) if block.language == "sh" else ():
                if command.words[:1] == ("curl",):
                    yield block.place, command.words, refused


def test_requests_are_answered(server: RunningServer) -> None:
    answered = refusals = 0
    for place, words, refused in shown_requests():
        request = curl.request(words[1:])
        if request.url.port == checks.VLLM_PORT or request.form:  # uploads: tests/http/test_batches_in_the_readme.py
            continue
        status, body = status_of([word.replace(request.origin, server.url) for word in words])
        assert status == ("400" if refused else "200"), f"{place}: {body}"
        if refused is not None:
            assert json.loads(body) == json.loads(refused), f"{place}: {body}"
            refusals += 1
        answered += 1
    assert answered > 10
    assert refusals > 1


def status_of(words: Sequence[str]) -> tuple[str, str]:
    """The status and the body that a curl command gets."""
    more = ("--silent", "--show-error", "--write-out", "\n%{http_code}")
    done = subprocess.run([*words, *more], capture_output=True, text=True, timeout=60, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return status, body


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("vecmill serve --prot 80", "No such option: --prot"),
        ("vecmill serve --port eighty", "eighty"),
        ("vecmill serve --max-batch-size 0", "MAX_BATCH_SIZE"),
        ("vecmill sreve", "no command 'sreve'"),
        ("vecmill verify", "Missing"),
        ("MAX_BATCH=3 vecmill serve", "MAX_BATCH is no setting"),
        ("DTYPE=float8 vecmill serve", "DTYPE"),
        ("MEMORY_FLOOR=8", "MEMORY_FLOOR is no setting"),
        ("sudo -u vecmill /opt/vecmill/venv/bin/vecmill serve --prot 80", "No such option"),
        ("true && (vecmill serve --prot 80)", "No such option"),
        ("x=$(vecmill serve --prot 80)", "No such option"),
        ("cat <<END | tee a\n$(vecmill serve --prot 80)\nEND", "No such option"),
        ('make serve ARGS="--prot 80"', "No such option"),
        ("make serv", "no target 'serv'"),
        ("python -m benchmarks.serving.thruput", "no module"),
        ("python -m benchmarks.serving.scaling --rownds 3", "no --rownds"),
        ("python3 deploy.py --statsu", "--statsu"),
        ("sudo python3 deploy.py vllm --rerank-model m", "does not concern vllm"),
        ("python examples/codebase_search.py --querry x", "--querry"),
        ("python examples/code_search.py", "does not exist"),
        ("pip install 'vecmill[parquett]'", "no extra 'parquett'"),
        ("pip install -c constraint.txt vecmill", "there is no constraint.txt"),
        ("pip install --no-deps -r requirements.txt", "there is no requirements.txt"),
        ("curl http://127.0.0.1:8001/v1/embedding", "no GET /v1/embedding"),
        ("curl -X PUT http://127.0.0.1:8001/v1/models", "no PUT /v1/models"),
        ("curl http://127.0.0.1:8002/health", "is not known here"),
        ("curl http://127.0.0.1:8000/v1/rerank", "vLLM's"),
        ("curl http://127.0.0.1:8001/embed -d '{\"inputs\": [}' -H 'Content-Type: application/json'", "no JSON"),
        ("curl http://127.0.0.1:8001/embed -d '{}'", "Content-Type"),
        ("curl --slient http://127.0.0.1:8001/health", "--slient"),
        ("systemctl reload qmd-embd", "'qmd-embd'"),
        ("systemctl relaod qmd-embed", "'relaod'"),
        ("journalctl -u vecmill", "'vecmill'"),
        ("tailscale serve drian svc:qmd-embed", "'drian'"),
        ("tailscale serve --service=svc:qmd-embed --htps=443 127.0.0.1:8001", "--htps"),
        ("docker compose upp", "'upp'"),
        ("docker compose --profle vllm up", "--profle"),
        ("kubectl apply --kustomise docker/k8s/base", "--kustomise"),
        ("tar -cqf a.tar a", "-cqf"),
        ("frobnicate", "'frobnicate' is not known here"),
        ("if true; then", "must be followed"),
    ],
)
def test_a_mistake_is_found(script: str, complaint: str) -> None:
    assert complaint in "\n".join(checks.problems(script))


@pytest.mark.parametrize(
    "script",
    [
        "vecmill serve --port 80 --embed-model a/b,c/d",
        "HF_HUB_OFFLINE=1 PORT=9000 vecmill serve",
        "curl -sS http://127.0.0.1:8001/jobs/4ad6c554c8ff5f17/cancel -X POST",
        "curl http://127.0.0.1:8001/ | cat",
        "sudo systemctl restart qmd-embed tailscaled",
    ],
)
def test_what_is_right_passes(script: str) -> None:
    assert checks.problems(script) == []


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("json", '{"a": }'),
        ("yaml", "a: [b"),
        ("ini", "MEMORY_FLOOR=8\n"),
        ("ini", "MEMORY_FLOOR_GB=much\n"),
        ("nginx", "server { listne 80; }\n"),
        ("nginx", "server { listen 80 }\n"),
        ("nginx", "proxy_pass http://a;\n"),
        ("python", "a = (\n"),
    ],
)
def test_a_block_that_cannot_be_read_is_found(language: str, text: str) -> None:
    with pytest.raises((AssertionError, ValueError, SyntaxError, yaml.YAMLError)):
        READERS[language](text)


def test_a_link_into_nowhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# One `two` (three)\n\n[a](#one-two-three) `[no](link)` [b](other.md#x)\n\n```sh\n# [c](d)\n```\n")
    page = Page(path)
    assert page.anchors == {"one-two-three"}
    assert page.links == ["#one-two-three", "other.md#x"]
