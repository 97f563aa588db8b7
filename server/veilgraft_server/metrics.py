"""The coordinator's figures for Prometheus: rounds, releases, sites, and what the edge sees.

Two processes know them. The ServerApp writes what it knows as a `Status` after every round; the
edge, which serves the figures, reads that file at each scrape and adds its own counts. They are
served on loopback alone. None names a site, a record or a metric of the model.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias, get_args
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veilgraft.config import Config
from veilgraft.durable import write_atomically
from veilgraft.errors import InputError
from veilgraft_server.checkpoint import Round

LOOPBACK = "127.0.0.1"
MAX_STATUS = 1 << 20
"""Bytes; a longer file is no status."""

State: TypeAlias = Literal["waiting", "running", "finished", "failed"]
Reason: TypeAlias = Literal["no-answer", "refused", "transport", "invalid"]
"""Why a site's answer did not count."""
STATUSES = ("401", "403", "413", "502", "503", "504")
"""With which the edge refuses a call; any other error is counted as `other`."""

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Status(Config):
    """Where a run stands, in plain facts; `status.json`.

    Attributes:
        round: rounds finished, of `rounds`.
        online: sites that the run's last question went to.
        valid: releases averaged so far; `dropped`: answers that did not count, by reason.
        seconds: what the last round took.
        updated: when this was written, in seconds since 1970.
    """

    state: State
    round: NonNegativeInt
    rounds: NonNegativeInt
    quorum: NonNegativeInt
    online: NonNegativeInt = 0
    valid: _Count = 0
    dropped: dict[Reason, _Count] = Field(default_factory=dict)
    seconds: NonNegativeFloat = 0.0
    updated: NonNegativeFloat = 0.0

    @classmethod
    def of(
        cls, history: Sequence[Round], *, state: State, rounds: int, quorum: int, online: int
    ) -> Self:
        """Return the status after the rounds of a checkpoint, with the time."""
        dropped = Counter(reason(drop.reason) for round_ in history for drop in round_.drops)
        return cls(
            state=state,
            round=len(history),
            rounds=rounds,
            quorum=quorum,
            online=online,
            valid=sum(round_.sites for round_ in history),
            dropped=dict(dropped),
            seconds=history[-1].seconds if history else 0.0,
            updated=time.time(),
        )

    def save(self, path: Path) -> None:
        """Replace the file, atomically."""
        write_atomically(path, self.model_dump_json(indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return what the file holds; None where there is none yet.

        Raises:
            InputError: it can't be read, or is no status.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_STATUS)
            return cls.model_validate_json(data)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}") from None
        except ValidationError:
            raise InputError(f"{path}: expected a run's status") from None


def reason(text: str) -> Reason:
    """Return the class of what a `Drop` says."""
    match text.split(":")[0].split():
        case ["no", "answer", *_]:
            return "no-answer"
        case ["refused", *_]:
            return "refused"
        case ["Flower", "error", *_]:
            return "transport"
    return "invalid"


@dataclass(frozen=True)
class Serving:
    """A running server of metrics."""

    server: WSGIServer

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return self.server.server_port

    def stop(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()


class Metrics:
    """One process's figures and those of the status file. Threads may share it.

    Args:
        status: the file that the ServerApp writes.
        enrolled: gives the number of sites that may take part; asked at each scrape.
    """

    def __init__(self, status: Path, enrolled: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._refused = prometheus_client.Counter(
            "veilgraft_edge_refused_calls",
            "Calls that the edge refused, by HTTP status.",
            ["status"],
            registry=self._registry,
        )
        self._bytes = prometheus_client.Counter(
            "veilgraft_edge_bytes",
            "Bytes of bodies through the edge.",
            ["direction"],
            registry=self._registry,
        )
        for code in (*STATUSES, "other"):
            self._refused.labels(code)
        for direction in ("in", "out"):
            self._bytes.labels(direction)
        self._registry.register(_Run(status, enrolled))

    def watch(self, edge: ASGIApp) -> ASGIApp:
        """Return the edge, its refusals and the bytes of bodies counted, otherwise untouched."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def received() -> Message:
                message = await receive()
                self._bytes.labels("in").inc(len(message.get("body", b"")))
                return message

            async def sent(message: Message) -> None:
                self._refusal(message.get("status", 200))
                self._bytes.labels("out").inc(len(message.get("body", b"")))
                await send(message)

            await edge(scope, received, sent)

        return watched

    def _refusal(self, status: int) -> None:
        if status >= 400:
            known = str(status) in STATUSES
            self._refused.labels(str(status) if known else "other").inc()

    def render(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        text: bytes = prometheus_client.generate_latest(self._registry)
        return text

    def serve(self, port: int) -> Serving:
        """Serve the figures over HTTP on loopback, from a thread; port 0 takes a free one.

        Raises:
            InputError: the port is taken.
        """
        try:
            server, _ = prometheus_client.start_http_server(port, LOOPBACK, self._registry)
        except OSError as error:
            raise InputError(f"metrics: port {port}: {error.strerror}") from None
        return Serving(server)


class _Run(Collector):
    """What the status file says, read at each scrape."""

    def __init__(self, path: Path, enrolled: Callable[[], int]) -> None:
        self._path = path
        self._enrolled = enrolled

    def describe(self) -> Iterable[Metric]:
        """Name nothing beforehand, so that nothing is read when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the figures; those of a run only where one has begun."""
        yield _gauge("sites_enrolled", "Sites that may take part.", self._enrolled())
        try:
            status = Status.load(self._path)
        except InputError:
            # What is known otherwise is still shown, and an alert can watch this one.
            yield _gauge("status_readable", "Whether the run's status can be read.", 0)
            return
        yield _gauge("status_readable", "Whether the run's status can be read.", 1)
        if status is not None:
            yield from _figures(status)


def _figures(status: Status) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "veilgraft_run", "1 for the state that the run is in.", labels=["state"]
    )
    for state in get_args(State):
        states.add_metric([state], state == status.state)
    yield states
    yield CounterMetricFamily("veilgraft_rounds", "Rounds finished.", status.round)
    yield _gauge("rounds_planned", "Rounds of the study.", status.rounds)
    yield _gauge("quorum", "Releases that a round needs.", status.quorum)
    yield _gauge("sites_online", "Sites that the last question went to.", status.online)
    yield CounterMetricFamily("veilgraft_releases_valid", "Releases averaged.", status.valid)
    dropped = CounterMetricFamily(
        "veilgraft_releases_dropped", "Answers that did not count.", labels=["reason"]
    )
    for each in get_args(Reason):
        dropped.add_metric([each], status.dropped.get(each, 0))
    yield dropped
    yield _gauge("last_round_seconds", "What the last round took.", status.seconds)
    yield _gauge("status_updated_seconds", "When the run last wrote its status.", status.updated)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"veilgraft_{name}", text, value)
