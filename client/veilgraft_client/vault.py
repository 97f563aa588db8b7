"""The vault: the only code at a site that sees records, and all that it ever answers.

One request in, one release or refusal out. Order: parse, check (spends nothing), reserve in the
ledger, compute, commit the bytes, answer. Whatever goes wrong inside leaves as a fixed code; the
reason goes to the site's own log.

`answers` does this for many vaults of one process, as a simulation has them: updates that are
alike are computed together, between the reservations and the commits.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from veilgraft import messages
from veilgraft.chain import ChainError
from veilgraft.errors import MessageError, Refusal, RefusedError
from veilgraft.messages import Envelope, Hello, Here, Question, Refused, Release, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort
from veilgraft.plan import plan
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import engines, evaluation, policy
from veilgraft_client.fused import Fused, Work, together
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

    def _begun(self, envelope: Envelope) -> "Envelope | _Paid":
        """Check and pay; return the answer where there is nothing to compute with others."""
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
        key = Key(self.site.site, study.digest, question.round, question.head, question.kind)
        reserved = self.ledger.reserve(key)
        if isinstance(reserved, bytes):
            return self._release(envelope, reserved)
        return _Paid(self, study, question, envelope, head, reserved)

    def _here(self, question: Question, envelope: Envelope) -> Envelope:
        if not isinstance(question, Hello):
            raise MessageError(f"{question.kind}: expected a request for a release")
        here = Here(site=self.site.site, request=messages.digest(envelope.header))
        return Envelope(here.encode())

    def _refused(self, envelope: Envelope, error: Exception) -> Envelope:
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

    def _release(self, envelope: Envelope, payload: bytes) -> Envelope:
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
                device=self.site.device,
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

    def _noise(self, study: Study, request: Request) -> NoiseSource:
        if self._seed is None:
            return NoiseSource.fresh()
        site, kind = self.site.site, request.kind
        return NoiseSource.seeded(self._seed, study.digest, site, kind, request.round)


@dataclass(frozen=True)
class _Paid:
    """A release that is reserved, and not yet computed."""

    vault: Vault
    study: Study
    request: Request
    envelope: Envelope
    head: heads.Arrays
    reservation: int

    @property
    def trainer(self) -> "Fused | Trainer":
        return self.vault._trainers[self.study.digest]

    @property
    def fused(self) -> Fused | None:
        """The engine with which it can be computed together with others."""
        trainer = self.trainer
        return trainer if self.request.kind == "update" and isinstance(trainer, Fused) else None

    @property
    def form(self) -> object:
        """What must be alike for that; None where it is computed alone."""
        return self.fused.form if self.fused else None

    @property
    def at_once(self) -> int:
        """How many may be computed together."""
        return self.fused.sites_at_once if self.fused else 1

    def work(self, source: NoiseSource) -> Work:
        assert self.fused is not None
        return Work(self.fused, self.head, self.request.rate, source)

    def noise(self) -> NoiseSource:
        return self.vault._noise(self.study, self.request)

    def alone(self, source: NoiseSource) -> Mapping[str, np.ndarray]:
        """Compute what is not computed with others."""
        cohort = self.vault._cohorts[self.study.digest]
        match self.request.kind:
            case "update":
                return self.trainer.update(self.head, self.request.rate, source)
            case "evaluation":
                return evaluation.evaluate(self.study, self.head, cohort.held_out, source)
            case "label-counts":
                return evaluation.count_labels(self.study, cohort.whole, source)

    def failed(self, error: Exception) -> Envelope:
        # Opacus' hooks may be left in the middle of a step; a new trainer starts clean.
        self.vault._trainers.pop(self.study.digest, None)
        return self.vault._refused(self.envelope, error)

    def answer(self, arrays: "_Released") -> Envelope:
        """Store what was computed, and return the answer."""
        if isinstance(arrays, Exception):
            return self.failed(arrays)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            return self.failed(ValueError("a release must be finite"))
        try:
            payload = self.vault.ledger.commit(self.reservation, messages.pack(arrays))
        except ChainError as error:
            return self.failed(error)
        return self.vault._release(self.envelope, payload)


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


def answers(asked: Sequence[tuple[Vault, Envelope]]) -> list[Envelope]:
    """Answer one request to each of some vaults; never raises, like `Vault.handle`."""
    found: dict[int, Envelope] = {}
    with ExitStack() as locked:
        for vault in {id(vault): vault for vault, _ in asked}.values():
            locked.enter_context(vault._lock)
        alike: dict[object, dict[int, _Paid]] = defaultdict(dict)
        for place, (vault, envelope) in enumerate(asked):
            try:
                begun = vault._begun(envelope)
            except Exception as error:  # noqa: BLE001 - it stays here
                begun = vault._refused(envelope, error)
            if isinstance(begun, _Paid):
                alike[begun.form or place][place] = begun
            else:
                found[place] = begun
        groups = [
            places
            for each in alike.values()
            for places in _batched(each, next(iter(each.values())).at_once)
        ]
        paid = {place: each for group in alike.values() for place, each in group.items()}
        for places in groups:
            released = _released([paid[place] for place in places])
            for place, arrays in zip(places, released, strict=True):
                found[place] = paid[place].answer(arrays)
    return [found[place] for place in range(len(asked))]


_Released: TypeAlias = Mapping[str, np.ndarray] | Exception


def _released(group: Sequence[_Paid]) -> list[_Released]:
    try:
        with ExitStack() as sources:
            drawn = [sources.enter_context(each.noise()) for each in group]
            if group[0].form is None:
                return [each.alone(source) for each, source in zip(group, drawn, strict=True)]
            works = [each.work(source) for each, source in zip(group, drawn, strict=True)]
            return list(together(works))
    except Exception as error:  # noqa: BLE001 - it stays here
        return [error] * len(group)


def _batched(places: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """Yield so many at a time, as `itertools.batched` will."""
    rest = iter(places)
    while part := tuple(islice(rest, size)):
        yield part
