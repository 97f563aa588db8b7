"""The ledger's rules of release."""

import hashlib
import json
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.chain import ChainError
from veilgraft.errors import Refusal, RefusedError
from veilgraft.plan import Plan
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Event
from veilgraft_client.ledger import _PAID, _SPENT, _STORED, Key, Ledger, Terms

STUDY = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
PLAN = Plan(rounds=3, update=Event(4.0), delta=1e-5)
AMPLE = Terms(max_epsilon=100, delta=2e-5)


def key(round_: int = 1, head: str = "h1", site: str = "a") -> Key:
    return Key(site, STUDY, round_, head)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.db")
    made.grant("a", STUDY, PLAN, AMPLE, units=20)
    return made


def reserve(ledger: Ledger, name: Key) -> int | bytes:
    (found,) = ledger.reserve_all([name])
    if isinstance(found, RefusedError):
        raise found
    return found


def commit(ledger: Ledger, reservation: int, payload: bytes) -> bytes:
    (sent,) = ledger.commit_all([(reservation, payload)])
    return sent


def reserved(ledger: Ledger, name: Key) -> int:
    reservation = reserve(ledger, name)
    assert isinstance(reservation, int)
    return reservation


def test_the_same_key_again_gives_the_stored_bytes_and_costs_nothing(ledger: Ledger) -> None:
    commit(ledger, reserved(ledger, key()), b"noised")
    spent = ledger.epsilon("a", 1e-5)
    assert reserve(ledger, key()) == b"noised"
    assert ledger.epsilon("a", 1e-5) == spent


def test_the_same_round_with_another_head_is_refused(ledger: Ledger) -> None:
    commit(ledger, reserved(ledger, key()), b"noised")
    with pytest.raises(RefusedError) as refusal:
        reserve(ledger, key(head="h2"))
    assert refusal.value.code == Refusal.ROUND_CONFLICT
    assert len(ledger.events("a")) == 1


def test_a_reservation_without_a_commit_may_be_computed_once_more_and_is_then_paid_again(
    ledger: Ledger,
) -> None:
    first = reserved(ledger, key())
    assert reserved(ledger, key()) == first
    assert len(ledger.events("a")) == 1
    second = reserved(ledger, key())
    assert second != first
    assert len(ledger.events("a")) == 2


def test_only_the_first_commit_of_a_reservation_counts(ledger: Ledger) -> None:
    reservation = reserved(ledger, key())
    assert commit(ledger, reservation, b"one") == b"one"
    assert commit(ledger, reservation, b"two") == b"one"


def test_a_key_that_was_paid_twice_still_has_one_release(ledger: Ledger) -> None:
    first = reserved(ledger, key())
    reserved(ledger, key())
    second = reserved(ledger, key())
    assert commit(ledger, second, b"two") == b"two"
    assert commit(ledger, first, b"one") == b"two"
    assert reserve(ledger, key()) == b"two"


def test_nothing_beyond_the_granted_plan_can_be_spent(ledger: Ledger) -> None:
    for round_ in (1, 2, 3):
        commit(ledger, reserved(ledger, key(round_)), b"noised")
    with pytest.raises(
        RefusedError, match="all 3 granted releases of kind update are spent"
    ) as refusal:
        reserve(ledger, key(4))
    assert refusal.value.code == Refusal.UNAVAILABLE
    assert ledger.epsilon("a", 1e-5) == pytest.approx(accounting.epsilon([Event(4.0)] * 3, 1e-5))


def test_a_release_without_a_grant_is_refused(ledger: Ledger) -> None:
    with pytest.raises(RefusedError) as refusal:
        reserve(ledger, key(site="b"))
    assert refusal.value.code == Refusal.STUDY_NOT_APPROVED


def test_granting_again_changes_nothing_and_another_plan_is_refused(ledger: Ledger) -> None:
    ledger.grant("a", STUDY, PLAN, AMPLE, units=20)
    assert sum(entry.kind == "grant" for entry in ledger.entries()) == 1
    with pytest.raises(RefusedError):
        ledger.grant("a", STUDY, Plan(4, Event(4.0), 1e-5), AMPLE, units=20)


