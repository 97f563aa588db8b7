"""What separates the vault from the courier on this machine: measured, not believed.

- network: no interface of the vault's network namespace is up but, at most, a loopback;
- user: the courier is another user, and the vault can't gain what it gave up;
- files: the courier's user can neither read the data and the state folder nor put others there.

All are judged from within the vault's own process, which the commands made here start. Known
limits: a data file that is mounted a second time elsewhere, a descriptor that was inherited, and
vsock, which no network namespace holds back.
"""

import errno
import fcntl
import json
import os
import pwd
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from veilgraft.errors import InputError

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
_IFF_LOOPBACK = 8
_ACLS = {"system.posix_acl_access", "system.nfs4_acl", "system.richacl"}
_READ, _WRITE, _SEARCH = 4, 2, 1
_TRIAL_SECONDS = 60.0
_HIDDEN = (
    *("unshare", "--mount", "--propagation", "private", "--", "sh", "-c"),
    'mount -t proc -o nosuid,nodev,noexec,hidepid=2 proc /proc && exec "$@"',
    "sh",
)
_NO_USER = (
    "the courier has no user of its own; start as root with courier_user set, or accept "
    "`isolation: reduced`"
)


@dataclass(frozen=True)
class Separation:
    """One separation, whether it holds here, and in plain words why or what to do."""

    name: Literal["network", "user", "files"]
    holds: bool
    reason: str


@dataclass(frozen=True)
class Owner:
    """Who the vault runs as: whoever owns the site's state folder."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> "Owner":
        """Return the owner of a folder, with the groups that the machine's accounts give them."""
        info = folder.lstat()
        try:
            account = pwd.getpwuid(info.st_uid)
        except KeyError:
            return cls(info.st_uid, info.st_gid)
        groups = os.getgrouplist(account.pw_name, account.pw_gid)
        return cls(info.st_uid, account.pw_gid, tuple(sorted(groups)))


def vault_command(inner: Sequence[str], owner: Owner) -> list[str]:
    """Return the command that runs `inner` as `owner`, without network and without capabilities.

    What an unprivileged caller lacks, a user namespace gives. It ends with its parent.

    Raises:
        InputError: the caller is neither root nor the owner.
    """
    if os.geteuid() == 0:
        user = [f"--reuid={owner.uid}", f"--regid={owner.gid}", *_groups(owner.groups)]
        return ["unshare", "--net", "--ipc", "--", *_dropped(user, root=True), *inner]
    if os.geteuid() != owner.uid:
        raise InputError(
            f"the vault runs as user {owner.uid}: expected to be started by that user or by root, "
            f"got user {os.geteuid()}"
        )
    unshare = ["unshare", "--user", "--map-current-user", "--net", "--ipc", "--"]
    return [*unshare, *_dropped([], root=False), *inner]


def courier_command(inner: Sequence[str], uid: int | None, gid: int | None) -> list[str]:
    """Return the command that runs `inner` as the courier's user; with None, as the caller.

    As a user of its own it sees no other user's process: how much memory and time the vault takes,
    which any user may read otherwise, would tell how many records there are.

    Raises:
        InputError: another user is asked for and the caller isn't root.
    """
    if os.geteuid() == 0:
        user = [f"--reuid={uid}", f"--regid={uid if gid is None else gid}"] if uid else []
        hidden = _HIDDEN if uid else ()
        return [*hidden, *_dropped([*user, "--clear-groups"], root=True), *inner]
    if uid not in (None, os.geteuid()):
        raise InputError(f"courier_user: only root can start it as user {uid}")
    return [*_dropped([], root=False), *inner]


def _dropped(user: Sequence[str], *, root: bool) -> list[str]:
    # The kernel clears the parent-death signal when the user changes; setpriv sets it after that.
    bounding = ["--bounding-set=-all"] if root else []
    given_up = ["--no-new-privs", "--inh-caps=-all", *bounding]
    return ["setpriv", *user, *given_up, "--pdeathsig", "KILL", "--"]


def _groups(groups: Sequence[int]) -> list[str]:
    return [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]


def measured(
    site_paths: Sequence[Path],
    courier: int | None,
    courier_groups: Collection[int],
    *,
    state: Path,
    shared: Sequence[Path] = (),
) -> tuple[Separation, Separation, Separation]:
    """Return network, user and files, as they are for this very process.

    Args:
        site_paths: the data: files or folders.
        courier: the courier's user number; None where it has no user of its own.
        courier_groups: all groups of the courier, its first one among them.
        state: the site's state folder.
        shared: folders that are there for the courier: `run` and `courier`.
    """
    if courier is None:
        return _network(), *_neither(_NO_USER)
    problem = _no_other(courier)
    if problem is not None:
        return _network(), *_neither(problem)
    problem = _privileges()
    held = f"the courier is user {courier}, and the vault has given up all privileges"
    user = Separation("user", problem is None, problem or held)
    problem = _Courier(courier, frozenset(courier_groups)).problem(site_paths, state, shared)
    held = f"user {courier} can reach neither data nor state folder"
    return _network(), user, Separation("files", problem is None, problem or held)


