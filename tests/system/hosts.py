"""Hosts for tests: each a network namespace of its own, with one cable to a common switch.

Names start with `vgt-PID-STARTTIME-`, of the process that made them: what a killed run left is
found, ended and removed by the next one. Needs root and Linux; `missing` says what is not there.
"""

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

import veilgraft
from veilgraft_deploy.processes import Process, alive, identity, kill, send, until

PREFIX = "vgt"
NAMESPACES = Path("/run/netns")
SUBNET = "10.213.0"
STRANGER = 64299
"""A user that owns nothing, to see what anybody can."""


@lru_cache
def missing(namespaces: bool = True) -> str:
    """Return why hosts can't be had on this machine; empty where they can."""
    if os.geteuid() != 0:
        return "users and namespaces need root"
    tools = ["nsenter", "unshare", "setpriv"]
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        return f"{', '.join(absent)}: not installed"
    if namespaces and importlib.util.find_spec("pyroute2") is None:
        return "pyroute2 is not installed"
    flags = ["--mount", "--propagation", "private", *(["--net"] if namespaces else [])]
    stranger = ["setpriv", f"--reuid={STRANGER}", "--clear-groups", "--no-new-privs"]
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-trial-") as folder:
        world = ["unshare", *flags, *_world(Path(folder))]
        done = subprocess.run(
            [*world, *stranger, sys.executable, "-c", "import veilgraft"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    if done.returncode:
        return f"namespaces or users are not permitted: {done.stderr.strip()[-300:]}"
    return ""


def skip_loudly(reason: str) -> None:
    """Skip the test, so that nobody takes it for one that passed."""
    if reason:
        sys.__stderr__ and print(f"\nNOT TESTED: {reason}", file=sys.__stderr__)
        pytest.skip(f"NOT TESTED: {reason}")


@dataclass(frozen=True)
class Host:
    """One machine: its address, and how a command is run on it."""

    name: str
    address: str
    namespace: Path | None
    world: tuple[str, ...]

    def command(self, *arguments: object) -> list[str]:
        """Return the command that runs `arguments` here, and dies with this process's thread."""
        net = ["nsenter", f"--net={self.namespace}", "--"] if self.namespace else []
        mount = ["unshare", "--mount", "--propagation", "private", *self.world]
        dying = ["setpriv", "--pdeathsig", "KILL", "--"]
        return [*map(str, (*net, *dying, *mount, *arguments))]


@contextmanager
def network(names: Sequence[str], folder: Path, namespaces: bool = True) -> Iterator[list[Host]]:
    """Give hosts that reach each other and nothing else; without `namespaces`, all on loopback.

    On the way out, whatever still runs in them is killed, and they are removed. A process's second
    network, beside its first, has a number in its names.
    """
    tidy()
    world = tuple(_world(folder))
    if not namespaces:
        yield [Host(name, "127.0.0.1", None, world) for name in names]
        return
    tags = (f"{number}-" if number else "" for number in itertools.count())
    tag = next(each for each in tags if not (NAMESPACES / own(f"{each}switch")).exists())
    made = {name: own(f"{tag}{name}") for name in names}
    switch = own(f"{tag}switch")
    try:
        _cable(switch, [*made.values()])
        yield [
            Host(name, f"{SUBNET}.{number}", NAMESPACES / namespace, world)
            for number, (name, namespace) in enumerate(made.items(), start=1)
        ]
    finally:
        for namespace in [*made.values(), switch]:
            remove(namespace)


def own(name: str) -> str:
    """Return `name` as one of this process's own."""
    return "-".join([PREFIX, *map(str, identity(os.getpid())), name])


def tidy() -> None:
    """End and remove what runs of this that were killed have left."""
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        if not _owned(path.name):
            remove(path.name)
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if not _owned(path.name):
            delete(path)


def own_folder() -> Path:
    """Make a folder that other users may enter; pytest's own they may not."""
    path = Path(tempfile.mkdtemp(prefix=own("")))
    path.chmod(0o755)
    return path


def delete(path: Path) -> None:
    """Remove a folder, read-only ones in it as well."""
    for parent, _, _ in os.walk(path):
        with suppress(OSError):
            Path(parent).chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def _owned(name: str) -> bool:
    """Return whether who made it still runs; what is not of this form is left alone."""
    parts = name.split("-")
    with suppress(ValueError, IndexError):
        return alive(Process(int(parts[1]), int(parts[2])))
    return True


def _cable(switch: str, namespaces: Sequence[str]) -> None:
    script = Path(__file__).with_name("cable.py")
    done = subprocess.run(
        [sys.executable, script, SUBNET, switch, *namespaces],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def remove(namespace: str) -> None:
    """Kill what runs in a namespace, and remove it."""
    from pyroute2 import netns

    kill(lambda: inhabitants(NAMESPACES / namespace))
    with suppress(OSError):
        netns.remove(namespace)


def inhabitants(namespace: Path) -> list[Process]:
    """Return the processes in a network namespace; no zombies."""
    try:
        wanted = namespace.stat()
    except OSError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            info = (entry / "ns" / "net").stat()
            who = identity(int(entry.name))
            if (info.st_dev, info.st_ino) == (wanted.st_dev, wanted.st_ino) and alive(who):
                found.append(who)
    return found


def end(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    """Ask a child to end, kill it when its time is over; return its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        process.kill()
    return process.wait(10)


def kill_now(process: Process) -> None:
    """SIGKILL this very process, and wait until it is gone."""
    send(process, signal.SIGKILL)
    assert until(lambda: not alive(process), 10), f"pid {process.pid}: did not end"


def _world(folder: Path) -> list[str]:
    """Return what makes Python readable to every user, in the mount namespace it is run in.

    Where a folder above Python or the source is closed, an empty one takes its place in which
    only they lie.
    """
    stage = folder / "stage"
    script = ["set -e"]
    needed = _needed()
    for number, path in enumerate(needed):
        script += [f"mkdir -p '{stage}/{number}'", f"mount --bind '{path}' '{stage}/{number}'"]
    closed = sorted({top for path in needed if (top := _closed(path))})
    script += [f"mount -t tmpfs -o mode=755 tmpfs '{top}'" for top in closed]
    for number, path in enumerate(needed):
        script += [f"mkdir -p '{path}'", f"mount --move '{stage}/{number}' '{path}'"]
    return ["sh", "-c", "\n".join([*script, 'exec "$@"']), "sh"]


def _needed() -> list[Path]:
    source = Path(veilgraft.__file__).resolve().parents[2]
    paths = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), source}
    shut = {path for path in paths if _closed(path)}
    return sorted(path for path in shut if not any(path.is_relative_to(p) for p in shut - {path}))


def _closed(path: Path) -> Path | None:
    """Return the first folder above `path` that not everybody may enter."""
    above = reversed(path.parents)
    return next((folder for folder in above if not folder.stat().st_mode & 0o001), None)
