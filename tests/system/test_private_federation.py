"""A private federation of real processes, each on a host of its own, with all its lines tapped.

First what is to be seen while it runs, then what its books say, and last all that left a site,
taken apart, against what SECURITY.md lists.
"""

import json
import os
import re
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from tests.system import capture
from tests.system.capture import Call
from tests.system.command import veilgraft
from tests.system.digits import rows_of
from tests.system.federation import Federation

from veilgraft.invitation import Invitation
from veilgraft.messages import Envelope, Release, Reply

ROOT = Path(__file__).parents[2]
TAPS = Path(__file__).parent
SITES = ("a", "b")
WIRETAP = 9444
ENDS = "/v1/fleet/deactivate-node"
END_SECONDS = 300.0
ROUNDS = 1
RELEASES = 3
"""An update, an evaluation and the label counts."""

LABELS, MEASURES = 10, 3
MEASURED = {
    "private": {"share": 0.3, "every": 1},
    "label_counts": {"share": 0.1},
}


@dataclass(frozen=True)
class Captured:
    """What left: for each site its requests, the messages in them, and where packets went."""

    calls: dict[str, list[Call]]
    replies: dict[str, list[tuple[Reply, Envelope]]]
    packets: dict[str, set[str]]
    edge: str
    head: dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def private() -> Iterator[Federation]:
    """Two sites whose data differ in one record, from joining on."""
    rows = rows_of(SITES)
    other = rows["b"][-1]
    rows["b"] = rows["a"].copy()
    rows["b"][17] = other
    with Federation(
        sites=SITES, rounds=ROUNDS, rows=rows, sections={"evaluation": MEASURED}, up=False
    ) as federation:
        wiretap(federation)
        federation.wait_until_up("coordinator", *SITES)
        yield federation


@pytest.fixture(scope="module")
def captured(private: Federation) -> Captured:
    """All that left, to the end of the run and of the sites."""
    ended(private)
    for name in SITES:
        private.stop(name)
    return read(private)


def wiretap(federation: Federation) -> None:
    """Bring it up with a recorder where the invitations lead, and a sniffer at each site."""
    federation.init()
    federation.start("coordinator")
    sniffers = [federation.folder / f"packets-{name}" for name in SITES]
    for name, out in zip(SITES, sniffers, strict=True):
        federation.program(name, f"sniffer-{name}", sys.executable, TAPS / "sniffer.py", out)
    federation.wait_until_up("coordinator")
    edge, folder = federation.hosts["coordinator"].address, federation.folder / "sent"
    folder.mkdir()
    address = (edge, WIRETAP, edge, federation.port)
    recorder = (sys.executable, TAPS / "recorder.py", *address)
    tls = federation.coordinator.tls
    federation.program("coordinator", "recorder", *recorder, tls, folder)
    federation.wait_for(lambda: all(map(Path.exists, sniffers)), 30, "the sniffers")
    federation.join(*SITES, invitations={name: leading(federation, name) for name in SITES})
    for name in SITES:
        federation.start(name)


def leading(federation: Federation, site: str) -> Path:
    """Return a site's invitation, leading to the recorder."""
    invitation = Invitation.read(federation.coordinator.invitation(site))
    coordinator = invitation.coordinator.model_copy(update={"port": WIRETAP})
    path = federation.folder / f"invitation-{site}.yaml"
    invitation.model_copy(update={"coordinator": coordinator}).write(path)
    return path


def read(federation: Federation) -> Captured:
    calls = {}
    for name in SITES:
        sent = (federation.folder / "sent").glob(f"{federation.hosts[name].address}.*")
        calls[name] = [call for path in sorted(sent) for call in capture.calls(path.read_bytes())]
    everything = [call for each in calls.values() for call in each]
    head = safetensors.numpy.load_file(federation.coordinator.run / "model" / "head.safetensors")
    packets = {}
    for name in SITES:
        lines = (federation.folder / f"packets-{name}").read_text().splitlines()
        assert lines[0] == "ready"
        packets[name] = set(lines[1:])
    return Captured(
        calls=calls,
        replies={name: list(capture.replies(calls[name], everything)) for name in SITES},
        packets=packets,
        edge=federation.hosts["coordinator"].address,
        head={name: array.shape for name, array in head.items()},
    )


