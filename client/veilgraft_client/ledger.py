"""A site's privacy ledger: what was granted, reserved and released, for the life of its data.

An append-only, hash-chained SQLite file, synced at every commit. Order of a release: `reserve`
(synced), compute, `commit` the bytes (synced), send. A release's key is (study, kind, round, head)
and stands once in the ledger's life: the same key again gives the stored bytes again, the same
round with another head is refused. What was reserved and not committed may be computed once more
under the same entry; each further try reserves, and so pays, again. So the ledger is never below
the truth.

A study's plan is granted once, and only if all that was ever granted stays below the site's cap,
as a `LifeFilter` prices it. What the filter rests on, the site's *terms*, is fixed with the first
grant. A cap or δ that a person changes later starts, with the next grant, a filter of its own over
the whole spend, and its δ adds: `life_delta` is the sum. That holds for a change that no result
was the reason of.

`transaction` makes several steps one synced write. Nothing may leave the process before the
outermost transaction has ended: a simulation holds a round's steps of up to a thousand sites in
one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veilgraft.chain import Chain, ChainError, Entry, Schema
from veilgraft.errors import Refusal, RefusedError
from veilgraft.plan import Plan
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Adjacency, Event
from veilgraft.privacy.filters import LifeFilter
from veilgraft.study import RECORD, Kind

_SCHEMA = Schema(
    noun="ledger",
    format=2,
    kinds=("terms", "grant", "reserve", "retry", "commit"),
    further="""
CREATE TABLE payloads (seq INTEGER PRIMARY KEY REFERENCES entries, bytes BLOB NOT NULL) STRICT;
CREATE INDEX keys ON entries (site, study, body ->> 'release', body ->> 'round')
    WHERE kind = 'reserve';
CREATE INDEX followers ON entries (body ->> 'reservation') WHERE kind IN ('retry', 'commit');
CREATE UNIQUE INDEX one_commit ON entries (body ->> 'reservation') WHERE kind = 'commit';
CREATE UNIQUE INDEX one_grant ON entries (site, study) WHERE kind = 'grant';
""",
)
_RESERVED = "SELECT * FROM entries WHERE kind = 'reserve' AND site = ? ORDER BY seq"
_GRANTED = "SELECT * FROM entries WHERE kind = 'grant' AND site = ? ORDER BY seq"
_UNCAPPED = 1e3
"""The cap for which a filter's orders are chosen where there is none."""


@dataclass(frozen=True)
class Key:
    """What names a release for the life of a ledger."""

    site: str
    study: str
    round: int
    head: str
    release: Kind = "update"


@dataclass(frozen=True)
class Terms:
    """What a site fixes for the life of its data.

    Attributes:
        max_epsilon: the cap on everything ever released; None where there is no cap because there
            is no privacy to lose.
        delta: of that cap.
        held_out: the share of its units that is evaluated on and never trained on.
        unit: what is counted: a study's `privacy.unit`. A person's records, each within a cap,
            would be a person beyond it.
    """

    max_epsilon: float | None
    delta: float
    held_out: float = 0.0
    unit: str = RECORD


@dataclass
class _Terms:
    """What of all sites' terms was read, up to an entry; good while nothing is rolled back."""

    seq: int = 0
    undone: int = 0
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))


