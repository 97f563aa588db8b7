"""Who may speak to the vault: connections to a Unix socket, by the peer's user id.

Python's gRPC does not show who is at the other end, so a doorkeeper owns the public socket. It
asks the kernel (SO_PEERCRED: the peer's effective user when it connected, which a peer can't
choose), drops whom it does not know without a byte, and passes bytes between the others and the
server's own socket, which lies in a folder that nobody else can enter.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

_BUFFER = 256 << 10
_LAST_WORDS = 1.0
_CREDENTIALS = struct.Struct("3i")  # process, user, group


def peer_uid(connection: socket.socket) -> int:
    """Return the effective user id that the peer had when it connected."""
    size = _CREDENTIALS.size
    _, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(uid)


class Doorkeeper:
    """Relays connections of known users from a listening socket to another; has its own thread.

    Use as a context manager: it opens on entry; on exit it lets nobody in any more, gives
    the server a second to end the connections, ends the rest and closes the listening socket.

    Args:
        listener: bound and listening; the doorkeeper's from now on.
        inner: path of the socket behind it.
        uids: who may pass.
        most: connections at once; further ones are dropped as unknown users are.
    """

    def __init__(
        self, listener: socket.socket, inner: str, uids: frozenset[int], most: int = 16
    ) -> None:
        self._listener = listener
        self._inner = inner
        self._uids = uids
        self._most = most
        self._relays: set[asyncio.Task[None]] = set()
        self._dropped: set[int] = set()
        self._end = asyncio.Event()

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, self._listener:
            runner.run(self._serve())

    async def _serve(self) -> None:
        door = asyncio.create_task(self._accept())
        await self._end.wait()
        door.cancel()
        if self._relays:  # a server that has stopped may have said something last
            await asyncio.wait(self._relays, timeout=_LAST_WORDS)
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(door, *self._relays, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # out of descriptors, say: it must not end the service
                log.exception("can't accept a connection")
                await asyncio.sleep(1)
                continue
            if self._may_pass(connection):
                relay = loop.create_task(self._relay(connection))
                self._relays.add(relay)
                relay.add_done_callback(self._relays.discard)
            else:
                connection.close()

    def _may_pass(self, connection: socket.socket) -> bool:
        uid = peer_uid(connection)
        if uid in self._uids:
            return len(self._relays) < self._most
        if uid not in self._dropped:
            self._dropped.add(uid)
            log.warning("dropped a connection of user %d; further ones are not logged", uid)
        return False

    async def _relay(self, outer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with outer, socket.socket(socket.AF_UNIX) as inner, contextlib.suppress(OSError):
            outer.setblocking(False)
            inner.setblocking(False)
            await loop.sock_connect(inner, self._inner)
            ways = {
                loop.create_task(_pump(outer, inner)),
                loop.create_task(_pump(inner, outer)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until either end closes; never holds more than one buffer."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(_BUFFER))
    with contextlib.suppress(OSError):
        while size := await loop.sock_recv_into(source, buffer):
            await loop.sock_sendall(target, buffer[:size])
