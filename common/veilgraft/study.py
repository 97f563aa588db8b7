"""The contract: what one study is, as all parties hold it.

A study is read from `study.yaml` once and never changes. Its *digest* is the SHA-256 of its
canonical form: every key that binds a party, with defaults written out, as sorted JSON. What is
local to one machine (where a file lies, how a simulation splits its data) is not part of it.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    StringConstraints,
    model_validator,
)

from veilgraft.config import Config, RelativePath, sha256_of
from veilgraft.errors import InputError

FORMAT = 1
"""Version of the canonical form; a change of meaning raises it and so changes every digest."""

MAX_UNITS = 2**20
"""Units that one site may declare."""

RECORD = "record"
"""The unit of a study that protects records."""

Kind = Literal["update", "evaluation", "label-counts"]
"""What a site may release."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
NoiseMultiplier = Annotated[float, Field(ge=1e-3, le=1e5)]


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(value: object) -> object:
    return (value,) if isinstance(value, Mapping | DataSource) else value


def _none_for_equal(value: object) -> object:
    return {} if value == "equal" else value


def _other(key: str) -> str:
    return "epsilon" if key == "share" else "noise_multiplier"


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) < 2:
        raise ValueError(f"expected at least two labels, got {len(labels)}")
    if len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise ValueError(f"expected distinct labels, got {', '.join(twice)} more than once")
    return labels


Label = Annotated[str, BeforeValidator(_text), StringConstraints(min_length=1, max_length=200)]


class DataSource(Config):
    """Where records lie and which columns matter.

    Attributes:
        path: a CSV, JSONL or Parquet file, or a folder of images, `LABEL/file`.
        source: `digits`, scikit-learn's handwritten digits, in place of a path.
        format: told from the path unless given.
        input: the column that holds the text or the image's bytes.
        label: the column that holds the label, by name or by integer.
        unit: the column of the protected unit where it is not named as in the study.
        unit_type: how ids are compared: as text, or as whole numbers, so that 001 and 1 are one.
        separator: between several labels in one cell of a multi-label task.
        on_bad_record: whether a row that can't be read stops the load or is left out.
    """

    path: RelativePath | None = None
    source: Literal["digits"] | None = None
    format: Literal["csv", "jsonl", "parquet", "images"] | None = None
    input: str | None = None
    label: str = "label"
    unit: str | None = None
    unit_type: Literal["text", "integer"] = "text"
    separator: Annotated[str, StringConstraints(min_length=1)] = ";"
    on_bad_record: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("expected exactly one of the keys path and source")
        return self


class Task(Config):
    """What the head learns: one label of many, or any number of them (`multilabel`)."""

    type: Literal["classification", "multilabel"] = "classification"
    labels: Annotated[tuple[Label, ...], AfterValidator(_distinct)]


class Preprocessing(Config):
    """How an image becomes a tensor where the backbone's folder does not say.

    Attributes:
        size: side in pixels; images are resized to size × size, bilinear.
        mean: subtracted from each channel after scaling to [0, 1].
        std: what each channel is then divided by.
    """

    size: PositiveInt
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)


class Backbone(Config):
    """The frozen, pinned model that turns a record into features.

    Attributes:
        digest: pins every file of the folder (see `veilgraft backbone verify`).
        path: where the folder lies on this machine; not part of the contract.
        max_length: tokens at most, for text.
        standardise: the bundle's public feature statistics are applied to all features.
    """

    digest: Digest
    path: RelativePath | None = None
    modality: Literal["image", "text"]
    pooling: Literal["cls", "mean", "pooler"]
    max_length: PositiveInt = 128
    preprocessing: Preprocessing | None = None
    standardise: bool = False


class Head(Config):
    """The small trainable part: `linear`, or `mlp` with `hidden` sizes."""

    type: Literal["linear", "mlp"] = "linear"
    hidden: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = ()
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _hidden_suits_type(self) -> Self:
        if (self.type == "mlp") != bool(self.hidden):
            raise ValueError("expected hidden sizes for type mlp, and none for type linear")
        if self.type == "linear" and self.dropout:
            raise ValueError("expected no dropout for type linear")
        return self


