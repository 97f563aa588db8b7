"""Points of a round, and what can be done to a federation there, for the fault table.

The drill writes `runs/faults.json`; `python -m tests.system.faults` makes the README's table of it.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.system import hosts
from tests.system.federation import Federation

from veilgraft_deploy.processes import Process, kill, members, send

Step = Callable[[Federation], object]
"""Waits for a point of a round, or does something to a federation."""

FOUND = Path("runs") / "faults.json"
MOMENT_SECONDS = 120.0
NOBODY = "\0"


# Points of a round.


def between_rounds(federation: Federation) -> None:
    """Return when a round has just been finished."""
    done = len(federation.rounds())
    federation.wait_for(lambda: len(federation.rounds()) > done, MOMENT_SECONDS, "a round")


def asked(federation: Federation) -> None:
    """Return when a courier's process works on a request which the vault has not yet seen."""
    between_rounds(federation)
    federation.wait_for(lambda: client_app(federation), MOMENT_SECONDS, "a ClientApp")


def reserved(federation: Federation) -> None:
    """Return when the vault of `a` has paid and not yet released; it is stopped there."""
    vault = federation.process("a/vault")
    assert vault is not None
    with watched(federation) as last:
        end = time.monotonic() + MOMENT_SECONDS
        while time.monotonic() < end:
            if last() == "reserve":
                send(vault, signal.SIGSTOP)
                if last() == "reserve":
                    return
                send(vault, signal.SIGCONT)
    raise AssertionError(f"a: no reserve was met without its commit\n{federation.logs()}")


def committed(federation: Federation) -> None:
    """Return when the vault of `a` has released, and holds its answer back."""
    with watched(federation) as last:
        federation.wait_for(lambda: last() == "reserve", MOMENT_SECONDS, "a reserve", 0.001)
        federation.wait_for(lambda: last() == "commit", MOMENT_SECONDS, "a commit", 0.001)


def answered(federation: Federation) -> None:
    """Return when the ClientApp of `a` has ended and its answer waits to be sent."""
    committed(federation)
    gone = lambda: client_app(federation) is None  # noqa: E731
    federation.wait_for(gone, MOMENT_SECONDS, "the ClientApp's end", 0.01)


def uploading(federation: Federation) -> None:
    """Return when a site has announced its reply, and not yet sent all of it."""
    between_rounds(federation)
    path = federation.coordinator.flower / "edge.db"
    query = (
        "SELECT count(*) FROM asked WHERE NOT stored"
        " AND seq IN (SELECT seq FROM messages WHERE reply IS NOT NULL)"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        before = db.execute(query).fetchone()[0]
        more = lambda: db.execute(query).fetchone()[0] > before  # noqa: E731
        federation.wait_for(more, MOMENT_SECONDS, "an upload", 0.0)


@contextmanager
def watched(federation: Federation, site: str = "a") -> Iterator[Callable[[], str]]:
    """Give what tells the kind of a ledger's last entry."""
    path = federation.site(site).state / "ledger.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        yield lambda: str(
            db.execute("SELECT kind FROM entries ORDER BY seq DESC LIMIT 1").fetchone()[0]
        )


# What is done.


def killing(*names: str) -> Step:
    """Kill these parts, one after the other."""

    def fault(federation: Federation) -> None:
        for name in names:
            federation.kill(name)

    return fault


def restarting(name: str) -> Step:
    """Kill a supervisor, and start it again by hand."""

    def fault(federation: Federation) -> None:
        federation.kill(name)
        federation.start(name)

    return fault


def crashing(*names: str) -> Step:
    """Kill all of a machine at once, and start it again."""

    def fault(federation: Federation) -> None:
        for name in names:
            crash(federation, name)
        for name in names:
            federation.start(name)

    return fault


def crash(federation: Federation, name: str) -> None:
    """Kill all that runs on a machine, as if its plug were pulled."""
    if name != "coordinator" and (vault := federation.process(f"{name}/vault")):
        send(vault, signal.SIGKILL)
    namespace = federation.hosts[name].namespace
    assert namespace is not None
    kill(lambda: hosts.inhabitants(namespace))
    federation.reap(name)


