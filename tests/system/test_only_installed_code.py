"""A hostile coordinator pushes bundles at a real site, and asks the vault for more.

The site is whole: SuperNode and executor as `site start` runs them, as a user of their own, and a
vault with real records behind its socket.
"""

import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flwr.supercore.constant import TaskType
from tests.system import hostile
from tests.system.command import DEMO
from tests.system.federation import Federation
from tests.system.hostile import HostileSuperLink, hello, request, sealed

from veilgraft import messages
from veilgraft.identity import SigningKey
from veilgraft.messages import Envelope
from veilgraft_deploy import provision
from veilgraft_deploy.provision import Bundle

ROUNDS = 2
HONEST_SECONDS = 240.0


def coordinators_key(federation: Federation) -> SigningKey:
    """Return the key; a copy, as keys are read by their owner alone."""
    copy = federation.folder / "signing-copy.pem"
    copy.touch(mode=0o600)
    copy.write_bytes(federation.coordinator.signing_key.read_bytes())
    return SigningKey.load(copy)


def forged(federation: Federation, site: str) -> dict[str, Envelope]:
    """Return what the coordinator has not signed, or not for this."""
    stranger, key = SigningKey.generate(), coordinators_key(federation)
    real = sealed(hello(federation), b"", key)
    head = b"no head"
    asked = request(federation, site, 1, head)
    return {
        "unsigned": Envelope(real.header, b"", b""),
        "garbage": Envelope(b"\x00" * 4096, b"\xff" * 100, b"\x01" * 64),
        "signed by another": sealed(asked, head, stranger),
        "in the coordinator's name": sealed(asked, head, stranger, named=key),
        "another payload": Envelope(real.header, b"other", real.signature),
        "another header": Envelope(real.header + b" ", b"", real.signature),
        "for another site": sealed(request(federation, "other", 1, head), head, key),
        "expired": sealed(asked, head, key, ahead=-10),
        "of another day": sealed(asked, head, key, ahead=3 * 24 * 3600),
        "signed, but no head": sealed(asked, head, key),
        "signed, beyond the plan": sealed(request(federation, site, 99, head), head, key),
    }


def nothing_got_out(found: Mapping[str, str]) -> None:
    for what, came in found.items():
        if what.startswith("ask "):
            assert '"kind":"refusal"' in came and came.endswith(", 0)"), f"{what}: {came}"
        elif what == "import":
            assert came == "[]", came
        else:
            assert came.startswith("no: "), f"{what}: {came}"


@pytest.fixture(scope="module")
def world() -> Iterator[Federation]:
    """A coordinator, and one site that trains for it."""
    by_hand = ("--backbone", str(DEMO / "backbone"))
    with Federation(sites=("a",), rounds=ROUNDS, namespaces=False, join=by_hand) as federation:
        yield federation


@pytest.fixture(scope="module")
def waiting() -> Iterator[Federation]:
    """A coordinator that waits for its second site for ever, and the first, which is ready."""
    by_hand = ("--backbone", str(DEMO / "backbone"))
    with Federation(
        sites=("a", "b"), rounds=ROUNDS, namespaces=False, join=by_hand, up=False
    ) as federation:
        federation.init()
        federation.start("coordinator")
        federation.wait_until_up("coordinator")
        federation.join("a")
        federation.start("a")
        federation.wait_until_up("a")
        yield federation


def test_a_pushed_bundle_gets_nothing_and_an_honest_run_ends_well(world: Federation) -> None:
    with hostile.trap() as trap:
        config = hostile.booty(world, "a", forged(world, "a"), trap.port)
        pushed = HostileSuperLink(world).push(hostile.hostile_bundle(hostile.thief(config)), "a")
        reply = pushed.reply()
        assert reply is not None, world.logs()
        assert hostile.without_word(reply, [str(world.folder)]), reply
        world.wait_for(lambda: world.report() is not None, HONEST_SECONDS, "the honest run")
        # As though its code had run after all:
        before = hostile.spent(world, "a")
        found = hostile.stolen(world, "a", config)
        assert trap.caught == []
    nothing_got_out(found)
    assert hostile.spent(world, "a") == before
    assert before[1] == ROUNDS
    assert [each.sites for each in world.rounds()] == [1] * ROUNDS


def _bomb() -> Bundle:
    """Return a bundle of a few hundred kilobytes that unpacks into hundreds of megabytes."""
    held = io.BytesIO()
    with (
        zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made,
        made.open("pyproject.toml", "w") as file,
    ):
        for _ in range(400):
            file.write(b"#" * (1 << 20))
    return Bundle(held.getvalue())


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) << 10


