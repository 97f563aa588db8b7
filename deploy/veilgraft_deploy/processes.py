"""Processes as /proc shows them: who is who, and who belongs to whom.

Process numbers are used again; so a process is known by its start time as well, and signalled
through a descriptor.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

MARK = "VEILGRAFT_SERVICE"
"""The variable that tells what a process was started for; its children inherit it.

For each supervisor above it: a random text, `/`, the service's name, `/`.
"""

KILLED_SECONDS = 5.0
"""How long to wait for what got SIGKILL; only a process stuck in the kernel takes longer."""


class Process(NamedTuple):
    """A process for good: its number may be used again, together with its start time never."""

    pid: int
    starttime: int


def kill(found: Callable[[], list[Process]]) -> None:
    """SIGKILL what is found until none is left, for one may fork while the others are killed."""

    def gone() -> bool:
        left = found()
        for process in left:
            send(process, signal.SIGKILL)
        return not left

    if not until(gone, KILLED_SECONDS):
        log.warning("pids %s: can't be killed", [process.pid for process in found()])


def members(sessions: Collection[int], mark: str) -> list[Process]:
    """Return who lives in one of the sessions, or carries the mark; no zombies."""
    found = []
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        # Gone meanwhile, or another user's: one that is ours we may read.
        with suppress(OSError):
            stat = _stat(pid)
            ours = int(stat[3]) in sessions or _carries(pid, mark)
            if ours and stat[0] not in "ZX" and pid != os.getpid():
                found.append(Process(pid, int(stat[19])))
    return found


def killed(session: int) -> list[Process]:
    """Return who of a session was ended by a signal, and was not yet waited for."""
    found = []
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with suppress(OSError):
            stat = _stat(pid)
            # The last field is the status that `wait` would give; a signal is in its low bits.
            if stat[0] == "Z" and int(stat[3]) == session and int(stat[-1]) & 0x7F:
                found.append(Process(pid, int(stat[19])))
    return found


def _carries(pid: int, mark: str) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    name, sought = f"{MARK}=".encode(), mark.encode()
    return any(entry.startswith(name) and sought in entry for entry in environment)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state (0) on: session (3), start time (19)."""
    # The name before them may hold blanks and brackets.
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def identity(pid: int) -> Process:
    """Return who has the number now; raises `OSError` if nobody does."""
    return Process(pid, int(_stat(pid)[19]))


def alive(process: Process) -> bool:
    """Return whether it still runs; a zombie does not."""
    try:
        stat = _stat(process.pid)
    except OSError:
        return False
    return int(stat[19]) == process.starttime and stat[0] not in "ZX"


def send(process: Process, number: signal.Signals) -> bool:
    """Signal this very process, never one that got its number later; return whether it lived."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the opening: from here on the descriptor means one process.
        if not alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def has_ended(pid: int) -> bool:
    """Return whether our child has ended, and leave it a zombie: so its number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait for `done` for so long; return whether it came."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
