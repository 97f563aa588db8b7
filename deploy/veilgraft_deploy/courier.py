"""A site's running processes: the courier's (SuperNode and executor), and vault and courier both.

The courier's part reads nothing but `courier` and `run`, so it can stand in a container of its own.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from veilgraft.errors import InputError, VeilgraftError
from veilgraft.identity import PASSPHRASE_FILE
from veilgraft_client.connection import DeskClient
from veilgraft_client.policy import AUTO
from veilgraft_client.separation import courier_command, vault_command
from veilgraft_deploy import provision, supervisor
from veilgraft_deploy.place import Place, coordinator
from veilgraft_deploy.processes import Process, killed, send
from veilgraft_deploy.supervisor import Service, supervise

log = logging.getLogger(__name__)

POLL_SECONDS = "0.2"
READY_SECONDS = 180.0
"""For a vault to come up: torch alone may take a minute on a slow disk."""

STOP_SECONDS = 40.0

_OFF = {
    "DO_NOT_TRACK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    # HOME is the courier's to write to: nothing is imported from there.
    "PYTHONNOUSERSITE": "1",
}


def start(place: Place) -> int:
    """Run vault and courier until SIGTERM; each is started again when it ends.

    Raises:
        InputError: the folder is being run already, or another user must start it.
        VeilgraftError: vault or courier does not come up; says why.
    """
    found = place.courier_user
    uid, groups = found or (None, frozenset())
    gid = (uid if uid in groups else min(groups)) if groups else None
    with place.as_owner():
        # After an update of Veilgraft, or a move of its environment.
        if not provision.is_current(place.flower):
            provision.install_bundle(place.flower)
    place.settle(found)
    folder = str(place.path)
    vault = vault_command(_command("vault", folder), place.owner)
    courier = courier_command(_command("courier", folder), uid, gid)
    place.logs.mkdir(mode=0o700, exist_ok=True)
    services = [
        Service(
            "vault",
            vault,
            {name: os.environ[name] for name in (PASSPHRASE_FILE, AUTO) if name in os.environ},
            place.logs / "vault.log",
            ready=lambda: _answers(place),
            ready_seconds=READY_SECONDS,
            stop_seconds=STOP_SECONDS / 2,
        ),
        Service(
            "courier",
            courier,
            {"HOME": str(place.work)},
            place.logs / "courier.log",
            stop_seconds=STOP_SECONDS / 2,
        ),
    ]
    return supervise(services, place.pid_file)


def courier(path: Path) -> int:
    """Run SuperNode and executor until SIGTERM; each is started again when it ends.

    Raises:
        InputError: `path` holds no courier's folder, or this user may not use it.
        VeilgraftError: one of the two does not come up.
    """
    place = Place(path.resolve())
    pinned = coordinator(place.courier / "coordinator.json")
    if not os.access(place.work, os.W_OK):
        raise InputError(f"{place.work}: expected a folder that user {os.geteuid()} may write")
    temporary = place.work / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    port, secret = _free_port(), _secret(place.work)
    env = _OFF | {
        "FLWR_HOME": str(place.flower),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_SECONDS,
        "HOME": str(place.work),
        "PATH": f"{place.flower / 'bin'}:{os.defpath}",
        "TMPDIR": str(temporary),
        "VEILGRAFT_SOCKET": str(place.socket),
    }
    supernode = [
        *(sys.executable, "-P", "-m", "veilgraft_deploy.launch", "flower-supernode"),
        *("--superlink", pinned.address),
        *("--root-certificates", str(place.courier / "ca.pem")),
        *("--auth-supernode-private-key", str(place.node_key)),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    executor = [
        *_tool("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
        "--insecure",
        *("--superexec-auth-secret-file", str(secret)),
    ]
    logs = place.work
    known: set[Process] = set()
    # Not there at a site's start are not the same as broken: both are tried for ever.
    services = [
        Service("supernode", supernode, env, logs / "supernode.log", ready=lambda: _open(port)),
        Service("executor", executor, env, logs / "executor.log", ready=lambda: True),
    ]
    pid_file = place.work / "courier.pid"
    return supervise(services, pid_file, tick=lambda: _renew(pid_file, known))


def _renew(pid_file: Path, known: set[Process]) -> bool:
    """End the SuperNode where the process that had its task was killed.

    It works on one task at a time, and would wait a minute for that one. Ended, it starts again,
    and the coordinator asks again.

    Args:
        known: executors met so far, and their apps that were killed; grows.
    """
    running = supervisor.running(pid_file)
    children = {name: Process(*who) for name, who in running["children"].items()} if running else {}
    executor, supernode = children.get("executor"), children.get("supernode")
    if executor is None:
        return True
    lost = {executor, *killed(executor.pid)} - known
    if known and lost and supernode is not None:
        log.warning("a task was lost with its process; the SuperNode is started again")
        send(supernode, signal.SIGTERM)
    known |= lost
    return True


def stop(place: Place) -> bool:
    """Stop what `start` runs; return whether it was running."""
    return supervisor.stop(place.pid_file, STOP_SECONDS)


def _command(part: str, folder: str) -> list[str]:
    return [sys.executable, "-P", "-m", "veilgraft_deploy.cli", "site", part, "--dir", folder]


def _tool(name: str) -> list[str]:
    """Return the command of one of Flower's tools as it is installed beside this Python."""
    found = Path(sys.executable).parent / name
    if not found.is_file():
        raise InputError(f"{found}: missing; expected Flower installed beside {sys.executable}")
    return [str(found)]


def _secret(folder: Path) -> Path:
    """Write a new secret that SuperNode and executor share."""
    handle, name = tempfile.mkstemp(prefix="secret.", dir=folder)
    with os.fdopen(handle, "w") as file:
        file.write(os.urandom(32).hex())
    path = folder / "executor.secret"
    Path(name).rename(path)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(place: Place) -> bool:
    try:
        return bool(DeskClient(place.desk, 5.0).do("ping"))
    except VeilgraftError:
        return False
