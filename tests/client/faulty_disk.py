"""A disk that fails where a test says so: a fault-injecting layer below Python's `sqlite3`.

SQLite reaches files through a VFS, a table of functions. While a `FaultyDisk` is entered, the
default VFS is a copy of "unix" in which write, truncate, sync and delete pass through here. All
else, locks and shared memory included, is SQLite's own, so a write-ahead log works as ever.

Writes go to the real file at once and are what every process reads. What a loss of power may
take is kept in a journal of changes since the last successful sync. The model is what POSIX
promises and no more: unsynced changes survive in any combination, each of them possibly torn at a
sector; a deletion is undone unless the folder was synced; and on a forgetful disk, what was
pending when a sync failed is promised by no later sync (Rebello et al., "Can Applications Recover
from fsync Failures?", USENIX ATC 2020). A file that was there before its first opening here counts
as synced, name and all.

A *process* is a thread: one that a fault killed can write no more, not even by closing.
"""

import ctypes
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECTOR = 512

OK, FULL, TORN = 0, 13, -1
_IOERR = {"write": 778, "sync": 1034, "truncate": 1546, "delete": 2570}
_TRACKED = 0x100 | 0x800 | 0x80000
"""Main database, rollback journal, write-ahead log."""

Choice = Callable[[int], int]
"""Returns a number from 0 to n - 1; 0 is the mildest outcome."""


class ProcessDied(BaseException):
    """Raised by `FaultyDisk.check_alive` where a fault has ended this process."""


@dataclass
class Change:
    """One write, or a truncation (no data): `safe` once synced, `failed` if a sync failed on it."""

    offset: int
    data: bytes | None
    safe: bool = False
    failed: bool = False

    def apply(self, content: bytearray) -> None:
        """Do to `content` what was done to the file."""
        if self.data is None:
            del content[self.offset :]
            return
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data

    def torn(self, choose: Choice) -> "Change":
        """Return the part before or behind one sector boundary."""
        assert self.data is not None
        first = SECTOR - self.offset % SECTOR
        cuts = range(first, len(self.data), SECTOR)
        cut = cuts[choose(len(cuts))] if cuts else 0
        if choose(2):
            return Change(self.offset + cut, self.data[cut:])
        return Change(self.offset, self.data[:cut])


@dataclass
class File:
    """A file's synced content and all that happened to it since."""

    synced: bytearray
    created: bool = False
    changes: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        """Make safe what no sync has failed on."""
        for change in self.changes:
            change.safe = change.safe or not change.failed
        if all(change.safe for change in self.changes):
            self.synced = self.current()
            self.changes.clear()

    def fail_sync(self) -> None:
        """Promise nothing, now or later, about what was pending."""
        for change in self.changes:
            change.failed = not change.safe

    def current(self) -> bytearray:
        """Return what a reader sees."""
        content = bytearray(self.synced)
        for change in self.changes:
            change.apply(content)
        return content

    def after_power_loss(self, choose: Choice) -> bytearray:
        """Return one of the contents that the disk may hold.

        Of the changes that are not safe all survive, or none, or the first few and a part of the
        next, or each as it comes.
        """
        content, fate = bytearray(self.synced), choose(4)
        left = choose(len(self.changes) + 1) if fate == 2 else 0
        for index, change in enumerate(self.changes):
            if change.safe or fate == 0 or index < left:
                change.apply(content)
            elif fate == 3:
                _survive(change, content, choose(3), choose)
            elif fate == 2 and index == left:
                _survive(change, content, choose(2) + 1, choose)
        return content


def _survive(change: Change, content: bytearray, fate: int, choose: Choice) -> None:
    """Apply all of a change, nothing or a part."""
    if fate == 0:
        change.apply(content)
    elif fate == 2 and change.data is not None:
        change.torn(choose).apply(content)


@dataclass
class _Fault:
    operations: frozenset[str]
    wait: int
    kind: str
    times: int = 1
    length: int = 0
    machine: bool = True


