"""One simulated federation: real coordinator, vaults and ledgers, on one of two engines.

`inprocess` asks the vaults directly, one process; `ray` is Flower's own engine, for many cores or
a cluster. Both run the same questions and answers through the same code.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context

from veilgraft.chain import ChainError
from veilgraft.messages import Envelope
from veilgraft.study import Study
from veilgraft_client.app import client_app
from veilgraft_client.ledger import Ledger
from veilgraft_client.release import answers
from veilgraft_client.vault import Vault
from veilgraft_deploy.inprocess import InProcess
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent, Watcher, noted
from veilgraft_server import checkpoint, evaluation
from veilgraft_server.app import Job, public_generator, server_app
from veilgraft_server.app import run as conduct
from veilgraft_server.checkpoint import Progress, Round

SWITCH_SECONDS = 1e-5

Engine = Literal["inprocess", "ray"]

# From glibc's malloc.h; other C libraries have no `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Run:
    """One federation to be simulated: which study, where it is kept, how it is run.

    Attributes:
        out: the run folder.
        state: where features are kept.
        seed: makes noise reproducible, and the run not private.
        ray_address: of a running Ray cluster; None starts Ray on this machine.
    """

    study: Study
    out: Path
    state: Path
    label: str = "private federation"
    engine: Engine = "inprocess"
    seed: int | None = None
    ray_address: str | None = None
    watcher: Watcher = field(default_factory=Silent)

    @property
    def ledger(self) -> Path:
        """All simulated sites' ledgers, one file.

        That of private records lies with what else is kept of them, and outlives the run.
        """
        public = self.study.simulation.data_is_public
        return (self.out if public else self.state) / "ledger.db"

    @property
    def checkpoint(self) -> Path:
        """The coordinator's state."""
        return self.out / "checkpoint.safetensors"


def federate(run: Run, population: Population) -> Progress:
    """Run all rounds that the run's checkpoint does not hold; return where they led.

    Raises:
        RefusedError: a site's limits say no.
        QuorumError: too few sites gave a valid release.
    """
    _check_ledger(run, population)
    _run(run, population, run.checkpoint, lambda _: None)
    return checkpoint.load(run.checkpoint, run.study.digest)


def rehearse(run: Run, population: Population) -> tuple[Round, ...]:
    """Run all rounds and return them, as `federate` does, and keep no checkpoint.

    For runs of which nothing but their figures is wanted: to sync the state after each round was
    an eighth of their time.

    Raises:
        RefusedError: a site's limits say no.
        QuorumError: too few sites gave a valid release.
    """
    history: list[Round] = []
    _run(run, population, None, history.append)
    return tuple(history)


def _run(
    run: Run, population: Population, kept: Path | None, tell: Callable[[Round], None]
) -> None:
    rounds = run.study.training.rounds

    def told(round_: Round) -> None:
        tell(round_)
        run.watcher.step(run.label, round_.round, rounds, noted(round_))

    job = Job(
        study=run.study,
        run=secrets.token_hex(8),
        dim=population.dim,
        checkpoint=kept,
        generator=public_generator(run.study),
        evaluate=evaluation.scorer(run.study, population.test),
        tell=told,
    )
    engine = _in_process if run.engine == "inprocess" else _ray
    engine(run, job, population)


def _check_ledger(run: Run, population: Population) -> None:
    """Raise `ChainError` unless the chain fits and holds all that the checkpoint does."""
    history: Sequence[Round] = ()
    if run.checkpoint.exists():
        history = checkpoint.load(run.checkpoint, run.study.digest).history
    if history or run.ledger.exists():
        with contextlib.closing(Ledger(run.ledger, exists=True)) as ledger:
            ledger.verify(let_go=True)
            _check_paid(run, ledger, population, history)


def _check_paid(run: Run, ledger: Ledger, population: Population, history: Sequence[Round]) -> None:
    dropped = Counter(drop.site for round_ in history for drop in round_.drops)
    for site in population.sites:
        paid = ledger.paid(site.site, run.study.digest)
        released = len(history) - dropped[site.site]
        if paid < released:
            raise ChainError(
                f"{run.ledger}: holds {paid} rounds of {site.site}, and the checkpoint "
                f"{released}; entries are lost"
            )


