"""A run of every check on this machine, and what a run promises."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_port
from tests.tools.doctor.command_line import COMMAND, check, doctor, doctor_process
from vecmill import __version__
from vecmill.tools.doctor import checks
from vecmill.tools.doctor.run import CHECKS

SECRETS = {
    "HF_TOKEN": "hf_verysecrettoken",
    "API_KEY": "me:a-quite-secret-key",
    "ADMIN_API_KEY": "another-quite-secret",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All checks, as a process with settings of its own finds them."""
    folder = tmp_path_factory.mktemp("whole")
    environment = {
        "STATE_DIR": str(folder / "state"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PORT": str(free_port()),
        "TORCH_COMPILE": "auto",
        "CACHE_MAX_BYTES": "1000000",
        "MAX_FILES_BYTES": "1000000",
        **SECRETS,
    }
    ended = doctor_process("--json", environment=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    assert not any(secret.rpartition(":")[2] in ended.stdout for secret in SECRETS.values())
    assert not (folder / "state").exists()
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.nightly
def test_the_object_has_every_check_in_order(whole: dict[str, Any]) -> None:
    assert set(whole) == {"version", "ok", "checks"}
    assert (whole["version"], whole["ok"]) == (__version__, True)
    assert [entry["name"] for entry in whole["checks"]] == list(CHECKS)
    for entry in whole["checks"]:
        assert set(entry) == {"name", "status", "seen", "cure", "details", "seconds"}
        assert entry["status"] in ("ok", "warn"), entry
        assert entry["seen"], entry
        assert (entry["cure"] is not None) >= (entry["status"] == "warn"), entry


@pytest.mark.nightly
def test_nothing_takes_long(whole: dict[str, Any]) -> None:
    assert sum(entry["seconds"] for entry in whole["checks"]) < 60


@pytest.mark.nightly
def test_what_the_probes_measure_here(whole: dict[str, Any]) -> None:
    results = {entry["name"]: entry for entry in whole["checks"]}
    assert results["matmul"]["details"]["tflops"] > 0
    assert results["attention"]["details"]["largest_difference"] < 0.0001
    assert results["attention"]["details"]["speedup"] > 0
    assert results["compile"]["seen"].startswith("TORCH_COMPILE=auto: not needed on a CPU")
    assert results["memory"]["details"]["weights_bytes"] == 22_713_728 * 2
    assert "all-MiniLM-L6-v2: 90.9 MB in" in results["models"]["seen"]
    assert results["models"]["details"]["token"] == "HF_TOKEN"


def test_lines_for_people_and_a_summary() -> None:
    ended = doctor("--only", "port,python", PORT=str(free_port()))
    assert ended.exit_code == 0
    first, second, empty, last = ended.stdout.splitlines()
    assert first.startswith("python      ok    Python 3.")
    assert second.startswith("port        ok    HOST=127.0.0.1 PORT=")
    assert (empty, last) == ("", "2 ok, 0 warnings, 0 failed")


def test_a_cure_stands_below_what_it_cures() -> None:
    with taken_port() as port:
        ended = doctor("--only", "port", PORT=str(port))
    assert ended.exit_code == 1
    first, second, _, last = ended.stdout.splitlines()
    assert first.startswith("port        fail  HOST=127.0.0.1")
    assert second.startswith("                  cure: sudo ss -ltnp")
    assert last == "0 ok, 0 warnings, 1 failed"


def test_a_cure_that_points_to_another_check_gives_its_name() -> None:
    """Most of these cures need a broken machine to be seen, so they are read where they are written."""
    sources = [path.read_text() for path in Path(checks.__file__).parent.glob("*.py")]
    pointers = [pointer for source in sources for pointer in re.findall(r"\b[Ss]ee the (check(?!s\b)\w* \w+)", source)]
    assert len(pointers) >= 6
    assert set(pointers) <= {f"check {name}" for name in CHECKS}


def test_the_memory_gate_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['doctor', '--only', 'memory', '--wait', '60']; from vecmill.__main__ import main"
    )
    code += "\ntry: main()\nfinally: sys.exit(99 if {'torch', 'fastapi'} & sys.modules.keys() else 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "memory      ok" in ended.stdout


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (["--only", "memory,no-such"], {}, "no check no-such. There are: python, torch, driver,"),
        (["--only", ","], {}, "no check is named"),
        ([], {"DTYPE": "float99"}, "DTYPE='float99'"),
        (["--env-file", "/nowhere/at/all"], {}, "/nowhere/at/all"),
        (["--no-such-flag"], {}, "No such option"),
    ],
)
def test_wrong_options_and_settings(options: list[str], environment: dict[str, str], reason: str) -> None:
    ended = doctor(*options, **environment)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    assert reason in " ".join(ended.stderr.split())


def test_the_env_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "embed.env"
    file.write_text("PORT=0\n")
    assert "a free port is taken" in doctor("--only", "port", "--env-file", str(file)).stdout


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(context: object) -> None:
        raise ValueError("of the kind\nthat nobody thought of")

    monkeypatch.setitem(CHECKS, "port", breaks)
    result = check("port")
    assert (result["status"], result["seen"]) == ("fail", "the check itself failed: ValueError: of the kind")


@contextmanager
def taken_port() -> Iterator[int]:
    """A port on which another program listens and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


@contextmanager
def started(*options: str, port: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, *options], env={**os.environ, "PORT": str(port)}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_waiting_ends_when_what_failed_is_well() -> None:
    with ExitStack() as stack:
        with taken_port() as port:
            process = stack.enter_context(started("--only", "python,port", "--wait", "60", port=port))
            assert process.stdout is not None
            before = next(line for line in process.stdout if line.startswith("waiting"))
        after = process.stdout.readlines()  # the port is free now
        assert process.wait(30) == 0
    assert before.startswith("waiting for port, ")
    assert [line.split()[:2] for line in after] == [["port", "ok"], [], ["2", "ok,"]]


def test_ctrl_c_prints_what_there_is() -> None:
    with taken_port() as port, started("--only", "python,port", "--wait", "60", port=port) as process:
        assert process.stdout is not None
        lines = [next(process.stdout) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        assert process.wait(30) == 130
    assert lines[0].startswith("python      ok")
    assert lines[-1] == "stopped; 1 ok, 0 warnings, 1 failed\n"
