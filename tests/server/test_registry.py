"""Who may take part: tokens are good once, for one site and two keys, also between processes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from veilgraft.errors import InputError, RefusedError
from veilgraft.identity import PublicKey, SigningKey
from veilgraft_server.registry import Registry

NOW = 1_000_000.0
NODE, OTHER = b"node key", b"another node key"
KEY, STRANGER = SigningKey.generate().public, SigningKey.generate().public


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "registry.db")
    made.invite("a", "token of a", int(NOW) + 60)
    made.invite("b", "token of b", int(NOW) + 60)
    return made


def test_an_invited_site_enrols_and_is_found_by_its_key_and_node(registry: Registry) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.registered("a", 2**64 - 1)
    member = registry.by_key(NODE)
    assert member is not None
    assert (member.site, member.identity, member.node_id) == ("a", KEY, 2**64 - 1)
    assert registry.by_node(2**64 - 1) == member
    assert registry.by_key(OTHER) is registry.by_node(7) is None


def test_the_file_is_its_owners_alone_and_holds_no_token(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    Registry(path).invite("a", "a very secret token", 1)
    assert path.stat().st_mode & 0o077 == 0
    assert b"a very secret token" not in path.read_bytes()


@pytest.mark.parametrize(
    ("site", "token", "late", "reason"),
    [
        ("a", "token of b", 0, "no invitation"),
        ("a", "", 0, "no invitation"),
        ("nobody", "token of a", 0, "no invitation"),
        ("a", "token of a", 60, "expired"),
    ],
)
def test_a_wrong_or_late_token_is_refused(
    registry: Registry, site: str, token: str, late: float, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        registry.enrol(site, token, KEY, NODE, NOW + late)
    assert registry.by_key(NODE) is None


@pytest.mark.parametrize(("identity", "node"), [(STRANGER, NODE), (KEY, OTHER), (STRANGER, OTHER)])
def test_a_token_that_was_used_is_refused_to_other_keys(
    registry: Registry, identity: PublicKey, node: bytes
) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    with pytest.raises(RefusedError, match="used by other keys"):
        registry.enrol("a", "token of a", identity, node, NOW)


def test_the_same_enrolment_again_gets_the_same_answer_even_when_it_has_expired(
    registry: Registry,
) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.registered("a", 5)
    again = registry.enrol("a", "token of a", KEY, NODE, NOW + 1e6)
    assert again.node_id == 5


@pytest.mark.parametrize(("identity", "node"), [(STRANGER, NODE), (KEY, OTHER)])
def test_two_sites_cannot_enrol_the_same_key(
    registry: Registry, identity: PublicKey, node: bytes
) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    with pytest.raises(RefusedError, match="another site"):
        registry.enrol("b", "token of b", identity, node, NOW)
    registry.enrol("b", "token of b", STRANGER, OTHER, NOW)


def test_a_token_given_back_is_good_for_other_keys_unless_the_node_is_known(
    registry: Registry,
) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.release("a", NODE)
    registry.enrol("a", "token of a", STRANGER, OTHER, NOW)
    registry.registered("a", 5)
    registry.release("a", OTHER)
    assert registry.by_key(OTHER) is not None


def test_a_revoked_site_is_nobody_and_its_keys_stay_taken(registry: Registry) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.registered("a", 5)
    registry.revoke("a")
    assert registry.by_key(NODE) is registry.by_node(5) is None
    assert [(member.site, member.revoked) for member in registry.members()] == [
        ("a", True),
        ("b", False),
    ]
    with pytest.raises(RefusedError, match="revoked"):
        registry.enrol("a", "token of a", KEY, NODE, NOW)
    with pytest.raises(RefusedError, match="another site"):
        registry.enrol("b", "token of b", STRANGER, NODE, NOW)


def test_a_new_invitation_forgets_keys_and_old_token(registry: Registry) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.revoke("a")
    registry.invite("a", "new", int(NOW) + 60)
    with pytest.raises(RefusedError, match="no invitation"):
        registry.enrol("a", "token of a", KEY, NODE, NOW)
    assert registry.enrol("a", "new", KEY, NODE, NOW).node == NODE


def test_to_revoke_a_site_that_was_never_invited_is_a_mistake(registry: Registry) -> None:
    with pytest.raises(InputError, match="expected one of a, b, got 'c'"):
        registry.revoke("c")


def test_what_another_process_writes_is_seen_at_once(registry: Registry, tmp_path: Path) -> None:
    registry.enrol("a", "token of a", KEY, NODE, NOW)
    registry.registered("a", 5)
    assert registry.by_node(5) is not None
    script = (
        "import sys, pathlib; from veilgraft_server.registry import Registry;"
        "Registry(pathlib.Path(sys.argv[1])).revoke('a')"
    )
    path = str(tmp_path / "registry.db")
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=30)
    assert registry.by_node(5) is None


def test_of_many_that_use_one_token_at_once_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    Registry(path).invite("a", "token", int(NOW) + 60)
    won: list[int] = []

    def enrol(index: int) -> None:
        registry = Registry(path)
        try:
            registry.enrol("a", "token", SigningKey.generate().public, b"%d" % index, NOW)
            won.append(index)
        except RefusedError:
            pass
        finally:
            registry.close()

    threads = [threading.Thread(target=enrol, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1


def test_a_file_that_is_no_registry_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database, and long enough to be seen as none")
    with pytest.raises(InputError, match="can't open the registry"):
        Registry(tmp_path / "registry.db")
    with pytest.raises(InputError, match="can't open the registry"):
        Registry(tmp_path / "missing" / "registry.db")
