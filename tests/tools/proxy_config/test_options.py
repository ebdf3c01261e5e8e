"""`vecmill proxy-config`: what it takes, what it refuses in one sentence, and what the proxies say of its files."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.api_document import DOCUMENT
from tests.tools.proxy_config.proxies import KINDS, check, written
from vecmill.__main__ import cli
from vecmill.config import load_settings

each_kind = pytest.mark.parametrize("kind", KINDS)
A, B = "http://10.0.0.1:8001", "http://10.0.0.2:8001"


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["proxy-config", *words])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its key in the same file, as HAProxy wants it."""
    folder = tmp_path_factory.mktemp("tls")
    key, path = folder / "key.pem", folder / "both.pem"
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=a -keyout {key}"
    )
    made = subprocess.run(command.split(), capture_output=True, check=True)
    path.write_bytes(made.stdout + key.read_bytes())
    return path


VALID: list[tuple[Sequence[str], Sequence[str]]] = [
    ([A], []),
    ([A, B], ["--listen", "*:8080"]),
    (["http://[fd7a:115c::1]:8001", "http://localhost"], ["--listen", "[::1]:8080"]),
    (["http://127.0.0.1:8001/"], ["--request-timeout", "30", "--max-connections", "100"]),
    ([f"http://127.0.0.1:{port}" for port in range(9000, 9100)], ["--max-body-bytes", "1000000"]),
]


@each_kind
@pytest.mark.parametrize(("replicas", "options"), VALID)
def test_the_proxies_take_it(kind: str, replicas: Sequence[str], options: Sequence[str], tmp_path: Path) -> None:
    assert check(kind, tmp_path, written(kind, replicas, *options)) == ""


@each_kind
def test_with_tls(kind: str, certificate: Path, tmp_path: Path) -> None:
    text = written(kind, [A], "--tls-certificate", str(certificate), "--listen", "*:8443")
    assert check(kind, tmp_path, text) == ""
    broken = text.replace(str(certificate), str(tmp_path / "none.pem"))
    assert "none.pem" in check(kind, tmp_path, broken)


def test_replicas_over_tls_are_verified(tmp_path: Path) -> None:
    text = written("haproxy", ["https://localhost:8443"])
    assert check("haproxy", tmp_path, text) == ""
    assert "verify required" in text


HOSTILE = [
    "",
    " ",
    "spark-a",
    "spark-a:8001",
    "ftp://a:1",
    "http://",
    "http://:8001",
    "http://a b:8001",
    "http://a:8001\n    server evil 6.6.6.6:80",
    "http://a:8001\r",
    "http://a\t:8001",
    "http://a;b:8001",
    "http://a{}:8001",
    "http://a'b:8001",
    'http://a"b:8001',
    "http://a#b:8001",
    "http://a%0a:8001",
    "http://$HOME:8001",
    "http://a\\b:8001",
    "http://-a:8001",
    "http://a..b:8001",
    f"http://{'a' * 64}:8001",
    f"http://{'a.' * 140}b:8001",
    "http://ümlaut:8001",
    "http://a:0",
    "http://a:65536",
    "http://a:99999999999",
    "http://a:-1",
    "http://a:",
    "http://a:8001x",
    "http://user:secret@a:8001",
    "http://a:8001/v1",
    "http://a:8001?x",
    "http://a:8001#x",
    "http://0.0.0.0:8001",
    "http://[::]:8001",
    "http://[fe80::1%eth0]:8001",
    "http://[::1:8001",
    "http://::1:8001",
    "http://300.1.1.1:8001",
    "http://1.2.3:8001",
    "http://" + "x" * 10_000,
]


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_replicas_are_refused_in_one_sentence(url: str) -> None:
    refused(run("haproxy", "--replica", A, "--replica", url), "--replica")


