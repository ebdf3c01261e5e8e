"""The compose files, as the real Docker Compose resolves them: profiles, overrides, `.env`, and what they promise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docker.parts import (
    DEFAULTS,
    DOCKER,
    DOCKERFILES,
    OTHERS,
    ROOT,
    SETTINGS,
    compose,
    compose_folder,
    dockerfile,
    output,
    run,
    seconds,
    tool,
)
from vecmill.config import load_settings

PROFILES = {"vllm": {"vllm"}, "ollama": {"ollama"}, "redis": {"redis"}, "monitoring": {"prometheus", "grafana"}}
EXAMPLE = (DOCKER / ".env.example").read_text("utf-8")
EXAMPLES = dict(re.findall(r"^#([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.M))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_folder(tmp_path_factory.mktemp("compose"))


@pytest.fixture(scope="module")
def everything(folder: Path) -> dict[str, Any]:
    composed: dict[str, Any] = compose(folder, "--profile", "*")
    return composed


@pytest.fixture(scope="module")
def vecmill(everything: dict[str, Any]) -> dict[str, Any]:
    service: dict[str, Any] = everything["services"]["vecmill"]
    return service


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_resolves(folder: Path, profile: str) -> None:
    assert set(compose(folder, "--profile", profile)["services"]) == {"vecmill"} | PROFILES[profile]


def test_without_a_profile_it_is_the_server_alone(folder: Path) -> None:
    assert set(compose(folder)["services"]) == {"vecmill"}


def test_what_the_schema_does_not_know_is_refused(folder: Path) -> None:
    (folder / "wrong.yaml").write_text("services: {vecmill: {stop_grace_perod: 45s}}\n", "utf-8")
    with pytest.raises(AssertionError, match="stop_grace_perod"):
        compose(folder, files=("compose.yaml", "wrong.yaml"))


def test_every_variable_is_in_the_example_with_its_default(folder: Path) -> None:
    command = [tool("docker-compose"), "--profile", "*", "config", "--variables", "--format", "json"]
    variables = json.loads(output(command, folder, {"HOME": str(folder)}))
    assert {name: variable["DefaultValue"] for name, variable in variables.items()} == {
        name: EXAMPLES.get(name) for name in variables
    }
    # The rest is the server's, or Compose's own.
    assert EXAMPLES.keys() - variables.keys() <= SETTINGS | OTHERS | {"COMPOSE_PROFILES"}
    assert "HF_TOKEN" in EXAMPLES


def test_settings_in_the_example_are_valid() -> None:
    load_settings({name.lower(): value for name, value in EXAMPLES.items() if name in SETTINGS and value})


def test_settings_of_the_env_file_reach_the_server(tmp_path: Path) -> None:
    folder = compose_folder(tmp_path)
    (folder / ".env").write_text("API_KEY=laptop:a-long-enough-secret\nPORT=1\nHOST=127.0.0.1\nSTATE_DIR=/x\n", "utf-8")
    service = compose(folder)["services"]["vecmill"]
    assert service["environment"]["API_KEY"] == "laptop:a-long-enough-secret"
    image = dockerfile("Dockerfile").environment
    for name in ("PORT", "HOST", "STATE_DIR", "HF_HOME"):
        assert service["environment"][name] == image[name], name


def test_variables_are_settings(vecmill: dict[str, Any]) -> None:
    assert set(vecmill["environment"]) <= SETTINGS | OTHERS


def test_it_is_published_on_this_machine_alone(folder: Path, everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        for port in service.get("ports", ()):
            assert port["host_ip"] == "127.0.0.1", name
    assert "ports" not in everything["services"]["redis"]
    opened = compose(folder, environment={"VECMILL_BIND": "0.0.0.0", "VECMILL_PORT": "9000"})["services"]["vecmill"]
    assert [(port["host_ip"], port["published"], port["target"]) for port in opened["ports"]] == [
        ("0.0.0.0", "9000", int(dockerfile("Dockerfile").one("EXPOSE")))
    ]


def test_it_writes_to_volumes_and_tmp_only(vecmill: dict[str, Any]) -> None:
    mounts = {mount["target"]: mount["type"] for mount in vecmill["volumes"]}
    assert mounts == dict.fromkeys(json.loads(dockerfile("Dockerfile").one("VOLUME")), "volume")
    assert vecmill["read_only"] is True
    assert vecmill["tmpfs"] == ["/tmp"]


def test_it_has_no_rights_to_lose(everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
    for name in ("vecmill", "redis", "prometheus", "grafana"):
        assert everything["services"][name]["cap_drop"] == ["ALL"], name


def test_no_limit_of_memory_pretends_to_protect(everything: dict[str, Any]) -> None:
    for service in everything["services"].values():
        assert "mem_limit" not in service
        assert "limits" not in service.get("deploy", {}).get("resources", {})


def test_it_is_stopped_only_after_it_has_drained(vecmill: dict[str, Any]) -> None:
    assert vecmill["init"] is True
    assert seconds(vecmill["stop_grace_period"]) > DEFAULTS["SHUTDOWN_SECONDS"]


def test_a_first_start_may_download(vecmill: dict[str, Any]) -> None:
    assert seconds(vecmill["healthcheck"]["start_period"]) >= 16e9 * 8 / 100e6
    assert "test" not in vecmill["healthcheck"], "the image has it"


def _reservations(service: dict[str, Any]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = (
        service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    )
    return devices


def test_a_gpu_is_reserved(everything: dict[str, Any]) -> None:
    for name in ("vecmill", "vllm", "ollama"):
        (device,) = _reservations(everything["services"][name])
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


def test_without_a_gpu_there_is_an_override(folder: Path) -> None:
    service = compose(folder, files=("compose.yaml", "compose.cpu.yaml"))["services"]["vecmill"]
    assert _reservations(service) == []
    assert service["build"]["args"]["BUNDLED"] == "1"
    assert service["read_only"] is True


@pytest.mark.parametrize("name", DOCKERFILES)
def test_it_is_built_from_files_that_are_there(folder: Path, name: str) -> None:
    build = compose(folder, environment={"VECMILL_DOCKERFILE": f"docker/{name}"})["services"]["vecmill"]["build"]
    assert Path(build["context"]) == folder.parent, "the root of the repository"
    assert (ROOT / build["dockerfile"]) == DOCKER / name
    assert set(build["args"]) <= dockerfile(name).build_arguments
    cpu = compose(folder, files=("compose.yaml", "compose.cpu.yaml"))["services"]["vecmill"]["build"]
    assert set(cpu["args"]) <= dockerfile("Dockerfile").build_arguments


def _grafana(everything: dict[str, Any], password: str) -> tuple[int, str]:
    """What its container does with a password, until it would start Grafana itself, which is not here."""
    program, *arguments = everything["services"]["grafana"]["entrypoint"]
    script = arguments[-1].replace("$$", "$")  # Compose writes it as a compose file has it
    done = run([program, "-c", script], environment={"GF_SECURITY_ADMIN_PASSWORD": password})
    return done.returncode, done.stderr


@pytest.mark.parametrize("password", ["", "admin"])
def test_grafana_has_no_password_that_everybody_knows(everything: dict[str, Any], password: str) -> None:
    code, said = _grafana(everything, password)
    assert code == 1
    assert "GRAFANA_PASSWORD" in said
    assert everything["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == ""


def test_grafana_starts_with_a_password(everything: dict[str, Any]) -> None:
    code, said = _grafana(everything, "correct horse")
    assert code == 127
    assert "/run.sh" in said


@pytest.mark.parametrize("name", ["vllm", "ollama"])
def test_generators_start_when_the_server_has_its_memory(everything: dict[str, Any], name: str) -> None:
    service = everything["services"][name]
    assert service["depends_on"]["vecmill"]["condition"] == "service_healthy"
    (port,) = service["ports"]
    assert f"GENERATION_URL=http://{name}:{port['target']}" in EXAMPLE


def test_vllm_takes_a_share_of_the_memory_that_is_said(everything: dict[str, Any]) -> None:
    command = everything["services"]["vllm"]["command"]
    assert "--gpu-memory-utilization=0.2" in command
    assert "Qwen/Qwen3-4B" in command
    assert "--port=8000" in command


def test_ollama_keeps_its_model_for_half_an_hour(everything: dict[str, Any]) -> None:
    assert everything["services"]["ollama"]["environment"]["OLLAMA_KEEP_ALIVE"] == "30m"
    assert [port["target"] for port in everything["services"]["ollama"]["ports"]] == [11434]


def test_redis_drops_vectors_and_never_jobs(everything: dict[str, Any], vecmill: dict[str, Any]) -> None:
    command = everything["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory"] == "4gb"
    assert options["--maxmemory-policy"] == "volatile-lru"
    assert options["--appendonly"] == "yes"
    assert EXAMPLES["REDIS_URL"] == "redis://redis:6379/0"
    assert vecmill["depends_on"]["redis"] == {"condition": "service_healthy", "required": False}


def test_volumes_and_mounted_files_are_there(folder: Path, everything: dict[str, Any]) -> None:
    used = set()
    for service in everything["services"].values():
        for mount in service.get("volumes", ()):
            if mount["type"] == "volume":
                used.add(mount["source"])
            else:
                assert Path(mount["source"]).exists(), mount["source"]
                assert mount["read_only"] is True
    assert used == set(everything["volumes"])
    for secret in everything["secrets"].values():
        assert Path(secret["file"]).is_file()
