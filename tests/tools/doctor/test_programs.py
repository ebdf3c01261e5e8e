"""Other programs: the compiler, Tailscale, Docker. Executables in their place answer as the real ones do."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.tools.doctor.command_line import check, checks
from vecmill.tools.doctor import context
from vecmill.tools.doctor.checks import programs
from vecmill.tools.doctor.findings import FindingStatus

CONNECTED: dict[str, Any] = {
    "BackendState": "Running",
    "Self": {"DNSName": "spark.tail1234.ts.net."},
    "CertDomains": ["spark.tail1234.ts.net"],
}
SERVICE = {
    "Services": {
        "svc:qmd-embed": {
            "TCP": {"443": {"HTTPS": True}},
            "Web": {"qmd-embed.tail1234.ts.net:443": {"Handlers": {"/": {"Proxy": "http://127.0.0.1:8001"}}}},
        }
    }
}
NODE = {"Web": {"spark.tail1234.ts.net:443": {"Handlers": {"/": {"Proxy": "http://127.0.0.1:8001"}}}}}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def test_what_is_not_installed_is_not_needed(path: Path) -> None:
    results = checks("tailscale", "docker")
    assert [(result["status"], result["seen"]) for result in results.values()] == [
        ("ok", "not installed, and not needed")
    ] * 2


def test_no_compiler(path: Path) -> None:
    wanted = check("compile", TORCH_COMPILE="true")
    measured = check("compile", TORCH_COMPILE="auto")
    assert (wanted["status"], measured["status"]) == ("fail", "warn")
    assert "a C++ compiler not found" in wanted["seen"]
    assert measured["cure"].startswith("sudo apt install g++, or set TORCH_COMPILE=false")
    assert check("compile", TORCH_COMPILE="false")["seen"] == "TORCH_COMPILE=false: not needed"


def test_tailscale_that_serves_the_port(path: Path) -> None:
    put(path, "tailscale", f"""[ "$1" = serve ] && echo '{json.dumps(SERVICE)}' || echo '{json.dumps(CONNECTED)}'""")
    served = check("tailscale", PORT="8001")
    other = check("tailscale", PORT="8002")
    assert served["seen"] == "connected as spark.tail1234.ts.net; qmd-embed.tail1234.ts.net:443 leads to port 8001"
    assert (served["status"], other["status"]) == ("ok", "ok")
    assert "port 8002 is not served to the tailnet" in other["seen"]


@pytest.mark.parametrize(
    ("script", "seen", "cure"),
    [
        ("""echo '{"BackendState": "NeedsLogin"}'""", "not connected (NeedsLogin)", "sudo tailscale up"),
        ("echo 'failed to connect to local tailscaled' >&2; exit 1", "failed to connect", "systemctl start tailscaled"),
    ],
)
def test_tailscale_that_is_not_connected(path: Path, script: str, seen: str, cure: str) -> None:
    put(path, "tailscale", script)
    result = check("tailscale")
    assert (result["status"], seen in result["seen"], cure in result["cure"]) == ("warn", True, True), result


def test_tailscale_without_https() -> None:
    finding = programs.judge_tailscale({**CONNECTED, "CertDomains": None}, NODE, 8001)
    assert (finding.status, "HTTPS is off" in finding.seen) == (FindingStatus.WARN, True)
    assert programs.judge_tailscale(CONNECTED, NODE, 8001).status is FindingStatus.OK


def test_docker(path: Path) -> None:
    info = {"ServerVersion": "28.5.1", "Runtimes": {"runc": {}, "nvidia": {}}}
    put(path, "docker", f"echo '{json.dumps(info)}'")
    assert check("docker")["seen"] == "engine 28.5.1 answers"
    put(path, "docker", """echo '{"ServerVersion": "", "ServerErrors": ["permission denied"]}'; exit 1""")
    away = check("docker")
    assert (away["status"], "permission denied" in away["seen"]) == ("warn", True)
    assert programs.judge_docker(info, has_gpu=True).status is FindingStatus.OK
    without = programs.judge_docker({**info, "Runtimes": {"runc": {}}}, has_gpu=True)
    assert (without.status, "nvidia-ctk runtime configure" in str(without.cure)) == (FindingStatus.WARN, True)


def test_a_program_that_does_not_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "COMMAND_SECONDS", 0.2)
    put(path, "docker", "exec /bin/sleep 60")
    assert "did not answer within" in check("docker")["seen"]


def test_a_program_that_cannot_be_run(path: Path) -> None:
    (path / "docker").write_bytes(b"\x7fELF of another machine")
    (path / "docker").chmod(0o755)
    assert "cannot be run (Exec format error)" in check("docker")["seen"]


STATUS_OF_RAY = """
======== Autoscaler status: 2026-11-26 19:00:00 ========
Total Usage:
 1.5/16.0 CPU
 0.5/2.0 GPU
 0B/9.31GiB memory
Resources
"""


@pytest.mark.parametrize(
    ("installed", "status", "has_gpu", "found", "seen"),
    [
        ("2.60.0", None, True, "ok", "no cluster runs here"),
        ("2.60.0", STATUS_OF_RAY, True, "ok", "a cluster answers, with 2 GPUs, 0.5 in use"),
        ("2.61.1", STATUS_OF_RAY.replace("0.5/2.0 GPU", ""), False, "ok", "with 0 GPUs"),
        ("2.61.1", STATUS_OF_RAY.replace("0.5/2.0 GPU", ""), True, "warn", "though this machine has one"),
        ("2.9.3", STATUS_OF_RAY, True, "warn", "older than 2.60"),
    ],
)
def test_ray_by_its_version_and_its_status(
    installed: str, status: str | None, has_gpu: bool, found: str, seen: str
) -> None:
    finding = programs.judge_ray(installed, status, has_gpu=has_gpu)

    assert (finding.status.value, seen in finding.seen) == (found, True), finding


def test_the_redis_of_the_head_node_is_reached_or_not(unused_tcp_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reached = list(programs.judge_redis_of_ray({"RAY_REDIS_ADDRESS": f"127.0.0.1:{listener.getsockname()[1]}"}))
    gone = [
        *programs.judge_redis_of_ray({"RAY_REDIS_ADDRESS": f"redis://127.0.0.1:{unused_tcp_port}"}),
        *programs.judge_redis_of_ray({"RAY_REDIS_ADDRESS": "no address"}),
    ]

    assert [finding.status for finding in reached] == [FindingStatus.OK]
    assert [finding.status for finding in gone] == [FindingStatus.FAIL] * 2
    assert all(finding.cure for finding in gone)
    assert list(programs.judge_redis_of_ray({})) == []
