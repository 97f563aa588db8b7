"""An append-only, hash-chained file of entries: what ledgers and event logs are written in.

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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from veilgraft.durable import sync_folder
from veilgraft.errors import VeilgraftError

WAIT_SECONDS = 30.0
"""How long one process waits for another's transaction before it is refused."""

_ROWS = 1000
"""In one statement; SQLite's own limit is on values."""

_ENTRIES = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    study TEXT NOT NULL,
    kind TEXT NOT NULL{check},
    body TEXT NOT NULL,
    hash BLOB NOT NULL
) STRICT;
"""
_APPEND_ONLY = """
CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
# The text of SQLite's own error may quote a damaged file, and then be no text.
_DAMAGED = (sqlite3.Error, UnicodeDecodeError)
_TRANSACTION = ("BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",))
_SAVEPOINT = ("SAVEPOINT inner", "RELEASE inner", ("ROLLBACK TO inner", "RELEASE inner"))


class ChainError(VeilgraftError):
    """The file can't be read, written or trusted."""


@dataclass(frozen=True)
class Schema:
    """What is kept in a file. Another schema, even another blank in it, is another file.

    Attributes:
        noun: what messages call the file.
        format: its version, written into its first entry.
        kinds: those of its entries; none where a later version may add some.
        further: SQL of what it holds beside its entries: tables and indexes, each ended by a
            semicolon and a line's end.
    """

    noun: str
    format: int
    kinds: tuple[str, ...] = ()
    further: str = ""

    @property
    def statements(self) -> list[str]:
        """The SQL that makes a new file."""
        kinds = ", ".join(f"'{kind}'" for kind in ("open", *self.kinds))
        check = f" CHECK (kind IN ({kinds}))" if self.kinds else ""
        parts = (_ENTRIES.format(check=check), self.further, _APPEND_ONLY)
        text = "\n".join(part.strip() for part in parts if part.strip())
        return [statement.removesuffix(";").strip() for statement in text.split(";\n")]


@dataclass(frozen=True)
class Entry:
    """One line of the file; `site` and `study` are empty where it concerns none."""

    seq: int
    site: str
    study: str
    kind: str
    body: dict[str, Any]
    hash: bytes


