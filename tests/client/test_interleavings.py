"""The rules of release hold in any interleaving of processes, faults and restarts.

Hypothesis drives real vaults, each in a thread that stands for a process, on one real ledger on a
disk that fails. What ever left, and what was ever computed, is compared with the ledger.
"""

import hashlib
import itertools
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.client.faulty_disk import FaultyDisk, ProcessDied, why_unavailable

from veilgraft import messages
from veilgraft.chain import Entry
from veilgraft.errors import Refusal, VeilgraftError
from veilgraft.messages import Envelope, Refused, Request
from veilgraft.model import head as heads
from veilgraft.model.features import Cohort, units
from veilgraft.plan import plan
from veilgraft.privacy import accounting
from veilgraft.study import Study
from veilgraft_client.ledger import Ledger
from veilgraft_client.policy import Site
from veilgraft_client.training import Trainer
from veilgraft_client.vault import Vault

SITE, DIM, UNITS, ROUNDS, PROCESSES, DELTA = "a", 2, 4, 3, 3, 1e-5
SHARED_MEMORY = Path("/dev/shm")
T = TypeVar("T")


class Key(NamedTuple):
    """What names a release at this site."""

    study: str
    round: int
    head: str


# Studies, site, vault, requests.


def study(sigma: float) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b"]},
        "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
        "privacy": {"noise_multiplier": sigma},
        "training": {"algorithm": "dp-gd", "rounds": ROUNDS, "learning_rate": 1.0},
    }
    return Study.parse(values, name="study.yaml")


STUDIES = {each.digest: each for each in (study(5.0), study(7.0))}


def site(folder: Path) -> Site:
    values: dict[str, Any] = {
        "site": SITE,
        "data": {"path": folder / "records.csv"},
        "units": UNITS,
        "limits": {"max_epsilon": 50.0},
        "state": folder / "state",
    }
    return Site.parse(values, name="site.yaml")


def cohort(_: Study) -> Cohort:
    whole = units(np.ones((UNITS, DIM), np.float32), torch.tensor([0, 1, 0, 1]))
    return Cohort(training=whole, held_out=whole.select(slice(0)))


def vault(folder: Path) -> Vault:
    """Return a vault whose studies are approved."""
    own = Vault(site(folder), Ledger(folder / "ledger.db"), cohort)
    try:
        for each in STUDIES.values():
            own.approve(each)
    except BaseException:
        own.ledger.close()
        raise
    return own


def head(fill: float, dim: int = DIM) -> bytes:
    shapes = heads.shapes(next(iter(STUDIES.values())).head, dim, 2)
    return messages.pack({name: np.full(shape, fill) for name, shape in shapes.items()})


HEADS = {messages.digest(payload): payload for payload in (head(0.0), head(1.0))}


def request(key: Key, **changes: Any) -> Envelope:
    values = {"site": SITE, "run": "r", "rate": 0.1, **key._asdict()}
    payload = changes.pop("payload", HEADS[key.head])
    return Envelope(Request.model_validate(values | changes).encode(), payload)


def refused(answer: Envelope) -> Refusal | None:
    decoded = messages.decode_answer(answer.header)
    return decoded.code if isinstance(decoded, Refused) else None


KEYS = [Key(*each) for each in itertools.product(STUDIES, range(1, ROUNDS + 1), HEADS)]
FIRST = KEYS[0]
BAD = {
    "a head that the header does not pin": request(FIRST, payload=head(2.0)),
    "a head that is not finite": request(
        FIRST, head=messages.digest(head(float("nan"))), payload=head(float("nan"))
    ),
    "a head of another shape": request(
        FIRST, head=messages.digest(head(0.0, DIM + 1)), payload=head(0.0, DIM + 1)
    ),
    "a round behind the last": request(FIRST, round=ROUNDS + 1),
    "a study that nobody approved": request(FIRST, study="sha256:" + "f" * 64),
    "a rate above the study's": request(FIRST, rate=2.0),
    "no request": Envelope(b"{}", b""),
}


# What the ledger's entries say.


def key_of(entry: Entry) -> Key:
    return Key(entry.study, entry.body["round"], entry.body["head"])


def of_kind(entries: list[Entry], kind: str) -> list[Entry]:
    return [entry for entry in entries if entry.kind == kind]


