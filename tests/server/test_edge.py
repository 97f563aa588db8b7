"""The edge in front of a real SuperLink: what passes, what does not, and whose is what."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto import control_pb2, fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto import runtime_pb2 as runtime
from tests.server.superlink import (
    Run,
    Site,
    certify,
    client,
    contents,
    edge,
    reply_to,
    superlink,
)

from veilgraft.identity import SigningKey
from veilgraft_server import fleet
from veilgraft_server.edge import ENROL, HEALTH, OBJECT_BYTES
from veilgraft_server.fleet import MAX_OBJECTS
from veilgraft_server.registry import Registry

HOUR = 3600


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One SuperLink, one edge, and a way to invite."""
    folder = tmp_path_factory.mktemp("coordinator")
    certify(folder)
    with (
        superlink(folder) as address,
        edge(folder, address) as url,
        client(url, folder) as http,
        contextlib.closing(Registry(folder / "registry.db")) as registry,
    ):
        yield SimpleNamespace(
            folder=folder, address=address, url=url, http=http, registry=registry, made=0
        )


def _invited(world: SimpleNamespace) -> Site:
    world.made += 1
    site = Site(f"site{world.made}", world.http, f"token {world.made}")
    world.registry.invite(site.name, site.token, int(time.time()) + HOUR)
    return site


@pytest.fixture
def invited(world: SimpleNamespace) -> Site:
    return _invited(world)


@pytest.fixture
def pair(world: SimpleNamespace) -> tuple[Site, Site]:
    """Two sites that have enrolled and are active."""
    sites = _invited(world), _invited(world)
    for site in sites:
        assert site.enrol().status_code == site.activate().status_code == 200
    return sites


@pytest.fixture(scope="module")
def member(world: SimpleNamespace) -> Site:
    """One that has enrolled and is active, for tests that leave it as it is."""
    site = _invited(world)
    assert site.enrol().status_code == site.activate().status_code == 200
    return site


@pytest.fixture
def run(world: SimpleNamespace) -> Run:
    return Run(world.folder)


def test_an_invited_site_enrols_and_its_supernode_is_let_in(invited: Site) -> None:
    assert invited.activate().status_code == 401
    enrolled = invited.enrol()
    assert enrolled.json() == {"site": invited.name, "node_id": invited.node_id}
    assert invited.enrol().json() == enrolled.json()
    activated = fleet_pb2.ActivateNodeResponse.FromString(invited.activate().content)
    assert activated.node_id == invited.node_id
    assert invited.beat().status_code == 200


def test_no_answer_names_a_server_or_a_version(world: SimpleNamespace, member: Site) -> None:
    allowed = {"content-length", "content-type", "connection", "date"}
    answers = [world.http.get(HEALTH), world.http.get("/docs"), member.beat()]
    assert [answer.status_code for answer in answers] == [200, 403, 200]
    assert all(set(answer.headers) <= allowed for answer in answers)


_ATTACKS: list[tuple[str, Any]] = [
    ("/v1/control/start-run", control_pb2.StartRunRequest()),
    ("/v1/control/register-node", control_pb2.RegisterNodeRequest(public_key=b"k")),
    ("/v1/control/list-nodes", control_pb2.ListNodesRequest()),
    ("/v1/fleet/register-node", fleet_pb2.RegisterNodeFleetRequest(public_key=b"k")),
    ("/v1/fleet/unregister-node", fleet_pb2.UnregisterNodeFleetRequest(node_id=1)),
    ("/v1/runtime/acquire-task", runtime.AcquireTaskRequest()),
    ("/v1/runtime/push-object", message_pb2.PushObjectRequest()),
]


@pytest.mark.parametrize(("path", "attack"), _ATTACKS)
def test_what_only_the_coordinator_may_ask_is_forbidden_with_and_without_the_ca(
    world: SimpleNamespace, member: Site, path: str, attack: Any
) -> None:
    body = attack.SerializeToString()
    with httpx.Client(base_url=world.url, verify=False, trust_env=False) as stranger:
        answers = [stranger.post(path, content=body), world.http.post(path, content=body)]
    answers.append(world.http.post(path, content=body, headers=member.headers()))
    assert [(answer.status_code, answer.text) for answer in answers] == [(403, "forbidden\n")] * 3


def test_superlink_itself_would_have_answered_a_stranger(world: SimpleNamespace) -> None:
    with client(f"https://{world.address}", world.folder) as http:
        headers = {"content-type": "application/protobuf"}
        assert http.post("/v1/control/list-nodes", headers=headers).status_code == 200


def test_a_round_passes_and_one_whose_answers_were_lost_passes_too(
    world: SimpleNamespace, pair: tuple[Site, Site], run: Run
) -> None:
    site, _ = pair
    run.send(site.node_id, "question")
    message, tree = site.pull()
    assert site.call("get-run", run_pb2.GetRunRequest(node=site.node, run_id=run.id)).is_success
    for name in (tree.object_id, tree.children[0].object_id):
        pulled = message_pb2.PullObjectResponse.FromString(site.pull_object(run.id, name).content)
        assert pulled.object_available
    assert [site.confirm(run.id, tree.object_id).status_code for _ in range(2)] == [200, 200]
    reply = reply_to(message, "answer")
    site.push(reply)
    asked = fleet_pb2.PushMessagesResponse.FromString(site.push(reply).content)
    for name, content in contents(reply).items():
        for _ in range(2):
            pushed = site.push_object(run.id, asked.session_id, name, content)
            assert message_pb2.PushObjectResponse.FromString(pushed.content).stored
    (found,) = run.replies(message.metadata.message_id)
    assert found.metadata.src_node_id == site.node_id


