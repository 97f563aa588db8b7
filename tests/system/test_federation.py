"""A coordinator and three sites as real processes, over TLS, each on a host of its own."""

import json
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from tests.system.command import DEMO, veilgraft
from tests.system.federation import Federation, bring_up

SEED = 7
ROUNDS = 2
END_SECONDS = 300.0
LOCAL_STEPS = {
    "algorithm": "dp-sgd",
    "sample_rate": 0.25,
    "local_epochs": 1,
    "learning_rate": 0.5,
    "momentum": 0.0,
}


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Federation, Federation]]:
    """One federation over public data with a seed, one over private data; side by side."""
    with ExitStack() as stack:
        # How a backbone travels, test_capture shows; here it came by hand, to save the time.
        by_hand = ("--backbone", str(DEMO / "backbone"))
        public = Federation(
            rounds=ROUNDS,
            public=True,
            seed=SEED,
            sections={"training": LOCAL_STEPS},
            join=by_hand,
            up=False,
        )
        private = Federation(rounds=ROUNDS, sections={"evaluation": {}}, join=by_hand, up=False)
        for each in (public, private):
            stack.enter_context(each)
        bring_up(public, private)
        yield public, private


@pytest.fixture(scope="module")
def public(both: tuple[Federation, Federation]) -> Federation:
    return both[0]


@pytest.fixture(scope="module")
def private(both: tuple[Federation, Federation]) -> Federation:
    both[1].wait_until_up("coordinator", *both[1].sites)
    return both[1]


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
    assert open_ == {("0.0.0.0", private.port)}
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
    targets = json.dumps([[address, private.port], ["127.0.0.1", private.port]])
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


# And once it has ended.


def test_with_a_seed_the_head_is_that_of_a_simulation(public: Federation, tmp_path: Path) -> None:
    report = ended(public)
    assert report["seeded"] is True
    assert report["private"] is False
    done = veilgraft("simulate", public.study, "--seed", SEED, "--out", tmp_path / "simulation")
    assert done.returncode == 0, done.stderr
    simulated = json.loads((tmp_path / "simulation" / "report.json").read_text())
    assert report["study"] == simulated["study"]
    heads = [
        safetensors.numpy.load_file(folder / "model" / "head.safetensors")
        for folder in (public.coordinator.run, tmp_path / "simulation")
    ]
    assert heads[0].keys() == heads[1].keys()
    for name, values in heads[0].items():
        assert values == pytest.approx(heads[1][name], abs=1e-6, rel=0)
        assert abs(values).max() > 1e-3
    accuracies = [[each["accuracy"] for each in run["rounds"]] for run in (report, simulated)]
    assert accuracies[0] == pytest.approx(accuracies[1])
    assert "**Not private.**" in (public.coordinator.run / "model" / "README.md").read_text()


def test_in_private_epsilon_is_the_same_to_all_who_tell_it(private: Federation) -> None:
    report = ended(private)
    assert (report["private"], report["seeded"]) == (True, False)
    checked = json.loads(veilgraft("study", "check", private.study, "--json").stdout)
    epsilon = checked["epsilon"]
    assert epsilon == pytest.approx(3.0, rel=1e-3)
    assert report["final"]["epsilon"] == pytest.approx(epsilon, rel=1e-9)
    for site in private.sites:
        (row,) = private.ledger(site)["sites"]
        assert (row["site"], row["granted"], row["spent"]) == (site, ROUNDS, ROUNDS)
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
