"""How a simulation splits one data set over its sites.

A unit's rows stay together in every split but one by a column or by files, which says itself where
a row belongs. Records that are declared public are shuffled and dealt out. Where they are not, a
unit's site depends on nothing but its file, or the unit and a secret key: else one unit more or
less would move the others, and no site's ε would hold.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from veilgraft.errors import InputError
from veilgraft.study import Partition, Simulation
from veilgraft_client import units
from veilgraft_client.dataset import Records

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Rows of one data set: each site's, and those held out for evaluation in public."""

    sites: tuple[Rows, ...]
    held_out: Rows


class Units:
    """Which rows of a data set are one unit, and what names it.

    Args:
        records: the rows; those with a `unit` column are grouped by it.
        read_key: finds the secret key by which units are chosen, where one is needed.
    """

    def __init__(self, records: Records, read_key: Callable[[], bytes]) -> None:
        self.grouped = "unit" in records.table.column_names
        self._records = records
        self._read_key = read_key

    @cached_property
    def key(self) -> bytes:
        """The secret key; one for all sites, as units of one may be another's later."""
        return self._read_key()

    @cached_property
    def names(self) -> list[bytes]:
        """The key of each row's unit."""
        return units.keys(self._records)

    @cached_property
    def inputs(self) -> list[bytes]:
        """The digest of each row's input."""
        return units.digests(self._records)

    def numbers(self) -> Rows:
        """Return each row's unit as a number, in order of first appearance."""
        if not self.grouped:
            return np.arange(len(self._records))
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(name, len(seen)) for name in self.names], np.int64)


def split(
    simulation: Simulation, records: Records, files: Rows, people: Units, *, hold_out: bool
) -> Split:
    """Return each site's rows.

    Args:
        files: index of the source that each record came from.
        hold_out: keep `simulation.holdout` of all units apart, for evaluation in public.

    Raises:
        InputError: fewer units than the hold-out and the sites need.
    """
    if simulation.data_is_public:
        found = _dealt(simulation, records, files, people, hold_out)
    else:
        found = Split(_sharded(simulation, files, people), np.array([], np.int64))
    # Of private records even this would tell; a site without units releases noise.
    empty = [index + 1 for index, rows in enumerate(found.sites) if not len(rows)]
    if empty and simulation.data_is_public:
        raise InputError(f"simulation: no records are left for site {empty[0]}")
    return found


def _dealt(
    simulation: Simulation, records: Records, files: Rows, people: Units, hold_out: bool
) -> Split:
    """Shuffle units by the partition's public seed, hold some out, deal out the rest."""
    numbers = people.numbers()
    total = int(numbers.max()) + 1
    shuffled = np.random.default_rng(simulation.partition.seed).permutation(total)
    place = np.empty(total, np.int64)
    place[shuffled] = np.arange(total)
    order = np.argsort(place[numbers], kind="stable")
    ends = np.cumsum(np.bincount(place[numbers], minlength=total))
    rows_of = np.split(order, ends[:-1])
    share = simulation.holdout
    count = round(share if share >= 1 else share * total) if hold_out else 0
    held_out, rest = order[: sum(map(len, rows_of[:count]))], rows_of[count:]
    if len(simulation.data) == 1 and len(rest) < simulation.sites:
        noun = "units" if people.grouped else "records"
        raise InputError(
            f"simulation.sites: {simulation.sites} sites, but only {len(rest)} {noun} are left "
            f"after {count} were held out"
        )
    kept = order[len(held_out) :]
    if len(simulation.data) > 1:
        # In the files' own order, as at the sites that they stand for.
        return Split(_by_file(simulation, files, np.sort(kept)), held_out)
    if simulation.partition.by == "column":
        return Split(_by_flower(simulation, records, kept), held_out)
    if simulation.partition.by == "dirichlet":
        first = np.array([rows[0] for rows in rest], np.int64)
        chosen = [place[numbers[rows]] - count for rows in _by_flower(simulation, records, first)]
    else:
        # What flwr-datasets' IidPartitioner does after a shuffle, without its two-second import.
        chosen = np.array_split(np.arange(len(rest)), simulation.sites)
    return Split(tuple(np.concatenate([rest[i] for i in part]) for part in chosen), held_out)


def _sharded(simulation: Simulation, files: Rows, people: Units) -> tuple[Rows, ...]:
    """Return each site's rows by their file, or by a keyed hash of their unit."""
    if len(simulation.data) > 1:
        return _by_file(simulation, files, np.arange(len(files)))
    count = simulation.sites
    sites = np.array([units.shard(people.key, name, count) for name in people.names])
    return tuple(np.flatnonzero(sites == index) for index in range(count))


def _by_file(simulation: Simulation, files: Rows, rows: Rows) -> tuple[Rows, ...]:
    return tuple(rows[files[rows] == index] for index in range(len(simulation.data)))


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
