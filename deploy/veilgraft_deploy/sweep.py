"""Plan a private study: simulate it at every point of `simulation.grid`, over public records.

Features are made, and sites are laid out, once. Each point, once for each seed, is then the same
federation as `veilgraft simulate` would run for a study that names the point's values: equal
seeds give equal numbers. A point's ledger lies in `points/` while it runs and goes when it
has ended. At the end the folder holds `run.json` (what was swept), `sweep.csv`,
`rounds.csv`, `sweep.png` and, written last, `report.json`.

What is best is chosen by the accuracy over public records that is then shown, which flatters it.
"""

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

from veilgraft.errors import InputError, Refusal, RefusedError, VeilgraftError
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_deploy import folders, sweep_report
from veilgraft_deploy.custody import check_apart, settled
from veilgraft_deploy.federation import Engine, Run, check_engine, rehearse
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent, Watcher
from veilgraft_deploy.simulation import check_sites
from veilgraft_deploy.source import Source
from veilgraft_deploy.sweep_report import Trial

AXES = (
    ("privacy", "epsilon"),
    ("training", "learning_rate"),
    ("training", "rounds"),
    ("privacy", "clip_norm"),
    ("training", "sample_rate"),
)
"""Section and key in the study of what a grid varies; the key is the grid's, too."""

TRIALS_A_WORKER = 8
"""Fewer take less time than another process takes to start."""


@dataclass(frozen=True)
class _Asked:
    """One federation that is to be run: a point of the grid, by its study, and a seed."""

    study: Study
    seed: int | None
    number: int


_Pipe: TypeAlias = "Connection[Any, Any]"
"""By which a process sends what it has run."""

_Numbered: TypeAlias = tuple[int, Trial]
"""What was run, with its place among all."""


def sweep(
    study: Study,
    *,
    out: Path | str,
    state: Path | str | None = None,
    engine: Engine = "inprocess",
    ray_address: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    imported: float = 0.0,
) -> dict[str, Any]:
    """Run a study at every point of its grid and return the sweep's report.

    Args:
        out: the folder of the sweep; must hold no run unless `overwrite` is given.
        state: folder for features, `out/state` by default; runs that share it reuse them.
        workers: processes that share the points, with engine `inprocess`, at most. More than one
            are started anew, so a script that calls this must be one that may be imported.
        imported: seconds that the caller spent on imports, for the report.

    Raises:
        InputError: the study, its grid, its data or its folder can't be used; nothing was run.
        RefusedError: the records are not declared public.
        QuorumError: too few sites gave a valid release.
    """
    began = time.perf_counter()
    folder = Path(out)
    run = Run(
        study,
        folder,
        Path(state if state is not None else folder / "state"),
        label="point",
        engine=engine,
        ray_address=ray_address,
        watcher=watcher or Silent(),
    )
    points = _checked(run, overwrite=overwrite)
    seeds = study.simulation.grid.seeds or (None,)
    asked = [
        _Asked(point, seed, number)
        for number, (point, seed) in enumerate(itertools.product(points, seeds))
    ]
    with folders.alone_in(folder):
        source = Source.read(study, run.state, None, run.watcher)
        population = source.population(settled(study, run.state))
        _check_population(study, population)
        ready = time.perf_counter()
        if overwrite:
            folders.clear(folder)
        folders.describe(folder, _described(study))
        trials = _tried(run, population, asked, workers)
        timing = {
            "import": imported,
            "features": ready - began,
            "points": time.perf_counter() - ready,
            "total": imported + time.perf_counter() - began,
        }
        content = sweep_report.report(study, trials, timing)
        sweep_report.write(folder, content, trials)
    return content


def points(study: Study) -> list[Study]:
    """Return the study at each point of its grid, in the grid's order, the last key fastest.

    Raises:
        InputError: a value is none that the study could have.
    """
    grid = study.simulation.grid
    given = {place: getattr(grid, place[1]) for place in AXES if getattr(grid, place[1])}
    found = []
    for values in itertools.product(*given.values()):
        changed = study.model_dump()
        for (section, key), value in zip(given, values, strict=True):
            changed[section][key] = value
        if grid.epsilon:
            changed["privacy"]["noise_multiplier"] = None
        found.append(Study.parse(changed, name="simulation.grid"))
    return found


