"""The compose files: who has a network, sees records, holds the key, and can be reached."""

import importlib.resources
import json
import os
import shutil
import subprocess
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
    EDGE,
    EXECUTOR,
    KEYS,
    KIT,
    PARTS,
    SITE,
    VAULT,
    sees,
)

COMPOSE = sorted((KIT / "compose").glob("*.yaml"))


@cache
def services(name: str) -> dict[str, dict[str, Any]]:
    text = (KIT / "compose" / f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return {target: (source, writable)}."""
    found = {}
    for volume in service.get("volumes", []):
        source, target, *mode = volume.replace(":?}", "}").split(":")
        found[target] = (source, mode != ["ro"])
    for volume in service.get("tmpfs", []):
        found[volume.split(":")[0]] = ("tmpfs", True)
    return found


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_compose_file_fits_the_compose_specification(path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema, for its compose schema")
    jsonschema = pytest.importorskip("jsonschema")
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor"
    schema = json.loads((vendored / "compose-spec.json").read_text(encoding="utf-8"))
    known = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in known.iter_errors(yaml.safe_load(path.read_text()))] == []
    assert not known.is_valid({"services": {"vault": {"networkmode": "none"}}})


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_docker_compose_takes_the_file(path: Path) -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker has no compose plugin here: the file was not shown to docker itself")
    env = {"PATH": os.environ["PATH"], "FOLDER": "/tmp/folder", "DATA": "/tmp/data"}
    command = [docker, "compose", "-f", str(path), "--profile", "*", "config", "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["site", "coordinator"])
def test_every_container_is_confined(name: str) -> None:
    for part, service in services(name).items():
        assert service["read_only"] is True, part
        assert service["cap_drop"] == ["ALL"], part
        assert service["security_opt"] == ["no-new-privileges:true"], part
        assert service["pids_limit"] <= 512, part
        assert service["mem_limit"], part
        assert "privileged" not in service, part
        if part in PARTS:
            assert " ".join(service["command"]) == PARTS[part]
        if part not in ("prepare", "join"):
            assert "cap_add" not in service, part
            assert int(service["user"].split(":")[0]) > 0, part


def test_the_vaults_container_has_no_network_and_the_couriers_no_records() -> None:
    vault, courier = services("site")["vault"], services("site")["courier"]
    assert vault["network_mode"] == "none"
    assert not {"networks", "ports", "links"} & vault.keys()
    assert mounts(vault)[DATA] == ("${DATA}", False)
    # No option of the service may share what is apart: namespaces, volumes, groups, users.
    for service in (vault, courier):
        assert not {"volumes_from", "pid", "ipc", "userns_mode", "group_add"} & service.keys()
    shared = {target: each for target, each in mounts(courier).items() if "$" in each[0]}
    assert {target: writable for target, (_, writable) in shared.items()} == COURIERS
    assert all(
        target.replace(SITE, "${FOLDER}") == source for target, (source, _) in shared.items()
    )
    assert vault["user"] == f"{VAULT}:{VAULT}"
    assert courier["user"] == f"{COURIER}:{COURIER}"
    assert set(services("site")) == {"vault", "courier", "join"}
    assert services("site")["join"]["profiles"] == ["join"]


def test_only_the_edges_port_is_published() -> None:
    found = services("coordinator")
    published = {part: each["ports"] for part, each in found.items() if "ports" in each}
    assert published == {"network": ["${VEILGRAFT_PORT:-9443}:9443"]}
    assert found["network"]["entrypoint"] == ["sleep", "infinity"]
    # SuperLink's loopback is that of a container in which nothing else listens.
    for part in ("superlink", "executor", "conduct", "edge"):
        assert found[part]["network_mode"] == "service:network"
    assert found["prepare"]["network_mode"] == "none"
    assert not any("ports" in each for each in services("site").values())


def test_only_the_executors_container_holds_the_signing_key() -> None:
    found = services("coordinator")
    for part in ("superlink", "conduct", "edge", "executor"):
        visible = mounts(found[part])
        hidden = {target for target in KEYS if not sees(visible, target)}
        expected = KEYS - {f"{COORDINATOR}/signing.pem"} if part == "executor" else KEYS
        assert hidden == expected, part
    users = {part: found[part]["user"] for part in ("superlink", "edge", "executor", "conduct")}
    assert users.pop("executor") == f"{EXECUTOR}:{EXECUTOR}"
    assert set(users.values()) == {f"{EDGE}:{EDGE}"}
