"""A site's folder: whose its files are, and what links can't do."""

import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from veilgraft.errors import InputError
from veilgraft_deploy.place import Place, coordinator, user

OWNER, COURIER = 64210, 64211

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other users")


@pytest.fixture
def place() -> Iterator[Place]:
    # Not pytest's own folder, which other users can't enter.
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o711)
        made = Place(Path(base) / "a")
        for folder in (made.path, made.state, made.courier, made.work, made.run):
            folder.mkdir(mode=0o700)
        made.node_key.write_bytes(b"key")
        yield made


def given(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def test_a_folder_without_a_site_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder that `veilgraft site join` made"):
        Place.open(tmp_path)


def test_without_a_user_of_its_own_the_courier_s_folders_are_the_owner_s(place: Place) -> None:
    place.settle(None)
    for folder in (place.state, place.courier, place.run):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@as_root
def test_each_user_gets_what_is_theirs(place: Place) -> None:
    os.chown(place.state, OWNER, OWNER)
    place.settle((COURIER, frozenset({COURIER, 1})))
    assert given(place.courier) == (OWNER, COURIER, 0o750)
    assert given(place.run) == (OWNER, COURIER, 0o2750)
    assert given(place.work) == (COURIER, COURIER, 0o700)
    assert given(place.node_key) == (OWNER, COURIER, 0o640)
    assert given(place.state) == (OWNER, OWNER, 0o700)


@as_root
def test_a_link_gives_nobody_another_s_file(place: Place, tmp_path: Path) -> None:
    os.chown(place.state, OWNER, OWNER)
    secret = tmp_path / "shadow"
    secret.write_bytes(b"root's")
    secret.chmod(0o600)
    before = given(secret)
    (place.courier / "ca.pem").symlink_to(secret)
    place.settle((COURIER, frozenset({COURIER})))
    assert given(secret) == before
    (place.courier / "hard").hardlink_to(secret)
    with pytest.raises(InputError, match="a plain file with one name"):
        place.settle((COURIER, frozenset({COURIER})))
    assert given(secret) == before
    (place.courier / "hard").unlink()
    place.run.rmdir()
    place.run.symlink_to(tmp_path)
    with pytest.raises(InputError, match="expected no link"):
        place.settle((COURIER, frozenset({COURIER})))


@as_root
def test_what_root_makes_as_the_owner_is_the_owner_s(place: Place) -> None:
    for folder in (place.path, place.state):
        os.chown(folder, OWNER, OWNER)
    before = (os.geteuid(), os.getegid(), os.getgroups())
    with place.as_owner():
        (place.state / "made").write_bytes(b"")
        with place.as_owner():
            assert os.geteuid() == OWNER
        assert os.geteuid() == OWNER
    assert (place.state / "made").stat().st_uid == OWNER
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before


@as_root
def test_root_is_root_again_after_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(place.state, OWNER, OWNER)
    before = (os.geteuid(), os.getegid(), os.getgroups())
    with pytest.raises(KeyError), place.as_owner():
        raise KeyError
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before

    def refused(_: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patched, pytest.raises(PermissionError):
        patched.setattr(os, "seteuid", refused)
        with place.as_owner():
            pass
    os.seteuid(before[0])
    os.setegid(before[1])
    os.setgroups(before[2])


@as_root
def test_the_owner_is_the_owner_in_every_thread(place: Place) -> None:
    os.chown(place.state, OWNER, OWNER)
    found: list[int] = []
    with place.as_owner():
        thread = threading.Thread(target=lambda: found.append(os.geteuid()))
        thread.start()
        thread.join(10)
    assert found == [OWNER]


def test_a_user_is_an_account_or_a_number() -> None:
    assert user(None) is None
    assert user(64299) == (64299, frozenset({64299}))
    with pytest.raises(InputError, match="useradd --system nobody-of-this-name"):
        user("nobody-of-this-name")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": "x"}'])
def test_what_was_pinned_and_can_t_be_read_is_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "coordinator.json"
    with pytest.raises(InputError, match="can't be read"):
        coordinator(path)
    path.write_text(text)
    with pytest.raises(InputError, match=r"coordinator\.json"):
        coordinator(path)
