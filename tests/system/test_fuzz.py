"""Bytes that nobody sane would send, at every door: no crash, no spend, no byte of data.

Cases are derived from the tests' own names, so that a failure comes again. A few hundred run
always, thousands under `make drill`.
"""

import asyncio
import base64
import contextlib
import copy
import json
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.client.test_bundles import DEMO, manifest
from tests.client.test_vault import request, study, vault
from tests.server.superlink import Site as Member
from tests.server.superlink import certify, client, reply_to, superlink
from tests.server.superlink import edge as serve_edge

from veilgraft import messages
from veilgraft.chain import ChainError
from veilgraft.errors import InputError, MessageError, Refusal, VeilgraftError
from veilgraft.events import EventLog
from veilgraft.identity import SigningKey
from veilgraft.invitation import Coordinator, Invitation, Rotation
from veilgraft.messages import Envelope, Offer, Part, Refused, Release
from veilgraft.model import bundle
from veilgraft.service.chunks import join
from veilgraft.service.vault_pb2 import Chunk
from veilgraft.study import Study
from veilgraft_client.bundles import Bundles
from veilgraft_client.connection import VaultClient
from veilgraft_client.gate import Gate, Nonces
from veilgraft_client.policy import Site
from veilgraft_client.service import Service
from veilgraft_client.studies import Studies
from veilgraft_deploy import launch, pidfile, supervisor
from veilgraft_server import fleet
from veilgraft_server.carrier import Flower
from veilgraft_server.edge import ENROL, Edge, Settings, route
from veilgraft_server.folder import Settings as CoordinatorSettings
from veilgraft_server.post import Asked, Post
from veilgraft_server.registry import Registry

Case = TypeVar("Case")
FEW, MANY = 200, 5000
DEEP = "[" * 20_000
TOKENS = [b"", b"\0", b"\xff" * 9, b"{}", b"[]", b"null", b"1e999", b"NaN", b"-1", b'"', b"../" * 9]
TOKENS += [b"9" * 5000, b"Infinity", b"\\u0000", DEEP.encode(), b'{"kind":', b"%2e%2e", b"\r\n\r\n"]
JUNK: list[Any] = [None, True, -1, 0, 1.5, 2**70, 1e308, float("nan"), float("inf"), "", "x" * 5000]
JUNK += ["../../etc/passwd", "\x1b[2J", "\0", [], {}, [[]], {"a": 1}, {"": None}, "\ud800", "1e999"]


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.drill)], ids=["few", "many"])
def examples(request: pytest.FixtureRequest) -> int:
    """How many cases."""
    return int(request.param)


def fuzz(cases: st.SearchStrategy[Case], check: Callable[[Case], object], examples: int) -> None:
    """Run `check` on so many cases, the same ones each time."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Case) -> None:
        check(case)

    run()


@st.composite
def mutated(draw: st.DrawFn, *bases: bytes) -> bytes:
    """Draw one of `bases` with a few changes, or bytes of no form at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = draw(st.sampled_from(bases))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        upto = min(len(data), at + draw(st.integers(0, 12)))
        new = draw(
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4), st.just(data[at:upto]))
        )
        how = draw(st.integers(0, 3))
        if how == 0:
            data = data[:at] + new + data[upto:]
        elif how == 1:
            data = data[:at] + new + data[at:]
        elif how == 2:
            data = data[:at]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return data


@st.composite
def altered(draw: st.DrawFn, values: Mapping[str, Any]) -> Any:
    """Draw a mapping with junk in one or two of its places, or with a key too many or too few."""
    whole = copy.deepcopy(dict(values))
    for _ in range(draw(st.integers(1, 2))):
        holder: Any = whole
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                holder = inner
                continue
            how = draw(st.integers(0, 5))
            if how == 0:
                del holder[key]
            elif how == 1 and isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            else:
                holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            break
    return whole


def only(
    *expected: type[Exception],
) -> contextlib.AbstractContextManager[None]:
    """Let these errors pass; any other fails the test."""
    return contextlib.suppress(*expected)


# Messages.

