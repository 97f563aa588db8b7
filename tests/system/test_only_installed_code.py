"""A hostile coordinator pushes bundles at a real site, and asks the vault for more.

The site is whole: SuperNode and executor as `site start` runs them, as a user of their own, and a
vault with real records behind its socket.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.system import hosts, hostile
from tests.system.federation import Federation
from tests.system.hostile import HostileSuperLink, hello, request, sealed

from veilgraft.identity import SigningKey
from veilgraft.messages import Envelope


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
    }


def coordinators_key(federation: Federation) -> SigningKey:
    """Return the key, a copy of which root may read."""
    copy = federation.folder / "signing-copy.pem"
    if not copy.exists():
        copy.write_bytes(federation.coordinator.signing_key.read_bytes())
        copy.chmod(0o600)
    return SigningKey.load(copy)


def refused(answer: str) -> bool:
    return '"kind":"refusal"' in answer and answer.endswith(", 0)")


def nothing_got_out(found: dict[str, str]) -> None:
    for what, came in found.items():
        if what.startswith("ask "):
            assert refused(came), f"{what}: {came}"
        elif what == "import":
            assert came in ("[]", "no: ImportError"), came
        else:
            assert came.startswith("no: "), f"{what}: {came}"


@pytest.fixture(scope="module")
def world() -> Iterator[Federation]:
    """A coordinator that runs, and one site that has joined and is not started."""
    with Federation(sites=("a",), rounds=2, namespaces=False, up=False) as federation:
        import time

        t = time.time()
        federation.init()
        print("init", time.time() - t)
        federation.start("coordinator")
        federation.wait_until_up("coordinator")
        print("up", time.time() - t)
        federation.join("a")
        print("joined", time.time() - t)
        yield federation


def test_a_pushed_bundle_gets_nothing_and_an_honest_run_ends_well(world: Federation) -> None:
    with hostile.trap() as trap:
        config = hostile.booty(world, "a", forged(world, "a"), trap.port)
        made = hostile.hostile_bundle(hostile.thief(config))
        before = hostile.spent(world, "a")
        world.start("a")
        pushed = HostileSuperLink(world).push(made, "a")
        reply = pushed.reply()
        assert reply is not None, world.logs()
        assert hostile.without_word(reply, [str(world.folder)]), reply
        assert hostile.spent(world, "a") == before
        world.wait_for(lambda: world.report() is not None, 90, "the honest run")
        found = hostile.stolen(world, "a", hostile.booty(world, "a", forged(world, "a"), 1))
        assert trap.caught == []
    nothing_got_out(found)
    assert [each.sites for each in world.rounds()] == [1, 1]
