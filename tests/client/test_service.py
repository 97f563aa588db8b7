"""A vault behind its sockets: what passes, what is refused, and who must not wait."""

import fcntl
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veilgraft.errors import InputError, Refusal, RefusedError, VeilgraftError
from veilgraft.messages import Envelope
from veilgraft.service import vault_pb2_grpc
from veilgraft.service.chunks import CHUNK, split
from veilgraft.service.vault_pb2 import Chunk, Order
from veilgraft_client.connection import DeskClient, VaultClient
from veilgraft_client.service import COURIER, DESK, Service
from veilgraft_client.sockets import short

SECONDS = 10.0
SECRET = "patient 4711"  # stands for what an exception's text may hold
Code = grpc.StatusCode


def echo(envelope: Envelope) -> Envelope:
    return envelope


def desk(verb: str, argument: str) -> dict[str, Any]:
    match verb:
        case "status":
            return {"argument": argument}
        case "mistaken":
            raise InputError("expected a digest, got nothing")
        case "refused":
            raise RefusedError(Refusal.UNAVAILABLE, "the budget is spent")
        case "broken":
            raise VeilgraftError("the disk is full")
        case _:
            raise RuntimeError(SECRET)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site's folder; too deep for the address of a Unix socket."""
    deep = tmp_path / ("a" * 100) / "site"
    (deep / "state").mkdir(mode=0o700, parents=True)
    (deep / "run").mkdir(mode=0o750)
    return deep


@contextmanager
def serving(folder: Path, **changed: Any) -> Iterator[Path]:
    """Serve in `folder`; yields the courier's socket."""
    courier = folder / "run" / "courier.sock"
    given: dict[str, Any] = {
        "handle": echo,
        "desk": desk,
        "courier_socket": courier,
        "local_socket": folder / "state" / "local.sock",
        "allowed_uids": frozenset({os.geteuid()}),
        "stop_seconds": 1.0,
    }
    with Service(**(given | changed)):
        yield courier


@contextmanager
def channel(path: Path, **more: Any) -> Iterator[grpc.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", 1 << 30)]
    with (
        short(path) as address,
        grpc.insecure_channel(f"unix:{address}", options=options, **more) as opened,
    ):
        yield opened


def outcome(path: Path, *chunks: Chunk, **more: Any) -> grpc.StatusCode:
    """Return the code with which a stream of these chunks ends."""
    with channel(path, **more) as opened:
        try:
            list(vault_pb2_grpc.VaultStub(opened).Ask(iter(chunks), timeout=SECONDS))
        except grpc.RpcError as error:
            return error.code()
    return Code.OK


class Silent:
    """Peers that begin a request and say no more until the end of the block."""

    def __init__(self, courier: Path) -> None:
        self._courier = courier
        self._end = threading.Event()
        self._held = ExitStack()
        self._calls: list[grpc.Call] = []  # one that nobody holds is cancelled

    def begin(self) -> grpc.Call:
        """Begin a further one, on a connection of its own."""
        stub = vault_pb2_grpc.VaultStub(self._held.enter_context(channel(self._courier)))
        self._calls.append(stub.Ask(self._chunks(), timeout=6 * SECONDS))
        return self._calls[-1]

    def _chunks(self) -> Iterator[Chunk]:
        yield Chunk(header=b"begun")
        self._end.wait(6 * SECONDS)

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._held.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 20 << 20])
def test_a_message_comes_back_as_it_went(folder: Path, size: int) -> None:
    message = Envelope(b"header", os.urandom(size), b"s" * 64)
    with serving(folder) as courier:
        assert VaultClient(courier, SECONDS).handle(message) == message


def test_modes_are_as_promised_under_any_umask(folder: Path) -> None:
    (folder / "run").chmod(0o2750)
    if os.geteuid() == 0:
        os.chown(folder / "run", -1, 64999)
    state = folder / "state"
    mask = os.umask(0)
    try:
        with serving(folder) as courier:
            modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in state.iterdir()}
            (inner,) = (name for name in modes if name.startswith(".doors-"))
            assert modes == {"local.sock": 0o600, "local.sock.lock": 0o600, inner: 0o700}
            assert stat.S_IMODE(courier.stat().st_mode) == 0o660
            assert courier.stat().st_gid == (folder / "run").stat().st_gid
    finally:
        os.umask(mask)
    assert [path.name for path in state.iterdir()] == ["local.sock.lock"]
    assert not courier.exists()


def test_health_says_serving_on_both_sockets(folder: Path) -> None:
    with serving(folder) as courier:
        for path, name in ((courier, COURIER), (folder / "state" / "local.sock", DESK)):
            with channel(path) as opened:
                stub = health_pb2_grpc.HealthStub(opened)
                for service in ("", name):
                    request = health_pb2.HealthCheckRequest(service=service)
                    status = stub.Check(request, timeout=SECONDS).status
                    assert status == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(grpc.RpcError) as watched:
                    list(stub.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS))
                assert watched.value.code() is Code.UNIMPLEMENTED