CONTRACT = study()
ASKED = request(CONTRACT)
SEAL: dict[str, Any] = {"key": "sha256:" + "0" * 64, "nonce": "0" * 32, "expires": 2_000_000_000}
HEADERS = [
    ASKED.header,
    messages.Hello(study=CONTRACT.digest, run="r", **SEAL).encode(),
    Offer(site="a", study=CONTRACT.digest, run="r", payload=messages.EMPTY).encode(),
    Part(
        site="a", study=CONTRACT.digest, run="r", name="f", offset=0, payload=messages.EMPTY
    ).encode(),
]
REPLIES = [
    kind(site="a", request=messages.EMPTY).encode()
    for kind in (messages.Here, messages.Wanted, Release)
] + [Refused(site="a", request=messages.EMPTY, code=Refusal.UNAVAILABLE).encode()]


def test_headers_of_any_bytes_give_a_message_or_a_message_error(examples: int) -> None:
    def check(data: bytes) -> None:
        for decode in (messages.decode_question, messages.decode_answer):
            with only(MessageError):
                assert len(decode(data).encode()) < 3 * messages.MAX_HEADER

    fuzz(mutated(*HEADERS, *REPLIES), check, examples)


def test_a_payload_of_any_bytes_gives_just_the_arrays_that_were_asked_for(examples: int) -> None:
    shapes = {"a": (2, 3), "b": (1,)}
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    good = messages.pack(arrays)
    types = [
        b"F64",
        b"F32",
        b"BF16",
        b"F16",
        b"F8_E4M3",
        b"F8_E5M2",
        b"F4",
        b"C64",
        b"BOOL",
        b"U64",
    ]
    others = [good.replace(b"F64", each.ljust(3)) for each in types]
    others += [
        messages.pack({"a": np.full((2, 3), value), "b": np.ones(1)}) for value in (np.nan, 1e308)
    ]

    def check(data: bytes) -> None:
        with only(MessageError):
            found = messages.unpack(data, shapes)
            assert {name: array.shape for name, array in found.items()} == shapes
            assert all(np.isfinite(array).all() for array in found.values())

    fuzz(mutated(good, *others), check, examples)


def test_a_flower_record_of_any_form_gives_bytes_or_a_message_error(examples: int) -> None:
    values = st.one_of(st.binary(max_size=20), st.text(max_size=9), st.integers(-9, 9), st.floats())
    keys = st.sampled_from(["bytes", "signature", "data", "header"])
    config = st.builds(ConfigRecord, st.dictionaries(keys, values))
    metric = st.builds(MetricRecord, st.dictionaries(keys, st.integers(-9, 9)))
    array = st.builds(
        lambda name, kind, shape, data: ArrayRecord({name: Array(kind, shape, "x", data)}),
        keys,
        st.sampled_from(["uint8", "", "object"]),
        st.sampled_from([(), (3,), (-1, 2**40)]),
        st.binary(max_size=20),
    )
    names = st.sampled_from(["header", "payload", "x"])
    records = st.dictionaries(names, st.one_of(config, metric, array)).map(RecordDict)

    def check(record: RecordDict) -> None:
        with only(MessageError):
            found = messages.from_record(record)
            assert all(type(part) is bytes for part in vars(found).values())

    fuzz(records, check, examples)


# The gate, with a real vault behind it.


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[tuple[Gate, Any, SigningKey]]:
    """A gate with a study approved, its vault and the coordinator's key."""
    own = vault(
        tmp_path, reply_seconds=1e-4, limits={"max_epsilon": 50.0, "requests_per_minute": 100_000}
    )
    own.approve(CONTRACT)
    coordinator = SigningKey.generate()
    with (
        contextlib.closing(Nonces(tmp_path / "state" / "nonces.db")) as nonces,
        contextlib.closing(EventLog(tmp_path / "state" / "events.db")) as events,
    ):
        yield (
            Gate(
                own,
                Studies(tmp_path / "state"),
                Bundles(tmp_path / "state" / "backbones", 1 << 20),
                coordinator=lambda: coordinator.public,
                identity=SigningKey.generate(),
                nonces=nonces,
                events=events,
            ),
            own,
            coordinator,
        )
    own.ledger.close()


def _sealed(envelope: Envelope, key: SigningKey, nonce: str) -> Envelope:
    values = json.loads(envelope.header)
    values |= {"key": key.public.id, "nonce": nonce, "expires": int(time.time()) + 600}
    header = json.dumps(values).encode()
    return Envelope(header, envelope.payload, key.sign("request", header))


