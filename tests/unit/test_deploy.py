"""What deploy/ says, read without an engine: who may do what, what is pinned, and that every name in it exists."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.arena import DATABASES, IMAGE_USER, KEYS, SERVICES
from services.modelserver.settings import ModelServerSettings
from services.registry.settings import RegistrySettings
from services.runtime.settings import PREFIX
from services.selector.settings import SelectorSettings
from services.trainer.settings import TrainerSettings
from services.validator.settings import ValidatorSettings

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
OVERLAYS = ("gpu", "observability", "tls")
SETTINGS = {
    each.service: each
    for each in (RegistrySettings, SelectorSettings, TrainerSettings, ValidatorSettings, ModelServerSettings)
}
KUBERNETES_VERSION = "1.33"
# What a shell in the container reads.
COMMAND_LINE = {"TILTYARD_KEY", "TILTYARD_SELECTOR"}


def composition(*names: str) -> dict[str, Any]:
    """One compose file."""
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / ".".join(["compose", *names, "yaml"])).read_text())
    return loaded


def unknown_settings(service: str, names: set[str]) -> set[str]:
    """The TILTYARD_ variables among the names that would stop the service at its start."""
    known = {PREFIX + field.upper() for field in SETTINGS[service].model_fields} | COMMAND_LINE
    return {name for name in names if name.startswith(PREFIX)} - known


def targets() -> dict[str, str]:
    """The stages of the Dockerfile, each with its lines."""
    parts = re.split(r"^FROM \S+ AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("service", composition()["services"])
def test_a_service_has_limits_and_no_rights(service: str) -> None:
    said = composition()["services"][service]
    assert said["cap_drop"] == ["ALL"]
    assert said["security_opt"] == ["no-new-privileges:true"]
    assert said["read_only"] is True
    assert said["user"] == IMAGE_USER
    assert said["restart"] == "unless-stopped"
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period", "init"} <= said.keys()
    assert not {"privileged", "cap_add", "devices", "pid", "network_mode", "ipc"} & said.keys()
    assert all(each.startswith("${TILTYARD_BIND:-127.0.0.1}:") for each in said.get("ports", ()))
    assert all(each["condition"] == "service_healthy" for each in said.get("depends_on", {}).values())
    kind = re.sub(r"-\d+$", "", service)
    assert said["build"]["target"] == kind
    assert said["image"] == f"tiltyard/{kind}:${{TILTYARD_VERSION:-0.1.0}}"
    if kind in SETTINGS:
        assert unknown_settings(kind, set(said["environment"])) == set()


def test_the_gpu_overlay_changes_the_trainer_alone() -> None:
    said = composition("gpu")["services"]
    assert said.keys() == {"trainer"}
    assert unknown_settings("trainer", set(said["trainer"]["environment"])) == set()


def test_with_tls_every_service_has_a_certificate_of_its_own_and_speaks_nothing_else() -> None:
    said = composition("tls")["services"]
    assert said.keys() == composition()["services"].keys() - {"database"} == set(SERVICES)
    for name, service in said.items():
        assert unknown_settings(re.sub(r"-\d+$", "", name), set(service["environment"])) == set()
        assert service["environment"]["TILTYARD_PLAINTEXT_ANYWHERE"] == "false"
        assert service["volumes"] == [f"${{TILTYARD_CERTIFICATES}}/{name}:/run/tls:ro"]


def test_with_observability_every_service_sends_to_a_collector_whose_files_are_there() -> None:
    said = composition("observability")["services"]
    senders = composition()["services"].keys() - {"database"}
    instruments = said.keys() - senders
    assert instruments == {"collector", "jaeger", "prometheus", "grafana"}
    for name in senders:
        assert said[name]["environment"] == {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
        assert said[name]["networks"] == ["telemetry"]
    for name in instruments:
        one = said[name]
        assert re.fullmatch(r"[a-z-]+/[a-z-]+:\$\{TILTYARD_[A-Z]+_VERSION:-v?\d+\.\d+\.\d+\}", one["image"])
        assert one["cap_drop"] == ["ALL"]
        assert one["read_only"] is True
        assert {"mem_limit", "cpus", "pids_limit", "restart"} <= one.keys()
        for volume in one.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists()
    # What the files name each other by are these services.
    collector = yaml.safe_load((DEPLOY / "observability" / "collector.yaml").read_text())
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    assert collector["exporters"]["otlp/jaeger"]["endpoint"] == "jaeger:4317"
    scraped = yaml.safe_load((DEPLOY / "observability" / "prometheus.yaml").read_text())["scrape_configs"]
    port = collector["exporters"]["prometheus"]["endpoint"].rpartition(":")[2]
    assert scraped[0]["static_configs"][0]["targets"] == [f"collector:{port}"]


def test_every_secret_is_made_and_every_volume_declared() -> None:
    said = composition()
    made = {f"{key}_key" for key in KEYS}
    made |= {f"{name}_{kind}" for name in DATABASES for kind in ("password", "pgpass")}
    assert said["secrets"].keys() == made
    used = [secret for service in said["services"].values() for secret in service.get("secrets", ())]
    assert set(used) == made
    keys = [each for each in used if each.endswith("_key")]
    assert len(keys) == len(set(keys))
    volumes = [volume.split(":")[0] for service in said["services"].values() for volume in service.get("volumes", ())]
    assert sorted(volumes) == sorted(said["volumes"])
    for secret, source in said["secrets"].items():
        assert source["file"].endswith(f"/{secret}")


@pytest.mark.parametrize("target", ["database", "registry", "selector", "trainer", "modelserver", "validator"])
def test_an_image_runs_as_nobody_in_particular_and_knows_its_health(target: str) -> None:
    lines = targets()[target].splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users[-1] == f"USER {IMAGE_USER}"
    base = {"registry": "light", "selector": "light", "trainer": "heavy", "modelserver": "heavy", "validator": "heavy"}
    said = "\n".join([*lines, targets()[base[target]] if target in base else ""])
    assert "HEALTHCHECK" in said
    assert "CMD [" in said


def test_torch_is_in_the_images_of_models_alone() -> None:
    assert "heavy.txt" not in targets()["light"]
    assert re.search(r"requirements.py services postgres > light.txt", targets()["requirements"])
    assert re.search(r"requirements.py services torch onnx data > heavy.txt", targets()["requirements"])


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl to build the manifests with")
    built = subprocess.run([kubectl, "kustomize", MANIFESTS], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return [each for each in yaml.safe_load_all(built.stdout) if each]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind, by name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def chooses(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector of matchLabels and matchExpressions of the operator In takes these labels."""
    expressions = selector.get("matchExpressions", ())
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def test_manifests_follow_the_schema_of_kubernetes(manifests: list[dict[str, Any]]) -> None:
    files = {path.name for path in MANIFESTS.glob("*.yaml")}
    plan = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
    assert files == {"kustomization.yaml", *plan["resources"], *(each["path"] for each in plan["patches"])}
    for each in manifests:
        kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "tiltyard"