class Privacy(Config):
    """What is promised to each unit, and the noise that keeps the promise.

    Exactly one of `epsilon` (from which the noise is solved) and `noise_multiplier` (from which
    ε follows) is given, and neither where the algorithm is `none`.

    Attributes:
        unit: what is protected: a `record`, or all rows that have one value in the column of this
            name, a person.
        max_instances: of a person's rows, at most so many are used; 1 for records.
        epsilon: the study's ε at `delta`, add/remove one unit, over all that it releases.
        clip_norm: L2 bound on one unit's gradient.
    """

    unit: Annotated[str, StringConstraints(min_length=1, max_length=200)] = RECORD
    max_instances: Annotated[int, Field(gt=0, le=4096)] = 1
    epsilon: PositiveFloat | None = None
    noise_multiplier: NoiseMultiplier | None = None
    delta: Annotated[float, Field(gt=0, lt=1e-3)] = 1e-5
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0

    @model_validator(mode="after")
    def _instances_suit_unit(self) -> Self:
        if self.unit == RECORD and self.max_instances != 1:
            raise ValueError("expected max_instances 1 for unit record, which is one row")
        if self.unit != RECORD and "max_instances" not in self.model_fields_set:
            raise ValueError(
                f"expected max_instances beside unit {self.unit}: of a unit's rows, how many are "
                "used at most"
            )
        return self

    @property
    def column(self) -> str | None:
        """The column whose values name the units; None where each record is one."""
        return None if self.unit == RECORD else self.unit


class Training(Config):
    """How the head is trained.

    Attributes:
        algorithm: `dp-sgd` (Poisson-sampled local steps), `dp-gd` (one full-batch gradient a
            round, momentum at the coordinator, the last half of the iterates averaged) or
            `none`: either of them, neither clipped nor noised, so not private.
        rounds: planned; the plan is what is paid for.
        schedule: of the learning rate over the rounds; `plateau` halves it when the shown
            accuracy has not risen for `patience` rounds.
        sample_rate: probability with which a local step takes a unit; makes the algorithm take
            local steps.
        local_epochs: expected passes over the data in a round.
    """

    algorithm: Literal["dp-sgd", "dp-gd", "none"]
    rounds: Annotated[int, Field(gt=0, le=10_000)]
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    patience: PositiveInt = 3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    local_epochs: PositiveInt | None = None

    @model_validator(mode="after")
    def _sampling_suits_algorithm(self) -> Self:
        given = [k for k in ("sample_rate", "local_epochs") if getattr(self, k) is not None]
        if self.algorithm == "dp-gd" and given:
            raise ValueError(f"expected no {' or '.join(given)} for algorithm dp-gd")
        if len(given) == 1 or (self.algorithm == "dp-sgd" and not given):
            raise ValueError(
                f"expected both sample_rate and local_epochs for algorithm {self.algorithm}, "
                f"got {given[0] if given else 'neither'}"
            )
        if self.local_steps > 10_000:
            raise ValueError(
                f"expected at most 10000 local steps a round, got {self.local_steps} from "
                "local_epochs / sample_rate"
            )
        return self

    @property
    def sampled(self) -> bool:
        """Whether a round is local steps over Poisson samples, not one full-batch gradient."""
        return self.sample_rate is not None

    @property
    def local_steps(self) -> int:
        """Steps of one round at one site: a constant of the study."""
        if self.sample_rate is None or self.local_epochs is None:
            return 1
        return max(1, round(self.local_epochs / self.sample_rate))


class Aggregation(Config):
    """How releases become the next head.

    Attributes:
        weights: `equal`, or a public constant for each site; empty stands for `equal`.
        quorum: valid releases that a round needs.
        timeout: seconds that a round waits for them.
        max_update_norm: a release with a larger L2 norm is dropped; by default, one larger than
            an honest site's could be.
    """

    method: Literal["fedavg"] = "fedavg"
    weights: Annotated[dict[Name, PositiveFloat], BeforeValidator(_none_for_equal)] = Field(
        default_factory=dict
    )
    quorum: PositiveInt = 1
    timeout: PositiveFloat = 600.0
    max_update_norm: PositiveFloat | None = None


