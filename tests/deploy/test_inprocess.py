"""Simulated sites answer in one process, so many at a time, by the rules of release."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veilgraft.messages import Envelope
from veilgraft.model.features import Features, units
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.policy import Site
from veilgraft_deploy import inprocess
from veilgraft_deploy.custody import declared
from veilgraft_deploy.federation import Run, federate
from veilgraft_deploy.inprocess import InProcess
from veilgraft_deploy.population import Population
from veilgraft_server.aggregation import Average
from veilgraft_server.carrier import Letter

SITES, UNITS, ROUNDS = 5, 8, 2


def contract() -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": 1.0},
        "training": {"algorithm": "dp-gd", "rounds": ROUNDS, "learning_rate": 0.5},
        "aggregation": {"quorum": SITES},
        "simulation": {"data": {"source": "digits"}, "data_is_public": True, "sites": SITES},
    }
    return Study.parse(values, name="s")


def population(study: Study, state: Path) -> Population:
    drawn = np.random.default_rng(0)
    count = SITES * UNITS
    features: Features = units(
        drawn.normal(size=(count, 4)).astype(np.float32),
        torch.from_numpy(drawn.integers(0, 3, count)),
    )
    own = tuple(
        Site(
            site=f"site-{index + 1}",
            data=study.simulation.data[0],
            units=UNITS,
            limits=declared(study).limits,
            data_is_public=True,
            state=state,
        )
        for index in range(SITES)
    )
    bounds = tuple(range(0, count + 1, UNITS))
    return Population(features, bounds, bounds[1:], own, features.select(slice(0, UNITS)))


def begun(folder: Path, seed: int | None = None) -> tuple[Run, Population]:
    run = Run(contract(), folder / "out", folder / "state", seed=seed)
    run.out.mkdir(parents=True)
    return run, population(run.study, run.state)


def test_no_more_is_answered_than_was_asked_for_and_fits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inprocess, "AT_ONCE", 3)
    answered: list[list[int]] = []

    def answer(asked: Sequence[Letter]) -> list[Envelope]:
        answered.append([letter.node for letter in asked])
        return [Envelope(b"to " + letter.envelope.header) for letter in asked]

    carrier = InProcess(answer, 7)
    assert list(carrier.there()) == list(range(7))
    letters = [Letter(node, Envelope(b"%d" % node), "t", "g", 1.0) for node in range(7)]
    ids = carrier.send(letters)
    assert answered == []
    found = carrier.fetch(ids)
    assert [next(found) for _ in range(3)] == [
        (ids[node], Envelope(b"to %d" % node)) for node in range(3)
    ]
    assert answered == [[0, 1, 2]]
    assert [answer for _, answer in found] == [Envelope(b"to %d" % n) for n in range(3, 7)]
    assert answered == [[0, 1, 2], [3, 4, 5], [6]]
    assert carrier.send(letters)[0] not in ids


def test_how_many_answer_at_once_changes_no_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = federate(*begun(tmp_path / "one", seed=1)).state.head
    monkeypatch.setattr(inprocess, "AT_ONCE", 2)
    other = federate(*begun(tmp_path / "other", seed=1)).state.head
    assert all(np.any(array) for array in one.values())
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-9)


def test_a_round_that_broke_off_between_two_writes_goes_on_with_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, people = begun(tmp_path)
    monkeypatch.setattr(inprocess, "AT_ONCE", 2)
    add, count = Average.add, [0]

    def killed(self: Average, site: str, update: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        add(self, site, update)

    with monkeypatch.context() as patch:
        patch.setattr(Average, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            federate(run, people)
    with closing(Ledger(run.ledger, exists=True)) as ledger:
        written = [entry for entry in ledger.entries() if entry.kind == "commit"]
        assert [entry.site for entry in written] == [f"site-{n}" for n in (1, 2, 3, 4)]
    federate(run, people)
    with closing(Ledger(run.ledger, exists=True)) as ledger:
        ledger.verify(let_go=True)
        kinds = Counter((entry.site, entry.kind) for entry in ledger.entries())
        for site in people.sites:
            assert kinds[site.site, "reserve"] == kinds[site.site, "commit"] == ROUNDS
            assert kinds[site.site, "retry"] == 0


def test_what_leaves_can_be_read_in_the_ledger_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, people = begun(tmp_path)
    add, added = Average.add, list[str]()

    def noticed(self: Average, site: str, update: Any) -> None:
        with closing(Ledger(run.ledger, exists=True)) as ledger:
            assert site in [entry.site for entry in ledger.entries() if entry.kind == "commit"]
        added.append(site)
        add(self, site, update)

    monkeypatch.setattr(Average, "add", noticed)
    federate(run, people)
    assert len(added) == SITES * ROUNDS
