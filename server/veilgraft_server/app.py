"""The coordinator's Flower `ServerApp`: asks the sites, round by round, and keeps the books.

The arithmetic of a round is `rounds.py`'s; here are the messages, the quorum and the checkpoint.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import Context, MessageType
from flwr.serverapp import Grid, ServerApp

from veilgraft import messages, releases
from veilgraft.errors import MessageError, QuorumError
from veilgraft.identity import PublicKey, SigningKey
from veilgraft.messages import Here, Release, Reply, Request
from veilgraft.model.head import Arrays
from veilgraft.model.score import Score
from veilgraft.plan import Plan, plan
from veilgraft.study import Kind, Study
from veilgraft_server import checkpoint, evaluation, rounds
from veilgraft_server.aggregation import Average, largest_norm, validated
from veilgraft_server.carrier import Carrier
from veilgraft_server.checkpoint import Drop, Progress, Round
from veilgraft_server.post import REFUSED, Asked, Post
from veilgraft_server.sites import Sites

log = logging.getLogger(__name__)

Taken = TypeVar("Taken")

_MESSAGE_TYPES: dict[Kind, str] = {
    "update": MessageType.TRAIN,
    "evaluation": MessageType.EVALUATE,
    "label-counts": MessageType.QUERY,
}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        run: names the run in messages and logs.
        dim: features per instance.
        checkpoint: the file that holds the run's state; read first where it exists. None keeps
            nothing: whoever stops such a run starts it again.
        generator: starts the head.
        evaluate: scores a head on public records, or gives None.
        tell: is told of every finished round.
        key, sender: sign and verify; see `Post`.
        backbone: the folder that sites get which lack it.
        patience: seconds that a quorum of sites is waited for at the start; None stands for the
            study's timeout of a round.
        meet: is told what each site says of itself.
    """

    study: Study
    run: str
    dim: int
    checkpoint: Path | None
    generator: np.random.Generator
    evaluate: Callable[[Arrays], Score | None]
    tell: Callable[[Round], None]
    key: SigningKey | None = None
    sender: Callable[[int], tuple[str, PublicKey] | None] = lambda _: None
    backbone: Path | None = None
    patience: float | None = None
    meet: Callable[[Here], None] = lambda _: None

    @cached_property
    def plan(self) -> Plan:
        """What the study will spend."""
        return plan(self.study)


def public_generator(study: Study) -> np.random.Generator:
    """Return what starts a study's head: public, and the same at each start.

    Else sites would be asked for one round twice, from two heads.
    """
    return np.random.default_rng(list(study.digest.encode()))


def run(job: Job, carrier: Carrier) -> Sites:
    """Run all rounds that the checkpoint does not yet hold; return the sites as they then stand.

    Raises:
        QuorumError: too few sites came, or gave a valid release.
    """
    study = job.study
    if job.checkpoint is not None and job.checkpoint.exists():
        progress = checkpoint.load(job.checkpoint, study.digest)
    else:
        progress = Progress(rounds.init(study, job.dim, job.generator))
        _keep(job, progress)
    sites = Sites(study, job.run, Post(carrier, job.key, job.sender), job.backbone, job.meet)
    last = study.training.rounds
    if progress.state.round < last:
        sites.wait(study.aggregation.timeout if job.patience is None else job.patience)
    while progress.state.round < last:
        if progress.labels is None and study.evaluation.label_counts is not None:
            progress = replace(progress, labels=_label_counts(job, sites))
        progress = _round(job, sites, progress)
        _keep(job, progress)
        job.tell(progress.history[-1])
        if progress.state.round < last:
            sites.refresh()
    return sites


def _keep(job: Job, progress: Progress) -> None:
    if job.checkpoint is not None:
        checkpoint.save(job.checkpoint, job.study.digest, progress)


