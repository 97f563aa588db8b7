"""Files that survive a crash, or a loss of power, and that nobody's links lead astray."""

import contextlib
import fcntl
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veilgraft.errors import InputError

PAUSE_SECONDS = 0.2
"""Between looks at a lock that another process holds."""


class BusyError(InputError):
    """Another process is at it; one at a time, so that none acts on old facts."""


# Only to pass through: who may not list a folder may still own what lies in it.
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def sync_folder(folder: Path) -> None:
    """Return once the folder's entries, a rename among them, have reached the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new, whole.

    Its mode is what the umask leaves. Whoever else may write to the folder can't have another
    file written in its place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_new(path: Path, data: bytes) -> None:
    """Write a file for its owner alone, mode 0600, synced.

    Raises:
        InputError: there is a file of this name; a key is never replaced.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InputError(f"{path}: exists already; a key is never replaced") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
    sync_folder(path.parent)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One all-or-nothing write to a database without Python's own transactions."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def alone(path: Path, wait_seconds: float) -> Iterator[None]:
    """Hold a lock file, made where there is none, until the block or the process ends.

    Raises:
        BusyError: another process holds it, and has not let go within so many seconds.
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    end = time.monotonic() + wait_seconds
    try:
        while not _taken(held):
            if time.monotonic() > end:
                raise BusyError(f"{path}: another process has it")
            time.sleep(PAUSE_SECONDS)
        yield
    finally:
        os.close(held)


def _taken(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """Give a descriptor of a folder to which no link leads on the way.

    Raises:
        InputError: there is a link, or no folder.
    """
    handle = os.open("/", _FOLDER)
    try:
        for part in folder.parts[1:]:
            try:
                inner = os.open(part, _FOLDER, dir_fd=handle)
            except OSError as error:
                raise InputError(
                    f"{folder}: expected a folder, and no link on the way to it, at {part}: "
                    f"{error.strerror}"
                ) from None
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def give(path: Path, uid: int, gid: int, mode: int) -> None:
    """Set whose a file or folder is, never those of what a link on the way points to.

    Raises:
        InputError: there is a link on the way, or the file has a second name.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with opened_folder(path.parent) as folder:
        try:
            handle = os.open(path.name, flags, dir_fd=folder)
        except OSError as error:
            raise InputError(f"{path}: expected no link: {error.strerror}") from None
        try:
            found = os.fstat(handle)
            if not stat.S_ISDIR(found.st_mode) and found.st_nlink != 1:
                raise InputError(f"{path}: expected a plain file with one name")
            os.fchown(handle, uid, gid)
            # After the change of owner, which takes set-id bits away.
            os.fchmod(handle, mode)
        finally:
            os.close(handle)