def test_the_cap_covers_all_studies_together_and_says_the_numbers(ledger: Ledger) -> None:
    one = accounting.epsilon([Event(4.0)] * 3, 1e-5)
    with pytest.raises(RefusedError, match=r"over budget.*at δ = 2e-05; the cap is 5") as refusal:
        ledger.grant("a", OTHER, Plan(30, Event(2.0), 1e-5), Terms(5, 2e-5), units=20)
    assert refusal.value.code == Refusal.UNAVAILABLE
    # Alone the second plan fits the cap; with what was granted before it does not.
    with pytest.raises(RefusedError, match="over budget"):
        ledger.grant("a", OTHER, PLAN, Terms(1.1 * one, 2e-5), units=20)
    assert [entry.kind for entry in ledger.entries("a")] == ["terms", "grant"]
    ledger.grant("a", OTHER, PLAN, Terms(2 * one, 2e-5), units=20)


def test_a_cap_that_was_lowered_holds_for_what_was_granted_before(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match=r"the cap is 0\.1"):
        ledger.grant("a", STUDY, PLAN, Terms(0.1, 2e-5), units=20)


def test_studies_granted_before_the_first_release_cost_what_they_cost_together(
    ledger: Ledger,
) -> None:
    ledger.grant("a", OTHER, PLAN, AMPLE, units=20)
    together = accounting.epsilon([Event(4.0)] * 6, AMPLE.delta / 2)
    assert ledger.life_epsilon("a") == pytest.approx(together)


def test_a_study_chosen_after_a_release_is_priced_as_chosen_in_its_light(ledger: Ledger) -> None:
    reserve(ledger, key())
    ledger.grant("a", OTHER, PLAN, AMPLE, units=20)
    in_advance = accounting.epsilon([Event(4.0)] * 6, AMPLE.delta / 2)
    exact = accounting.epsilon([Event(4.0)] * 6, AMPLE.delta / 4)
    assert ledger.life_epsilon("a") == pytest.approx(exact)
    assert ledger.life_epsilon("a") > in_advance


def test_what_a_filter_rests_on_is_fixed_with_the_first_grant(ledger: Ledger) -> None:
    (terms,) = [entry.body for entry in ledger.entries("a") if entry.kind == "terms"]
    ledger.grant("a", OTHER, PLAN, AMPLE, units=20)
    assert [entry.kind for entry in ledger.entries("a")].count("terms") == 1
    assert ledger.terms("a") == AMPLE
    assert ledger.life_delta("a") == AMPLE.delta
    assert terms["orders"]


def test_terms_that_a_person_changes_are_written_down_and_their_delta_adds(ledger: Ledger) -> None:
    ledger.grant("a", OTHER, PLAN, Terms(200, 1e-5), units=20)
    assert ledger.terms("a") == Terms(200, 1e-5)
    assert ledger.life_delta("a") == pytest.approx(3e-5)


def test_changed_terms_count_from_the_next_grant_on(ledger: Ledger) -> None:
    for cap in (100, 50, 100, 50):
        ledger.grant("a", STUDY, PLAN, Terms(cap, 2e-5), units=20)
    assert ledger.life_delta("a") == AMPLE.delta
    assert ledger.terms("a") == AMPLE
    ledger.grant("a", OTHER, PLAN, Terms(50, 2e-5), units=20)
    assert ledger.life_delta("a") == 2 * AMPLE.delta


def test_a_study_s_declared_size_can_not_change(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match="granted with another plan or size"):
        ledger.grant("a", STUDY, PLAN, AMPLE, units=21)


def test_what_a_further_study_would_cost_can_be_asked(ledger: Ledger) -> None:
    reserve(ledger, key())
    asked = ledger.life_epsilon("a", further=PLAN)
    before = list(ledger.entries())
    ledger.grant("a", OTHER, PLAN, AMPLE, units=20)
    assert ledger.life_epsilon("a") == asked
    assert len(before) == 4


