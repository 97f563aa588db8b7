"""The ServerApp of a coordinator's folder: the run as it is on a network.

The executor's process runs it, whose user alone may read the signing key. What it leaves, in `run`:
`status.json` after every round, and at the end `report.json`, `rounds.csv` and `model/`, or
`outcome.json` with the reason why it was given up.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from veilgraft.config import canonical
from veilgraft.durable import alone, write_atomically
from veilgraft.errors import VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import PublicKey, SigningKey, passphrase
from veilgraft.messages import Here
from veilgraft.model import export
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.model.features import Features
from veilgraft.study import Study
from veilgraft_server import app, checkpoint, evaluation, report, rounds
from veilgraft_server.carrier import Flower
from veilgraft_server.checkpoint import Round
from veilgraft_server.folder import Folder, Settings
from veilgraft_server.metrics import Status
from veilgraft_server.registry import Registry

log = logging.getLogger(__name__)

MAX_DROPS, MAX_REASON = 8, 60
"""Drops of a round that the event log tells of, and characters of each."""

ALONE_SECONDS = 60.0
"""For which another process is waited for that still is at the run."""

PATIENCE_SECONDS = 30 * 24 * 3600.0
"""For which a quorum of sites is waited for: people there have to approve first."""


def conduct(folder: Path, run: str, grid: Grid) -> None:
    """Run the folder's study to its end, or leave the reason why that can't be."""
    place = Folder.open(folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Flower may start the run again while a process of the last attempt still ends.
    with (
        alone(place.run_lock, ALONE_SECONDS),
        contextlib.closing(EventLog(place.run_events)) as events,
    ):
        try:
            _conduct(place, run, grid, events)
        except VeilgraftError as error:
            outcome = {"error": str(error), "exit_code": error.exit_code}
            write_atomically(place.outcome, json.dumps(outcome).encode())
            events.note("finished", exit_code=error.exit_code)
            raise


def _conduct(place: Folder, run: str, grid: Grid, events: EventLog) -> None:
    study, began = place.study, time.perf_counter()
    registry = Registry(place.registry)
    job = app.Job(
        study=study,
        run=run,
        dim=place.settings.dim,
        checkpoint=place.checkpoint,
        generator=app.public_generator(study),
        evaluate=evaluation.scorer(study, _test(place)),
        tell=_teller(place, events),
        key=SigningKey.load(place.signing_key, passphrase()),
        sender=lambda node: _sender(place, registry, node),
        backbone=study.backbone.path,
        patience=PATIENCE_SECONDS,
        meet=lambda here: _meet(place, here),
    )
    _status(place, "waiting", 0)
    sites = app.run(job, Flower(grid))
    _finish(place, study, time.perf_counter() - began)
    _status(place, "finished", len(sites.ready))
    events.note("finished", rounds=study.training.rounds, exit_code=0)


def _sender(place: Folder, registry: Registry, node: int) -> tuple[str, PublicKey] | None:
    """Return the site behind a node, and the key with which it first spoke.

    The edge, which enrols sites, writes the registry; were it taken over, it could name other keys
    and other sites there. So who may take part stands in the owner's file, and a site's key, once
    seen, in the executor's own. `coordinator invite` lets a site come with another.
    """
    member = registry.by_node(node)
    if member is None or member.identity is None:
        return None
    if member.site not in Settings.read(place.config).sites:
        log.warning("%s: was never invited; left out", member.site)
        return None
    kept = json.loads(place.identities.read_text()) if place.identities.exists() else {}
    if kept.setdefault(member.site, member.identity.text) != member.identity.text:
        log.warning("%s: another key than before, and no new invitation; left out", member.site)
        return None
    place.identities.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(place.identities, canonical(kept).encode())
    return member.site, member.identity


def _meet(place: Folder, here: Here) -> None:
    """Keep what a site once said of itself, though it leave, or this process end."""
    met = _met(place)
    before = met.get(here.site, {"private": True, "isolation": "full"})
    met[here.site] = {
        "private": here.private and before["private"],
        "isolation": "reduced" if "reduced" in (here.isolation, before["isolation"]) else "full",
    }
    write_atomically(place.met, canonical(met).encode())


def _met(place: Folder) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if place.met.exists():
        found = json.loads(place.met.read_text())
    return found


def _test(place: Folder) -> Features | None:
    if not place.evaluation.exists():
        return None
    from safetensors.torch import load_file

    return Features(**load_file(place.evaluation))


def _teller(place: Folder, events: EventLog) -> Callable[[Round], None]:
    def tell(round_: Round) -> None:
        events.note(
            "round",
            round=round_.round,
            sites=round_.sites,
            dropped=round_.dropped,
            # An entry has its limit, and a reason may quote what a site sent.
            drops={drop.site: drop.reason[:MAX_REASON] for drop in round_.drops[:MAX_DROPS]},
        )
        _status(place, "running", round_.sites + round_.dropped)

    return tell


def _status(place: Folder, state: Any, online: int) -> None:
    study = place.study
    history: tuple[Round, ...] = ()
    if place.checkpoint.exists():
        history = checkpoint.load(place.checkpoint, study.digest).history
    Status.of(
        history,
        state=state,
        rounds=study.training.rounds,
        quorum=study.aggregation.quorum,
        online=online,
    ).save(place.status)


def _finish(place: Folder, study: Study, seconds: float) -> None:
    progress, met = checkpoint.load(place.checkpoint, study.digest), _met(place)
    seeded = [site for site, said in sorted(met.items()) if not said["private"]]
    reduced = [site for site, said in sorted(met.items()) if said["isolation"] == "reduced"]
    assert study.backbone.path is not None
    private = study.private and not seeded
    export.export(
        place.run / "model",
        study,
        FrozenBackbone.open(study.backbone.path, study.backbone),
        rounds.model(progress.state),
        report.statement(study, seeded=seeded, reduced=reduced),
        private=private,
    )
    epsilon = progress.history[-1].epsilon if private else None
    content = report.report(
        study,
        progress,
        seeded=bool(seeded),
        sites=[
            {"site": site, "isolation": said["isolation"], "epsilon": epsilon}
            for site, said in sorted(met.items())
        ],
        comparisons=None,
        timing={"rounds": seconds, "total": seconds},
    )
    report.write(place.run, content)
