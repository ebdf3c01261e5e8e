"""Other programs: the compiler, Tailscale, Docker, proxies. Executables in their place answer as the real ones do."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RunningServer, free_port
from tests.tools.doctor.command_line import check, checks
from tests.tools.proxy_config.proxies import program, written
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
    assert wanted["status"] == "fail"
    assert "a C++ compiler not found" in wanted["seen"]
    assert wanted["cure"].startswith("sudo apt install g++, or set TORCH_COMPILE=false")
    assert check("compile", TORCH_COMPILE="auto")["seen"].startswith("TORCH_COMPILE=auto: not needed on a CPU")
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


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where the configurations of both proxies are."""
    found = {name: tmp_path / f"{name}.conf" for name in programs.PLACES}
    monkeypatch.setattr(programs, "PLACES", {name: str(place) for name, place in found.items()})
    return found


def test_no_proxy_is_needed_for_one_server(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "BESIDE_PATH", str(path))
    found = check("proxies")
    assert (found["status"], "neither HAProxy nor nginx" in found["seen"]) == ("ok", True)


@pytest.mark.parametrize(
    ("name", "script", "seen"),
    [
        ("haproxy", "echo 'HAProxy version 2.4.22-0ubuntu0.22.04.3 2023/12/04'", "haproxy 2.4 is too old"),
        ("nginx", "echo 'nginx version: nginx/1.14.2' >&2", "nginx 1.14 is too old"),
        ("nginx", "echo 'no such library' >&2; exit 127", "no such library"),
    ],
)
def test_proxies_that_are_of_no_use(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str, seen: str
) -> None:
    monkeypatch.setattr(programs, "BESIDE_PATH", str(path))
    monkeypatch.setenv("PATH", f"{path}:/bin")
    put(path, name, script)
    (path / ({"haproxy", "nginx"} - {name}).pop()).unlink(missing_ok=True)
    found = check("proxies")
    assert (found["status"], seen in found["seen"]) == ("warn", True), found


def test_another_configuration_is_none_of_ours(places: dict[str, Path]) -> None:
    program("haproxy")
    places["haproxy"].write_text("global\n")
    found = check("proxies")
    assert found["status"] == "ok"
    assert "is not one of `vecmill proxy-config`" in found["seen"]


def test_a_proxy_before_servers(places: dict[str, Path], server: RunningServer) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    program("haproxy")
    places["haproxy"].write_text(written("haproxy", [server.url]))
    well = check("proxies", TRUSTED_PROXIES="127.0.0.1")
    assert (well["status"], "before 1 servers, 1 of 1 ready" in well["seen"]) == ("ok", True), well
    one_client = check("proxies")
    assert (one_client["status"], "TRUSTED_PROXIES" in one_client["cure"]) == ("warn", True)
    places["haproxy"].write_text(written("haproxy", [server.url, nobody]))
    unready = check("proxies", TRUSTED_PROXIES="127.0.0.1")
    assert (unready["status"], unready["details"]["unready"]) == ("warn", [nobody.removeprefix("http://")])
    places["haproxy"].write_text(written("haproxy", [server.url]).replace("balance leastconn", "balance wrongly"))
    wrong = check("proxies", TRUSTED_PROXIES="127.0.0.1")
    assert (
        wrong["status"],
        "balance only supports" in wrong["seen"],
        "haproxy -c -f" in wrong["cure"],
    ) == ("warn", True, True), wrong


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_the_servers_of_a_configuration_are_found_in_it(kind: str) -> None:
    urls = ["http://10.0.0.1:8001", "http://spark-b:8001", "http://[fd7a::1]:8001"]
    assert programs.replicas_of(written(kind, urls)) == [url.removeprefix("http://") for url in urls]


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
