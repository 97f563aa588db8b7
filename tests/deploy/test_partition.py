"""Where a simulation puts each unit."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from veilgraft.errors import InputError
from veilgraft.study import Simulation
from veilgraft_client.dataset import Records
from veilgraft_deploy.partition import Split, Units, split

ROWS = 300


def key() -> bytes:
    return bytes(range(32))


def records(people: list[str] | None = None) -> Records:
    generator = np.random.default_rng(4)
    columns: dict[str, Any] = {
        "input": pa.array([f"text {i}" for i in range(ROWS)], pa.large_string()),
        "label": pa.array(generator.integers(0, 3, ROWS)),
    }
    if people is not None:
        columns["unit"] = people
    return Records(pa.table(columns))


def parted(own: Records, hold_out: bool = False, **values: Any) -> Split:
    simulation = Simulation.model_validate({"data": {"path": "x"}, "sites": 5, **values})
    files = np.zeros(len(own), np.int64)
    return split(simulation, own, files, Units(own, key), hold_out=hold_out)


def persons() -> list[str]:
    return [f"p{i}" for i in np.random.default_rng(5).integers(0, 60, ROWS)]


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
@pytest.mark.parametrize("people", [None, persons()], ids=["records", "persons"])
def test_public_units_are_dealt_out_whole_and_each_row_once(
    by: str, people: list[str] | None
) -> None:
    own = records(people)
    made = parted(own, hold_out=True, data_is_public=True, partition={"by": by}, holdout=0.2)
    parts = [*made.sites, made.held_out]
    assert sorted(np.concatenate(parts).tolist()) == list(range(ROWS))
    names = people or list(map(str, range(ROWS)))
    of_parts = [{names[row] for row in part} for part in parts]
    assert sum(map(len, of_parts)) == len(set(names))
    assert len(of_parts[-1]) == round(0.2 * len(set(names)))


def test_a_private_unit_s_site_depends_on_that_unit_alone() -> None:
    people = persons()
    own = records(people)
    made = parted(own)
    place = {people[row]: site for site, rows in enumerate(made.sites) for row in rows}
    assert sorted(np.concatenate(made.sites).tolist()) == list(range(ROWS))
    for gone in sorted(set(people))[:10]:
        kept = np.flatnonzero(np.array(people) != gone)
        fewer = own.select(kept)
        names = fewer.table["unit"].to_pylist()
        again = {names[row]: site for site, rows in enumerate(parted(fewer).sites) for row in rows}
        assert again == {name: site for name, site in place.items() if name != gone}


def test_private_records_are_spread_by_a_key_that_others_don_t_have() -> None:
    own = records()
    sizes = [len(rows) for rows in parted(own).sites]
    assert sum(sizes) == ROWS
    # Binomial with 300 rows over 5 sites: six standard deviations are 42.
    assert all(18 < size < 102 for size in sizes)
    simulation = Simulation.model_validate({"data": {"path": "x"}, "sites": 5})
    other = Units(own, lambda: key()[::-1])
    made = split(simulation, own, np.zeros(ROWS, np.int64), other, hold_out=False)
    assert made.sites[0].tolist() != parted(own).sites[0].tolist()


def test_a_private_site_may_be_without_units() -> None:
    own = records()
    sizes = [len(rows) for rows in parted(own, sites=900).sites]
    assert min(sizes) == 0
    with pytest.raises(InputError, match="900 sites, but only 300 records"):
        parted(own, sites=900, data_is_public=True)


def test_records_are_split_as_ever_where_each_is_a_unit() -> None:
    made = parted(records(), hold_out=True, data_is_public=True, holdout=50)
    order = np.random.default_rng(0).permutation(ROWS)
    assert made.held_out.tolist() == order[:50].tolist()
    assert made.sites[0].tolist() == order[50:100].tolist()
