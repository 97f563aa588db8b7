"""A site's cohort: what a simulation makes of the same file, held-out units and persons too."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from tests.client.gated import BACKBONE, DIGEST

from veilgraft.errors import InputError
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.model.features import Cohort
from veilgraft.study import Study
from veilgraft_client.cohort import cohort
from veilgraft_client.policy import Site
from veilgraft_deploy.custody import declared
from veilgraft_deploy.progress import Live
from veilgraft_deploy.source import Source

ROWS = 24
FIELDS = ("values", "mask", "targets")


def records(path: Path) -> Path:
    generator = np.random.default_rng(1)

    def image() -> bytes:
        into = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (8, 8)).astype("uint8")).save(into, "PNG")
        return into.getvalue()

    columns = {
        "image": [image() for _ in range(ROWS)],
        "label": [str(index % 3) for index in range(ROWS)],
        "patient": [f"p{index % 9}" for index in range(ROWS)],
    }
    pq.write_table(pa.table(columns), path)
    return path


def study(path: Path, share: float, **privacy: Any) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["0", "1", "2"]},
        "backbone": {
            "digest": DIGEST,
            "path": BACKBONE,
            "modality": "image",
            "pooling": "mean",
        },
        "privacy": {"noise_multiplier": 5.0, **privacy},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
        "simulation": {"data": [{"path": path}], "units": 20, "sites": 1, "holdout": share},
        "evaluation": {"private": {"noise_multiplier": 5.0}} if share else {},
    }
    return Study.parse(values, name="study.yaml")


def own_site(path: Path, share: float) -> Site:
    values: dict[str, Any] = {
        "site": "a",
        "data": {"path": path},
        "units": 20,
        "held_out": share,
        "limits": {"max_epsilon": 50.0},
        "state": path.parent / "state",
    }
    return Site.parse(values, name="site.yaml")


def opened(contract: Study) -> FrozenBackbone:
    return FrozenBackbone.open(BACKBONE, contract.backbone, "cpu")


def simulated(contract: Study, state: Path) -> Cohort:
    with Live(Console(stderr=True, quiet=True)) as live:
        source = Source.read(contract, state, None, live)
        return source.population(declared(contract)).of(0)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("privacy", [{}, {"unit": "patient", "max_instances": 2}])
def test_it_is_what_a_simulation_makes_of_the_same_file(
    tmp_path: Path, share: float, privacy: dict[str, Any]
) -> None:
    path = records(tmp_path / "a.parquet")
    contract, own = study(path, share, **privacy), own_site(path, share)
    made = cohort(own, contract, lambda: opened(contract))
    expected = simulated(contract, own.state)
    for one, other in ((made.training, expected.training), (made.held_out, expected.held_out)):
        for field in FIELDS:
            assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert len(made.training.values) + len(made.held_out.values) == (9 if privacy else ROWS)
    # Of nine persons, none may be held out, by chance.
    assert share or not len(made.held_out.values)


def test_features_are_made_once_and_held_out_units_stay_the_same(tmp_path: Path) -> None:
    path = records(tmp_path / "a.parquet")
    contract, own = study(path, 0.3), own_site(path, 0.3)
    first = cohort(own, contract, lambda: opened(contract))

    def never() -> FrozenBackbone:
        raise AssertionError("features were there")

    again = cohort(own, contract, never)
    assert torch.equal(first.held_out.values, again.held_out.values)
    assert (own.state / "features").stat().st_mode & 0o777 == 0o700


def test_records_that_can_t_be_read_are_told_before_a_backbone_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "missing.parquet"
    contract = study(path, 0.0)

    def never() -> FrozenBackbone:
        raise AssertionError("it was opened")

    with pytest.raises(InputError, match=r"missing\.parquet"):
        cohort(own_site(path, 0.0), contract, never)
