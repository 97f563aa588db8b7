"""The doorkeeper: who may pass, what passes, and whom it does not let wait."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from veilgraft_client.doorkeeper import Doorkeeper, peer_uid

US = frozenset({os.geteuid()})
SECONDS = 10.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can enter, unlike `tmp_path`."""
    made = Path(tempfile.mkdtemp(prefix="door-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextmanager
def echo(path: Path) -> Iterator[list[int]]:
    """Serve an echo; yields how many bytes each connection sent."""
    seen: list[int] = []
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    door.listen(64)

    def talk(connection: socket.socket, index: int) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(1 << 16):
                seen[index] += len(data)
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return
            seen.append(0)
            threading.Thread(target=talk, args=(connection, len(seen) - 1), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield seen
    finally:
        door.shutdown(socket.SHUT_RDWR)
        door.close()
        thread.join(SECONDS)


@contextmanager
def kept(folder: Path, uids: frozenset[int] = US, most: int = 16) -> Iterator[Path]:
    """Serve the echo behind a doorkeeper that anybody can reach; yields its path."""
    public = folder / "public"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(public))
    public.chmod(0o666)
    listener.listen(64)
    with Doorkeeper(listener, str(folder / "inner"), uids, most):
        yield public


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(SECONDS)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def answers(connection: socket.socket) -> bool:
    """Tell whether the echo is there; a dropped connection gives nothing at all."""
    try:
        connection.sendall(b"?")
        return connection.recv(1) == b"?"
    except OSError:
        return False


def exchange(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    came = bytearray()
    while len(came) < len(data):
        came += connection.recv(1 << 16)
    sender.join(SECONDS)
    return bytes(came)


def test_bytes_pass_unchanged_both_ways(folder: Path) -> None:
    data = os.urandom(20 << 20)
    with echo(folder / "inner"), kept(folder) as public, connect(public) as peer:
        assert exchange(peer, data) == data


def test_the_kernel_names_the_peer(folder: Path) -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert peer_uid(here) == os.geteuid()


def test_a_user_who_is_not_on_the_list_is_dropped_without_a_byte(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        echo(folder / "inner") as seen,
        kept(folder, frozenset()) as public,
    ):
        for _ in range(3):
            with connect(public) as peer:
                assert not answers(peer)
    assert seen == []
    assert [record.args for record in caplog.records] == [(os.geteuid(),)]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT CHECKED: only root can become another user")
def test_another_user_is_dropped_and_its_name_is_its_effective_one(folder: Path) -> None:
    script = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.settimeout(10)\n"
        "s.connect(sys.argv[1])\n"
        "try:\n    s.sendall(b'?')\n    print(s.recv(1) == b'?')\n"
        "except OSError:\n    print(False)\n"
    )

    def passes(uid: int) -> str:
        command = ["setpriv", f"--reuid={uid}", "--regid=64999", "--clear-groups"]
        command += [_python(), "-I", "-c", script, str(folder / "public")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    with echo(folder / "inner"), kept(folder, frozenset({64998})):
        assert passes(64999) == "False"
        assert passes(64998) == "True"


def _python() -> str:
    """Return an interpreter that another user may run."""
    return shutil.which("python3", path="/usr/bin:/bin") or sys.executable


def test_no_more_connections_than_allowed_and_a_place_comes_free(folder: Path) -> None:
    with ExitStack() as held:
        held.enter_context(echo(folder / "inner"))
        public = held.enter_context(kept(folder, most=3))
        inside = [held.enter_context(connect(public)) for _ in range(3)]
        assert all(answers(peer) for peer in inside)
        with connect(public) as further:
            assert not answers(further)
        inside[0].close()
        assert _soon(public)


def _soon(public: Path) -> bool:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with connect(public) as peer:
            if answers(peer):
                return True
        time.sleep(0.02)
    return False


def test_peers_that_are_silent_or_do_not_read_hold_nobody_up(folder: Path) -> None:
    with ExitStack() as held:
        held.enter_context(echo(folder / "inner"))
        public = held.enter_context(kept(folder))
        held.enter_context(connect(public))
        deaf = held.enter_context(connect(public))
        deaf.settimeout(0.5)
        with pytest.raises(TimeoutError):
            deaf.sendall(bytes(64 << 20))  # the echo fills all buffers: nobody reads it
        start = time.monotonic()
        assert answers(held.enter_context(connect(public)))
        assert time.monotonic() - start < 2


def test_a_server_that_is_not_there_ends_the_connection(folder: Path) -> None:
    with kept(folder) as public, connect(public) as peer:
        assert not answers(peer)


def test_leaving_ends_what_is_open(folder: Path) -> None:
    with echo(folder / "inner"):
        with kept(folder) as public:
            peer = connect(public)
            assert answers(peer)
        with peer:
            assert not answers(peer)
        with pytest.raises(ConnectionRefusedError):
            connect(public)


def test_what_a_stopping_server_says_last_gets_out(folder: Path) -> None:
    def stop(door: Doorkeeper) -> None:
        door.__exit__(None, None, None)

    with ExitStack() as held:
        inner, listener = (held.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        for name, made in (("inner", inner), ("public", listener)):
            made.bind(str(folder / name))
            made.listen()
        door = Doorkeeper(listener, str(folder / "inner"), US).__enter__()
        peer = held.enter_context(connect(folder / "public"))
        server, _ = inner.accept()
        leaving = threading.Thread(target=stop, args=(door,))
        leaving.start()
        time.sleep(0.1)
        with server:
            server.sendall(b"bye")
        assert peer.recv(8) == b"bye"
        leaving.join(SECONDS)
