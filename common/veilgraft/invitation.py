"""What a coordinator hands to one site, outside the network: whom to trust, where, for what.

It holds no lasting secret: the token is good once, until it expires, and only for keys that the
site makes itself. Whoever else reads the file learns the study and where the coordinator is.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, PositiveInt, StringConstraints

from veilgraft.config import Config, canonical
from veilgraft.durable import write_atomically
from veilgraft.errors import InputError
from veilgraft.identity import PublicKey, SignatureError
from veilgraft.study import Name, Study

MAX_BYTES = 1 << 20

Host = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")
]
Port = Annotated[int, Field(gt=0, lt=65_536)]


class Coordinator(Config):
    """What a site pins of its coordinator, as `coordinator.json` and an invitation say it.

    Attributes:
        host, port: of the coordinator's edge.
        ca: the certificate that signed the edge's, as PEM.
        key: the coordinator's public key, which signs all that it asks.
    """

    host: Host
    port: Port
    ca: Annotated[
        str, StringConstraints(pattern=r"^-----BEGIN CERTIFICATE-----\n", max_length=16384)
    ]
    key: str

    @property
    def identity(self) -> PublicKey:
        """The pinned key."""
        return PublicKey.parse(self.key)

    @property
    def address(self) -> str:
        """Host and port, as Flower takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Invitation(Config):
    """One site's way in.

    Attributes:
        token: good once, until `expires`, in seconds since 1970.
        study: the contract in its canonical form.
    """

    format: Literal[1] = 1
    site: Name
    coordinator: Coordinator
    token: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
    expires: PositiveInt
    study: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an invitation; raises `InputError` where file, key or study can't be used."""
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: expected an invitation, got a file above {MAX_BYTES} bytes")
        found = super().read(path)
        _ = found.coordinator.identity, found.contract
        return found

    @property
    def contract(self) -> Study:
        """The study."""
        return Study.from_canonical(self.study)

    def write(self, path: Path) -> None:
        """Write the file, mode 0600, whole or not at all."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        previous = os.umask(0o077)
        try:
            write_atomically(path, (_HEADER.format(site=self.site) + text).encode())
        finally:
            os.umask(previous)


class Rotation(Config):
    """A coordinator's statement that another key stands in the place of its own.

    Attributes:
        signature: by `old`, in hex, over `text` in the domain `rotation`.
    """

    old: str
    new: str
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]

    @property
    def text(self) -> bytes:
        """What is signed."""
        return canonical({"new": self.new, "old": self.old}).encode()

    def verified(self, pinned: PublicKey) -> PublicKey:
        """Return the new key; raises `InputError` unless the pinned one has signed it."""
        new = PublicKey.parse(self.new)
        if self.old != pinned.text:
            raise InputError(f"old: expected the pinned key, {pinned.text}, got {self.old}")
        try:
            pinned.verify("rotation", self.text, bytes.fromhex(self.signature))
        except SignatureError as error:
            raise InputError(f"signature: {error}") from None
        return new


_HEADER = """\
# An invitation for {site}, and for nobody else. It is to be given to that site outside of the
# network that it opens; the token works once. At the site:
#   veilgraft site join THIS_FILE --data RECORDS --dir FOLDER
"""
