"""Sites that come late, can't write, or leave for good, and a coordinator that can't write.

One federation lives through all of it, in this order: three sites, of which two are the quorum.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.system import faults
from tests.system.command import DEMO
from tests.system.federation import Federation

pytestmark = pytest.mark.drill

ROUNDS = 30
TIMEOUT = 300.0
SECONDS = 240.0
"""For a few rounds."""

GONE_SECONDS = 200.0
"""In which a round goes on without a site that has left, well before its timeout."""

DISK = "96m"


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    given = {"quorum": 2, "timeout": TIMEOUT}
    made = Federation(
        rounds=ROUNDS,
        public=True,
        seed=3,
        sections={"aggregation": given},
        join=("--backbone", str(DEMO / "backbone")),
        up=False,
    )
    with made, ExitStack() as disks:
        made.init()
        disks.enter_context(faults.small_disk(made.coordinator.path, DISK))
        made.start("coordinator")
        made.wait_until_up("coordinator")
        made.join("a", "b", "c")
        disks.enter_context(faults.small_disk(made.site("c").state, DISK))
        for name in ("a", "b"):
            made.start(name)
        yield made


def sites(federation: Federation) -> int:
    """Return how many sites the last round had."""
    return federation.rounds()[-1].sites if federation.rounds() else 0


def paid(federation: Federation, site: str) -> list[int]:
    """Return the rounds that a site has paid for."""
    return [each["round"] for each in faults.releases(federation, site)["reserve"]]


def test_a_late_site_takes_part_from_the_next_round(federation: Federation) -> None:
    federation.wait_for(lambda: len(federation.rounds()) >= 2, SECONDS, "two rounds")
    assert {each.sites for each in federation.rounds()} == {2}
    federation.start("c")
    began = time.monotonic()
    federation.wait_for(lambda: sites(federation) == 3, SECONDS, "three sites")
    faults.record("site joins late", "until its first round", time.monotonic() - began)
    first = next(each.round for each in federation.rounds() if each.sites == 3)
    assert paid(federation, "c")[0] == first
    assert all(each.drops == () for each in federation.rounds())


def test_a_full_disk_makes_a_site_refuse_until_there_is_room(federation: Federation) -> None:
    ballast = faults.fill(federation.site("c").state)
    faults.between_rounds(federation)
    faults.between_rounds(federation)
    last = federation.rounds()[-1]
    assert last.sites == 2, last
    assert [(drop.site, drop.reason) for drop in last.drops] == [("c", "refused: unavailable")]
    assert last.round not in paid(federation, "c")
    ballast.unlink()
    began = time.monotonic()
    federation.wait_for(lambda: sites(federation) == 3, SECONDS, "three sites")
    faults.record("site's disk full", "once there is room", time.monotonic() - began)


def test_an_unwritable_ledger_makes_a_site_refuse(federation: Federation) -> None:
    with faults.locked(federation.site("c").state / "ledger.db"):
        before = paid(federation, "c")
        faults.between_rounds(federation)
        federation.wait_for(lambda: sites(federation) == 2, SECONDS, "a round without c")
        assert paid(federation, "c") == before
    began = time.monotonic()
    federation.wait_for(lambda: sites(federation) == 3, SECONDS, "three sites")
    faults.record("ledger can't be written", "once it can", time.monotonic() - began)


def test_a_full_disk_at_the_coordinator_loses_no_round(federation: Federation) -> None:
    done = federation.rounds()
    ballast = faults.fill(federation.coordinator.path)
    time.sleep(20)
    ballast.unlink()
    began = time.monotonic()
    federation.wait_for(lambda: len(federation.rounds()) > len(done), SECONDS, "a round")
    faults.record("coordinator's disk full", "once there is room", time.monotonic() - began)
    assert federation.rounds()[: len(done)] == done
    for site in ("a", "b", "c"):
        assert len(set(paid(federation, site))) == len(paid(federation, site))


def test_the_others_go_on_when_a_site_leaves_for_good(federation: Federation) -> None:
    federation.wait_for(lambda: sites(federation) == 3, SECONDS, "three sites")
    faults.asked(federation)
    faults.crash(federation, "c")
    began, done = time.monotonic(), len(federation.rounds())
    federation.wait_for(lambda: len(federation.rounds()) > done, GONE_SECONDS, "a round")
    federation.wait_for(lambda: sites(federation) == 2, GONE_SECONDS, "a round without c")
    faults.record("site leaves for good", "while its courier works", time.monotonic() - began)
    done = len(federation.rounds())
    federation.wait_for(lambda: len(federation.rounds()) > done, SECONDS, "a round")


def test_below_the_quorum_the_run_ends_and_goes_on_later(federation: Federation) -> None:
    faults.asked(federation)
    faults.crash(federation, "b")
    assert federation.wait_ended("coordinator", GONE_SECONDS) == 4
    federation.reap("coordinator")
    done = federation.rounds()
    assert done
    federation.start("b")
    federation.start("coordinator")
    began = time.monotonic()
    federation.wait_for(lambda: len(federation.rounds()) > len(done), SECONDS, "a round")
    faults.record("too few sites left", "once started again", time.monotonic() - began)
    assert federation.rounds()[: len(done)] == done


def test_the_run_ends_and_each_round_was_paid_for_once(federation: Federation) -> None:
    ended = lambda: federation.report() is not None  # noqa: E731
    federation.wait_for(ended, 60 + 20 * ROUNDS, "the end")
    assert federation.wait_ended("coordinator", 60) == 0
    assert paid(federation, "a") == list(range(1, ROUNDS + 1))
    assert paid(federation, "b") == list(range(1, ROUNDS + 1))
    assert len(set(paid(federation, "c"))) == len(paid(federation, "c"))
