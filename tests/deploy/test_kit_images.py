"""The images, their scripts as they run, and the proxies that may stand in front."""

import datetime
import importlib.metadata
import ipaddress
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from packaging.requirements import Requirement
from tests.deploy.kit import COURIER, EDGE, KIT, PARTS, VAULT

from veilgraft_deploy import cli, place

HEAVY = {"torch", "opacus", "transformers", "pyarrow", "datasets", "tokenizers", "scikit-learn"}


@pytest.mark.parametrize("part", ["vault", "courier", "coordinator"])
def test_an_image_is_built_without_a_network_and_runs_without_privileges(part: str) -> None:
    text = (KIT / "docker" / f"Dockerfile.{part}").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    steps = [line for line in lines if line.startswith(("RUN", "ADD", "COPY"))]
    assert not any(re.search(r"https?:|curl|wget|apt|apk|git |index-url", step) for step in steps)
    installs = [step for step in steps if "pip" in step]
    assert len(installs) == 1
    assert "--no-index --find-links /wheels" in installs[0]
    assert [line for line in lines if line.startswith("ARG BASE")] == ["ARG BASE=python:3.11-slim"]
    wanted = {
        "vault": '"veilgraft[vault]"',
        "courier": "veilgraft",
        "coordinator": '"veilgraft[vault]"',
    }
    assert installs[0].rsplit("/wheels ", 1)[1].strip() == wanted[part]
    uid = {"vault": VAULT, "courier": COURIER, "coordinator": EDGE}[part]
    assert [line for line in lines if line.startswith("USER")] == [f"USER {uid}:{uid}"]
    assert any(f"--uid {uid} " in step for step in steps)
    run = json.loads(lines[-1].removeprefix("CMD "))
    assert " ".join(run) == PARTS["edge" if part == "coordinator" else part]
    assert any("HEALTHCHECK" in line for line in lines)


@pytest.mark.parametrize("roots", [["veilgraft"], ["veilgraft", "dp-accounting"]])
def test_neither_courier_nor_coordinator_needs_torch_or_readers_of_data(roots: list[str]) -> None:
    needed = set().union(*(_closure(root) for root in roots))
    assert {"flwr", "grpcio", "cryptography"} <= needed
    assert not needed & HEAVY


def _closure(root: str) -> set[str]:
    found: set[str] = set()
    left = [Requirement(root)]
    while left:
        wanted = left.pop()
        name = wanted.name.lower().replace("_", "-")
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key in found:
            continue
        found |= {key, name}
        for text in importlib.metadata.requires(wanted.name) or []:
            each = Requirement(text)
            extras = ["", *wanted.extras]
            if each.marker is None or any(each.marker.evaluate({"extra": x}) for x in extras):
                left.append(each)
    return found


def test_what_the_vault_needs_does_hold_torch() -> None:
    assert _closure("veilgraft[vault]") >= HEAVY


FILES = {
    "site.yaml": "limits: {}",
    "coordinator.json": "{}",
    "state/ledger.db": "spent",
    "state/identity.pem": "key",
    "courier/node.pem": "key",
    "courier/coordinator.json": "{}",
    "courier/work/executor.secret": "secret",
    "courier/flower/apps/app/pyproject.toml": "",
    "run/courier.pid": "1",
    "logs/vault.log": "",
}


@pytest.fixture
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out a folder as root's `site join` leaves it, where other users can get to it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    folder = tmp_path_factory.mktemp("kit")
    for above in [folder, *folder.parents][:-2]:
        if not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o001)
    site = folder / "site"
    for name, text in FILES.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (site / "state" / "outside").symlink_to("/etc/hostname")
    return site


