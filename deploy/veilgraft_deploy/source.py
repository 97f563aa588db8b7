"""A simulation's records, and the populations that are made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from veilgraft.errors import InputError
from veilgraft.model import features as contract
from veilgraft.model import raw
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.model.features import FeatureStore
from veilgraft.study import DataSource, Study
from veilgraft_client import dataset, units
from veilgraft_client.dataset import Records
from veilgraft_deploy.custody import Custody, declared
from veilgraft_deploy.partition import Split, Units, split
from veilgraft_deploy.population import Population, gather
from veilgraft_deploy.progress import Watcher

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """All records of a simulation, read once, with their split over sites.

    Attributes:
        state: the folder where features are kept.
        test: public records that the study names; None where it names none.
    """

    study: Study
    state: Path
    records: Records
    people: Units
    parts: Split
    test: Records | None
    watcher: Watcher

    @classmethod
    def read(cls, study: Study, state: Path, seed: int | None, watcher: Watcher) -> "Source":
        """Read all files; raises `InputError` for the first that can't be used.

        Where the study names no public records, some are held out, but only of data that are
        declared public: an accuracy over private records would be a release, which
        `evaluation.private` makes with noise.
        """
        simulation, public = study.simulation, study.evaluation.data
        if not simulation.data:
            raise InputError("simulation.data: missing; name the records there or with --data")
        read = [_read(study, source, watcher) for source in simulation.data]
        files = np.repeat(np.arange(len(read)), [len(records) for records in read])
        records = Records(pa.concat_tables([part.table for part in read]))
        private = study.evaluation.private is not None
        hold_out = public is None and not private and simulation.data_is_public
        people = Units(records, lambda: units.site_key(state, seed))
        parts = split(simulation, records, files, people, hold_out=hold_out)
        if hold_out:
            watcher.say(f"{len(parts.held_out)} records held out; public by assumption")
        elif public is None and not private:
            watcher.say(
                "no accuracy: the data are not declared public, no public records are named, and "
                "evaluation.private is not asked for"
            )
        test = _read(study, public, watcher) if public else None
        return cls(study, state, records, people, parts, test, watcher)

    def population(self, custody: Custody) -> Population:
        """Return the sites with the backbone's features, made once and found again later.

        The backbone is opened only where features are missing.
        """
        return self._population(custody, self._transferred)

    def untransferred(self) -> Population:
        """Return the sites with plain features of the input itself, in the backbone's place."""
        modality = self.study.backbone.modality
        return self._population(
            declared(self.study), lambda records: raw.features(modality, records.inputs)
        )

    def _population(self, custody: Custody, make: Callable[[Records], Values]) -> Population:
        made, targets = make(self.records), self.records.targets
        whole = gather(self.study, self.state, made, targets, self.parts, self.people, custody)
        if self.test is None:
            return whole
        # Each public record counts by itself, whoever it is of.
        return whole.tested_on(contract.units(make(self.test), torch.from_numpy(self.test.targets)))

    @cached_property
    def backbone(self) -> FrozenBackbone:
        """The study's backbone, verified."""
        spec = self.study.backbone
        if spec.path is None:
            raise InputError("backbone.path: missing; name the folder there or with --backbone")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return FrozenBackbone.open(spec.path, spec, device)

    def _transferred(self, records: Records) -> Values:
        store = FeatureStore(self.state / "features")
        return store.get(
            self.study.backbone,
            lambda: self.backbone,
            records.inputs,
            records.fingerprint,
            progress=lambda done, total: self.watcher.step("features", done, total),
        )


def _read(study: Study, source: DataSource, watcher: Watcher) -> Records:
    partition, person = study.simulation.partition, study.privacy.column
    own = source in study.simulation.data
    return dataset.read(
        source,
        study.task,
        modality=study.backbone.modality,
        unit=(source.unit or person) if person and own else None,
        partition=partition.column if own else None,
        tell=watcher.say,
    )