def kill_client_app(federation: Federation) -> None:
    """Kill the courier's process of `a`."""
    app = client_app(federation)
    assert app is not None
    hosts.kill_now(app)


def kill_server_app(federation: Federation) -> None:
    """Kill the coordinator's app alone."""
    executor = federation.process("executor")
    assert executor is not None
    apps = [each for each in members({executor.pid}, NOBODY) if each != executor]
    assert apps, federation.logs()
    for app in apps:
        hosts.kill_now(app)


def client_app(federation: Federation, site: str = "a") -> Process | None:
    """Return the process that passes a request to a site's vault; None between requests."""
    executor = federation.process(f"{site}/executor")
    if executor is None:
        return None
    apps = [each for each in members({executor.pid}, NOBODY) if each != executor]
    return apps[0] if apps else None


def cutting(site: str, seconds: float) -> Step:
    """Lose every packet of a site for so long."""

    def fault(federation: Federation) -> None:
        # The coordinator has the first port, and the sites follow.
        port = f"port{1 + federation.sites.index(site)}"
        switch = hosts.own("switch")
        try:
            _ip(switch, port, "down")
            time.sleep(seconds)
        finally:
            _ip(switch, port, "up")

    return fault


def _ip(namespace: str, port: str, state: str) -> None:
    subprocess.run(["ip", "-n", namespace, "link", "set", port, state], check=True, timeout=10)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Move a folder's content to a disk of so many bytes, in the folder's place."""
    aside = folder.with_name(f"{folder.name}.aside")
    shutil.copytree(folder, aside, symlinks=True, copy_function=_copy)
    stat = folder.stat()
    options = f"size={size},mode={stat.st_mode & 0o7777:o},uid={stat.st_uid},gid={stat.st_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, timeout=10)
    try:
        shutil.copytree(aside, folder, symlinks=True, copy_function=_copy, dirs_exist_ok=True)
        _own(aside, folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=10)


def _copy(source: str, target: str) -> None:
    shutil.copy2(source, target)
    _own(Path(source), Path(target))


def _own(source: Path, target: Path) -> None:
    stat = source.stat()
    os.chown(target, stat.st_uid, stat.st_gid)
    target.chmod(stat.st_mode & 0o7777)


def fill(disk: Path) -> Path:
    """Take what is left of a disk, to the last byte; return the file to remove."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return ballast


@contextmanager
def locked(ledger: Path) -> Iterator[None]:
    """Keep everybody else from writing to a ledger."""
    with closing(sqlite3.connect(ledger, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


# What is to hold.


def releases(federation: Federation, site: str) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of a ledger's updates, by kind."""
    path = federation.site(site).state / "ledger.db"
    found: dict[str, list[dict[str, Any]]] = {"reserve": [], "retry": [], "commit": []}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        for kind, body in db.execute("SELECT kind, body FROM entries ORDER BY seq"):
            if kind in found:
                found[kind].append(json.loads(body))
    return found


def left(federation: Federation) -> list[str]:
    """Return the commands of processes that still run on any of the machines, or in the folder."""
    found = []
    spaces = [host.namespace for host in federation.hosts.values() if host.namespace]
    inside = {each.pid for space in spaces for each in hosts.inhabitants(space)}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            ours = int(entry.name) in inside or str(federation.folder) in command
            if ours and command and int(entry.name) != os.getpid():
                found.append(command)
    return found


def record(what: str, at: str, seconds: float) -> None:
    """Write down how long it took to recover from a fault, beyond what a round takes anyhow."""
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    found[f"{what} | {at}"] = round(max(0.0, seconds), 1)
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(found, indent=1))


def table() -> str:
    """Return what was recorded, in Markdown."""
    found: dict[str, float] = json.loads(FOUND.read_text())
    lines = [f"| {what} | {seconds:.0f} s |" for what, seconds in found.items()]
    return "\n".join(["| fault | when | to recover |", "|---|---|---:|", *lines])


if __name__ == "__main__":
    print(table())
