"""A coordinator and its sites as real processes, each on a host of its own, for tests.

    with Federation(rounds=3) as federation:
        federation.wait_for(lambda: federation.report() is not None, 60)

All goes through the command line. Parts have names: `coordinator` (its supervisor), `superlink`,
`executor`, `edge`; `a` (a site's supervisor), `a/vault`, `a/courier` (the supervisor of the next
two), `a/supernode`, `a/executor`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
import yaml
from tests.system import hosts
from tests.system.command import DEMO, veilgraft
from tests.system.digits import UNITS, Rows, rows_of, write_digits

from veilgraft.events import EventLog, Note
from veilgraft_deploy.coordinator import history
from veilgraft_deploy.place import Place
from veilgraft_deploy.processes import Process, alive, identity
from veilgraft_server.checkpoint import Round
from veilgraft_server.folder import Folder

VEILGRAFT = Path(sys.executable).with_name("veilgraft")
SITES = ("a", "b", "c")
TIMEOUT = 180.0
"""Seconds for which a round is waited for."""
PORT = 9443
STOP_SECONDS = 60.0
UP_SECONDS = 180.0
TAIL = 3000
"""Characters of each log that a failure shows."""

CHILDREN = ("superlink", "executor", "edge")


class Federation:
    """See the module's docstring; a context manager, which ends all that it started.

    Args:
        sites: their names; each gets `UNITS` records of scikit-learn's digits, none shared.
        rounds: that the study plans.
        public: sites join with `--public`, and with `seed` where there is one.
        namespaces: a host for each; without, all share the loopback.
        sections: changes to the demo's study, by section.
        join: further arguments of `site join`.
        rows: which of the digits each site has, instead of the usual ones.
        up: bring everything up on entry; else call `up`, or its parts, oneself.
    """

    def __init__(
        self,
        *,
        sites: Sequence[str] = SITES,
        rounds: int = 3,
        public: bool = False,
        seed: int | None = None,
        namespaces: bool = True,
        sections: Mapping[str, dict[str, Any]] | None = None,
        join: Sequence[str] = (),
        rows: Mapping[str, Rows] | None = None,
        up: bool = True,
    ) -> None:
        hosts.skip_loudly(hosts.missing(namespaces))
        self.sites = tuple(sites)
        self.public, self.seed, self.join_flags = public, seed, tuple(join)
        self._namespaces, self._up = namespaces, up
        self._sections = dict(sections or {})
        self._sections["training"] = {"rounds": rounds, **self._sections.get("training", {})}
        self._rows = dict(rows or {})
        self._stack = ExitStack()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.port = PORT if namespaces else _free_port()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            hosts.tidy()
            self.folder = hosts.own_folder()
            stack.callback(hosts.delete, self.folder)
            names = ("coordinator", *self.sites)
            made = hosts.network(names, self.folder, self._namespaces)
            self.hosts = {host.name: host for host in stack.enter_context(made)}
            stack.callback(self._end)
            (self.folder / "logs").mkdir()
            self._make()
            self._stack = stack.pop_all()
        if self._up:
            try:
                self.up()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(self.logs())
        self._stack.close()

    # What is where.

    @property
    def coordinator(self) -> Folder:
        """The coordinator's folder."""
        return Folder(self.folder / "coordinator")

    def site(self, name: str) -> Place:
        """Return a site's folder."""
        return Place(self.folder / name)

    def data(self, name: str) -> Path:
        """Return a site's records; `public` are the coordinator's."""
        return self.folder / "data" / f"{name}.parquet"

    @property
    def study(self) -> Path:
        """The study's file."""
        return self.folder / "study.yaml"

    def _make(self) -> None:
        split = rows_of(self.sites) | self._rows
        (self.folder / "data").mkdir()
        for name in ("public", *self.sites):
            write_digits(self.data(name), split[name])
        values = yaml.safe_load((DEMO / "study.yaml").read_text())
        values["backbone"]["path"] = str(DEMO / "backbone")
        sections: dict[str, dict[str, Any]] = {
            "evaluation": {"data": {"path": str(self.data("public"))}, "data_is_public": True},
            "aggregation": {"quorum": len(self.sites), "timeout": TIMEOUT},
            **self._sections,
        }
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes}
        files = [{"path": str(self.data(name))} for name in self.sites]
        values["simulation"] = {"data": files, "data_is_public": True}
        self.study.write_text(yaml.safe_dump(values))

    # The life of the parts.

    def up(self) -> None:
        """Make the coordinator, start it, let all sites join, and start them."""
        bring_up(self)

    def init(self) -> dict[str, Any]:
        """Make the coordinator's folder; return what it says."""
        command = ["coordinator", "init", self.coordinator.path, "--study", self.study]
        command += ["--host", self.hosts["coordinator"].address, "--port", str(self.port)]
        command += ["--sites", ",".join(self.sites), "--json"]
        self.digest = str(self.run("coordinator", *command)["study"])
        return {"study": self.digest}

    def join(self, *names: str, invitations: Mapping[str, Path] | None = None) -> None:
        """Let sites join, all at once."""
        self.joined(self.joining(*names, invitations=invitations))

    def joining(
        self, *names: str, invitations: Mapping[str, Path] | None = None
    ) -> "dict[str, subprocess.Popen[bytes]]":
        """Start to let sites join; hand the result to `joined`."""
        return {name: self._join(name, (invitations or {}).get(name)) for name in names}

    def joined(self, processes: "Mapping[str, subprocess.Popen[bytes]]") -> None:
        """Wait until sites have joined."""
        for name, process in processes.items():
            code = process.wait(UP_SECONDS)
            assert code == 0, f"{name}: join ended with {code}\n{self.logs(f'join-{name}')}"

    def _join(self, name: str, invitation: Path | None) -> "subprocess.Popen[bytes]":
        flags = ["--approve", self.digest, "--units", str(self._units(name)), *self.join_flags]
        flags += ["--public"] if self.public else []
        flags += ["--seed", str(self.seed)] if self.seed is not None else []
        invitation = invitation or self.coordinator.invitation(name)
        command = ["site", "join", invitation, "--data", self.data(name)]
        return self.program(
            name, f"join-{name}", VEILGRAFT, *command, "--dir", self.site(name).path, *flags
        )

    def _units(self, name: str) -> int:
        return pq.read_metadata(self.data(name)).num_rows if self.public else UNITS

    def start(self, name: str) -> None:
        """Start the coordinator, or a site; returns at once. See `wait_until_up`."""
        assert name not in self._running or self._running[name].poll() is not None, name
        command = (
            ["coordinator", "start", self.coordinator.path]
            if name == "coordinator"
            else ["site", "start", "--dir", self.site(name).path]
        )
        self._running[name] = self.program(name, name, VEILGRAFT, *command)

    def wait_until_up(self, *names: str) -> None:
        """Wait until a coordinator's or a site's parts all run."""
        for name in names:
            if name == "coordinator":
                self.wait_for(self._listens, UP_SECONDS, f"{name} up")
            else:
                parts = [f"{name}/{part}" for part in ("vault", "supernode", "executor")]
                up = lambda parts=parts: all(map(self.process, parts))  # noqa: E731
                self.wait_for(up, UP_SECONDS, f"{name} up")

    def stop(self, name: str) -> None:
        """Ask the coordinator or a site to end, and wait until it has."""
        code = hosts.end(self._running.pop(name), STOP_SECONDS)
        assert code == 0, f"{name}: ended with {code}\n{self.logs(name)}"

    def kill(self, name: str) -> None:
        """SIGKILL one part, and wait until it is gone; its supervisor starts it again, if any."""
        process = self.process(name)
        assert process is not None, f"{name}: does not run\n{self.logs()}"
        hosts.kill_now(process)
        self.reap(name)

    def reap(self, name: str) -> None:
        """Forget a coordinator or a site that something else has killed."""
        if name in self._running:
            self._running.pop(name).wait(10)

    def process(self, name: str) -> Process | None:
        """Return who is a part at present; None while it is down."""
        if name in self._running:
            running = self._running[name]
            return identity(running.pid) if running.poll() is None else None
        if name in CHILDREN:
            return _child(self.coordinator.pid_file, name)
        site, _, part = name.partition("/")
        place = self.site(site)
        if part in ("vault", "courier"):
            return _child(place.pid_file, part)
        assert part in ("supernode", "executor"), name
        return _child(place.work / "courier.pid", part)

    def wait_ended(self, name: str, seconds: float) -> int:
        """Wait until the coordinator or a site has ended by itself; return its exit status."""
        try:
            return self._running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name}: did not end in {seconds} s\n{self.logs()}") from None

    # What is to be seen.

    def wait_for(
        self,
        predicate: Callable[[], object],
        seconds: float,
        what: str = "it",
        pause: float = 0.1,
    ) -> None:
        """Wait until `predicate` holds; fails with all logs when the time is over.

        Also fails at once where a coordinator or a site has ended with an error.
        """
        end = time.monotonic() + seconds
        while not predicate():
            late = time.monotonic() > end
            failed = [name for name, each in self._running.items() if each.poll() not in (None, 0)]
            if late or failed:
                why = f"not in {seconds:g} s" if late else f"{failed} ended with an error"
                raise AssertionError(f"waiting for {what}: {why}\n{self.logs()}")
            time.sleep(pause)

    def rounds(self) -> tuple[Round, ...]:
        """Return the rounds that are done."""
        return history(self.coordinator)

    def report(self) -> dict[str, Any] | None:
        """Return the report; None before the study has ended."""
        try:
            found: dict[str, Any] = json.loads(self.coordinator.report.read_text())
        except FileNotFoundError:
            return None
        return found

    def ledger(self, site: str) -> dict[str, Any]:
        """Return what `veilgraft ledger show --json` says of a site's ledger."""
        done = veilgraft("ledger", "show", self.site(site).state / "ledger.db", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def events(self, name: str) -> list[Note]:
        """Return a site's event log; or the coordinator's: its own and then the run's."""
        paths = [self.coordinator.events, self.coordinator.run_events]
        if name != "coordinator":
            paths = [self.site(name).events]
        found: list[Note] = []
        for path in paths:
            if path.exists():
                with closing(EventLog(path, exists=True)) as log:
                    found += log.entries()
        return found

    def run(self, host: str, *arguments: object, seconds: float = UP_SECONDS) -> dict[str, Any]:
        """Run a `veilgraft … --json` on a host; return what it prints."""
        done = self.tool(host, VEILGRAFT, *arguments, seconds=seconds)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def tool(
        self, host: str, *arguments: object, seconds: float = UP_SECONDS
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program on a host."""
        command = self.hosts[host].command(*arguments)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=_environment()
        )

    def logs(self, *names: str) -> str:
        """Return the ends of the logs: of commands that were given, and of all parts."""
        paths = [self.folder / "logs" / f"{name}.log" for name in names]
        if not names:
            patterns = ("logs/*.log", "*/logs/*.log", "*/courier/work/*.log", "*/state/*.log")
            found = sorted(path for each in patterns for path in self.folder.glob(each))
            paths = [path for path in found if not path.name.startswith("join-")]
        said = [(path.relative_to(self.folder), _tail(path)) for path in paths]
        return "\n".join(f"--- {path}\n{text}" for path, text in said if text)

    def program(self, host: str, log: str, *arguments: object) -> "subprocess.Popen[bytes]":
        """Start a program on a host, whose words go to `logs/LOG.log`; it is ended with the rest.

        The kernel kills it with the thread that calls this: start nothing from one that ends.
        """
        with (self.folder / "logs" / f"{log}.log").open("ab") as output:
            return self._kept(
                subprocess.Popen(
                    self.hosts[host].command(*arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    cwd=self.folder,
                    start_new_session=True,
                )
            )

    def _kept(self, process: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
        self._stack.callback(hosts.end, process, 5.0)
        return process

    def _end(self) -> None:
        """End the supervisors together, as each takes a few seconds."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            hosts.end(process, STOP_SECONDS)

    def _listens(self) -> bool:
        if not all(map(self.process, CHILDREN)):
            return False
        host = self.hosts["coordinator"]
        code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
        command = host.command(sys.executable, "-I", "-c", code, host.address, self.port)
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def bring_up(*federations: Federation) -> None:
    """Bring federations up side by side: most of the time of one is waiting."""
    for each in federations:
        each.init()
        each.start("coordinator")
    for each in federations:
        each.wait_until_up("coordinator")
    joining = [each.joining(*each.sites) for each in federations]
    for each, processes in zip(federations, joining, strict=True):
        each.joined(processes)
        for site in each.sites:
            each.start(site)


def _child(pid_file: Path, name: str) -> Process | None:
    """Return who a supervisor's child is, whichever user's the supervisor is."""
    with suppress(OSError, ValueError):
        # More may follow for a moment, while a shorter text takes a longer one's place.
        facts = json.JSONDecoder().raw_decode(pid_file.read_text())[0]
        found = Process(*facts["children"].get(name, (0, 0)))
        return found if alive(found) else None
    return None


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _tail(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")[-TAIL:]
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
