"""The chart as helm renders it: what a cluster is asked for."""

import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from instructloop.config import RoundConfig
from instructloop.environment import check_environment
from serving.settings import Settings
from tests.helm.conftest import (
    CHART,
    EXAMPLES,
    PARTS,
    ROOT,
    Render,
    Rendered,
    containers,
    environment,
    only,
    pods,
)
from tests.helm.kubernetes import Kinds

NAMES = [file.stem for file in EXAMPLES]
everywhere = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def rendered(render: Render) -> dict[str, Rendered]:
    return {name: render(name) for name in NAMES}


@everywhere
def test_helm_finds_nothing_to_complain_of(helm: Callable[..., str], name: str) -> None:
    file = str(CHART / "examples" / f"{name}.yaml")
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "-f", file)


@everywhere
def test_kubernetes_knows_every_field(rendered: dict[str, Rendered], name: str) -> None:
    kinds, others = Kinds(PARTS / "swagger.json"), {"ServiceMonitor", "HTTPRoute"}
    for found in rendered[name]:
        if found["kind"] not in others:
            assert kinds.faults(found) == [], found["kind"]


def test_a_misspelt_field_is_seen(rendered: dict[str, Rendered]) -> None:
    kinds, service = Kinds(PARTS / "swagger.json"), only(rendered["one"], "Service", "instructloop")
    wrong = service | {"spec": {**service["spec"], "selectors": {}}}
    assert "selectors" in str(kinds.faults(wrong))


