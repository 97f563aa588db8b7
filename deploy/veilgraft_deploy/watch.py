"""The Flower run, watched: started, started again when it was killed, known to be over.

A run that ends has either left its report, or the reason why it was given up, or it was killed;
then another is started, which goes on from the checkpoint. Sites answer a round that they are asked
for again with the same bytes, and pay nothing for it.
"""

import contextlib
import logging
import time
from dataclasses import dataclass, field

from veilgraft.errors import InputError, VeilgraftError
from veilgraft_deploy import progress, provision, supervisor
from veilgraft_deploy.control import Control, FlowerRun, Unreachable
from veilgraft_deploy.coordinator import history
from veilgraft_deploy.processes import members
from veilgraft_deploy.progress import Watcher
from veilgraft_server.folder import Folder
from veilgraft_server.metrics import Status

log = logging.getLogger(__name__)

MAX_RUNS = 10
"""Runs in a row that may end soon, without a round and without a reason."""
LONG_SECONDS = 60.0
PAUSE_SECONDS = 2.0
"""Between looks at the Flower run, each of which SuperLink logs."""
ALONE_LOOKS = 3
"""A run whose app was not there at so many looks has lost it."""
NOBODY = "\0"
"""A mark that no process carries."""
ENDING_SECONDS = 5.0


@dataclass
class Conductor:
    """Called twice a second: starts the run, starts it again, and says when all is over."""

    place: Folder
    watcher: Watcher
    runs: int = 0
    due: float = 0.0
    started: float = 0.0
    rounds: int = 0
    said: str = ""
    executor: list[int] | None = None
    alone: int = 0
    over_since: float | None = None
    bundle: provision.Bundle = field(default_factory=provision.bundle)

    def __call__(self) -> bool:
        """Return whether to go on; raises `VeilgraftError` where runs end for no known reason."""
        self._show()
        if time.monotonic() < self.due:
            return True
        self.due = time.monotonic() + PAUSE_SECONDS
        try:
            with Control(self.place.superlink_port(), self.place.ca) as control:
                return self._conduct(control)
        except Unreachable:
            return not self._over()

    def _conduct(self, control: Control) -> bool:
        run = control.newest(self.bundle)
        ended = run is None or run.ended
        if self._over():
            # A little time for Flower to end the run by itself, and for sites to hear of it.
            return not ended and time.monotonic() - (self.over_since or 0) < ENDING_SECONDS
        if ended:
            self._start(control)
        elif run is not None and (self._lost_executor() or self._lost_app(run)):
            log.warning("run %d: its process was ended; it is started again", run.id)
            control.stop(run.id)
        return True

    def _start(self, control: Control) -> None:
        now = time.monotonic()
        if now - self.started > LONG_SECONDS:
            self.runs = 0
        if self.runs >= MAX_RUNS:
            raise VeilgraftError(
                f"{self.runs} runs ended without a round or a reason; see {self.place.app_log}"
            )
        run = control.start(self.bundle)
        self.executor, self.alone = self._executor(), 0
        self.started = now
        self.runs += 1
        log.info("run %d started", run)

    def _over(self) -> bool:
        over = self.place.report.exists() or self.place.outcome.exists()
        if over and self.over_since is None:
            self.over_since = time.monotonic()
        return over

    def _lost_executor(self) -> bool:
        """Return whether the executor that had the run is no more.

        Flower would notice in a minute, of the executor as of the app.
        """
        now = self._executor()
        if self.executor is None:
            self.executor = now
        return now is not None and now != self.executor

    def _lost_app(self, run: FlowerRun) -> bool:
        """Return whether the executor has been alone, in its session, for a few looks."""
        executor = self._executor()
        alone = executor is not None and len(members({executor[0]}, NOBODY)) == 1
        self.alone = self.alone + 1 if alone and run.running else 0
        return self.alone >= ALONE_LOOKS

    def _executor(self) -> list[int] | None:
        running = supervisor.running(self.place.pid_file)
        return running["children"].get("executor") if running else None

    def _show(self) -> None:
        found, planned = history(self.place), self.place.study.training.rounds
        if len(found) > self.rounds:
            self.rounds, self.runs = len(found), 0
            self.watcher.step("rounds", self.rounds, planned, progress.noted(found[-1]))
        state = self._state()
        if state and state != self.said:
            self.watcher.say(state)
            self.said = state

    def _state(self) -> str:
        with contextlib.suppress(InputError):
            found = Status.load(self.place.status)
            if found is not None and found.state == "waiting":
                return f"waiting for sites; the quorum is {found.quorum}"
        return ""