def followed(entries: list[Entry], kind: str) -> set[int]:
    """Return the reservations that have a commit, or a retry."""
    return {entry.body["reservation"] for entry in of_kind(entries, kind)}


def verdict(entries: list[Entry], key: Key) -> Refusal | None:
    """Return what the rules of release say to a request, by what the ledger holds."""
    paid = [entry for entry in of_kind(entries, "reserve") if entry.study == key.study]
    held = [entry for entry in paid if entry.body["round"] == key.round]
    if any(key_of(entry) != key for entry in held):
        return Refusal.ROUND_CONFLICT
    if any(entry.seq in followed(entries, "commit") for entry in held):
        return None
    if held and held[-1].seq not in followed(entries, "retry"):
        return None
    return None if len(paid) < ROUNDS else Refusal.UNAVAILABLE


@cache
def price(releases: tuple[int, ...]) -> float:
    """Return ε of so many releases of each study."""
    events = [
        plan(each).update
        for each, count in zip(STUDIES.values(), releases, strict=True)
        for _ in range(count)
    ]
    return accounting.epsilon([event for event in events if event], DELTA) if events else 0.0


class Process:
    """A vault on its own open ledger, in a thread of its own.

    Where it computes, it may be held until it is told to go on, or killed.

    Args:
        pages: so many fill a log, and go to the database, as many releases' would.
    """

    here = threading.local()

    def __init__(self, disk: FaultyDisk, computed: Counter[Key], pages: int) -> None:
        self.disk = disk
        self._pages = pages
        self._connections: list[sqlite3.Connection] = []
        self.held: Key | None = None
        self._computed = computed
        self._key: Key | None = None
        self._hold = False
        self._vault: Vault | None = None
        self._reports: SimpleQueue[bool] = SimpleQueue()
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._answer: Future[Envelope | None] = Future()
        self._thread = ThreadPoolExecutor(1, initializer=self._begin)

    def _begin(self) -> None:
        self.here.process = self

    def do(self, work: Callable[[], T]) -> T:
        """Return what the process finds."""
        return self._thread.submit(work).result()

    def open(self) -> str | None:
        """Open the ledger and approve the studies; return what went wrong."""
        return self.do(self._open)

    def _open(self) -> str | None:
        try:
            self._vault = vault(self.disk.folder)
            self._vault.ledger.verify()
        except (VeilgraftError, ProcessDied) as error:
            return repr(error)
        return None

    @property
    def ledger(self) -> Ledger:
        assert self._vault is not None
        return self._vault.ledger

    def entries(self) -> list[Entry]:
        return self.do(lambda: list(self.ledger.entries(SITE)))

    def ask(self, key: Key, envelope: Envelope, hold: bool = False) -> Envelope | None:
        """Return the answer; None where the process is held, or has died."""
        self._key, self._hold = key, hold
        self._answer = self._thread.submit(self._handle, envelope)
        return self._outcome(key)

    def resume(self) -> Envelope | None:
        """Go on computing; return the answer, or None where the process has died."""
        key, self.held = self.held, None
        assert key is not None
        self._orders.put(True)
        return self._outcome(key)

    def _outcome(self, key: Key) -> Envelope | None:
        if self._reports.get():
            return self._answer.result() if self.alive else None
        self.held = key
        return None

    def _handle(self, envelope: Envelope) -> Envelope | None:
        assert self._vault is not None
        try:
            return self._vault.handle(envelope)
        except ProcessDied:
            return None
        finally:
            self._reports.put(True)

    def computing(self) -> None:
        """Count what is computed; called by the process itself."""
        # SQLite says nothing of a fault in a checkpoint, but who died in it computes no more.
        self.disk.check_alive()
        assert self._key is not None
        self._computed[self._key] += 1
        if self._hold:
            self._reports.put(False)
            if not self._orders.get():
                raise ProcessDied

    @property
    def alive(self) -> bool:
        return self.do(lambda: self.disk.alive)

    def kill(self) -> None:
        """End it where it is; nothing more is written."""
        if self.held is not None:
            self._orders.put(False)
        self.do(self.disk.kill)
        self.stop()

    def stop(self) -> None:
        """End it in peace."""
        self.do(self._exit)
        self._thread.shutdown()

    def opened(self, connection: sqlite3.Connection) -> None:
        """Note what ends with the process; called by the process itself."""
        connection.execute(f"PRAGMA wal_autocheckpoint = {self._pages}")
        self._connections.append(connection)

    def _exit(self) -> None:
        if self._vault is not None:
            self._vault.ledger.close()
        for connection in self._connections:
            connection.close()