def _in_process(run: Run, job: Job, population: Population) -> None:
    ledger = Ledger(run.ledger)
    # A public run's ledger is its own, and releases up to here are nobody's any more: first noted,
    # then, with the next write, let go. That of private records gives another run the same bytes.
    settled = gone = ledger.last()

    def tell(round_: Round) -> None:
        nonlocal settled
        if run.study.simulation.data_is_public:
            settled = ledger.last()
        job.tell(round_)

    vaults = [_vault(run, ledger, population, index) for index in range(len(population.sites))]
    with ledger.transaction():
        for vault in vaults:
            vault.approve(run.study)
    _allocate(mapped_from=2**16)
    for vault in vaults:
        vault.prepare(run.study)

    def answer(asked: Sequence[tuple[int, Envelope]]) -> Sequence[Envelope]:
        nonlocal gone
        # One synced transaction for all of them, which ends before they leave.
        with ledger.transaction():
            if gone < settled:
                ledger.let_go(gone, settled)
                gone = settled
            return answers([(vaults[node], envelope) for node, envelope in asked])

    _allocate(mapped_from=2**25, kept=2**28)
    with _one_thread():
        conduct(replace(job, tell=tell), InProcess(answer, len(vaults)))
    ledger.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train heads on one thread each: they are so small that threads cost more than they do.

    Many sites are trained on several threads all the same, group by group. Between two of torch's
    short operations each of them waits for Python's lock, by default for up to 5 ms.
    """
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)


def _allocate(mapped_from: int, kept: int = 2**17) -> None:
    """Tell glibc which sizes are mapped from the kernel one by one, and how much freed is kept.

    Of each site's features a little is made for good, and much that goes at once. Unless mapped, it
    went from between the little, and left holes too small for the next site's: as much again as
    the features, and more. A round frees tensors of megabytes, and the next takes as many: mapped,
    each came as fresh, zeroed pages, a third of a run's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mapped_from)
        mallopt(_M_TRIM_THRESHOLD, kept)


def _ray(run: Run, job: Job, population: Population) -> None:
    from flwr.simulation import run_simulation

    ledger = Ledger(run.ledger)
    with ledger.transaction():
        for index in range(len(population.sites)):
            _vault(run, ledger, population, index).approve(run.study)
    ledger.close()
    shared = run.state.resolve() / f"population-{secrets.token_hex(8)}.safetensors"
    population.save(shared)
    study = run.study.model_dump(mode="json")
    # Workers start in another folder.
    places = {
        "out": str(run.out.resolve()),
        "population": str(shared),
        "state": str(run.state.resolve()),
    }
    facts = {**places, "seed": run.seed, "study": study}
    logging.getLogger("flwr").setLevel(logging.ERROR)
    init = {"include_dashboard": False, "log_to_driver": False}
    try:
        run_simulation(
            server_app=server_app(job),
            client_app=client_app(functools.partial(_remote_vault, json.dumps(facts))),
            num_supernodes=len(population.sites),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {**init, **_ray_place(run)},
            },
        )
    finally:
        shared.unlink(missing_ok=True)


def _ray_place(run: Run) -> dict[str, str | int]:
    if run.ray_address is not None:
        return {"address": run.ray_address}
    return {"num_cpus": os.cpu_count() or 1}


def _remote_vault(facts: str, context: Context) -> Vault:
    """Find a node's vault in a Ray worker, which may be on another machine with the same files."""
    return _opened(facts, int(context.node_config["partition-id"]))


@functools.lru_cache(maxsize=4096)
def _opened(facts: str, index: int) -> Vault:
    run, ledger, population = _shared(facts)
    vault = _vault(run, ledger, population, index)
    vault.approve(run.study)
    return vault


@functools.lru_cache(maxsize=1)
def _shared(facts: str) -> tuple[Run, Ledger, Population]:
    values = json.loads(facts)
    study = Study.parse(values["study"], name="study")
    run = Run(study, Path(values["out"]), Path(values["state"]), engine="ray", seed=values["seed"])
    population = Population.load(Path(values["population"]))
    return run, Ledger(run.ledger), population


def _vault(run: Run, ledger: Ledger, population: Population, index: int) -> Vault:
    cohort = population.of(index)
    return Vault(population.sites[index], ledger, lambda _: cohort, seed=run.seed)