def test_the_share_that_is_held_out_can_not_change(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match=r"a share of 0\.1 is to be held out, and 0 was") as no:
        ledger.grant("a", OTHER, PLAN, Terms(100, 2e-5, held_out=0.1), units=20)
    assert no.value.code == Refusal.UNAVAILABLE


def test_a_ledger_counts_by_one_unit(ledger: Ledger) -> None:
    with pytest.raises(RefusedError, match=r"counts by record, for life; the study's unit is per"):
        ledger.grant("a", OTHER, PLAN, Terms(100, 2e-5, unit="person"), units=20)
    assert [entry.study for entry in ledger.entries("a") if entry.kind == "grant"] == [STUDY]


def test_each_kind_of_release_has_keys_and_a_plan_of_its_own(ledger: Ledger) -> None:
    plan = Plan(
        rounds=2, update=Event(4.0), delta=1e-5, evaluated=(2,), evaluation=Event(9.0),
        counted=True, label_counts=Event(20.0),
    )  # fmt: skip
    ledger.grant("a", OTHER, plan, AMPLE, units=20)
    commit(ledger, reserved(ledger, Key("a", OTHER, 2, "h1")), b"update")
    commit(ledger, reserved(ledger, Key("a", OTHER, 2, "h2", "evaluation")), b"evaluation")
    commit(ledger, reserved(ledger, Key("a", OTHER, 0, "h0", "label-counts")), b"counts")
    assert reserve(ledger, Key("a", OTHER, 2, "h2", "evaluation")) == b"evaluation"
    with pytest.raises(RefusedError, match="all 1 granted releases of kind evaluation"):
        reserve(ledger, Key("a", OTHER, 1, "h1", "evaluation"))
    with pytest.raises(RefusedError, match="all 0 granted releases of kind evaluation"):
        reserve(ledger, Key("a", STUDY, 1, "h1", "evaluation"))
    assert ledger.events("a", OTHER) == [Event(4.0), Event(9.0), Event(20.0)]
    assert ledger.paid("a", OTHER) == 1


def test_another_head_can_not_take_over_a_reservation_without_a_commit(ledger: Ledger) -> None:
    reserved(ledger, key())
    with pytest.raises(RefusedError) as refusal:
        reserve(ledger, key(head="h2"))
    assert refusal.value.code == Refusal.ROUND_CONFLICT


asked = st.builds(
    Key,
    site=st.sampled_from(["a", "b", "c"]),
    study=st.just(STUDY),
    round=st.integers(1, 4),
    head=st.sampled_from(["h1", "h1", "h2"]),
)


def told(found: int | bytes | RefusedError) -> object:
    """Return what does not depend on the order in which sites pay."""
    match found:
        case RefusedError():
            return found.detail
        case bytes():
            return found
        case int():
            return int


