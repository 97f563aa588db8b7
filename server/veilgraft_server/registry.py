"""Who may take part: one row for each invited site, in a SQLite file.

Processes may share the file: what one writes the next call of another sees, and it is on the
disk when a method returns. Of a token only its SHA-256 is kept.
"""

import hashlib
import hmac
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veilgraft.durable import transaction
from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.identity import PublicKey

WAIT_SECONDS = 10.0
"""How long one process waits for another's transaction."""

_TABLE = """
CREATE TABLE IF NOT EXISTS members (
    site TEXT PRIMARY KEY,
    token TEXT NOT NULL,
    expires INTEGER NOT NULL,
    identity TEXT UNIQUE,
    node BLOB UNIQUE,
    node_id TEXT UNIQUE,
    revoked INTEGER NOT NULL DEFAULT 0,
    CHECK ((identity IS NULL) = (node IS NULL)),
    CHECK (node_id IS NULL OR node IS NOT NULL)
) STRICT
"""
_COLUMNS = "site, token, expires, identity, node, node_id, revoked"
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Member:
    """One invited site.

    Attributes:
        token: hex SHA-256 of the invitation's token.
        expires: when the token does, in seconds since 1970.
        identity: the site's own key; None until it has enrolled.
        node: its SuperNode's public key, as PEM, which is what Flower's header carries.
        node_id: what SuperLink calls that key; None until it has been registered there.
    """

    site: str
    token: str
    expires: int
    identity: PublicKey | None
    node: bytes | None
    node_id: int | None
    revoked: bool


class Registry:
    """The open file, made where there is none. Threads may share it.

    Raises:
        InputError: the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            # EXTRA also syncs the folder that the journal stood in.
            self._db.execute("PRAGMA synchronous = EXTRA")
            with self._transaction():
                self._db.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{path}: can't open the registry: {error}") from None

    def close(self) -> None:
        """End the connection."""
        self._db.close()

    def invite(self, site: str, token: str, expires: int) -> None:
        """Let whoever holds `token` enrol as `site`, once; replaces what stood under that name."""
        row = (site, _digest(token), expires)
        with self._transaction():
            self._db.execute("DELETE FROM members WHERE site = ?", (site,))
            self._db.execute("INSERT INTO members (site, token, expires) VALUES (?, ?, ?)", row)

    def enrol(self, site: str, token: str, identity: PublicKey, node: bytes, now: float) -> Member:
        """Take the token, and bind both keys to the site; return the site as it then stands.

        The same token from the same keys is taken again, at any time: an answer may be lost.
        Whoever calls must have seen a proof of both keys.

        Args:
            now: seconds since 1970.

        Raises:
            RefusedError: no such token for this site, expired, used by other keys, or a key is
                another site's.
        """
        with self._transaction():
            member = next(self._select("WHERE site = ?", site), None)
            expected = member.token if member else _NOBODY
            if not hmac.compare_digest(_digest(token), expected) or member is None:
                raise _refused("no invitation with this token")
            if member.revoked:
                raise _refused("revoked")
            if member.node is not None:
                if (member.identity, member.node) != (identity, node):
                    raise _refused("the token was used by other keys")
                return member
            if now >= member.expires:
                raise _refused("the token has expired")
            return self._bind(site, identity, node)

    def _bind(self, site: str, identity: PublicKey, node: bytes) -> Member:
        try:
            self._db.execute(
                "UPDATE members SET identity = ?, node = ? WHERE site = ?",
                (identity.text, node, site),
            )
        except sqlite3.IntegrityError:
            raise _refused("a key is another site's") from None
        return next(self._select("WHERE site = ?", site))

    def release(self, site: str, node: bytes) -> None:
        """Give the token back, where these keys took it and SuperLink does not know them yet."""
        with self._transaction():
            self._db.execute(
                "UPDATE members SET identity = NULL, node = NULL"
                " WHERE site = ? AND node = ? AND node_id IS NULL",
                (site, node),
            )

    def registered(self, site: str, node_id: int) -> None:
        """Note what SuperLink calls the site's node; ends its enrolment."""
        with self._transaction():
            # As text: Flower's ids take all 64 bits, SQLite's numbers have 63.
            self._db.execute("UPDATE members SET node_id = ? WHERE site = ?", (str(node_id), site))

    def members(self) -> list[Member]:
        """Return all that were invited, by name; the revoked among them."""
        with self._lock:
            return list(self._select("ORDER BY site"))

    def by_node(self, node_id: int) -> Member | None:
        """Return the site of a node; None where there is none, or it was revoked."""
        with self._lock:
            return next(self._select("WHERE NOT revoked AND node_id = ?", str(node_id)), None)

    def by_key(self, node: bytes) -> Member | None:
        """Return the site of a node's public key; None where there is none, or it was revoked."""
        with self._lock:
            return next(self._select("WHERE NOT revoked AND node = ?", node), None)

    def revoke(self, site: str) -> None:
        """Make the site nobody, from now on; its keys stay taken until it is invited again.

        Raises:
            InputError: no such site was invited.
        """
        with self._transaction():
            found = self._db.execute("UPDATE members SET revoked = 1 WHERE site = ?", (site,))
            if not found.rowcount:
                known = ", ".join(member.site for member in self._select("ORDER BY site"))
                raise InputError(f"site: expected one of {known or 'none yet'}, got {site!r}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield

    def _select(self, where: str, *values: object) -> Iterator[Member]:
        query = f"SELECT {_COLUMNS} FROM members {where}"  # noqa: S608 (constants of this file)
        return map(_member, self._db.execute(query, values).fetchall())


def _member(row: tuple[Any, ...]) -> Member:
    site, token, expires, identity, node, node_id, revoked = row
    return Member(
        site,
        token,
        expires,
        PublicKey.parse(identity) if identity else None,
        node,
        int(node_id) if node_id else None,
        bool(revoked),
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _refused(reason: str) -> RefusedError:
    return RefusedError(Refusal.REQUEST_INVALID, f"enrolment: {reason}")
