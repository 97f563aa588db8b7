"""What separates vault and courier, with real users, namespaces and files; most needs root."""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from veilgraft import errors
from veilgraft_client import separation
from veilgraft_client.separation import Owner, Separation, courier_command, vault_command

OWNER, COURIER, OTHER = 65010, 65011, 65012
ANSWER = "import veilgraft_client.separation as it; it._answer()"
LO_UP = """
import fcntl, socket, struct
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH22x", b"lo", 1))
"""
NOW = """
import ctypes, json, pathlib, socket
status = dict(l.split(":", 1) for l in pathlib.Path("/proc/self/status").read_text().splitlines())
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))
try:
    socket.create_connection(("127.0.0.1", 9)); reached = "open"
except OSError as error:
    reached = error.strerror
ids = {key: sorted(set(status[key].split())) for key in ("Uid", "Gid", "Groups", "CapPrm", "CapEff",
       "CapBnd", "NoNewPrivs")}
print(json.dumps({**ids, "pdeathsig": number.value, "reached": reached}))
"""


def python(code: str, *prefix: str, question: Any = None) -> Any:
    """Run code in a process that the prefix starts, and return the JSON that it prints."""
    done = subprocess.run(
        [*prefix, INTERPRETER, "-I", "-c", FIND_US + code],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


def impossible(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or "no reason given").splitlines()[-1] if done.returncode else None


SOURCES = [
    *(str(Path(file).parents[1]) for file in (separation.__file__, errors.__file__)),
    str(distribution("veilgraft").locate_file("")),
]
FIND_US = f"import sys; sys.path[:0] = {SOURCES!r}\n"


def interpreter() -> str:
    """Return a Python that other users can run too; that of a venv may lie in somebody's home."""
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    for found in (sys.executable, system) if os.geteuid() == 0 else ():
        # A shell between: setpriv itself would still look with root's eyes.
        real = str(Path(found).resolve())
        if not impossible(*as_user(OWNER), "sh", "-c", 'exec "$0" -c ""', real):
            return found
    return sys.executable


INTERPRETER = interpreter()


def why_not_here() -> str | None:
    if os.geteuid() != 0:
        return "needs root, to become other users"
    ours = [INTERPRETER, "-I", "-c", FIND_US + "import veilgraft_client.separation"]
    return impossible(*as_user(OWNER), *ours) or impossible("unshare", "--net", "true")


def why_no_user_namespaces() -> str | None:
    return NOT_HERE or impossible(
        *as_user(OWNER), "unshare", "--user", "--map-current-user", "--net", INTERPRETER, "-c", ""
    )


NOT_HERE = why_not_here()
NO_NAMESPACES = why_no_user_namespaces()
needs_root = pytest.mark.skipif(NOT_HERE is not None, reason=f"NOT TESTED: {NOT_HERE}")
needs_namespaces = pytest.mark.skipif(
    NO_NAMESPACES is not None, reason=f"NOT TESTED, no user namespaces: {NO_NAMESPACES}"
)


@dataclass(frozen=True)
class Place:
    """A site's folder that everybody may enter; nothing above it protects what lies in it."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "records" / "data.csv"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def shared(self) -> list[Path]:
        return [self.root / "run", self.root / "courier"]

    def question(self, courier: int | None = COURIER, **changes: Any) -> dict[str, Any]:
        asked = {
            "site_paths": [str(self.data)],
            "courier": courier,
            "courier_groups": [COURIER],
            "state": str(self.state),
            "shared": [str(path) for path in self.shared],
        }
        return asked | changes

    def asked(self, prefix: Sequence[str], **changes: Any) -> dict[str, Separation]:
        """Return what `measured` says in a process that the prefix starts."""
        found = python(ANSWER, *prefix, question=self.question(**changes))
        return {each["name"]: Separation(**each) for each in found}


@pytest.fixture
def place() -> Iterator[Place]:
    # Not pytest's own folder, which is closed to other users already.
    root = Path(tempfile.mkdtemp(prefix="veilgraft-separation-"))
    try:
        here = Place(root)
        for folder, mode in (("records", 0o755), ("state", 0o700), ("run", 0o2750)):
            (root / folder).mkdir()
            os.chown(root / folder, OWNER, COURIER if folder == "run" else OWNER)
            (root / folder).chmod(mode)
        (root / "courier").mkdir(mode=0o750)
        here.data.write_text("x")
        os.chown(here.data, OWNER, OWNER)
        here.data.chmod(0o600)
        root.chmod(0o755)
        yield here
    finally:
        shutil.rmtree(root)


def vault(uid: int = OWNER) -> list[str]:
    return vault_command([], Owner(uid, uid))


def without_capabilities(uid: int) -> list[str]:
    """Return what starts a process as the vault, with network."""
    command = vault(uid)
    return command[command.index("setpriv") :]


@needs_root
def test_all_three_hold_in_a_process_started_as_the_vault(place: Place) -> None:
    found = place.asked(vault())
    assert [each.holds for each in found.values()] == [True, True, True], found
    assert list(found) == ["network", "user", "files"]


@needs_root
def test_all_three_hold_for_a_vault_that_is_root_without_capabilities(place: Place) -> None:
    os.chown(place.state, 0, 0)
    os.chown(place.data, 0, 0)
    found = place.asked(vault(0))
    assert all(each.holds for each in found.values()), found


@needs_root
@pytest.mark.parametrize("uid", [0, OWNER])
def test_the_vault_starts_without_network_and_capabilities_and_ends_with_its_parent(
    uid: int,
) -> None:
    now = python(NOW, *vault_command([], Owner(uid, uid, (uid, OTHER))))
    assert now["Uid"] == now["Gid"] == [str(uid)]
    assert now["Groups"] == sorted({str(uid), str(OTHER)})
    assert now["CapPrm"] == now["CapEff"] == now["CapBnd"] == ["0" * 16]
    assert now["NoNewPrivs"] == ["1"]
    assert now["pdeathsig"] == 9
    assert now["reached"] == "Network is unreachable"


@needs_root
@pytest.mark.parametrize("uid", [COURIER, None])
def test_the_courier_starts_as_its_own_user_with_network_and_without_capabilities(
    uid: int | None,
) -> None:
    now = python(NOW, *courier_command([], uid, uid))
    assert now["Uid"] == now["Gid"] == [str(uid or 0)]
    assert now["Groups"] == []
    assert now["CapPrm"] == now["CapEff"] == now["CapBnd"] == ["0" * 16]
    assert now["NoNewPrivs"] == ["1"]
    assert now["pdeathsig"] == 9
    assert now["reached"] == "Connection refused"


@needs_root
def test_network_does_not_hold_where_the_machines_network_is_left(place: Place) -> None:
    found = place.asked(without_capabilities(OWNER))
    assert not found["network"].holds
    assert "this process has a network (" in found["network"].reason
    assert found["user"].holds
    assert found["files"].holds


@needs_root
def test_network_holds_where_only_a_loopback_of_its_own_is_up(place: Place) -> None:
    found = {
        each["name"]: each
        for each in python(LO_UP + ANSWER, "unshare", "--net", "--", question=place.question())
    }
    assert found["network"]["holds"]


@needs_root
@pytest.mark.parametrize(
    ("courier", "reason"),
    [
        (None, "has no user of its own; start as root with courier_user set"),
        (0, "the courier is root"),
        (OWNER, "is the vault's own user 65010"),
    ],
)
def test_user_and_with_it_files_do_not_hold_for_a_courier_that_is_no_other_user(
    place: Place, courier: int | None, reason: str
) -> None:
    found = place.asked(vault(), courier=courier)
    assert found["network"].holds
    assert not found["user"].holds
    assert reason in found["user"].reason
    assert not found["files"].holds


@needs_root
@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (["unshare", "--net", "--", "setpriv", "--no-new-privs", "--"], "has capabilities left"),
        (["unshare", "--net", "--", *as_user(OWNER)], "may gain privileges (no_new_privs is off)"),
    ],
)
def test_user_does_not_hold_while_the_vault_has_privileges_or_may_gain_them(
    place: Place, prefix: list[str], reason: str
) -> None:
    found = place.asked(prefix)
    assert not found["user"].holds
    assert reason in found["user"].reason


def acl(path: Path, uid: int) -> None:
    """Let a user read by an ACL, as `setfacl -m u:UID:r` would; skips where there are none."""
    everybody = 0xFFFFFFFF
    entries = [(1, 7, everybody), (2, 5, uid), (4, 0, everybody), (16, 5, everybody)]
    data = struct.pack("<I", 2)
    for tag, bits, who in [*entries, (32, 0, everybody)]:
        data += struct.pack("<HHI", tag, bits, who)
    try:
        os.setxattr(path, "system.posix_acl_access", data)
    except OSError as error:
        pytest.skip(f"NOT TESTED: no ACLs on this file system: {error}")


def give(path: Path, uid: int, gid: int, mode: int) -> None:
    os.chown(path, uid, gid)
    path.chmod(mode)


def link(place: Place) -> None:
    (place.root / "open").mkdir()
    moved = place.root / "open" / "data.csv"
    place.data.rename(moved)
    moved.chmod(0o644)
    place.data.symlink_to(moved)


def second_name(place: Place) -> None:
    place.data.chmod(0o644)
    place.data.parent.chmod(0o700)
    (place.root / "open.csv").hardlink_to(place.data)


def linked_state(place: Place) -> None:
    place.state.rename(place.root / "real")
    place.state.symlink_to(place.root / "real")


def open_file(place: Place) -> None:
    place.data.chmod(0o644)
    place.data.parent.chmod(0o700)


def covered_acl(place: Place) -> None:
    place.data.parent.chmod(0o700)
    acl(place.data, COURIER)


BREACHES: dict[str, tuple[Callable[[Place], object], str]] = {
    "all may read": (lambda at: at.data.chmod(0o604), "data.csv: user 65011 can read it; chmod"),
    "its group may read": (
        lambda at: give(at.data, OWNER, COURIER, 0o640),
        "data.csv: user 65011 can read it",
    ),
    "its own file": (lambda at: os.chown(at.data, COURIER, 0), "data.csv: belongs to the courier"),
    "its own folder": (
        lambda at: give(at.data.parent, COURIER, 0, 0o755),
        "records: belongs to the courier (user 65011)",
    ),
    "all may write into the folder": (
        lambda at: at.data.parent.chmod(0o777),
        "records: the courier may write here, and replace",
    ),
    "an ACL on the file": (
        lambda at: acl(at.data, COURIER),
        "data.csv: has an ACL, which can't be judged; remove it: setfacl -b",
    ),
    "an ACL on the folder": (
        lambda at: acl(at.data.parent, COURIER),
        "records: has an ACL, which can't be judged",
    ),
    "a link to an open place": (link, "open/data.csv: user 65011 can read it"),
    "a second name": (second_name, "data.csv: has a second name (a hard link)"),
    "missing": (lambda at: at.data.unlink(), "data.csv: can't be looked at"),
    "the state folder is open": (
        lambda at: at.state.chmod(0o750),
        "state: expected mode 0700, got 0750; chmod 700",
    ),
    "the state folder is another's": (
        lambda at: os.chown(at.state, OTHER, OTHER),
        "state: belongs to user 65012; expected the vault's user 65010",
    ),
    "the state folder is a link": (linked_state, "state: expected the state folder itself"),
    "the state folder can be swapped": (
        lambda at: at.root.chmod(0o777),
        ": the courier may write here, and replace",
    ),
}


@needs_root
@pytest.mark.parametrize("name", BREACHES)
def test_files_do_not_hold_when(place: Place, name: str) -> None:
    breach, reason = BREACHES[name]
    breach(place)
    found = place.asked(without_capabilities(OWNER))
    assert found["user"].holds
    assert not found["files"].holds
    assert reason in found["files"].reason


@needs_root
def test_files_do_not_hold_for_data_that_lie_among_the_couriers(place: Place) -> None:
    inside = place.shared[0] / "data.csv"
    place.data.rename(inside)
    found = place.asked(without_capabilities(OWNER), site_paths=[str(inside)])
    assert not found["files"].holds
    assert "data.csv: lies in" in found["files"].reason


@needs_root
def test_files_do_not_hold_for_a_folder_of_data_that_the_courier_may_enter_or_list(
    place: Place,
) -> None:
    folder = place.data.parent
    for mode, holds in ((0o711, False), (0o704, False), (0o700, True)):
        folder.chmod(mode)
        found = place.asked(without_capabilities(OWNER), site_paths=[str(folder)])
        assert found["files"].holds is holds, oct(mode)


HARMLESS: dict[str, Callable[[Place], object]] = {
    "a closed folder around an open file": open_file,
    "a group that the courier is not in": lambda at: give(at.data, OWNER, OTHER, 0o640),
    "a second name of a closed file": lambda at: (at.root / "b").hardlink_to(at.data),
    "a folder open to all, where nobody may replace": lambda at: at.data.parent.chmod(0o1777),
    "an ACL below a closed folder": covered_acl,
}


@needs_root
@pytest.mark.parametrize("name", HARMLESS)
def test_files_hold_despite(place: Place, name: str) -> None:
    HARMLESS[name](place)
    found = place.asked(without_capabilities(OWNER))
    assert found["files"].holds, found["files"].reason


@needs_root
def test_what_the_mode_bits_say_is_what_the_courier_can_do(place: Place) -> None:
    for mode in (0o600, 0o640, 0o604, 0o644, 0o400):
        for group in (COURIER, OTHER):
            give(place.data, OWNER, group, mode)
            denied = impossible(*as_user(COURIER), "cat", str(place.data)) is not None
            found = place.asked(without_capabilities(OWNER))
            assert found["files"].holds is denied, (oct(mode), group)


DOCTOR = """
import json, sys
from pathlib import Path
from veilgraft_client.separation import Owner, would_hold
asked = json.load(sys.stdin)
found = would_hold([Path(p) for p in asked["site_paths"]], Owner.of(Path(asked["state"])),
    asked["courier"], asked["courier_groups"], state=Path(asked["state"]))
print(json.dumps({each.name: [each.holds, each.reason] for each in found}))
"""


def would_hold(
    place: Place, *prefix: str, courier: int | None = COURIER
) -> dict[str, tuple[bool, str]]:
    """Return what the doctor says when a process that the prefix starts asks."""
    found = python(DOCTOR, *prefix, question=place.question(courier=courier))
    return {name: (holds, reason) for name, (holds, reason) in found.items()}


@needs_root
def test_the_doctor_foresees_what_will_hold(place: Place) -> None:
    assert all(holds for holds, _ in would_hold(place).values())
    place.data.chmod(0o644)
    found = would_hold(place)
    assert [holds for holds, _ in found.values()] == [True, True, False]
    assert "could open it when tried" in found["files"][1]
    assert not would_hold(place, courier=None)["user"][0]


@needs_root
def test_the_doctor_says_what_stops_it_from_making_a_namespace(place: Place) -> None:
    lesser = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"]
    found = would_hold(place, *lesser)
    assert not found["network"][0]
    assert (
        "unshare: can't start a process so (unshare: unshare failed: Operation not permitted)"
        in (found["network"][1])
    )
    assert found["user"][0], found
    assert found["files"][0]


@needs_root
def test_the_doctor_says_so_when_it_can_not_become_another_user(place: Place) -> None:
    lesser = ["setpriv", "--bounding-set=-setuid", "--inh-caps=-setuid", "--"]
    found = would_hold(place, *lesser)
    assert [holds for holds, _ in found.values()] == [False, False, False]
    assert "setpriv: can't start a process so (setpriv: " in found["user"][1]


@needs_namespaces
def test_an_unprivileged_user_gets_a_vault_without_network_and_nothing_more(place: Place) -> None:
    os.chown(place.state, OTHER, OTHER)
    os.chown(place.data, OTHER, OTHER)
    found = would_hold(place, *as_user(OTHER), courier=None)
    assert found["network"] == (True, "no interface is up here but, at most, a loopback")
    assert not found["user"][0]
    assert not found["files"][0]
    found = would_hold(place, *as_user(OTHER))
    assert "unknown in this user namespace" in found["user"][1]
    assert not found["files"][0]


@needs_namespaces
def test_an_unprivileged_vault_keeps_its_user_and_nothing_of_its_namespaces_powers() -> None:
    make = (
        "import json; from veilgraft_client.separation import *;"
        f"print(json.dumps([vault_command([], Owner({OTHER}, {OTHER})),"
        "courier_command([], None, None)]))"
    )
    for_vault, for_courier = python(make, *as_user(OTHER))
    now = python(NOW, *as_user(OTHER), *for_vault)
    assert now["Uid"] == [str(OTHER)]
    assert now["CapPrm"] == now["CapEff"] == ["0" * 16]
    assert (now["NoNewPrivs"], now["pdeathsig"]) == (["1"], 9)
    assert now["reached"] == "Network is unreachable"
    now = python(NOW, *as_user(OTHER), *for_courier)
    assert now["Uid"] == [str(OTHER)]
    assert (now["NoNewPrivs"], now["pdeathsig"]) == (["1"], 9)
    assert now["reached"] == "Connection refused"


@needs_root
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("vault_command([], Owner(65010, 65010))", "the vault runs as user 65010: expected to be"),
        ("courier_command([], 65011, None)", "courier_user: only root can start it as user 65011"),
    ],
)
def test_only_root_starts_processes_of_others(call: str, reason: str) -> None:
    code = (
        "import json\nfrom veilgraft.errors import InputError\n"
        "from veilgraft_client.separation import *\n"
        f"try: {call}\nexcept InputError as error: print(json.dumps(str(error)))"
    )
    assert reason in python(code, *as_user(OTHER))


def test_the_owner_is_who_owns_the_folder(tmp_path: Path) -> None:
    owner = Owner.of(tmp_path)
    assert owner.uid == os.geteuid()
    assert stat.S_ISDIR(tmp_path.stat().st_mode)


def test_the_module_needs_neither_torch_nor_flower() -> None:
    code = "import json, sys, veilgraft_client.separation; print(json.dumps(list(sys.modules)))"
    loaded = {name.partition(".")[0] for name in python(code)}
    assert loaded.isdisjoint({"torch", "flwr", "numpy", "grpc"})
