"""Keeps a few child processes alive, and leaves none behind. Needs Linux and its `setpriv`.

Each child leads a session of its own and carries a mark in its environment, which its children
inherit. What ends is swept by session and mark before it starts again, so a stray grandchild never
meets its successor. If the supervisor itself is killed, the kernel kills the children
(PR_SET_PDEATHSIG); grandchildren are found by the mark, on the next start or stop.

PR_SET_PDEATHSIG is set by `setpriv`, not in a `preexec_fn`: forking Python code under gRPC's
threads may deadlock. A change of user clears it, so a command that changes user has to set it
again, last.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from veilgraft.durable import opened_folder
from veilgraft.errors import InputError, VeilgraftError
from veilgraft_deploy.pidfile import Book, held, recorded
from veilgraft_deploy.processes import (
    KILLED_SECONDS,
    MARK,
    Process,
    alive,
    has_ended,
    identity,
    kill,
    members,
    send,
    until,
)

log = logging.getLogger(__name__)

INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")
"""All that children get of the caller's environment."""

MAX_LOG_BYTES = 10 << 20
FIRST_BACKOFF, MAX_BACKOFF = 0.5, 30.0
HEALTHY_SECONDS = 60.0
SETTLED_SECONDS = 5.0
FIRST_TRIES = 3
POLL_SECONDS, TICK_SECONDS = 0.1, 0.5


