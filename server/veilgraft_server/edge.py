"""The edge: the only part of a coordinator that is reachable from outside.

It stands before SuperLink, which listens on loopback, and whose one port would also let anybody
start a run or register a node. Ten of its calls pass, from enrolled sites, about what is their
own (see `fleet.py`); the path is compared byte for byte, and what SuperLink gets is built anew
from what was checked. All else is 403.

What a SuperNode does with an answer decides which one it gets. 401 stops it, so only a site that
is nobody, here or to SuperLink, gets that; 403 makes it drop the message at hand and ask for the
next; 502, 503 and 504 make it try again, for ever.
"""

import asyncio
import contextlib
import email.utils
import logging
import os
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from veilgraft.chain import ChainError
from veilgraft.errors import InputError, MessageError, RefusedError
from veilgraft.events import EventLog, Kind
from veilgraft.identity import SignatureError
from veilgraft_server import enrolment, fleet
from veilgraft_server.listener import Limits, Listener
from veilgraft_server.metrics import Metrics
from veilgraft_server.ownership import Ownership
from veilgraft_server.registry import Registry
from veilgraft_server.superlink import (
    MEDIA_TYPE,
    TIMEOUT_SECONDS,
    SuperLink,
    UnavailableError,
)

ENROL = "/veilgraft/enrol"
HEALTH = "/veilgraft/health"

CONTROL_BYTES = 1 << 16
REPLY_BYTES = 1 << 18
OBJECT_BYTES = 6 << 20
"""Flower cuts arrays into pieces of 5 MiB."""

METRICS_PORT = 9092
NOTE_SECONDS = 10.0
"""A site's refused calls are noted so often at most: a log on the disk is no place for a flood."""

_ROUTES = {
    ("GET", HEALTH.encode()): HEALTH,
    ("POST", ENROL.encode()): ENROL,
    **{("POST", (fleet.PREFIX + call).encode()): call for call in fleet.FLEET_CALLS},
}
_BYTES = {ENROL: enrolment.MAX_BYTES, "push-messages": REPLY_BYTES, "push-object": OBJECT_BYTES}
_REFUSALS = {
    401: b"unknown\n",
    403: b"forbidden\n",
    413: b"too large\n",
    502: b"bad gateway\n",
    503: b"unavailable\n",
    504: b"gateway timeout\n",
}
# They concern no message, so to ask again is always right.
_POLLS = {"activate-node", "send-node-heartbeat", "pull-messages"}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Where the edge listens, and what it stands before.

    Attributes:
        superlink: host and port on loopback; `superlink_ca`: PEM of who signed its certificate;
            `superlink_seconds`: how long its answer may take.
        registry: the file of `Registry`; `ownership`: the edge's own notes, its alone.
        certificate, key: PEM files for TLS.
        events: the edge's own event log; None keeps none.
        status: what the run says of itself, for the figures on `metrics_port`, on loopback; None
            serves none.
    """

    superlink: str
    superlink_ca: Path
    registry: Path
    ownership: Path
    certificate: Path
    key: Path
    host: str = "0.0.0.0"  # noqa: S104 (to be reached from outside is what it is for)
    port: int = 9443
    superlink_seconds: float = TIMEOUT_SECONDS
    events: Path | None = None
    status: Path | None = None
    metrics_port: int = METRICS_PORT
    limits: Limits = field(default_factory=Limits)


def route(scope: Scope) -> str | None:
    """Return the call, or our own path, that a request is for; None: not to be answered."""
    if scope["type"] != "http" or scope["query_string"] or _wants_upgrade(scope):
        return None
    return _ROUTES.get((scope["method"], scope["raw_path"]))


def _wants_upgrade(scope: Scope) -> bool:
    return any(name == b"upgrade" for name, _ in scope["headers"])


class _RefusedStatusError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class Edge:
    """The ASGI app; see the module's docstring.

    Raises:
        InputError: a file of the settings can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._limits = settings.limits
        self._superlink = SuperLink(
            settings.superlink, settings.superlink_ca, settings.superlink_seconds
        )
        self._registry = Registry(settings.registry)
        self._ownership = Ownership(settings.ownership)
        self._enrolment = enrolment.Enrolment(self._registry, self._superlink)
        self._busy: Counter[str] = Counter()
        self._events = EventLog(settings.events) if settings.events else None
        self._noted: dict[str, float] = {}

    def enrolled(self) -> int:
        """Return how many sites may take part."""
        return sum(1 for each in self._registry.members() if each.node_id and not each.revoked)

    async def close(self) -> None:
        """End the connections to SuperLink, and close the files."""
        await self._superlink.close()
        self._registry.close()
        self._ownership.close()
        if self._events is not None:
            self._events.close()

    async def _note(self, kind: Kind, site: str, **facts: object) -> None:
        if self._events is not None:
            await run_in_threadpool(self._events.note, kind, site=site, **facts)

    async def _note_refused(self, site: str, call: str) -> None:
        now = time.monotonic()
        if now - self._noted.get(site, -NOTE_SECONDS) >= NOTE_SECONDS:
            self._noted[site] = now
            await self._note("refused-request", site, call=call)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with contextlib.suppress(ClientDisconnect):
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        called = route(request.scope)
        try:
            if called is None:
                return refusal(403)
            if called == HEALTH:
                # A site's doctor compares its clock with it.
                date = {"date": email.utils.formatdate(usegmt=True)}
                return Response(b"ok\n", media_type="text/plain", headers=date)
            return await (self._enrol(request) if called == ENROL else self._pass(called, request))
        except _RefusedStatusError as error:
            return refusal(error.status)
        except (sqlite3.Error, ChainError) as error:
            _LOG.error("the edge's files: %s", error)
            return refusal(503)

    async def _enrol(self, request: Request) -> Response:
        body = await _body(request, _BYTES[ENROL])
        try:
            member = await self._enrolment.take(body, request.headers)
        except (MessageError, RefusedError) as error:
            _LOG.warning("refused: %s", error)
            return refusal(403)
        except UnavailableError as error:
            _LOG.error("enrolment: %s", error)
            return refusal(503)
        assert member.identity is not None
        await self._note("enrolled", member.site, key=member.identity.text)
        return JSONResponse({"site": member.site, "node_id": member.node_id})

    async def _pass(self, call: str, request: Request) -> Response:
        """Let one call through: who, then what, then SuperLink, then what its answer allows."""
        try:
            caller = await run_in_threadpool(
                fleet.authenticate, request.headers, self._registry, time.time()
            )
        except SignatureError as error:
            _LOG.warning("refused: %s: %s", call, error)
            return refusal(401)
        with self._turn(caller.site):
            body = await _body(request, _BYTES.get(call, CONTROL_BYTES))
            try:
                message = await run_in_threadpool(fleet.parse, call, body)
                answer = await run_in_threadpool(
                    fleet.check, caller, call, message, self._ownership
                )
                if answer is None:
                    answer = await self._ask(call, message, request)
                    await run_in_threadpool(
                        fleet.learn, caller, call, message, answer, self._ownership
                    )
            except (MessageError, RefusedError) as error:
                _LOG.warning("refused: %s: %s", caller.site, error)
                await self._note_refused(caller.site, call)
                return refusal(403)
        return Response(answer, media_type=MEDIA_TYPE)

    @contextlib.contextmanager
    def _turn(self, site: str) -> Iterator[None]:
        if self._busy[site] >= self._limits.site_requests:
            raise _RefusedStatusError(503)
        self._busy[site] += 1
        try:
            yield
        finally:
            self._busy[site] -= 1

    async def _ask(self, call: str, message: Any, request: Request) -> bytes:
        """Return SuperLink's answer to what was checked; its own words of failure end here."""
        headers = {name: request.headers[name] for name in fleet.AUTH_HEADERS}
        try:
            answer = await self._superlink.post(
                fleet.PREFIX + call, message.SerializeToString(), headers
            )
        except httpx.TimeoutException:
            raise _RefusedStatusError(504) from None
        except httpx.HTTPError:
            raise _RefusedStatusError(502) from None
        if answer.status_code == httpx.codes.OK:
            return answer.content
        _LOG.warning("SuperLink: %s: %d", call, answer.status_code)
        again = answer.status_code in (502, 503, 504)
        if again or (call in _POLLS and answer.is_server_error):
            raise _RefusedStatusError(502)
        raise _RefusedStatusError(401 if answer.status_code == 401 else 403)