class Measurement(Config):
    """Something that sites count and release with noise, inside the study's ε.

    Attributes:
        share: of the study's ε, what all these releases would cost if they were all there is; for
            a study that names its ε.
        noise_multiplier: for a study that names its noise.
    """

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    noise_multiplier: NoiseMultiplier | None = None

    @model_validator(mode="after")
    def _noise_is_named_once(self) -> Self:
        if (self.share is None) == (self.noise_multiplier is None):
            raise ValueError("expected exactly one of share and noise_multiplier")
        return self


class PrivateEvaluation(Measurement):
    """Accuracy and loss on units that each site holds out for life.

    Attributes:
        every: so many rounds, and after the last.
        loss_bound: a public constant; a unit's mean loss, in nats, counts for so much at most.
    """

    every: PositiveInt = 5
    loss_bound: PositiveFloat = 4.0


class Evaluation(Config):
    """What the coordinator learns of a head beside the updates.

    Attributes:
        data: public records, on which it measures accuracy and loss itself.
        data_is_public: the user's word for it; without noise, the figures tell of each record.
        private: accuracy and loss at the sites, noised, in the place of public records.
        label_counts: how many units of each label a site has, noised, once, before the first
            round.
    """

    data: DataSource | None = None
    data_is_public: StrictBool = False
    private: PrivateEvaluation | None = None
    label_counts: Measurement | None = None

    @model_validator(mode="after")
    def _data_are_public(self) -> Self:
        if self.data is not None and not self.data_is_public:
            raise ValueError(
                "expected data_is_public: true beside data; accuracy on them is shown un-noised"
            )
        if self.data is not None and self.private is not None:
            raise ValueError("expected data or private, not both: one accuracy is shown")
        return self


class Partition(Config):
    """How a simulation splits one data set over its sites.

    Attributes:
        by: `iid`, `dirichlet` (label skew; smaller `alpha`, more skew) or `column`.
        seed: of the shuffle that comes first; a public constant, not a source of privacy.
    """

    by: Literal["iid", "dirichlet", "column"] = "iid"
    alpha: PositiveFloat = 0.5
    column: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _column_is_named(self) -> Self:
        if (self.by == "column") != (self.column is not None):
            raise ValueError("expected a column where, and only where, the split is by column")
        return self


def _once(values: tuple[float, ...]) -> tuple[float, ...]:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"expected each value once, got {', '.join(map(str, twice))} twice")
    return values


class Grid(Config):
    """Values over which a sweep runs a study, each with each; a key left out is as in the study.

    Comparisons are tuned over `learning_rate` and `rounds`, and take no notice of the others.

    Attributes:
        epsilon: the study's ε, in the place of `privacy.epsilon` or `privacy.noise_multiplier`.
        seeds: each point is run once with each; without any, once and unseeded.
    """

    epsilon: Annotated[tuple[PositiveFloat, ...], AfterValidator(_once)] = ()
    learning_rate: Annotated[tuple[PositiveFloat, ...], AfterValidator(_once)] = ()
    rounds: Annotated[tuple[PositiveInt, ...], AfterValidator(_once)] = ()
    clip_norm: Annotated[tuple[PositiveFloat, ...], AfterValidator(_once)] = ()
    sample_rate: Annotated[tuple[PositiveFloat, ...], AfterValidator(_once)] = ()
    seeds: Annotated[tuple[NonNegativeInt, ...], AfterValidator(_once)] = ()


