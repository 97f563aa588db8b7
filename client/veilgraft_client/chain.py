"""An append-only, hash-chained file of entries: what a ledger is written in.

SQLite with a write-ahead log, synced at every commit. Each entry holds the SHA-256 of the entry
before it and of its own text, so that none can be changed, left out or put in between unseen.

The chain shows what was changed; it can't show that a whole file was exchanged for an older copy
of itself. `head`, kept elsewhere and given to `verify`, does.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veilgraft.durable import sync_folder
from veilgraft.errors import VeilgraftError

FORMAT = 2
WAIT_SECONDS = 30.0
"""How long one process waits for another's transaction before it is refused."""

_SCHEMA = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    study TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('open', 'terms', 'grant', 'reserve', 'retry', 'commit')),
    body TEXT NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE TABLE payloads (seq INTEGER PRIMARY KEY REFERENCES entries, bytes BLOB NOT NULL) STRICT;
CREATE INDEX keys ON entries (site, study, body ->> 'release', body ->> 'round')
    WHERE kind = 'reserve';
CREATE INDEX followers ON entries (body ->> 'reservation') WHERE kind IN ('retry', 'commit');
CREATE UNIQUE INDEX one_commit ON entries (body ->> 'reservation') WHERE kind = 'commit';
CREATE UNIQUE INDEX one_grant ON entries (site, study) WHERE kind = 'grant';
CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


_TRANSACTION = ("BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",))
_SAVEPOINT = ("SAVEPOINT inner", "RELEASE inner", ("ROLLBACK TO inner", "RELEASE inner"))