def _network() -> Separation:
    try:
        up = list(_interfaces_up())
    except OSError as error:
        reason = f"the interfaces can't be listed ({error.strerror}), so it can't be judged"
        return Separation("network", False, reason)
    if up:
        reason = (
            f"this process has a network ({', '.join(up)}); start it with `veilgraft site start`, "
            "or in a container or unit without network"
        )
        return Separation("network", False, reason)
    return Separation("network", True, "no interface is up here but, at most, a loopback")


def _interfaces_up() -> Iterator[str]:
    # Not socket.if_nameindex(), which needs a netlink socket: a unit may allow Unix sockets alone.
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asked:
        for name in (line.partition(":")[0].strip() for line in lines):
            answer = fcntl.ioctl(asked, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
            flags = struct.unpack_from("H", answer, 16)[0]
            # Containers and units without network have a loopback, which leads to nobody else.
            if flags & _IFF_UP and not flags & _IFF_LOOPBACK:
                yield name


def _neither(problem: str) -> tuple[Separation, Separation]:
    files = Separation("files", False, f"nothing is closed to the courier: {problem}")
    return Separation("user", False, problem), files


def _no_other(courier: int) -> str | None:
    if courier == 0:
        return "the courier is root, who may do anything; set courier_user to a user of its own"
    if str(courier) in _status()["Uid"].split():
        return f"the courier is the vault's own user {courier}; set courier_user to another"
    if not _is_mapped(courier):
        return (
            f"user {courier} is unknown in this user namespace, so it can't be judged; start as "
            "root, or accept `isolation: reduced`"
        )
    return None


def _privileges() -> str | None:
    status = _status()
    if int(status["CapPrm"], 16) or int(status["CapEff"], 16):
        return "the vault has capabilities left; start it with `veilgraft site start`"
    if status["NoNewPrivs"].strip() != "1":
        return "the vault may gain privileges (no_new_privs is off); use `veilgraft site start`"
    return None


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines)}


def _is_mapped(uid: int) -> bool:
    """Return whether this user namespace has the number; files of others show as nobody's."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    return any(first <= uid < first + count for first, _, count in ranges)


@dataclass(frozen=True)
class _Courier:
    """The courier's user, as the owners and mode bits of files see it."""

    uid: int
    groups: frozenset[int]

    def problem(self, data: Sequence[Path], state: Path, shared: Sequence[Path]) -> str | None:
        """Return the first thing that is wrong, or None."""
        for path in data:
            found = self._lies_in(path, shared) or self._reaches(path)
            if found:
                return found
        return _state_problem(state) or self._reaches(state)

    def _lies_in(self, path: Path, shared: Sequence[Path]) -> str | None:
        for folder in shared:
            if path.resolve().is_relative_to(folder.resolve()):
                return f"{path}: lies in {folder}, which is the courier's; move it elsewhere"
        return None

    def _reaches(self, path: Path) -> str | None:
        try:
            # The way as it is named too: who may change a link on it may put other data there.
            named = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the links
            return self._walk(path.resolve(strict=True)) or self._walk(named)
        except (OSError, RuntimeError) as error:
            return f"{path}: can't be looked at ({error}), so it can't be judged"

    def _walk(self, path: Path) -> str | None:
        """Go down from the root to what the courier can't pass; None once there."""
        for part in (*reversed(path.parents), path):
            info = part.stat()
            if _has_acl(part):
                return f"{part}: has an ACL, which can't be judged; remove it: setfacl -b {part}"
            if info.st_uid == self.uid:
                return f"{part}: belongs to the courier (user {self.uid}); give it another owner"
            is_folder = stat.S_ISDIR(info.st_mode)
            passes = self._may(info, _SEARCH if is_folder else _READ)
            if is_folder and passes and self._may(info, _WRITE) and not info.st_mode & stat.S_ISVTX:
                return f"{part}: the courier may write here, and replace {path}; chmod go-w {part}"
            if not passes and not (part == path and self._may(info, _READ)):
                return self._other_name(path)
        return f"{path}: user {self.uid} can read it; chmod go-rwx {path}, or close a folder above"

    def _other_name(self, path: Path) -> str | None:
        """Return what is wrong with a file that only its folder protects, if it has two names."""
        info = path.stat()
        if stat.S_ISDIR(info.st_mode) or info.st_nlink == 1 or not self._may(info, _READ):
            return None
        return f"{path}: has a second name (a hard link), which may be open; chmod go-rwx {path}"

    def _may(self, info: os.stat_result, bit: int) -> bool:
        if info.st_uid == self.uid:
            return True
        shift = 3 if info.st_gid in self.groups else 0
        return bool(info.st_mode >> shift & bit)


