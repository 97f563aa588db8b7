"""The site's own file, and what it lets a study and a request do.

What matters for privacy comes from here and from the approved study, never from a message. A
refusal carries a fixed code for the coordinator and the reason in full for the site.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, StrictBool, model_validator

from veilgraft.config import Config, RelativePath
from veilgraft.errors import Refusal, RefusedError
from veilgraft.messages import Request
from veilgraft.plan import Plan
from veilgraft.study import MAX_UNITS, RECORD, DataSource, Digest, Name, Study

AUTO = "VEILGRAFT_ENGINE"
"""Environment variable: what `engine: auto` stands for, to run everything under one engine."""

LARGEST = 1e4
"""Of a feature and of a head's number; what is larger is a mistake or an attack. A unit that holds
more counts for nothing, a head that does is refused."""


class Limits(Config):
    """What the site allows at most, over the whole life of its data.

    Attributes:
        max_epsilon: ε of everything ever released, at `delta`.
        delta: the δ of that. Half of it is for what was fixed before the first release, half for
            studies chosen later; so no study may have more than half.
        min_units: a site that declares fewer takes no part.
        min_noise_multiplier: of any release of a study; a floor under what ε allows.
        max_clip_norm: of a study; it does not bear on privacy, and keeps numbers in bounds.
        max_backbone_bytes: that a backbone's files may take.
        requests_per_minute: of the coordinator's that are answered at most, valid or not; parts
            of a backbone have a rate of their own.
        studies, backbones: digests that may be used; None allows any that a person approves.
    """

    max_epsilon: PositiveFloat
    delta: Annotated[float, Field(ge=1e-9, lt=2e-3)] = 2e-5
    min_units: PositiveInt = 1
    min_noise_multiplier: Annotated[float, Field(ge=0, le=1e5)] = 0.0
    max_clip_norm: PositiveFloat = 1e4
    max_backbone_bytes: PositiveInt = 4 << 30
    requests_per_minute: Annotated[int, Field(gt=0, le=100_000)] = 240
    studies: tuple[Digest, ...] | None = None
    backbones: tuple[Digest, ...] | None = None


class Site(Config):
    """`site.yaml`: one site's data, declarations and limits.

    Attributes:
        units: the number of units that the site declares; it enters the arithmetic in place of
            the measured one, which would show through ε.
        held_out: the share of units that heads are evaluated on and never trained on; fixed for
            the life of the data.
        consent, anonymisation: the site's declarations, in its own words.
        data_is_public: the site's word that nobody's privacy is at stake; only then may a study
            without noise or with a seed run here.
        seed: makes noise reproducible and nothing private; for public data alone.
        state: folder for features and ledger.
        device: that the backbone runs on; `auto` takes a GPU where there is one.
        engine: that trains heads: `fused`, `opacus`, the reference, or `auto`, which takes the
            fused one wherever its proof reaches.
        isolation: `full`: private studies are served only where the vault has no network, the
            courier is another user, and that user can't read what the vault reads; `reduced`: a
            person accepts less, and the privacy statement says so.
        courier_user: name or number of the user that the courier runs as.
        reply_seconds: an answer leaves at a multiple of so many seconds after its request came,
            so that the time it took tells little.
    """

    site: Name
    data: DataSource
    units: Annotated[int, Field(gt=0, le=MAX_UNITS)]
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    consent: str = ""
    anonymisation: str = ""
    limits: Limits
    data_is_public: StrictBool = False
    seed: Annotated[int, Field(ge=0)] | None = None
    state: RelativePath
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["auto", "opacus", "fused"] = "auto"
    isolation: Literal["full", "reduced"] = "full"
    courier_user: str | Annotated[int, Field(gt=0, lt=2**32 - 1)] | None = None
    reply_seconds: Annotated[float, Field(gt=0, le=600)] = 0.5

    @model_validator(mode="after")
    def _a_seed_is_for_public_data(self) -> Self:
        if self.seed is not None and not self.data_is_public:
            raise ValueError("seed: expected none where data_is_public is not true")
        return self

    def unit(self, study: Study) -> str:
        """Return what a study's unit is here: the column as this site's file names and types it."""
        if study.privacy.column is None:
            return RECORD
        return f"{self.data.unit or study.privacy.column}, as {self.data.unit_type}"


def check_study(site: Site, study: Study, plan: Plan, *, seeded: bool) -> None:
    """Raise `RefusedError` unless the site's file allows the study; spends nothing."""
    limits = site.limits
    if not site.data_is_public and (seeded or not study.private):
        what = "a seed" if seeded else "training.algorithm none"
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: {what} gives no privacy, and data_is_public is not true here",
        )
    if limits.studies is not None and study.digest not in limits.studies:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED, f"{site.site}: limits.studies does not name {study.digest}"
        )
    if limits.backbones is not None and study.backbone.digest not in limits.backbones:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: limits.backbones does not name {study.backbone.digest}",
        )
    if plan.update is not None and plan.delta > limits.delta / 2:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: the study asks for δ = {plan.delta:g}; limits.delta is "
            f"{limits.delta:g}, of which one study may use half",
        )
    if plan.evaluated and not site.held_out:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: the study evaluates on units held out for life, and held_out is 0",
        )
    if study.privacy.clip_norm > limits.max_clip_norm:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: privacy.clip_norm is {study.privacy.clip_norm:g}; "
            f"limits.max_clip_norm is {limits.max_clip_norm:g}",
        )
    _check_noise(site, study, plan)
    if site.units < limits.min_units:
        raise RefusedError(
            Refusal.UNAVAILABLE,
            f"{site.site}: {site.units} units declared, limits.min_units is {limits.min_units}",
        )


def _check_noise(site: Site, study: Study, plan: Plan) -> None:
    floor = site.limits.min_noise_multiplier
    least = min((event.noise_multiplier for _, event in plan.releases.values() if event), default=0)
    if study.private and least < floor:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            f"{site.site}: the study's least noise multiplier is {least:g}; "
            f"limits.min_noise_multiplier is {floor:g}",
        )


def check_request(site: Site, study: Study, request: Request) -> None:
    """Raise `RefusedError` unless the request fits the approved study; spends nothing."""
    if request.site != site.site:
        raise RefusedError(Refusal.REQUEST_INVALID, f"{site.site}: asked as {request.site}")
    if not _planned(study, request):
        raise RefusedError(
            Refusal.REQUEST_INVALID,
            f"{site.site}: {request.kind} of round {request.round} is no part of the plan",
        )
    if request.kind != "update":
        return
    if not 0 < request.rate <= study.training.learning_rate * (1 + 1e-9):
        raise RefusedError(
            Refusal.REQUEST_INVALID,
            f"{site.site}: a learning rate of {request.rate:g} was asked for; "
            f"training.learning_rate is {study.training.learning_rate:g}",
        )


def _planned(study: Study, request: Request) -> bool:
    match request.kind:
        case "update":
            return 1 <= request.round <= study.training.rounds
        case "evaluation":
            return request.round in study.evaluated
        case "label-counts":
            return study.evaluation.label_counts is not None and request.round == 0
