"""Unix sockets in a file system: one owner each, the right mode, paths of any length.

A socket's address holds 107 bytes, fewer than many folders' paths: it is reached through an open
descriptor of its folder.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veilgraft.errors import InputError


@contextmanager
def short(path: Path) -> Iterator[str]:
    """Yield a path of a few bytes to the same entry, good in this process until the end.

    Raises:
        OSError: the entry's folder can't be opened.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@contextmanager
def listening(path: Path, mode: int, backlog: int = 16) -> Iterator[socket.socket]:
    """Yield a socket that listens at `path`; nobody but its owner can connect before it has `mode`.

    What a killed owner left is replaced. A lock on the file beside it (`.lock`, which stays) is
    held until the end; then the socket is closed and its file removed.

    Raises:
        InputError: a living process listens there, something else has that name, or the folder
            can't be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.callback(os.close, _lock(path))
            listener = held.enter_context(socket.socket(socket.AF_UNIX))
            _bind(listener, path, mode)
        except OSError as error:
            raise InputError(f"{path}: can't make a socket: {error.strerror}") from None
        held.callback(_remove, path)
        listener.listen(backlog)  # until here all are refused
        yield listener


def _lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(path.with_name(f"{path.name}.lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"{path}: expected no vault here, but one is running") from None
    return lock


def _bind(listener: socket.socket, path: Path, mode: int) -> None:
    _remove(path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: expected a socket or nothing, got something else")
    with short(path) as address:
        listener.bind(address)
    path.chmod(mode)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