class Chain:
    """One open file; see the module's docstring. Threads may share it.

    A file is made only where none is, and appears whole; one that is empty or of another schema
    is refused, so that what it held can't be forgotten by losing half of it.

    Args:
        exists: refuse to make a new one.

    Raises:
        ChainError: no such file can be opened or made there; from any method, it can't be read,
            written or trusted.

    Attributes:
        undone: counts what was rolled back; who remembers entries must then look again.
    """

    def __init__(self, path: Path, *, schema: Schema, exists: bool = False) -> None:
        self.path = path
        self._schema = schema
        # Threads may share it: the lock keeps one's steps out of another's transaction.
        self._lock = threading.RLock()
        self._depth = 0
        # Number and hash of the last entry: known only while no other process may write.
        self._last: tuple[int, bytes] | None = None
        self.undone = 0
        try:
            if not path.exists():
                if exists:
                    raise ChainError(f"{path}: the {schema.noun} is missing")
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                sync_folder(path.parent.parent)
                self._make()
            self._db = self._opened(path)
        except (OSError, *_DAMAGED) as error:
            raise ChainError(f"{path}: can't open the {schema.noun}: {error}") from error

    def _opened(self, path: Path) -> sqlite3.Connection:
        with ExitStack() as undone:
            db = _connected(path)
            undone.callback(db.close)
            (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            found = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
            if mode != "wal" or {sql for (sql,) in found} != set(self._schema.statements):
                noun, format_ = self._schema.noun, self._schema.format
                raise ChainError(f"{path}: expected a {noun} of format {format_}")
            # A log whose sync failed may still be in the page cache and nowhere else: what is
            # appended behind it would be lost with it.
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            undone.pop_all()
        return db

    def _make(self) -> None:
        """Write a new file beside its place and move it there, unless another was quicker."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        staged = Path(name)
        try:
            with contextlib.closing(_connected(staged)) as self._db:
                (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                if mode != "wal":
                    raise ChainError(f"{self.path}: no log can be written here")
                with self.transaction():
                    for statement in self._schema.statements:
                        self._db.execute(statement)
                    self.append("", "", "open", {"format": self._schema.format})
                # Closing does it, too, and says nothing when it fails.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            with contextlib.suppress(FileExistsError):
                os.link(staged, self.path)
            # Else a power failure could take the file's name away, and with it all it holds.
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
            self._last = self._last if inner else None
            self._execute(begin)
            self._depth += 1
            try:
                yield
                self._execute(end)
            except BaseException:
                self._last = None
                self.undone += 1
                with contextlib.suppress(*_DAMAGED):
                    for statement in undo:
                        self._db.execute(statement)
                raise
            finally:
                self._depth -= 1

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except _DAMAGED as error:
            raise ChainError(f"{self.path}: {error}") from error

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement of the schema's own, and return the rows that it finds.

        It waits for another thread's transaction, and so meets all of it or nothing.
        """
        with self._lock:
            cursor = self._execute(statement, values)
            try:
                return cursor.fetchall()
            except _DAMAGED as error:
                raise ChainError(f"{self.path}: {error}") from error

    def one(self, query: str, *values: object) -> Any:
        """Return the first column of a query's first row; None where there is none."""
        found = self.rows(query, *values)
        return found[0][0] if found else None

    def select(self, query: str, *values: object) -> Iterator[Entry]:
        """Return the entries that a query over whole rows finds."""
        return map(self._entry, self.rows(query, *values))

    def entries(self, site: str | None = None) -> Iterator[Entry]:
        """Yield all entries, or those of one site, in order."""
        if site is None:
            return self.select("SELECT * FROM entries ORDER BY seq")
        return self.select("SELECT * FROM entries WHERE site = ? ORDER BY seq", site)

    def append(self, site: str, study: str, kind: str, body: dict[str, Any]) -> int:
        """Add an entry, with the time, within a transaction; return its sequence number."""
        (seq,) = self.extend([(site, study, kind, body)])
        return seq

    def extend(self, entries: Sequence[tuple[str, str, str, dict[str, Any]]]) -> range:
        """Do what `append` does for each entry: its site, study, kind and body."""
        if not self._db.in_transaction:
            # SQLite ends one by itself when it can't go on; a later write would be torn off.
            raise ChainError(f"{self.path}: the transaction has ended")
        if self._last is None:
            found = self.rows("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
            self._last = found[0] if found else (0, b"")
        (last, hash_), rows = self._last, list[tuple[object, ...]]()
        added = range(last + 1, last + 1 + len(entries))
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        for seq, (site, study, kind, body) in zip(added, entries, strict=True):
            row = (seq, site, study, kind, _canonical({**body, "time": time}))
            hash_ = _chained(hash_, *row)
            rows.append((*row, hash_))
        self.insert("entries", rows)
        self._last = (last + len(rows), hash_)
        return added

    def insert(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Add rows to a table of the schema's own.

        Many in a statement: around each, SQLite hands Python's lock to other threads.
        """
        for at in range(0, len(rows), _ROWS):
            some = rows[at : at + _ROWS]
            row = f"({', '.join('?' * len(some[0]))})"
            places = ", ".join([row] * len(some))
            self._execute(f"INSERT INTO {table} VALUES {places}", (*chain.from_iterable(some),))  # noqa: S608 - names are the code's own

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        seq, site, study, kind, body, chained = row
        try:
            return Entry(seq, site, study, kind, json.loads(body), chained)
        except ValueError:
            raise ChainError(f"{self.path}: entry {seq} does not fit the chain") from None

    def head(self) -> str:
        """Return the chain's head: the sequence number and hash of the last entry."""
        last = self.rows("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
        if not last:
            raise ChainError(f"{self.path}: entries are missing")
        seq, hash_ = last[0]
        return f"{seq}:{hash_.hex()}"

    def verify(self, anchor: str | None = None) -> int:
        """Check the whole chain; return the number of entries.

        Args:
            anchor: what `head` gave earlier, kept where this file's keeper can't reach it.

        Raises:
            ChainError: naming the first entry that does not fit, or that the anchor is not in
                the chain: an older copy of the file lies in its place.
        """
        previous, count, anchored = b"", 0, anchor is None
        for row in self.rows("SELECT * FROM entries ORDER BY seq"):
            seq, kind, hash_, count = row[0], row[3], row[5], count + 1
            # The stored text itself is chained: SQL and JSON readers may see it differently.
            # A damaged file may also hold a number or bytes in the place of text.
            fits = seq == count and {type(each) for each in row[1:5]} == {str}
            fits = fits and hash_ == _chained(previous, *row[:5])
            if not fits or (kind == "open") != (count == 1):
                raise ChainError(f"{self.path}: entry {seq} does not fit the chain")
            previous = hash_
            anchored = anchored or f"{seq}:{hash_.hex()}" == anchor
        if not count:
            raise ChainError(f"{self.path}: entries are missing")
        if not anchored:
            raise ChainError(
                f"{self.path}: {count} entries, none of them the anchor's {anchor}: the "
                f"{self._schema.noun} was rolled back, or is another"
            )
        return count


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    # In KiB. A simulated round writes more than the 2 MiB that is usual, page by page.
    db.execute("PRAGMA cache_size = -65536")
    # What is let go is a public simulation's: Debian's SQLite would write zeros over it, and sync.
    db.execute("PRAGMA secure_delete = FAST").fetchone()
    return db


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _chained(previous: bytes, seq: int, site: str, study: str, kind: str, body: str) -> bytes:
    content = _canonical([seq, site, study, kind, body])
    return hashlib.sha256(previous + content.encode()).digest()