WRONG: list[tuple[Sequence[str], str]] = [
    (["apache", "--replica", A], "haproxy or nginx"),
    ([], "no --replica"),
    (["nginx"], "no --replica"),
    (["--replica", A, "--replica", "http://10.0.0.1:8001/"], "twice"),
    (["--replica", "http://Spark-A:80", "--replica", "http://spark-a"], "twice"),
    (["--replica", "http://[::1]:80", "--replica", "http://[0:0::1]"], "twice"),
    (["--replica", A, "--listen", "8080"], "--listen"),
    (["--replica", A, "--listen", "spark-a:8080"], "--listen"),
    (["--replica", A, "--listen", "10.0.0.9:0"], "--listen"),
    (["--replica", A, "--listen", "10.0.0.9:99999"], "--listen"),
    (["--replica", A, "--listen", "::1:8080"], "--listen"),
    (["--replica", A, "--listen", "[10.0.0.9]:8080"], "--listen"),
    (["--replica", A, "--listen", "*:80;}"], "--listen"),
    (["--replica", "http://127.0.0.1:8080"], "another port"),
    (["--replica", "http://localhost:8080", "--listen", "*:8080"], "another port"),
    (["--replica", A, "--tls-key", "/a.pem"], "--tls-certificate"),
    (["--replica", A, "--tls-certificate", "a.pem"], "absolute path"),
    (["--replica", A, "--tls-certificate", "/a b.pem"], "absolute path"),
    (["--replica", A, "--tls-certificate", "/a.pem;"], "absolute path"),
    (["--replica", A, "--tls-certificate", "/a.pem\n"], "absolute path"),
    (["--replica", A, "--tls-certificate", "/a.pem", "--tls-key", "/b.pem"], "/a.pem.key"),
    (["nginx", "--replica", "https://spark-a"], "haproxy"),
    (["--replica", A, "--request-timeout", "0"], "--request-timeout"),
    (["--replica", A, "--request-timeout", "nan"], "--request-timeout"),
    (["--replica", A, "--max-body-bytes", "1"], "--max-body-bytes"),
    (["--replica", A, "--max-file-bytes", "-5"], "--max-file-bytes"),
    (["--replica", A, "--max-connections", "0"], "--max-connections"),
    (["--replica", A, "--run-as", "root; daemon"], "--run-as"),
    (["--replica", A, "--output", "/"], "--output"),
    (["--replica", A, "--output", "/none/such/file"], "--output"),
    (["--replica", A, "--output", "a\0b"], "--output"),
    ([word for port in range(1, 1002) for word in ("--replica", f"http://10.0.0.1:{port}")], "at most"),
]


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_wrong_options_are_refused_in_one_sentence(words: Sequence[str], says: str) -> None:
    refused(run(*words), says)


def refused(result: Result, says: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("vecmill: ")
    assert line.endswith(".")
    assert line.isprintable()
    assert len(line) < 1000
    assert "secret" not in line or "secret@" in " ".join(HOSTILE)


def test_a_file_is_overwritten_only_where_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text("mine")
    refused(run("--replica", A, "-o", str(path)), "--force")
    assert path.read_text() == "mine"
    assert run("--replica", A, "-o", str(path), "--force").exit_code == 0
    assert "10.0.0.1:8001" in path.read_text()
    assert run("--replica", B, "-o", str(path)).exit_code == 0
    assert "10.0.0.2:8001" in path.read_text()
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_replica_keeps_its_place_when_others_come_and_go() -> None:
    def numbers(*urls: str) -> dict[str, str]:
        return dict(re.findall(r"server (\S+) .* id (\d+)", written("haproxy", urls)))

    assert numbers(A, B)["10.0.0.2:8001"] == numbers(B)["10.0.0.2:8001"]
    assert len(set(numbers(*(f"http://10.0.0.1:{port}" for port in range(1, 1001))).values())) == 1000


@each_kind
def test_limits_and_timeouts_are_the_servers_defaults(kind: str) -> None:
    settings, text = load_settings({}), written(kind, [A])
    assert f"{settings.http.max_body_bytes}" in text
    assert f"{settings.batches.max_file_bytes + 65_536}" in text
    answer = {"haproxy": r"timeout server (\d+)s", "nginx": r"proxy_read_timeout (\d+)s"}[kind]
    (seconds,) = {int(found) for found in re.findall(answer, text)}
    assert seconds > settings.scheduler.request_timeout
    longer = written(kind, [A], "--request-timeout", "1000")
    assert int(re.findall(answer, longer)[0]) > 1000


@each_kind
def test_every_call_that_changes_something_is_state(kind: str) -> None:
    """What is not is a pure function of its body, so it may be sent again. A new route must be looked at here."""
    pure = {
        "/", "/api/embed", "/api/embeddings", "/api/show", "/decode", "/detokenize", "/embed", "/embed_all",
        "/embed_sparse", "/embedding", "/embeddings", "/predict", "/rerank", "/reranking", "/score", "/similarity",
        "/tokenize", "/v1/chat/completions", "/v1/completions", "/v1/embed", "/v1/embeddings", "/v1/ranking",
        "/v1/rerank", "/v1/reranking", "/v1/retrieval/nvidia/reranking",
        "/v1/retrieval/nvidia/{hosted_model}/reranking", "/v1/score", "/v2/embed", "/v2/rerank", "/vectors",
    }  # fmt: skip
    changing = {path for path, calls in DOCUMENT["paths"].items() if {"post", "delete"} & set(calls)} - pure
    # The pattern that is in the configuration, as Python reads it.
    (pattern,) = {
        "haproxy": re.findall(r"acl state path_reg (\S+)", written(kind, [A])),
        "nginx": re.findall(r'"~\^\[A-Z\]\+ (/\S+)" state', written(kind, [A])),
    }[kind]
    assert not [path for path in changing if not re.match(pattern, path)]
    assert not [path for path in pure if re.match(pattern, path)]


def test_a_dash_is_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["proxy-config", "--replica", "http://10.0.0.1:8001", "-o", "-"])
    assert (done.exit_code, list(tmp_path.iterdir())) == (0, [])
    assert done.stdout.startswith("# Written by")
