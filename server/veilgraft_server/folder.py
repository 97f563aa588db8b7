"""The coordinator's folder: where things lie in it, and who may touch what.

Started by root, edge and SuperLink run as one user and the executor as another, which alone may
read `signing.pem`. What they share is of the edge's group, to which the executor belongs; shared
folders are sticky, so that neither can put something of its own in the place of another's file:
not of the installed apps, the key or the study. Not started by root, all are one user.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from veilgraft.config import Config
from veilgraft.durable import give, write_atomically
from veilgraft.errors import InputError
from veilgraft.invitation import Host, Port
from veilgraft.study import Name, Study

UserId = Annotated[int, Field(gt=0, lt=2**31)]

SHARED = 0o3770
"""Set-group-id and sticky: new files are the group's, and only who made one may replace it."""

TOP = 0o3775
"""The same for the folder itself, whose settings and study all may read."""


class Settings(Config):
    """`coordinator.yaml`.

    Attributes:
        host, port: where sites find the edge.
        listen: the address that the edge binds.
        name: of the study.
        sites: who was invited at first; the registry knows the rest.
        dim: features per instance, measured on the backbone.
        users: `apart`, or `one` where root is to run all parts itself.
        edge_user, executor_user: numeric ids that root hands over to.
        metrics_port: on loopback, for Prometheus.
    """

    format: Literal[1] = 1
    name: Name
    host: Host
    port: Port
    listen: Host = "0.0.0.0"  # noqa: S104 - sites come from outside
    sites: tuple[Name, ...]
    dim: PositiveInt
    users: Literal["apart", "one"] = "apart"
    edge_user: UserId = 64301
    executor_user: UserId = 64302
    metrics_port: Port = 9092