def _has_acl(path: Path) -> bool:
    try:
        return not _ACLS.isdisjoint(os.listxattr(path))
    except OSError as error:
        # A file system without attributes has no ACLs.
        if error.errno == errno.ENOTSUP:
            return False
        raise


def _state_problem(state: Path) -> str | None:
    try:
        info = state.lstat()
    except OSError as error:
        return f"{state}: can't be looked at ({error.strerror})"
    if not stat.S_ISDIR(info.st_mode):
        return f"{state}: expected the state folder itself, got a link or a file"
    if info.st_uid != os.geteuid():
        return f"{state}: belongs to user {info.st_uid}; expected the vault's user {os.geteuid()}"
    if info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        return f"{state}: expected mode 0700, got {mode:04o}; chmod 700 {state}"
    return None


def would_hold(
    site_paths: Sequence[Path],
    owner: Owner,
    courier: int | None,
    courier_groups: Collection[int],
    *,
    state: Path,
    shared: Sequence[Path] = (),
) -> tuple[Separation, Separation, Separation]:
    """Return what `measured` will say once the vault runs, by trying it: the doctor's question.

    A process is started just as the vault would be, and one as the courier that tries to open the
    data. As root, that is; others can't become the courier.
    """
    question = {
        "site_paths": [os.path.abspath(path) for path in site_paths],  # noqa: PTH100
        "courier": courier,
        "courier_groups": sorted(courier_groups),
        "state": os.path.abspath(state),  # noqa: PTH100
        "shared": [os.path.abspath(path) for path in shared],  # noqa: PTH100
    }
    found = _asked_of_vault(json.dumps(question), owner)
    if courier and os.geteuid() == 0:
        user, files = _tried_as(courier, courier_groups, [*site_paths, state])
        return found[0], user or found[1], files or found[2]
    return found


def _asked_of_vault(question: str, owner: Owner) -> tuple[Separation, Separation, Separation]:
    # Isolated, so that nothing is imported from where the doctor was called; but from where it is.
    places = [place for place in sys.path if place]
    code = f"import sys; sys.path[:] = {places!r}; import {__name__} as it; it._answer()"
    inner = [sys.executable, "-I", "-c", code]
    command = vault_command(inner, owner)
    try:
        return _parsed(_ran(command, question))
    except InputError as problem:
        cause = str(problem)
    try:
        # What keeps the network on need not keep the other two from being judged.
        _, user, files = _parsed(_ran(command[command.index("setpriv") :], question))
    except InputError as problem:
        user, files = (Separation(name, False, str(problem)) for name in ("user", "files"))
    advice = "start as root, allow user namespaces, or use a container or unit without network"
    return Separation("network", False, f"{cause}; {advice}"), user, files


def _parsed(answer: str) -> tuple[Separation, Separation, Separation]:
    network, user, files = (Separation(**each) for each in json.loads(answer))
    return network, user, files


def _answer() -> None:
    """Answer the question on stdin, in the process that `would_hold` starts."""
    asked = json.load(sys.stdin)
    found = measured(
        [Path(path) for path in asked["site_paths"]],
        asked["courier"],
        asked["courier_groups"],
        state=Path(asked["state"]),
        shared=[Path(path) for path in asked["shared"]],
    )
    sys.stdout.write(json.dumps([asdict(each) for each in found]))


def _tried_as(
    courier: int, groups: Collection[int], paths: Sequence[Path]
) -> tuple[Separation | None, Separation | None]:
    """Return what is wrong with user and files, as the courier's own tries show it."""
    own = sorted(groups) or [courier]
    user = [f"--reuid={courier}", f"--regid={own[0]}", *_groups(own)]
    prefix = _dropped(user, root=True)
    try:
        _ran([*prefix, "true"])
    except InputError as problem:
        return Separation("user", False, f"user {courier} can't be used: {problem}"), None
    for path in paths:
        for bit in ("-r", "-x") if path.is_dir() else ("-r",):
            if not _run([*prefix, "test", bit, str(path)]).returncode:
                reason = f"{path}: user {courier} could open it when tried; chmod go-rwx {path}"
                return None, Separation("files", False, reason)
    return None, None


def _ran(command: Sequence[str], question: str = "") -> str:
    done = _run(command, question)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(f"{command[0]}: can't start a process so ({told[-1]})")
    return done.stdout


def _run(command: Sequence[str], question: str = "") -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
    try:
        return subprocess.run(  # noqa: S603 - our own argv, no shell
            command,
            input=question,
            env=env,
            capture_output=True,
            text=True,
            timeout=_TRIAL_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise InputError(f"{command[0]}: is missing; install util-linux 2.36 or later") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]}: no answer in {_TRIAL_SECONDS:g} s") from None