_EVERY = frozenset({"write", "sync", "truncate", "delete"})


class FaultyDisk:
    """Counts and fails what SQLite does to the files in one folder; see the module's docstring.

    Args:
        folder: files elsewhere are left alone.
        forgetful: whether a failed sync gives up what it was to make safe, as Linux does.

    Attributes:
        counts: operations so far, by name: write, sync, truncate, delete; failed ones included.
    """

    def __init__(self, folder: Path, *, forgetful: bool = True) -> None:
        self.folder = folder.resolve()
        self.forgetful = forgetful
        self.counts: Counter[str] = Counter()
        self._fault: _Fault | None = None
        self._files: dict[Path, File] = {}
        self._deleted: dict[Path, File] = {}
        self._dead: set[threading.Thread] = set()
        self._off = False
        self._torn_length = 0

    def __enter__(self) -> Self:
        """Become the default VFS; one disk at a time."""
        _layer().attach(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the default VFS back; connections still open go on without faults."""
        _layer().detach()

    def crash(self, after: int, *, machine: bool = True) -> None:
        """Let the n-th operation from now, and all behind it, fail: of everyone, or of its process.

        Args:
            after: n, from 1.
            machine: false where the process that does the operation dies alone.
        """
        self._fault = _Fault(_EVERY, after, "crash", machine=machine)

    def torn(self, after: int, length: int, *, machine: bool = True) -> None:
        """Let the n-th write from now store its first `length` bytes, and then crash."""
        self._fault = _Fault(frozenset({"write"}), after, "torn", length=length, machine=machine)

    def full(self, after: int, times: int = 1) -> None:
        """Let so many writes, from the n-th from now on, find no room."""
        self._fault = _Fault(frozenset({"write"}), after, "full", times)

    def io(self, after: int) -> None:
        """Let the n-th write or sync from now fail, and nothing else."""
        self._fault = _Fault(frozenset({"write", "sync"}), after, "io")

    @property
    def armed(self) -> bool:
        """Whether a fault is still to come."""
        return self._fault is not None

    def lift(self) -> None:
        """Take back a fault that has not come yet."""
        self._fault = None

    def kill(self) -> None:
        """End the calling process: it can write no more."""
        self._dead.add(threading.current_thread())

    def cut(self) -> None:
        """End all processes."""
        self._off = True

    @property
    def alive(self) -> bool:
        """Whether the calling process can still write."""
        return not self._off and threading.current_thread() not in self._dead

    def check_alive(self) -> None:
        """Raise `ProcessDied` in a process that can't go on; for what goes around SQLite."""
        if not self.alive:
            raise ProcessDied

    def restart(self) -> None:
        """Let everyone write again: a machine on which all was killed and the power stayed.

        All connections must have been closed, or SQLite would remember locks and shared memory.
        """
        self._dead.clear()
        self._off = False
        for shared in self.folder.rglob("*-shm"):
            shared.unlink()

    def power_loss(self, choose: Choice) -> None:
        """Leave on the disk what may be left, and restart.

        Args:
            choose: makes every choice, so that a failure can be replayed and shrunk. Where all are
                0, everything written is left.
        """
        for path, file in self._files.items():
            if path.exists():
                path.write_bytes(file.after_power_loss(choose))
        for path, file in self._deleted.items():
            if choose(2):
                path.write_bytes(file.after_power_loss(choose))
        self._files.clear()
        self._deleted.clear()
        self.lift()
        self.restart()

    def opened(self, name: str, created: bool) -> Path | None:
        """Note a file that SQLite has opened; None where it is not ours."""
        path = Path(name)
        if path.parent.resolve().is_relative_to(self.folder):
            content = path.read_bytes()
            known = self._files.get(path)
            # A file that was exchanged behind SQLite's back is another file.
            if known is None or known.current() != content:
                self._files[path] = File(bytearray(content), created)
            return path
        return None

    def write(self, path: Path, offset: int, data: bytes, through: Callable[[int], int]) -> int:
        """Write `data`, or what the fault leaves of it; `through` writes its first bytes."""
        failed, length = self._next("write"), len(data)
        if failed == TORN:
            failed, length = _IOERR["write"], min(self._torn_length, length)
        elif failed:
            return failed
        code = through(length) if length else OK
        if code == OK and length:
            self._files[path].changes.append(Change(offset, data[:length]))
        return failed or code

    def truncate(self, path: Path, size: int, through: Callable[[], int]) -> int:
        """Cut a file off."""
        if failed := self._next("truncate"):
            return failed
        code = through()
        if code == OK:
            self._files[path].changes.append(Change(size, None))
        return code

    def sync(self, path: Path) -> int:
        """Note what is safe now; the real disk is spared."""
        file = self._files[path]
        if failed := self._next("sync"):
            # The writes of who dies in a sync are as they were; a later sync may reach them.
            if self.forgetful and self.alive:
                file.fail_sync()
            return failed
        file.sync()
        if file.created:
            # SQLite's first sync of a journal that it made syncs the folder too.
            file.created = False
            self._folder_synced(path.parent)
        return OK

    def delete(self, path: Path, synced: bool, through: Callable[[], int]) -> int:
        """Delete a file, for good where the folder is synced."""
        if failed := self._next("delete"):
            return failed
        code = through()
        file = self._files.pop(path, None)
        if code == OK and file is not None:
            self._deleted[path] = file
        if code == OK and synced:
            self._folder_synced(path.parent)
        return code

    def _folder_synced(self, folder: Path) -> None:
        self._deleted = {p: file for p, file in self._deleted.items() if p.parent != folder}

    def _next(self, operation: str) -> int:
        """Count one operation; return the code with which it fails, 0 where it does not."""
        self.counts[operation] += 1
        if not self.alive:
            return _IOERR[operation]
        fault = self._fault
        if fault is None or operation not in fault.operations:
            return OK
        fault.wait -= 1
        if fault.wait > 0:
            return OK
        return self._strike(fault, operation)

    def _strike(self, fault: _Fault, operation: str) -> int:
        fault.times -= 1
        if not fault.times:
            self.lift()
        if fault.kind == "full":
            return FULL
        if fault.kind != "io":
            self.cut() if fault.machine else self.kill()
        if fault.kind == "torn":
            self._torn_length = fault.length
            return TORN
        return _IOERR[operation]


class _VFS(ctypes.Structure):
    """`sqlite3_vfs`; https://sqlite.org/c3ref/vfs.html."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("max_pathname", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("app_data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
        ("delete", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 14),
    ]
    name: bytes
    open: int
    delete: int


class _Methods(ctypes.Structure):
    """`sqlite3_io_methods`, version 3; https://sqlite.org/c3ref/io_methods.html."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("close", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("truncate", ctypes.c_void_p),
        ("sync", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 13),
    ]
    version: int
    write: int
    truncate: int
    sync: int