def test_the_gate_releases_nothing_that_is_not_signed_as_it_came(
    gate: tuple[Gate, Any, SigningKey], examples: int
) -> None:
    door, own, key = gate
    base = _sealed(ASKED, key, "0" * 32)
    before = own.ledger.head()
    cases = st.tuples(mutated(base.header), mutated(base.payload), mutated(base.signature))
    takes = st.tuples(st.booleans(), st.booleans(), st.booleans())

    def check(case: tuple[tuple[bytes, bytes, bytes], tuple[bool, bool, bool]]) -> None:
        parts, taken = case
        whole = (base.header, base.payload, base.signature)
        made = Envelope(*(p if t else w for p, t, w in zip(parts, taken, whole, strict=True)))
        if made == base:
            return
        answer = door.handle(made)
        assert isinstance(messages.decode_answer(answer.header), Refused)
        assert answer.payload == b""
        assert own.ledger.head() == before

    fuzz(st.tuples(cases, takes), check, examples)


def test_what_the_coordinator_itself_signs_badly_spends_nothing(
    gate: tuple[Gate, Any, SigningKey], examples: int
) -> None:
    door, own, key = gate
    before = own.ledger.head()
    base = json.loads(_sealed(ASKED, key, "0" * 32).header)
    number = iter(range(10**9))

    def check(case: tuple[dict[str, Any], bytes]) -> None:
        values, payload = case
        with contextlib.suppress(TypeError):
            if values.get("nonce") == base["nonce"]:
                values["nonce"] = f"{next(number):032x}"
        header = json.dumps(values).encode()
        answer = door.handle(Envelope(header, payload, key.sign("request", header)))
        reply = messages.decode_answer(answer.header)
        if isinstance(reply, Release):  # changes that a request may have
            assert messages.decode_question(header).payload == messages.digest(ASKED.payload)
            return
        assert answer.payload == b""

    fuzz(st.tuples(altered(base), mutated(ASKED.payload)), check, examples)
    spent = own.ledger.events("a")
    assert len(spent) <= CONTRACT.training.rounds, before


# The vault's socket.


def test_a_stream_of_chunks_gives_the_whole_message_or_an_error(examples: int) -> None:
    few = st.binary(max_size=6)
    chunk = st.builds(Chunk, header=few, signature=few, size=st.integers(0, 40), data=few)

    def check(chunks: list[Chunk]) -> None:
        with only(MessageError):
            found = join(iter(chunks), 64)
            assert found.payload == b"".join(each.data for each in chunks)
            assert list(found.header) == list(chunks[0].header)

    fuzz(st.lists(chunk, max_size=5), check, examples)


