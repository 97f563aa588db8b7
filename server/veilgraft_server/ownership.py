"""Which of SuperLink's messages and objects are whose.

Flower checks who asks, and not whether what is asked for is theirs. So the edge notes what each
answer gave to a site, and what each asked of it, before the site sees that answer. The notes are
on disk: SuperLink hands a message out once, so an edge that forgot them at a restart would lose
the site's reply, and with it the site's part in a round.

A site's oldest message is forgotten when it holds `MESSAGES` of them, and never earlier: a
SuperNode works on one at a time.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from veilgraft.durable import transaction
from veilgraft.errors import InputError

MESSAGES = 16
"""Messages that one site may hold open."""

_TABLES = """
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY,
    node TEXT NOT NULL,
    run TEXT NOT NULL,
    message TEXT NOT NULL,
    reply TEXT,
    tree TEXT,
    session TEXT,
    UNIQUE (node, message)
) STRICT;
CREATE TABLE IF NOT EXISTS given (
    seq INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    object TEXT NOT NULL,
    PRIMARY KEY (seq, object)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked (
    seq INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    object TEXT NOT NULL,
    stored INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (seq, object)
) STRICT, WITHOUT ROWID;
"""


class Ownership:
    """The open file, made where there is none; one process's, its threads may share it.

    Node and run ids are Flower's, of 64 bits; messages and objects are named by hex SHA-256.

    Raises:
        InputError: the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise InputError(f"{path}: can't open the edge's notes: {error}") from None

    def close(self) -> None:
        """End the connection."""
        self._db.close()

    def give(self, node: int, run: int, message: str, objects: Collection[str]) -> None:
        """Note that the node was given a message, and with it these objects."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM messages WHERE node = ? AND seq <= (SELECT seq FROM messages"
                " WHERE node = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (str(node), str(node), MESSAGES - 1),
            )
            added = self._db.execute(
                "INSERT INTO messages (node, run, message) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET run = excluded.run RETURNING seq",
                (str(node), str(run), message),
            )
            (seq,) = added.fetchone()
            rows = [(seq, name) for name in objects]
            self._db.executemany("INSERT OR IGNORE INTO given VALUES (?, ?)", rows)

    def in_run(self, node: int, run: int) -> bool:
        """Return whether the node holds a message of this run."""
        return self._any("messages WHERE node = ? AND run = ?", str(node), str(run))

    def holds(self, node: int, run: int, message: str) -> bool:
        """Return whether the node was given this message."""
        where = "messages WHERE node = ? AND run = ? AND message = ?"
        return self._any(where, str(node), str(run), message)

    def may_pull(self, node: int, run: int, name: str) -> bool:
        """Return whether the object came with a message that the node was given."""
        where = "messages JOIN given USING (seq) WHERE node = ? AND run = ? AND object = ?"
        return self._any(where, str(node), str(run), name)

    def reply(self, node: int, run: int, message: str, reply: str, tree: Collection[str]) -> bool:
        """Bind a reply, and the objects it is made of, to a message; False where that may not be.

        It may be where the node was given the message, this is its one reply to it (the same
        again, where an answer was lost), and no object of it is a message or reply of another.
        """
        digest = hashlib.sha256("\n".join(tree).encode()).hexdigest()
        with self._transaction():
            if self._others(node, {reply, *tree}):
                return False
            bound = self._db.execute(
                "UPDATE messages SET reply = ?, tree = ? WHERE node = ? AND run = ?"
                " AND message = ? AND (reply IS NULL OR (reply = ? AND tree = ?))",
                (reply, digest, str(node), str(run), message, reply, digest),
            )
            return bool(bound.rowcount)

    def _others(self, node: int, names: set[str]) -> bool:
        """Return whether a name is that of a message, or a reply, of another node."""
        rows = self._db.execute("SELECT message, reply FROM messages WHERE node != ?", (str(node),))
        return any(not names.isdisjoint(row) for row in rows.fetchall())

    def ask(self, node: int, message: str, session: str, objects: Collection[str]) -> None:
        """Note which objects of the reply to `message` the node was asked for, in a session."""
        with self._transaction():
            held = self._db.execute(
                "UPDATE messages SET session = ? WHERE node = ? AND message = ? RETURNING seq",
                (session, str(node), message),
            )
            rows = [(seq, name) for (seq,) in held.fetchall() for name in objects]
            self._db.executemany(
                "INSERT INTO asked (seq, object) VALUES (?, ?)"
                " ON CONFLICT DO UPDATE SET stored = 0",
                rows,
            )

    def may_push(self, node: int, run: int, session: str, name: str, size: int, most: int) -> bool:
        """Return whether the node was asked for this object in this session.

        Args:
            size, most: bytes of the object, and of the whole reply at most.
        """
        total = (
            "(SELECT coalesce(sum(others.stored), 0) FROM asked AS others"
            " WHERE others.seq = messages.seq AND others.object != asked.object)"
        )
        values = (str(node), str(run), session, name)
        return self._any(f"{_ASKED} AND {total} + ? <= ?", *values, size, most)

    def was_stored(self, node: int, run: int, session: str, name: str) -> bool:
        """Return whether that object arrived already."""
        return self._any(f"{_ASKED} AND stored", str(node), str(run), session, name)

    def store(self, node: int, run: int, session: str, name: str, size: int) -> None:
        """Note that the object, of so many bytes, arrived."""
        with self._transaction():
            self._db.execute(
                "UPDATE asked SET stored = ? WHERE object = ? AND seq IN"
                " (SELECT seq FROM messages WHERE node = ? AND run = ? AND session = ?)",
                (max(1, size), name, str(node), str(run), session),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield

    def _any(self, where: str, *values: str | int) -> bool:
        query = f"SELECT 1 FROM {where} LIMIT 1"  # noqa: S608 (constants of this file)
        with self._lock:
            return self._db.execute(query, values).fetchone() is not None


_ASKED = "messages JOIN asked USING (seq) WHERE node = ? AND run = ? AND session = ? AND object = ?"
