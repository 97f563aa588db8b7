"""The vault: the only code at a site that sees records, and all that it ever answers.

One request in, one release or refusal out. Order: parse, check (spends nothing), reserve in the
ledger, compute, commit the bytes, answer. Whatever goes wrong inside leaves as a fixed code; the
reason goes to the site's own log.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from veilgraft import messages
from veilgraft.errors import MessageError, Refusal, RefusedError
from veilgraft.messages import Envelope, Hello, Here, Refused, Release, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Features
from veilgraft.plan import plan
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import policy
from veilgraft_client.ledger import Key, Ledger
from veilgraft_client.policy import Site
from veilgraft_client.training import Trainer

log = logging.getLogger(__name__)

HELLO = b'{"kind":"hello"'


class Vault:
    """One site's records, features, noise and ledger behind one method.

    Args:
        features: the site's features for a study, computed or found when first needed.
        seed: makes noise reproducible and the run not private; refused where the site's file
            does not say `data_is_public`.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        features: Callable[[Study], Features],
        *,
        seed: int | None = None,
    ) -> None:
        self.site = site
        self.ledger = ledger
        self._features = features
        self._seed = seed
        self._approved: dict[str, Study] = {}
        self._trainers: dict[str, Trainer] = {}

    def approve(self, study: Study) -> None:
        """Grant the study's plan; raises `RefusedError`, with the numbers, where it may not."""
        planned = plan(study)
        policy.check_study(self.site, study, planned, seeded=self._seed is not None)
        if self._seed is not None:
            # Noise that can be drawn again protects nobody, and the ledger must say so.
            planned = replace(planned, update=None)
        limit = self.site.limits.max_epsilon if planned.update else float("inf")
        self.ledger.grant(self.site.site, study.digest, planned, max_epsilon=limit)
        self._approved[study.digest] = study

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer one request; never raises, and says no more than a code when it refuses."""
        try:
            if envelope.header.startswith(HELLO):
                Hello.decode(envelope.header)
                return Envelope(Here(site=self.site.site).encode())
            return self._release(envelope)
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

    def _release(self, envelope: Envelope) -> Envelope:
        request = Request.decode(envelope.header)
        study = self._approved.get(request.study)
        if study is None:
            raise RefusedError(
                Refusal.STUDY_NOT_APPROVED, f"{self.site.site}: {request.study} is not approved"
            )
        policy.check_request(self.site, study, request)
        trainer = self._trainer(study)
        head = self._head(study, trainer, request, envelope.payload)
        payload = self._paid(study, trainer, request, head)
        release = Release(
            site=self.site.site,
            request=messages.digest(envelope.header),
            payload=messages.digest(payload),
        )
        return Envelope(release.encode(), payload)

    def _trainer(self, study: Study) -> Trainer:
        if study.digest not in self._trainers:
            sigma = plan(study).sigma
            self._trainers[study.digest] = Trainer(
                study, self._features(study), sigma=sigma, units=self.site.units
            )
        return self._trainers[study.digest]

    def _head(
        self, study: Study, trainer: Trainer, request: Request, payload: bytes
    ) -> heads.Arrays:
        if messages.digest(payload) != request.head:
            raise RefusedError(Refusal.HEAD_INVALID, "the head is not the one that the header pins")
        shapes = heads.shapes(study.head, trainer.dim, len(study.task.labels))
        try:
            return messages.unpack(payload, shapes)
        except MessageError as error:
            raise RefusedError(Refusal.HEAD_INVALID, f"{self.site.site}: head: {error}") from None

    def _paid(self, study: Study, trainer: Trainer, request: Request, head: heads.Arrays) -> bytes:
        key = Key(self.site.site, study.digest, request.round, request.head)
        reserved = self.ledger.reserve(key)
        if isinstance(reserved, bytes):
            return reserved
        try:
            with self._noise(study, request.round) as source:
                update = trainer.update(head, request.rate, source)
        except BaseException:
            # Opacus' hooks may be left in the middle of a step; a new trainer starts clean.
            self._trainers.pop(study.digest, None)
            raise
        if not all(np.isfinite(array).all() for array in update.values()):
            raise ValueError("a release must be finite")
        return self.ledger.commit(reserved, messages.pack(update))

    def _noise(self, study: Study, round_: int) -> NoiseSource:
        if self._seed is None:
            return NoiseSource.fresh()
        return NoiseSource.seeded(self._seed, study.digest, self.site.site, round_)
