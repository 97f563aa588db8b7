"""One simulated federation: real coordinator, vaults and ledgers, on one of two engines.

`inprocess` has all sites answered in this process; `ray` spreads them over processes, for many
cores or a cluster. Both run the same questions and answers through the same code.
"""

import contextlib
import ctypes
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from veilgraft.chain import ChainError
from veilgraft.errors import InputError
from veilgraft.messages import Envelope
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.release import answers
from veilgraft_client.vault import Vault
from veilgraft_deploy.inprocess import Answers, InProcess
from veilgraft_deploy.population import Population
from veilgraft_deploy.progress import Silent, Watcher, noted
from veilgraft_server import checkpoint, evaluation
from veilgraft_server.app import Job, public_generator
from veilgraft_server.app import run as conduct
from veilgraft_server.carrier import Answer, Letter
from veilgraft_server.checkpoint import Progress, Round

SWITCH_SECONDS = 1e-5
REACH_SECONDS = 10.0
"""In which a Ray cluster must take a connection."""

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


def check_engine(run: Run) -> None:
    """Raise `InputError` where nothing is at a Ray cluster's address; Ray would try for minutes."""
    address = run.ray_address
    if address is None:
        return
    if run.engine != "ray":
        raise InputError(f"--ray-address: expected --engine ray, got {run.engine}")
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ray-address: expected HOST:PORT of a running Ray cluster, got {address}: {error}"
        ) from error


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
    vaults = _approved(run, ledger, population)
    prepare(run, vaults)

    def answer(asked: Sequence[Letter]) -> Sequence[Envelope]:
        return answers([(vaults[letter.node], letter.envelope) for letter in asked])

    with one_thread():
        # One synced transaction for all that is answered at once, which ends before it leaves.
        _converse(run, job, ledger, population, answer, ledger.transaction)
    ledger.close()


def _approved(run: Run, ledger: Ledger, population: Population) -> list[Vault]:
    """Return the vaults of all sites, of which none has granted the study unless all have."""
    vaults = [vault_of(run, ledger, population, index) for index in range(len(population.sites))]
    with ledger.transaction():
        for vault in vaults:
            vault.approve(run.study)
    return vaults


def prepare(run: Run, vaults: Iterable[Vault]) -> None:
    """Have all that is trained with at hand, and this process' memory set up for training."""
    _allocate(mapped_from=2**16)
    for vault in vaults:
        vault.prepare(run.study)
    _allocate(mapped_from=2**25, kept=2**28)


def _converse(
    run: Run,
    job: Job,
    ledger: Ledger,
    population: Population,
    answer: Answers,
    scope: Callable[[], AbstractContextManager[None]],
) -> None:
    """Run the job's rounds; `scope` is entered around each use of `answer`."""
    # A public run's ledger is its own, and releases up to here are nobody's any more: first noted,
    # then, with the next write, let go. That of private records gives another run the same bytes.
    settled = gone = ledger.last()

    def tell(round_: Round) -> None:
        nonlocal settled
        if run.study.simulation.data_is_public:
            settled = ledger.last()
        job.tell(round_)

    def answered(asked: Sequence[Letter]) -> Sequence[Answer]:
        nonlocal gone
        with scope():
            if gone < settled:
                ledger.let_go(gone, settled)
                gone = settled
            return answer(asked)

    conduct(replace(job, tell=tell), InProcess(answered, len(population.sites)))


@contextmanager
def one_thread() -> Iterator[None]:
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
    # Not at the top: Ray takes a second, which nobody else need wait.
    from veilgraft_deploy import blocks

    ledger = Ledger(run.ledger)
    _approved(run, ledger, population)
    with blocks.opened(run, population) as answer:
        _converse(run, job, ledger, population, answer, contextlib.nullcontext)
    ledger.close()


def vault_of(run: Run, ledger: Ledger, population: Population, index: int) -> Vault:
    """Return the vault of the site with this index."""
    cohort = population.of(index)
    return Vault(population.sites[index], ledger, lambda _: cohort, seed=run.seed)
