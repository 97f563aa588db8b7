"""A site's folder: where things lie in it, and whose they are.

`state` and `site.yaml` are the owner's, who is the vault's user. `courier` and `run` are there for
the courier, a user of its own where root starts the site: it may read `courier`, write to
`courier/work`, and connect to the socket in `run`. Nothing else in the folder is open to it.
"""

import contextlib
import json
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from veilgraft.durable import give, write_atomically
from veilgraft.errors import InputError
from veilgraft.invitation import Coordinator
from veilgraft_client.policy import Site
from veilgraft_client.separation import Owner

DEFAULT_COURIER = 64200
"""A number that no account has."""


@dataclass(frozen=True)
class Place:
    """Paths of a site's folder, and what its files say."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "Place":
        """Return the folder; raises `InputError` where `site join` made none."""
        found = cls(path.resolve())
        if not found.config.is_file():
            raise InputError(
                f"{path}: expected a folder that `veilgraft site join` made, with "
                f"{found.config.name}"
            )
        found.check()
        return found

    @property
    def config(self) -> Path:
        """The site's own file."""
        return self.path / "site.yaml"

    @cached_property
    def site(self) -> Site:
        """What `site.yaml` says."""
        return Site.read(self.config)

    @property
    def pinned(self) -> Path:
        """What was pinned of the coordinator."""
        return self.path / "coordinator.json"

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator that the site answers to; read anew, as a rotation changes it."""
        return coordinator(self.pinned)

    @property
    def state(self) -> Path:
        """The vault's own."""
        return self.path / "state"

    @property
    def identity(self) -> Path:
        """The site's Ed25519 key."""
        return self.state / "identity.pem"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.state / "events.db"

    @property
    def desk(self) -> Path:
        """The socket for the site's own people."""
        return self.state / "local.sock"

    @property
    def courier(self) -> Path:
        """What the courier may read."""
        return self.path / "courier"

    @property
    def work(self) -> Path:
        """What the courier may write."""
        return self.courier / "work"

    @property
    def node_key(self) -> Path:
        """The key with which the SuperNode shows itself at the edge."""
        return self.courier / "node.pem"

    @property
    def flower(self) -> Path:
        """The courier's FLWR_HOME, read-only."""
        return self.courier / "flower"

    @property
    def run(self) -> Path:
        """Where the courier's socket lies."""
        return self.path / "run"

    @property
    def socket(self) -> Path:
        """The courier's socket."""
        return self.run / "courier.sock"

    @property
    def pid_file(self) -> Path:
        """The supervisor's."""
        return self.path / "site.pid"

    @property
    def logs(self) -> Path:
        """What the supervisor keeps of its processes' words."""
        return self.path / "logs"

    @property
    def owner(self) -> Owner:
        """Whose the folder is: the vault's user."""
        return Owner.of(self.state)

    def check(self) -> None:
        """Raise `InputError` where a folder is a link, or the state lies elsewhere."""
        for folder in (self.state, self.courier, self.work, self.run, self.logs):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise InputError(f"{folder}: expected a folder, got a link or a file")
        if self.config.exists() and self.site.state.resolve() != self.state:
            raise InputError(
                f"{self.config}: state: expected `state`, in this folder, whose separation is "
                f"measured; got {self.site.state}"
            )

    @cached_property
    def courier_user(self) -> tuple[int, frozenset[int]] | None:
        """The courier's user and groups; None where it has no user of its own.

        Raises:
            InputError: `courier_user` names no account of this machine.
        """
        return user(self.site.courier_user)

    def settle(self, courier: tuple[int, frozenset[int]] | None) -> None:
        """Give each user what is theirs; only root can where there are several."""
        found = self.owner
        owner = found.uid
        give(self.state, owner, found.gid, 0o700)
        if os.geteuid() != 0 or courier is None:
            for folder in (self.courier, self.run):
                give(folder, owner, found.gid, 0o700)
            return
        uid, groups = courier
        gid = min(groups) if uid not in groups else uid
        # Set-group-id: the vault, who is not of the courier's group, makes its socket there.
        give(self.run, owner, gid, 0o2750)
        give(self.work, uid, gid, 0o700)
        for path in self.courier.glob("*"):
            if path.is_file() and not path.is_symlink():
                give(path, owner, gid, 0o640)
        give(self.courier, owner, gid, 0o750)

    def as_owner(self) -> contextlib.AbstractContextManager[None]:
        """Act as the folder's owner where root asks: what is made is then the owner's."""
        return acting_as(self.owner)


@contextlib.contextmanager
def acting_as(owner: Owner) -> Iterator[None]:
    """Act as a user where root asks, else change nothing.

    It holds for all threads of the process, so it is for the command line alone.
    """
    if os.geteuid() != 0 or owner.uid == 0:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    try:
        os.setgroups(owner.groups or (owner.gid,))
        os.setegid(owner.gid)
        os.seteuid(owner.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def coordinator(path: Path) -> Coordinator:
    """Read what was pinned of a coordinator; raises `InputError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: expected JSON; join again to write it anew") from None
    return Coordinator.parse(values, name=str(path))


def pin(path: Path, what: Coordinator) -> None:
    """Write down a coordinator to answer to."""
    write_atomically(path, (what.model_dump_json(indent=1) + "\n").encode())


def user(named: str | int | None) -> tuple[int, frozenset[int]] | None:
    """Return a user's number and groups; raises `InputError` where there is no such account."""
    if named is None:
        return None
    try:
        account = pwd.getpwuid(named) if isinstance(named, int) else pwd.getpwnam(named)
    except KeyError:
        if isinstance(named, int):
            return named, frozenset({named})
        raise InputError(
            f"courier_user: expected an account of this machine, got {named!r}; as root: "
            f"useradd --system {named}"
        ) from None
    return account.pw_uid, frozenset(os.getgrouplist(account.pw_name, account.pw_gid))
