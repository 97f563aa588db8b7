"""Requests and releases: what travels between coordinator and site, and nothing else.

A message is a header (JSON, a few public facts), a payload (arrays in safetensors, a study, a
stretch of a file) and a signature. All are carried as the exact bytes that were made: the
signature is over the header's, and the header holds the payload's digest. Flower types stay in
`to_record` and `from_record`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from safetensors import SafetensorError

from veilgraft.config import Config
from veilgraft.errors import MessageError, Refusal
from veilgraft.logs import plain
from veilgraft.study import Digest, Kind, Name

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

MAX_HEADER = 4096
"""Bytes; a longer header is refused before it is parsed."""

MAX_TOLD = 200
"""Characters of what is said of a header that can't be used."""

Parsed = TypeVar("Parsed")

Nonce = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]


def digest(data: bytes) -> str:
    """Return `sha256:` and the hex SHA-256 of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


EMPTY = digest(b"")
"""Of a message without payload."""


@dataclass(frozen=True)
class Envelope:
    """One message as it travels.

    Attributes:
        signature: over the header's exact bytes; empty in a simulation. The payload's digest
            stands in the header.
    """

    header: bytes
    payload: bytes = b""
    signature: bytes = b""


class Header(Config):
    """What all headers share: bytes out, bytes in, nothing unknown."""

    def encode(self) -> bytes:
        """Return the bytes that are sent."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a header; raises `MessageError` where it is not exactly of this form."""
        return _parsed(TypeAdapter(cls), data)


def check_header(data: bytes) -> None:
    """Raise `MessageError` where a header is longer than any may be."""
    if len(data) > MAX_HEADER:
        raise MessageError(f"expected a header of at most {MAX_HEADER} bytes, got {len(data)}")


class Asked(Header):
    """What the coordinator's headers share.

    The first three are there on a network, where everything is signed, and not in a simulation.

    Attributes:
        key: id of the coordinator's key.
        nonce: makes it one of its kind; kept by the site until it expires.
        expires: seconds since 1970.
        site: to whom.
        run, attempt: for logs; no part of a release's key.
    """

    key: Digest | None = None
    nonce: Nonce | None = None
    expires: PositiveInt | None = None
    study: Digest
    run: Name
    attempt: PositiveInt = 1


class Hello(Asked):
    """The coordinator asks a node which site it is, and hands it the study.

    Attributes:
        payload: digest of the payload, the study in its canonical form as JSON.
    """

    kind: Literal["hello"] = "hello"
    payload: Digest = EMPTY


class Request(Asked):
    """The coordinator asks a site for one release.

    Attributes:
        kind: what is asked for.
        round: of an update, from 1; of an evaluation, that after which it takes place; 0 before
            the first.
        head: digest of the payload, the head that the site starts from or evaluates; label counts
            need none, and the payload is empty.
        rate: an update's learning rate; it does not bear on privacy.
    """

    kind: Kind = "update"
    site: Name
    round: NonNegativeInt
    head: Digest
    rate: NonNegativeFloat = 0.0

    @property
    def payload(self) -> str:
        """Digest of the payload."""
        return self.head


class Offer(Asked):
    """The coordinator offers a backbone's files; the payload is their manifest as JSON."""

    kind: Literal["offer"] = "offer"
    site: Name
    payload: Digest


class Part(Asked):
    """A stretch of one of the backbone's files, from `offset` on."""

    kind: Literal["part"] = "part"
    site: Name
    name: FileName
    offset: NonNegativeInt
    payload: Digest


Question: TypeAlias = Hello | Request | Offer | Part
"""What a coordinator may ask."""

_QUESTION: TypeAdapter[Question] = TypeAdapter(Annotated[Question, Field(discriminator="kind")])


def decode_question(data: bytes) -> Question:
    """Parse what a coordinator asks; raises `MessageError` where it is none of these."""
    return _parsed(_QUESTION, data)


def _parsed(form: TypeAdapter[Parsed], data: bytes) -> Parsed:
    """Return what `data` holds; raises `MessageError` where it is not exactly of this form."""
    check_header(data)
    try:
        return form.validate_json(data, strict=True)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> MessageError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "header"
    # Both may quote what came, from whoever it came.
    return MessageError(plain(f"{where}: {first['msg']}"[:MAX_TOLD]))


class Answer(Header):
    """What a site's headers share: who answers, which request, with what payload."""

    site: Name
    request: Digest
    payload: Digest = EMPTY


class Here(Answer):
    """A site names itself.

    Attributes:
        approved: whether a person there has approved the study.
        backbone: whether it has the study's backbone.
        private: false where its noise comes from a seed, for data that it calls public.
        isolation: whether its vault stands apart in full, for what is said of the model.
    """

    kind: Literal["here"] = "here"
    approved: bool = True
    backbone: bool = True
    private: bool = True
    isolation: Literal["full", "reduced"] = "full"


class Wanted(Answer):
    """What a site still lacks of a backbone: the payload, JSON of offsets by file name."""

    kind: Literal["wanted"] = "wanted"


class Release(Answer):
    """A site's noised answer; the payload holds the arrays."""

    kind: Literal["release"] = "release"


class Refused(Answer):
    """A site's no: a fixed code, and nothing that depends on its records."""

    kind: Literal["refusal"] = "refusal"
    code: Refusal


Reply: TypeAlias = Here | Wanted | Release | Refused
"""What a site may answer."""

_REPLY: TypeAdapter[Reply] = TypeAdapter(Annotated[Reply, Field(discriminator="kind")])


def decode_answer(data: bytes) -> Reply:
    """Parse what a site sent back; raises `MessageError` where it is none of these."""
    return _parsed(_REPLY, data)


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
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict(
        {
            "header": ConfigRecord({"bytes": envelope.header, "signature": envelope.signature}),
            "payload": _payload(envelope.payload),
        }
    )


# One head goes to all sites; nobody changes the record.
@lru_cache(maxsize=1)
def _payload(payload: bytes) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({"bytes": Array("uint8", (len(payload),), "veilgraft.bytes", payload)})


def from_record(record: "RecordDict") -> Envelope:
    """Return the message that a Flower record carries.

    Raises:
        MessageError: the record is not one of ours.
    """
    try:
        header, signature = record["header"]["bytes"], record["header"]["signature"]
        payload = record["payload"]["bytes"].data
    except (KeyError, AttributeError, TypeError):
        raise MessageError("expected a record with a header and a payload") from None
    if not all(isinstance(part, bytes) for part in (header, payload, signature)):
        raise MessageError("expected a header, a payload and a signature of bytes")
    return Envelope(header, payload, signature)
