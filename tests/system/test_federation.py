"""A coordinator and three sites as real processes over TLS, each on a host of its own.

Their data are public, their noise comes from a seed: the head must be that of a simulation.
`test_private_federation` has the other kind.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from tests.system.command import DEMO, veilgraft
from tests.system.federation import Federation

SEED = 7
ROUNDS = 2
END_SECONDS = 300.0
LOCAL_STEPS = {
    "algorithm": "dp-sgd",
    "sample_rate": 0.25,
    "local_epochs": 1,
    "learning_rate": 0.5,
    "momentum": 0.0,
}


@pytest.fixture(scope="module")
def public() -> Iterator[Federation]:
    # How a backbone travels, test_private_federation shows; here it came by hand, to save the time.
    by_hand = ("--backbone", str(DEMO / "backbone"))
    sections = {"training": LOCAL_STEPS}
    with Federation(
        rounds=ROUNDS, public=True, seed=SEED, sections=sections, join=by_hand
    ) as federation:
        yield federation


def ended(federation: Federation) -> dict[str, Any]:
    federation.wait_for(lambda: federation.report() is not None, END_SECONDS, "the report")
    report = federation.report()
    assert report is not None
    return report


def test_with_a_seed_the_head_is_that_of_a_simulation(public: Federation, tmp_path: Path) -> None:
    report = ended(public)
    assert report["seeded"] is True
    assert report["private"] is False
    done = veilgraft("simulate", public.study, "--seed", SEED, "--out", tmp_path / "simulation")
    assert done.returncode == 0, done.stderr
    simulated = json.loads((tmp_path / "simulation" / "report.json").read_text())
    assert report["study"] == simulated["study"]
    heads = [
        safetensors.numpy.load_file(folder / "model" / "head.safetensors")
        for folder in (public.coordinator.run, tmp_path / "simulation")
    ]
    assert heads[0].keys() == heads[1].keys()
    for name, values in heads[0].items():
        assert values == pytest.approx(heads[1][name], abs=1e-6, rel=0)
        assert abs(values).max() > 1e-3
    accuracies = [[each["accuracy"] for each in run["rounds"]] for run in (report, simulated)]
    assert accuracies[0] == pytest.approx(accuracies[1])
    assert "**Not private.**" in (public.coordinator.run / "model" / "README.md").read_text()