def _round(job: Job, sites: Sites, progress: Progress) -> Progress:
    """Return where one more round leads."""
    study, state, started = job.study, progress.state, time.perf_counter()
    rate = rounds.rate(study, state)
    average = Average(study, sites.ready.values())
    added, drops = _ask(job, sites, "update", state.round + 1, state.head, average.add, rate)
    _require_quorum(job, state.round + 1, len(added), drops)
    state = rounds.apply(study, state, average.mean())
    score = _score(job, sites, state)
    state = rounds.observe(study, state, score.accuracy if score else None)
    low, high = (score.interval if score else None) or (None, None)
    finished = Round(
        round=state.round,
        accuracy=score.accuracy if score else None,
        loss=score.loss if score else None,
        low=low,
        high=high,
        epsilon=job.plan.epsilon(state.round),
        sites=len(added),
        dropped=len(drops),
        seconds=time.perf_counter() - started,
        drops=tuple(drops),
    )
    return replace(progress, state=state, history=(*progress.history, finished))


def _score(job: Job, sites: Sites, state: rounds.State) -> Score | None:
    """Score the model on public records, or ask the sites where the study says so."""
    private, model = job.study.evaluation.private, rounds.model(state)
    if private is None:
        return job.evaluate(model)
    if state.round not in job.plan.evaluated:
        return None
    sums, _ = _ask(job, sites, "evaluation", state.round, model, _sums)
    deviation = releases.deviation(job.study, "evaluation")
    return evaluation.estimate(list(sums.values()), deviation, private.loss_bound)


def _label_counts(job: Job, sites: Sites) -> dict[str, list[float]]:
    counts, _ = _ask(job, sites, "label-counts", 0, {}, _sums)
    return {site: counted.tolist() for site, counted in sorted(counts.items())}


def _sums(_: str, arrays: Arrays) -> np.ndarray:
    return arrays[releases.SUMS]


def _ask(
    job: Job,
    sites: Sites,
    kind: Kind,
    round_: int,
    head: Arrays,
    take: Callable[[str, Arrays], Taken],
    rate: float = 0.0,
) -> tuple[dict[str, Taken], list[Drop]]:
    """Ask every site for one release; return what was taken, and why others did not count.

    Args:
        take: makes of a site's valid arrays, when they come, what is kept of them.
    """
    payload = messages.pack(head)
    digest = messages.digest(payload)
    shapes = releases.shapes(job.study, kind, job.dim)
    max_norm = largest_norm(job.study, kind, shapes)

    def check(reply: Reply, released: bytes) -> Taken:
        if not isinstance(reply, Release):
            raise MessageError("expected a release")
        return take(reply.site, validated(released, shapes, max_norm))

    def asked(node: int, site: str) -> Asked:
        request = Request(
            kind=kind,
            site=site,
            study=job.study.digest,
            run=job.run,
            round=round_,
            head=digest,
            rate=rate,
        )
        return Asked(node, request, payload, _MESSAGE_TYPES[kind], str(round_))

    # In the order in which updates are averaged: who answers in it has none of them held back.
    named = dict(sorted(sites.ready.items(), key=lambda item: item[1]))
    questions = {node: asked(node, site) for node, site in named.items()}
    answers = sites.post.ask(questions, check, job.study.aggregation.timeout)
    found = {named[node]: taken for node, taken in answers.valid.items()}
    drops = [Drop(named[node], reason) for node, reason in answers.failed.items()]
    for drop in drops:
        log.warning("%s: %s dropped: %s", drop.site, kind, drop.reason)
    if kind == "update":
        # Only here: sites are greeted again before the next.
        sites.doubt(node for node, reason in answers.failed.items() if reason.startswith(REFUSED))
    return found, sorted(drops, key=lambda drop: drop.site)


def _require_quorum(job: Job, round_: int, valid: int, drops: list[Drop]) -> None:
    quorum = job.study.aggregation.quorum
    if valid < quorum:
        reasons = "; ".join(f"{drop.site}: {drop.reason}" for drop in drops[:5])
        raise QuorumError(
            f"round {round_}: {valid} valid releases, aggregation.quorum is {quorum} "
            f"({reasons})"
            + (f"; the rounds before are kept in {job.checkpoint.name}" if job.checkpoint else "")
        )


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def _main(grid: Grid, context: Context) -> None:
    from veilgraft_server.deployed import conduct

    conduct(Path(os.environ["VEILGRAFT_COORDINATOR"]), f"run-{context.run_id}", grid)