@pytest.mark.parametrize("name", ["database", "selector", "registry", "trainer", "validator"])
def test_a_pod_has_limits_probes_and_no_rights(manifests: list[dict[str, Any]], name: str) -> None:
    pod = of_kind(manifests, "StatefulSet")[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = int(IMAGE_USER.split(":")[0])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == user
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
    assert container["image"] == f"tiltyard/{name}:0.1.0"
    (port,) = container["ports"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[kind]["exec"]["command"] if name == "database" else container[kind]["grpc"]["port"]
        assert asked == (["start-postgres", "check"] if name == "database" else port["containerPort"])
    # What a database does at a start may take long, and would begin anew if it were killed.
    patience_s = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert patience_s >= (3600 if name in ("database", *DATABASES) else 120)
    mounted = {each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"] for each in pod["volumes"]}
    claims = {
        each["metadata"]["name"] for each in of_kind(manifests, "StatefulSet")[name]["spec"]["volumeClaimTemplates"]
    }
    assert mounted == volumes | claims
    if name != "database":
        assert port["containerPort"] == int(SETTINGS[name].model_fields["listen"].default.rpartition(":")[2])
        (settings,) = of_kind(manifests, "ConfigMap").values()
        assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
        names = {each["name"] for each in container.get("env", ())} | settings["data"].keys()
        assert unknown_settings(name, names) == set()


def test_services_budgets_and_policies_choose_pods_that_there_are(manifests: list[dict[str, Any]]) -> None:
    pods = [each["spec"]["template"] for each in of_kind(manifests, "StatefulSet").values()]
    labels = [each["metadata"]["labels"] for each in pods]
    for name, service in of_kind(manifests, "Service").items():
        (chosen,) = (pod for pod in pods if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items())
        (port,) = service["spec"]["ports"]
        (exposed,) = chosen["spec"]["containers"][0]["ports"]
        assert (name, port["targetPort"], port["port"]) == (
            chosen["spec"]["containers"][0]["name"],
            exposed["name"],
            exposed["containerPort"],
        )
    for each in of_kind(manifests, "PodDisruptionBudget").values():
        assert any(chooses(each["spec"]["selector"], those) for those in labels)
    policies = of_kind(manifests, "NetworkPolicy")
    assert policies["nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for each in policies.values():
        assert any(chooses(each["spec"]["podSelector"], those) for those in labels)
        for way in (*each["spec"].get("ingress", ()), *each["spec"].get("egress", ())):
            for peer in (*way.get("from", ()), *way.get("to", ())):
                assert "podSelector" not in peer or any(chooses(peer["podSelector"], those) for those in labels)


def test_every_setting_of_the_composition_is_told() -> None:
    page = (DEPLOY.parent / "docs/howto/host-the-arena.md").read_text()
    told = {
        each for row in re.findall(r"^\| (`[A-Z_`, ]+)", page, re.MULTILINE) for each in re.findall(r"`(\w+)`", row)
    }
    text = "".join(path.read_text() for path in DEPLOY.glob("compose*.yaml"))
    made = r"SECRETS|CERTIFICATES|ENVIRONMENTS|REGISTRY_ID|BUILD_NETWORK|PIP_\w+"
    for name in set(re.findall(rf"\$\{{TILTYARD_(?!{made})([A-Z_]+)", text)):
        words = name.split("_")
        # After the first of a row the others are named by their ends.
        endings = {"_" + "_".join(words[start:]) for start in range(len(words))}
        assert {f"TILTYARD_{name}", *endings} & told, name


def test_overlays_are_files() -> None:
    assert {path.name for path in DEPLOY.glob("compose.*.yaml")} == {f"compose.{each}.yaml" for each in OVERLAYS}
