"""A site's privacy ledger: what was granted, reserved and released, for the life of its data.

An append-only, hash-chained SQLite file, synced at every commit. Order of a release: `reserve`
(synced), compute, `commit` the bytes (synced), send. A release's key is (study, kind, round, head)
and stands once in the ledger's life: the same key again gives the stored bytes again, the same
round with another head is refused. What was reserved and not committed may be computed once more
under the same entry; each further try reserves, and so pays, again. So the ledger is never below
the truth.

`transaction` makes several steps one synced write. Nothing may leave the process before the
outermost transaction has ended: a simulation holds all sites' steps of a round in one.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from veilgraft.errors import Refusal, RefusedError, VeilgraftError
from veilgraft.plan import Plan
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Adjacency, Event

FORMAT = 1
WAIT_SECONDS = 30.0
"""How long one process waits for another's transaction before it is refused."""

_SCHEMA = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    site TEXT NOT NULL,
    study TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('open', 'grant', 'reserve', 'retry', 'commit')),
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


class LedgerError(VeilgraftError):
    """The ledger can't be read, written or trusted; nothing may be released."""


@dataclass(frozen=True)
class Key:
    """What names a release for the life of a ledger."""

    site: str
    study: str
    round: int
    head: str
    release: Literal["update"] = "update"


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    seq: int
    site: str
    study: str
    kind: str
    body: dict[str, Any]
    hash: bytes


