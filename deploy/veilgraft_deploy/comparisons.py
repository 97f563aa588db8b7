"""What the private federation is compared with, each tuned over the same grid of values.

The best of a grid is chosen by the public accuracy that is then shown: a comparison is flattered
by that, the private federation, whose values stand in the study, is not.
"""

import csv
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from veilgraft.study import Study
from veilgraft_deploy.federation import Run, rehearse
from veilgraft_deploy.population import Population
from veilgraft_deploy.source import Source

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the study's learning rate, where the study names no grid."""


def compare(run: Run, source: Source, population: Population) -> dict[str, float | None]:
    """Return each comparison's accuracy at its best grid point; all points go into a file.

    Every point is a federation of its own with a throwaway ledger under `comparisons/`.
    """
    folder = run.out / "comparisons"
    shutil.rmtree(folder, ignore_errors=True)
    study = run.study
    cases = {
        "no_privacy": (_without_privacy(study), population),
        "one_site_alone": (study, population.first()),
        "no_transfer": (study, source.untransferred()),
    }
    found = [
        {"comparison": name, **_point(run, folder / name, name, variant, people)}
        for name, (base, people) in cases.items()
        for variant in _grid(base)
    ]
    _write(folder / "tuning.csv", found)
    return {name: _best(found, name) for name in cases}


def _point(
    run: Run, folder: Path, name: str, study: Study, population: Population
) -> dict[str, Any]:
    training = study.training
    point = f"rate-{training.learning_rate:g}-rounds-{training.rounds}"
    out = folder / point
    label = name.replace("_", " ")
    here = replace(run, study=study, out=out, label=label, engine="inprocess")
    history = rehearse(here, population.under(study))
    return {
        "learning_rate": training.learning_rate,
        "rounds": training.rounds,
        "accuracy": history[-1].accuracy,
        "epsilon": history[-1].epsilon,
    }


def _grid(study: Study) -> Iterator[Study]:
    grid = study.simulation.grid
    rate = study.training.learning_rate
    rates = grid.learning_rate or tuple(rate * factor for factor in FACTORS)
    counts = grid.rounds or (study.training.rounds,)
    for learning_rate, rounds in itertools.product(rates, counts):
        values = {"learning_rate": learning_rate, "rounds": rounds}
        yield _changed(study, training=values)


def _without_privacy(study: Study) -> Study:
    """Return the same head and plan, as full-batch descent without clipping and noise."""
    return _changed(
        study,
        training={"algorithm": "none", "sample_rate": None, "local_epochs": None},
        privacy={"epsilon": None, "noise_multiplier": None},
    )


def _changed(study: Study, **sections: dict[str, Any]) -> Study:
    # No quorum: a site alone is one.
    values = study.model_dump()
    values["aggregation"]["quorum"] = 1
    for section, changes in sections.items():
        values[section] |= changes
    return Study.model_validate(values)


def _best(found: list[dict[str, Any]], name: str) -> float | None:
    scores = [row["accuracy"] for row in found if row["comparison"] == name]
    return None if None in scores else max(scores)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
