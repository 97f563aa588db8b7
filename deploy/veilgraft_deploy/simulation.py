"""Simulate a study on one machine, from records to model.

A run folder holds `run.json` (what is run), `checkpoint.safetensors`, `records.hmac` (whether they
are still the same records), and at the end `report.json`, `rounds.csv`, `model/` and, with
comparisons, `comparisons/`. What holds a record or its features lies in the state folder, with the
secret key; so does the ledger of private records, whose state folder outlives its runs. That of
public ones is the run's.
"""

import hmac
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.model import export
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_deploy import folders
from veilgraft_deploy.comparisons import compare as run_comparisons
from veilgraft_deploy.custody import Custody, check_apart, keep, settled
from veilgraft_deploy.federation import Engine, Run, check_engine, federate
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent, Watcher
from veilgraft_deploy.source import Source
from veilgraft_server import report, rounds
from veilgraft_server.checkpoint import Progress


def simulate(
    study: Study,
    *,
    out: Path | str,
    state: Path | str | None = None,
    engine: Engine = "inprocess",
    seed: int | None = None,
    compare: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    ray_address: str | None = None,
    watcher: Watcher | None = None,
    imported: float = 0.0,
) -> dict[str, Any]:
    """Run a study from records to model and return its report.

    Args:
        out: the run folder; must hold no run unless `resume` or `overwrite` is given.
        state: folder for features, `out/state` by default; runs that share it reuse them. For
            data not declared public it must be named: it holds the sites' ledger and keys, and is
            to be the same for all runs over these data.
        seed: makes the run reproducible and not private.
        compare: also run the comparisons, each tuned over `simulation.grid`.
        imported: seconds that the caller spent on imports, for the report.

    Raises:
        InputError: the study, its data or its folder can't be used; nothing was spent.
        RefusedError: a simulated site's limits say no.
        QuorumError: too few sites gave a valid release.
    """
    began = time.perf_counter()
    watcher = watcher or Silent()
    run = Run(
        study,
        Path(out),
        Path(state if state is not None else Path(out) / "state"),
        engine=engine,
        seed=seed,
        ray_address=ray_address,
        watcher=watcher,
    )
    if state is None and not study.simulation.data_is_public:
        raise InputError(
            "--state: missing; data not declared public spend from a ledger that outlives the run: "
            "name one folder for all runs over these data"
        )
    _check_folder(run, resume=resume, overwrite=overwrite, compare=compare)
    check_apart(study, run.state, run.out)
    check_engine(run)
    # Private records have one ledger and one key, and so one run at a time.
    mine = [run.out] if study.simulation.data_is_public else [run.out, run.state]
    with ExitStack() as held:
        for folder in mine:
            held.enter_context(folders.alone_in(folder))
        custody = settled(study, run.state)
        return _simulate(run, custody, began, imported, compare=compare, overwrite=overwrite)


def _simulate(
    run: Run, custody: Custody, began: float, imported: float, *, compare: bool, overwrite: bool
) -> dict[str, Any]:
    study = run.study
    source = Source.read(study, run.state, run.seed, run.watcher)
    # The export needs the backbone; a run must not find out after it has spent that it is spoilt.
    _ = source.backbone
    population = source.population(custody)
    check_sites(run.study, population)
    ready = time.perf_counter()
    _claim(run, source, overwrite=overwrite)
    if not study.simulation.data_is_public:
        keep(custody, run.state)
    progress = _federated(run, population)
    trained = time.perf_counter()
    comparisons = run_comparisons(run, source, population) if compare else None
    export.export(
        run.out / "model",
        study,
        source.backbone,
        rounds.model(progress.state),
        report.statement(study, seed=run.seed),
        private=_private(run),
    )
    timing = {
        "import": imported,
        "features": ready - began,
        "rounds": trained - ready,
        "total": imported + time.perf_counter() - began,
    }
    content = report.report(
        study,
        progress,
        seeded=run.seed is not None,
        sites=_spent(run, population),
        comparisons=comparisons,
        timing=timing,
    )
    report.write(run.out, content)
    return content


def _federated(run: Run, population: Population) -> Progress:
    try:
        return federate(run, population)
    except RefusedError:
        # What no site has granted is no run; the folder is free again.
        if not run.checkpoint.exists():
            (run.out / folders.DESCRIPTION).unlink()
        raise


def _described(run: Run) -> bytes:
    """Return what must be the same when a run is resumed, as JSON."""
    facts = {"seed": run.seed, "study": run.study.model_dump(mode="json")}
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _private(run: Run) -> bool:
    return run.study.private and run.seed is None


def _check_folder(run: Run, *, resume: bool, overwrite: bool, compare: bool) -> None:
    """Raise unless the run may be started as asked; changes nothing."""
    if resume and overwrite:
        raise InputError("expected --resume or --overwrite, got both")
    if not _private(run) and not run.study.simulation.data_is_public:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            "a seed, or training.algorithm none, gives no privacy, and "
            "simulation.data_is_public is not true",
        )
    if compare and not run.study.simulation.data_is_public:
        raise RefusedError(
            Refusal.STUDY_NOT_APPROVED,
            "comparisons train without privacy, and simulation.data_is_public is not true",
        )
    described = folders.described(run.out)
    if overwrite or described is None:
        return
    if not resume:
        raise InputError(f"{run.out}: holds a run; give --resume, --overwrite or another --out")
    if described.read_bytes() != _described(run):
        raise InputError(
            f"{described}: the study or the seed is not the one with which this run was started"
        )


def check_sites(study: Study, population: Population) -> None:
    """Raise `InputError` where the sites could never give what the aggregation asks."""
    names = {site.site for site in population.sites}
    aggregation = study.aggregation
    if aggregation.quorum > len(names):
        raise InputError(
            f"aggregation.quorum: expected at most {len(names)}, the number of sites, "
            f"got {aggregation.quorum}"
        )
    if aggregation.weights and set(aggregation.weights) != names:
        raise InputError(
            f"aggregation.weights: expected {', '.join(sorted(names))}, "
            f"got {', '.join(sorted(aggregation.weights))}"
        )


def _claim(run: Run, source: Source, *, overwrite: bool) -> None:
    """Make the folder this run's own; what an earlier run left goes, its features stay."""
    records = run.out / "records.hmac"
    fingerprint = hmac.new(source.people.key, source.records.fingerprint.encode(), "sha256")
    if overwrite:
        folders.clear(run.out)
    if folders.described(run.out) is not None:
        if records.read_text() != fingerprint.hexdigest():
            raise InputError(f"{run.out}: the records are not those with which this run started")
        return
    # A bare fingerprint would tell whoever sees this folder whether a data set is the same.
    records.write_text(fingerprint.hexdigest())
    folders.describe(run.out, _described(run))


def _spent(run: Run, population: Population) -> list[dict[str, Any]]:
    """Return each site's declared size and the ε of all that its ledger holds."""
    ledger = Ledger(run.ledger, exists=True)
    delta = run.study.privacy.delta
    spent = [
        {
            "site": site.site,
            "units": site.units,
            "epsilon": ledger.epsilon(site.site, delta) if _private(run) else None,
            "life_epsilon": ledger.life_epsilon(site.site) if _private(run) else None,
            "life_delta": ledger.life_delta(site.site) if _private(run) else None,
        }
        for site in population.sites
    ]
    ledger.close()
    return spent
