"""One message as the stream of chunks that gRPC carries, and back."""

import io
from collections.abc import Iterable, Iterator

from veilgraft.errors import MessageError
from veilgraft.messages import MAX_HEADER, Envelope
from veilgraft.service.vault_pb2 import Chunk

CHUNK = 1 << 20
"""Bytes of payload in a chunk at most."""

MAX_CHUNK = CHUNK + (8 << 10)
"""Bytes of a chunk as it travels: its data, a header, a signature and their framing."""

MAX_PAYLOAD = (64 << 20) + (1 << 20)
"""Bytes; room for the largest head, and for the names and shapes around it."""

MAX_SIGNATURE = 64
"""Bytes of an Ed25519 signature."""

FAILED = "the vault failed"
"""Goes with UNAVAILABLE where a request did arrive, and must not simply be sent again."""


def split(envelope: Envelope) -> Iterator[Chunk]:
    """Yield the message in order; a payload of at most `CHUNK` bytes gives a single chunk."""
    payload = memoryview(envelope.payload)
    yield Chunk(
        header=envelope.header,
        signature=envelope.signature,
        size=len(payload),
        data=bytes(payload[:CHUNK]),
    )
    for start in range(CHUNK, len(payload), CHUNK):
        yield Chunk(data=bytes(payload[start : start + CHUNK]))


def join(chunks: Iterable[Chunk], max_payload: int = MAX_PAYLOAD) -> Envelope:
    """Return the message that the chunks make up; holds no more memory than what has arrived.

    Raises:
        MessageError: no chunk, a part too long, a first chunk without a header, anything but data
            in a later one, or more or less data than was announced.
    """
    iterator = iter(chunks)
    first = next(iterator, None)
    if first is None or not first.header:
        raise MessageError("expected a header in the first chunk")
    _check("header", len(first.header), MAX_HEADER)
    _check("signature", len(first.signature), MAX_SIGNATURE)
    _check("payload", first.size, max_payload)
    payload = io.BytesIO(first.data)  # its value is handed over without a copy
    payload.seek(0, io.SEEK_END)
    for chunk in iterator:
        if chunk.header or chunk.signature or chunk.size or not chunk.data:
            raise MessageError("expected data alone after the first chunk")
        _check("payload", payload.tell() + len(chunk.data), first.size)
        payload.write(chunk.data)
    if payload.tell() != first.size:
        raise MessageError(f"payload: expected {first.size} bytes, got {payload.tell()}")
    return Envelope(first.header, payload.getvalue(), first.signature)


def _check(part: str, size: int, most: int) -> None:
    if size > most:
        raise MessageError(f"{part}: expected at most {most} bytes, got {size}")
