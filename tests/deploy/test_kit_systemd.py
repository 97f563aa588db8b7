"""The units: who has a network, sees records, holds the key; and what systemd says of them."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from tests.deploy.kit import (
    COORDINATOR,
    COURIER,
    COURIERS,
    DATA,
    EDGE,
    EXECUTOR,
    KIT,
    PARTS,
    SITE,
    VAULT,
)

UNITS = sorted((KIT / "systemd").glob("*.service"))
PROTECTIONS = (
    "ProtectHome",
    "PrivateTmp",
    "PrivateDevices",
    "ProtectClock",
    "ProtectControlGroups",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "PrivateIPC",
    "RestrictNamespaces",
    "RestrictRealtime",
    "LockPersonality",
)
EXPOSURE = {"veilgraft-vault": 8, "veilgraft-coordinator-prepare": 18}
"""Tenths of systemd's points (0 safe, 100 unsafe); 15 where nothing is said."""


@cache
def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def unit(name: str) -> dict[str, list[str]]:
    return settings(KIT / "systemd" / f"veilgraft-{name}.service")


def analyze(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    if (command := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not here: the units were not shown to systemd")
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = tmp_path / "veilgraft"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in UNITS:
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(
            text.replace("/opt/veilgraft/bin/veilgraft", str(program))
        )
    done = analyze(
        "verify", "--man=no", "--recursive-errors=no", *sorted(tmp_path.glob("*.service"))
    )
    ours = [line for line in done.stderr.splitlines() if "veilgraft" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_finds_the_unit_little_exposed(path: Path) -> None:
    threshold = EXPOSURE.get(path.stem, 15)
    done = analyze("security", "--offline=true", f"--threshold={threshold}", path)
    assert done.returncode == 0, done.stdout.splitlines()[-2:]
    assert analyze("security", "--offline=true", "--threshold=1", path).returncode != 0


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_every_unit_runs_its_part_without_privileges(path: Path) -> None:
    part = path.stem.removeprefix("veilgraft-").removeprefix("coordinator-")
    found = settings(path)
    assert found["ExecStart"] == [f"/opt/veilgraft/bin/veilgraft {PARTS[part]}"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["AmbientCapabilities"] == [""]
    for protection in PROTECTIONS:
        assert found[protection] == ["yes"], protection
    if part != "prepare":
        assert found["CapabilityBoundingSet"] == [""]
        assert found["User"][0] in {
            "veilgraft-vault",
            "veilgraft-courier",
            "veilgraft-edge",
            "veilgraft-executor",
        }


def test_the_vaults_unit_has_no_network_and_the_couriers_no_records() -> None:
    vault, courier = unit("vault"), unit("courier")
    assert vault["PrivateNetwork"] == ["yes"]
    assert not {"JoinsNamespaceOf", "NetworkNamespacePath"} & vault.keys()
    assert not {"AF_INET", "AF_INET6", "AF_PACKET"} & set(
        vault["RestrictAddressFamilies"][0].split()
    )
    assert vault["ReadWritePaths"] == [SITE]
    assert vault["ReadOnlyPaths"] == [DATA]
    # With it the courier would be nobody to the vault.
    assert "PrivateUsers" not in vault
    assert courier["TemporaryFileSystem"] == ["/var/lib/veilgraft:ro /srv:ro"]
    bound = dict.fromkeys(courier["BindReadOnlyPaths"], False)
    assert bound | dict.fromkeys(courier["BindPaths"], True) == COURIERS
    assert DATA in courier["InaccessiblePaths"][0]
    assert "ReadWritePaths" not in courier
    assert vault["User"] != courier["User"]
    assert "SupplementaryGroups" not in courier


def test_only_the_executors_unit_holds_the_signing_key_and_only_the_edges_is_reached() -> None:
    for part in ("superlink", "executor", "conduct", "edge"):
        found = unit(f"coordinator-{part}")
        hidden = set(" ".join(found["InaccessiblePaths"]).split())
        assert f"{COORDINATOR}/tls/ca.key" in hidden
        assert f"{COORDINATOR}/invitations" in hidden
        assert (f"{COORDINATOR}/signing.pem" in hidden) == (part != "executor")
        assert found["User"] == ["veilgraft-executor" if part == "executor" else "veilgraft-edge"]
        if part != "edge":
            assert found["IPAddressDeny"] == ["any"]
            assert found["IPAddressAllow"] == ["localhost"]


def test_sysusers_makes_the_users_that_the_images_and_units_name(tmp_path: Path) -> None:
    if (command := shutil.which("systemd-sysusers")) is None or os.geteuid() != 0:
        pytest.skip("needs root and systemd-sysusers")
    (tmp_path / "etc").mkdir()
    conf = KIT / "systemd" / "veilgraft.sysusers.conf"
    subprocess.run(
        [command, f"--root={tmp_path}", conf], check=True, capture_output=True, timeout=30
    )
    rows = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    made = {row[0]: (int(row[2]), row[6]) for row in rows}
    expected = {"vault": VAULT, "courier": COURIER, "edge": EDGE, "executor": EXECUTOR}
    assert {name: uid for name, (uid, _) in made.items()} == {
        f"veilgraft-{name}": uid for name, uid in expected.items()
    }
    assert all(shell.endswith("nologin") for _, shell in made.values())
    groups = [line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()]
    members = {group[0]: group[3].split(",") for group in groups if group[3]}
    assert members == {"veilgraft-edge": ["veilgraft-executor"]}
    named = {user for path in UNITS for user in settings(path).get("User", [])}
    assert named == set(made)
