"""Writes down all that sites send to an edge, as it is inside TLS: a wiretap with the edge's key.

    python recorder.py LISTEN PORT EDGE EDGE_PORT TLS_FOLDER OUT

Bytes pass both ways as they come. What the n-th connection of a site sent is `OUT/ADDRESS.n`.
"""

import asyncio
import itertools
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_NUMBERS = itertools.count()


async def record(listen: str, port: int, edge: tuple[str, int], tls: Path, out: Path) -> None:
    """Serve until the process is ended."""
    towards = ssl.create_default_context(cafile=tls / "ca.pem")
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(tls / "server.pem", tls / "server.key")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0]
        try:
            there, sending = await asyncio.open_connection(*edge, ssl=towards)
        except OSError:
            writer.close()
            return
        with (out / f"{peer}.{next(_NUMBERS)}").open("wb") as log:
            await asyncio.gather(_pass(reader, sending, log), _pass(there, writer, None))

    async with await asyncio.start_server(answer, listen, port, ssl=own) as server:
        await server.serve_forever()


async def _pass(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: BinaryIO | None
) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            if log is not None:
                log.write(data)
                log.flush()
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        # Either end of a connection ends both: HTTP knows no half of one.
        writer.close()
        await writer.wait_closed()


if __name__ == "__main__":
    listen_, port_, edge_, edge_port_, tls_, out_ = sys.argv[1:]
    asyncio.run(record(listen_, int(port_), (edge_, int(edge_port_)), Path(tls_), Path(out_)))
