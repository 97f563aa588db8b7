"""The fault table: what is done to a federation, at which point of a round, and that it recovers.

Rows share a federation: each does its harm, and waits for the next round that counts. All sites
are its quorum, so that a round which one of them lost ends the run. At the end the head is that of
a simulation, which nothing befell, and every ledger has paid for every round once.

The drill writes down how long each took.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.system import faults
from tests.system.command import DEMO, veilgraft
from tests.system.faults import Step
from tests.system.federation import Federation

pytestmark = pytest.mark.skipif(
    not Path("/proc/sys/kernel/random/boot_id").exists(), reason="NOT TESTED: needs Linux"
)

SEED = 7
ROUNDS_A_ROW = 2
TRAINING = {
    "algorithm": "dp-sgd",
    "learning_rate": 0.5,
    "sample_rate": 0.1,
    "local_epochs": 20,
}
"""Some tenths of a second of work, so that a fault can be in its middle."""

TIMEOUT = 300.0


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        point: of a round, at which it is done.
        bound: seconds until the next finished round.
        retries: entries by which the first site's ledger grows, for what was paid and lost.
    """

    what: str
    at: str
    point: Step
    fault: Step
    bound: float = 240.0
    retries: int = 0
    drill: bool = True

    @property
    def name(self) -> str:
        return f"{self.what}: {self.at}"


BETWEEN = ("between rounds", faults.between_rounds)
ASKED = ("while the courier works", faults.asked)
RESERVED = ("between reserve and commit", faults.reserved)
COMMITTED = ("after commit, before the answer", faults.committed)
ANSWERED = ("before it sends the answer", faults.answered)
UPLOADING = ("while an answer is uploaded", faults.uploading)

ROWS = (
    Row("vault killed", *RESERVED, faults.killing("a/vault"), retries=1, drill=False),
    Row("SuperLink killed", *ASKED, faults.killing("superlink"), drill=False),
    Row("SuperNode killed", *ASKED, faults.killing("a/supernode"), drill=False),
    Row("vault killed", *ASKED, faults.killing("a/vault")),
    Row("vault killed", *COMMITTED, faults.killing("a/vault")),
    Row("SuperNode killed", *BETWEEN, faults.killing("a/supernode")),
    Row("SuperNode killed", *ANSWERED, faults.killing("a/supernode")),
    Row("SuperNode killed", *UPLOADING, faults.killing("a/supernode")),
    Row("site's executor killed", *ASKED, faults.killing("a/executor")),
    Row("ClientApp killed", *ASKED, faults.kill_client_app),
    Row("courier's supervisor killed", *ASKED, faults.killing("a/courier")),
    Row("site's supervisor killed", *ASKED, faults.restarting("a")),
    Row("SuperLink killed", *BETWEEN, faults.killing("superlink")),
    Row("SuperLink killed", *UPLOADING, faults.killing("superlink")),
    Row("coordinator's executor killed", *ASKED, faults.killing("executor")),
    Row("ServerApp killed", *ASKED, faults.kill_server_app),
    Row("edge killed", *ASKED, faults.killing("edge")),
    Row("edge killed", *UPLOADING, faults.killing("edge")),
    Row("coordinator's supervisor killed", *ASKED, faults.restarting("coordinator")),
    Row("coordinator's machine lost", *ASKED, faults.crashing("coordinator")),
    Row("site's machine lost", *ASKED, faults.crashing("a")),
    Row("all machines lost", *ASKED, faults.crashing("coordinator", "a", "b")),
    Row("network cut for 20 s", *ASKED, faults.cutting("a", 20)),
    Row("network cut for 100 s", *ASKED, faults.cutting("a", 100), bound=300),
)