_INT, _PTR = ctypes.c_int, ctypes.c_void_p
_OPEN = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _PTR, _INT, _PTR)
_DELETE = ctypes.CFUNCTYPE(_INT, _PTR, ctypes.c_char_p, _INT)
_WRITE = ctypes.CFUNCTYPE(_INT, _PTR, _PTR, _INT, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _PTR, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(_INT, _PTR, _INT)


class _Layer:
    """The VFS itself. There is one and it is never freed: an open connection points to it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._disk: FaultyDisk | None = None
        self._unix = library.sqlite3_vfs_find(b"unix")
        original = _VFS.from_address(self._unix)
        self._open, self._delete = _OPEN(original.open), _DELETE(original.delete)
        self._vfs = _VFS.from_buffer_copy(original)
        self._vfs.name = b"faulty"
        self._callbacks: list[Any] = [_OPEN(self._opened), _DELETE(self._deleted)]
        self._vfs.open, self._vfs.delete = map(_address, self._callbacks)
        # By SQLite's own methods, of which "unix" has a few, and by open file.
        self._methods: dict[int, _Methods] = {}
        self._files: dict[int, tuple[FaultyDisk, Path]] = {}

    def attach(self, disk: FaultyDisk) -> None:
        if self._disk is not None:
            raise RuntimeError("expected one faulty disk at a time")
        self._disk = disk
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def detach(self) -> None:
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))
        self._disk = None

    def _opened(self, _: int, name: int | None, file: int, flags: int, out: int) -> int:
        self._files.pop(file, None)
        text = ctypes.string_at(name).decode() if name and flags & _TRACKED else None
        fresh = text is not None and not Path(text).exists()
        code = self._open(self._unix, name, file, flags, out)
        if code == OK and text is not None and self._disk is not None:
            path = self._disk.opened(text, fresh)
            if path is not None:
                self._files[file] = (self._disk, path)
                self._redirect(_PTR.from_address(file))
        return int(code)

    def _redirect(self, methods: ctypes.c_void_p) -> None:
        """Let an open file's methods be ours where they write."""
        original = methods.value
        assert original is not None
        if original not in self._methods:
            self._methods[original] = self._copied(_Methods.from_address(original))
        methods.value = ctypes.addressof(self._methods[original])

    def _copied(self, original: _Methods) -> _Methods:
        assert original.version == 3
        write, truncate = _WRITE(original.write), _TRUNCATE(original.truncate)

        def written(file: int, data: int, length: int, offset: int) -> int:
            disk, path = self._files[file]
            content = ctypes.string_at(data, length)
            return disk.write(path, offset, content, lambda n: write(file, data, n, offset))

        def truncated(file: int, size: int) -> int:
            disk, path = self._files[file]
            return disk.truncate(path, size, lambda: truncate(file, size))

        def synced(file: int, _: int) -> int:
            disk, path = self._files[file]
            return disk.sync(path)

        made = [_WRITE(written), _TRUNCATE(truncated), _SYNC(synced)]
        self._callbacks += made
        copy = _Methods.from_buffer_copy(original)
        copy.write, copy.truncate, copy.sync = map(_address, made)
        return copy

    def _deleted(self, _: int, name: bytes, synced: int) -> int:
        path = Path(name.decode())

        def delete() -> int:
            return int(self._delete(self._unix, name, synced))

        if self._disk is None or not path.parent.resolve().is_relative_to(self._disk.folder):
            return delete()
        return self._disk.delete(path, bool(synced), delete)


def _address(callback: Any) -> int:
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def _library() -> ctypes.CDLL | str:
    """Return the SQLite that `sqlite3` is linked with, or why it can't be had."""
    import _sqlite3

    # Looking a symbol up in the extension looks in what it is linked with, too.
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    with suppress(AttributeError):
        library.sqlite3_libversion.restype = ctypes.c_char_p
        library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
        library.sqlite3_vfs_find.restype = _PTR
        library.sqlite3_vfs_register.argtypes = [_PTR, _INT]
        library.sqlite3_vfs_unregister.argtypes = [_PTR]
        if library.sqlite3_libversion().decode() != sqlite3.sqlite_version:
            return "another SQLite than Python's own was found"
        found = library.sqlite3_vfs_find(None)
        if not found or _VFS.from_address(found).name != b"unix":
            return 'the default VFS is not "unix"'
        return library
    return "SQLite's symbols can't be found"


def why_unavailable() -> str | None:
    """Return why no disk can be made to fail here; None where it can."""
    found = _library()
    return found if isinstance(found, str) else None


@cache
def _layer() -> _Layer:
    library = _library()
    if isinstance(library, str):
        raise OSError(library)
    return _Layer(library)
