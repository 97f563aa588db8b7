"""Who takes part: greeting, the backbone on its way, and sites that keep the others waiting."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.gated import BACKBONE, DIGEST, study
from tests.server.grid import FIRST_NODE
from tests.server.network import Network, network

from veilgraft import messages
from veilgraft.errors import QuorumError
from veilgraft.messages import Envelope, Here, Wanted
from veilgraft.study import Study
from veilgraft_server import distribution
from veilgraft_server import post as posts
from veilgraft_server import sites as greeting
from veilgraft_server.sites import Sites

A, B = FIRST_NODE, FIRST_NODE + 1
Vault = Callable[[Envelope], Envelope]
TOTAL = sum(path.stat().st_size for path in BACKBONE.iterdir())


def contract(quorum: int = 1, **aggregation: Any) -> Study:
    return study(aggregation={"quorum": quorum, "timeout": 20.0, **aggregation})


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(posts, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(posts, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the backbone travel in many parts."""
    whole = distribution.parts

    def parts(folder: Path, missing: Any, **options: Any) -> Any:
        return whole(folder, missing, max(20_000, TOTAL // 12), **options)

    monkeypatch.setattr(distribution, "parts", parts)


def sites(net: Network, asked: Study, met: list[Here] | None = None) -> Sites:
    told = [] if met is None else met
    return Sites(asked, "r", net.post, BACKBONE, told.append)


def ready(net: Network, asked: Study, *nodes: int) -> None:
    """Approve at these nodes, and give them the backbone by hand."""
    for node in nodes:
        net.parties[node].approve(asked)
        net.parties[node].bundles.add(BACKBONE, DIGEST)


def forged(net: Network, node: int, question: Envelope, payload: bytes) -> Envelope:
    """Return a site's own answer to a part or an offer, with any payload."""
    own = net.parties[node]
    request = messages.digest(question.header)
    header = Wanted(site=own.name, request=request, payload=messages.digest(payload)).encode()
    return Envelope(header, payload, own.identity.sign("answer", header))


def is_about_backbone(question: Envelope) -> bool:
    return messages.decode_question(question.header).kind in ("offer", "part")


def test_sites_that_are_ready_take_part_at_once(tmp_path: Path) -> None:
    asked, met = contract(2), list[Here]()
    with network(tmp_path, "a", "b") as net:
        ready(net, asked, A, B)
        own = sites(net, asked, met)
        own.wait(10.0)
        assert own.ready == {A: "a", B: "b"}
        assert [here.site for here in met] == ["a", "b"]
        assert net.kinds(A) == ["hello"]


def test_a_site_joins_once_a_person_there_has_approved(tmp_path: Path) -> None:
    asked = contract()
    with network(tmp_path, "a", "b") as net:
        ready(net, asked, A)
        own = sites(net, asked)
        own.refresh()
        assert own.ready == {A: "a"}
        assert list(net.parties[B].studies.proposed()) == [asked.digest]
        ready(net, asked, B)
        own.refresh()
        assert own.ready == {A: "a", B: "b"}
        assert net.kinds(A) == ["hello"]


def test_too_few_is_an_error_after_so_long(tmp_path: Path) -> None:
    asked = contract(2)
    with network(tmp_path, "a") as net:
        ready(net, asked, A)
        with pytest.raises(
            QuorumError, match=r"1 sites ready after 0.1 s; aggregation.quorum is 2"
        ):
            sites(net, asked).wait(0.1)


@pytest.mark.usefixtures("small")
def test_the_backbone_is_sent_in_windows_to_who_lacks_it(tmp_path: Path) -> None:
    asked = contract(2)
    with network(tmp_path, "a", "b") as net:
        for own in net.parties.values():
            own.approve(asked)
        made = sites(net, asked)
        made.refresh(windows=1)
        assert made.ready == {}
        assert net.kinds(A) == ["hello", "offer"] + ["part"] * greeting.WINDOW
        made.wait(30.0)
        assert made.ready == {A: "a", B: "b"}
        for own in net.parties.values():
            assert own.bundles.path(DIGEST).is_dir()
            assert own.prepared == [asked]
        # What is there is not sent again.
        sent = [q.offset for n, q in net.seen if n == A and q.kind == "part" and "model" in q.name]
        assert sorted(set(sent)) == sorted(sent)


@pytest.mark.usefixtures("small")
def test_a_delivery_that_broke_off_goes_on(tmp_path: Path) -> None:
    asked = contract()
    with network(tmp_path, "a") as net:
        net.parties[A].approve(asked)
        made, broken = sites(net, asked), [0]

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            if is_about_backbone(question):
                broken[0] += 1
                if broken[0] > 6:
                    raise OSError("broken off")
            return vault(question)

        net.middle = middle
        made.refresh(within=0.5)
        assert made.ready == {}
        net.middle = None
        before = len(net.seen)
        made.wait(30.0)
        assert made.ready == {A: "a"}
        offsets = [q.offset for _, q in net.seen[before:] if q.kind == "part"]
        assert offsets
        assert min(offsets) > 0


WANTED = [
    b"",
    b"[]",
    b"{}",
    b'{"missing":[]}',
    b'{"missing":{"../x":0}}',
    b'{"missing":{"none.json":0}}',
    b'{"missing":{"config.json":-1}}',
    b'{"missing":{"config.json":1e400}}',
    b'{"missing":{"config.json":0.5}}',
    b'{"missing":{"config.json":true}}',
    b'{"missing":{"config.json":999999999}}',
    b'{"missing":{"config.json":"0"}}',
    b"[" * 60_000,
    b" " * 70_000,
]


@pytest.mark.parametrize("payload", WANTED)
def test_a_site_that_wants_nonsense_is_left_out_and_harms_nobody(
    tmp_path: Path, payload: bytes
) -> None:
    asked = contract()
    with network(tmp_path, "a", "b") as net:
        net.parties[A].approve(asked)
        ready(net, asked, B)

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            if is_about_backbone(question):
                return forged(net, node, question, payload)
            return vault(question)

        net.middle = middle
        own = sites(net, asked)
        own.refresh()
        assert set(own.ready) - {A} == {B}
        assert "part" not in net.kinds(A)


def test_a_site_that_wants_the_backbone_for_ever_gets_it_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.0)
    asked = contract()
    everything = json.dumps({"missing": dict.fromkeys([p.name for p in BACKBONE.iterdir()], 0)})
    with network(tmp_path, "a", "b") as net:
        net.parties[A].approve(asked)
        ready(net, asked, B)

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope:
            if is_about_backbone(question):
                return forged(net, node, question, everything.encode())
            return vault(question)

        net.middle = middle
        own = sites(net, asked)
        own.wait(30.0)
        assert own.ready == {B: "b"}
        for _ in range(12):
            own.refresh()
        sent = own._sent["a"]
        assert sent < (greeting.COPIES + greeting.WINDOWS) * TOTAL
        parts = net.kinds(A).count("part")
        own.refresh()
        assert net.kinds(A).count("part") == parts


def test_a_site_that_gets_on_by_nothing_is_greeted_ever_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 10.0)
    asked = contract()
    with network(tmp_path, "a") as net:
        own = sites(net, asked)
        own._greeted[A] = 100.0
        due = []
        for fruitless in (0, 1, 2, 3, 4, 50):
            own._fruitless[A] = fruitless
            due.append(next(s for s in range(1000) if own._is_due(A, 100.0 + s)))
        assert due == [10, 20, 40, 80, 160, 160]


