"""The Kubernetes manifests, rendered by kubectl: valid by schema; true to the image, the settings and each other."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.facts import (
    DEPLOY,
    Image,
    assert_flags_exist,
    configuration,
    is_below,
    port_of,
    tool,
    variables_of,
)

FOLDERS = ["base", "overlays/gpu", "overlays/tls"]
VERSIONS = ["1.30", "1.37"]
"""The oldest Kubernetes that the manifests are for, and the newest whose schemas are installed."""
TRACES_S = 7
PROBES = ["startupProbe", "readinessProbe", "livenessProbe"]

Manifest = dict[str, Any]


def render(folder: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = [tool("kubectl"), "kustomize", DEPLOY / "kubernetes" / folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=FOLDERS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """All manifests of the base, or of an overlay."""
    return render(request.param)


@pytest.fixture(scope="module")
def pod(manifests: list[Manifest]) -> Manifest:
    """The pod's template."""
    (found,) = [each for each in manifests if each["kind"] == "StatefulSet"]
    template: Manifest = found["spec"]["template"]
    return template


@pytest.fixture(scope="module")
def container(pod: Manifest) -> Manifest:
    """The only container of the pod."""
    (found,) = pod["spec"]["containers"]
    return dict(found)


@pytest.fixture
def config(manifests: list[Manifest], container: Manifest, tmp_path: Path) -> dict[str, Any]:
    """What the server makes of the image's environment, the pod's, the arguments and the ConfigMap."""
    (config_map,) = [each for each in manifests if each["kind"] == "ConfigMap"]
    (name,) = config_map["data"]
    words = list(container["args"])
    at = words.index("--config") + 1
    assert words[at] == f"/etc/lora-server/config/{name}"
    (tmp_path / name).write_text(config_map["data"][name])
    words[at] = str(tmp_path / name)
    return configuration(words, {**Image().environment("runtime"), **environment_of(container)})


def environment_of(container: Manifest) -> dict[str, str]:
    """The variables that the manifest gives a value."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def faults(manifest: Manifest, version: str) -> str | None:
    """What the schema of a version of Kubernetes has against a manifest; unknown fields are faults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the validator's own libraries
        import kubernetes_validate

        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return str(error)
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_valid(manifests: list[Manifest], version: str) -> None:
    """Each one fits the schema of its kind."""
    assert {each["kind"]: faults(each, version) for each in manifests} == dict.fromkeys(
        {each["kind"] for each in manifests}
    )


def test_a_misspelt_field_would_be_found() -> None:
    """The check can fail: `periodSecond` is no field of a probe."""
    (wrong,) = [each for each in render("base") if each["kind"] == "StatefulSet"]
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["periodSecond"] = 1
    assert "periodSecond" in (faults(wrong, VERSIONS[-1]) or "")


def test_the_kinds_are_those_of_a_service(manifests: list[Manifest]) -> None:
    """A server with state and settings, what finds it, what guards it, and what keeps it up."""
    kinds = sorted(each["kind"] for each in manifests)
    assert kinds == ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "Service", "StatefulSet"]


def test_the_ports_are_those_that_the_server_listens_on(container: Manifest, config: dict[str, Any]) -> None:
    """By name; what the services and the policy name is among them."""
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {
        "grpc": port_of(config["rpc"]["listen"]),
        "metrics": port_of(config["telemetry"]["metrics_listen"]),
    }


def test_services_and_policies_find_the_pod(manifests: list[Manifest], pod: Manifest, container: Manifest) -> None:
    """Every selector is one of the pod's labels and never empty, which would mean everybody; every port has a name."""
    labels, names = pod["metadata"]["labels"], {each["name"] for each in container["ports"]}
    selectors = []
    for each in manifests:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            selectors.append(spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= names
        elif each["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"]["matchLabels"])
            assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} <= names
        elif each["kind"] in ("StatefulSet", "PodDisruptionBudget"):
            selectors.append(spec["selector"]["matchLabels"])
    assert selectors == [labels] * 5


def test_the_three_probes_ask_the_servers_health(container: Manifest, config: dict[str, Any]) -> None:
    """In plain text on the port that it listens on; with TLS by our own command, whose variables it knows."""
    commands = [container[probe].get("exec", {}).get("command") for probe in PROBES]
    if not config["tls"].get("certificate"):
        assert [container[probe]["grpc"]["port"] for probe in PROBES] == [port_of(config["rpc"]["listen"])] * 3
        return
    for probe, command in zip(PROBES, commands, strict=True):
        assert command[0] == "lora-server"
        assert_flags_exist(command[1:])
        assert 2 * float(command[command.index("--timeout") + 1]) < container[probe]["timeoutSeconds"]
    own = {name for name in environment_of(container) if name.startswith("LORA_SERVER_HEALTH_")}
    assert len(own) == 2
    assert own <= variables_of("health")


def test_a_model_has_ten_minutes_to_load(container: Manifest) -> None:
    """The startup probe holds the others back as long as the image's own check does."""
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 600
    assert "--start-period=10m" in Image().last("runtime", "HEALTHCHECK")


def test_there_is_time_to_drain(pod: Manifest, container: Manifest, config: dict[str, Any]) -> None:
    """The pod is killed after the wait for balancers, the drain and the flush of traces."""
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed_s = float(seconds) + config["rpc"]["drain_timeout_s"] + TRACES_S
    assert needed_s < pod["spec"]["terminationGracePeriodSeconds"]


def test_every_path_is_mounted(pod: Manifest, container: Manifest, config: dict[str, Any]) -> None:
    """State is on the claim, tokens and certificates are from secrets, adapters are where the server looks for them."""
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert is_below(config["state_dir"], [mounts["state"]])
    assert config["adapter_roots"] == [mounts["adapters"]]
    assert is_below(config["auth"]["token_file"], [mounts["tokens"]])
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert volumes["tokens"]["secret"]["secretName"] == "lora-server-tokens"
    assert set(mounts) == {*volumes, "state"}
    if config["tls"].get("certificate"):
        files = [config["tls"]["certificate"], config["tls"]["private_key"]]
        files.append(environment_of(container)["LORA_SERVER_HEALTH_TLS_CA"])
        assert all(is_below(path, [mounts["tls"]]) for path in files)
        assert config["rpc"]["insecure"] is False


def test_nobody_is_root(pod: Manifest, container: Manifest) -> None:
    """The user is the image's, the root file system cannot be written, nothing can be gained."""
    security = pod["spec"]["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == Image().last("runtime", "USER")
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_overlay_asks_for_a_gpu() -> None:
    """One device of the plugin, and the image that has the compiler."""
    (found,) = [each for each in render("overlays/gpu") if each["kind"] == "StatefulSet"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-cuda")
    assert "cuda" in Image().stages


def test_the_arguments_exist(container: Manifest) -> None:
    """Every flag is one of `lora-server serve`, and what the image starts is `serve` too."""
    assert_flags_exist(container["args"])
    assert container["args"][:1] == json.loads(Image().last("runtime", "CMD"))
