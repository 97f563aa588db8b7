"""The gate before a vault: whose word counts, for how long, how often, and when answers leave.

Order: signature (over the bytes as they came, before they are parsed), form, rate, key, expiry,
payload, nonce; only then does the vault, or the store of backbones, see a request. What nobody has
signed costs a look at its header, and a line in a log that rotates. Every answer, also a no, is
signed by the site. In a simulation nothing is signed, and the vault is called directly.

A nonce is kept until it expires: it stands for one request, and the same request again is let
through, for the ledger gives the same bytes again. An answer leaves at a multiple of
`reply_seconds` after the request came: what it took to compute shows only to that grain. Parts of
a backbone that is not yet whole are answered at once, for there are no features of it to compute.
"""

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from veilgraft import messages
from veilgraft.errors import InputError, MessageError, Refusal, RefusedError, VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import PublicKey, SigningKey
from veilgraft.messages import (
    Envelope,
    Hello,
    Here,
    Offer,
    Part,
    Question,
    Refused,
    Request,
    Wanted,
)
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.studies import Studies
from veilgraft_client.vault import Vault

log = logging.getLogger(__name__)

LONGEST_SECONDS = 24 * 3600
"""A request may be good for so long at most; so many nonces have to be kept."""

PARTS_PER_MINUTE = 600
"""Of backbones, beside `requests_per_minute`: the largest that is allowed takes 512."""