def test_any_bytes_on_the_courier_s_socket_leave_the_vault_serving(
    tmp_path: Path, examples: int
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "run").mkdir(mode=0o750)
    path = tmp_path / "run" / "courier.sock"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    setup = preface + b"\0\0\0\4\0\0\0\0\0"
    headers = b"\0\0\4\1\4\0\0\0\1\x83\x86\x84\x41"
    frames = [
        setup,
        setup + headers,
        setup + b"\xff\xff\xff\0\0\0\0\0\1" + b"x" * 9999,
        preface * 9,
    ]
    frames += [
        setup + b"\0\0\4\3\0\0\0\0\1\0\0\0\0" * 99,
        setup + b"\0\0\x08\6\0\0\0\0\0" + b"p" * 8,
    ]
    served = {
        "handle": lambda envelope: envelope,
        "desk": lambda *_: {},
        "courier_socket": path,
        "local_socket": tmp_path / "state" / "local.sock",
        "allowed_uids": frozenset({os.geteuid()}),
        "stop_seconds": 1.0,
    }

    def check(data: bytes) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(0.02)
            peer.connect(str(path))
            peer.sendall(data)
            with contextlib.suppress(TimeoutError):
                peer.recv(4096)

    with Service(**served):  # type: ignore[arg-type]
        fuzz(mutated(*frames), check, examples // 2)
        asked = Envelope(b"header", b"payload", b"")
        assert VaultClient(path, 20.0).handle(asked) == asked


# Backbones.


def test_manifests_and_parts_of_any_form_write_only_where_they_may(
    tmp_path: Path, examples: int
) -> None:
    store, digest, offered = (
        Bundles(tmp_path / "backbones", 1 << 22),
        bundle.digest(DEMO),
        manifest(DEMO),
    )
    values = json.loads(offered)
    store.offer(digest, offered)
    manifests = st.one_of(mutated(offered), altered(values).map(lambda v: json.dumps(v).encode()))
    names = st.sampled_from(
        [*values["files"], "../x", "/etc/passwd", "a\0b", "", ".", "x.bin", "q" * 300]
    )
    offsets = st.sampled_from([0, 1, -1, 2**63, 10**30, 700])

    def check(case: tuple[bytes, str, int, bytes]) -> None:
        data, name, offset, part = case
        with only(InputError):
            store.offer(digest, data)
        with only(InputError):
            store.part(digest, name, offset, part)

    fuzz(st.tuples(manifests, names, offsets, st.binary(max_size=64)), check, examples // 2)
    assert [path.name for path in tmp_path.iterdir()] == ["backbones"]
    assert not store.has(digest)
    held = {path.name for path in store.folder.rglob("*") if path.is_file()}
    assert held <= {*values["files"], "offer.json", "strikes", "lock"}, held


# Files that people read.


def _study() -> dict[str, Any]:
    return dict(CONTRACT.canonical)


def _coordinator() -> dict[str, Any]:
    ca = "-----BEGIN CERTIFICATE-----\nx\n"
    return {"host": "c", "port": 9443, "ca": ca, "key": SigningKey.generate().public.text}


def _files() -> dict[str, tuple[dict[str, Any], Callable[[Path], object]]]:
    key = SigningKey.generate().public.text
    invitation = {"site": "a", "coordinator": _coordinator(), "token": "t" * 43, "expires": 1}
    site = {
        "site": "a",
        "data": {"path": "x.csv"},
        "units": 9,
        "limits": {"max_epsilon": 1.0},
        "state": "s",
    }
    settings_ = {"name": "s", "host": "h", "port": 1, "sites": ["a"], "dim": 3}
    return {
        "invitation": ({**invitation, "study": _study()}, Invitation.read),
        "site": (site, Site.read),
        "settings": (settings_, CoordinatorSettings.read),
        "rotation": ({"old": key, "new": key, "signature": "0" * 128}, Rotation.read),
        "coordinator": (_coordinator(), Coordinator.read),
        "study": (_study(), Study.read),
    }


@pytest.mark.parametrize("name", sorted(_files()))
def test_a_file_of_any_content_is_read_or_refused_in_plain_words(
    tmp_path: Path, name: str, examples: int
) -> None:
    values, read = _files()[name]
    path = tmp_path / f"{name}.yaml"
    text = yaml.safe_dump(values).encode()
    bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 106)
    )
    tags = b"!!python/object/apply:os.system ['true']\n"
    structured = altered(values).map(
        lambda v: yaml.dump(v, allow_unicode=True).encode(errors="replace")
    )

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with only(InputError):
            read(path)

    fuzz(st.one_of(structured, mutated(text, tags, b"study:\n" + tags)), check, examples // 2)
    started = time.monotonic()
    for data in (bomb, text + bomb, b"site: *a\n", DEEP.encode()):
        check(data)
    assert time.monotonic() - started < 10


def test_a_study_as_json_of_any_form_is_read_or_refused(tmp_path: Path, examples: int) -> None:
    store = Studies(tmp_path / "state")
    data = json.dumps(_study(), sort_keys=True).encode()

    def check(payload: bytes) -> None:
        with only(VeilgraftError):
            store.propose(payload)

    forms = altered(_study()).map(lambda v: json.dumps(v).encode(errors="replace"))
    fuzz(st.one_of(forms, mutated(data, DEEP.encode())), check, examples // 2)
    assert len(store.proposed()) <= 16


# The edge.


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[tuple[Edge, Member]]:
    """An edge before a SuperLink that is not there, and a site that has enrolled."""
    certify(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    known = Member("a", None, "token", node_id=7)  # type: ignore[arg-type]
    with contextlib.closing(Registry(tmp_path / "registry.db")) as registry:
        registry.invite("a", "token", int(time.time()) + 600)
        registry.enrol("a", "token", known.identity.public, known.pem, time.time())
        registry.registered("a", 7)
    app = Edge(
        Settings(
            superlink=f"127.0.0.1:{closed}",
            superlink_ca=tmp_path / "ca.pem",
            registry=tmp_path / "registry.db",
            ownership=tmp_path / "edge.db",
            certificate=tmp_path / "server.pem",
            key=tmp_path / "server.key",
        )
    )
    yield app, known
    asyncio.run(app.close())


async def _answer(app: Edge, path: bytes, method: str, body: bytes, headers: dict[str, str]) -> Any:
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        sent.append(event)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": method,
        "raw_path": path,
        "query_string": b"",
        "headers": raw,
    }
    await app({**scope, "path": path.decode("latin-1")}, receive, send)
    return sent[0]["status"], b"".join(event.get("body", b"") for event in sent[1:])


FIXED = {b"unknown\n", b"forbidden\n", b"too large\n", b"bad gateway\n", b"unavailable\n"}


def test_the_edge_answers_any_path_and_body_with_a_fixed_word(
    edge: tuple[Edge, Member], examples: int
) -> None:
    app, known = edge
    calls = [f"/v1/fleet/{call}".encode() for call in fleet.FLEET_CALLS]
    paths = st.one_of(
        st.sampled_from([*calls, ENROL.encode()]), mutated(*calls, b"/v1/control/start-run")
    )
    bodies = mutated(*_bodies(known))
    methods = st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "post", "CONNECT"])

    async def check(case: tuple[bytes, str, bytes, bool]) -> None:
        path, method, body, authentic = case
        scope = {
            "type": "http",
            "method": method,
            "raw_path": path,
            "query_string": b"",
            "headers": [],
        }
        if route(scope) == "/veilgraft/health":
            return
        headers = known.headers() if authentic else {}
        headers |= {"content-length": str(len(body))}
        status, said = await _answer(app, path, method, body, headers)
        assert 400 <= status < 600, (status, said)
        assert said in FIXED, said

    with asyncio.Runner() as runner:
        cases = st.tuples(paths, methods, bodies, st.booleans())
        fuzz(cases, lambda case: runner.run(check(case)), examples)