def test_late_sites_take_so_much_of_the_others_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = contract()
    with network(tmp_path, "a", "b") as net:
        net.parties[A].approve(asked)
        ready(net, asked, B)

        def middle(node: int, question: Envelope, vault: Vault) -> Envelope | None:
            return None if is_about_backbone(question) else vault(question)

        net.middle = middle
        own = sites(net, asked)
        began = time.monotonic()
        own.refresh(within=0.5)
        assert time.monotonic() - began < 20
        assert own.ready == {B: "b"}
        assert own._fruitless == {A: 1, B: 0}


def test_a_name_that_two_nodes_claim_is_nobody_s(tmp_path: Path) -> None:
    asked = contract()
    with network(tmp_path, "a", "a") as net:
        ready(net, asked, A, B)
        own = sites(net, asked)
        own.refresh()
        assert own.ready == {}


def test_a_node_can_t_take_a_name_that_takes_part(tmp_path: Path) -> None:
    asked = contract()
    with network(tmp_path, "a", "a") as net:
        ready(net, asked, A, B)
        net.grid.there = {A}
        own = sites(net, asked)
        own.refresh()
        net.grid.there = {A, B}
        own.refresh()
        assert own.ready == {A: "a"}


def test_a_site_that_joined_anew_stands_in_its_old_node_s_place(tmp_path: Path) -> None:
    asked = contract()
    with network(tmp_path, "a", "a") as net:
        ready(net, asked, A, B)
        net.grid.there = {A}
        own = sites(net, asked)
        own.refresh()
        net.grid.there = {B}
        own.refresh()
        assert own.ready == {B: "a"}


def test_a_site_that_left_is_asked_no_more_while_the_quorum_holds(tmp_path: Path) -> None:
    asked = contract(1)
    with network(tmp_path, "a", "b") as net:
        ready(net, asked, A, B)
        own = sites(net, asked)
        own.refresh()
        net.grid.there = {B}
        own.refresh()
        assert own.ready == {B: "b"}
        net.grid.there = {A, B}
        own.refresh()
        assert own.ready == {A: "a", B: "b"}
        # Where all seem to be away, it is the coordinator's own link that broke.
        net.grid.there = set()
        own.refresh()
        assert own.ready == {A: "a", B: "b"}


def test_a_site_that_said_no_is_greeted_anew_and_gets_what_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = contract(1)
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 60.0)
    with network(tmp_path, "a", "b") as net:
        ready(net, asked, A, B)
        own = sites(net, asked)
        own.refresh()
        net.parties[A].bundles.purge()
        net.parties[B].desk.do("withdraw", asked.digest)
        own.doubt([A, B])
        assert own.ready == {}
        own.refresh(windows=64)
        assert own.ready == {A: "a"}
        assert net.parties[A].bundles.path(DIGEST).is_dir()


def test_a_site_without_a_weight_is_left_out(tmp_path: Path) -> None:
    asked = contract(weights={"b": 1.0})
    with network(tmp_path, "a", "b") as net:
        ready(net, asked, A, B)
        own = sites(net, asked)
        own.refresh()
        assert own.ready == {B: "b"}
