"""The manifests: who has a network, sees records, holds the key, and can be reached."""

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.kit import (
    COORDINATOR,
    COURIER,
    COURIERS,
    DATA,
    EXECUTOR,
    KEYS,
    KIT,
    PARTS,
    SITE,
    VAULT,
    sees,
)

MANIFESTS = sorted((KIT / "kubernetes").glob("*.yaml"))


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kind(name: str, wanted: str) -> list[dict[str, Any]]:
    return [
        each for each in documents(KIT / "kubernetes" / f"{name}.yaml") if each["kind"] == wanted
    ]


def pod(name: str) -> dict[str, Any]:
    (deployment,) = kind(name, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def containers(name: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in pod(name)["containers"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_a_manifest_fits_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    known = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in documents(path):
        known.validate(document, version, strict=True)
    wrong = json.loads(json.dumps(documents(path)[0]))
    wrong["metadata"]["nmae"] = "a key that nobody knows"
    with pytest.raises(known.ValidationError):
        known.validate(wrong, version, strict=True)


@pytest.mark.parametrize("name", ["site", "coordinator"])
def test_every_pod_is_confined(name: str) -> None:
    spec = pod(name)
    assert spec["hostUsers"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # It would give a group what only the owner may read.
    assert "fsGroup" not in spec["securityContext"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        context = each["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
        assert each["resources"]["limits"]["memory"]
        assert " ".join(each["args"]).removeprefix("veilgraft ") == PARTS[each["name"]]
        if each["name"] not in ("vault", "prepare"):
            assert context["allowPrivilegeEscalation"] is False
            assert "add" not in context["capabilities"]
            assert context.get("runAsUser", 1) > 0


def test_the_vault_of_a_pod_leaves_its_network_before_it_starts() -> None:
    vault = containers("site")["vault"]
    assert vault["command"][:4] == ["unshare", "--net", "--ipc", "--"]
    assert set(vault["command"][4:]) == {
        "setpriv",
        f"--reuid={VAULT}",
        f"--regid={VAULT}",
        "--clear-groups",
        "--no-new-privs",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--",
    }
    assert "ports" not in vault


def test_a_pods_courier_gets_no_records_and_no_state() -> None:
    vault, courier = containers("site")["vault"], containers("site")["courier"]
    data = [each for each in vault["volumeMounts"] if each["mountPath"] == DATA]
    assert [each["readOnly"] for each in data] == [True]
    shared = [each for each in courier["volumeMounts"] if each["name"] in ("site", "data")]
    assert {each["mountPath"]: "readOnly" not in each for each in shared} == COURIERS
    assert all(each.get("readOnly", True) for each in shared)
    assert all(each["mountPath"] == f"{SITE}/{each['subPath']}" for each in shared)
    private = {each["name"] for each in vault["volumeMounts"]} - {"site"}
    assert not private & {each["name"] for each in courier["volumeMounts"]}
    assert courier["securityContext"]["runAsUser"] == COURIER


def test_a_site_answers_nobody_and_asks_only_its_coordinator() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in kind("site", "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    allowed = policies["to-the-coordinator"]
    assert (allowed["policyTypes"], allowed["ingress"]) == (["Ingress", "Egress"], [])
    coordinator, names = allowed["egress"]
    assert [
        ipaddress.ip_network(to["ipBlock"]["cidr"]).num_addresses for to in coordinator["to"]
    ] == [1]
    assert coordinator["ports"] == [{"protocol": "TCP", "port": 9443}]
    assert {port["port"] for port in names["ports"]} == {53}
    assert all(to["namespaceSelector"] and to["podSelector"] for to in names["to"])
    assert not kind("site", "Service")


def test_from_outside_of_the_pod_only_the_edge_is_reached() -> None:
    listening = {
        name: each["ports"] for name, each in containers("coordinator").items() if "ports" in each
    }
    assert listening == {"edge": [{"name": "edge", "protocol": "TCP", "containerPort": 9443}]}
    (service,) = kind("coordinator", "Service")
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["edge"]
    (policy,) = kind("coordinator", "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9443}]}]
    assert policy["spec"]["egress"] == []


def test_only_the_executor_of_a_pod_holds_the_signing_key() -> None:
    for name, each in containers("coordinator").items():
        visible = {
            mount["mountPath"]: (mount["name"].replace("no-invitations", "tmpfs"), True)
            for mount in each["volumeMounts"]
        }
        covered = {
            path: ("/dev/null" if s == "nothing" else s, w) for path, (s, w) in visible.items()
        }
        seen = {target for target in KEYS if sees(covered, target)}
        assert seen == ({f"{COORDINATOR}/signing.pem"} if name == "executor" else set()), name
        assert (each["securityContext"].get("runAsUser") == EXECUTOR) == (name == "executor")


def test_the_pods_vault_ends_without_network_and_capabilities() -> None:
    """Run the manifest's command as a pod would: as root of a user namespace, with few rights."""
    vault = containers("site")["vault"]
    added = ",".join(f"+{name.lower()}" for name in vault["securityContext"]["capabilities"]["add"])
    script = "grep -E '^(Uid|Groups|Cap|NoNewPrivs)' /proc/self/status; cat /proc/net/dev"
    inside = ["setpriv", f"--bounding-set=-all,{added}", *vault["command"], "sh", "-c", script]
    out = _in_a_user_namespace(inside)
    facts = dict(line.split(":", 1) for line in out.splitlines() if ":" in line)
    assert set(facts["Uid"].split()) == {str(VAULT)}
    assert facts["Groups"].split() == []
    assert [int(facts[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0]
    assert facts["NoNewPrivs"].strip() == "1"
    interfaces = [name.strip() for name in facts if facts[name].count(" ") > 20]
    assert interfaces == ["lo"]
    # It never carried a byte, as it is down.
    assert set(facts[next(name for name in facts if name.strip() == "lo")].split()) == {"0"}


def _in_a_user_namespace(command: list[str]) -> str:
    """Run a command as root of a new user namespace that maps 65536 users; needs root outside."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to map users: the pod's command was not tried")
    starter = (
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).unshare(0x10000000): sys.exit(77)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "os.setgroups([]); os.setgid(0); os.setuid(0); os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    python = shutil.which("python3", path="/usr/bin") or sys.executable
    with subprocess.Popen(
        [python, "-c", starter, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.wait(10)
            pytest.skip("user namespaces are not permitted: the pod's command was not tried")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text("0 200000 65536")
        out, err = process.communicate("go\n", timeout=30)
    assert process.returncode == 0, err
    return out