def test_a_site_that_met_a_restart_of_the_edge_goes_on(
    world: SimpleNamespace, pair: tuple[Site, Site], run: Run
) -> None:
    site, _ = pair
    run.send(site.node_id, "question")
    message, tree = site.pull()
    with edge(world.folder, world.address) as url, client(url, world.folder) as http:
        again = replace(site, client=http)
        assert again.pull_object(run.id, tree.object_id).status_code == 200
        assert again.confirm(run.id, tree.object_id).status_code == 200
        assert again.push(reply_to(message, "answer")).status_code == 200


def test_a_site_can_neither_pull_nor_confirm_what_is_anothers(
    pair: tuple[Site, Site], run: Run
) -> None:
    thief, owner = pair
    run.send(owner.node_id, "for the owner")
    run.send(thief.node_id, "for the thief")
    _, tree = owner.pull()
    thief.pull()
    names = [tree.object_id, tree.children[0].object_id]
    assert {thief.pull_object(run.id, name).status_code for name in names} == {403}
    assert thief.confirm(run.id, tree.object_id).status_code == 403
    assert {owner.pull_object(run.id, name).status_code for name in names} == {200}
    assert owner.pull_object(run.id + 1, names[0]).status_code == 403


def test_a_site_cannot_ask_in_anothers_name(pair: tuple[Site, Site], run: Run) -> None:
    thief, owner = pair
    run.send(owner.node_id, "for the owner")
    disguised = replace(thief, node_id=owner.node_id)
    node, calls = owner.node, dict[str, Any]()
    calls["pull-messages"] = fleet_pb2.PullMessagesRequest(node=node)
    calls["send-node-heartbeat"] = heartbeat_pb2.SendNodeHeartbeatRequest(node=node)
    calls["deactivate-node"] = fleet_pb2.DeactivateNodeRequest(node_id=owner.node_id)
    calls["activate-node"] = fleet_pb2.ActivateNodeRequest(public_key=owner.pem)
    calls["get-run"] = run_pb2.GetRunRequest(node=node, run_id=run.id)
    calls["get-fab"] = fab_pb2.GetFabRequest(node=node, run_id=run.id, hash_str="0" * 64)
    assert {disguised.call(name, request).status_code for name, request in calls.items()} == {403}
    owner.pull()


def test_a_run_that_a_site_has_no_message_of_is_not_its_to_ask_about(
    pair: tuple[Site, Site], run: Run
) -> None:
    site, _ = pair
    request = run_pb2.GetRunRequest(node=site.node, run_id=run.id)
    assert site.call("get-run", request).status_code == 403


def test_a_site_can_reply_only_once_to_what_it_was_given_and_push_only_that(
    pair: tuple[Site, Site], run: Run
) -> None:
    thief, owner = pair
    run.send(owner.node_id, "for the owner")
    run.send(thief.node_id, "for the thief")
    message, _ = owner.pull()
    own, _ = thief.pull()
    reply, forged = reply_to(message, "said once"), reply_to(message, "forged")
    assert thief.push(forged).status_code == 403
    assert replace(thief, node_id=owner.node_id).push(forged).status_code == 403
    asked = fleet_pb2.PushMessagesResponse.FromString(owner.push(reply).content)
    assert owner.push(reply_to(message, "a second answer")).status_code == 403
    name, content = next(iter(contents(reply).items()))
    for session in (asked.session_id, ""):
        assert thief.push_object(run.id, session, name, content).status_code == 403
    assert owner.push_object(run.id, "", name, content).status_code == 403
    assert owner.push_object(run.id, asked.session_id, "0" * 64, b"").status_code == 403
    assert owner.push_object(run.id, asked.session_id, name, content).status_code == 200
    honest = reply_to(own, "said honestly")
    for other in (reply.object_id, message.metadata.message_id):
        assert thief.push(honest, _tree(honest, [other])).status_code == 403
    many = [f"{index:064x}" for index in range(MAX_OBJECTS)]
    assert thief.push(honest, _tree(honest, many)).status_code == 403
    unrooted = message_pb2.ObjectTree(object_id="0" * 64)
    assert thief.push(honest, unrooted).status_code == 403
    masked = reply_to(own, "said by another")
    masked.metadata.__dict__["_src_node_id"] = owner.node_id
    masked.metadata.__dict__["_message_id"] = masked.object_id
    assert thief.push(masked).status_code == 403
    assert thief.push(honest).status_code == 200