def pretend(patch: pytest.MonkeyPatch, disk: FaultyDisk) -> None:
    """Let processes notice what they compute and open, and let the dead link no file."""
    update, link, connect = Trainer.update, os.link, sqlite3.connect

    def noticed(self: Trainer, *args: Any) -> Any:
        Process.here.process.computing()
        return update(self, *args)

    def linked(*args: Any) -> None:
        disk.check_alive()
        link(*args)

    def connected(*args: Any, **options: Any) -> sqlite3.Connection:
        made: sqlite3.Connection = connect(*args, **options)
        Process.here.process.opened(made)
        return made

    patch.setattr(Trainer, "update", noticed)
    patch.setattr("os.link", linked)
    patch.setattr("sqlite3.connect", connected)


@contextmanager
def memory_folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which operation from now."""

    kind: str
    after: int
    length: int
    times: int
    machine: bool

    def __call__(self, disk: FaultyDisk) -> None:
        match self.kind:
            case "io":
                disk.io(self.after)
            case "full":
                disk.full(self.after, self.times)
            case "torn":
                disk.torn(self.after, self.length, machine=self.machine)
            case "crash":
                disk.crash(self.after, machine=self.machine)


faults = st.builds(
    Fault,
    st.sampled_from(["io", "full", "torn", "crash"]),
    after=st.integers(1, 12) | st.integers(1, 40),
    length=st.integers(0, 4096),
    times=st.integers(1, 4),
    machine=st.booleans(),
)
maybe_a_fault = st.none() | faults
indices = st.integers(0, PROCESSES - 1)
counts = st.sampled_from([PROCESSES, PROCESSES, 2, 1])


class Interleavings(RuleBasedStateMachine):
    """One site, whose processes start, ask, stop and die on one disk."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.folder = memory_folder()
        self.disk = FaultyDisk(self.folder.__enter__())
        self.disk.__enter__()
        pretend(self.patch, self.disk)
        self.processes: list[Process] = []
        self.left: dict[Key, bytes] = {}
        self.computed: Counter[Key] = Counter()
        self.pages = 0
        self.dark = False

    @property
    def idle(self) -> list[Process]:
        return [process for process in self.processes if process.held is None]

    @property
    def held(self) -> list[Process]:
        return [process for process in self.processes if process.held is not None]

    # What processes do.

    @initialize(pages=st.sampled_from([1000, 8]), count=counts, fault=maybe_a_fault)
    def first_begin(self, pages: int, count: int, fault: Fault | None) -> None:
        self.pages = pages
        self.begin(count, fault)

    def begin(self, count: int, fault: Fault | None) -> None:
        for each in (fault, None, None)[:count]:
            if not self.dark:
                self.start(each)

    @precondition(lambda self: not self.dark and len(self.processes) < PROCESSES)
    @rule(fault=maybe_a_fault)
    def start(self, fault: Fault | None) -> None:
        self.strike(fault)
        process = Process(self.disk, self.computed, self.pages)
        self.processes.append(process)
        wrong = process.open()
        assert fault or not wrong, wrong
        if wrong and process.alive:
            self.processes.remove(process)
            process.stop()
        self.bury()

    @precondition(lambda self: self.idle)
    @rule(
        index=indices,
        key=st.sampled_from(KEYS),
        attempt=st.integers(1, 3),
        hold=st.booleans(),
        fault=maybe_a_fault,
    )
    def ask(
        self, index: int, key: Key, attempt: int, hold: bool, fault: Fault | None = None
    ) -> None:
        process = self.idle[index % len(self.idle)]
        expected = verdict(process.entries(), key)
        self.strike(fault)
        answer = process.ask(key, request(key, run=f"r{attempt}", attempt=attempt), hold)
        if fault is None and process.held is None:
            assert answer is not None
            assert refused(answer) == expected
        self.received(key, answer)

    @precondition(lambda self: self.held)
    @rule(index=indices, fault=maybe_a_fault)
    def resume(self, index: int, fault: Fault | None) -> None:
        self.go_on(self.held[index % len(self.held)], fault)

    def go_on(self, process: Process, fault: Fault | None) -> None:
        key = process.held
        assert key is not None
        self.strike(fault)
        answer = process.resume()
        assert fault or (answer is not None and refused(answer) is None)
        self.received(key, answer)

    @precondition(lambda self: self.idle)
    @rule(
        key=st.sampled_from(KEYS),
        held=st.integers(0, PROCESSES),
        order=st.lists(indices, unique=True),
        fault=maybe_a_fault,
    )
    def race(self, key: Key, held: int, order: list[int], fault: Fault | None) -> None:
        """Let all compute one key, the first few of them held, and some of those go on."""
        racers = list(self.idle)
        for number in range(len(racers)):
            self.ask(self.idle.index(racers[number]), key, 1, number < held)
        for number in order:
            if number < len(racers) and racers[number] in self.held:
                self.go_on(racers[number], fault)
                fault = None

    @precondition(lambda self: self.idle)
    @rule(index=indices, what=st.sampled_from(sorted(BAD)))
    def ask_for_what_is_wrong(self, index: int, what: str) -> None:
        process = self.idle[index % len(self.idle)]
        before = process.entries()
        answer = process.ask(FIRST, BAD[what])
        assert answer is not None
        assert refused(answer) in {
            Refusal.HEAD_INVALID,
            Refusal.REQUEST_INVALID,
            Refusal.STUDY_NOT_APPROVED,
        }
        assert process.entries() == before

    @precondition(lambda self: self.idle)
    @rule(index=indices, which=st.sampled_from(list(STUDIES)), run=st.integers(1, 3))
    def start_a_study_again(self, index: int, which: str, run: int) -> None:
        for round_ in range(1, ROUNDS + 1):
            self.ask(index, Key(which, round_, FIRST.head), run, hold=False)

    # What befalls them.

    @precondition(lambda self: self.processes)
    @rule(
        index=indices,
        how=st.sampled_from(["stop", "kill", "kill", "power fails"]),
        fault=maybe_a_fault,
    )
    def end(self, index: int, how: str, fault: Fault | None) -> None:
        process = self.processes[index % len(self.processes)]
        if how == "power fails":
            self.disk.cut()
        elif how == "kill" or process.held is not None:
            self.processes.remove(process)
            process.kill()
        else:
            self.processes.remove(process)
            self.strike(fault)
            process.stop()
        self.bury()

    @precondition(lambda self: self.dark)
    @rule(data=st.data(), count=counts)
    def power_returns(self, data: st.DataObject, count: int) -> None:
        self.disk.power_loss(lambda n: data.draw(st.integers(0, n - 1)))
        self.dark = False
        self.begin(count, None)

    def strike(self, fault: Fault | None) -> None:
        if fault is not None:
            fault(self.disk)

    def bury(self) -> None:
        """Take back a fault that did not come, and notice who has died by now."""
        self.disk.lift()
        self.dark = not self.disk.alive
        for process in list(self.processes):
            if self.dark or (process.held is None and not process.alive):
                self.processes.remove(process)
                process.kill()

    # What must hold.

    def received(self, key: Key, answer: Envelope | None) -> None:
        """Hold every release against all that ever left."""
        if answer is not None and refused(answer) is None:
            assert self.left.setdefault(key, answer.payload) == answer.payload
            other = {k.head for k in self.left if k[:2] == key[:2]}
            assert other == {key.head}, "one round left for two heads"
        self.bury()

    @invariant()
    def the_ledger_is_never_below_the_truth(self) -> None:
        if not self.idle:
            return
        process = self.idle[0]
        entries = process.entries()
        process.do(process.ledger.verify)
        self.what_left_is_stored(entries)
        self.what_was_computed_is_paid(entries)
        reserved = Counter(entry.study for entry in of_kind(entries, "reserve"))
        assert all(count <= ROUNDS for count in reserved.values())
        left = Counter(key.study for key in self.left)
        truth = price(tuple(left[study] for study in STUDIES))
        assert process.do(lambda: process.ledger.epsilon(SITE, DELTA)) >= truth

    def what_left_is_stored(self, entries: list[Entry]) -> None:
        reserved = {entry.seq: key_of(entry) for entry in of_kind(entries, "reserve")}
        stored = {
            reserved[entry.body["reservation"]]: entry.body["payload"]
            for entry in of_kind(entries, "commit")
        }
        assert len(stored) == len(of_kind(entries, "commit")), "a key was committed twice"
        for key, payload in self.left.items():
            assert stored[key] == hashlib.sha256(payload).hexdigest()

    def what_was_computed_is_paid(self, entries: list[Entry]) -> None:
        reserved = Counter(key_of(entry) for entry in of_kind(entries, "reserve"))
        retried = [entry.body["reservation"] for entry in of_kind(entries, "retry")]
        assert len(retried) == len(set(retried)), "a reservation was retried twice"
        by_seq = {entry.seq: key_of(entry) for entry in of_kind(entries, "reserve")}
        allowed = reserved + Counter(by_seq[seq] for seq in retried)
        assert self.computed <= allowed

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.all_is_well_in_the_end()
        finally:
            self.disk.lift()
            for process in self.processes:
                process.kill()
            self.patch.undo()
            self.disk.__exit__(None, None, None)
            self.folder.__exit__(None, None, None)

    def all_is_well_in_the_end(self) -> None:
        """No fault bricks a ledger: every round is answered as the rules say."""
        self.disk.lift()
        for process in self.processes:
            process.kill()
        self.processes.clear()
        self.disk.restart()
        self.dark = False
        self.start(None)
        for key in KEYS:
            self.ask(0, key, 1, hold=False)
        self.the_ledger_is_never_below_the_truth()


