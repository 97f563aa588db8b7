"""The coordinator's Flower `ServerApp`: asks the sites, round by round, and keeps the books.

The arithmetic of a round is `rounds.py`'s; here are the messages, the quorum and the checkpoint.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from veilgraft import messages, releases
from veilgraft.errors import MessageError, QuorumError
from veilgraft.messages import Envelope, Hello, Refused, Request
from veilgraft.model.head import Arrays
from veilgraft.model.score import Score
from veilgraft.plan import Plan, plan
from veilgraft.study import Kind, Study
from veilgraft_server import checkpoint, evaluation, rounds
from veilgraft_server.aggregation import largest_norm, validated
from veilgraft_server.checkpoint import Drop, Progress, Round

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2

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
        checkpoint: the file that holds the run's state; read first where it exists.
        generator: starts the head.
        evaluate: scores a head on public records, or gives None.
        tell: is told of every finished round.
    """

    study: Study
    run: str
    dim: int
    checkpoint: Path
    generator: np.random.Generator
    evaluate: Callable[[Arrays], Score | None]
    tell: Callable[[Round], None]

    @cached_property
    def plan(self) -> Plan:
        """What the study will spend."""
        return plan(self.study)


def server_app(job: Job) -> ServerApp:
    """Return the app that runs `job` to its end, or raises `QuorumError`."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        run(job, grid)

    return app


def run(job: Job, grid: Grid) -> None:
    """Run all rounds that the checkpoint does not yet hold."""
    study = job.study
    if job.checkpoint.exists():
        progress = checkpoint.load(job.checkpoint, study.digest)
    else:
        progress = Progress(rounds.init(study, job.dim, job.generator))
        checkpoint.save(job.checkpoint, study.digest, progress)
    last = study.training.rounds
    sites = _sites(job, grid) if progress.state.round < last else {}
    while progress.state.round < last:
        if progress.labels is None and study.evaluation.label_counts is not None:
            progress = replace(progress, labels=_label_counts(job, grid, sites))
        progress = _round(job, grid, sites, progress)
        checkpoint.save(job.checkpoint, study.digest, progress)
        job.tell(progress.history[-1])


def _round(job: Job, grid: Grid, sites: dict[int, str], progress: Progress) -> Progress:
    """Return where one more round leads."""
    study, state, started = job.study, progress.state, time.perf_counter()
    rate = rounds.rate(study, state)
    updates, drops = _ask(job, grid, sites, "update", state.round + 1, state.head, rate)
    _require_quorum(job, state.round + 1, updates, drops)
    state = rounds.apply(study, state, updates)
    score = _score(job, grid, sites, state)
    state = rounds.observe(study, state, score.accuracy if score else None)
    low, high = (score.interval if score else None) or (None, None)
    finished = Round(
        round=state.round,
        accuracy=score.accuracy if score else None,
        loss=score.loss if score else None,
        low=low,
        high=high,
        epsilon=job.plan.epsilon(state.round),
        sites=len(updates),
        dropped=len(drops),
        seconds=time.perf_counter() - started,
        drops=tuple(drops),
    )
    return replace(progress, state=state, history=(*progress.history, finished))


def _score(job: Job, grid: Grid, sites: dict[int, str], state: rounds.State) -> Score | None:
    """Score the model on public records, or ask the sites where the study says so."""
    private, model = job.study.evaluation.private, rounds.model(state)
    if private is None:
        return job.evaluate(model)
    if state.round not in job.plan.evaluated:
        return None
    found, _ = _ask(job, grid, sites, "evaluation", state.round, model)
    sums = [arrays[releases.SUMS] for arrays in found.values()]
    deviation = releases.deviation(job.study, "evaluation")
    return evaluation.estimate(sums, deviation, private.loss_bound)


def _label_counts(job: Job, grid: Grid, sites: dict[int, str]) -> dict[str, list[float]]:
    found, _ = _ask(job, grid, sites, "label-counts", 0, {})
    return {site: arrays[releases.SUMS].tolist() for site, arrays in sorted(found.items())}


def _sites(job: Job, grid: Grid) -> dict[int, str]:
    """Return the name that each node gives itself, once a quorum of nodes is there."""
    aggregation = job.study.aggregation
    deadline = time.monotonic() + aggregation.timeout
    while len(nodes := sorted(grid.get_node_ids())) < aggregation.quorum:
        if time.monotonic() > deadline:
            raise QuorumError(
                f"{len(nodes)} nodes after {aggregation.timeout:g} s; "
                f"aggregation.quorum is {aggregation.quorum}"
            )
        time.sleep(POLL_SECONDS)
    hello = Envelope(Hello(study=job.study.digest, run=job.run).encode())
    outgoing = [_message(hello, node, MessageType.QUERY, "0") for node in nodes]
    named: dict[int, str] = {}
    for reply in grid.send_and_receive(outgoing, timeout=aggregation.timeout):
        try:
            answer = messages.Here.decode(messages.from_record(reply.content).header)
        except (MessageError, ValueError) as error:
            log.warning("node %d did not name itself: %s", reply.metadata.src_node_id, error)
            continue
        named[reply.metadata.src_node_id] = answer.site
    return {node: site for node, site in named.items() if _may_join(job, site, named)}


def _may_join(job: Job, site: str, named: dict[int, str]) -> bool:
    """Leave out a name that two nodes claim, or that the study gives no weight."""
    weights = job.study.aggregation.weights
    if list(named.values()).count(site) > 1:
        log.warning("%s: left out: several nodes call themselves so", site)
        return False
    if weights and site not in weights:
        log.warning("%s: left out: aggregation.weights does not name it", site)
        return False
    return True


def _ask(
    job: Job,
    grid: Grid,
    sites: dict[int, str],
    kind: Kind,
    round_: int,
    head: Arrays,
    rate: float = 0.0,
) -> tuple[dict[str, Arrays], list[Drop]]:
    """Ask every site for one release; return the valid ones, and why others did not count."""
    payload = messages.pack(head)
    digest = messages.digest(payload)
    requests = {
        node: Request(
            kind=kind,
            site=site,
            study=job.study.digest,
            run=job.run,
            round=round_,
            head=digest,
            rate=rate,
        ).encode()
        for node, site in sites.items()
    }
    outgoing = [
        _message(Envelope(header, payload), node, _MESSAGE_TYPES[kind], str(round_))
        for node, header in requests.items()
    ]
    found: dict[str, Arrays] = {}
    drops: dict[str, str] = {}
    for reply in grid.send_and_receive(outgoing, timeout=job.study.aggregation.timeout):
        node = reply.metadata.src_node_id
        site = sites.get(node)
        if site is None or site in found:
            continue
        try:
            found[site] = _released(job, kind, site, requests[node], reply)
        except MessageError as error:
            drops[site] = str(error)
            log.warning("%s: %s dropped: %s", site, kind, error)
    for site in set(sites.values()) - set(found) - set(drops):
        drops[site] = "no answer"
    return found, [Drop(site, reason) for site, reason in sorted(drops.items())]


def _released(job: Job, kind: Kind, site: str, request: bytes, reply: Message) -> Arrays:
    if reply.has_error():
        raise MessageError(f"Flower error {reply.error.code}")
    envelope = messages.from_record(reply.content)
    answer = messages.decode_answer(envelope.header)
    if answer.request != messages.digest(request):
        raise MessageError("answers another request")
    if isinstance(answer, Refused):
        raise MessageError(f"refused: {answer.code}")
    if answer.site != site or answer.payload != messages.digest(envelope.payload):
        raise MessageError("the header does not fit the payload or the site")
    shapes = releases.shapes(job.study, kind, job.dim)
    return validated(envelope.payload, shapes, largest_norm(job.study, kind, shapes))


def _require_quorum(job: Job, round_: int, updates: dict[str, Arrays], drops: list[Drop]) -> None:
    quorum = job.study.aggregation.quorum
    if len(updates) < quorum:
        reasons = "; ".join(f"{drop.site}: {drop.reason}" for drop in drops[:5])
        raise QuorumError(
            f"round {round_}: {len(updates)} valid releases, aggregation.quorum is {quorum} "
            f"({reasons}); the rounds before are kept in {job.checkpoint.name}"
        )


def _message(envelope: Envelope, node: int, kind: str, group: str) -> Message:
    return Message(messages.to_record(envelope), node, kind, group_id=group)
