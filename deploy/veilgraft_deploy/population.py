"""The sites of a simulation: one data set split over them, or a file for each.

Features of all sites lie in one tensor in the order of the sites, so that each site's are a view
of it and a thousand sites cost no more memory than their records.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from veilgraft.errors import InputError
from veilgraft.model import features as contract
from veilgraft.model.features import Cohort, Features
from veilgraft.study import DataSource, Study
from veilgraft_client import units
from veilgraft_client.policy import Site
from veilgraft_deploy.custody import Custody, declared
from veilgraft_deploy.partition import Rows, Split, Units

_FIELDS = ("values", "mask", "targets")


@dataclass(frozen=True)
class Population:
    """Features of every site, and of the public records that score a head.

    Attributes:
        features: all sites' units, site after site; `bounds[i]` to `bounds[i + 1]` is site i's,
            from `cuts[i]` on what it holds out.
        sites: each site's own file.
    """

    features: Features
    bounds: tuple[int, ...]
    cuts: tuple[int, ...]
    sites: tuple[Site, ...]
    test: Features | None

    @property
    def dim(self) -> int:
        """Features per instance."""
        return self.features.values.shape[-1]

    def of(self, index: int) -> Cohort:
        """Return views of one site's features."""
        start, cut, end = self.bounds[index], self.cuts[index], self.bounds[index + 1]
        select = self.features.select
        return Cohort(select(slice(start, cut)), select(slice(cut, end)))

    def first(self) -> "Population":
        """Return the population of the first site alone."""
        features = self.features.select(slice(self.bounds[0], self.bounds[1]))
        return Population(features, self.bounds[:2], self.cuts[:1], self.sites[:1], self.test)

    def tested_on(self, test: Features) -> "Population":
        """Return the same sites with other public records."""
        return replace(self, test=test)

    def under(self, study: Study) -> "Population":
        """Return the same population with sites whose caps suit another study."""
        limits = declared(study).limits
        sites = tuple(site.model_copy(update={"limits": limits}) for site in self.sites)
        return replace(self, sites=sites)

    def save(self, path: Path) -> None:
        """Write the population for other processes of this run; the file holds features."""
        tensors = _tensors("features", self.features)
        if self.test is not None:
            tensors |= _tensors("test", self.test)
        facts = {
            "bounds": self.bounds,
            "cuts": self.cuts,
            "sites": [site.model_dump(mode="json") for site in self.sites],
        }
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        save_file(tensors, path, {key: json.dumps(value) for key, value in facts.items()})

    @classmethod
    def load(cls, path: Path) -> "Population":
        """Read what `save` wrote, by memory map."""
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(text) for key, text in file.metadata().items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parts = {
            part: Features(*(tensors[f"{part}/{name}"] for name in _FIELDS))
            for part in {key.split("/")[0] for key in tensors}
        }
        sites = tuple(Site.parse(site, name="site") for site in facts["sites"])
        bounds, cuts = tuple(facts["bounds"]), tuple(facts["cuts"])
        return cls(parts["features"], bounds, cuts, sites, parts.get("test"))


def gather(
    study: Study,
    state: Path,
    values: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    parts: Split,
    people: Units,
    custody: Custody,
) -> Population:
    """Return the population whose record i has the features `values[i]`.

    Each site declares the size that the study names, or that the split of public records gave it.
    """
    sites = _sites(study, state, custody, len(parts.sites))
    make = _persons if people.grouped else _records
    features, sizes, cuts = make(study, values, targets, parts.sites, people, sites)
    bounds = np.cumsum([0, *sizes])
    test = None
    if len(parts.held_out):
        test, _ = _grouped(study, values, targets, parts.held_out, people)
    own = [
        site.model_copy(update={"units": custody.units or size})
        for site, size in zip(sites, sizes, strict=True)
    ]
    starts = (bounds[:-1] + np.array(cuts)).tolist()
    return Population(features, tuple(bounds.tolist()), tuple(starts), tuple(own), test)


_Made = tuple[Features, list[int], list[int]]
"""Features of all sites, and for each its number of units and how many of them it trains on."""


def _records(
    study: Study,
    values: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    rows: tuple[Rows, ...],
    people: Units,
    sites: list[Site],
) -> _Made:
    """Make one unit of each row; one copy, in the order of the sites."""
    ordered, cuts = [], []
    for mine, site in zip(rows, sites, strict=True):
        held = np.zeros(len(mine), bool)
        if site.held_out:
            names = [people.names[row] for row in mine]
            held = _held_out(people.key, names, site.held_out)
        ordered.append(mine[np.argsort(held, kind="stable")])
        cuts.append(int((~held).sum()))
    order = np.concatenate(ordered)
    made = contract.units(values[order], torch.from_numpy(targets[order]))
    return made, [len(mine) for mine in rows], cuts


def _persons(
    study: Study,
    values: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    rows: tuple[Rows, ...],
    people: Units,
    sites: list[Site],
) -> _Made:
    """Make one unit of all rows of a person."""
    made, cuts = [], []
    for mine, site in zip(rows, sites, strict=True):
        features, names = _grouped(study, values, targets, mine, people)
        held = _held_out(people.key, names, site.held_out)
        order = torch.from_numpy(np.argsort(held, kind="stable"))
        made.append(features.select(order))
        cuts.append(int((~held).sum()))
    whole = Features(*(torch.cat([getattr(part, f) for part in made]) for f in _FIELDS))
    return whole, [len(part) for part in made], cuts


def _grouped(
    study: Study,
    values: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    rows: Rows,
    people: Units,
) -> tuple[Features, list[bytes]]:
    if not people.grouped:
        return contract.units(values[rows], torch.from_numpy(targets[rows])), []
    return units.gather(
        values[rows],
        targets[rows],
        [people.names[row] for row in rows],
        [people.inputs[row] for row in rows],
        study.privacy.max_instances,
        people.key,
    )


def _held_out(key: bytes, names: list[bytes], share: float) -> npt.NDArray[np.bool_]:
    return np.array([units.is_held_out(key, name, share) for name in names], bool)


def _sites(study: Study, state: Path, custody: Custody, count: int) -> list[Site]:
    sites = [_site(study, state, custody, index) for index in range(count)]
    names = [site.site for site in sites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"simulation.data: two files would make two sites named {twice[0]}")
    return sites


def _site(study: Study, state: Path, custody: Custody, index: int) -> Site:
    simulation = study.simulation
    several = len(simulation.data) > 1
    source = simulation.data[index] if several else simulation.data[0]
    # A private file may be renamed; its ledger goes by its place.
    named = several and simulation.data_is_public
    return Site(
        site=_name(source, index) if named else f"site-{index + 1}",
        data=source,
        units=custody.units or 1,
        held_out=custody.held_out,
        limits=custody.limits,
        data_is_public=simulation.data_is_public,
        state=state,
    )


def _name(source: DataSource, index: int) -> str:
    name = source.path.stem if source.path else f"site-{index + 1}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64] or f"site-{index + 1}"


def _tensors(part: str, features: Features) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": getattr(features, name).contiguous() for name in _FIELDS}
