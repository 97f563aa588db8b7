"""Connections from outside: how many, how fast they come, how long they may take.

Addresses are counted when TCP accepts them, before any of TLS is computed. A connection is closed
that has not brought a whole request, or taken its answer, in time.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from veilgraft.errors import InputError

_LOG = logging.getLogger(__name__)
_REMEMBERED = 4096


@dataclass(frozen=True)
class Limits:
    """What the edge bears.

    Attributes:
        handshake_seconds: for TLS.
        header_seconds: for a request's line and headers, from the first byte (or the handshake).
        body_seconds: for its body; 12 MiB in it need 1 Mbit/s.
        answer_seconds: for the answer, SuperLink's time and the site's reading included.
        idle_seconds: between requests; a SuperNode asks every 3 s.
        connections: at once; `address_connections` of one address.
        address_rate: new connections a second from one address, in the long run;
            `address_burst` at once.
        site_requests: of one site at once.
    """

    handshake_seconds: float = 10.0
    header_seconds: float = 10.0
    body_seconds: float = 100.0
    answer_seconds: float = 60.0
    idle_seconds: int = 30
    connections: int = 512
    address_connections: int = 64
    address_rate: float = 10.0
    address_burst: int = 100
    site_requests: int = 8


class Door:
    """Counts addresses; a token bucket for each of the latest few thousand."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._open: dict[str, int] = {}
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def enter(self, address: str) -> bool:
        """Count a new connection; False where it is one too many."""
        limits = self._limits
        if not self._spend(address) or sum(self._open.values()) >= limits.connections:
            return False
        if self._open.get(address, 0) >= limits.address_connections:
            return False
        self._open[address] = self._open.get(address, 0) + 1
        return True

    def leave(self, address: str) -> None:
        """Count a connection's end."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]

    def _spend(self, address: str) -> bool:
        now, burst = self._clock(), float(self._limits.address_burst)
        left, last = self._buckets.pop(address, (burst, now))
        left = min(burst, left + (now - last) * self._limits.address_rate)
        self._buckets[address] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > _REMEMBERED:
            self._buckets.popitem(last=False)
        return left >= 1


class _Patience(H11Protocol):
    """One connection, closed when a phase of a request takes too long."""

    limits: Limits
    left: Callable[[], None]
    _phase = ""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter("")
        super().connection_lost(exc)
        self.left()

    def shutdown(self) -> None:
        super().shutdown()
        # A polite end waits for the other side's, which an idle client does not give.
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self.transport.abort()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._enter("body" if self.cycle.more_body else "answer")
        elif self.timeout_keep_alive_task is None:
            self._enter("header")
        else:
            self._enter("")  # between two requests; uvicorn's own timer runs

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
        seconds = {
            "header": self.limits.header_seconds,
            "body": self.limits.body_seconds,
            "answer": self.limits.answer_seconds,
        }.get(phase)
        self._timer = self.loop.call_later(seconds, self._late) if seconds else None

    def _late(self) -> None:
        _LOG.info("closed a connection: too slow")
        self.transport.abort()


class Listener(uvicorn.Server):
    """Serves an ASGI app over TLS on one bound socket.

    Args:
        listening: bound; closed at the end.
        certificate, key: PEM files.

    Raises:
        InputError: the files can't be used.
    """

    def __init__(
        self, app: Any, listening: socket.socket, certificate: Path, key: Path, limits: Limits
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_Patience,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=16384,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._listening = listening
        self._limits = limits
        self._tls = _tls(certificate, key)
        self._door = Door(limits)
        self._handshakes: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """End well on SIGTERM and SIGINT, where this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets=[])
        self._listening.setblocking(False)
        self._listening.listen(128)
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and wait a little for what is under way."""
        self._accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._accepting
        self._listening.close()
        for handshake in self._handshakes:
            handshake.cancel()
        await super().shutdown(sockets=[])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, (address, *_) = await loop.sock_accept(self._listening)
            except OSError as error:
                # Such as too many open files: they will be fewer soon.
                _LOG.warning("can't accept a connection: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            if not self._door.enter(address):
                _LOG.info("refused a connection: too many")
                accepted.close()
                continue
            handshake = loop.create_task(self._shake(accepted, address))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _shake(self, accepted: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        made: list[_Patience] = []

        def protocol() -> _Patience:
            made.append(_Patience(self.config, self.server_state, {}))
            made[-1].limits, made[-1].left = self._limits, lambda: self._door.leave(address)
            return made[-1]

        try:
            await loop.connect_accepted_socket(
                protocol,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self._limits.handshake_seconds,
                ssl_shutdown_timeout=self._limits.handshake_seconds,
            )
        except (OSError, asyncio.CancelledError):
            # Once the handshake is done, `connection_lost` will count it.
            if not made or made[0].transport is None:
                self._door.leave(address)


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise InputError(f"{certificate}: can't be used with its key: {error.strerror}") from None
    return context
