"""Who speaks: Ed25519 keys of coordinators and sites (RFC 8032).

Every signature is over `veilgraft/DOMAIN/1`, a line's end and the exact bytes, so that what was
signed for one purpose is worth nothing for another.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from veilgraft.durable import write_new
from veilgraft.errors import InputError, MessageError

Domain = Literal["request", "answer", "enrolment", "rotation"]
"""What a signature is for."""

PREFIX = "ed25519:"
GROUPS = 8
PASSPHRASE_FILE = "VEILGRAFT_PASSPHRASE_FILE"  # noqa: S105 - the name of a file


class SignatureError(MessageError):
    """A signature is missing, or is not by the key that it should be by."""


@dataclass(frozen=True)
class PublicKey:
    """One party's public key.

    Attributes:
        raw: 32 bytes.
    """

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the key that `text` names; raises `InputError` where it is none."""
        given = text.removeprefix(PREFIX)
        try:
            raw = bytes.fromhex(given)
        except ValueError:
            raw = b""
        if not text.startswith(PREFIX) or len(raw) != 32 or raw.hex() != given:
            raise InputError(f"key: expected {PREFIX} and 64 lower-case hex digits")
        return cls(raw)

    @property
    def text(self) -> str:
        """`ed25519:` and the key in hex."""
        return PREFIX + self.raw.hex()

    @property
    def id(self) -> str:
        """`sha256:` and the hex SHA-256 of the key."""
        return "sha256:" + hashlib.sha256(self.raw).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Forty digits in groups, 132 bits, to compare by phone."""
        hashed = hashlib.sha256(b"veilgraft/fingerprint/1\n" + self.raw).digest()
        parts = (hashed[4 * index : 4 * index + 4] for index in range(GROUPS))
        return " ".join(f"{int.from_bytes(part, 'big') % 100_000:05d}" for part in parts)

    def verify(self, domain: Domain, data: bytes, signature: bytes) -> None:
        """Raise `SignatureError` unless `signature` is this key's, for this domain."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _signed(domain, data))
        except (InvalidSignature, ValueError):
            raise SignatureError(f"the signature is not by {self.id}") from None


class SigningKey:
    """One party's private key; neither `repr` nor an error shows it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = PublicKey(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def generate(cls) -> Self:
        """Return a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> Self:
        """Read a key that `save` wrote.

        Raises:
            InputError: it is missing, can't be read, or isn't this user's alone.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror}") from None
        with os.fdopen(handle, "rb") as file:
            _check_private(path, os.fstat(handle))
            pem = file.read(1 << 16)
        try:
            private = load_pem_private_key(pem, passphrase)
        except TypeError:
            wanted = "no passphrase" if passphrase else "a passphrase"
            raise InputError(f"{path}: expected {wanted} for this key") from None
        except (ValueError, UnsupportedAlgorithm):
            raise InputError(
                f"{path}: can't be read as a private key, or the passphrase is another"
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise InputError(f"{path}: expected an Ed25519 key")
        return cls(private)

    def save(self, path: Path, passphrase: bytes | None = None) -> None:
        """Write the key, mode 0600; raises `InputError` where the file exists."""
        how = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        pem = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
        write_new(path, pem)

    def sign(self, domain: Domain, data: bytes) -> bytes:
        """Return the signature, 64 bytes; equal data give equal signatures."""
        return self._private.sign(_signed(domain, data))


def passphrase(file: Path | None = None) -> bytes | None:
    """Return the first line of `file`, or of what PASSPHRASE_FILE in the environment names.

    Raises:
        InputError: it can't be read, or the line is empty.
    """
    named = os.environ.get(PASSPHRASE_FILE)
    path = file or (Path(named) if named else None)
    if path is None:
        return None
    try:
        found = path.read_bytes().split(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{path}: expected a passphrase in its first line")
    return found


def _signed(domain: Domain, data: bytes) -> bytes:
    return b"veilgraft/" + domain.encode() + b"/1\n" + data


def _check_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise InputError(
            f"{path}: expected a file owned by user {os.geteuid()}, got user {found.st_uid}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise InputError(f"{path}: expected mode 600, got {stat.S_IMODE(found.st_mode):o}")