class User(NamedTuple):
    """Whom a process becomes: a user, its group, and the further groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)


@dataclass(frozen=True)
class Folder:
    """Paths of a coordinator's folder, and what its two files say."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Return the folder; raises `InputError` where `coordinator init` made none."""
        found = cls(path.resolve())
        if not found.config.is_file():
            raise InputError(
                f"{path}: expected a folder that `veilgraft coordinator init` made, with "
                f"{found.config.name}"
            )
        _ = found.settings
        return found

    @property
    def config(self) -> Path:
        """The settings."""
        return self.path / "coordinator.yaml"

    @cached_property
    def settings(self) -> Settings:
        """What `coordinator.yaml` says."""
        return Settings.read(self.config)

    @cached_property
    def study(self) -> Study:
        """The study."""
        return Study.read(self.path / "study.yaml")

    @property
    def tls(self) -> Path:
        """Certificates and their keys."""
        return self.path / "tls"

    @property
    def ca(self) -> Path:
        """The CA's certificate."""
        return self.tls / "ca.pem"

    @property
    def signing_key(self) -> Path:
        """The coordinator's Ed25519 key."""
        return self.path / "signing.pem"

    @property
    def registry(self) -> Path:
        """Who may take part."""
        return self.path / "registry.db"

    @property
    def flower(self) -> Path:
        """What Flower needs."""
        return self.path / "flower"

    @property
    def home(self) -> Path:
        """FLWR_HOME, read-only."""
        return self.flower / "home"

    @property
    def secret(self) -> Path:
        """What SuperLink and executor share."""
        return self.flower / "executor.secret"

    @property
    def run(self) -> Path:
        """What the run leaves."""
        return self.path / "run"

    @property
    def checkpoint(self) -> Path:
        """The run's state after its last round."""
        return self.run / "checkpoint.safetensors"

    @property
    def report(self) -> Path:
        """There once the run is over, and well."""
        return self.run / "report.json"

    @property
    def outcome(self) -> Path:
        """There once the run was given up: {"error", "exit_code"}."""
        return self.run / "outcome.json"

    @property
    def met(self) -> Path:
        """What sites have said of themselves to the run."""
        return self.run / "met.json"

    @property
    def identities(self) -> Path:
        """The key with which each site first spoke to the executor."""
        return self.run.with_name("executor") / "identities.json"

    @property
    def evaluation(self) -> Path:
        """Features of the study's public records, made once, at the first start."""
        return self.path / "evaluation.safetensors"

    @property
    def status(self) -> Path:
        """Where the run stands; see `metrics.Status`."""
        return self.run / "status.json"

    @property
    def events(self) -> Path:
        """What was done to the coordinator, and by whom it was started: its owner's event log."""
        return self.path / "events.db"

    @property
    def run_lock(self) -> Path:
        """Held by the one process that is at the run."""
        return self.run / "lock"

    @property
    def run_events(self) -> Path:
        """What the run did: the executor's event log."""
        return self.run / "events.db"

    @property
    def logs(self) -> Path:
        """The processes' own words."""
        return self.path / "logs"

    @property
    def app_log(self) -> Path:
        """What the ServerApp says."""
        return self.logs / "app.log"

    @property
    def pid_file(self) -> Path:
        """The supervisor's."""
        return self.path / "coordinator.pid"

    def invitation(self, site: str) -> Path:
        """Return where a site's invitation lies."""
        return self.path / "invitations" / f"{site}.yaml"

    def superlink_port(self) -> int:
        """Return SuperLink's port on loopback; raises `InputError` before the first start."""
        path = self.flower / "port"
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            raise InputError(f"{path}: missing; `veilgraft coordinator start` writes it") from None

    def settle_port(self) -> None:
        """Keep SuperLink's port where it is free, else choose another; nothing may run yet."""
        try:
            port = self.superlink_port()
        except InputError:
            port = 0
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                probe.bind(("127.0.0.1", 0))
            chosen = probe.getsockname()[1]
        write_atomically(self.flower / "port", str(chosen).encode())

    @property
    def separated(self) -> bool:
        """Whether edge and executor are to be users of their own, which takes root."""
        return os.geteuid() == 0 and self.settings.users == "apart"

    @property
    def edge_user(self) -> User | None:
        """Whom edge and SuperLink become; None where there is one user for all."""
        uid = self.settings.edge_user
        return User(uid, uid) if self.separated else None

    @property
    def executor_user(self) -> User | None:
        """Whom the executor becomes; None where there is one user for all."""
        uid = self.settings.executor_user
        return User(uid, uid, (self.settings.edge_user,)) if self.separated else None

    def hand_over(self) -> None:
        """Give each user what it needs, and no more; does nothing unless root does it."""
        if os.geteuid() != 0:
            return
        edge, executor = self.edge_user or ROOT, self.executor_user or ROOT
        give(self.path, 0, edge.gid, TOP)
        give(self.flower, 0, edge.gid, SHARED)
        # The edge reads how the run stands, and can put nothing there.
        give(self.run, executor.uid, edge.gid, 0o2750)
        self.identities.parent.mkdir(mode=0o700, exist_ok=True)
        give(self.identities.parent, executor.uid, executor.gid, 0o700)
        for path in self.flower.glob("*.db*"):
            give(path, edge.uid, edge.gid, 0o660)
        for path in (self.secret, self.flower / "port"):
            give(path, 0, edge.gid, 0o640)
        # Of its folder's owner: with fs.protected_regular = 2, the kernel lets others open it then.
        for path in self.path.glob("registry.db*"):
            give(path, 0, edge.gid, 0o660)
        for path in self.run.iterdir():
            if path.is_file():
                give(path, executor.uid, edge.gid, 0o640)
        give(self.tls / "server.key", edge.uid, edge.gid, 0o600)
        give(self.signing_key, executor.uid, executor.gid, 0o600)
        self.app_log.touch()
        give(self.app_log, executor.uid, executor.gid, 0o600)


@contextmanager
def readable() -> Iterator[None]:
    """Let other users read what is written meanwhile, whatever the caller's umask says."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