@pytest.mark.drill
def test_no_bundle_but_the_installed_one_runs_whatever_it_is_called(waiting: Federation) -> None:
    world, link = waiting, HostileSuperLink(waiting)
    own = provision.bundle()
    version = own.folder.split(".", 2)[2].rsplit(".", 1)[0]
    supernode, vault = world.process("a/supernode"), world.process("a/vault")
    assert supernode is not None and vault is not None
    before, installed = hostile.spent(world, "a"), _tree(world.site("a").flower)
    with hostile.trap() as trap:
        program = hostile.thief(hostile.booty(world, "a", forged(world, "a"), trap.port))
        plain = hostile.hostile_bundle(program)
        up = "/../" * 9 + str(world.site("a").work)
        attacks = [
            (plain, {"version": f"1{up}/x"}),
            (plain, {"fab_id": "veilgraft/.." * 3}),
            (plain, {"fab_id": "../../x/y.z"}),
            (plain, {"version": version}),
            (hostile.hostile_bundle(program, version=version), {"version": version}),
            (hostile.hostile_bundle(program, version=f"1{up}"), {"version": f"1{up}"}),
            (hostile.hostile_bundle(program, dependencies='"requests"'), {}),
            (hostile.bundle({}, clientapp="veilgraft_deploy.office:serve"), {}),
            (hostile.bundle({}, clientapp="os:system"), {}),
            (Bundle(own.content + b"\0"), {}),
            (Bundle(b"no archive"), {}),
            (_bomb(), {}),
        ]
        for made, changes in attacks:
            reply = link.push(made, "a", **changes).reply()
            assert reply is not None, (changes, world.logs())
            assert hostile.without_word(reply, [str(world.folder)]), (changes, reply)
        assert trap.caught == []
    assert world.process("a/supernode") == supernode and world.process("a/vault") == vault
    assert _resident(supernode.pid) < 400 << 20
    assert _tree(world.site("a").flower) == installed
    assert hostile.spent(world, "a") == before
    _still_serves(world)


@pytest.mark.drill
@pytest.mark.parametrize("kind", [TaskType.AGENT_APP, TaskType.SIMULATION])
def test_other_types_of_run_start_nothing(waiting: Federation, kind: TaskType) -> None:
    with hostile.trap() as trap:
        program = hostile.thief(hostile.booty(waiting, "a", {}, trap.port))
        made = hostile.hostile_bundle(program)
        reply = HostileSuperLink(waiting).push(made, "a", kind=kind).reply(40)
        assert trap.caught == []
    if reply is not None:
        assert reply.has_error() and str(waiting.folder) not in repr(reply)
    # Flower hands it to no other app: the SuperNode waits for it until it is started again.
    waiting.kill("a/supernode")
    _still_serves(waiting, 150)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _still_serves(federation: Federation, seconds: float = 60) -> None:
    """Ask the vault as its coordinator does, by all that lies between, for what it notes."""
    head, before = b"no head", len(federation.events("a"))
    envelope = sealed(request(federation, "a", 1, head), head, coordinators_key(federation))
    pushed = HostileSuperLink(federation).push(
        provision.bundle(), "a", records=messages.to_record(envelope)
    )
    reply = pushed.reply(seconds)
    assert reply is not None and not reply.has_error(), federation.logs()
    (note,) = federation.events("a")[before:]
    assert (note.kind, note.facts["code"]) == ("refused", "head-invalid")


FLOOD = """
import os, socket, sys, time
path, how = sys.argv[1], sys.argv[2]
preface = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + b"\\0\\0\\0\\4\\0\\0\\0\\0\\0"
end, held, sent, refused = time.monotonic() + 20, [], 0, 0
while time.monotonic() < end and (how != "many" or refused < 1000):
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(2)
    try:
        peer.connect(path)
        peer.sendall(preface)
        held.append(peer)
        if how == "headers":
            for number in range(10_000):
                peer.sendall(b"\\0\\xff\\xff\\1\\0\\0\\0\\0\\1" + b"x" * 65535)
                sent += 65535
        if how == "bytes":
            while sent < 1 << 30 and time.monotonic() < end:
                sent += peer.send(b"\\0" * (1 << 20))
        if how == "half":
            time.sleep(0.05)
    except OSError:
        refused += 1
        if how != "many":
            time.sleep(0.01)
print(len(held), sent, refused)
"""


@pytest.mark.drill
@pytest.mark.parametrize("how", ["many", "half", "bytes", "headers"])
def test_the_courier_s_user_can_neither_crash_nor_stop_the_vault(
    waiting: Federation, how: str
) -> None:
    vault = waiting.process("a/vault")
    assert vault is not None
    before = hostile.spent(waiting, "a")
    script = hostile.written(waiting, FLOOD)
    hostile.as_courier(waiting, "a", script, waiting.site("a").socket, how)
    _still_serves(waiting, 120)
    assert waiting.process("a/vault") == vault
    assert _resident(vault.pid) < 4 << 30
    assert hostile.spent(waiting, "a") == before


@pytest.mark.drill
def test_the_thief_would_have_got_it_all_had_it_run_as_the_owner(waiting: Federation) -> None:
    # The last test: it takes the site's folder away, as the owner can.
    with hostile.trap() as trap:
        config = hostile.booty(waiting, "a", {}, trap.port)
        script = hostile.written(waiting, hostile.thief(config))
        code = f"import runpy; runpy.run_path({str(script)!r})"
        done = waiting.tool("a", sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        end = time.monotonic() + 10
        while not trap.caught and time.monotonic() < end:
            time.sleep(0.1)
        (caught,) = trap.caught
    found = json.loads(caught)
    assert found[str(waiting.data("a"))].startswith("b'PAR1")
