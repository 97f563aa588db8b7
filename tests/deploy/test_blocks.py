"""Blocks of sites on Ray: the same figures as one process gives, and what a lost block leaves."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import MessageType
from tests.system.command import one_sentence, report_of, veilgraft, written

from veilgraft import messages, releases
from veilgraft.errors import VeilgraftError
from veilgraft.messages import Envelope, Release, Request
from veilgraft.model.features import units
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.policy import Site
from veilgraft_deploy import federation
from veilgraft_deploy.custody import declared
from veilgraft_deploy.federation import Run
from veilgraft_deploy.population import Population
from veilgraft_server.carrier import Answer, Letter, MissingError

DIM, LABELS, ROUNDS = 12, 3, 3
SIZES = (40, 25, 40, 31, 40, 25, 40)
"""Of the sites: some are of one form, others of another."""

CORES = 2
BOUND = 180

Alone = Callable[..., Any]
"""Calls a function in the process that Ray was started by; it leaves threads behind."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(_start).result(BOUND)
        yield lambda call, *values: pool.submit(call, *values).result(BOUND)


def _start() -> None:
    import ray

    ray.init(
        "local",
        num_cpus=CORES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def study() -> Study:
    return Study.parse(
        {
            "name": "blocks",
            "purpose": "Deal sites into blocks.",
            "task": {"labels": [str(label) for label in range(LABELS)]},
            "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
            "privacy": {"noise_multiplier": 1.0},
            "training": {
                "algorithm": "dp-sgd",
                "rounds": ROUNDS,
                "learning_rate": 0.5,
                "sample_rate": 0.3,
                "local_epochs": 1,
            },
            "aggregation": {"quorum": len(SIZES)},
            "simulation": {
                "data": {"source": "digits"},
                "data_is_public": True,
                "sites": len(SIZES),
            },
        },
        name="blocks",
    )


def population(state: Path) -> Population:
    drawn, count = np.random.default_rng(0), sum(SIZES)
    values = drawn.normal(size=(count, DIM)).astype(np.float32)
    bounds = (0, *np.cumsum(SIZES).tolist())
    sites = tuple(
        Site(
            site=f"site-{index + 1}",
            data=study().simulation.data[0],
            units=size,
            limits=declared(study()).limits,
            data_is_public=True,
            state=state,
        )
        for index, size in enumerate(SIZES)
    )
    targets = torch.from_numpy(drawn.integers(0, LABELS, count))
    return Population(units(values, targets), bounds, bounds[1:], sites, None)


def run_in(folder: Path, engine: federation.Engine) -> Run:
    out = folder / engine
    out.mkdir(parents=True)
    return Run(study(), out, folder / "state", engine=engine, seed=3)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its model, and the kinds of each site's ledger entries."""

    head: dict[str, np.ndarray]
    entries: Counter[tuple[str, str]]
    kept: int


def _outcome(folder: Path, engine: federation.Engine) -> Outcome:
    run = run_in(folder, engine)
    progress = federation.federate(run, population(folder))
    ledger = Ledger(run.ledger, exists=True)
    ledger.verify(let_go=True)
    entries = Counter((entry.site, entry.kind) for entry in ledger.entries())
    ledger.close()
    return Outcome(dict(progress.state.head), entries, len(list((folder / "state").glob("*"))))


@pytest.mark.ray
def test_blocks_give_the_model_and_the_ledger_entries_of_one_process(
    tmp_path: Path, alone: Alone
) -> None:
    one, blocks = (alone(_outcome, tmp_path, engine) for engine in ("inprocess", "ray"))
    for name, array in one.head.items():
        np.testing.assert_allclose(blocks.head[name], array, rtol=1e-9)
    assert blocks.entries == one.entries
    assert blocks.entries["site-7", "commit"] == ROUNDS
    assert blocks.kept == 0


def _questions(seconds: float = 60.0) -> list[Letter]:
    shapes = releases.shapes(study(), "update", DIM)
    payload = messages.pack({name: np.zeros(shape) for name, shape in shapes.items()})

    def asked(index: int) -> Envelope:
        request = Request(
            site=f"site-{index + 1}",
            study=study().digest,
            run="r",
            round=1,
            head=messages.digest(payload),
            rate=0.5,
        )
        return Envelope(request.encode(), payload)

    kind = MessageType.TRAIN
    return [Letter(index, asked(index), kind, "1", seconds) for index in range(len(SIZES))]


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open blocks over a ledger in which all sites have granted the study."""
    from veilgraft_deploy import blocks

    run, everyone = run_in(folder, "ray"), population(folder)
    with contextlib.closing(Ledger(run.ledger)) as ledger:
        for index in range(len(SIZES)):
            federation.vault_of(run, ledger, everyone, index).approve(run.study)
        with blocks.opened(run, everyone) as answer:
            yield answer
        ledger.verify()


def _answers_around_a_death(folder: Path, stays_dead: bool) -> tuple[list[Any], list[Any]]:
    """Return what the sites answer before and after the first block's process was killed."""
    import ray

    with _opened(folder) as answer:
        before = answer(_questions())
        (actors,) = answer.args
        ray.kill(actors[0], no_restart=stays_dead)
        after = answer(_questions())
    return [_told(each) for each in before], [_told(each) for each in after]


def _answers_in_time_and_late(folder: Path) -> tuple[list[Any], list[Any]]:
    with _opened(folder) as answer:
        late = answer(_questions(seconds=1e-3))
        return [_told(each) for each in answer(_questions())], [_told(each) for each in late]


def _told(answer: Answer) -> tuple[str, str] | None:
    """Return the site and the digest of its release."""
    if isinstance(answer, MissingError):
        return None
    assert isinstance(answer, Envelope)
    release = Release.decode(answer.header)
    return release.site, release.payload


@pytest.mark.drill
@pytest.mark.ray
def test_a_block_that_died_is_started_again_and_answers_with_the_same_bytes(
    tmp_path: Path, alone: Alone
) -> None:
    before, after = alone(_answers_around_a_death, tmp_path, False)
    assert [each[0] for each in before] == [f"site-{index + 1}" for index in range(len(SIZES))]
    assert len({digest for _, digest in before}) == len(SIZES)
    assert after == before


@pytest.mark.drill
@pytest.mark.ray
def test_a_block_that_is_gone_leaves_an_error_for_each_of_its_sites_alone(
    tmp_path: Path, alone: Alone
) -> None:
    before, after = alone(_answers_around_a_death, tmp_path, True)
    assert after == [None if index % CORES == 0 else each for index, each in enumerate(before)]


@pytest.mark.drill
@pytest.mark.ray
def test_a_block_that_takes_longer_than_a_question_lives_is_not_waited_for(
    tmp_path: Path, alone: Alone
) -> None:
    in_time, late = alone(_answers_in_time_and_late, tmp_path)
    assert late == [None] * len(SIZES)
    assert None not in in_time


def _open_without_a_ledger(folder: Path) -> str:
    from veilgraft_deploy import blocks

    with (
        pytest.raises(VeilgraftError) as error,
        blocks.opened(run_in(folder, "ray"), population(folder)),
    ):
        pass
    return str(error.value)


@pytest.mark.drill
@pytest.mark.ray
def test_a_block_that_cannot_start_says_why_in_a_sentence(tmp_path: Path, alone: Alone) -> None:
    told = alone(_open_without_a_ledger, tmp_path)
    assert told.startswith("Ray can't start a block of sites: ")
    assert told.endswith("the ledger is missing")


def _sweep(study: Path, folder: Path, engine: str) -> Any:
    """Return what a sweep by the command line found at its points."""
    flags = ("--out", folder / engine, "--state", folder / "state", "--engine", engine)
    done = veilgraft("simulate", study, "--grid", *flags)
    assert done.returncode == 0, done.stderr
    return report_of(folder / engine)["points"]


@pytest.mark.drill
@pytest.mark.ray
def test_a_sweep_on_ray_finds_what_one_without_finds(tmp_path: Path, alone: Alone) -> None:
    grid = {"epsilon": [1.0, 3.0], "seeds": [0]}
    swept = written(tmp_path, training={"rounds": 2}, simulation={"grid": grid})
    one, blocks = (alone(_sweep, swept, tmp_path, engine) for engine in ("inprocess", "ray"))
    assert len(one) == 2
    assert blocks == one


@pytest.mark.parametrize("flags", [[], ["--grid"]])
def test_an_address_without_a_cluster_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, flags: list[str]
) -> None:
    study = written(tmp_path, simulation={"grid": {"epsilon": [1.0]}})
    flags += ["--out", str(tmp_path / "out"), "--engine", "ray", "--ray-address", "127.0.0.1:1"]
    one_sentence(veilgraft("simulate", study, *flags), "expected HOST:PORT of a running Ray")
    assert not (tmp_path / "out").exists()


def test_an_address_is_refused_where_no_ray_was_asked_for(tmp_path: Path) -> None:
    flags = ("--out", tmp_path / "out", "--ray-address", "127.0.0.1:1")
    one_sentence(veilgraft("simulate", written(tmp_path), *flags), "expected --engine ray")