class Ledger:
    """One open ledger; see the module's docstring.

    Args:
        exists: refuse to make a new one.

    Raises:
        ChainError: no ledger can be opened or made there; from any method, it can't be read,
            written or trusted. Nothing may then be released.
    """

    def __init__(self, path: Path, *, exists: bool = False) -> None:
        self.path = path
        self._chain = Chain(path, schema=_SCHEMA, exists=exists)
        self._known = _Terms()

    def close(self) -> None:
        """End the connection; the file is complete without it."""
        self._chain.close()

    def transaction(self) -> AbstractContextManager[None]:
        """One all-or-nothing write, synced when the outermost one ends."""
        return self._chain.transaction()

    def entries(self, site: str | None = None) -> Iterator[Entry]:
        """Yield all entries, or those of one site, in order."""
        return self._chain.entries(site)

    def head(self) -> str:
        """Return the chain's head: the sequence number and hash of the last entry."""
        return self._chain.head()

    def last(self) -> int:
        """Return the number of the last entry."""
        return int(self._chain.one("SELECT max(seq) FROM entries"))

    def verify(self, anchor: str | None = None, *, let_go: bool = False) -> int:
        """Check the whole chain, see `Chain.verify`, and every stored release.

        Args:
            let_go: whether releases may have been let go, as a simulation's are.
        """
        count = self._chain.verify(anchor)
        for entry in self._chain.select("SELECT * FROM entries WHERE kind = 'commit' ORDER BY seq"):
            stored = self._payload(entry.seq)
            if let_go and stored == b"":
                continue
            if _sha256(stored) != entry.body["payload"]:
                raise ChainError(f"{self.path}: entry {entry.seq}: stored bytes differ")
        if self._chain.one("SELECT 1 FROM payloads WHERE seq NOT IN (SELECT seq FROM entries)"):
            raise ChainError(f"{self.path}: entries are missing")
        return count

    def grant(self, site: str, study: str, plan: Plan, terms: Terms, *, units: int) -> None:
        """Grant a study's plan to be spent, once; the same grant again changes nothing.

        Args:
            units: the size that the site declares for this study.

        Raises:
            RefusedError: the plan would take the site above its cap for life; another plan, or
                another size, stands under this study; or the unit or the held-out share is
                another than before.
        """
        with self.transaction():
            self._check_terms(site, terms)
            body = {"delta": plan.delta, "releases": _releases(plan), "units": units}
            held = self._grant(site, study)
            # Also where nothing new is granted: a person may have lowered the cap.
            total = self.life_epsilon(site, terms, plan if held is None else None)
            if terms.max_epsilon is not None and total > terms.max_epsilon:
                raise RefusedError(
                    Refusal.UNAVAILABLE,
                    f"{site}: over budget: all granted studies would come to ε = {total:.4g} at "
                    f"δ = {terms.delta:g}; the cap is {terms.max_epsilon:g}",
                )
            if held is None:
                self._settle(site, terms)
                self._chain.append(site, study, "grant", body)
            elif {key: held[key] for key in body} != body:
                raise RefusedError(
                    Refusal.UNAVAILABLE, f"{site}: {study}: granted with another plan or size"
                )

    def reserve(self, key: Key) -> int | bytes:
        """Pay for one release: the reservation, or the bytes if it was released before.

        Raises:
            RefusedError: no grant, nothing of it left, or the round was paid for another head.
        """
        (found,) = self.reserve_all([key])
        if isinstance(found, RefusedError):
            raise found
        return found

    def reserve_all(self, keys: Sequence[Key]) -> list[int | bytes | RefusedError]:
        """Do what `reserve` does for each key, in one write; an error stands for its key alone."""
        with self.transaction():
            return [self._reserved(key) for key in keys]

    def _reserved(self, key: Key) -> int | bytes | RefusedError:
        held = self._reservations(key)
        for entry in held:
            if entry.body["head"] != key.head:
                return RefusedError(
                    Refusal.ROUND_CONFLICT,
                    f"{key.site}: round {key.round} was released for another head",
                )
            if payload := self._payload(self._commit(entry.seq)):
                return payload
        if held and not self._followed(held[-1].seq):
            self._chain.append(key.site, key.study, "retry", {"reservation": held[-1].seq})
            return held[-1].seq
        return self._pay(key, attempt=len(held) + 1)

    def commit(self, reservation: int, payload: bytes) -> bytes:
        """Store a release's bytes before they are sent, and return what is to be sent.

        If another process committed the same key first, its bytes are returned.
        """
        return self.commit_all([(reservation, payload)])[0]

    def commit_all(self, releases: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Do what `commit` does for each reservation and its bytes, in one write."""
        with self.transaction():
            return [self._committed(*release) for release in releases]

    def _committed(self, reservation: int, payload: bytes) -> bytes:
        entry = self._chain.entry(reservation)
        for held in self._reservations(_key(entry)):
            if stored := self._payload(self._commit(held.seq)):
                return stored
        body = {"payload": _sha256(payload), "reservation": reservation}
        seq = self._chain.append(entry.site, entry.study, "commit", body)
        self._chain.rows("INSERT INTO payloads VALUES (?, ?)", seq, payload)
        return payload

    def let_go(self, after: int, upto: int) -> None:
        """Forget the bytes of releases, by their entries' numbers, that nobody will ask for again.

        For simulations, whose coordinator is known to have kept what it made of them. Who asks
        all the same pays again.
        """
        query = "UPDATE payloads SET bytes = x'' WHERE seq > ? AND seq <= ?"
        with self.transaction():
            self._chain.rows(query, after, upto)

    def events(self, site: str, study: str | None = None) -> list[Event | None]:
        """Return what every reservation cost, in order; None is a release without noise."""
        return [
            _loaded(entry.body["event"])
            for entry in self._chain.select(_RESERVED, site)
            if study in (None, entry.study)
        ]

    def epsilon(
        self,
        site: str,
        delta: float,
        *,
        study: str | None = None,
        adjacency: Adjacency = Adjacency.ADD_REMOVE,
    ) -> float:
        """Return the composed ε of all that was reserved; infinite after one un-noised release.

        As if all settings had been fixed in advance; see `life_epsilon`.
        """
        events = self.events(site, study)
        noised = [event for event in events if event is not None]
        if len(noised) < len(events):
            return float("inf")
        return accounting.epsilon(noised, delta, adjacency)

    def life_epsilon(
        self, site: str, terms: Terms | None = None, further: Plan | None = None
    ) -> float:
        """Return what is held against the cap: all plans granted, at the terms' δ.

        It holds although studies were chosen in the light of earlier ones' results; see
        `LifeFilter`. Infinite where a plan without noise was granted.

        Args:
            terms: those in force, by default.
            further: a plan that is not yet granted.
        """
        before: list[Event | None] = []
        since: list[Event | None] = []
        first = self._chain.one(
            "SELECT min(seq) FROM entries WHERE kind = 'reserve' AND site = ?", site
        )
        for entry in self._chain.select(_GRANTED, site):
            released = first is not None and entry.seq > first
            (since if released else before).extend(_granted(entry.body["releases"]))
        if further is not None:
            (before if first is None else since).extend(_granted(_releases(further)))
        if None in before or None in since:
            return float("inf")
        filters = self._filters(site, terms or self.terms(site))
        return filters.epsilon([e for e in before if e], [e for e in since if e])

    def terms(self, site: str) -> Terms:
        """Return the terms now in force."""
        body = self._terms(site)[-1]
        return Terms(body["max_epsilon"], body["delta"], body["held_out"], body["unit"])

    def life_delta(self, site: str) -> float:
        """Return the δ of the cap: that of the terms, and of all terms before them."""
        return float(sum(body["delta"] for body in self._terms(site)))

    def paid(self, site: str, study: str) -> int:
        """Return how many rounds of a study were paid for."""
        query = (
            "SELECT count(DISTINCT body ->> 'round') FROM entries WHERE kind = 'reserve'"
            " AND site = ? AND study = ? AND body ->> 'release' = 'update'"
        )
        return int(self._chain.one(query, site, study))

    def sites(self) -> list[str]:
        """Return the sites that hold a grant."""
        grants = self._chain.select("SELECT * FROM entries WHERE kind = 'grant' ORDER BY seq")
        return list(dict.fromkeys(entry.site for entry in grants))

    def _check_terms(self, site: str, terms: Terms) -> None:
        """Raise `RefusedError` where what is fixed for life would change."""
        for held in self._terms(site)[-1:]:
            if held["held_out"] != terms.held_out:
                raise RefusedError(
                    Refusal.UNAVAILABLE,
                    f"{site}: a share of {terms.held_out:g} is to be held out, and "
                    f"{held['held_out']:g} was, which is fixed for life",
                )
            if held["unit"] != terms.unit:
                raise RefusedError(
                    Refusal.UNAVAILABLE,
                    f"{site}: this ledger counts by {held['unit']}, for life; the study's unit is "
                    f"{terms.unit}",
                )

    def _settle(self, site: str, terms: Terms) -> None:
        """Write the terms down where they are the first, or differ from those in force."""
        if not self._terms(site) or self.terms(site) != terms:
            orders = self._filters(site, terms).orders
            self._chain.append(site, "", "terms", {**asdict(terms), "orders": orders})

    def _filters(self, site: str, terms: Terms) -> LifeFilter:
        """Return the filters of these terms: as they were fixed, or as they would be."""
        held = self._terms(site)
        if held and self.terms(site) == terms:
            return LifeFilter(held[-1]["delta"], tuple(held[-1]["orders"]))
        cap = _UNCAPPED if terms.max_epsilon is None else terms.max_epsilon
        return LifeFilter.fixed(cap, terms.delta)

    def _pay(self, key: Key, attempt: int) -> int | RefusedError:
        grant = self._grant(key.site, key.study)
        if grant is None:
            return RefusedError(Refusal.STUDY_NOT_APPROVED, f"{key.site}: {key.study}: not granted")
        granted = grant["releases"].get(key.release, {"count": 0, "event": None})
        spent = self._chain.one(
            "SELECT count(*) FROM entries WHERE kind = 'reserve' AND site = ? AND study = ?"
            " AND body ->> 'release' = ?",
            key.site,
            key.study,
            key.release,
        )
        if spent >= granted["count"]:
            return RefusedError(
                Refusal.UNAVAILABLE,
                f"{key.site}: over budget: all {granted['count']} granted releases of kind "
                f"{key.release} are spent",
            )
        body = {
            "attempt": attempt,
            "event": granted["event"],
            "head": key.head,
            "release": key.release,
            "round": key.round,
        }
        return self._chain.append(key.site, key.study, "reserve", body)

    def _grant(self, site: str, study: str) -> dict[str, Any] | None:
        query = "SELECT * FROM entries WHERE kind = 'grant' AND site = ? AND study = ?"
        return next((entry.body for entry in self._chain.select(query, site, study)), None)

    def _terms(self, site: str) -> list[dict[str, Any]]:
        # No index serves this, and thousands of simulated sites may share the file.
        query = "SELECT * FROM entries WHERE seq > ? AND kind = 'terms' ORDER BY seq"
        if self._known.undone != self._chain.undone:
            self._known = _Terms(undone=self._chain.undone)
        known, last = self._known, self.last()
        for entry in self._chain.select(query, known.seq):
            known.bodies[entry.site].append(entry.body)
            last = max(last, entry.seq)
        known.seq = last
        return list(known.bodies[site])

    def _reservations(self, key: Key) -> list[Entry]:
        query = (
            "SELECT * FROM entries WHERE kind = 'reserve' AND site = ? AND study = ?"
            " AND body ->> 'release' = ? AND body ->> 'round' = ? ORDER BY seq"
        )
        return list(self._chain.select(query, key.site, key.study, key.release, key.round))

    def _followed(self, reservation: int) -> bool:
        """Whether a reservation was computed once more, or committed."""
        query = (
            "SELECT seq FROM entries WHERE kind IN ('retry', 'commit')"
            " AND body ->> 'reservation' = ?"
        )
        return self._chain.one(query, reservation) is not None

    def _payload(self, commit: int | None) -> bytes | None:
        """Return the bytes that were committed; None where there are none."""
        if commit is None:
            return None
        found: bytes | None = self._chain.one("SELECT bytes FROM payloads WHERE seq = ?", commit)
        return found

    def _commit(self, reservation: int) -> int | None:
        query = "SELECT seq FROM entries WHERE kind = 'commit' AND body ->> 'reservation' = ?"
        found: int | None = self._chain.one(query, reservation)
        return found


def _sha256(stored: bytes | None) -> str | None:
    return None if stored is None else hashlib.sha256(stored).hexdigest()


def _key(entry: Entry) -> Key:
    body = entry.body
    return Key(entry.site, entry.study, body["round"], body["head"], body["release"])


def _releases(plan: Plan) -> dict[str, Any]:
    return {
        kind: {"count": count, "event": asdict(event) if event else None}
        for kind, (count, event) in plan.releases.items()
    }


def _granted(releases: dict[str, Any]) -> Iterator[Event | None]:
    for granted in releases.values():
        yield from [_loaded(granted["event"])] * granted["count"]


def _loaded(event: dict[str, Any] | None) -> Event | None:
    return Event(**event) if event else None