@everywhere
def test_every_pod_is_restricted(rendered: dict[str, Rendered], name: str) -> None:
    for pod in pods(rendered[name]).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
        said = pod["spec"]["securityContext"]
        assert said["runAsNonRoot"] is True and said["runAsUser"] > 0
        assert said["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
            assert "memory" in container["resources"]["limits"]


@everywhere
def test_what_is_written_has_a_volume(rendered: dict[str, Rendered], name: str) -> None:
    for component, pod in pods(rendered[name]).items():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in containers(pod):
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= set(volumes)
            writable = {m["mountPath"]: volumes[m["name"]] for m in mounts if not m.get("readOnly")}
            if component != "test":
                assert {"/var/lib/instructloop", "/tmp"} <= set(writable)  # noqa: S108
                assert environment(container)["HOME"] == "/tmp"  # noqa: S108
                assert "emptyDir" in writable["/tmp"]  # noqa: S108
        if component != "test":
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@everywhere
def test_every_variable_exists_and_its_value_is_taken(
    rendered: dict[str, Rendered], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = pods(rendered[name])["server"]["spec"]["containers"]
    said = environment(server)
    check_environment(said)
    for variable, value in said.items():
        if isinstance(value, str):
            monkeypatch.setenv(variable, value)
    Settings()


def test_values_arrive_as_they_were_written(rendered: dict[str, Rendered]) -> None:
    (server,) = pods(rendered["kafka"])["server"]["spec"]["containers"]
    said = environment(server)
    given = yaml.safe_load((CHART / "examples" / "kafka.yaml").read_text("utf-8"))["settings"]
    assert {name: yaml.safe_load(said[name]) for name in given} == given
    assert said["INSTRUCTLOOP_SPOOL_MAX_BYTES"] == "4294967296"


@everywhere
def test_secrets_come_from_secrets(rendered: dict[str, Rendered], name: str) -> None:
    assert not [found for found in rendered[name] if found["kind"] == "Secret"]
    for pod in pods(rendered[name]).values():
        for container in containers(pod):
            for variable, value in environment(container).items():
                if re.search("MASTER_KEY|USERNAME|PASSWORD|LIMIT_STORAGE|^KEY$", variable):
                    assert list(value) == ["secretKeyRef"], variable


def test_probes_ask_what_the_operations_say(rendered: dict[str, Rendered]) -> None:
    (server,) = pods(rendered["one"])["server"]["spec"]["containers"]
    asked = {
        name: server[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    # A server without a release waits for one, and is not to be killed meanwhile.
    assert asked == {
        "startupProbe": "/healthz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600


def test_ports_match(rendered: dict[str, Rendered]) -> None:
    objects = rendered["kafka"]
    (server,) = pods(objects)["server"]["spec"]["containers"]
    assert server["ports"] == [{"name": "http", "containerPort": 8000}]
    assert server["command"][-2:] == ["--port", "8000"]
    for service in (o for o in objects if o["kind"] == "Service"):
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    backend = only(objects, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert backend == [{"name": "il-instructloop", "port": 80}]
    url = environment(pods(objects)["test"]["spec"]["containers"][0])["SERVER"]
    assert url == "http://il-instructloop:80"


@everywhere
def test_selectors_find_the_pods_that_they_mean(rendered: dict[str, Rendered], name: str) -> None:
    objects = rendered[name]
    labels = {component: pod["metadata"]["labels"] for component, pod in pods(objects).items()}

    def found(selector: dict[str, str]) -> set[str]:
        return {c for c, known in labels.items() if selector.items() <= known.items()}

    for service in (o for o in objects if o["kind"] == "Service"):
        assert found(service["spec"]["selector"]) == {"server"}
    everyone = only(objects, "NetworkPolicy", "deny")["spec"]
    assert found(everyone["podSelector"]["matchLabels"]) == set(labels)
    assert everyone["policyTypes"] == ["Ingress", "Egress"] and len(everyone) == 2
    for component in set(labels) - {"test"}:  # all on the node of the volume
        (term,) = pods(objects)[component]["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert found(term["labelSelector"]["matchLabels"]) == set(labels) - {"test"}
        assert term["topologyKey"] == "kubernetes.io/hostname"


@everywhere
def test_a_replica_has_time_for_what_it_began(rendered: dict[str, Rendered], name: str) -> None:
    spec = pods(rendered[name])["server"]["spec"]
    (server,) = spec["containers"]
    said = environment(server).get("INSTRUCTLOOP_SHUTDOWN_BOUND_S")
    bound = int(said or Settings.model_fields["shutdown_bound_s"].default)
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause > 0
    assert spec["terminationGracePeriodSeconds"] >= pause + bound + 20


def test_several_replicas_have_a_spool_each_and_a_budget(rendered: dict[str, Rendered]) -> None:
    objects = rendered["kafka"]
    (server,) = pods(objects)["server"]["spec"]["containers"]
    said = environment(server)
    # Kubernetes puts a variable into those after it.
    assert list(said).index("INSTRUCTLOOP_REPLICA") < list(said).index("INSTRUCTLOOP_SPOOL_PATH")
    assert "$(INSTRUCTLOOP_REPLICA)" in said["INSTRUCTLOOP_SPOOL_PATH"]
    assert only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert not [o for o in rendered["one"] if o["kind"] == "PodDisruptionBudget"]


def test_only_what_the_values_name_is_reached(rendered: dict[str, Rendered]) -> None:
    ports = [
        port["port"]
        for rule in only(rendered["kafka"], "NetworkPolicy", "away")["spec"]["egress"]
        for port in rule["ports"]
    ]
    assert ports == [53, 53, 9093, 6379, 4318]
    names = [o["metadata"]["name"] for o in rendered["one"] if o["kind"] == "NetworkPolicy"]
    assert sorted(names) == [f"il-instructloop-{n}" for n in ("deny", "server", "test")]
    server = only(rendered["one"], "NetworkPolicy", "server")["spec"]
    assert "egress" not in server
    ((tester, ingress),) = [rule["from"] for rule in server["ingress"]]
    assert tester["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert ingress["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "ingress"}


def test_a_round_reads_and_writes_where_the_servers_do(rendered: dict[str, Rendered]) -> None:
    objects = rendered["round"]
    text = only(objects, "ConfigMap", "round")["data"]["round.toml"]
    config = RoundConfig.model_validate(tomllib.loads(text))
    each = pods(objects)
    server, round_ = (environment(each[c]["spec"]["containers"][0]) for c in ("server", "round"))
    for name in ("LOG", "REGISTRY", "VAULT", "MASTER_KEY"):
        assert round_[f"INSTRUCTLOOP_{name}"] == server[f"INSTRUCTLOOP_{name}"]
    assert config.log == server["INSTRUCTLOOP_LOG"]
    assert str(config.registry) == server["INSTRUCTLOOP_REGISTRY"]
    (container,) = each["round"]["spec"]["containers"]
    (run,) = [m for m in container["volumeMounts"] if m["mountPath"] == str(config.run)]
    assert run["name"] == "data" and run["subPathExpr"] == "runs/$(JOB)"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_round_is_alone_and_goes_on_after_a_kill(render: Render) -> None:
    objects = render("round", round={"ranks": 2, "suspend": True, "retries": 5})
    spec = only(objects, "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid" and spec["suspend"] is True
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 5
    (container,) = pods(objects)["round"]["spec"]["containers"]
    assert container["command"][:4] == [
        *("torchrun", "--nproc-per-node=2", "--no-python", "instructloop")
    ]


def test_a_change_of_the_filter_is_a_change_of_the_pods(render: Render) -> None:
    def annotations(words: list[str]) -> dict[str, str]:
        found: dict[str, str] = pods(render("one", server={"filterWords": words}))["server"][
            "metadata"
        ]["annotations"]
        return found

    assert annotations(["a"]) != annotations(["b"])
    objects = render("one", server={"filterWords": ["one phrase", "two"]})
    assert only(objects, "ConfigMap", "filter")["data"]["words.txt"].split("\n")[:2] == [
        *("one phrase", "two")
    ]
    (server,) = pods(objects)["server"]["spec"]["containers"]
    assert environment(server)["INSTRUCTLOOP_CONTENT_FILTER"] == (
        "words:/etc/instructloop/filter/words.txt"
    )


def test_a_monitor_only_where_the_cluster_knows_that_kind(render: Render) -> None:
    def kinds(**given: Any) -> set[str]:
        return {found["kind"] for found in render("kafka", **given)}

    assert "ServiceMonitor" in kinds()
    assert "ServiceMonitor" not in kinds(apis=())
    assert "ServiceMonitor" not in kinds(metrics={"existingSecret": ""})
    (endpoint,) = only(render("kafka"), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == "instructloop-metrics"


def test_an_own_claim_is_used_and_none_is_made(render: Render) -> None:
    objects = render("one", storage={"existingClaim": "ours"})
    assert not [found for found in objects if found["kind"] == "PersistentVolumeClaim"]
    volumes = {v["name"]: v for v in pods(objects)["server"]["spec"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "ours"
    kept = only(render("one"), "PersistentVolumeClaim")["metadata"]["annotations"]
    assert kept == {"helm.sh/resource-policy": "keep"}


def test_the_chart_is_of_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert chart["appVersion"] == project["version"]
