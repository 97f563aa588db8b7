"""Requests and releases: what travels between coordinator and site, and nothing else.

A message is a header (canonical JSON, a few public facts) and a payload (arrays in safetensors).
Both are carried as the exact bytes that were made, so that a digest or a signature over them
holds from end to end. Flower types stay in `to_record` and `from_record`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError

from veilgraft.config import Config
from veilgraft.errors import MessageError, Refusal
from veilgraft.study import Digest, Kind, Name

if TYPE_CHECKING:
    from flwr.app import RecordDict

MAX_HEADER = 4096
"""Bytes; a longer header is refused before it is parsed."""


def digest(data: bytes) -> str:
    """Return `sha256:` and the hex SHA-256 of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Envelope:
    """One message as it travels."""

    header: bytes
    payload: bytes = b""


class Header(Config):
    """What all headers share: bytes out, bytes in, nothing unknown."""

    def encode(self) -> bytes:
        """Return the bytes that are sent."""
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a header; raises `MessageError` where it is not exactly of this form."""
        if len(data) > MAX_HEADER:
            raise MessageError(f"expected a header of at most {MAX_HEADER} bytes, got {len(data)}")
        try:
            return cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "header"
            raise MessageError(f"{where}: {first['msg']}") from None


class Hello(Header):
    """The coordinator asks a node which site it is."""

    kind: Literal["hello"] = "hello"
    study: Digest
    run: Name


class Here(Header):
    """A site names itself."""

    kind: Literal["here"] = "here"
    site: Name


class Request(Header):
    """The coordinator asks a site for one release.

    Attributes:
        kind: what is asked for.
        round: of an update, from 1; of an evaluation, that after which it takes place; 0 before
            the first.
        head: digest of the payload, the head that the site starts from or evaluates; label counts
            need none, and the payload is empty.
        rate: an update's learning rate; it does not bear on privacy.
        run, attempt: for logs; no part of a release's key.
    """

    kind: Kind = "update"
    site: Name
    study: Digest
    run: Name
    round: NonNegativeInt
    attempt: PositiveInt = 1
    head: Digest
    rate: NonNegativeFloat = 0.0


class Release(Header):
    """A site's noised answer; the payload holds the arrays."""

    kind: Literal["release"] = "release"
    site: Name
    request: Digest
    payload: Digest


class Refused(Header):
    """A site's no: a fixed code, and nothing that depends on its records."""

    kind: Literal["refusal"] = "refusal"
    site: Name
    request: Digest
    code: Refusal


def decode_answer(data: bytes) -> Release | Refused:
    """Parse what a site sent back; raises `MessageError` where it is neither."""
    return Refused.decode(data) if data.startswith(b'{"kind":"refusal"') else Release.decode(data)


def pack(arrays: Mapping[str, npt.NDArray[np.float64]]) -> bytes:
    """Return named float64 arrays as safetensors bytes; equal arrays give equal bytes."""
    packed: bytes = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    return packed


def unpack(
    payload: bytes, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the arrays of a payload, which must be exactly those that `shapes` names.

    Raises:
        MessageError: other names, shapes or types, too many bytes, or anything not finite.
    """
    expected = sum(8 * int(np.prod(shape)) for shape in shapes.values())
    if len(payload) > expected + MAX_HEADER + 256 * len(shapes):
        raise MessageError(f"payload: expected about {expected} bytes, got {len(payload)}")
    try:
        arrays = safetensors.numpy.load(payload)
    except (SafetensorError, KeyError, ValueError):
        raise MessageError("payload: expected safetensors") from None
    if set(arrays) != set(shapes):
        # Names that came are not shown: they may hold anything.
        raise MessageError(f"payload: expected exactly {sorted(shapes)}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float64:
            came = f"{array.dtype} {list(array.shape)}"
            raise MessageError(f"payload: {name}: expected float64 {list(shape)}, got {came}")
        if not np.isfinite(array).all():
            raise MessageError(f"payload: {name}: expected finite numbers")
    return {name: arrays[name] for name in shapes}


def to_record(envelope: Envelope) -> "RecordDict":
    """Return the message as Flower carries it: the payload's bytes as one array."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    payload = Array("uint8", (len(envelope.payload),), "veilgraft.bytes", envelope.payload)
    return RecordDict(
        {
            "header": ConfigRecord({"bytes": envelope.header}),
            "payload": ArrayRecord({"bytes": payload}),
        }
    )


def from_record(record: "RecordDict") -> Envelope:
    """Return the message that a Flower record carries.

    Raises:
        MessageError: the record is not one of ours.
    """
    try:
        header = record["header"]["bytes"]
        payload = record["payload"]["bytes"].data
    except (KeyError, AttributeError, TypeError):
        raise MessageError("expected a record with a header and a payload") from None
    if not (isinstance(header, bytes) and isinstance(payload, bytes)):
        raise MessageError("expected a header and a payload of bytes")
    return Envelope(header, payload)
