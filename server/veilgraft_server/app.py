"""The coordinator's Flower `ServerApp`: asks the sites, round by round, and keeps the books.

The arithmetic of a round is `rounds.py`'s; here are the messages, the quorum and the checkpoint.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from veilgraft import messages
from veilgraft.errors import MessageError, QuorumError
from veilgraft.messages import Envelope, Hello, Refused, Request
from veilgraft.model import head as heads
from veilgraft.model.head import Arrays
from veilgraft.model.score import Score
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_server import checkpoint, rounds
from veilgraft_server.aggregation import largest_norm, validated
from veilgraft_server.checkpoint import Drop, Round

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the head, and so of every release."""
        return heads.shapes(self.study.head, self.dim, len(self.study.task.labels))


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
        state, history = checkpoint.load(job.checkpoint, study.digest)
    else:
        state, history = rounds.init(study, job.dim, job.generator), ()
        checkpoint.save(job.checkpoint, study.digest, state, history)
    sites = _sites(job, grid) if state.round < study.training.rounds else {}
    while state.round < study.training.rounds:
        started = time.perf_counter()
        updates, drops = _collect(job, grid, sites, state)
        _require_quorum(job, state.round + 1, updates, drops)
        state = rounds.apply(study, state, updates)
        score = job.evaluate(rounds.model(state))
        state = rounds.observe(study, state, score.accuracy if score else None)
        seconds = time.perf_counter() - started
        history = (*history, _round(study, state, updates, drops, score, seconds))
        checkpoint.save(job.checkpoint, study.digest, state, history)
        job.tell(history[-1])


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


def _collect(
    job: Job, grid: Grid, sites: dict[int, str], state: rounds.State
) -> tuple[dict[str, Arrays], list[Drop]]:
    """Ask every site for one release; return the valid ones, and why others did not count."""
    payload = messages.pack(state.head)
    head = messages.digest(payload)
    requests = {
        node: Request(
            site=site,
            study=job.study.digest,
            run=job.run,
            round=state.round + 1,
            head=head,
            rate=rounds.rate(job.study, state),
        ).encode()
        for node, site in sites.items()
    }
    outgoing = [
        _message(Envelope(header, payload), node, MessageType.TRAIN, str(state.round + 1))
        for node, header in requests.items()
    ]
    updates: dict[str, Arrays] = {}
    drops: dict[str, str] = {}
    for reply in grid.send_and_receive(outgoing, timeout=job.study.aggregation.timeout):
        node = reply.metadata.src_node_id
        site = sites.get(node)
        if site is None or site in updates:
            continue
        try:
            updates[site] = _update(job, site, requests[node], reply)
        except MessageError as error:
            drops[site] = str(error)
            log.warning("%s: dropped: %s", site, error)
    for site in set(sites.values()) - set(updates) - set(drops):
        drops[site] = "no answer"
    return updates, [Drop(site, reason) for site, reason in sorted(drops.items())]


def _update(job: Job, site: str, request: bytes, reply: Message) -> Arrays:
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
    return validated(envelope.payload, job.shapes, largest_norm(job.study, job.shapes))


def _require_quorum(job: Job, round_: int, updates: dict[str, Arrays], drops: list[Drop]) -> None:
    quorum = job.study.aggregation.quorum
    if len(updates) < quorum:
        reasons = "; ".join(f"{drop.site}: {drop.reason}" for drop in drops[:5])
        raise QuorumError(
            f"round {round_}: {len(updates)} valid releases, aggregation.quorum is {quorum} "
            f"({reasons}); the rounds before are kept in {job.checkpoint.name}"
        )


def _round(
    study: Study,
    state: rounds.State,
    updates: dict[str, Arrays],
    drops: list[Drop],
    score: Score | None,
    seconds: float,
) -> Round:
    return Round(
        round=state.round,
        accuracy=score.accuracy if score else None,
        loss=score.loss if score else None,
        epsilon=plan(study).epsilon(state.round),
        sites=len(updates),
        dropped=len(drops),
        seconds=seconds,
        drops=tuple(drops),
    )


def _message(envelope: Envelope, node: int, kind: str, group: str) -> Message:
    return Message(messages.to_record(envelope), node, kind, group_id=group)
