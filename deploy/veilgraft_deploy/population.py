"""The sites of a simulation: one data set split over them, or a file for each.

Features of all sites lie in one tensor in the order of the sites, so that each site's are a view
of it and a thousand sites cost no more memory than their records.
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from veilgraft.errors import InputError
from veilgraft.model import features as contract
from veilgraft.model.features import Features
from veilgraft.plan import plan
from veilgraft.study import DataSource, Partition, Simulation, Study
from veilgraft_client.dataset import Records
from veilgraft_client.policy import Limits, Site

Rows = npt.NDArray[np.int64]

_FIELDS = ("values", "mask", "targets")


@dataclass(frozen=True)
class Split:
    """Rows of one data set: each site's, and those held out for evaluation."""

    sites: tuple[Rows, ...]
    held_out: Rows


@dataclass(frozen=True)
class Population:
    """Features of every site, and of the public records that score a head.

    Attributes:
        features: all sites' units, site after site; `bounds[i]` to `bounds[i + 1]` is site i's.
        sites: each site's own file; a simulated one's holds the study's ε as its cap.
    """

    features: Features
    bounds: tuple[int, ...]
    sites: tuple[Site, ...]
    test: Features | None

    @property
    def dim(self) -> int:
        """Features per instance."""
        return self.features.values.shape[-1]

    def of(self, index: int) -> Features:
        """Return a view of one site's features."""
        return self.features.select(slice(self.bounds[index], self.bounds[index + 1]))

    def first(self) -> "Population":
        """Return the population of the first site alone."""
        return Population(self.of(0), self.bounds[:2], self.sites[:1], self.test)

    def tested_on(self, test: Features) -> "Population":
        """Return the same sites with other public records."""
        return Population(self.features, self.bounds, self.sites, test)

    def under(self, study: Study) -> "Population":
        """Return the same population with sites whose caps suit another study."""
        sites = tuple(site.model_copy(update={"limits": limits(study)}) for site in self.sites)
        return Population(self.features, self.bounds, sites, self.test)

    def save(self, path: Path) -> None:
        """Write the population for other processes of this run; the file holds features."""
        tensors = _tensors("features", self.features)
        if self.test is not None:
            tensors |= _tensors("test", self.test)
        sites = [site.model_dump(mode="json") for site in self.sites]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        save_file(tensors, path, {"bounds": json.dumps(self.bounds), "sites": json.dumps(sites)})

    @classmethod
    def load(cls, path: Path) -> "Population":
        """Read what `save` wrote, by memory map."""
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(text) for key, text in file.metadata().items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parts = {
            part: Features(*(tensors[f"{part}/{name}"] for name in _FIELDS))
            for part in {key.split("/")[0] for key in tensors}
        }
        sites = tuple(Site.parse(site, name="site") for site in metadata["sites"])
        return cls(parts["features"], tuple(metadata["bounds"]), sites, parts.get("test"))


def split(simulation: Simulation, records: Records, files: Rows, *, hold_out: bool) -> Split:
    """Shuffle by the partition's public seed, hold some rows out, split the rest over sites.

    Args:
        files: index of the source that each record came from.

    Raises:
        InputError: fewer records than the hold-out and the sites need.
    """
    order = np.random.default_rng(simulation.partition.seed).permutation(len(records))
    share = simulation.holdout
    count = round(share if share >= 1 else share * len(order)) if hold_out else 0
    held_out, rest = order[:count], order[count:]
    if len(simulation.data) > 1:
        sites = tuple(rest[files[rest] == index] for index in range(len(simulation.data)))
    elif len(rest) < simulation.sites:
        raise InputError(
            f"simulation.sites: {simulation.sites} sites, but only {len(rest)} records are left "
            f"after {count} were held out"
        )
    elif simulation.partition.by == "iid":
        # What flwr-datasets' IidPartitioner does after a shuffle, without its two-second import.
        sites = tuple(np.array_split(rest, simulation.sites))
    else:
        sites = _by_flower(simulation, records, rest)
    if empty := [index + 1 for index, rows in enumerate(sites) if not len(rows)]:
        raise InputError(f"simulation: no records are left for site {empty[0]}")
    return Split(sites, held_out)


def gather(
    study: Study,
    state: Path,
    values: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    parts: Split,
) -> Population:
    """Return the population whose record i has the features `values[i]`.

    One copy, in the order of the sites; each site declares the size that the split gave it.
    """
    order = np.concatenate(parts.sites)
    sizes = [len(rows) for rows in parts.sites]
    test = None
    if len(parts.held_out):
        test = contract.units(values[parts.held_out], torch.from_numpy(targets[parts.held_out]))
    return Population(
        contract.units(values[order], torch.from_numpy(targets[order])),
        tuple(np.cumsum([0, *sizes]).tolist()),
        _sites(study, state, sizes),
        test,
    )


def _sites(study: Study, state: Path, sizes: list[int]) -> tuple[Site, ...]:
    sites = tuple(_site(study, state, index, size) for index, size in enumerate(sizes))
    names = [site.site for site in sites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"simulation.data: two files would make two sites named {twice[0]}")
    return sites


def limits(study: Study) -> Limits:
    """Return what a simulated site allows: the study's own ε and δ, and no more."""
    epsilon = plan(study).epsilon() or 1.0
    # Equal events priced in another order differ in the last digits.
    return Limits(max_epsilon=epsilon * (1 + 1e-6), delta=study.privacy.delta)


def _site(study: Study, state: Path, index: int, units: int) -> Site:
    sources = study.simulation.data
    source = sources[index] if len(sources) > 1 else sources[0]
    return Site(
        site=_name(source, index) if len(sources) > 1 else f"site-{index + 1}",
        data=source,
        units=units,
        limits=limits(study),
        data_is_public=study.simulation.data_is_public,
        state=state,
    )


def _name(source: DataSource, index: int) -> str:
    name = source.path.stem if source.path else f"site-{index + 1}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64] or f"site-{index + 1}"


def _by_flower(simulation: Simulation, records: Records, rows: Rows) -> tuple[Rows, ...]:
    from flwr_datasets.partitioner import DirichletPartitioner, NaturalIdPartitioner

    how: Partition = simulation.partition
    if how.by == "dirichlet":
        partitioner = DirichletPartitioner(
            num_partitions=simulation.sites,
            partition_by="label",
            alpha=how.alpha,
            min_partition_size=1,
            seed=how.seed,
        )
    else:
        partitioner = NaturalIdPartitioner(partition_by="partition")
    chosen = records.select(rows).dataset()
    partitioner.dataset = chosen.add_column("row", rows.tolist())
    try:
        with warnings.catch_warnings(action="ignore"):
            return tuple(
                np.asarray(partitioner.load_partition(index)["row"], dtype=np.int64)
                for index in range(partitioner.num_partitions)
            )
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"simulation.partition: no {how.by} split over {simulation.sites} sites was found; "
            f"try fewer sites or a larger alpha ({str(error).splitlines()[0]})"
        ) from None


def _tensors(part: str, features: Features) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": getattr(features, name).contiguous() for name in _FIELDS}
