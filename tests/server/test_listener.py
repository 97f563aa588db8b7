"""What the edge does before it knows who asks: spellings of paths, slowness, numbers."""

import contextlib
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.superlink import LAST, certify, client, edge, raw

from veilgraft_server.edge import ENROL, HEALTH, route
from veilgraft_server.fleet import FLEET_CALLS
from veilgraft_server.listener import Door, Limits

NOWHERE = "127.0.0.1:1"
"""For a SuperLink that none of these requests may reach."""


class Quiet(NamedTuple):
    """An edge that serves, and where its files are."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("edge")
    certify(made)
    return made


@pytest.fixture(scope="module")
def quiet(folder: Path) -> Iterator[Quiet]:
    with edge(folder, NOWHERE) as url:
        yield Quiet(url, folder)


@pytest.mark.parametrize(
    "line",
    [
        "POST /v1/fleet/%70ull-messages",
        "POST /v1/fleet%2Fpull-messages",
        "POST /v1/fleet/%2e%2e/control/list-nodes",
        "POST /v1/fleet/../control/list-nodes",
        "POST /v1/fleet/./pull-messages",
        "POST //v1/fleet/pull-messages",
        "POST /v1//fleet/pull-messages",
        "POST /v1/fleet/pull-messages/",
        "POST /V1/fleet/pull-messages",
        "POST /v1/fleet/pull-messages?x=1",
        "POST /v1/fleet/pull-messages;x",
        "POST /v1/fleet/pull-messages#x",
        "POST https://127.0.0.1/v1/fleet/pull-messages",
        "POST *",
        "post /v1/fleet/pull-messages",
        "GET /v1/fleet/pull-messages",
        "PUT /v1/fleet/pull-messages",
        "CONNECT 127.0.0.1:9092",
        "POST /veilgraft/enrol/",
        "POST /veilgraft/health",
        "GET /veilgraft/%65nrol",
        "GET /openapi.json",
        "GET /",
    ],
)
def test_any_other_path_method_or_spelling_is_forbidden(quiet: Quiet, line: str) -> None:
    answer = raw(
        quiet.url, quiet.folder, f"{line} HTTP/1.1\r\n{LAST}content-length: 0\r\n\r\n".encode()
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 ") and body == b"forbidden\n"


@pytest.mark.parametrize("path", [HEALTH, "/v1/fleet/pull-messages"])
def test_an_upgrade_to_a_websocket_is_forbidden(quiet: Quiet, path: str) -> None:
    lines = [f"GET {path} HTTP/1.1", "host: x", "connection: upgrade, close"]
    lines += ["upgrade: websocket", "sec-websocket-version: 13"]
    lines += ["sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="]
    assert b"HTTP/1.1 403 " in raw(
        quiet.url, quiet.folder, ("\r\n".join(lines) + "\r\n\r\n").encode()
    )


_PATHS = [f"/v1/fleet/{call}".encode() for call in FLEET_CALLS] + [ENROL.encode()]
_PIECES = st.sampled_from([b"/", b"%2f", b"%2e", b"..", b";", b"%00", b"\x00", b"A", b"\xff"])


@given(st.sampled_from(_PATHS), st.integers(0, 40), st.integers(0, 3), _PIECES)
def test_a_path_that_differs_in_a_byte_has_no_route(
    path: bytes, where: int, dropped: int, piece: bytes
) -> None:
    changed = path[:where] + piece + path[where + dropped :]
    scope = {"type": "http", "method": "POST", "query_string": b"", "headers": []}
    assert (route(scope | {"raw_path": changed}) is not None) == (changed in _PATHS)
    assert route(scope | {"raw_path": path}) is not None
    assert route(scope | {"raw_path": path, "query_string": piece}) is None
    assert route(scope | {"raw_path": path, "type": "websocket"}) is None


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /veil",
        b"POST /veilgraft/enrol HTTP/1.1\r\nhost: x\r\n",
        b"POST /veilgraft/enrol HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ],
)
def test_a_connection_that_brings_no_whole_request_in_time_is_closed(
    folder: Path, sent: bytes
) -> None:
    limits = Limits(handshake_seconds=0.4, header_seconds=0.4, body_seconds=0.4)
    with edge(folder, NOWHERE, limits) as url:
        assert _closed(lambda: raw(url, folder, sent))
        host, port = url.removeprefix("https://").split(":")
        with socket.create_connection((host, int(port)), 5) as mute:
            assert _closed(lambda: mute.recv(1))


def _closed(read: Callable[[], bytes]) -> bool:
    """Return whether the other side ends it, having said nothing."""
    try:
        return read() == b""
    except (ConnectionError, ssl.SSLEOFError):
        return True


def test_one_address_holds_only_so_many_connections(folder: Path) -> None:
    with edge(folder, NOWHERE, Limits(address_connections=2)) as url:
        with contextlib.ExitStack() as held:
            for _ in range(2):
                http = held.enter_context(client(url, folder))
                assert http.get(HEALTH).status_code == 200
            with client(url, folder) as third, pytest.raises(httpx.TransportError):
                third.get(HEALTH)
        time.sleep(0.2)
        with client(url, folder) as later:
            assert later.get(HEALTH).text == "ok\n"


def test_one_address_opens_only_so_many_connections_a_second() -> None:
    now = [0.0]
    door = Door(Limits(address_rate=1.0, address_burst=2, connections=9), lambda: now[0])
    assert [door.enter("a") for _ in range(3)] == [True, True, False]
    assert door.enter("b")
    now[0] = 1.0
    assert [door.enter("a") for _ in range(2)] == [True, False]
    door = Door(Limits(connections=2))
    assert [door.enter(address) for address in "abc"] == [True, True, False]
    door.leave("a")
    assert door.enter("c")


_SERVE = """
import sys
from pathlib import Path
from veilgraft_server.edge import Settings, bound, serve
at = Path(sys.argv[1])
listening = bound("127.0.0.1", 0)
print(listening.getsockname()[1], flush=True)
files = (at / "registry.db", at / "edge.db", at / "server.pem", at / "server.key")
serve(Settings(sys.argv[2], at / "ca.pem", *files), listening)
"""


def test_a_process_that_serves_ends_well_when_it_is_told_to(folder: Path) -> None:
    command = [sys.executable, "-c", _SERVE, str(folder), NOWHERE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"https://127.0.0.1:{process.stdout.readline().strip()}"
            with client(url, folder) as idle:
                assert idle.get(HEALTH).text == "ok\n"
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0
        finally:
            process.kill()