class Simulation(Config):
    """What `veilgraft simulate` needs beyond the contract; never part of it.

    Attributes:
        data: one source, which the simulation splits over `sites` sites, or a list of sources,
            one for each site.
        data_is_public: the user's word that nobody's privacy is at stake in these records.
        units: the size that each site declares; needed, and a round number, where the data are
            not public, for a measured size is a release. Else the split's own.
        max_epsilon: what each simulated site allows over the life of its ledger; by default the
            study's own ε. For data not public, the first run fixes it.
        holdout: units kept apart for evaluation: a count or a share of public data before the
            split; a share of each site's for `evaluation.private`, and of data not public.
        grid: the values over which a sweep runs and every comparison is tuned.
    """

    data: Annotated[tuple[DataSource, ...], BeforeValidator(_listed)] = ()
    data_is_public: StrictBool = False
    units: Annotated[int, Field(gt=0, le=MAX_UNITS)] | None = None
    max_epsilon: PositiveFloat | None = None
    sites: PositiveInt = 10
    holdout: Annotated[float, Field(ge=0)] = 0.2
    partition: Partition = Partition()
    grid: Grid = Grid()


class Study(Config):
    """One agreed training job; see the module's docstring."""

    name: Name
    purpose: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    task: Task
    backbone: Backbone
    head: Head = Head()
    privacy: Privacy = Privacy()
    training: Training
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation = Simulation()

    @model_validator(mode="after")
    def _noise_is_named_once(self) -> Self:
        privacy = self.privacy
        given = (privacy.epsilon is not None) + (privacy.noise_multiplier is not None)
        if self.training.algorithm == "none" and given:
            raise ValueError(
                "training.algorithm none is not private: expected neither privacy.epsilon nor "
                "privacy.noise_multiplier"
            )
        if self.training.algorithm != "none" and given != 1:
            raise ValueError(
                "expected exactly one of privacy.epsilon and privacy.noise_multiplier, "
                f"got {'both' if given else 'neither'}"
            )
        return self

    @model_validator(mode="after")
    def _measurements_fit_the_budget(self) -> Self:
        if not self.private:
            return self
        measured = {
            f"evaluation.{name}": each
            for name in ("private", "label_counts")
            if (each := getattr(self.evaluation, name)) is not None
        }
        if self.training.sampled and self.privacy.delta < 1e-9:
            raise ValueError(
                "privacy.delta: expected at least 1e-09 where training.sample_rate is given, got "
                f"{self.privacy.delta:g}"
            )
        key = "noise_multiplier" if self.privacy.epsilon is None else "share"
        for name, each in measured.items():
            if getattr(each, key) is None:
                raise ValueError(f"{name}: expected {key}, as privacy is given by {_other(key)}")
        if sum(each.share or 0.0 for each in measured.values()) >= 1:
            raise ValueError("expected shares under evaluation that leave something to training")
        return self

    @property
    def private(self) -> bool:
        """Whether the algorithm clips and noises."""
        return self.training.algorithm != "none"

    @property
    def canonical(self) -> dict[str, Any]:
        """The contract as plain values, defaults written out, local keys left out."""
        local: dict[str, Any] = {
            "simulation": True,
            "backbone": {"path"},
            "evaluation": {"data", "data_is_public"},
        }
        return {"format": FORMAT, **self.model_dump(mode="json", exclude=local)}

    @classmethod
    def from_canonical(cls, values: Mapping[str, Any], *, name: str = "study") -> Self:
        """Return the study whose canonical form `values` is.

        Raises:
            InputError: it is no study, is of another format, or not in canonical form: keys are
                missing, or local to one machine.
        """
        given = {key: value for key, value in values.items() if key != "format"}
        if values.get("format") != FORMAT:
            raise InputError(f"{name}: format: expected {FORMAT}, got {values.get('format')!r}")
        found = cls.parse(given, name=name)
        if sha256_of(found.canonical) != sha256_of(values):
            raise InputError(f"{name}: expected a study in its canonical form")
        return found

    @cached_property
    def digest(self) -> str:
        """`sha256:` and the hex SHA-256 of the canonical form."""
        return "sha256:" + sha256_of(self.canonical)

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The rounds after which sites evaluate, privately."""
        private, last = self.evaluation.private, self.training.rounds
        if private is None:
            return ()
        return (*range(private.every, last, private.every), last)

    def __hash__(self) -> int:
        return hash(self.digest)

    def learning_rate(self, round_: int) -> float:
        """Return the scheduled rate of a round (from 1); `plateau` starts as constant."""
        rate = self.training.learning_rate
        if self.training.schedule != "cosine":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * (round_ - 1) / self.training.rounds))