def test_no_order_comes_in_by_the_couriers_socket_and_nothing_is_listed(folder: Path) -> None:
    with serving(folder) as courier, channel(courier) as opened:
        with pytest.raises(grpc.RpcError) as ordered:
            vault_pb2_grpc.DeskStub(opened).Do(Order(verb="status"), timeout=SECONDS)
        assert ordered.value.code() is Code.UNIMPLEMENTED
        listing = opened.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        with pytest.raises(grpc.RpcError) as listed:
            list(listing(iter([b""]), timeout=SECONDS))
        assert listed.value.code() is Code.UNIMPLEMENTED


def test_the_desk_answers_and_its_errors_keep_their_kind(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "veilgraft_client"), serving(folder):
        client = DeskClient(folder / "state" / "local.sock", SECONDS)
        assert client.do("status", "ε") == {"argument": "ε"}
        with pytest.raises(InputError, match=r"^expected a digest, got nothing$"):
            client.do("mistaken")
        with pytest.raises(RefusedError, match=r"^the budget is spent$"):
            client.do("refused")
        with pytest.raises(VeilgraftError, match=r"^the disk is full$") as broken:
            client.do("broken")
        assert type(broken.value) is VeilgraftError
        with pytest.raises(VeilgraftError, match=r"^internal error$"):
            client.do("unforeseen")
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_what_a_vault_raises_stays_inside_and_is_not_asked_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fail(envelope: Envelope) -> Envelope:
        asked.append(envelope)
        raise RuntimeError(SECRET)

    with serving(folder, handle=fail) as courier:
        assert outcome(courier, Chunk(header=b"h")) is Code.UNAVAILABLE
        with pytest.raises(VeilgraftError, match=r"^no answer from the vault: the vault failed$"):
            VaultClient(courier, SECONDS).handle(Envelope(b"h"))
    assert len(asked) == 2
    assert SECRET not in caplog.text


def test_what_is_over_a_limit_never_reaches_the_vault(folder: Path) -> None:
    asked: list[Envelope] = []

    def note(envelope: Envelope) -> Envelope:
        asked.append(envelope)
        return envelope

    head = Chunk(header=b"h")
    with serving(folder, handle=note, max_payload=3 * CHUNK) as courier:
        wrong = [
            [],
            [Chunk(data=b"no header")],
            [Chunk(header=b"h" * 4097)],
            [Chunk(header=b"h", signature=b"s" * 65)],
            [head, head],
            [head, Chunk(signature=b"s", data=b"d")],
            [head, Chunk()],
            [head, Chunk(data=b"not announced")],
            [Chunk(header=b"h", data=b"not announced")],
            [Chunk(header=b"h", size=5, data=b"less")],
            [Chunk(header=b"h", size=1 << 62)],
            list(split(Envelope(b"h", bytes(3 * CHUNK + 1)))),
        ]
        for chunks in wrong:
            assert outcome(courier, *chunks) is Code.INVALID_ARGUMENT
        # gRPC ends the stream where a chunk is too large: what came before must not look whole.
        begun = Chunk(header=b"h", size=2 * CHUNK)
        assert outcome(courier, begun, Chunk(data=bytes(2 * CHUNK))) is Code.RESOURCE_EXHAUSTED
        assert asked == []
        most = Envelope(b"h" * 4096, bytes(3 * CHUNK), b"s" * 64)
        with channel(courier) as opened:
            list(vault_pb2_grpc.VaultStub(opened).Ask(split(most), timeout=SECONDS))
        assert asked == [most]


def test_a_small_message_can_not_unpack_into_a_large_one(folder: Path) -> None:
    bomb = Chunk(header=b"h", size=CHUNK, data=bytes(CHUNK))
    with serving(folder) as courier:
        code = outcome(courier, bomb, compression=grpc.Compression.Gzip)
    assert code is Code.UNIMPLEMENTED