_NONCES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS nonces
    (nonce TEXT PRIMARY KEY, request TEXT NOT NULL, expires INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS ends ON nonces (expires);
"""


class Nonces:
    """Which request each nonce stood for, until it expires; one SQLite file, mode 0600.

    A nonce is on the disk before its request is answered. Lost ones cost no privacy, as a release
    is the ledger's to give; so a file that is damaged may be removed.

    Raises:
        VeilgraftError: the file can't be opened; from `use`, it can't be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.executescript(_NONCES)
        except (OSError, sqlite3.Error) as error:
            raise VeilgraftError(
                f"{path}: can't be used: {error}; it may be removed, and is then made anew"
            ) from error

    def use(self, nonce: str, request: str, expires: int, now: float) -> None:
        """Remember a nonce; raises `MessageError` where it stood for another request."""
        with self._lock:
            try:
                held = self._held(nonce, request, expires, int(now))
            except sqlite3.Error as error:
                raise VeilgraftError(f"{self._path}: can't be used: {error}") from error
        if held != request:
            raise MessageError("nonce: stood for another request before")

    def _held(self, nonce: str, request: str, expires: int, now: int) -> str:
        """Return the request that a nonce stands for; a new one is written, synced once."""
        query = "SELECT request FROM nonces WHERE nonce = ?"
        # The connection commits where the block ends well, and else rolls back.
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM nonces WHERE expires < ?", (now,))
            self._db.execute(
                "INSERT OR IGNORE INTO nonces VALUES (?, ?, ?)", (nonce, request, expires)
            )
            held: str = self._db.execute(query, (nonce,)).fetchone()[0]
        return held

    def close(self) -> None:
        """End the connection."""
        self._db.close()


class Gate:
    """See the module's docstring. Threads may share it.

    Args:
        coordinator: gives the pinned key, which a rotation may change.
        identity: the site's own key.
        ready: is told, once, of a study whose backbone has become whole.
    """

    def __init__(
        self,
        vault: Vault,
        studies: Studies,
        bundles: Bundles,
        *,
        coordinator: Callable[[], PublicKey],
        identity: SigningKey,
        nonces: Nonces,
        events: EventLog,
        ready: Callable[[Study], None] = lambda _: None,
    ) -> None:
        self._coordinator = coordinator
        self._vault = vault
        self._studies = studies
        self._bundles = bundles
        self._identity = identity
        self._nonces = nonces
        self._events = events
        self._ready = ready
        self._rate = Rate(vault.site.limits.requests_per_minute)
        self._parts = Rate(PARTS_PER_MINUTE)
        self._site = vault.site.site

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one request with a signed answer; never raises."""
        came = time.monotonic()
        answer = self._answer(envelope)
        if not _goes_on(answer):
            _hold(came, self._vault.site.reply_seconds)
        signature = self._identity.sign("answer", answer.header)
        return Envelope(answer.header, answer.payload, signature)

    def _answer(self, envelope: Envelope) -> Envelope:
        question = None
        try:
            question = self._admitted(envelope)
            answer = self._asked(question, envelope)
            self._noted(question, answer)
        except RefusedError as refusal:
            return self._refused(envelope, question, refusal.code, refusal.detail)
        except (MessageError, InputError) as error:
            return self._refused(envelope, question, Refusal.REQUEST_INVALID, str(error))
        except Exception:
            # An exception's text may hold what depends on a record; it stays here.
            log.exception("%s: refused", self._site)
            return self._refused(envelope, question, Refusal.UNAVAILABLE, "see the log")
        return answer

    def _admitted(self, envelope: Envelope) -> Question:
        """Return the question where it is the coordinator's own, to this site, now."""
        messages.check_header(envelope.header)
        pinned = self._coordinator()
        pinned.verify("request", envelope.header, envelope.signature)
        question = messages.decode_question(envelope.header)
        if not (self._parts if isinstance(question, Part) else self._rate).admits():
            raise RefusedError(Refusal.UNAVAILABLE, f"too many a minute: {question.kind}")
        if question.key != pinned.id or question.nonce is None:
            raise MessageError("expected the id of the pinned key, and a nonce")
        now, expires = time.time(), question.expires or 0
        if not now < expires <= now + LONGEST_SECONDS:
            raise MessageError(
                f"expires: expected within {LONGEST_SECONDS} s from now; the request is late, or "
                "one of the two clocks is wrong"
            )
        if not isinstance(question, Hello) and question.site != self._site:
            raise MessageError("site: the request is for another")
        if messages.digest(envelope.payload) != question.payload:
            raise MessageError("payload: not the one that the header pins")
        digest = messages.digest(envelope.header)
        self._nonces.use(question.nonce, digest, expires, now)
        return question

    def _asked(self, question: Question, envelope: Envelope) -> Envelope:
        match question:
            case Hello():
                return self._hello(question, envelope)
            case Offer() | Part():
                return self._backbone(question, envelope)
            case Request():
                return self._vault.handle(envelope)

    def _hello(self, hello: Hello, envelope: Envelope) -> Envelope:
        if envelope.payload and self._studies.propose(envelope.payload).digest != hello.study:
            raise MessageError("study: the payload is another")
        approved = self._vault.approved.get(hello.study)
        here = Here(
            site=self._site,
            request=messages.digest(envelope.header),
            approved=approved is not None,
            backbone=approved is not None and self._bundles.has(approved.backbone.digest),
            private=self._vault.site.seed is None,
            isolation=self._vault.site.isolation,
        )
        return Envelope(here.encode())

    def _backbone(self, asked: Offer | Part, envelope: Envelope) -> Envelope:
        study = self._vault.approved.get(asked.study)
        if study is None:
            raise RefusedError(Refusal.STUDY_NOT_APPROVED, f"{asked.study} is not approved")
        pinned = study.backbone.digest
        had = self._bundles.has(pinned)
        if isinstance(asked, Offer):
            payload = self._bundles.offer(pinned, envelope.payload)
        else:
            payload = self._bundles.part(pinned, asked.name, asked.offset, envelope.payload)
        if not had and self._bundles.has(pinned):
            self._ready(study)
        wanted = Wanted(
            site=self._site,
            request=messages.digest(envelope.header),
            payload=messages.digest(payload),
        )
        return Envelope(wanted.encode(), payload)

    def _noted(self, question: Question, answer: Envelope) -> None:
        """Write down what leaves; where that can't be, nothing does."""
        if not isinstance(question, Request):
            return
        reply = messages.decode_answer(answer.header)
        code = {"code": str(reply.code)} if isinstance(reply, Refused) else {}
        self._events.note(
            "refused" if code else "answered",
            asked=question.kind,
            study=question.study,
            run=question.run,
            round=question.round,
            attempt=question.attempt,
            payload=reply.payload,
            **code,
        )

    def _refused(
        self, envelope: Envelope, question: Question | None, code: Refusal, detail: str
    ) -> Envelope:
        log.warning("%s: refused: %s: %s", self._site, code, detail)
        request = messages.digest(envelope.header)
        refused = Envelope(Refused(site=self._site, request=request, code=code).encode())
        if question is None or code is Refusal.UNAVAILABLE:
            # What nobody has signed is kept in the log that rotates, or anyone could fill the disk.
            return refused
        try:
            self._noted(question, refused)
        except VeilgraftError as error:
            return self._refused(envelope, None, Refusal.UNAVAILABLE, str(error))
        return refused


class Rate:
    """So many a minute, and as many at once after a minute's rest (a token bucket)."""

    def __init__(self, per_minute: int) -> None:
        self._lock = threading.Lock()
        self._per_minute = per_minute
        self._left, self._at = float(per_minute), time.monotonic()

    def admits(self) -> bool:
        """Whether one more may pass now."""
        with self._lock:
            now = time.monotonic()
            regained = (now - self._at) * self._per_minute / 60
            self._left, self._at = min(self._per_minute, self._left + regained), now
            if self._left < 1:
                return False
            self._left -= 1
            return True


def _goes_on(answer: Envelope) -> bool:
    """Whether more parts of a backbone are wanted, so that nothing of a record can show."""
    if not isinstance(messages.decode_answer(answer.header), Wanted):
        return False
    return bool(json.loads(answer.payload)["missing"])


def _hold(came: float, step: float) -> None:
    """Return at the next multiple of `step` seconds after `came`."""
    elapsed = time.monotonic() - came
    time.sleep(step - elapsed % step)