def test_a_joined_folder_is_the_vaults_and_the_courier_reads_its_own_part(joined: Path) -> None:
    outside = Path("/etc/hostname").stat().st_uid
    for _ in range(2):
        subprocess.run([KIT / "docker" / "site-permissions.sh", joined], check=True, timeout=30)
    assert {name for name in FILES if _opens(COURIER, joined / name)} == {
        "courier/node.pem",
        "courier/coordinator.json",
        "courier/work/executor.secret",
        "courier/flower/apps/app/pyproject.toml",
        "run/courier.pid",
    }
    of_the_vault = {name for name in FILES if not name.startswith("courier/work/")}
    assert {name for name in FILES if _opens(VAULT, joined / name)} == of_the_vault
    for folder in (".", "run", "courier", "courier/flower"):
        assert _as(COURIER, "test", "-w", str(joined / folder)).returncode != 0, folder
    assert oct((joined / "run").stat().st_mode & 0o7777) == "0o2750"
    assert (joined / "run").stat().st_gid == COURIER
    assert oct((joined / "courier/node.pem").stat().st_mode & 0o7777) == "0o640"
    assert oct((joined / "state").stat().st_mode & 0o7777) == "0o700"
    assert Path("/etc/hostname").stat().st_uid == outside


def test_permissions_are_given_to_nothing_but_a_sites_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [KIT / "docker" / "site-permissions.sh", tmp_path], capture_output=True, timeout=30
    )
    assert done.returncode == 2
    assert tmp_path.stat().st_uid == os.geteuid()


def _opens(uid: int, path: Path) -> bool:
    return _as(uid, "cat", str(path)).returncode == 0


def _as(uid: int, *command: str) -> "subprocess.CompletedProcess[bytes]":
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    return subprocess.run([*become, *command], capture_output=True, timeout=30)


class _Answer(BaseHTTPRequestHandler):
    statuses: ClassVar[dict[str, int]] = {"/veilgraft/health": 200}

    def do_GET(self) -> None:
        self.send_response(self.statuses.get(self.path, 403))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Path]:
    """Serve /veilgraft/health over TLS, and yield the folder of its coordinator."""
    (tmp_path / "tls").mkdir()
    _certify(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls" / "ca.pem", tmp_path / "tls" / "key.pem")
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    (tmp_path / "coordinator.yaml").write_text(f"port: {server.server_port}\n")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield tmp_path
    server.shutdown()
    server.server_close()
    thread.join(10)


def _certify(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")])
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _health(folder: Path) -> "subprocess.CompletedProcess[str]":
    script = KIT / "docker" / "edge_health.py"
    command = [sys.executable, str(script), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_an_edge_that_answers_is_healthy(edge: Path) -> None:
    done = _health(edge)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_edge_that_says_no_a_stranger_and_silence_are_not_healthy(
    edge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answer, "statuses", {})
    assert "got 403" in _health(edge).stderr
    _certify(edge / "tls")  # another CA than the server's
    assert (_health(edge).returncode, _health(edge).stderr) == (
        1,
        "edge: SSLCertVerificationError\n",
    )
    (edge / "coordinator.yaml").write_text("port: 1\n")
    assert (_health(edge).returncode, _health(edge).stderr) == (1, "edge: ConnectionRefusedError\n")


def test_a_proxy_only_stands_in_front_of_the_edge() -> None:
    nginx = (KIT / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    code = "\n".join(line for line in nginx.splitlines() if not line.strip().startswith("#"))
    # Bytes pass unopened: no key, no path that a proxy could let through.
    assert re.findall(r"proxy_pass (\S+);", code) == ["127.0.0.1:9443"]
    assert not re.search(r"\bhttp\s*{|ssl_|location", code)
    caddy = (KIT / "proxy" / "Caddyfile").read_text(encoding="utf-8")
    code = "\n".join(line for line in caddy.splitlines() if not line.strip().startswith("#"))
    assert re.findall(r"reverse_proxy (\S+)", code) == ["https://127.0.0.1:9443"]
    assert "tls_trust_pool file" in code
    assert not re.search(r"insecure|handle|rewrite|uri |9092", code)


# What the kits name, as Veilgraft names it


def test_veilgraft_has_each_command_that_a_kit_runs() -> None:
    for command in [*PARTS.values(), "site health --dir x"]:
        main, part = command.split()[:2]
        group = typer.main.get_command(cli.app).commands[main]  # type: ignore[attr-defined]
        assert part in group.commands, command


def test_the_couriers_number_is_the_one_that_joining_writes() -> None:
    assert place.DEFAULT_COURIER == COURIER
