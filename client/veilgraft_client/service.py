"""A vault behind two Unix sockets: the courier's, and that of the site's own people.

Each has a gRPC server of its own, so that no order can come in by the courier's, and neither can
keep the other busy; a doorkeeper stands in front of each. A peer can hold no more than a few
requests at once, each for a bounded time and with bounded bytes, all counted as they arrive.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veilgraft.errors import MessageError, VeilgraftError
from veilgraft.messages import Envelope
from veilgraft.service import vault_pb2_grpc
from veilgraft.service.chunks import FAILED, MAX_CHUNK, MAX_PAYLOAD, join, split
from veilgraft.service.vault_pb2 import Chunk, Order, Outcome
from veilgraft_client.doorkeeper import Doorkeeper
from veilgraft_client.sockets import listening, short

log = logging.getLogger(__name__)

COURIER = "veilgraft.v1.Vault"
DESK = "veilgraft.v1.Desk"
MAX_REPLY = 64 << 20
"""Bytes of an outcome; the ledger of a long life fits in."""

_WAITING = 4  # requests that may arrive, or wait for their turn, beside those being answered
_INNER = ".doors-"
_IDENTITY_ONLY = 1  # the bit of no compression: a small message must not unpack into a large one


class Service:
    """Serves a vault to the courier, and its desk to the site's own people; a context manager.

    Args:
        handle: answers a request; expected not to raise. Two run at once at most, by default.
        desk: carries out an order (verb, argument) and returns what is shown; a `VeilgraftError`
            reaches the caller with its text and exit code, anything else without.
        courier_socket: mode 0660; its group is the folder's where that is setgid.
        local_socket: mode 0600; lets in this process's user and root.
        allowed_uids: who may use the courier's socket.
        max_payload: bytes of a request at most.
        asks: requests answered at once.
        transfer_seconds: that a request may take to arrive, and an answer to be fetched.
        stop_seconds: that `stop` gives to running requests.
    """

    def __init__(
        self,
        *,
        handle: Callable[[Envelope], Envelope],
        desk: Callable[[str, str], Mapping[str, Any]],
        courier_socket: Path,
        local_socket: Path,
        allowed_uids: frozenset[int],
        max_payload: int = MAX_PAYLOAD,
        asks: int = 2,
        transfer_seconds: float = 60.0,
        stop_seconds: float = 10.0,
    ) -> None:
        self._vault = _Vault(handle, max_payload, asks, transfer_seconds)
        self._desk = _Desk(desk)
        self._courier_socket = courier_socket
        self._local_socket = local_socket
        self._allowed_uids = allowed_uids
        self._workers = asks + _WAITING + 2  # two are left for health and for saying no
        self._stop_seconds = stop_seconds
        self._servers: list[grpc.Server] = []
        self._held = ExitStack()

    def start(self) -> None:
        """Listen on both sockets.

        Raises:
            InputError: another vault is serving there, or a socket can't be made.
        """
        with ExitStack() as held:
            local = held.enter_context(listening(self._local_socket, 0o600))
            courier = held.enter_context(listening(self._courier_socket, 0o660))
            inner = held.enter_context(_inner_folder(self._local_socket.parent))
            to_vault = held.enter_context(short(inner / "vault"))
            to_desk = held.enter_context(short(inner / "desk"))
            held.callback(self._stop_servers)
            self._serve(to_vault, COURIER, self._workers, MAX_CHUNK, self._vault)
            self._serve(to_desk, DESK, 4, MAX_REPLY, self._desk)
            us = frozenset({0, os.geteuid()})
            held.enter_context(Doorkeeper(courier, to_vault, self._allowed_uids))
            held.enter_context(Doorkeeper(local, to_desk, us))
            self._held = held.pop_all()

    def stop(self) -> None:
        """End within `stop_seconds` and three more.

        Requests that still run then are cut off, which their callers see; the thread of one goes
        on until its `handle` returns, or the process is ended by `os._exit`.
        """
        self._stop_servers()
        self._held.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _serve(
        self, address: str, name: str, workers: int, size: int, servicer: "_Vault | _Desk"
    ) -> None:
        pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        server = grpc.server(pool, options=_options(size))
        servicer.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(name), server)
        server.add_insecure_port(f"unix:{address}")
        server.start()
        self._servers.append(server)

    def _stop_servers(self) -> None:
        """End the servers, all in the same time; a second call finds none."""
        ends = [server.stop(self._stop_seconds) for server in self._servers]
        for end in ends:
            end.wait(self._stop_seconds + 1)
        self._servers.clear()


class _Vault:
    """`veilgraft.v1.Vault`."""

    def __init__(
        self,
        handle: Callable[[Envelope], Envelope],
        max_payload: int,
        asks: int,
        transfer_seconds: float,
    ) -> None:
        self._handle = handle
        self._max_payload = max_payload
        self._transfer_seconds = transfer_seconds
        self._working = threading.BoundedSemaphore(asks)
        self._present = threading.BoundedSemaphore(asks + _WAITING)

    def add_to(self, server: grpc.Server) -> None:
        vault_pb2_grpc.add_VaultServicer_to_server(self, server)

    def Ask(  # noqa: N802  the contract's name
        self, chunks: Iterator[Chunk], context: grpc.ServicerContext
    ) -> Iterator[Chunk]:
        """Answer one message."""
        if not self._present.acquire(blocking=False):
            _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests at once")
        with ExitStack() as held:
            held.callback(self._present.release)
            answer = self._answer(self._receive(chunks, context), context)
            held.enter_context(_bounded(context, self._transfer_seconds))
            # Held until the answer has been fetched, or its peer has gone.
            rest = held.pop_all()
            if not context.add_callback(rest.close):
                rest.close()
        return split(answer)

    def _receive(self, chunks: Iterator[Chunk], context: grpc.ServicerContext) -> Envelope:
        try:
            with _bounded(context, self._transfer_seconds):
                return join(chunks, self._max_payload)
        except MessageError as error:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _answer(self, request: Envelope, context: grpc.ServicerContext) -> Envelope:
        with self._working:
            if not context.is_active():  # nobody is waiting any more
                _refuse(context, grpc.StatusCode.CANCELLED, "the caller has gone")
            try:
                return self._handle(request)
            except Exception as error:  # noqa: BLE001  its text must not leave
                _note("the vault failed", error)
                _refuse(context, grpc.StatusCode.UNAVAILABLE, FAILED)


class _Desk:
    """`veilgraft.v1.Desk`."""

    def __init__(self, desk: Callable[[str, str], Mapping[str, Any]]) -> None:
        self._desk = desk

    def add_to(self, server: grpc.Server) -> None:
        vault_pb2_grpc.add_DeskServicer_to_server(self, server)

    def Do(self, order: Order, context: grpc.ServicerContext) -> Outcome:  # noqa: N802
        """Carry out one order."""
        try:
            return Outcome(json=json.dumps(self._desk(order.verb, order.argument)))
        except VeilgraftError as error:
            return Outcome(exit_code=error.exit_code, error=str(error))
        except Exception as error:  # noqa: BLE001  its text may hold what was read
            _note("an order failed", error)
            return Outcome(exit_code=VeilgraftError.exit_code, error="internal error")


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """`grpc.health.v1.Health`; answers `Check` alone, as a watcher could stay for ever."""

    def __init__(self, name: str) -> None:
        self._names = {"", name}

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Say that the service is there; when it stops, it says nothing any more."""
        if request.service not in self._names:
            _refuse(context, grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def _options(size: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_CHUNK),
        ("grpc.max_send_message_length", size),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.absolute_max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", 4),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
    ]


@contextmanager
def _bounded(context: grpc.ServicerContext, seconds: float) -> Iterator[None]:
    """Cancel the call if the block has not ended in time."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _inner_folder(state: Path) -> Iterator[Path]:
    """Yield a new folder of mode 0700; those of killed predecessors go."""
    for left in state.glob(f"{_INNER}*"):
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=_INNER, dir=state))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort has raised")


def _note(what: str, error: Exception) -> None:
    """Log where an error came from, without its text, which may hold what was read."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, frames)