def ended(federation: Federation) -> dict[str, Any]:
    federation.wait_for(lambda: federation.report() is not None, END_SECONDS, "the report")
    report = federation.report()
    assert report is not None
    return report


# While it runs: these come first.


def listening(pid: int) -> set[tuple[str, int]]:
    """Return where anything in a process's network namespace listens, TCP and UDP."""
    found = set()
    for name, listens in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == listens:
                address, port = local.split(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    words = struct.unpack(f">{len(text) // 8}I", bytes.fromhex(text))
    raw = struct.pack(f"<{len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def test_from_outside_only_the_edge_is_there(private: Federation) -> None:
    edge = private.process("edge")
    assert edge is not None
    open_ = {
        (address, port)
        for address, port in listening(edge.pid)
        if not address.startswith("127.") and address != "::1"
    }
    # The recorder is the test's own.
    assert open_ - {(private.hosts["coordinator"].address, WIRETAP)} == {("0.0.0.0", private.port)}
    for site in private.sites:
        courier = private.process(f"{site}/supernode")
        assert courier is not None
        assert {address for address, _ in listening(courier.pid)} <= {"127.0.0.1"}


INSIDE = """
import fcntl, json, socket, struct, sys
asked = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
names = [line.partition(":")[0].strip() for line in open("/proc/self/net/dev").readlines()[2:]]
flags = lambda name: struct.unpack_from(
    "H", fcntl.ioctl(asked, 0x8913, struct.pack("16sH22x", name.encode(), 0)), 16)[0]
told = {"up": [name for name in names if flags(name) & 1], "reached": []}
for host, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((host, port), 2)
    except OSError:
        continue
    told["reached"].append(host)
print(json.dumps(told))
"""


def inside(private: Federation, part: str, flag: str, *command: object) -> dict[str, Any]:
    """Run a program in a namespace of one of the parts; return what it prints."""
    process = private.process(part)
    assert process is not None
    enter = ["nsenter", f"--target={process.pid}", "--mount", flag, "--", *command]
    done = private.tool("coordinator", *enter)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_vault_has_no_network_and_no_privileges(private: Federation) -> None:
    address = private.hosts["coordinator"].address
    targets = json.dumps([[address, WIRETAP], ["127.0.0.1", WIRETAP]])
    asked = (sys.executable, "-I", "-c", INSIDE, targets)
    # From the host that it stands on, the edge can be reached: the question is a fair one.
    host = inside(private, "a", "--net", *asked)
    assert host == {"up": ["lo", "eth0"], "reached": [address]}
    for site in private.sites:
        found = inside(private, f"{site}/vault", "--net", *asked)
        assert found == {"up": [], "reached": []}
        vault = private.process(f"{site}/vault")
        assert vault is not None
        lines = Path(f"/proc/{vault.pid}/status").read_text().splitlines()
        status = {name: value.strip() for name, _, value in (each.partition(":") for each in lines)}
        assert {int(status[each], 16) for each in status if each.startswith("Cap")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert status["Uid"].split() == [str(private.site(site).owner.uid)] * 4


OPENED = """
import json, os, socket, sys
told = []
for path in json.loads(sys.argv[1]):
    try:
        if path.endswith(".sock"):
            socket.socket(socket.AF_UNIX).connect(path)
        else:
            os.close(os.open(path, os.O_RDONLY))
    except OSError:
        continue
    told.append(path)
print(json.dumps({"opened": told}))
"""


def test_the_couriers_user_can_open_nothing_of_the_vaults(private: Federation) -> None:
    place = private.site("a")
    private.wait_for(lambda: any(place.state.glob("features/*")), END_SECONDS, "them")
    uid = place.courier_user
    assert uid is not None
    vault = private.process("a/vault")
    assert vault is not None
    state = [place.state, *place.state.rglob("*")]
    secret = [private.data("a"), place.config, place.pinned, place.logs, place.desk, *state]
    secret += [Path(f"/proc/{vault.pid}") / name for name in ("environ", "mem", "maps", "fd")]
    names = {path.name for path in state}
    assert {"identity.pem", "site.key", "ledger.db", "nonces.db", "events.db", "features"} <= names
    own = [place.socket, place.node_key, place.courier / "ca.pem", place.work]
    asked = json.dumps([str(path) for path in (*secret, *own)])
    user = ["setpriv", f"--reuid={uid[0]}", f"--regid={uid[0]}", "--clear-groups"]
    command = [*user, sys.executable, "-I", "-c", OPENED, asked]
    found = inside(private, "a/supernode", "--net", *command)
    assert found["opened"] == [str(path) for path in own]


WRITTEN = """
import json, os, sys
told = []
for path in json.loads(sys.argv[1]):
    beside = os.path.dirname(path) + "/planted"
    try:
        os.close(os.open(path, os.O_WRONLY))
        told.append(path)
    except OSError:
        pass
    # In a sticky folder it may put something, and not in the place of another's.
    try:
        os.mkdir(beside) if os.path.isdir(path) else os.close(os.open(beside, os.O_CREAT))
        os.replace(beside, path)
        told.append(path)
    except OSError:
        pass
    try:
        os.rmdir(beside) if os.path.isdir(path) else os.unlink(beside)
    except OSError:
        pass
print(json.dumps({"written": told}))
"""


def test_the_edges_user_can_write_nothing_that_the_executor_trusts(private: Federation) -> None:
    place = private.coordinator
    private.wait_for(lambda: bool(private.rounds()), END_SECONDS, "a round")
    edge = private.process("edge")
    assert edge is not None
    uid, gid = user_of(edge.pid)
    trusted = [place.run, place.identities.parent, place.home, place.tls]
    trusted += [place.config, place.path / "study.yaml", place.signing_key, place.identities]
    trusted += [place.checkpoint, place.met, place.run_events, place.events, place.secret]
    assert place.study.backbone.path is not None
    trusted += [place.study.backbone.path, *place.study.backbone.path.iterdir()]
    assert all(path.exists() for path in trusted)
    user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    program = [*user, sys.executable, "-I", "-c"]
    # Last, what is its own: the probe can write.
    own = private.folder / "probe"
    own.touch()
    os.chown(own, uid, gid)
    paths = [str(path) for path in (*trusted, own)]
    found = inside(private, "edge", "--net", *program, WRITTEN, json.dumps(paths))
    assert found == {"written": [paths[-1]]}
    keys = json.dumps([str(place.signing_key), str(place.registry)])
    found = inside(private, "edge", "--net", *program, OPENED, keys)
    assert found == {"opened": [str(place.registry)]}


def user_of(pid: int) -> tuple[int, int]:
    """Return a process's user and group."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (each.partition(":") for each in lines)}
    return int(status["Uid"][1]), int(status["Gid"][1])


# Once it has ended.


def test_in_private_epsilon_is_the_same_to_all_who_tell_it(private: Federation) -> None:
    report = ended(private)
    assert (report["private"], report["seeded"]) == (True, False)
    checked = json.loads(veilgraft("study", "check", private.study, "--json").stdout)
    epsilon = checked["epsilon"]
    assert epsilon == pytest.approx(3.0, rel=1e-3)
    assert report["final"]["epsilon"] == pytest.approx(epsilon, rel=1e-9)
    for site in private.sites:
        (row,) = private.ledger(site)["sites"]
        assert (row["site"], row["granted"], row["spent"]) == (site, RELEASES, RELEASES)
        assert row["epsilon"] == pytest.approx(epsilon, rel=1e-9)
        assert row["epsilon_of_all"] == pytest.approx(epsilon, rel=1e-9)
    card = (private.coordinator.run / "model" / "README.md").read_text()
    said = re.search(r"with ε = ([0-9.]+) at δ = 1e-05", card)
    assert said is not None
    assert float(said[1]) == pytest.approx(epsilon, rel=1e-3)
    assert "educed isolation" not in card


def test_afterwards_the_books_of_all_parties_verify(private: Federation) -> None:
    ended(private)
    for name in private.sites:
        place = private.site(name)
        status = private.run(name, "site", "status", "--dir", place.path, "--json")
        assert set(status["running"]) == {"vault", "courier"}
        assert status["isolation"] == "full"
        assert status["separations"] == {"network": True, "user": True, "files": True}
        for command in (
            ["ledger", "verify", place.state / "ledger.db"],
            ["log", "verify", place.events],
        ):
            done = veilgraft(*command)
            assert done.returncode == 0, done.stderr
        kinds = [each.kind for each in private.events(name)]
        assert kinds[:4] == ["open", "approved", "joined", "started"]
        assert "refused" not in kinds
    for path in (private.coordinator.events, private.coordinator.run_events):
        assert veilgraft("log", "verify", path).returncode == 0
    kinds = [each.kind for each in private.events("coordinator")]
    assert kinds.count("round") == ROUNDS
    assert private.wait_ended("coordinator", 60) == 0


# All that left.


def promised() -> dict[str, bool]:
    """Return the fields of SECURITY.md's table, and whether each is there in every run."""
    text = (ROOT / "SECURITY.md").read_text()
    (section,) = re.findall(r"\n## What leaves a site\n(.*?)(?=\n## |\Z)", text, re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \| (always|rarely) \| [^|]+ \|$", section, re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == len(lines) - 2, "a row of the table is not of its form"
    assert len(dict(rows)) == len(rows), "a field has two rows"
    return {name: when == "always" for name, when in rows}


@pytest.mark.parametrize("site", SITES)
def test_all_packets_go_to_the_one_address_of_the_invitation(captured: Captured, site: str) -> None:
    there = captured.packets[site] - {"arp", "icmpv6"}
    assert there == {f"tcp {captured.edge}:{WIRETAP}"}


@pytest.mark.parametrize("site", SITES)
def test_what_is_sent_holds_the_fields_that_security_md_lists_and_no_other(
    captured: Captured, site: str
) -> None:
    found = {name for call in captured.calls[site] for name in capture.names(call)}
    found |= {name for each in captured.replies[site] for name in capture.said(*each)}
    listed = promised()
    assert found - listed.keys() == set()
    assert {name for name, always in listed.items() if always} - found == set()


def test_a_release_is_the_arrays_that_were_asked_for_and_nothing_else(captured: Captured) -> None:
    for replies in captured.replies.values():
        forms = []
        for reply, each in replies:
            if isinstance(reply, Release):
                arrays = safetensors.numpy.load(each.payload)
                assert {array.dtype.name for array in arrays.values()} == {"float64"}
                forms.append({name: array.shape for name, array in arrays.items()})
        assert captured.head in forms
        # A count for each label, and the two sums of an evaluation.
        rest = [form for form in forms if form != captured.head]
        assert {name for form in rest for name in form} == {"sums"}
        assert {form["sums"] for form in rest} == {(LABELS,), (MEASURES,)}


def test_nothing_tells_how_long_an_answer_took_to_compute(captured: Captured) -> None:
    for calls in captured.calls.values():
        pushed = [call.message for call in calls if call.path.endswith("/push-messages")]
        assert pushed
        assert {each for one in pushed for each in one.clientapp_runtime_list} == {0.0}


def test_one_record_more_or_less_changes_no_field_and_no_size(captured: Captured) -> None:
    requests, answers = defaultdict(set), defaultdict(set)
    # Both sites' answers hold these; who answers first is asked for them, the other is not.
    equal = set.intersection(*(capture.objects_named(captured.calls[name]) for name in SITES))
    for name in SITES:
        # Whether a SuperNode that ends can still say so depends on who ends first.
        running = [
            call
            for call in captured.calls[name]
            if call.path != ENDS and capture.object_in(call) not in equal
        ]
        requests[name] = {capture.shape(call) for call in running}
        answers[name] = {
            (type(reply).__name__, len(each.header), len(each.payload), len(each.signature))
            for reply, each in captured.replies[name]
        }
    assert requests["a"] == requests["b"]
    assert answers["a"] == answers["b"]
    assert len(answers["a"]) > 3


def test_every_answer_is_signed_by_the_site(captured: Captured) -> None:
    for site, replies in captured.replies.items():
        assert {reply.site for reply, _ in replies} == {site}
        assert {len(each.signature) for _, each in replies} == {64}
