"""Nodes that start anew, and nodes that leave, between the coordinator's question and an answer."""

import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.server.network import network
from tests.server.test_post import A, B, approve, asked, released

from veilgraft_server import post as posts


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(posts, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(posts, "RESTARTED_SECONDS", 0.1)
    monkeypatch.setattr(posts, "AWAY_SECONDS", 1.0)


def test_what_a_node_took_along_when_it_ended_is_asked_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with network(tmp_path, "a") as net:
        approve(net)
        lost: list[float] = []
        began = time.time() + 0.2

        def middle(node: int, question: Any, vault: Any) -> Any:
            lost.append(time.time())
            return vault(question) if len(lost) > 1 else None

        def nodes() -> list[Any]:
            there = datetime.fromtimestamp(began, UTC).isoformat()
            return [SimpleNamespace(node_id=A, last_activated_at=there)]

        net.middle = middle
        monkeypatch.setattr(net.grid, "get_nodes", nodes)
        found = net.post.ask({"a": asked(A, "a")}, released, 30.0)
    assert set(found.valid) == {"a"}
    assert len(lost) == 2
    assert lost[1] - lost[0] < posts.RESEND_SECONDS


def test_a_site_that_has_left_holds_up_one_round_and_no_further_one(tmp_path: Path) -> None:
    with network(tmp_path, "a", "b") as net:
        approve(net)
        post = net.post
        net.grid.there.remove(B)
        seconds = []
        for round_ in (1, 2):
            began = time.monotonic()
            questions = {"a": asked(A, "a", round_), "b": asked(B, "b", round_)}
            found = post.ask(questions, released, 30.0)
            seconds.append(time.monotonic() - began)
            assert set(found.valid) == {"a"}
            assert "away" in found.failed["b"]
    assert seconds[1] < posts.AWAY_SECONDS <= seconds[0]
