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
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
# Asked for many releases at once: around each statement SQLite hands Python's lock to others.
_PAID = """
SELECT asked.key, paid.seq, paid.body ->> 'head', payloads.bytes, EXISTS (
    SELECT 1 FROM entries WHERE kind IN ('retry', 'commit') AND body ->> 'reservation' = +paid.seq
)
FROM json_each(?) AS asked CROSS JOIN entries AS paid ON paid.kind = 'reserve'
    AND paid.site = asked.value ->> 0 AND paid.study = asked.value ->> 1
    AND paid.body ->> 'release' = asked.value ->> 2 AND paid.body ->> 'round' = asked.value ->> 3
LEFT JOIN entries AS done ON done.kind = 'commit' AND done.body ->> 'reservation' = +paid.seq
LEFT JOIN payloads ON payloads.seq = done.seq
ORDER BY paid.seq
"""
_SPENT = """
SELECT granted.body -> 'releases', (
    SELECT count(*) FROM entries WHERE kind = 'reserve' AND site = asked.value ->> 0
    AND study = asked.value ->> 1 AND body ->> 'release' = asked.value ->> 2
)
FROM json_each(?) AS asked LEFT JOIN entries AS granted ON granted.kind = 'grant'
    AND granted.site = asked.value ->> 0 AND granted.study = asked.value ->> 1
ORDER BY asked.key
"""
_STORED = """
SELECT paid.site, paid.study, paid.body ->> 'release' AS kind, paid.body ->> 'round' AS round, (
    SELECT bytes FROM entries AS other CROSS JOIN entries AS done CROSS JOIN payloads
    WHERE other.kind = 'reserve' AND other.site = paid.site AND other.study = paid.study
    AND other.body ->> 'release' = paid.body ->> 'release'
    AND other.body ->> 'round' = paid.body ->> 'round'
    AND done.kind = 'commit' AND done.body ->> 'reservation' = +other.seq
    AND payloads.seq = done.seq AND bytes != x''
    ORDER BY other.seq LIMIT 1
)
FROM json_each(?) AS asked CROSS JOIN entries AS paid ON paid.seq = asked.value
ORDER BY asked.key
"""
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


class _Paid(NamedTuple):
    """A reservation: for which head, what was released, if anything, and whether it was tried."""

    seq: int
    head: str
    released: bytes | None
    followed: int


class _Due(NamedTuple):
    """An entry that is still to be written."""

    kind: str
    body: dict[str, Any]


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
            stored = self._chain.one("SELECT bytes FROM payloads WHERE seq = ?", entry.seq)
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

    def reserve_all(self, keys: Sequence[Key]) -> list[int | bytes | RefusedError]:
        """Pay for releases, in one write: of each the reservation, or the bytes of one before.

        In the place of a release that is not to be had, its error: no grant, nothing of it left,
        or the round was paid for another head.
        """
        found: dict[int, int | bytes | RefusedError] = {}
        with self.transaction():
            for places in _in_turn(keys):
                found |= zip(places, self._reserved([keys[place] for place in places]), strict=True)
        return [found[place] for place in range(len(keys))]

    def _reserved(self, keys: Sequence[Key]) -> list[int | bytes | RefusedError]:
        """Reserve for keys of which no two are of one site's study."""
        asked = json.dumps([[key.site, key.study, key.release, key.round] for key in keys])
        paid: list[list[_Paid]] = [[] for _ in keys]
        for place, *facts in self._chain.rows(_PAID, asked):
            paid[place].append(_Paid(*facts))
        spent = self._chain.rows(_SPENT, asked)
        found = [
            _standing(key, held) or _due(key, held, *left)
            for key, held, left in zip(keys, paid, spent, strict=True)
        ]
        due = {place: each for place, each in enumerate(found) if isinstance(each, _Due)}
        entries = [(keys[place].site, keys[place].study, *each) for place, each in due.items()]
        numbers = dict(zip(due, self._chain.extend(entries), strict=True))
        return [
            each if not isinstance(each, _Due) else each.body.get("reservation", numbers[place])
            for place, each in enumerate(found)
        ]

    def commit_all(self, releases: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Store releases' bytes before they are sent, in one write; return what is to be sent.

        If another process committed the same key first, its bytes are returned.
        """
        with self.transaction():
            asked = json.dumps([reservation for reservation, _ in releases])
            sent: dict[object, bytes] = {}
            entries, payloads = [], []
            found = self._chain.rows(_STORED, asked)
            for (reservation, payload), (site, study, *of, stored) in zip(
                releases, found, strict=True
            ):
                key = (site, study, *of)
                if key not in sent and not stored:
                    body = {"payload": _sha256(payload), "reservation": reservation}
                    entries.append((site, study, "commit", body))
                    payloads.append(payload)
                sent.setdefault(key, stored or payload)
            numbers = self._chain.extend(entries)
            self._chain.insert("payloads", list(zip(numbers, payloads, strict=True)))
            return [sent[tuple(row[:-1])] for row in found]

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


def _sha256(stored: bytes | None) -> str | None:
    return None if stored is None else hashlib.sha256(stored).hexdigest()


def _in_turn(keys: Sequence[Key]) -> Iterable[list[int]]:
    """Yield places of keys; what one of a site's study pays for counts before its next is asked."""
    turns: dict[int, list[int]] = defaultdict(list)
    seen: Counter[tuple[str, str]] = Counter()
    for place, key in enumerate(keys):
        turns[seen[key.site, key.study]].append(place)
        seen[key.site, key.study] += 1
    return turns.values()


def _standing(key: Key, held: Sequence[_Paid]) -> bytes | RefusedError | None:
    """Return what was released before, or why nothing may be."""
    for each in held:
        if each.head != key.head:
            return RefusedError(
                Refusal.ROUND_CONFLICT,
                f"{key.site}: round {key.round} was released for another head",
            )
        if each.released:
            return each.released
    return None


def _due(key: Key, held: Sequence[_Paid], releases: str | None, spent: int) -> _Due | RefusedError:
    """Return the entry with which a release is paid for, or why it can't be."""
    if held and not held[-1].followed:
        return _Due("retry", {"reservation": held[-1].seq})
    if releases is None:
        return RefusedError(Refusal.STUDY_NOT_APPROVED, f"{key.site}: {key.study}: not granted")
    granted = json.loads(releases).get(key.release, {"count": 0})
    if spent >= granted["count"]:
        return RefusedError(
            Refusal.UNAVAILABLE,
            f"{key.site}: over budget: all {granted['count']} granted releases of kind "
            f"{key.release} are spent",
        )
    body = {
        "attempt": len(held) + 1,
        "event": granted["event"],
        "head": key.head,
        "release": key.release,
        "round": key.round,
    }
    return _Due("reserve", body)


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