@dataclass
class Shared:
    """The federation that rows share; made anew after a row that failed."""

    rows: int
    federation: Federation | None = None
    normal: float = 0.0

    def get(self) -> Federation:
        if self.federation is None:
            made = running(3 + ROUNDS_A_ROW * self.rows, ("a", "b"))
            self.federation = made
            made.wait_for(lambda: len(made.rounds()) > 1, 240, "two rounds")
            self.normal = median(each.seconds for each in made.rounds())
        return self.federation

    def close(self) -> None:
        ended = self.federation
        self.federation = None
        if ended is not None:
            ended.__exit__(None)


def running(rounds: int, sites: tuple[str, ...]) -> Federation:
    """Bring a federation up, whose head can be foretold."""
    given = {"quorum": len(sites), "timeout": TIMEOUT}
    return Federation(
        sites=sites,
        rounds=rounds,
        public=True,
        seed=SEED,
        sections={"training": TRAINING, "aggregation": given},
        join=("--backbone", str(DEMO / "backbone")),
    ).__enter__()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    name = "test_a_fault_costs_time_and_nothing_else["
    chosen = [item for item in request.session.items if item.name.startswith(name)]
    found = Shared(len(chosen))
    yield found
    found.close()


def marked(row: Row) -> Any:
    return pytest.param(row, id=row.name, marks=[pytest.mark.drill] if row.drill else [])


@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_a_fault_costs_time_and_nothing_else(row: Row, shared: Shared) -> None:
    federation = shared.get()
    try:
        recovers(row, federation, shared)
    except BaseException:
        print(federation.logs())
        shared.close()
        raise


def recovers(row: Row, federation: Federation, shared: Shared) -> None:
    before = {site: len(faults.releases(federation, site)["retry"]) for site in federation.sites}
    row.point(federation)
    done, began = len(federation.rounds()), time.monotonic()
    row.fault(federation)
    federation.wait_for(lambda: len(federation.rounds()) > done, row.bound, row.name)
    if row.drill:
        faults.record(row.what, row.at, time.monotonic() - began - shared.normal)
    allowed = {site: row.retries if site == "a" else 0 for site in federation.sites}
    nobody_lost(federation)
    paid_once(federation, {site: before[site] + allowed[site] for site in before})


def nobody_lost(federation: Federation) -> None:
    for each in federation.rounds():
        assert (each.sites, each.drops) == (len(federation.sites), ()), each


def paid_once(federation: Federation, retries: dict[str, int]) -> None:
    """Check that each round was paid for once, of which at most one is still to be finished."""
    done = len(federation.rounds())
    for site in federation.sites:
        found = faults.releases(federation, site)
        rounds = [each["round"] for each in found["reserve"]]
        assert rounds == list(range(1, len(rounds) + 1)), site
        assert done <= len(rounds) <= done + 1, site
        assert {each["attempt"] for each in found["reserve"]} <= {1}, site
        assert len(found["retry"]) == retries[site], site


@pytest.mark.parametrize("rows", ["few", pytest.param("all", marks=pytest.mark.drill)])
def test_the_run_ends_as_if_nothing_had_happened(rows: str, shared: Shared, tmp_path: Path) -> None:
    federation = shared.get()
    planned = 3 + ROUNDS_A_ROW * shared.rows
    ended = lambda: federation.report() is not None  # noqa: E731
    try:
        federation.wait_for(ended, 60 + 20 * (planned - len(federation.rounds())), "the end")
        assert federation.wait_ended("coordinator", 60) == 0
        nobody_lost(federation)
        for site in federation.sites:
            found = faults.releases(federation, site)
            assert [each["round"] for each in found["reserve"]] == list(range(1, planned + 1))
        same_head(federation, tmp_path)
        for site in federation.sites:
            federation.stop(site)
        assert faults.left(federation) == []
    finally:
        shared.close()


def same_head(federation: Federation, folder: Path) -> None:
    flags = ["--out", folder / "out", "--state", folder / "state", "--seed", SEED]
    done = veilgraft("simulate", federation.study, *flags, "--json")
    assert done.returncode == 0, done.stderr
    expected = load_file(folder / "out" / "model" / "head.safetensors")
    got = load_file(federation.coordinator.run / "model" / "head.safetensors")
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-9)