def _checked(run: Run, *, overwrite: bool) -> list[Study]:
    """Return the grid's points; raise unless all may be run as asked. Changes nothing."""
    study, simulation = run.study, run.study.simulation
    if not simulation.data_is_public:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            "a sweep runs a study many times, each of which private records would have to pay "
            "for, and simulation.data_is_public is not true",
        )
    if not study.private:
        raise InputError(
            "training.algorithm: expected a private one for a sweep, which sets accuracy against "
            "ε; got none"
        )
    if not any(getattr(simulation.grid, key) for _, key in AXES):
        keys = ", ".join(key for _, key in AXES)
        raise InputError(f"simulation.grid: expected values for one or more of {keys}")
    found = points(study)
    for point in found:
        epsilon, cap = plan(point).epsilon(), simulation.max_epsilon
        if cap is not None and epsilon is not None and epsilon > cap:
            raise InputError(
                f"simulation.max_epsilon: {cap:g}; a point of simulation.grid would spend "
                f"ε = {epsilon:.4g}"
            )
    if folders.described(run.out) is not None and not overwrite:
        raise InputError(f"{run.out}: holds a run; give --overwrite or another --out")
    check_apart(study, run.state, run.out)
    check_engine(run)
    return found


def _check_population(study: Study, population: Population) -> None:
    check_sites(study, population)
    if population.test is None and study.evaluation.private is None:
        raise InputError(
            "simulation.holdout: a sweep compares accuracies, and no record is left to measure "
            "them on"
        )


def _described(study: Study) -> bytes:
    facts = {"sweep": True, "study": study.model_dump(mode="json")}
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _tried(run: Run, population: Population, asked: Sequence[_Asked], workers: int) -> list[Trial]:
    """Run all that is asked for; what the runs leave on disk goes, however they end."""
    count = 1 if run.engine == "ray" else min(workers, len(asked) // TRIALS_A_WORKER)
    trained = (
        _together(run, population, asked, count) if count > 1 else _alone(run, population, asked)
    )
    trials = dict[int, Trial]()
    try:
        for number, trial in trained:
            trials[number] = trial
            last = trial.history[-1]
            shown = f"ε {last.epsilon:.3g}, rate {trial.study.training.learning_rate:g}"
            if last.accuracy is not None:
                shown += f": accuracy {last.accuracy:.3f}"
            run.watcher.step("sweep", len(trials), len(asked), shown)
    finally:
        shutil.rmtree(_folder(run), ignore_errors=True)
    return [trials[number] for number in sorted(trials)]


def _folder(run: Run) -> Path:
    return run.out / "points"


def _alone(run: Run, population: Population, asked: Sequence[_Asked]) -> Iterator[_Numbered]:
    for each in asked:
        yield each.number, _trial(run, population, each)


def _trial(run: Run, population: Population, asked: _Asked) -> Trial:
    began, study = time.perf_counter(), asked.study
    out = _folder(run) / str(asked.number)
    here = replace(run, study=study, out=out, seed=asked.seed)
    history = rehearse(here, population.under(study))
    shutil.rmtree(out)
    return Trial(study, asked.seed, history, time.perf_counter() - began)


def _together(
    run: Run, population: Population, asked: Sequence[_Asked], workers: int
) -> Iterator[_Numbered]:
    """Share the work between processes, each with the population mapped from one file.

    No `ProcessPoolExecutor`: its threads wait for ever after a second Ctrl-C, and where a process
    died at its start. These processes are ended, however this one goes on.
    """
    shared = _folder(run) / "population.safetensors"
    population.save(shared)
    # Not forked: torch's threads and the ledger's connections don't outlive a fork.
    context, here = get_context("spawn"), replace(run, watcher=Silent())
    processes, waiting = list[SpawnProcess](), list[_Pipe]()
    try:
        for first in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            work = (here, shared, asked[first::workers], sender)
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            processes.append(process)
            waiting.append(receiver)
            # Then it ends when the process does.
            sender.close()
        while waiting:
            ready = wait(waiting)
            for receiver in [each for each in waiting if each in ready]:
                found = _received(receiver)
                if found is None:
                    waiting.remove(receiver)
                else:
                    yield found
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _received(receiver: _Pipe) -> _Numbered | None:
    try:
        found: _Numbered | Exception | None = receiver.recv()
    except EOFError:
        raise VeilgraftError("a process of the sweep ended before its work") from None
    if isinstance(found, Exception):
        raise found
    return found


def _work(run: Run, shared: Path, asked: Sequence[_Asked], sender: _Pipe) -> None:
    # The parent's to handle; and who loses the parent must not write on beside a new sweep.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for found in _alone(run, Population.load(shared), asked):
            sender.send(found)
        sender.send(None)
    except Exception as error:  # noqa: BLE001 - the parent's to raise
        sender.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