@given(st.lists(st.tuples(st.lists(asked, max_size=6), st.sets(st.integers(0, 5))), max_size=5))
@settings(max_examples=60, deadline=None)
def test_many_at_once_are_paid_for_and_stored_like_one_after_the_other(
    steps: list[tuple[list[Key], set[int]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, many = (Ledger(Path(folder) / name) for name in ("one.db", "many.db"))
        for each in (one, many):
            for site in ("a", "b"):
                each.grant(site, STUDY, PLAN, AMPLE, units=20)
        for number, (keys, lost) in enumerate(steps):
            alone = [one.reserve_all([key])[0] for key in keys]
            together = many.reserve_all(keys)
            assert list(map(told, together)) == list(map(told, alone))
            computed = [
                (first, second, f"{number} {place}".encode())
                for place, (first, second) in enumerate(zip(alone, together, strict=True))
                if isinstance(first, int) and isinstance(second, int) and place not in lost
            ]
            sent = [commit(one, first, made) for first, _, made in computed]
            assert many.commit_all([(second, made) for _, second, made in computed]) == sent
        for site in ("a", "b", "c"):
            entries = [
                [(e.kind, e.body.get("head"), e.body.get("payload")) for e in each.entries(site)]
                for each in (one, many)
            ]
            assert entries[0] == entries[1]
        one.verify()
        many.verify()
        one.close()
        many.close()


def test_what_is_asked_for_many_releases_is_looked_up_and_never_searched_for(
    ledger: Ledger,
) -> None:
    for query in (_PAID, _SPENT, _STORED):
        steps = [step for *_, step in ledger._chain.rows(f"EXPLAIN QUERY PLAN {query}", "[]")]
        assert [step for step in steps if step.startswith("SCAN")] == [
            "SCAN asked VIRTUAL TABLE INDEX 1:"
        ]


def test_every_commit_reaches_the_disk_before_it_returns(ledger: Ledger) -> None:
    assert ledger._chain._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert ledger._chain._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_inner_failure_undoes_its_own_step_alone(ledger: Ledger) -> None:
    with ledger.transaction():
        reservation = reserved(ledger, key())
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            commit(ledger, reservation, b"half")
            raise ZeroDivisionError
    assert len(ledger.events("a")) == 1
    assert commit(ledger, reservation, b"whole") == b"whole"
    ledger.verify()


def test_a_release_without_noise_has_no_bound(ledger: Ledger) -> None:
    ledger.grant("a", OTHER, Plan(1, None, 1e-5), Terms(None, 2e-5), units=20)
    reserve(ledger, Key("a", OTHER, 1, "h"))
    assert ledger.epsilon("a", 1e-5) == float("inf")
    assert ledger.life_epsilon("a") == float("inf")


def test_sites_in_one_file_do_not_pay_for_each_other(ledger: Ledger) -> None:
    ledger.grant("b", STUDY, PLAN, AMPLE, units=20)
    reserve(ledger, key(site="b"))
    assert ledger.epsilon("a", 1e-5) == 0
    assert ledger.epsilon("b", 1e-5) > 0


def test_a_joined_transaction_is_all_or_nothing(ledger: Ledger) -> None:
    with pytest.raises(ZeroDivisionError), ledger.transaction():
        commit(ledger, reserved(ledger, key()), b"noised")
        raise ZeroDivisionError
    assert ledger.events("a") == []
    assert isinstance(reserve(ledger, key()), int)


def test_entries_survive_the_process_and_the_chain_fits(ledger: Ledger) -> None:
    commit(ledger, reserved(ledger, key()), b"noised")
    head = ledger.head()
    ledger.close()
    again = Ledger(ledger.path)
    assert again.head() == head
    assert again.verify() == 5
    assert reserve(again, key()) == b"noised"


def test_entries_can_be_neither_changed_nor_removed(ledger: Ledger) -> None:
    with sqlite3.connect(ledger.path) as raw:
        for statement in ("UPDATE entries SET body = '{}'", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                raw.execute(statement)
    raw.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET body = replace(body, '4.0', '9.0') WHERE kind = 'reserve'",
        "UPDATE payloads SET bytes = x'00'",
        "DELETE FROM entries WHERE kind = 'reserve'",
        "DELETE FROM entries WHERE seq > 2",
        "DELETE FROM payloads; DELETE FROM entries",
        "UPDATE entries SET site = 'b' WHERE kind = 'reserve'",
        "UPDATE entries SET study = 'other' WHERE kind = 'commit'",
        # Readers disagree on which of two equal keys counts, so the text itself is chained.
        "UPDATE entries SET body = replace(body, '{', '{\"round\":9,') WHERE kind = 'reserve'",
    ],
)
def test_verify_finds_a_forged_entry(ledger: Ledger, change: str) -> None:
    commit(ledger, reserved(ledger, key()), b"noised")
    raw = sqlite3.connect(ledger.path)
    raw.executescript(f"DROP TRIGGER no_update; DROP TRIGGER no_delete; {change};")
    raw.close()
    with pytest.raises(ChainError):
        ledger.verify()


def test_an_older_copy_in_the_ledgers_place_is_noticed_by_its_anchor(
    ledger: Ledger, tmp_path: Path
) -> None:
    older = tmp_path / "older.db"
    with sqlite3.connect(older) as copy:
        ledger._chain._db.backup(copy)
    copy.close()
    reserve(ledger, key())
    anchor = ledger.head()
    reserve(ledger, key())
    assert ledger.verify(anchor) == 5
    ledger.close()
    with sqlite3.connect(older) as restored:
        restored.execute("PRAGMA journal_mode = WAL")
    restored.close()
    rolled_back = Ledger(older)
    assert rolled_back.verify() == 3
    with pytest.raises(ChainError, match=f"none of them the anchor's {anchor}: the ledger was rol"):
        rolled_back.verify(anchor)


def test_a_rollback_that_failed_never_lets_what_follows_pass_for_written(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stubborn:
        """A connection whose rollbacks fail, as on a disk that is gone."""

        def __init__(self, real: sqlite3.Connection) -> None:
            self.real = real

        def execute(self, statement: str, values: tuple[str, ...] = ()) -> sqlite3.Cursor:
            if statement.startswith("ROLLBACK"):
                raise sqlite3.OperationalError("disk I/O error")
            return self.real.execute(statement, values)

    with monkeypatch.context() as patch:
        patch.setattr(ledger._chain, "_db", Stubborn(ledger._chain._db))
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            raise ZeroDivisionError
    with pytest.raises(ChainError):
        reserve(ledger, key())


def test_the_file_is_for_its_owner_alone(ledger: Ledger) -> None:
    assert ledger.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [b"", b"not a database, and long enough to be looked at" * 20])
def test_what_is_no_ledger_is_refused_and_never_made_into_one(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(ChainError):
        Ledger(path)
    assert path.read_bytes()[:10] == content[:10]


def test_a_ledger_without_its_rules_is_refused(ledger: Ledger) -> None:
    ledger.close()
    raw = sqlite3.connect(ledger.path)
    raw.execute("DROP TRIGGER no_delete")
    raw.close()
    with pytest.raises(ChainError, match="expected a ledger of format 2"):
        Ledger(ledger.path)


def test_files_of_format_2_stay_what_they_are(ledger: Ledger) -> None:
    raw = sqlite3.connect(ledger.path)
    rows = raw.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")
    text = "\n".join(sql for (sql,) in rows)
    (body, chained) = raw.execute("SELECT body, hash FROM entries").fetchone()
    raw.close()
    pinned = "6ae5d10fe0682b3b0e4422ec25486148401714bef6f3b5f1614d9330509efb89"
    assert hashlib.sha256(text.encode()).hexdigest() == pinned
    content = json.dumps([1, "", "", "open", body], separators=(",", ":"))
    assert hashlib.sha256(content.encode()).digest() == chained


def test_a_missing_ledger_is_not_made_where_one_must_be(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="the ledger is missing"):
        Ledger(tmp_path / "ledger.db", exists=True)
    assert list(tmp_path.iterdir()) == []


def test_threads_that_make_one_ledger_at_once_have_one(tmp_path: Path) -> None:
    for trial in range(20):
        path = tmp_path / str(trial) / "ledger.db"
        with ThreadPoolExecutor(3) as threads:
            made = list(threads.map(lambda _, where=path: Ledger(where), range(3)))
        made[0].grant("a", STUDY, PLAN, AMPLE, units=20)
        assert {each.verify() for each in made} == {3}
        for each in made:
            each.close()
        assert [left.name for left in path.parent.iterdir()] == ["ledger.db"]


RELEASE = """
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from veilgraft_client.ledger import Key, Ledger

ledger = Ledger(Path(sys.argv[1]))
sys.stdin.readline()
(found,) = ledger.reserve_all([Key("a", sys.argv[2], 1, "h1")])
(payload,) = [found] if isinstance(found, bytes) else ledger.commit_all(
    [(found, sys.argv[3].encode())]
)
print(payload.decode())
"""


def test_two_processes_that_ask_for_the_same_key_get_the_same_bytes(ledger: Ledger) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RELEASE, ledger.path, STUDY, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two", "three")
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    payloads = {worker.communicate(timeout=60)[0] for worker in workers}
    assert len(payloads) == 1
    assert payloads <= {"one\n", "two\n", "three\n"}
    ledger.verify()