def test_a_claimed_length_takes_no_memory_and_is_refused(folder: Path) -> None:
    def literal(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        size = len(body).to_bytes(3, "big")
        return size + bytes([kind, flags]) + stream.to_bytes(4, "big") + body

    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/veilgraft.v1.Vault/Ask",
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    headers = b"".join(literal(*field) for field in fields.items())
    claim = b"\0" + (0xFFFFFFFF).to_bytes(4, "big") + b"a few bytes"
    with serving(folder) as courier, socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(SECONDS)
        with short(courier) as address:
            peer.connect(address)
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        peer.sendall(frame(1, 4, 1, headers) + frame(0, 0, 1, claim))
        came = b""
        while b"grpc-status" not in came:
            came += peer.recv(1 << 16)
    assert b"larger than max" in came


def test_two_are_answered_at_once_and_further_ones_wait(folder: Path) -> None:
    together: list[int] = []
    running = threading.Semaphore(0)
    lock = threading.Lock()
    count = 0

    def slow(envelope: Envelope) -> Envelope:
        nonlocal count
        with lock:
            count += 1
            together.append(count)
        running.acquire(timeout=0.2)
        with lock:
            count -= 1
        return envelope

    with serving(folder, handle=slow) as courier:
        client = VaultClient(courier, SECONDS)
        asking = [
            threading.Thread(target=client.handle, args=(Envelope(b"%d" % index),))
            for index in range(8)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(SECONDS)
    assert len(together) == 8
    assert max(together) == 2


def test_silent_peers_hold_nobody_up_until_there_are_too_many(folder: Path) -> None:
    with serving(folder) as courier:
        with Silent(courier) as silent:
            for _ in range(5):
                silent.begin()
            assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == Envelope(b"h")
            for _ in range(6):  # the place of the one before may take a moment to come free
                silent.begin()
                if outcome(courier, Chunk(header=b"h")) is Code.RESOURCE_EXHAUSTED:
                    break
            else:
                raise AssertionError("expected a no for one too many")
            with channel(courier) as opened:  # health is not among the requests
                health = health_pb2_grpc.HealthStub(opened)
                health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        # The client tries again until those before it have gone.
        assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == Envelope(b"h")


def test_a_peer_that_stays_silent_is_cut_off(folder: Path) -> None:
    with serving(folder, transfer_seconds=0.2) as courier, Silent(courier) as silent:
        assert silent.begin().code() is Code.CANCELLED


def test_a_peer_that_does_not_fetch_its_answer_is_cut_off(folder: Path) -> None:
    large = Envelope(b"h", bytes(32 << 20))
    with ExitStack() as held:
        given = {"handle": lambda _: large, "asks": 1, "transfer_seconds": 0.5}
        courier = held.enter_context(serving(folder, **given))
        for _ in range(10):  # twice the requests that may be there at once
            opened = held.enter_context(channel(courier))
            deaf = vault_pb2_grpc.VaultStub(opened).Ask(iter([Chunk(header=b"h")]))
            held.callback(deaf.cancel)
        assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == large


def test_peers_that_leave_free_their_places(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(folder) as courier, Silent(courier) as silent:
        for _ in range(12):  # twice the requests that may be there at once
            call = silent.begin()
            time.sleep(0.02)
            call.cancel()
        assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == Envelope(b"h")
    assert not caplog.records


def test_a_living_vault_keeps_its_sockets(folder: Path) -> None:
    with serving(folder) as courier:
        with pytest.raises(InputError, match="one is running"), serving(folder):
            pass
        assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == Envelope(b"h")


def test_what_a_killed_vault_left_is_replaced_and_nothing_else(folder: Path) -> None:
    for path in (folder / "run" / "courier.sock", folder / "state" / "local.sock"):
        with short(path) as address, socket.socket(socket.AF_UNIX) as left:
            left.bind(address)
    (folder / "state" / ".doors-left").mkdir()
    (folder / "state" / ".doors-left" / "vault").touch()
    with serving(folder) as courier:
        assert VaultClient(courier, SECONDS).handle(Envelope(b"h")) == Envelope(b"h")
        assert not (folder / "state" / ".doors-left").exists()
    courier.write_text("somebody's notes")
    with pytest.raises(InputError, match="expected a socket or nothing"), serving(folder):
        pass
    assert courier.read_text() == "somebody's notes"
    assert not (folder / "state" / "local.sock").exists()


def test_the_lock_is_released_when_a_start_fails(folder: Path) -> None:
    with pytest.raises(InputError), serving(folder, courier_socket=folder / "none" / "c.sock"):
        pass
    with (folder / "state" / "local.sock.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_stopping_lets_an_answer_out_and_does_not_wait_for_ever(folder: Path) -> None:
    begun, end = threading.Event(), threading.Event()
    answers: list[Envelope] = []

    def slow(envelope: Envelope) -> Envelope:
        begun.set()
        end.wait(0.3 if envelope.header == b"short" else SECONDS)
        return envelope

    def ask(courier: Path, header: bytes) -> None:
        try:
            answers.append(VaultClient(courier, 4.0).handle(Envelope(header)))
        except VeilgraftError:
            answers.append(Envelope(b"none"))

    for header, answer in ((b"short", b"short"), (b"long", b"none")):
        begun.clear()
        with serving(folder, handle=slow) as courier:
            asking = threading.Thread(target=ask, args=(courier, header))
            asking.start()
            assert begun.wait(SECONDS)
            start = time.monotonic()
        assert time.monotonic() - start < 5
        asking.join(SECONDS)
        assert answers.pop() == Envelope(answer)
    end.set()
