"""Simulate a study on one machine, from records to model.

A run folder holds `run.json` (what is run), `checkpoint.safetensors`, `ledger.db`, `state/`
(features), and at the end `report.json`, `rounds.csv`, `model/` and, with comparisons,
`comparisons/`. What holds a record or its features stays under `state/`.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.model import export
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_deploy.comparisons import compare as run_comparisons
from veilgraft_deploy.federation import Engine, Run, federate
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent, Watcher
from veilgraft_deploy.source import Source
from veilgraft_server import report, rounds
from veilgraft_server.checkpoint import write_atomically


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
        state: folder for features, `out/state` by default; runs that share it reuse them.
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
    _check_folder(run, resume=resume, overwrite=overwrite, compare=compare)
    source = Source.read(study, run.state, watcher)
    population = source.population()
    _check_sites(run, population)
    ready = time.perf_counter()
    _claim(run, source, overwrite=overwrite)
    reached, history = federate(run, population)
    trained = time.perf_counter()
    comparisons = run_comparisons(run, source, population) if compare else None
    export.export(
        run.out / "model",
        study,
        source.backbone,
        rounds.model(reached),
        _statement(run),
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
        history,
        seeded=seed is not None,
        sites=_spent(run, population),
        comparisons=comparisons,
        timing=timing,
    )
    report.write(run.out, content)
    return content


def _described(run: Run) -> bytes:
    """Return what must be the same when a run is resumed, as JSON."""
    facts = {"seed": run.seed, "study": run.study.model_dump(mode="json")}
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def _private(run: Run) -> bool:
    return run.study.private and run.seed is None


def _check_folder(run: Run, *, resume: bool, overwrite: bool, compare: bool) -> None:
    """Raise unless the run may be started as asked; changes nothing."""
    described = run.out / "run.json"
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
    if run.out.exists() and not run.out.is_dir():
        raise InputError(f"{run.out}: expected a folder, got a file")
    if not described.exists():
        return
    if overwrite:
        # The run that is there speaks for its data, not the study that would replace it.
        if not json.loads(described.read_bytes())["study"]["simulation"]["data_is_public"]:
            raise InputError(
                f"{run.out}: holds the ledger of data not declared public; it can't be overwritten"
            )
        return
    if not resume:
        raise InputError(f"{run.out}: holds a run; give --resume, --overwrite or another --out")
    if described.read_bytes() != _described(run):
        raise InputError(
            f"{described}: the study or the seed is not the one with which this run was started"
        )


def _check_sites(run: Run, population: Population) -> None:
    """Raise `InputError` where the sites could never give what the aggregation asks."""
    names = {site.site for site in population.sites}
    aggregation = run.study.aggregation
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
    described = run.out / "run.json"
    records = run.out / "state" / "records.sha256"
    if overwrite and described.exists():
        for folder in ("model", "comparisons"):
            shutil.rmtree(run.out / folder, ignore_errors=True)
        for pattern in ("ledger.db*", "checkpoint.safetensors", "report.json", "rounds.csv"):
            for path in run.out.glob(pattern):
                path.unlink()
        described.unlink()
    if described.exists():
        if records.read_text() != source.records.fingerprint:
            raise InputError(f"{run.out}: the records are not those with which this run started")
        return
    records.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Tells whether two data sets are the same, and so stays among what is the site's own.
    records.touch(mode=0o600)
    records.write_text(source.records.fingerprint)
    write_atomically(described, _described(run))


def _spent(run: Run, population: Population) -> list[dict[str, Any]]:
    """Return each site's declared size and the ε of all that its ledger holds."""
    ledger = Ledger(run.ledger, exists=True)
    delta = run.study.privacy.delta
    spent = [
        {
            "site": site.site,
            "units": site.units,
            "epsilon": ledger.epsilon(site.site, delta) if _private(run) else None,
        }
        for site in population.sites
    ]
    ledger.close()
    return spent


def _statement(run: Run) -> Sequence[str]:
    """Return the privacy statement of what the run made, a sentence a line."""
    study, planned = run.study, plan(run.study)
    if not study.private:
        return ["**Not private.** Trained without clipping and noise."]
    if run.seed is not None:
        return [f"**Not private.** The noise came from a seed, {run.seed}, and can be subtracted."]
    unit = "record" if study.privacy.unit == "record" else f"value of `{study.privacy.unit}`"
    return [
        f"Each {unit} at each site is protected by (ε, δ)-differential privacy with "
        f"ε = {planned.epsilon():.4g} at δ = {planned.delta:g} (add or remove one unit; "
        f"{planned.epsilon(replace_one=True):.4g} for replacing one), over all "
        f"{planned.rounds} rounds.",
        f"Algorithm `{study.training.algorithm}`, noise multiplier {planned.sigma:.4g}, clip norm "
        f"{study.privacy.clip_norm:g}; no trust in the coordinator is needed for this.",
        "A unit that is present at several sites spends at each of them; budgets add.",
    ]