def _bodies(known: Member) -> list[bytes]:
    tree = message_pb2.ObjectTree(object_id="x")
    for _ in range(90):
        tree = message_pb2.ObjectTree(object_id="y", children=[tree])
    made: list[Any] = [
        fleet_pb2.ActivateNodeRequest(public_key=known.pem, heartbeat_interval=30),
        heartbeat_pb2.SendNodeHeartbeatRequest(node=known.node, heartbeat_interval=1e308),
        fleet_pb2.PullMessagesRequest(node=known.node),
        run_pb2.GetRunRequest(node=known.node, run_id=2**64 - 1),
        message_pb2.PullObjectRequest(node=known.node, run_id=2**64 - 1, object_id="\0" * 64),
        message_pb2.PushObjectRequest(node=known.node, run_id=2**63, object_content=b"x" * 99),
        fleet_pb2.PushMessagesRequest(node=known.node, message_object_trees=[tree]),
    ]
    enrolment = {
        "site": "a",
        "token": "t",
        "identity": "ed25519:" + "0" * 64,
        "node": "x",
        "time": 1,
    }
    return [each.SerializeToString() for each in made] + [json.dumps(enrolment).encode()]


# What runs on one's own machine.


def test_only_the_installed_bundle_s_own_bytes_pass_the_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    fab = base64.b64decode(b"UEsDBBQ=") * 30
    (tmp_path / "apps" / "installed").mkdir(parents=True)
    (tmp_path / "bundle.fab").write_bytes(fab)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert launch.only_installed(fab) == tmp_path / "apps" / "installed"

    def check(data: bytes) -> None:
        if data != fab:
            with pytest.raises(PermissionError):
                launch.only_installed(data)

    fuzz(mutated(fab), check, examples)