def test_a_reply_takes_no_more_than_so_many_bytes(
    pair: tuple[Site, Site], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = pair
    run.send(site.node_id, "question")
    message, _ = site.pull()
    reply = reply_to(message, "an answer of its own")
    objects = contents(reply)
    monkeypatch.setattr(fleet, "MAX_REPLY", sum(map(len, objects.values())) - 1)
    asked = fleet_pb2.PushMessagesResponse.FromString(site.push(reply).content)
    codes = [
        site.push_object(run.id, asked.session_id, name, content).status_code
        for name, content in objects.items()
    ]
    assert codes == [200] * (len(objects) - 1) + [403]
    monkeypatch.undo()
    name, content = list(objects.items())[-1]
    assert site.push_object(run.id, asked.session_id, name, content).status_code == 200


def _tree(reply: Any, names: list[str]) -> message_pb2.ObjectTree:
    children = [message_pb2.ObjectTree(object_id=name) for name in names]
    return message_pb2.ObjectTree(object_id=reply.object_id, children=children)


def test_a_revoked_site_is_refused_at_once(world: SimpleNamespace, pair: Any) -> None:
    site, other = pair
    world.registry.revoke(site.name)
    assert site.beat().status_code == 401
    pull = fleet_pb2.PullMessagesRequest(node=site.node)
    assert site.call("pull-messages", pull).status_code == 401
    assert site.enrol().status_code == 403
    assert other.beat().status_code == 200


@pytest.mark.parametrize(("ahead", "status"), [(4, 200), (6, 401), (-300, 200), (-306, 401)])
def test_a_clock_may_be_off_as_far_as_flower_allows(
    member: Site, ahead: float, status: int
) -> None:
    assert member.beat(ahead).status_code == status


def test_a_request_without_its_signature_or_with_anothers_is_nobodys(
    world: SimpleNamespace, pair: tuple[Site, Site]
) -> None:
    site, other = pair
    good, theirs = site.headers(), other.headers()
    body = fleet_pb2.PullMessagesRequest(node=site.node).SerializeToString()
    for name in good:
        for changed in ({}, {name: theirs[name]}, {name: "é".encode()}, {name: b"?"}):
            headers: Any = {key: value for key, value in good.items() if key != name} | changed
            answer = world.http.post("/v1/fleet/pull-messages", content=body, headers=headers)
            assert (answer.status_code, answer.text) == (401, "unknown\n")
    answer = world.http.post("/v1/fleet/pull-messages", content=b"\xff\xff", headers=good)
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "misuse",
    [
        lambda site: site.enrol(token="another"),
        lambda site: site.enrol(site="nobody"),
        lambda site: site.enrol(time=int(time.time()) - 301),
        lambda site: site.enrol(time=str(int(time.time()))),
        lambda site: site.enrol(more=1),
        lambda site: site.enrol(identity=SigningKey.generate().public.text),
        lambda site: site.enrol(node=Site("x", site.client).pem.decode()),
        lambda site: site.enrol(node="no key"),
        lambda site: site.post_enrolment(b"{}", b"{}", b"{}"),
        lambda site: site.post_enrolment(b"[", b"[", b"["),
        lambda site: site.client.post(ENROL, content=b"{}"),
    ],
)
def test_an_enrolment_that_is_wrong_in_anything_gets_one_fixed_answer_and_burns_nothing(
    invited: Site, misuse: Callable[[Site], httpx.Response]
) -> None:
    answer = misuse(invited)
    assert (answer.status_code, answer.text) == (403, "forbidden\n")
    assert invited.enrol().status_code == 200


def test_a_token_is_good_for_one_pair_of_keys(world: SimpleNamespace, invited: Site) -> None:
    assert invited.enrol().status_code == 200
    assert Site(invited.name, world.http, invited.token).enrol().status_code == 403
    other = replace(_invited(world), key=invited.key)
    assert other.enrol().status_code == 403


def test_without_superlink_enrolment_is_503_and_the_token_stays_good(
    world: SimpleNamespace, invited: Site, member: Site
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nowhere = f"127.0.0.1:{probe.getsockname()[1]}"
    with edge(world.folder, nowhere) as url, client(url, world.folder) as http:
        lost = Site(invited.name, http, invited.token).enrol()
        assert (lost.status_code, lost.text) == (503, "unavailable\n")
        assert replace(member, client=http).beat().status_code == 502
    assert invited.enrol().status_code == 200


def test_a_superlink_that_does_not_answer_is_504(world: SimpleNamespace, member: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        served = edge(world.folder, address, superlink_seconds=0.3)
        with served as url, client(url, world.folder) as http:
            assert replace(member, client=http).beat().status_code == 504


def test_a_body_above_its_limit_is_413(world: SimpleNamespace, member: Site) -> None:
    def post(path: str, size: int, chunked: bool) -> int:
        content: Any = iter([bytes(size)]) if chunked else bytes(size)
        answer: httpx.Response = world.http.post(path, content=content, headers=member.headers())
        return answer.status_code

    for chunked in (False, True):
        assert post(ENROL, 8193, chunked) == 413
        assert post("/v1/fleet/get-run", (1 << 16) + 1, chunked) == 413
        assert post("/v1/fleet/push-object", OBJECT_BYTES + 1, chunked) == 413
    assert post(ENROL, 8192, False) == 403
