"""Sites of a simulation, dealt into blocks on Ray: one block a core, each a process.

Ray alone carries the questions, not Flower's simulation engine: that gives a message to whichever
process is free, so that each comes to hold every site's features, and looks for answers ten times
a second. A block holds its own sites for the whole run, and answers for all of them at once, by
the same `answers` as a simulation in one process.

One process, on the machine that started the run, writes the ledger for all blocks: SQLite's log
can't be shared between machines. A block reserves in one synced write, computes, and commits in
synced writes before its answers leave. If a process dies its block is started again and asked
again, which pays as any site's restart does.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from veilgraft.errors import InputError, VeilgraftError
from veilgraft.messages import Envelope
from veilgraft_client.ledger import Ledger
from veilgraft_client.release import answers
from veilgraft_deploy.federation import Run, one_thread, prepare, vault_of
from veilgraft_deploy.inprocess import Answers
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent
from veilgraft_server.carrier import Answer, Letter, MissingError

log = logging.getLogger(__name__)


class Block:
    """Some sites, whose questions are answered together.

    Args:
        books: the name of the process that writes the ledger.
        shared: the file of all sites' features.
        sites: the indices of those that are this block's.
    """

    def __init__(self, run: Run, books: str, shared: Path, sites: Sequence[int]) -> None:
        population, ledger = Population.load(shared), cast(Ledger, _Books(books))
        self._vaults = {index: vault_of(run, ledger, population, index) for index in sites}
        for vault in self._vaults.values():
            vault.approve(run.study)
        prepare(run, self._vaults.values())

    def answer(self, asked: Sequence[tuple[int, Envelope]]) -> list[Envelope]:
        """Answer one question to each of some sites."""
        with one_thread():
            return answers([(self._vaults[site], envelope) for site, envelope in asked])


class _Books:
    """A ledger that another process writes."""

    def __init__(self, name: str) -> None:
        self._actor = ray.get_actor(name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)
        return lambda *values, **named: ray.get(method.remote(*values, **named))


@contextmanager
def opened(run: Run, population: Population) -> Iterator[Answers]:
    """Deal the sites into as many blocks as the cluster has cores; give what has them answer.

    A block that can't answer leaves an error for each of its sites.

    Raises:
        InputError: no cluster is at the address.
        VeilgraftError: a block can't be started.
    """
    _connect(run.ray_address)
    sites = len(population.sites)
    cores = sum(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
    count = min(sites, max(1, cores))
    # Processes of Ray's start in another folder.
    there = replace(run, out=run.out.resolve(), state=run.state.resolve(), watcher=Silent())
    token = secrets.token_hex(8)
    shared, books = there.state / f"population-{token}.safetensors", f"ledger-{token}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    write = ray.remote(num_cpus=0, name=books, scheduling_strategy=here)(Ledger).remote
    writer = write(there.ledger, exists=True)
    make = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=1)(Block).remote
    blocks: list[Any] = []
    try:
        population.save(shared)
        blocks += [make(there, books, shared, range(n, sites, count)) for n in range(count)]
        _wait(blocks)
        yield partial(_answered, blocks)
    finally:
        for actor in (*blocks, writer):
            ray.kill(actor)
        shared.unlink(missing_ok=True)


def _connect(address: str | None) -> None:
    if ray.is_initialized():
        # It stays until this process ends: a sweep's next point uses it again.
        return
    settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address or "local", **settings)
    except ConnectionError as error:
        raise InputError(f"--ray-address: {address}: {error}") from error


def _wait(blocks: Sequence[Any]) -> None:
    """Return when all blocks have started."""
    try:
        ray.get([block.__ray_ready__.remote() for block in blocks])
    except RayError as error:
        *_, reason = str(error).strip().splitlines()
        raise VeilgraftError(f"Ray can't start a block of sites: {reason}") from error


def _answered(blocks: Sequence[Any], asked: Sequence[Letter]) -> list[Answer]:
    dealt = [
        [letter for letter in asked if letter.node % len(blocks) == number]
        for number in range(len(blocks))
    ]
    replies = [
        block.answer.remote([(letter.node, letter.envelope) for letter in letters])
        for block, letters in zip(blocks, dealt, strict=True)
    ]
    ray.wait(replies, num_returns=len(replies), timeout=min(each.seconds for each in asked))
    found: dict[int, Answer] = {}
    for letters, reply in zip(dealt, replies, strict=True):
        contents = _contents(reply, len(letters))
        found |= {letter.node: each for letter, each in zip(letters, contents, strict=True)}
    return [found[letter.node] for letter in asked]


def _contents(reply: Any, count: int) -> Sequence[Answer]:
    try:
        contents: list[Envelope] = ray.get(reply, timeout=0)
    except RayError as error:
        log.warning("%d sites gave no answer: %s", count, type(error).__name__)
        return [MissingError("no answer from its block of sites")] * count
    return contents
