"""The other end of a vault's sockets: for the courier, and for the command line.

Imports neither torch nor the data code: a courier starts anew for every message.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veilgraft.errors import InputError, Refusal, RefusedError, VeilgraftError
from veilgraft.messages import Envelope
from veilgraft.service import vault_pb2_grpc
from veilgraft.service.chunks import FAILED, MAX_CHUNK, join, split
from veilgraft.service.vault_pb2 import Order, Outcome
from veilgraft_client.sockets import short

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
_MAX_OUTCOME = (64 << 20) + (64 << 10)

# What a vault that starts, stops, dies or is busy gives.
_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class VaultClient:
    """A vault behind the courier's socket.

    Args:
        socket: where it listens, now or soon.
        wait_seconds: until an answer, over all attempts.
    """

    def __init__(self, socket: Path, wait_seconds: float = 600.0) -> None:
        self._socket = socket
        self._wait_seconds = wait_seconds

    def handle(self, envelope: Envelope) -> Envelope:
        """Return the vault's answer.

        Waits for a vault that is not there, and sends the same bytes again to one that died over
        them, which is safe as the same request has the same answer.

        Raises:
            VeilgraftError: no answer in time, or the vault could not take or answer the message.
        """
        end = time.monotonic() + self._wait_seconds
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._ask(envelope, end - time.monotonic())
            except (OSError, grpc.RpcError) as error:
                if not _may_pass(error) or time.monotonic() + pause >= end:
                    raise VeilgraftError(f"no answer from the vault: {_cause(error)}") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _ask(self, envelope: Envelope, seconds: float) -> Envelope:
        with _channel(self._socket, MAX_CHUNK) as channel:
            stub = vault_pb2_grpc.VaultStub(channel)
            return join(stub.Ask(split(envelope), timeout=max(seconds, 0.0)))


class DeskClient:
    """A running vault's desk, for the site's own people.

    Args:
        socket: where it listens.
        wait_seconds: that an order may take.
    """

    def __init__(self, socket: Path, wait_seconds: float = 600.0) -> None:
        self._socket = socket
        self._wait_seconds = wait_seconds

    def do(self, verb: str, argument: str = "") -> dict[str, Any]:
        """Return what the order gave.

        Raises:
            InputError, RefusedError, VeilgraftError: what the vault raised, by its exit code; or,
                as a `VeilgraftError`, that no vault is running or lets this user in.
        """
        try:
            with _channel(self._socket, _MAX_OUTCOME) as channel:
                stub = vault_pb2_grpc.DeskStub(channel)
                order = Order(verb=verb, argument=argument)
                outcome: Outcome = stub.Do(order, timeout=self._wait_seconds)
        except (OSError, grpc.RpcError) as error:
            raise VeilgraftError(f"no vault answers at {self._socket}: {_cause(error)}") from None
        if outcome.exit_code:
            raise _error(outcome)
        shown: dict[str, Any] = json.loads(outcome.json)
        return shown


def healthy(socket: Path, wait_seconds: float = 5.0) -> bool:
    """Return whether what listens at a vault's socket says that it serves."""
    try:
        with _channel(socket, MAX_CHUNK) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=wait_seconds)
    except (OSError, grpc.RpcError):
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.contextmanager
def _channel(socket: Path, size: int) -> Iterator[grpc.Channel]:
    """Yield a new channel: an old one would wait for its own back-off after the vault is back."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", size),
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]
    with (
        short(socket) as path,
        grpc.insecure_channel(f"unix:{path}", options=options) as channel,
    ):
        yield channel


def _may_pass(error: OSError | grpc.RpcError) -> bool:
    if isinstance(error, grpc.RpcError):
        return error.code() in _PASSING and error.details() != FAILED
    return isinstance(error, FileNotFoundError)


def _cause(error: OSError | grpc.RpcError) -> str:
    """Return what can be said without a path."""
    if not isinstance(error, grpc.RpcError):
        return str(error.strerror)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT or error.details() == FAILED:
        return str(error.details())
    return str(error.code().name).lower().replace("_", " ")


def _error(outcome: Outcome) -> VeilgraftError:
    match outcome.exit_code:
        case InputError.exit_code:
            return InputError(outcome.error)
        case RefusedError.exit_code:
            return RefusedError(Refusal.UNAVAILABLE, outcome.error)
        case _:
            return VeilgraftError(outcome.error)