class ChainError(VeilgraftError):
    """The file can't be read, written or trusted; nothing may be released."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    seq: int
    site: str
    study: str
    kind: str
    body: dict[str, Any]
    hash: bytes


class Chain:
    """One open file; see the module's docstring. Threads may share it.

    A ledger is made only where no file is, and appears whole; a file that is empty or no ledger
    is refused, so that what was spent can't be forgotten by losing half of it.

    Args:
        exists: refuse to make a new one.

    Raises:
        ChainError: no ledger can be opened or made there.
    """

    def __init__(self, path: Path, *, exists: bool = False) -> None:
        self.path = path
        # Threads may share it: the lock keeps one's steps out of another's transaction.
        self._lock = threading.RLock()
        self._depth = 0
        try:
            if not path.exists():
                if exists:
                    raise ChainError(f"{path}: the ledger is missing")
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                sync_folder(path.parent.parent)
                self._make()
            self._db = self._opened(path)
        except (OSError, sqlite3.Error) as error:
            raise ChainError(f"{path}: can't open the ledger: {error}") from error

    def _opened(self, path: Path) -> sqlite3.Connection:
        with ExitStack() as undone:
            db = _connected(path)
            undone.callback(db.close)
            (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            schema = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
            if mode != "wal" or {sql for (sql,) in schema} != set(_statements()):
                raise ChainError(f"{path}: expected a ledger of format {FORMAT}")
            # A log whose sync failed may still be in the page cache and nowhere else: what is
            # appended behind it would be lost with it.
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            undone.pop_all()
        return db

    def _make(self) -> None:
        """Write a new ledger beside its place and move it there, unless another was quicker."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        staged = Path(name)
        try:
            with contextlib.closing(_connected(staged)) as self._db:
                (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                if mode != "wal":
                    raise ChainError(f"{self.path}: no log can be written here")
                with self.transaction():
                    for statement in _statements():
                        self._db.execute(statement)
                    self.append("", "", "open", {"format": FORMAT})
                # Closing does it, too, and says nothing when it fails.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            with contextlib.suppress(FileExistsError):
                os.link(staged, self.path)
            # Else a power failure could take the file's name away, and with it what was spent.
            sync_folder(self.path.parent)
        finally:
            # SQLite keeps its log and shared memory beside it where it could not end well.
            for left in self.path.parent.glob(f"{staged.name}*"):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """End the connection; the file is complete without it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One all-or-nothing write, synced when the outermost one ends.

        An inner one that fails undoes its own steps alone.
        """
        with self._lock:
            # SQLite's own word for it could be left over from a rollback that failed, and what
            # was done within would never be written.
            inner = self._depth > 0
            begin, end, undo = _SAVEPOINT if inner else _TRANSACTION
            self._execute(begin)
            self._depth += 1
            try:
                yield
                self._execute(end)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    for statement in undo:
                        self._db.execute(statement)
                raise
            finally:
                self._depth -= 1

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise ChainError(f"{self.path}: {error}") from error

    def entries(self, site: str | None = None) -> Iterator[Entry]:
        """Yield all entries, or those of one site, in order."""
        if site is None:
            return self.select("SELECT * FROM entries ORDER BY seq")
        return self.select("SELECT * FROM entries WHERE site = ? ORDER BY seq", site)

    def entry(self, seq: int) -> Entry:
        """Return one entry."""
        return next(self.select("SELECT * FROM entries WHERE seq = ?", seq))

    def select(self, query: str, *values: object) -> Iterator[Entry]:
        """Return the entries that a query over whole rows finds."""
        return map(_entry, self._execute(query, values).fetchall())

    def one(self, query: str, *values: object) -> Any:
        """Return the first column of a query's first row; None where there is none."""
        row = self._execute(query, values).fetchone()
        return row[0] if row else None

    def payload(self, seq: int | None) -> bytes | None:
        """Return the bytes that belong to an entry; None where there are none."""
        found: bytes | None = self.one("SELECT bytes FROM payloads WHERE seq = ?", seq)
        return found

    def append(
        self, site: str, study: str, kind: str, body: dict[str, Any], payload: bytes | None = None
    ) -> int:
        """Add an entry, and the bytes that belong to it; return its sequence number."""
        last = "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1"
        seq, previous = self._execute(last).fetchone() or (0, b"")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (seq + 1, site, study, kind, _canonical({**body, "time": time}))
        hash_ = _chained(previous, *row)
        self._execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", (*row, hash_))
        if payload is not None:
            self._execute("INSERT INTO payloads VALUES (?, ?)", (row[0], payload))
        return int(row[0])

    def head(self) -> str:
        """Return the chain's head: the sequence number and hash of the last entry."""
        last = self._execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
        seq, hash_ = last.fetchone()
        return f"{seq}:{hash_.hex()}"

    def verify(self, anchor: str | None = None) -> int:
        """Check the whole chain and every stored release; return the number of entries.

        Args:
            anchor: what `head` gave earlier, kept where this file's keeper can't reach it.

        Raises:
            ChainError: naming the first entry that does not fit, or that the anchor is not in
                the chain: an older copy of the ledger lies in its place.
        """
        previous, count, anchored = b"", 0, anchor is None
        for row in self._execute("SELECT * FROM entries ORDER BY seq").fetchall():
            entry, count = _entry(row), count + 1
            # The stored text itself is chained: SQL and JSON readers may see it differently.
            fits = entry.seq == count and entry.hash == _chained(previous, *row[:5])
            if not fits or (entry.kind == "open") != (count == 1):
                raise ChainError(f"{self.path}: entry {entry.seq} does not fit the chain")
            if entry.kind == "commit":
                stored = self.payload(entry.seq)
                if not stored or hashlib.sha256(stored).hexdigest() != entry.body["payload"]:
                    raise ChainError(f"{self.path}: entry {entry.seq}: stored bytes differ")
            previous = entry.hash
            anchored = anchored or f"{entry.seq}:{entry.hash.hex()}" == anchor
        query = "SELECT count(*) FROM payloads WHERE seq NOT IN (SELECT seq FROM entries)"
        if not count or self.one(query):
            raise ChainError(f"{self.path}: entries are missing")
        if not anchored:
            raise ChainError(
                f"{self.path}: {count} entries, none of them the anchor's {anchor}: the ledger was "
                "rolled back, or is another"
            )
        return count


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    return db


def _entry(row: tuple[Any, ...]) -> Entry:
    seq, site, study, kind, body, chained = row
    return Entry(seq, site, study, kind, json.loads(body), chained)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _chained(previous: bytes, seq: int, site: str, study: str, kind: str, body: str) -> bytes:
    content = _canonical([seq, site, study, kind, body])
    return hashlib.sha256(previous + content.encode()).digest()


def _statements() -> list[str]:
    return [statement.removesuffix(";").strip() for statement in _SCHEMA.strip().split(";\n")]
