"""Questions to sites behind real gates, through couriers and networks that can't be trusted."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MessageType
from tests.client.gated import DIM, study
from tests.server.grid import FIRST_NODE
from tests.server.network import Network, network

from veilgraft import messages
from veilgraft.errors import MessageError, Refusal
from veilgraft.identity import SigningKey
from veilgraft.messages import Envelope, Refused, Release, Reply, Request
from veilgraft.model import head as heads
from veilgraft_server import post as posts
from veilgraft_server.post import Answers, Asked

CONTRACT = study()
A, B = FIRST_NODE, FIRST_NODE + 1
Vault = Callable[[Envelope], Envelope]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(posts, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(posts, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(posts, "RESEND_SECONDS", 0.2)


def asked(node: int, site: str, round_: int = 1) -> Asked:
    shapes = heads.shapes(CONTRACT.head, DIM, 3)
    payload = messages.pack({name: np.zeros(shape) for name, shape in shapes.items()})
    request = Request(
        site=site,
        study=CONTRACT.digest,
        run="r",
        round=round_,
        head=messages.digest(payload),
        rate=0.1,
    )
    return Asked(node, request, payload, MessageType.TRAIN, str(round_))


def released(reply: Reply, payload: bytes) -> bytes:
    if not isinstance(reply, Release):
        raise MessageError("expected a release")
    return payload


def ask(net: Network, timeout: float = 20.0) -> Answers[str, bytes]:
    questions = {p.name: asked(node, p.name) for node, p in net.parties.items()}
    return net.post.ask(questions, released, timeout)


def approve(net: Network) -> None:
    for own in net.parties.values():
        own.approve(CONTRACT)


def test_what_sites_signed_comes_back(tmp_path: Path) -> None:
    with network(tmp_path, "a", "b") as net:
        approve(net)
        answers = ask(net)
        assert answers.failed == {}
        assert set(answers.valid) == {"a", "b"}
        assert answers.valid["a"] != answers.valid["b"]
        assert [own.spent for own in net.parties.values()] == [1, 1]


def _signed(key: SigningKey, answer: Envelope, **changes: Any) -> Envelope:
    header = json.dumps(json.loads(answer.header) | changes).encode()
    return Envelope(header, answer.payload, key.sign("answer", header))


FALSE: dict[str, tuple[Callable[[Network, Envelope], Envelope], str]] = {
    "by another key": (
        lambda net, e: _signed(SigningKey.generate(), e),
        "the signature is not by",
    ),
    "by another site": (
        lambda net, e: _signed(net.parties[B].identity, e),
        "the signature is not by",
    ),
    "in the domain of requests": (
        lambda net, e: replace(e, signature=net.parties[A].identity.sign("request", e.header)),
        "the signature is not by",
    ),
    "in another's name": (
        lambda net, e: _signed(net.parties[A].identity, e, site="b"),
        "names another site",
    ),
    "another payload": (
        lambda net, e: replace(e, payload=e.payload + b" "),
        "does not fit the payload",
    ),
    "of another request": (
        lambda net, e: _signed(net.parties[A].identity, e, request=messages.EMPTY),
        "answers another request",
    ),
    "a no": (
        lambda net, e: _signed(
            net.parties[A].identity,
            Envelope(
                Refused(
                    site="a",
                    request=json.loads(e.header)["request"],
                    code=Refusal.ROUND_CONFLICT,
                ).encode()
            ),
        ),
        "refused: round-conflict",
    ),
    "no header": (lambda net, e: replace(e, header=b"{"), "header"),
    "nothing": (lambda net, e: Envelope(b"", b"", b"x"), "header"),
}


@pytest.mark.parametrize("name", FALSE)
def test_what_the_site_did_not_sign_does_not_count(tmp_path: Path, name: str) -> None:
    change, reason = FALSE[name]
    with network(tmp_path, "a", "b") as net:
        approve(net)

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            answer = vault(question)
            return change(net, answer) if node == A else answer

        net.middle = middle
        answers = ask(net)
        assert set(answers.valid) == {"b"}
        assert reason in answers.failed["a"]


def test_one_site_s_answer_is_worth_nothing_for_another_s(tmp_path: Path) -> None:
    with network(tmp_path, "a", "b") as net:
        approve(net)
        kept: list[Envelope] = []

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            kept.append(vault(question))
            return kept[0]

        net.middle = middle
        answers = ask(net)
        assert set(answers.valid) == {"a"}
        assert "the signature is not by" in answers.failed["b"]


def test_yesterday_s_answer_is_worth_nothing_today(tmp_path: Path) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        kept: list[Envelope] = []

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            kept.append(vault(question))
            return kept[0]

        net.middle = middle
        assert set(ask(net).valid) == {"a"}
        assert ask(net).failed == {"a": "answers another request"}


def test_a_node_that_nobody_knows_does_not_count(tmp_path: Path) -> None:
    with network(tmp_path, "a", "b") as net:
        approve(net)
        del net.known[A]
        answers = ask(net)
        assert set(answers.valid) == {"b"}
        assert "knows no site" in answers.failed["a"]


def test_a_lost_answer_is_asked_for_again_and_costs_nothing_more(tmp_path: Path) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        lost: list[Envelope] = []

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope | None:
            answer = vault(question)
            if len(lost) < 2:
                lost.append(answer)
                return None
            return answer

        net.middle = middle
        answers = ask(net)
        assert answers.valid == {"a": lost[0].payload}
        assert net.parties[A].spent == 1
        questions = [question for _, question in net.seen]
        assert [question.attempt for question in questions] == [1, 2, 3]
        assert len({question.nonce for question in questions}) == 3


def test_a_courier_without_a_vault_is_asked_again(tmp_path: Path) -> None:
    with network(tmp_path, "a") as net:
        approve(net)

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            if len(net.seen) < 4:
                raise OSError("no vault")
            return vault(question)

        net.middle = middle
        assert set(ask(net).valid) == {"a"}
        assert [question.attempt for _, question in net.seen] == [1, 2, 3, 4]


def test_what_is_never_answered_ends_with_the_time_and_is_asked_ever_less_often(
    tmp_path: Path,
) -> None:
    with network(tmp_path, "a") as net:
        net.middle = lambda node, question, vault: None
        began = time.monotonic()
        assert ask(net, 1.0).failed == {"a": "no answer"}
        assert time.monotonic() - began < 5
        assert 2 <= len(net.seen) <= 4


def test_asking_for_ever_never_overflows() -> None:
    waiting = posts._Waiting(asked(A, "a"), attempt=10_000)
    assert waiting.patience == 1 << posts.DOUBLINGS


def test_a_node_that_is_away_is_waited_for_no_longer_than_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posts, "AWAY_SECONDS", 0.5)
    with network(tmp_path, "a", "b") as net:
        approve(net)
        net.grid.there = {B}
        began = time.monotonic()
        answers = ask(net, 60.0)
        assert 0.5 <= time.monotonic() - began < 20
        assert set(answers.valid) == {"b"}
        assert answers.failed == {"a": "away: no answer"}


def test_a_node_that_comes_back_in_time_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        net.grid.there = set()
        count, nodes = [0], net.grid.get_nodes

        def looked() -> Any:
            count[0] += 1
            if count[0] == 3:
                net.grid.there = {A}
            return nodes()

        monkeypatch.setattr(net.grid, "get_nodes", looked)
        assert set(ask(net).valid) == {"a"}


def test_an_answer_that_comes_twice_or_late_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        taken = []
        pull = net.grid.pull_messages

        def twice(ids: Any) -> Any:
            found = list(pull(ids))
            taken.extend(found)
            return found + taken

        monkeypatch.setattr(net.grid, "pull_messages", twice)
        assert set(ask(net).valid) == {"a"}
        questions = {"a": asked(A, "a", 2)}
        assert set(net.post.ask(questions, released, 20.0).valid) == {"a"}


def test_a_question_is_good_for_less_than_a_site_allows_however_long_is_waited(
    tmp_path: Path,
) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        questions = {"a": asked(A, "a")}
        assert set(net.post.ask(questions, released, 30 * 24 * 3600.0).valid) == {"a"}
        (expires,) = [question.expires for _, question in net.seen]
        assert expires is not None
        assert expires - time.time() <= posts.VALID_SECONDS + posts.SKEW_SECONDS


def test_a_record_of_no_known_form_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    with network(tmp_path, "a") as net:
        foreign = RecordDict({"header": ConfigRecord({"bytes": [1.0]})})
        monkeypatch.setattr(net.grid, "answered", lambda asked: Message(foreign, reply_to=asked))
        assert "expected a record" in ask(net).failed["a"]
