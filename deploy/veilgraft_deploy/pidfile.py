"""The file that says which supervisor runs, and what: locked for as long as it does.

JSON: {pid, starttime, children: {name: [pid, starttime]}, mark, boot}. What it says outlives a
supervisor that is killed, so that the next one can end what was left.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veilgraft.durable import opened_folder
from veilgraft.errors import InputError
from veilgraft_deploy.processes import Process, alive, identity, kill, members


class Book:
    """What stands in the pid file, which is locked for as long as its supervisor runs."""

    def __init__(self, descriptor: int, mark: str) -> None:
        self._descriptor = descriptor
        own = identity(os.getpid())
        self._facts = own._asdict() | {"children": {}, "mark": mark, "boot": _boot()}
        self.write({})

    def write(self, children: Mapping[str, Process]) -> None:
        """Write who runs now. In place, as the lock goes with the file; one call, no torn text."""
        data = json.dumps(self._facts | {"children": children}).encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Lock the pid file, end what its last supervisor left behind; remove the file at the end.

    Raises:
        InputError: a supervisor that runs holds it, it is another user's, or it can't be opened.
    """
    descriptor = _lock(path)
    try:
        left = _parsed(descriptor)
        if left is not None:
            _end_leftovers(left)
        try:
            yield descriptor
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            facts = _parsed(descriptor) or {"pid": "not yet known"}
            os.close(descriptor)
            raise InputError(f"{path}: is already running (pid {facts['pid']})") from None
        # The one before took its file away between our opening and locking it.
        os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    """Open a pid file. Whoever may write one may have its processes killed: so only our own."""
    if flags & os.O_CREAT and not path.parent.exists():
        raise InputError(f"{path}: its folder is missing")
    try:
        with opened_folder(path.parent.absolute()) as folder:
            flags |= os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path.name, flags, 0o600, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: can't be opened: {error.strerror}") from None
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        os.close(descriptor)
        raise InputError(f"{path}: belongs to user {owner}; expected to be run as that user")
    return descriptor


def recorded(path: Path) -> dict[str, Any] | None:
    """Return what the file says, whether or not it still holds; None where there is none.

    Raises:
        InputError: the file belongs to another user, or can't be opened.
    """
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _parsed(descriptor)
    finally:
        os.close(descriptor)


def _parsed(descriptor: int) -> dict[str, Any] | None:
    """Return what a pid file says; None when it is empty or from before the machine last booted."""
    text = os.pread(descriptor, 1 << 16, 0).decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # More may follow for a moment, while a shorter text takes a longer one's place.
        facts: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
        who = [(facts["pid"], facts["starttime"]), *map(tuple, facts["children"].values())]
        whole = all(len(each) == 2 and {type(n) for n in each} == {int} for each in who)
        # No mark, or a short one, would be every process's.
        if whole and facts["boot"] == _boot() and re.fullmatch("[0-9a-f]{32}", facts["mark"]):
            return facts
    return None


def _end_leftovers(facts: Mapping[str, Any]) -> None:
    led = {child[0] for child in facts["children"].values() if alive(Process(*child))}
    kill(lambda: members(led, facts["mark"] + "/"))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