def test_a_pid_file_of_any_content_names_nobody_or_is_refused(
    tmp_path: Path, examples: int
) -> None:
    path = tmp_path / "x.pid"
    facts = {"pid": 2**22 + 1, "starttime": 1, "children": {"vault": [2**22 + 1, 1]}}
    facts["mark"] = "0" * 32
    facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = json.dumps(facts).encode()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)
        with only(InputError):
            pidfile.recorded(path)
            assert supervisor.running(path) is None

    forms = altered(facts).map(lambda v: json.dumps(v).encode(errors="replace"))
    fuzz(st.one_of(forms, mutated(text)), check, examples)


def test_a_flipped_byte_of_a_chain_is_found_wherever_it_says_something(
    tmp_path: Path, examples: int
) -> None:
    path = tmp_path / "events.db"
    with contextlib.closing(EventLog(path)) as log:
        for number in range(6):
            log.note("answered", asked="update", round=number, payload="sha256:" + "0" * 64)
        known = [vars(note) for note in log.entries()]
        head = log.head()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()

    def check(case: tuple[int, int]) -> None:
        at, bit = case
        for beside in tmp_path.glob("events.db-*"):
            beside.unlink(missing_ok=True)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with only(ChainError), contextlib.closing(EventLog(path, exists=True)) as log:
            log.verify(head)
            assert [vars(note) for note in log.entries()] == known

    # SQLite quotes its schema in its errors, also where that is no text any more.
    schema = whole.index(b"CREATE TABLE entries")
    for at in range(schema, schema + 120):
        check((at, 7))
    fuzz(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 7)), check, examples)


# What a site sends the coordinator.


def test_a_reply_that_is_no_message_costs_the_coordinator_nothing(tmp_path: Path) -> None:
    certify(tmp_path)
    with (
        superlink(tmp_path) as address,
        serve_edge(tmp_path, address) as url,
        client(url, tmp_path) as http,
        contextlib.closing(Registry(tmp_path / "registry.db")) as registry,
    ):
        member = Member("a", http, "token")
        registry.invite("a", "token", int(time.time()) + 600)
        assert member.enrol().status_code == member.activate().status_code == 200
        state, run, token = _run(tmp_path)
        grid = HttpGrid(address, False, (tmp_path / "ca.pem").read_bytes(), token=token)
        grid.set_run(state.get_run_info(run_ids=[run])[0])
        hello = messages.Hello(study=CONTRACT.digest, run="r")
        asked = Asked(member.node_id, hello, b"", "query", "g")
        post = Post(Flower(grid), SigningKey.generate())
        with contextlib.closing(grid), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post.ask, {"a": asked}, _never, 12.0)
            _answer_with(member, run, ConfigRecord({"no": "message"}))
            assert set(waiting.result(60).failed) == {"a"}


def _never(reply: messages.Reply, payload: bytes) -> None:
    raise AssertionError("nothing came")


def _run(folder: Path) -> tuple[Any, int, str]:
    database = str(folder / "superlink.db")
    _, factory = get_objectstore_linkstate_factories(database, NoOpFederationManager())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Alembic's, in Flower's files
        state = factory.state()
    aid, kind = NOOP_FLWR_AID, TaskType.SERVER_APP
    run: int = state.create_run("a/b", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, aid, kind)
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    token = state.claim_task(task)
    assert token and state.activate_task(task)
    TaskIdentity.task_id, TaskIdentity.run_id = task, run
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return state, run, token


def _answer_with(member: Member, run: int, content: ConfigRecord) -> None:
    """Answer the next message with an object that is none."""
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(IndexError):
            asked, _ = member.pull()
            break
        assert time.monotonic() < end
        time.sleep(0.1)
    proto = message_to_proto(reply_to(asked, "x"))
    proto.content.Clear()
    proto.content.SetInParent()
    proto.metadata.message_id = content.object_id
    pushed = fleet_pb2.PushMessagesRequest(
        node=member.node,
        messages_list=[proto],
        message_object_trees=[message_pb2.ObjectTree(object_id=content.object_id)],
        clientapp_runtime_list=[0.1],
    )
    answer = fleet_pb2.PushMessagesResponse.FromString(member.call("push-messages", pushed).content)
    session = answer.session_id
    stored = member.push_object(run, session, content.object_id, content.deflate())
    assert message_pb2.PushObjectResponse.FromString(stored.content).stored
