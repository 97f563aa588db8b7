"""The vault: the only code at a site that sees records, and all that it ever answers.

One request in, one release or refusal out. Order: parse, check (spends nothing), reserve in the
ledger, compute, commit the bytes, answer. Whatever goes wrong inside leaves as a fixed code; the
reason goes to the site's own log.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
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
from veilgraft_client import engines, policy
from veilgraft_client.fused import Fused
from veilgraft_client.ledger import Ledger, Terms
from veilgraft_client.policy import LARGEST, Site
from veilgraft_client.release import Wanted, answers

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
        self._trainers: dict[str, Fused | Trainer] = {}

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

    def begin_anew(self, study: Study) -> None:
        """Let go of an engine that failed; the lock is held.

        Opacus' hooks may be left in the middle of a step.
        """
        self._trainers.pop(study.digest, None)

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
        (answer,) = answers([(self, envelope)])
        return answer

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while a request is answered."""
        return self._lock

    def checked(self, envelope: Envelope) -> Envelope | Wanted:
        """Return what is to be paid for; or the answer, where that is nothing."""
        question = messages.decode_question(envelope.header)
        if not isinstance(question, Request):
            return self._here(question, envelope)
        study = self._approved.get(question.study)
        if study is None:
            raise RefusedError(
                Refusal.STUDY_NOT_APPROVED, f"{self.site.site}: {question.study} is not approved"
            )
        policy.check_request(self.site, study, question)
        self._open(study)
        head = self._head(study, question, envelope.payload)
        return Wanted(
            self,
            study,
            question,
            envelope,
            head,
            self._cohorts[study.digest],
            self._trainers[study.digest],
        )

    def _here(self, question: Question, envelope: Envelope) -> Envelope:
        if not isinstance(question, Hello):
            raise MessageError(f"{question.kind}: expected a request for a release")
        here = Here(site=self.site.site, request=messages.digest(envelope.header))
        return Envelope(here.encode())

    def refused(self, envelope: Envelope, error: Exception) -> Envelope:
        """Return the refusal for what went wrong, which is written to the site's own log."""
        match error:
            case RefusedError():
                log.warning("refused: %s", error.detail)
                code = error.code
            case MessageError():
                log.warning("refused: %s", error)
                code = Refusal.REQUEST_INVALID
            case _:
                # An exception's text may hold what depends on a record; it stays here.
                log.error("%s: refused", self.site.site, exc_info=error)
                code = Refusal.UNAVAILABLE
        request = messages.digest(envelope.header)
        return Envelope(Refused(site=self.site.site, request=request, code=code).encode())

    def release(self, envelope: Envelope, payload: bytes) -> Envelope:
        """Return the answer that brings a release."""
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
            self._trainers[study.digest] = engines.trainer(
                study,
                self._cohorts[study.digest].training,
                sigma=plan(study).sigma,
                units=max(1.0, self.site.units * (1 - self.site.held_out)),
                engine=self.site.engine,
            )

    def _head(self, study: Study, request: Request, payload: bytes) -> heads.Arrays:
        if request.kind == "label-counts":
            shapes = {}
        else:
            dim = self._cohorts[study.digest].dim
            shapes = heads.shapes(study.head, dim, len(study.task.labels))
        try:
            return _head(payload, request.head, tuple(shapes.items()))
        except MessageError as error:
            raise RefusedError(Refusal.HEAD_INVALID, f"{self.site.site}: {error}") from None

    def noise(self, study: Study, request: Request) -> NoiseSource:
        """Return the randomness of one release."""
        if self._seed is None:
            return NoiseSource.fresh()
        site, kind = self.site.site, request.kind
        return NoiseSource.seeded(self._seed, study.digest, site, kind, request.round)


# One head goes to all sites of a simulation; nobody writes to it.
@lru_cache(maxsize=1)
def _head(
    payload: bytes, digest: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> heads.Arrays:
    """Return a head that was sent; raises `MessageError` where it is not as was agreed."""
    if messages.digest(payload) != digest:
        raise MessageError("the head is not the one that the header pins")
    try:
        head = messages.unpack(payload, dict(shapes))
    except MessageError as error:
        raise MessageError(f"head: {error}") from None
    if any((np.abs(array) > LARGEST).any() for array in head.values()):
        raise MessageError(f"head: above {LARGEST:g}")
    return head