def refusal(status: int) -> Response:
    """Return the one answer of this status."""
    # Without "connection: close": what is left of a long body is read and thrown away, until the
    # listener's patience ends. A connection that is reset would lose the answer, and a SuperNode
    # would try again for ever.
    return Response(_REFUSALS[status], status, media_type="text/plain")


async def _body(request: Request, limit: int) -> bytes:
    """Return the body; 413 as soon as it is seen to be longer than `limit` bytes."""
    declared = request.headers.get("content-length", "0")
    # As text first: Python refuses to read thousands of digits.
    if len(declared) > 10 or not declared.isdigit() or int(declared) > limit:
        raise _RefusedStatusError(413)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _RefusedStatusError(413)
    return bytes(body)


def edge_app(settings: Settings) -> Edge:
    """Return the ASGI app; whoever serves it closes it."""
    return Edge(settings)


def serve(settings: Settings, listening: socket.socket | None = None) -> None:
    """Listen until SIGTERM or SIGINT.

    Args:
        listening: a bound socket to use instead of the settings' host and port.

    Raises:
        InputError: host and port can't be bound, or a file can't be used.
    """
    asyncio.run(_serve(settings, listening or bound(settings.host, settings.port)))


async def _serve(settings: Settings, listening: socket.socket) -> None:
    with contextlib.closing(listening):
        app = edge_app(settings)
        listener = Listener(
            _watched(app, settings),
            listening,
            settings.certificate,
            settings.key,
            settings.limits,
        )
        try:
            await listener.serve()
        finally:
            await app.close()


def _watched(app: Edge, settings: Settings) -> ASGIApp:
    """Count what the app answers, and serve the figures on loopback."""
    if settings.status is None:
        return app
    metrics = Metrics(settings.status, app.enrolled)
    try:
        metrics.serve(settings.metrics_port)
    except InputError as error:
        # Another coordinator of this machine may have it; sites must not suffer for that.
        _LOG.warning("no metrics: %s", error)
    return metrics.watch(app)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to this address; raises `InputError` where that can't be."""
    try:
        return socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise InputError(
            f"host, port: can't listen on {host} {port}: {os.strerror(error.errno or 0)}"
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
