"""What simulated sites declare and allow; where their records are private, for life.

Records that are not declared public spend from one ledger, whatever is simulated over them. That
holds only if a person stays with one site and one ledger: so the first run writes down, in the
state folder, which files there are, how many sites they are split over, what a unit is and who is
held out, and every later run must say the same. The cap is a person's to change, in that file and
nowhere else: a study, which may be chosen in the light of results, can't.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveFloat

from veilgraft.config import Config
from veilgraft.durable import write_atomically
from veilgraft.errors import InputError
from veilgraft.plan import plan
from veilgraft.study import MAX_UNITS, RECORD, Study
from veilgraft_client.policy import Limits

FILE = "private.yaml"

_HEADER = """\
# What holds for these private records, for the life of the ledger beside this file. Written by the
# first run over them. A person may change max_epsilon, for a reason that no result gave; its δ then
# adds to the one before, as `veilgraft ledger show` tells. Nothing else may change.
"""


class Origin(Config):
    """One file of records: its name, and what tells its units apart."""

    name: str
    unit: str
    unit_type: Literal["text", "integer"] = "text"


class Custody(Config):
    """What holds for all simulated sites of one state folder.

    Attributes:
        sites: over which the records are split; one for each file where there are several.
        units: the size that each site declares; None for public records: the split's own.
        held_out: the share of each site's units that is evaluated on and never trained on.
        max_epsilon, delta: of each site, for the life of the ledger.
    """

    sources: tuple[Origin, ...]
    sites: int
    units: Annotated[int, Field(gt=0, le=MAX_UNITS)] | None
    held_out: Annotated[float, Field(ge=0, lt=1)]
    max_epsilon: PositiveFloat
    delta: float

    @property
    def limits(self) -> Limits:
        """What a site's own file would allow."""
        return Limits(max_epsilon=self.max_epsilon, delta=self.delta)


def declared(study: Study) -> Custody:
    """Return what a study says of its simulated sites.

    By default they allow the study's own ε, and no more.

    Raises:
        InputError: a split or a size that private records don't allow.
    """
    simulation, own = study.simulation, plan(study).epsilon() or 1.0
    if not simulation.data_is_public:
        _check_private(study)
    evaluated = not simulation.data_is_public or study.evaluation.private is not None
    if evaluated and simulation.holdout >= 1:
        raise InputError(
            "simulation.holdout: expected a share below 1, of each site's units, "
            f"got {simulation.holdout:g}"
        )
    column = study.privacy.column
    return Custody(
        sources=tuple(
            Origin(
                name=source.path.name if source.path else str(source.source),
                unit=(source.unit or column) if column else RECORD,
                unit_type=source.unit_type,
            )
            for source in simulation.data
        ),
        sites=len(simulation.data) if len(simulation.data) > 1 else simulation.sites,
        units=simulation.units,
        held_out=simulation.holdout if evaluated else 0.0,
        # Equal events priced in another order differ in the last digits.
        max_epsilon=simulation.max_epsilon or own * (1 + 1e-6),
        delta=2 * study.privacy.delta,
    )


def _check_private(study: Study) -> None:
    simulation = study.simulation
    if simulation.units is None:
        raise InputError(
            "simulation.units: missing; for data not declared public, name the size that each "
            "site declares, a round number: the measured one would be a release"
        )
    if simulation.partition.by != "iid":
        raise InputError(
            f"simulation.partition: a split by {simulation.partition.by} depends on all records "
            "together; expected iid, or a file for each site, for data not declared public"
        )


def check_apart(study: Study, state: Path, out: Path) -> None:
    """Raise `InputError` where private records' state would mix with a run's, or a public one's."""
    if study.simulation.data_is_public:
        for folder in (state, out):
            if (folder / FILE).exists():
                raise InputError(
                    f"{folder}: holds the ledger of private records; name another folder for data "
                    "that are public"
                )
        return
    here, there = state.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"--state: expected a folder apart from the run folder, got {state}")


def settled(study: Study, state: Path) -> Custody:
    """Return what holds for a run, which for private records is what held from the first on.

    Raises:
        InputError: the study differs from what the first run over private records fixed.
    """
    found = declared(study)
    if study.simulation.data_is_public:
        return found
    if not (state / FILE).exists():
        if (state / "ledger.db").exists():
            raise InputError(f"{state / FILE}: missing beside the ledger that it belongs to")
        return found
    held = Custody.read(state / FILE)
    for key, value in found.model_dump().items():
        before = held.model_dump()[key]
        if key not in ("max_epsilon", "delta") and value != before:
            raise InputError(
                f"{state / FILE}: {key}: fixed as {_shown(before)} by the first run over these "
                f"records; this one says {_shown(value)}"
            )
    if study.simulation.max_epsilon not in (None, held.max_epsilon):
        raise InputError(
            f"{state / FILE}: max_epsilon: {held.max_epsilon:g} holds for these records, and "
            f"simulation.max_epsilon is {study.simulation.max_epsilon:g}; a person may change the "
            "file"
        )
    return held


def keep(custody: Custody, state: Path) -> None:
    """Write down what holds from the first run over private records on."""
    path = state / FILE
    if not path.exists():
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = yaml.safe_dump(custody.model_dump(mode="json"), sort_keys=False)
        write_atomically(path, (_HEADER + text).encode())


def _shown(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n...\n").strip()
