"""The gate: whose word counts, for how long and how often, and what may leave when."""

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.gated import (
    BACKBONE,
    DIGEST,
    DIM,
    Party,
    features,
    hello,
    offer,
    part,
    party,
    refused,
    released,
    request,
    sealed,
    study,
)

from veilgraft import messages
from veilgraft.errors import MessageError, RefusedError, VeilgraftError
from veilgraft.identity import SigningKey
from veilgraft.messages import Envelope, Hello, Here, Refused, Release, Request, Wanted
from veilgraft.model.features import Cohort
from veilgraft_client import gate as gates
from veilgraft_client.gate import LONGEST_SECONDS, PARTS_PER_MINUTE, Nonces, Rate

CONTRACT = study()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Party]:
    with party(tmp_path) as opened:
        opened.approve(CONTRACT)
        yield opened


def state(folder: Path) -> dict[str, bytes]:
    """Return what lies in a site's state, but for its log and SQLite's own files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


def test_what_the_coordinator_signed_is_released_and_noted(own: Party) -> None:
    reply = own.ask(request(CONTRACT, own.coordinator))
    assert isinstance(reply, Release)
    assert own.spent == 1
    kind, facts = own.told()[-1]
    assert (kind, facts["round"], facts["payload"]) == ("answered", 1, reply.payload)


FORGED: dict[str, Callable[[Envelope, SigningKey], Envelope]] = {
    "unsigned": lambda e, _: replace(e, signature=b""),
    "by another key": lambda e, _: replace(
        e, signature=SigningKey.generate().sign("request", e.header)
    ),
    "in the domain of answers": lambda e, key: replace(e, signature=key.sign("answer", e.header)),
    "of other bytes": lambda e, key: replace(e, signature=key.sign("request", e.header + b" ")),
    "a changed header": lambda e, _: replace(
        e, header=e.header.replace(b'"round":1', b'"round":2')
    ),
    "a header with a space more": lambda e, _: replace(e, header=e.header + b" "),
    "another payload": lambda e, _: replace(e, payload=e.payload + b" "),
    "no payload": lambda e, _: replace(e, payload=b""),
    "a header that is no JSON": lambda e, key: Envelope(
        b"\xff", e.payload, key.sign("request", b"\xff")
    ),
    "a long header": lambda e, key: Envelope(b" " * 4097, b"", key.sign("request", b" " * 4097)),
    "nothing": lambda e, _: Envelope(b""),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_was_not_signed_as_it_came_is_refused_and_costs_nothing(own: Party, name: str) -> None:
    before = own.told()
    forged = FORGED[name](request(CONTRACT, own.coordinator), own.coordinator)
    assert refused(own.ask(forged)) == "request-invalid"
    assert own.spent == 0
    assert own.told() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "sha256:" + "0" * 64},
        {"key": None},
        {"nonce": None},
        {"expires": None},
        {"expires": int(time.time()) - 1},
        {"expires": int(time.time()) + LONGEST_SECONDS + 600},
        {"site": "b"},
        {"round": 0},
        {"round": 4},
        {"kind": "evaluation"},
        {"kind": "label-counts", "round": 0},
        {"rate": 1.1},
        {"rate": 0.0},
    ],
)
def test_what_is_signed_and_not_for_this_site_now_is_refused_and_costs_nothing(
    own: Party, changes: dict[str, Any]
) -> None:
    assert refused(own.ask(request(CONTRACT, own.coordinator, **changes))) == "request-invalid"
    assert own.spent == 0


def test_a_question_lives_until_it_expires(own: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(CONTRACT, own.coordinator, expires=int(time.time()) + 60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert refused(own.ask(asked)) == "request-invalid"
    monkeypatch.setattr(time, "time", lambda: now + 50)
    assert isinstance(own.ask(asked), Release)


def test_a_key_that_was_rotated_away_counts_no_more(tmp_path: Path) -> None:
    with party(tmp_path) as own:
        own.approve(CONTRACT)
        pinned = [own.coordinator.public]
        own.gate._coordinator = lambda: pinned[0]
        new = SigningKey.generate()
        assert refused(own.ask(request(CONTRACT, new))) == "request-invalid"
        pinned[0] = new.public
        assert refused(own.ask(request(CONTRACT, own.coordinator))) == "request-invalid"
        assert isinstance(own.ask(request(CONTRACT, new)), Release)


def test_a_nonce_stands_for_one_request(own: Party) -> None:
    first = request(CONTRACT, own.coordinator, nonce="0" * 32)
    assert isinstance(own.ask(first), Release)
    other = request(CONTRACT, own.coordinator, 2, nonce="0" * 32)
    assert refused(own.ask(other)) == "request-invalid"
    assert own.spent == 1


def test_the_same_request_again_gets_the_same_bytes_and_pays_nothing(own: Party) -> None:
    asked = request(CONTRACT, own.coordinator)
    answers = [own.gate.handle(asked) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert own.spent == 1


def test_a_request_that_is_asked_anew_gets_the_same_release(own: Party) -> None:
    one = own.gate.handle(request(CONTRACT, own.coordinator))
    other = own.gate.handle(request(CONTRACT, own.coordinator, run="another", attempt=2))
    assert one.payload == other.payload
    assert one.header != other.header
    assert own.spent == 1


def test_a_study_that_nobody_approved_is_refused(own: Party) -> None:
    other = study(name="other")
    for asked in (
        request(other, own.coordinator),
        offer(other, own.coordinator),
        part(other, own.coordinator, "config.json", 0, b"{"),
    ):
        assert refused(own.ask(asked)) == "study-not-approved"
    assert own.spent == 0
    assert not own.bundles.folder.exists()


def test_a_withdrawn_study_is_refused(own: Party) -> None:
    own.desk.do("withdraw", CONTRACT.digest)
    assert refused(own.ask(request(CONTRACT, own.coordinator))) == "study-not-approved"


def test_a_round_that_was_released_for_another_head_is_a_conflict(own: Party) -> None:
    own.ask(request(CONTRACT, own.coordinator))
    assert refused(own.ask(request(CONTRACT, own.coordinator, fill=0.5))) == "round-conflict"
    assert own.spent == 1


WEIGHT, BIAS = np.zeros((3, DIM)), np.zeros(3)
HEADS: dict[str, dict[str, np.ndarray]] = {
    "other names": {"linear1.weight": WEIGHT, "linear1.bias": BIAS},
    "a name more": {"linear0.weight": WEIGHT, "linear0.bias": BIAS, "x": BIAS},
    "a name less": {"linear0.weight": WEIGHT},
    "other shapes": {"linear0.weight": WEIGHT.T, "linear0.bias": BIAS},
    "another size": {"linear0.weight": np.zeros((3, DIM + 1)), "linear0.bias": BIAS},
    "a large one": {"linear0.weight": np.zeros((3, 10_000)), "linear0.bias": BIAS},
    "float32": {"linear0.weight": WEIGHT.astype(np.float32), "linear0.bias": BIAS},
    "not a number": {"linear0.weight": WEIGHT + np.nan, "linear0.bias": BIAS},
    "infinite": {"linear0.weight": WEIGHT, "linear0.bias": BIAS - np.inf},
    "huge": {"linear0.weight": WEIGHT + 1e5, "linear0.bias": BIAS},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_another_form_is_refused_and_costs_nothing(own: Party, name: str) -> None:
    reply = own.ask(released(CONTRACT, own.coordinator, HEADS[name]))
    assert refused(reply) == "head-invalid"
    assert own.spent == 0


def test_no_noise_and_a_seed_are_for_public_data(tmp_path: Path) -> None:
    plain = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    with party(tmp_path / "private") as own:
        assert isinstance(own.ask(hello(plain, own.coordinator)), Here)
        with pytest.raises(RefusedError, match="data_is_public is not true"):
            own.desk.do("approve", plain.digest)
        assert refused(own.ask(request(plain, own.coordinator))) == "study-not-approved"
    with (
        pytest.raises(VeilgraftError, match="seed: expected none where data_is_public"),
        party(tmp_path / "seeded", seed=1),
    ):
        pass
    with party(tmp_path / "public", data_is_public=True, seed=1) as own:
        own.approve(plain)
        greeted = own.ask(hello(plain, own.coordinator))
        assert isinstance(greeted, Here)
        assert not greeted.private
        assert isinstance(own.ask(request(plain, own.coordinator)), Release)


def test_a_hello_proposes_and_never_approves(tmp_path: Path) -> None:
    with party(tmp_path) as own:
        for _ in range(2):
            greeted = own.ask(hello(CONTRACT, own.coordinator))
            assert isinstance(greeted, Here)
            assert (greeted.site, greeted.approved, greeted.backbone) == ("a", False, False)
            assert greeted.private
        assert list(own.studies.proposed()) == [CONTRACT.digest]
        assert own.studies.approved() == {}
        assert refused(own.ask(request(CONTRACT, own.coordinator))) == "study-not-approved"
        assert own.vault.ledger.sites() == []


def test_a_hello_tells_whether_study_and_backbone_are_here(own: Party) -> None:
    own.bundles.add(BACKBONE, DIGEST)
    greeted = own.ask(hello(CONTRACT, own.coordinator))
    assert isinstance(greeted, Here)
    assert (greeted.approved, greeted.backbone) == (True, True)


def test_a_hello_whose_study_is_another_or_none_is_refused(own: Party) -> None:
    for payload in (b"{}", b"\xff", b"[" * 100_000, b" " * (257 << 10)):
        asked = Hello(study=CONTRACT.digest, run="r", payload=messages.digest(payload))
        reply = own.ask(sealed(asked, payload, own.coordinator))
        assert refused(reply) == "request-invalid"
    other = hello(study(name="other"), own.coordinator)
    asked = Hello(study=CONTRACT.digest, run="r", payload=messages.digest(other.payload))
    assert refused(own.ask(sealed(asked, other.payload, own.coordinator))) == "request-invalid"


def test_no_more_than_16_proposals_wait(tmp_path: Path) -> None:
    with party(tmp_path) as own:
        for index in range(16):
            asked = hello(study(name=f"s{index}"), own.coordinator)
            assert isinstance(own.ask(asked), Here)
        assert refused(own.ask(hello(study(name="more"), own.coordinator))) == "unavailable"
        assert isinstance(own.ask(hello(study(name="s3"), own.coordinator)), Here)
        assert len(own.studies.proposed()) == 16


def test_a_backbone_comes_in_parts_and_is_then_made_ready_once(own: Party) -> None:
    wanted = _missing(own, offer(CONTRACT, own.coordinator))
    while wanted:
        name, offset = next(iter(wanted.items()))
        data = (BACKBONE / name).read_bytes()[offset:]
        wanted = _missing(own, part(CONTRACT, own.coordinator, name, offset, data))
    assert own.bundles.path(DIGEST).is_dir()
    assert own.prepared == [CONTRACT]
    assert _missing(own, offer(CONTRACT, own.coordinator)) == {}
    assert own.prepared == [CONTRACT]


def test_a_part_that_was_not_offered_is_refused(own: Party) -> None:
    asked = part(CONTRACT, own.coordinator, "config.json", 0, b"{")
    assert refused(own.ask(asked)) == "request-invalid"
    own.ask(offer(CONTRACT, own.coordinator))
    for name, offset in (("other.json", 0), ("config.json", 5)):
        asked = part(CONTRACT, own.coordinator, name, offset, b"{")
        assert refused(own.ask(asked)) == "request-invalid"


def _missing(own: Party, asked: Envelope) -> dict[str, int]:
    answer = own.gate.handle(asked)
    assert isinstance(messages.decode_answer(answer.header), Wanted)
    found: dict[str, int] = json.loads(answer.payload)["missing"]
    return found


# How often


def test_so_many_requests_a_minute_are_answered(tmp_path: Path) -> None:
    limits = {"max_epsilon": 50.0, "requests_per_minute": 3}
    with party(tmp_path, limits=limits) as own:
        own.approve(CONTRACT)
        replies = [own.ask(request(CONTRACT, own.coordinator)) for _ in range(5)]
        assert [type(reply) for reply in replies] == [Release] * 3 + [Refused] * 2
        assert refused(replies[-1]) == "unavailable"


def test_what_nobody_signed_takes_nothing_from_the_coordinators_rate(tmp_path: Path) -> None:
    limits = {"max_epsilon": 50.0, "requests_per_minute": 1}
    with party(tmp_path, limits=limits) as own:
        own.approve(CONTRACT)
        for _ in range(5):
            own.ask(Envelope(b"{}"))
        assert isinstance(own.ask(request(CONTRACT, own.coordinator)), Release)


def test_a_rate_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = Rate(60)
    assert sum(rate.admits() for _ in range(100)) == 60
    now[0] += 2
    assert sum(rate.admits() for _ in range(100)) == 2
    now[0] += 1e6
    assert sum(rate.admits() for _ in range(100)) == 60


def test_parts_have_a_rate_of_their_own_which_the_largest_backbone_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PARTS_PER_MINUTE > (4 << 30) // (8 << 20)
    monkeypatch.setattr(gates, "PARTS_PER_MINUTE", 5)
    with party(tmp_path, limits={"max_epsilon": 50.0, "requests_per_minute": 2}) as own:
        own.approve(CONTRACT)
        own.ask(offer(CONTRACT, own.coordinator))
        data = (BACKBONE / "config.json").read_bytes()
        asked = [part(CONTRACT, own.coordinator, "config.json", 0, data) for _ in range(7)]
        replies = [own.ask(each) for each in asked]
        assert [type(reply) for reply in replies] == [Wanted] * 5 + [Refused] * 2
        assert refused(replies[-1]) == "unavailable"
        assert isinstance(own.ask(request(CONTRACT, own.coordinator)), Release)


# When


def test_answers_leave_at_multiples_of_reply_seconds_whatever_they_took(tmp_path: Path) -> None:
    step, slow = 0.2, [0.0]
    with party(tmp_path, reply_seconds=step) as own:
        own.approve(CONTRACT)
        own.vault._cohort = lambda _: (
            time.sleep(slow[0]) or Cohort(features(), features(0))  # type: ignore[func-returns-value]
        )
        key = own.coordinator
        own.bundles.add(BACKBONE, DIGEST)
        asked: dict[str, Callable[[], Envelope]] = {
            "a release": lambda: request(CONTRACT, key),
            "unsigned": lambda: Envelope(b"{}"),
            "not approved": lambda: request(study(name="other"), key),
            "head": lambda: released(CONTRACT, key, {}, 2),
            "hello": lambda: hello(CONTRACT, key),
            "offer of what is here": lambda: offer(CONTRACT, key),
            "part of what is here": lambda: part(CONTRACT, key, "config.json", 0, b"{"),
        }
        for name, make in asked.items():
            for slow[0] in (0.0, 0.25):
                own.vault.forget(CONTRACT.digest)
                envelope = make()
                began = time.monotonic()
                own.gate.handle(envelope)
                took = time.monotonic() - began
                assert took >= step, name
                assert took % step < 0.1, (name, took)


def test_parts_that_are_wanted_are_answered_at_once(tmp_path: Path) -> None:
    with party(tmp_path, reply_seconds=5.0) as own:
        own.approve(CONTRACT)
        began = time.monotonic()
        own.ask(offer(CONTRACT, own.coordinator))
        data = (BACKBONE / "config.json").read_bytes()
        own.ask(part(CONTRACT, own.coordinator, "config.json", 0, data))
        assert time.monotonic() - began < 3


# What leaves, and what stays


def test_a_refusal_is_a_code_and_its_reason_stays(
    own: Party, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "patient 4711"

    def broken(_: object) -> Cohort:
        raise RuntimeError(secret)

    own.vault._cohort = broken
    with caplog.at_level(logging.WARNING):
        asked = request(CONTRACT, own.coordinator)
        answer = own.gate.handle(asked)
    assert answer.payload == b""
    assert json.loads(answer.header) == {
        "site": "a",
        "request": messages.digest(asked.header),
        "payload": messages.EMPTY,
        "kind": "refusal",
        "code": "unavailable",
    }
    assert secret in caplog.text


def test_an_error_at_any_step_leaves_as_a_signed_code(
    own: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("no")

    for target, name in (
        (own.gate, "_coordinator"),
        (own.nonces, "use"),
        (own.vault, "handle"),
        (own.events, "note"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, broken)
            assert refused(own.ask(request(CONTRACT, own.coordinator))) == "unavailable"
    assert isinstance(own.ask(request(CONTRACT, own.coordinator)), Release)


def test_nothing_leaves_where_the_event_log_can_t_be_written(
    own: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.events._chain, "_execute", _fails)
    answer = own.gate.handle(request(CONTRACT, own.coordinator))
    assert refused(messages.decode_answer(answer.header)) == "unavailable"
    assert answer.payload == b""
    # Nor a refusal of any other kind, which would have to be noted.
    assert refused(own.ask(request(CONTRACT, own.coordinator, 4))) == "unavailable"


def test_nothing_leaves_where_the_ledger_can_t_be_written(
    own: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.vault.ledger._chain, "_execute", _fails)
    answer = own.gate.handle(request(CONTRACT, own.coordinator))
    assert refused(messages.decode_answer(answer.header)) == "unavailable"
    assert answer.payload == b""


def test_nothing_leaves_where_nonces_can_t_be_written(own: Party) -> None:
    own.nonces._db.execute("PRAGMA query_only = ON")
    assert refused(own.ask(request(CONTRACT, own.coordinator))) == "unavailable"
    assert own.spent == 0


def _fails(*_: object) -> Any:
    from veilgraft.chain import ChainError

    raise ChainError("the disk is full")


def test_what_nobody_signed_stores_nothing(own: Party, tmp_path: Path) -> None:
    before = state(tmp_path / "state")
    stranger = SigningKey.generate()
    for forge in FORGED.values():
        own.ask(forge(request(CONTRACT, stranger), stranger))
    for asked in (hello(study(name="other"), stranger), offer(CONTRACT, stranger)):
        own.ask(asked)
    assert state(tmp_path / "state") == before
    assert own.nonces._db.execute("SELECT count(*) FROM nonces").fetchone() == (0,)


def test_a_refused_request_is_noted_with_its_code(own: Party) -> None:
    own.ask(request(CONTRACT, own.coordinator, 4))
    kind, facts = own.told()[-1]
    assert (kind, facts["code"], facts["round"]) == ("refused", "request-invalid", 4)


# Nonces


def test_nonces_are_kept_until_they_expire_and_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "nonces.db"
    with contextlib.closing(Nonces(path)) as nonces:
        nonces.use("1", "one", 100, 50.0)
    with contextlib.closing(Nonces(path)) as nonces:
        nonces.use("1", "one", 100, 100.9)
        with pytest.raises(MessageError, match="another request"):
            nonces.use("1", "other", 200, 100.9)
        nonces.use("1", "other", 200, 101.0)
        assert nonces._db.execute("SELECT count(*) FROM nonces").fetchone() == (1,)
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_requests_that_race_for_a_nonce_one_gets_it(tmp_path: Path) -> None:
    won: list[int] = []
    with (
        contextlib.closing(Nonces(tmp_path / "nonces.db")) as one,
        contextlib.closing(Nonces(tmp_path / "nonces.db")) as other,
    ):

        def use(index: int) -> None:
            with contextlib.suppress(MessageError):
                (one, other)[index % 2].use("1", str(index), 100, 50.0)
                won.append(index)

        threads = [threading.Thread(target=use, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(won) == 1


def test_a_file_of_nonces_that_can_t_be_used_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "nonces.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(VeilgraftError, match=r"nonces.db: can't be used: .*made anew"):
        Nonces(path)
    full = tmp_path / "full.db"
    with contextlib.closing(Nonces(full)) as nonces:
        (pages,) = nonces._db.execute("PRAGMA page_count").fetchone()
        nonces._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(VeilgraftError, match="full"):
            for index in range(1000):
                nonces.use(f"{index:032x}", "sha256:" + "0" * 64, 10**9, 0.0)
        # It did not stay within a transaction, and says so again.
        assert not nonces._db.in_transaction
        held = sqlite3.connect(full, isolation_level=None)
        held.execute("BEGIN IMMEDIATE")
        held.execute("ROLLBACK")
        held.close()


def test_requests_of_another_type_than_expected_are_what_they_say(own: Party) -> None:
    asked = Request(site="a", study=CONTRACT.digest, run="r", round=1, head=messages.EMPTY)
    assert refused(own.ask(sealed(asked, b"", own.coordinator))) == "request-invalid"