@dataclass(frozen=True)
class Service:
    """One process to keep alive.

    Attributes:
        env: added to the few `INHERITED` variables.
        log: gets stdout and stderr; mode 0600, set aside at a start when above 10 MB.
        ready: asked until it is True before the next service starts, so it should answer in about
            a second; None goes on at once.
        ready_seconds: for the first start; a later one is not timed.
        stop_seconds: between SIGTERM and SIGKILL.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    ready: Callable[[], bool] | None = None
    ready_seconds: float = 60
    stop_seconds: float = 10


def supervise(
    services: Sequence[Service], pid_file: Path, *, tick: Callable[[], bool] | None = None
) -> int:
    """Keep `services` alive until SIGTERM, SIGINT or SIGHUP, or until `tick` says no; return 0.

    They start in order, each once the one before is ready, and are stopped in reverse. One that
    ends, however, is started again after 0.5 s, doubling to 30 s; from 0.5 s again once it has
    lived for 60 s. `tick` is called about twice a second from when all are ready. Needs the main
    thread.

    Raises:
        InputError: `pid_file` belongs to a supervisor that runs.
        VeilgraftError: a service ended three times, or its time was over, before it was ready (or,
            without `ready`, had lived for 5 s); nothing is left running.
    """
    mark = secrets.token_hex(16)
    with _asked_to_stop() as asked, held(pid_file) as descriptor:
        book = Book(descriptor, mark)
        children = [_Child(service, mark) for service in services]
        with ExitStack() as stops:
            for child in children:
                stops.callback(child.stop)
            _keep(children, book, asked, tick)
    return 0


def running(pid_file: Path) -> dict[str, Any] | None:
    """Return {pid, starttime, children: {name: [pid, starttime]}} of a live supervisor, or None.

    Children that are down at the moment are left out.

    Raises:
        InputError: the file belongs to another user, or can't be read.
    """
    facts = recorded(pid_file)
    if facts is None or not alive(Process(facts["pid"], facts["starttime"])):
        return None
    children = {n: c for n, c in facts["children"].items() if alive(Process(*c))}
    return {"pid": facts["pid"], "starttime": facts["starttime"], "children": children}


def stop(pid_file: Path, seconds: float) -> bool:
    """Stop what `pid_file` names; return whether its supervisor was running.

    Nothing of it runs afterwards: what is left after `seconds`, or was left by a supervisor that
    was killed, is killed. Services stop one after the other, so allow for all their
    `stop_seconds`.

    Raises:
        InputError: the file belongs to another user, or can't be read.
    """
    facts = recorded(pid_file)
    if facts is None:
        return False
    supervisor = Process(facts["pid"], facts["starttime"])
    was_running = send(supervisor, signal.SIGTERM)
    if was_running and not until(lambda: not alive(supervisor), seconds):
        log.warning("%s: did not end in %g s, and is killed", pid_file, seconds)
        send(supervisor, signal.SIGKILL)
        until(lambda: not alive(supervisor), KILLED_SECONDS)
    # One that ended by itself took its file along; where a new one runs, nothing was left.
    if pid_file.exists():
        with suppress(InputError), held(pid_file):
            pass
    return was_running


def _keep(
    children: "Sequence[_Child]",
    book: Book,
    asked: list[int],
    tick: Callable[[], bool] | None,
) -> None:
    next_tick = 0.0
    while not asked:
        ready = _attend(children, book)
        if ready and tick is not None and time.monotonic() >= next_tick:
            if not tick():
                return
            next_tick = time.monotonic() + TICK_SECONDS
        time.sleep(POLL_SECONDS)


def _attend(children: "Sequence[_Child]", book: Book) -> bool:
    """Look after each child up to the first that never was ready; return whether all were."""
    for child in children:
        if child.attend():
            book.write({c.service.name: c.who for c in children if c.who is not None})
        if not child.was_ready:
            return False
    return True


@dataclass
class _Child:
    """A service and the process that is it at present."""

    service: Service
    mark: str
    process: subprocess.Popen[bytes] | None = None
    who: Process | None = None
    was_ready: bool = False
    settled: bool = False
    tries: int = 0
    backoff: float = FIRST_BACKOFF
    began: float = field(default_factory=time.monotonic)
    started: float = 0.0
    due: float = 0.0

    def attend(self) -> bool:
        """Start it, start it again or note that it is ready; return whether it is another now."""
        now = time.monotonic()
        if self.process is None:
            if now < self.due:
                return False
            self._start()
            return True
        if has_ended(self.process.pid):
            self._ended(now)
            return True
        self._look(now)
        return False

    def _start(self) -> None:
        if self.tries == 0:
            self.began = time.monotonic()
        service = self.service
        env = {name: os.environ[name] for name in INHERITED if name in os.environ}
        # Under another supervisor, as the courier's is, a child is that one's to end as well.
        env |= {**service.env, MARK: f"{os.environ.get(MARK, '')}{self.mark}/{service.name}/"}
        command = [_setpriv(), "--pdeathsig", "KILL", "--", *service.command]
        with _log(service.log) as output:
            self.process = subprocess.Popen(  # noqa: S603 - the caller's own argv, no shell
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.tries += 1
        self.started = time.monotonic()
        self.who = identity(self.process.pid)

    def _look(self, now: float) -> None:
        ready = self.service.ready
        if not self.was_ready:
            self.was_ready = ready is None or ready()
            if not self.was_ready and now - self.began > self.service.ready_seconds:
                raise self._failed(f"was not ready in {self.service.ready_seconds:g} s")
        if self.was_ready and (ready is not None or now - self.started > SETTLED_SECONDS):
            self.settled = True

    def _ended(self, now: float) -> None:
        how = self._end()
        if now - self.started > HEALTHY_SECONDS:
            self.backoff = FIRST_BACKOFF
        if not self.settled and self.tries >= FIRST_TRIES:
            raise self._failed(f"ended {self.tries} times before it was ready ({how})")
        log.warning("%s: %s; starts again in %g s", self.service.name, how, self.backoff)
        self.due = now + self.backoff
        self.backoff = min(2 * self.backoff, MAX_BACKOFF)

    def _failed(self, what: str) -> VeilgraftError:
        return VeilgraftError(
            f"{self.service.name}: {what}; {self.service.log} ends with: "
            f"{_last_line(self.service.log)}"
        )

    def stop(self) -> None:
        """End it and all that it started: SIGTERM, and SIGKILL when the time is over."""
        if self.process is None:
            return
        pid, end = self.process.pid, time.monotonic() + self.service.stop_seconds
        # Its number can't be another's: it has not been waited for.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
        until(lambda: has_ended(pid), self.service.stop_seconds)
        # Those outside its group come later: it may be about to stop them itself, in its own order.
        for process in self._members():
            send(process, signal.SIGTERM)
        until(lambda: not self._members(), end - time.monotonic())
        self._end()

    def _members(self) -> list[Process]:
        assert self.process is not None
        return members({self.process.pid}, f"{self.mark}/{self.service.name}/")

    def _end(self) -> str:
        """Kill what is left of it, forget it, and say how it ended."""
        assert self.process is not None
        kill(self._members)
        code, self.process, self.who = self.process.wait(KILLED_SECONDS), None, None
        if code < 0:
            return f"was ended by signal {-code}"
        return f"ended with exit status {code}"


def _setpriv() -> str:
    found = shutil.which("setpriv")
    if found is None:
        raise InputError("setpriv: is missing; install util-linux 2.36 or later")
    return found


def _log(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with opened_folder(path.parent.absolute()) as folder:
        try:
            handle = os.open(path.name, flags, 0o600, dir_fd=folder)
            if os.fstat(handle).st_size > MAX_LOG_BYTES:
                os.rename(path.name, f"{path.name}.1", src_dir_fd=folder, dst_dir_fd=folder)
                os.close(handle)
                handle = os.open(path.name, flags, 0o600, dir_fd=folder)
        except OSError as error:
            raise InputError(f"{path}: can't be written to: {error.strerror}") from None
    return os.fdopen(handle, "ab")


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "(nothing)")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect the signals that ask for an end; what was ignored stays so, as under nohup."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
