"""The manifests, as kubectl renders them: the API's schemas, and whether their parts fit each other and the image."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import redis
import yaml

import vecmill
from tests.api_document import DOCUMENT
from tests.docker.parts import DEFAULTS, DOCKER, K8S, OTHERS, SETTINGS, dockerfile, manifests, of_kind, selected
from tests.redis_server import redis_server
from vecmill.config import load_settings
from vecmill.models.source import GPU_DEFAULTS
from vecmill.serve.stopping import CLOSING_SECONDS

VERSION = "1.37"
FOLDERS = ("base", "overlays/single-node", "overlays/replicas", "overlays/replicas-keda")
RAY = "overlays/ray"
EVERY = (*FOLDERS, RAY)
OPERATOR = {"ServiceMonitor", "PrometheusRule"}
# Of KubeRay 1.7, https://github.com/ray-project/kuberay/blob/v1.7.0/ray-operator/config/crd/bases/ray.io_rayservices.yaml:
# version v1 without descriptions; what the API itself defines, as the templates of pods, is left open.
RAY_SERVICE = Path(__file__).with_name("rayservice.schema.json")
CLUSTER_WIDE = {"Namespace"}

each_folder = pytest.mark.parametrize("folder", FOLDERS)
every_folder = pytest.mark.parametrize("folder", EVERY)


def _server(folder: str) -> dict[str, Any]:
    return of_kind(manifests(folder), "StatefulSet")["vecmill"]


def _pod(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = _server(folder)["spec"]["template"]["spec"]
    return found


def _container(folder: str) -> dict[str, Any]:
    (container,) = _pod(folder)["containers"]
    found: dict[str, Any] = container
    return found


def _settings(folder: str) -> dict[str, str]:
    """What the pods get from their ConfigMap, by the name that they ask for."""
    (name,) = [source["configMapRef"]["name"] for source in _container(folder)["envFrom"] if "configMapRef" in source]
    found: dict[str, str] = of_kind(manifests(folder), "ConfigMap")[name]["data"]
    return found


def _labels(workload: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def _workloads(folder: str) -> list[dict[str, Any]]:
    return [one for one in manifests(folder) if one["kind"] in ("StatefulSet", "Deployment")]


@every_folder
def test_every_object_is_what_the_api_takes(folder: str) -> None:
    from cloudcoil.models.keda import v1alpha1 as keda  # seconds to import, for this test alone
    from cloudcoil.models.prometheus_operator import v1 as operator

    for one in manifests(folder):
        if one["kind"] == "RayService":
            check_ray_service(one)
        elif one["kind"] in OPERATOR or one["kind"] == "ScaledObject":
            # These types drop fields that they do not know: none may be lost.
            parsed = getattr(operator if one["kind"] in OPERATOR else keda, one["kind"]).model_validate(one)
            assert json.loads(parsed.model_dump_json(by_alias=True, exclude_unset=True)) == one
        else:
            kubernetes_validate.validate(one, VERSION, strict=True)


def check_ray_service(one: dict[str, Any]) -> None:
    """By KubeRay's own schema, and each template of pods by the API's."""
    jsonschema.validate(one, json.loads(RAY_SERVICE.read_text("utf-8")))
    for template in _ray_templates(one):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def _ray_templates(one: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = one["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def _ray_service() -> dict[str, Any]:
    return of_kind(manifests(RAY), "RayService")["vecmill"]


@pytest.mark.parametrize(
    "path", [("spec",), ("spec", "rayClusterConfig"), ("spec", "rayClusterConfig", "headGroupSpec")]
)
def test_a_field_that_kuberay_does_not_know_is_refused(path: tuple[str, ...]) -> None:
    wrong = deepcopy(_ray_service())
    part = wrong
    for name in path:
        part = part[name]
    part["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        check_ray_service(wrong)


def test_a_field_of_its_pods_that_the_api_does_not_know_is_refused() -> None:
    wrong = deepcopy(_ray_service())
    _ray_templates(wrong)[1]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="container"):
        check_ray_service(wrong)


def test_a_field_that_the_api_does_not_know_is_refused() -> None:
    wrong = {**_server("base"), "spec": {**_server("base")["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


@every_folder
def test_all_is_in_one_namespace(folder: str) -> None:
    objects = manifests(folder)
    assert set(of_kind(objects, "Namespace")) == {"vecmill"}
    assert {one["metadata"].get("namespace") for one in objects if one["kind"] not in CLUSTER_WIDE} == {"vecmill"}


@each_folder
def test_the_settings_are_settings(folder: str) -> None:
    settings = _settings(folder)
    assert set(settings) <= SETTINGS | OTHERS
    load_settings({name.lower(): value for name, value in settings.items() if name in SETTINGS})


@each_folder
def test_keys_come_from_a_secret_that_need_not_be_there(folder: str) -> None:
    assert {"secretRef": {"name": "vecmill", "optional": True}} in _container(folder)["envFrom"]
    assert not of_kind(manifests(folder), "Secret"), "no secret is in the repository"


@each_folder
def test_probes_ask_paths_that_are_there(folder: str) -> None:
    paths = DOCUMENT["paths"]
    container = _container(folder)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": int(dockerfile("Dockerfile").one("EXPOSE"))}
    asked = {}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container[kind]["httpGet"]
        assert "get" in paths[probe["path"]]
        assert probe["port"] in ports
        asked[kind] = probe["path"]
    assert asked == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


@each_folder
def test_a_first_start_may_download(folder: str) -> None:
    probe = _container(folder)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 16e9 * 8 / 100e6


@each_folder
def test_a_pod_is_killed_only_after_it_has_drained(folder: str) -> None:
    shutdown = int(_settings(folder).get("SHUTDOWN_SECONDS", DEFAULTS["SHUTDOWN_SECONDS"]))
    before = _container(folder)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert _pod(folder)["terminationGracePeriodSeconds"] >= before + shutdown + CLOSING_SECONDS


@each_folder
def test_everything_written_is_on_a_volume(folder: str) -> None:
    image = dockerfile("Dockerfile")
    mounts = {mount["mountPath"]: mount["name"] for mount in _container(folder)["volumeMounts"]}
    assert set(mounts) == {*json.loads(image.one("VOLUME")), "/tmp"}
    claimed = {claim["metadata"]["name"] for claim in _server(folder)["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in _pod(folder)["volumes"]}
    assert claimed | volumes == set(mounts.values())
    assert not claimed & volumes
    claims = of_kind(manifests(folder), "PersistentVolumeClaim")
    for volume in (volume for one in _workloads(folder) for volume in one["spec"]["template"]["spec"]["volumes"]):
        assert "emptyDir" in volume or volume["persistentVolumeClaim"]["claimName"] in claims


@each_folder
def test_containers_have_no_rights_to_lose(folder: str) -> None:
    for workload in _workloads(folder):
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    user = int(dockerfile("Dockerfile").one("USER").partition(":")[0])
    context = _pod(folder)["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, user, user)


@each_folder
def test_a_gpu_is_asked_for_and_no_limit_of_memory_pretends_to_protect(folder: str) -> None:
    resources = _container(folder)["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": 1}
    assert resources["requests"]["nvidia.com/gpu"] == 1


@each_folder
def test_images_are_pinned(folder: str) -> None:
    assert _container(folder)["image"] == f"vecmill:{vecmill.__version__}"
    for workload in _workloads(folder):
        for container in workload["spec"]["template"]["spec"]["containers"]:
            assert container["image"].rpartition(":")[2][0].isdigit()


@each_folder
def test_selectors_find_their_pods(folder: str) -> None:
    objects, workloads = manifests(folder), _workloads(folder)
    for workload in workloads:
        assert selected(workload["spec"]["selector"]["matchLabels"], _labels(workload))
    for service in of_kind(objects, "Service").values():
        (workload,) = [one for one in workloads if selected(service["spec"]["selector"], _labels(one))]
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        names = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]
    assert _server(folder)["spec"]["serviceName"] in of_kind(objects, "Service")
    assert _pod(folder)["serviceAccountName"] in of_kind(objects, "ServiceAccount")
    (budget,) = of_kind(objects, "PodDisruptionBudget").values()
    assert selected(budget["spec"]["selector"]["matchLabels"], _labels(_server(folder)))


@each_folder
def test_a_node_can_be_drained_and_one_replica_goes_at_a_time(folder: str) -> None:
    (budget,) = of_kind(manifests(folder), "PodDisruptionBudget").values()
    assert budget["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in budget["spec"]


def test_one_server_holds_a_state_folder() -> None:
    for folder in ("base", "overlays/single-node"):
        assert _server(folder)["spec"]["replicas"] == 1
        assert "REDIS_URL" not in _settings(folder)
        assert "state" in [claim["metadata"]["name"] for claim in _server(folder)["spec"]["volumeClaimTemplates"]]


def test_one_spark_is_chosen_by_its_label() -> None:
    pod = _pod("overlays/single-node")
    assert pod["nodeSelector"] == {"vecmill/node": "true"}
    assert pod["runtimeClassName"] == "nvidia"
    for claim in _server("overlays/single-node")["spec"]["volumeClaimTemplates"]:
        assert claim["spec"]["storageClassName"] == "local-path"


def test_replicas_share_redis_and_the_state_folder() -> None:
    folder = "overlays/replicas"
    url = urlsplit(_settings(folder)["REDIS_URL"])
    service = of_kind(manifests(folder), "Service")[url.hostname or ""]
    assert url.port in [port["port"] for port in service["spec"]["ports"]]
    (state,) = [volume for volume in _pod(folder)["volumes"] if volume["name"] == "state"]
    claim = of_kind(manifests(folder), "PersistentVolumeClaim")[state["persistentVolumeClaim"]["claimName"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_only_the_servers_reach_redis() -> None:
    objects = manifests("overlays/replicas")
    policy = of_kind(objects, "NetworkPolicy")["redis"]["spec"]
    store = of_kind(objects, "Deployment")["redis"]
    assert selected(policy["podSelector"]["matchLabels"], _labels(store))
    (source,) = policy["ingress"][0]["from"]
    assert selected(source["podSelector"]["matchLabels"], _labels(_server("overlays/replicas")))
    (container,) = store["spec"]["template"]["spec"]["containers"]
    assert policy["ingress"][0]["ports"][0]["port"] in [port["name"] for port in container["ports"]]


def test_redis_drops_vectors_and_never_jobs(tmp_path: Path) -> None:
    (container,) = of_kind(manifests("overlays/replicas"), "Deployment")["redis"]["spec"]["template"]["spec"][
        "containers"
    ]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))["services"]["redis"]["command"]
    assert [word.replace("${REDIS_MAXMEMORY:-4gb}", "4gb") for word in compose] == container["args"]
    with redis_server(tmp_path, *container["args"][1:]) as url, redis.Redis.from_url(url) as client:
        memory = client.info("memory")
    assert isinstance(memory, dict)
    assert memory["maxmemory_policy"] == "volatile-lru"
    assert memory["maxmemory"] == 4 * 1024**3


def test_the_autoscaler_scales_the_servers() -> None:
    objects = manifests("overlays/replicas")
    spec = of_kind(objects, "HorizontalPodAutoscaler")["vecmill"]["spec"]
    target = of_kind(objects, spec["scaleTargetRef"]["kind"])[spec["scaleTargetRef"]["name"]]
    assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
    assert "replicas" not in target["spec"], "an apply would undo what the autoscaler has done"
    assert 1 < spec["minReplicas"] <= spec["maxReplicas"]


def test_keda_scales_the_servers_in_place_of_the_other_autoscaler() -> None:
    objects = manifests("overlays/replicas-keda")
    assert not of_kind(objects, "HorizontalPodAutoscaler")
    spec = of_kind(objects, "ScaledObject")["vecmill"]["spec"]
    target = of_kind(objects, spec["scaleTargetRef"]["kind"])[spec["scaleTargetRef"]["name"]]
    assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"]
    assert "replicas" not in target["spec"]
    other = of_kind(manifests("overlays/replicas"), "HorizontalPodAutoscaler")["vecmill"]["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (other["minReplicas"], other["maxReplicas"])
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == other["behavior"]
    assert spec["triggers"][0]["metadata"]["threshold"] == other["metrics"][0]["pods"]["target"]["averageValue"]


def test_keda_has_a_trigger_for_each_model() -> None:
    """For those that `auto` gives on a GPU."""
    folder = "overlays/replicas-keda"
    assert {_settings(folder)[name] for name in ("EMBED_MODEL", "RERANK_MODEL")} == {"auto"}
    triggers = of_kind(manifests(folder), "ScaledObject")["vecmill"]["spec"]["triggers"]
    assert len({trigger["name"] for trigger in triggers}) == len(triggers)
    for trigger, model in zip(triggers, GPU_DEFAULTS.values(), strict=True):
        query = trigger["metadata"]["query"]
        assert query == (
            f'sum(vecmill_queued_tokens{{namespace="vecmill",model="{model}"}}) '
            f'or 0 * sum(vecmill_ready{{namespace="vecmill"}})'
        )
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert int(trigger["metadata"]["threshold"]) > 0


def test_rays_replicas_have_a_gpu_each_and_share_redis() -> None:
    spec = _ray_service()["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "vecmill.cluster:build"
    arguments = application["args"]
    cluster = spec["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (arguments["min_replicas"], arguments["max_replicas"])
    head, worker = _ray_templates(_ray_service())
    assert worker["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == arguments["num_gpus"] == 1
    assert "nvidia.com/gpu" not in head["spec"]["containers"][0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"

    objects = manifests(RAY)
    host, _, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert int(port) in [each["port"] for each in of_kind(objects, "Service")[host]["spec"]["ports"]]
    policy = of_kind(objects, "NetworkPolicy")["redis"]["spec"]
    (source,) = policy["ingress"][0]["from"]
    assert all(selected(source["podSelector"]["matchLabels"], each["metadata"]["labels"]) for each in (head, worker))


def test_rays_pods_are_as_the_servers() -> None:
    objects = manifests(RAY)
    (settings,) = of_kind(objects, "ConfigMap").values()
    load_settings({name.lower(): value for name, value in settings["data"].items()})
    assert urlsplit(settings["data"]["REDIS_URL"]).hostname in of_kind(objects, "Service")
    claims = of_kind(objects, "PersistentVolumeClaim")
    shutdown = int(settings["data"].get("SHUTDOWN_SECONDS", DEFAULTS["SHUTDOWN_SECONDS"]))
    for template in _ray_templates(_ray_service()):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert pod["securityContext"] == _pod("base")["securityContext"]
        assert container["securityContext"].items() <= _container("base")["securityContext"].items()
        assert container["image"] == f"vecmill-ray:{vecmill.__version__}"
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in container["envFrom"]
        assert {"secretRef": {"name": "vecmill", "optional": True}} in container["envFrom"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
        assert {one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "emptyDir" not in one} <= {
            *claims
        }
    worker = _ray_templates(_ray_service())[1]["spec"]
    assert worker["terminationGracePeriodSeconds"] >= shutdown + 10
    assert _ray_service()["spec"]["rayClusterDeletionDelaySeconds"] >= shutdown
    mounts = {mount["mountPath"] for mount in worker["containers"][0]["volumeMounts"]}
    assert mounts == {*json.loads(dockerfile("Dockerfile").one("VOLUME")), "/tmp"}


def test_the_monitor_reads_each_pod_once() -> None:
    objects = manifests("overlays/replicas")
    monitor = of_kind(objects, "ServiceMonitor")["vecmill"]["spec"]
    services = of_kind(objects, "Service").values()
    (service,) = [one for one in services if selected(monitor["selector"]["matchLabels"], one["metadata"]["labels"])]
    # The alerts ask for job="vecmill", which is the service's name.
    assert service["metadata"]["name"] == "vecmill"
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert "get" in DOCUMENT["paths"][endpoint["path"]]


def test_the_operators_kinds_are_left_out_where_it_may_be_missing() -> None:
    for folder in ("base", "overlays/single-node", RAY):
        assert not {one["kind"] for one in manifests(folder)} & OPERATOR


def test_every_file_is_part_of_something() -> None:
    lists = [yaml.safe_load(path.read_text("utf-8")) for path in K8S.rglob("kustomization.yaml")]
    named = {Path(entry).name for one in lists for entry in one["resources"]}
    named |= {name for one in lists for name in one.get("configurations", ())}
    files = {path.name for path in K8S.rglob("*.yaml")} - {"kustomization.yaml", "prometheus-adapter-values.yaml"}
    assert files <= named
