"""The vault: the only code at a site that sees records, and all that it ever answers.

One request in, one release or refusal out. Order: parse, check (spends nothing), reserve in the
ledger, compute, commit the bytes, answer. Whatever goes wrong inside leaves as a fixed code; the
reason goes to the site's own log.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from veilgraft import messages
from veilgraft.errors import MessageError, Refusal, RefusedError
from veilgraft.messages import Envelope, Hello, Here, Question, Refused, Release, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort
from veilgraft.plan import plan
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import evaluation, policy
from veilgraft_client.ledger import Key, Ledger, Terms
from veilgraft_client.policy import LARGEST, Site

if TYPE_CHECKING:
    from veilgraft_client.training import Trainer

log = logging.getLogger(__name__)


class Vault:
    """One site's records, features, noise and ledger behind one method.

    Threads may share it: it answers one request at a time.

    Args:
        cohort: the site's features for a study, computed or found when first needed.
        seed: makes noise reproducible and the run not private; refused where the site's file
            does not say `data_is_public`.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        cohort: Callable[[Study], Cohort],
        *,
        seed: int | None = None,
    ) -> None:
        self.site = site
        self.ledger = ledger
        self._cohort = cohort
        self._seed = seed
        self._lock = threading.Lock()
        self._approved: dict[str, Study] = {}
        self._cohorts: dict[str, Cohort] = {}
        self._trainers: dict[str, Trainer] = {}

    def approve(self, study: Study) -> None:
        """Grant the study's plan; raises `RefusedError`, with the numbers, where it may not."""
        planned = plan(study)
        policy.check_study(self.site, study, planned, seeded=self._seed is not None)
        if self._seed is not None:
            # Noise that can be drawn again protects nobody, and the ledger must say so.
            planned = planned.without_bound()
        limits = self.site.limits
        cap = limits.max_epsilon if planned.update else None
        terms = Terms(cap, limits.delta, self.site.held_out, self.site.unit(study))
        own = self.site
        self.ledger.grant(own.site, study.digest, planned, terms, units=own.units)
        self._approved[study.digest] = study

    def withdraw(self, study: str) -> None:
        """Serve a study no longer; what was granted stays in the ledger."""
        with self._lock:
            self._approved.pop(study, None)
        self.forget(study)

    def forget(self, study: str) -> None:
        """Let go of a study's features; they are found, or made, again when they are needed."""
        with self._lock:
            self._cohorts.pop(study, None)
            self._trainers.pop(study, None)

    def prepare(self, study: Study) -> None:
        """Have a study's features at hand before the first request asks for them."""
        with self._lock:
            self._open(study)

    @property
    def approved(self) -> Mapping[str, Study]:
        """The studies that are served, by digest."""
        return dict(self._approved)

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one request; never raises, and says no more than a code when it refuses."""
        try:
            question = messages.decode_question(envelope.header)
            if not isinstance(question, Request):
                return self._here(question, envelope)
            with self._lock:
                return self._release(question, envelope)
        except RefusedError as refusal:
            log.warning("refused: %s", refusal.detail)
            code = refusal.code
        except MessageError as error:
            log.warning("refused: %s", error)
            code = Refusal.REQUEST_INVALID
        except Exception:
            # An exception's text may hold what depends on a record; it stays here.
            log.exception("%s: refused", self.site.site)
            code = Refusal.UNAVAILABLE
        request = messages.digest(envelope.header)
        return Envelope(Refused(site=self.site.site, request=request, code=code).encode())

    def _here(self, question: Question, envelope: Envelope) -> Envelope:
        if not isinstance(question, Hello):
            raise MessageError(f"{question.kind}: expected a request for a release")
        here = Here(site=self.site.site, request=messages.digest(envelope.header))
        return Envelope(here.encode())

    def _release(self, request: Request, envelope: Envelope) -> Envelope:
        study = self._approved.get(request.study)
        if study is None:
            raise RefusedError(
                Refusal.STUDY_NOT_APPROVED, f"{self.site.site}: {request.study} is not approved"
            )
        policy.check_request(self.site, study, request)
        self._open(study)
        head = self._head(study, request, envelope.payload)
        payload = self._paid(study, request, head)
        release = Release(
            site=self.site.site,
            request=messages.digest(envelope.header),
            payload=messages.digest(payload),
        )
        return Envelope(release.encode(), payload)

    def _open(self, study: Study) -> None:
        """Have features and trainer at hand, so that what is paid for can be computed."""
        if study.digest not in self._cohorts:
            self._cohorts[study.digest] = self._cohort(study)
        if study.digest not in self._trainers:
            # Not at the top: Opacus takes two seconds, which orders that train nothing need not.
            from veilgraft_client.training import Trainer

            self._trainers[study.digest] = Trainer(
                study,
                self._cohorts[study.digest].training,
                sigma=plan(study).sigma,
                units=max(1.0, self.site.units * (1 - self.site.held_out)),
            )

    def _head(self, study: Study, request: Request, payload: bytes) -> heads.Arrays:
        if messages.digest(payload) != request.head:
            raise RefusedError(Refusal.HEAD_INVALID, "the head is not the one that the header pins")
        if request.kind == "label-counts":
            shapes = {}
        else:
            dim = self._cohorts[study.digest].dim
            shapes = heads.shapes(study.head, dim, len(study.task.labels))
        try:
            head = messages.unpack(payload, shapes)
        except MessageError as error:
            raise RefusedError(Refusal.HEAD_INVALID, f"{self.site.site}: head: {error}") from None
        if any((np.abs(array) > LARGEST).any() for array in head.values()):
            raise RefusedError(Refusal.HEAD_INVALID, f"{self.site.site}: head: above {LARGEST:g}")
        return head

    def _paid(self, study: Study, request: Request, head: heads.Arrays) -> bytes:
        key = Key(self.site.site, study.digest, request.round, request.head, request.kind)
        reserved = self.ledger.reserve(key)
        if isinstance(reserved, bytes):
            return reserved
        try:
            with self._noise(study, request) as source:
                released = self._computed(study, request, head, source)
        except BaseException:
            # Opacus' hooks may be left in the middle of a step; a new trainer starts clean.
            self._trainers.pop(study.digest, None)
            raise
        if not all(np.isfinite(array).all() for array in released.values()):
            raise ValueError("a release must be finite")
        return self.ledger.commit(reserved, messages.pack(released))

    def _computed(
        self, study: Study, request: Request, head: heads.Arrays, source: NoiseSource
    ) -> heads.Arrays:
        cohort = self._cohorts[study.digest]
        match request.kind:
            case "update":
                return self._trainers[study.digest].update(head, request.rate, source)
            case "evaluation":
                return evaluation.evaluate(study, head, cohort.held_out, source)
            case "label-counts":
                return evaluation.count_labels(study, cohort.whole, source)

    def _noise(self, study: Study, request: Request) -> NoiseSource:
        if self._seed is None:
            return NoiseSource.fresh()
        site, kind = self.site.site, request.kind
        return NoiseSource.seeded(self._seed, study.digest, site, kind, request.round)