class Ledger:
    """One open ledger file; see the module's docstring.

    A ledger is made only where no file is, and appears whole; a file that is empty or no ledger
    is refused, so that what was spent can't be forgotten by losing half of it.

    Args:
        exists: refuse to make a new one.

    Raises:
        LedgerError: no ledger can be opened or made there.
    """

    def __init__(self, path: Path, *, exists: bool = False) -> None:
        self.path = path
        try:
            if not path.exists():
                if exists:
                    raise LedgerError(f"{path}: the ledger is missing")
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._make()
            self._connect(path)
            (mode,) = self._db.execute("PRAGMA journal_mode").fetchone()
            if mode != "wal" or self._schema() != self._expected_schema():
                raise LedgerError(f"{path}: expected a ledger of format {FORMAT}")
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{path}: can't open the ledger: {error}") from error

    def _make(self) -> None:
        """Write a new ledger beside its place and move it there, unless another was quicker."""
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        staged.unlink(missing_ok=True)
        try:
            staged.touch(mode=0o600)
            self._connect(staged)
            self._db.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                for statement in _statements():
                    self._db.execute(statement)
                self._append("", "", "open", {"format": FORMAT})
            self._db.close()
            with contextlib.suppress(FileExistsError):
                os.link(staged, self.path)
        finally:
            staged.unlink(missing_ok=True)

    def _connect(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
        self._db.execute("PRAGMA synchronous = FULL")

    def _schema(self) -> set[str]:
        rows = self._db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
        return {row[0] for row in rows}

    @staticmethod
    def _expected_schema() -> set[str]:
        return {statement.strip() for statement in _statements()}

    def close(self) -> None:
        """End the connection; the file is complete without it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One all-or-nothing write, synced when the outermost one ends."""
        if self._db.in_transaction:
            self._db.execute("SAVEPOINT inner")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO inner")
                    self._db.execute("RELEASE inner")
                raise
            self._db.execute("RELEASE inner")
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: can't write: {error}") from error
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise LedgerError(f"{self.path}: can't write: {error}") from error
            raise

    def grant(self, site: str, study: str, plan: Plan, *, max_epsilon: float) -> None:
        """Grant a study's plan to be spent, once; the same grant again changes nothing.

        Raises:
            RefusedError: the plan would take the site above its cap for life, or another plan
                stands under this study.
        """
        with self.transaction():
            body = {"delta": plan.delta, "event": _dumped(plan.update), "rounds": plan.rounds}
            held = self._grant(site, study)
            if held is not None:
                if {k: held[k] for k in body} != body:
                    raise RefusedError(Refusal.UNAVAILABLE, f"{study}: granted with another plan")
            else:
                self._append(site, study, "grant", body)
            # Also where nothing new is granted: a person may have lowered the cap.
            self._check_cap(site, plan.delta, max_epsilon)

    def reserve(self, key: Key) -> int | bytes:
        """Pay for one release: the reservation, or the bytes if it was released before.

        Raises:
            RefusedError: no grant, nothing of it left, or the round was paid for another head.
        """
        with self.transaction():
            held = self._reservations(key)
            for entry in held:
                if entry.body["head"] != key.head:
                    raise RefusedError(
                        Refusal.ROUND_CONFLICT,
                        f"{key.site}: round {key.round} was released for another head",
                    )
                if (payload := self._payload(entry.seq)) is not None:
                    return payload
            if held and not self._followers(held[-1].seq):
                self._append(key.site, key.study, "retry", {"reservation": held[-1].seq})
                return held[-1].seq
            return self._pay(key, attempt=len(held) + 1)

    def commit(self, reservation: int, payload: bytes) -> bytes:
        """Store a release's bytes before they are sent, and return what is to be sent.

        If another process committed the same key first, its bytes are returned.
        """
        with self.transaction():
            entry = self._entry(reservation)
            for held in self._reservations(_key(entry)):
                if (stored := self._payload(held.seq)) is not None:
                    return stored
            digest = hashlib.sha256(payload).hexdigest()
            body = {"payload": digest, "reservation": reservation}
            seq = self._append(entry.site, entry.study, "commit", body)
            self._db.execute("INSERT INTO payloads VALUES (?, ?)", (seq, payload))
            return payload

    def entries(self, site: str | None = None) -> Iterator[Entry]:
        """Yield all entries, or those of one site, in order."""
        for row in self._db.execute("SELECT * FROM entries ORDER BY seq"):
            if site is None or row[1] == site:
                yield _entry(row)

    def events(self, site: str, study: str | None = None) -> list[Event | None]:
        """Return what every reservation cost, in order; None is a release without noise."""
        return [
            _loaded(entry.body["event"])
            for entry in self.entries(site)
            if entry.kind == "reserve" and study in (None, entry.study)
        ]

    def epsilon(
        self,
        site: str,
        delta: float,
        *,
        study: str | None = None,
        adjacency: Adjacency = Adjacency.ADD_REMOVE,
    ) -> float:
        """Return the composed ε of all that was reserved; infinite after one un-noised release."""
        return _price(self.events(site, study), delta, adjacency)

    def sites(self) -> list[str]:
        """Return the sites that hold a grant."""
        query = "SELECT DISTINCT site FROM entries WHERE kind = 'grant' ORDER BY seq"
        return [row[0] for row in self._db.execute(query)]

    def head(self) -> str:
        """Return the chain's head: the sequence number and hash of the last entry."""
        seq, last = self._db.execute(
            "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        return f"{seq}:{last.hex()}"

    def verify(self) -> int:
        """Check the whole chain and every stored release; return the number of entries.

        Raises:
            LedgerError: naming the first entry that does not fit.
        """
        previous, count = b"", 0
        for row in self._db.execute("SELECT * FROM entries ORDER BY seq"):
            entry, count = _entry(row), count + 1
            # The stored text itself is chained: SQL and JSON readers may see it differently.
            fits = entry.seq == count and entry.hash == _chained(previous, *row[:5])
            if not fits or (entry.kind == "open") != (count == 1):
                raise LedgerError(f"{self.path}: entry {entry.seq} does not fit the chain")
            if entry.kind == "commit":
                stored = self._db.execute(
                    "SELECT bytes FROM payloads WHERE seq = ?", (entry.seq,)
                ).fetchone()
                if not stored or hashlib.sha256(stored[0]).hexdigest() != entry.body["payload"]:
                    raise LedgerError(f"{self.path}: entry {entry.seq}: stored bytes differ")
            previous = entry.hash
        query = "SELECT count(*) FROM payloads WHERE seq NOT IN (SELECT seq FROM entries)"
        if not count or self._db.execute(query).fetchone()[0]:
            raise LedgerError(f"{self.path}: entries are missing")
        return count

    def _check_cap(self, site: str, delta: float, max_epsilon: float) -> None:
        granted: list[Event | None] = []
        for entry in self.entries(site):
            if entry.kind == "grant":
                granted += [_loaded(entry.body["event"])] * entry.body["rounds"]
        total = _price(granted, delta, Adjacency.ADD_REMOVE)
        # σ is solved to the study's ε from below; the cap may equal it.
        if total > max_epsilon:
            raise RefusedError(
                Refusal.UNAVAILABLE,
                f"{site}: over budget: all granted studies would come to ε = {total:.4g} at "
                f"δ = {delta:g}; limits.max_epsilon is {max_epsilon:g}",
            )

    def _pay(self, key: Key, attempt: int) -> int:
        grant = self._grant(key.site, key.study)
        if grant is None:
            raise RefusedError(Refusal.STUDY_NOT_APPROVED, f"{key.site}: {key.study}: not granted")
        spent = self._db.execute(
            "SELECT count(*) FROM entries WHERE kind = 'reserve' AND site = ? AND study = ?",
            (key.site, key.study),
        ).fetchone()[0]
        if spent >= grant["rounds"]:
            raise RefusedError(
                Refusal.UNAVAILABLE,
                f"{key.site}: over budget: all {grant['rounds']} granted rounds are spent",
            )
        body = {
            "attempt": attempt,
            "event": grant["event"],
            "head": key.head,
            "release": key.release,
            "round": key.round,
        }
        return self._append(key.site, key.study, "reserve", body)

    def _grant(self, site: str, study: str) -> dict[str, Any] | None:
        query = "SELECT body FROM entries WHERE kind = 'grant' AND site = ? AND study = ?"
        row = self._db.execute(query, (site, study)).fetchone()
        return json.loads(row[0]) if row else None

    def _reservations(self, key: Key) -> list[Entry]:
        query = (
            "SELECT * FROM entries WHERE kind = 'reserve' AND site = ? AND study = ?"
            " AND body ->> 'release' = ? AND body ->> 'round' = ? ORDER BY seq"
        )
        rows = self._db.execute(query, (key.site, key.study, key.release, key.round))
        return [_entry(row) for row in rows]

    def _followers(self, reservation: int) -> int:
        query = (
            "SELECT count(*) FROM entries WHERE kind IN ('retry', 'commit')"
            " AND body ->> 'reservation' = ?"
        )
        return int(self._db.execute(query, (reservation,)).fetchone()[0])

    def _payload(self, reservation: int) -> bytes | None:
        query = (
            "SELECT bytes FROM payloads JOIN entries USING (seq)"
            " WHERE kind = 'commit' AND body ->> 'reservation' = ?"
        )
        row = self._db.execute(query, (reservation,)).fetchone()
        return row[0] if row else None

    def _entry(self, seq: int) -> Entry:
        return _entry(self._db.execute("SELECT * FROM entries WHERE seq = ?", (seq,)).fetchone())

    def _append(self, site: str, study: str, kind: str, body: dict[str, Any]) -> int:
        last = self._db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1")
        seq, previous = last.fetchone() or (0, b"")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (seq + 1, site, study, kind, _canonical({**body, "time": time}))
        self._db.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", (*row, _chained(previous, *row))
        )
        return int(row[0])


def _entry(row: tuple[Any, ...]) -> Entry:
    seq, site, study, kind, body, chained = row
    return Entry(seq, site, study, kind, json.loads(body), chained)


def _key(entry: Entry) -> Key:
    body = entry.body
    return Key(entry.site, entry.study, body["round"], body["head"], body["release"])


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _chained(previous: bytes, seq: int, site: str, study: str, kind: str, body: str) -> bytes:
    content = _canonical([seq, site, study, kind, body])
    return hashlib.sha256(previous + content.encode()).digest()


def _statements() -> list[str]:
    return [statement.removesuffix(";").strip() for statement in _SCHEMA.strip().split(";\n")]


def _dumped(event: Event | None) -> dict[str, float] | None:
    return asdict(event) if event else None


def _loaded(event: dict[str, Any] | None) -> Event | None:
    return Event(**event) if event else None


def _price(events: list[Event | None], delta: float, adjacency: Adjacency) -> float:
    noised = [event for event in events if event is not None]
    if len(noised) < len(events):
        return float("inf")
    return accounting.epsilon(noised, delta, adjacency)