def run(examples: int, steps: int, **options: Any) -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Refusals by the thousand are not kept for pytest's report."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


faulty = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@faulty
def test_no_interleaving_of_200_breaks_a_rule_of_release() -> None:
    run(200, 20, derandomize=True)


@faulty
@pytest.mark.drill
def test_no_interleaving_of_10000_breaks_a_rule_of_release() -> None:
    run(10_000, 30, derandomize=False)


@faulty
@pytest.mark.parametrize("after", range(1, 41))
@pytest.mark.parametrize("kind", ["io", "full"])
def test_a_fault_while_a_ledger_is_made_leaves_none_or_a_whole_one(
    tmp_path: Path, kind: str, after: int
) -> None:
    path = tmp_path / "ledger.db"
    with FaultyDisk(tmp_path) as disk:
        Fault(kind, after, length=0, times=1, machine=True)(disk)
        with suppress(VeilgraftError):
            Ledger(path).close()
        disk.lift()
        with closing(Ledger(path)) as made:
            assert made.verify() == 1


@faulty
@pytest.mark.parametrize("after", range(1, 15))
def test_a_failed_sync_a_restart_and_a_loss_of_power_lose_no_release(
    tmp_path: Path, after: int
) -> None:
    asked, released = KEYS[::2][:2], []
    with FaultyDisk(tmp_path) as disk:
        own = vault(tmp_path)
        disk.io(after)
        assert refused(own.handle(request(asked[0]))) == Refusal.UNAVAILABLE
        restart(disk, own, disk.restart)
        own = vault(tmp_path)
        released = [own.handle(request(key)).payload for key in asked]
        restart(disk, own, lambda: disk.power_loss(lambda n: int(n == 4)))
        own = vault(tmp_path)
        assert [own.handle(request(key)).payload for key in asked] == released
        own.ledger.close()


def restart(disk: FaultyDisk, own: Vault, again: Callable[[], None]) -> None:
    """Kill the only process, and let another begin."""
    disk.kill()
    own.ledger.close()
    again()


def test_a_study_that_is_started_1000_times_costs_what_one_does(tmp_path: Path) -> None:
    contract, first = next(iter(STUDIES.values())), next(iter(HEADS))
    keys = [Key(contract.digest, round_, first) for round_ in range(1, ROUNDS + 1)]
    payloads = set()
    for _ in range(20):
        with closing(Ledger(tmp_path / "ledger.db")) as held:
            for _ in range(50):
                own = Vault(site(tmp_path), held, cohort)
                own.approve(contract)
                payloads.add(tuple(own.handle(request(key)).payload for key in keys))
            assert held.events(SITE) == [plan(contract).update] * ROUNDS
            assert held.epsilon(SITE, DELTA) == plan(contract).epsilon()
            held.verify()
    assert len(payloads) == 1
    assert all(payloads.pop())
