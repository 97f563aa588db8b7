"""One backbone under way to a site, in parts, from a coordinator that nobody trusts.

Its folder holds `offer.json` as offered, `files/` with what came, and `strikes`, a byte for each
file that came wrong. A file's size on disk is how much of it is here, so that after a crash
nothing need be remembered; hashes are always those of the bytes on disk.

Checks come before bytes. A manifest must have the digest that the study pins, allowed names, and
sizes below the cap. Then small files come, and of the weights no more than their headers, until
`architecture.check` has found that those fit the configuration: it sees an *outline*, the true
header followed by a hole of the stated size.
"""

import hashlib
import io
import os
import shutil
import stat
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, StringConstraints, ValidationError

from veilgraft.config import Config
from veilgraft.durable import sync_folder, write_atomically
from veilgraft.errors import InputError
from veilgraft.model import bundle

MAX_PART = 8 << 20
"""Bytes of one part."""

MAX_MANIFEST = 1 << 16
MAX_FILES = 64
MAX_HEADER = 1 << 20
"""Bytes of a safetensors header; those of the architectures allowed take a fifth of it."""

MAX_SMALL = 1 << 20
MAX_TOKENIZER = 64 << 20
"""Bytes of `tokenizer.json`; of any other file that is no weights, `MAX_SMALL`."""

MAX_STRIKES = 3
"""Files that may come wrong before a backbone is refused until it is purged."""

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class File(Config):
    """What is stated of a file; `sha256` in hex."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: NonNegativeInt


class Manifest(Config):
    """What a coordinator offers."""

    files: Annotated[dict[str, File], Field(min_length=1, max_length=MAX_FILES)]

    @classmethod
    def decode(cls, data: bytes, digest: str, max_bytes: int) -> Self:
        """Parse a manifest; raises `InputError` where it can't be what `digest` pins."""
        if len(data) > MAX_MANIFEST:
            raise InputError(f"manifest: expected at most {MAX_MANIFEST} bytes, got {len(data)}")
        try:
            offered = cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            raise InputError(f"manifest: {error.errors()[0]['msg']}") from None
        for name, file in offered.files.items():
            _check_stated(name, file.bytes, max_bytes)
        if offered.total > max_bytes:
            raise InputError(f"manifest: expected at most {max_bytes} bytes, got {offered.total}")
        came = bundle.digest_of({name: file.sha256 for name, file in offered.files.items()})
        if came != digest:
            raise InputError(f"manifest: expected the digest {digest}, got {came}")
        return offered

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def small(self) -> list[str]:
        """Names of what weights are checked against, and of what goes with them."""
        return [name for name in self.files if not bundle.is_weights(name)]

    @property
    def weights(self) -> list[str]:
        """Names of the files that hold the model's tensors."""
        return [name for name in self.files if bundle.is_weights(name)]


def _check_stated(name: str, size: int, max_bytes: int) -> None:
    if not bundle.allowed(name):
        raise InputError(f"manifest: {name!r}: no file of this name belongs to a backbone")
    least, most = 0, MAX_TOKENIZER if name == "tokenizer.json" else MAX_SMALL
    if bundle.is_weights(name):
        # The length of a header takes 8 bytes.
        least, most = 8, max_bytes
    if not least <= size <= most:
        raise InputError(f"manifest: {name}: expected {least} to {most} bytes, got {size}")


class Arrival:
    """See the module's docstring. One caller at a time.

    Attributes:
        manifest: as offered; None before that.

    Raises:
        InputError: a link stands where the folder should.
    """

    def __init__(self, folder: Path, digest: str, max_bytes: int) -> None:
        self.folder, self.digest = folder, digest
        self._files, self._max_bytes = folder / "files", max_bytes
        for path in (self.folder, self._files):
            if path.is_symlink():
                raise InputError(f"{path}: expected a plain folder; links are refused")
        self.manifest = self.stored()
        # Whole files whose hash, from disk, is the stated one.
        self._sound: set[str] = set()
        # Whether the weights' headers were found to fit the configuration.
        self._fits = False

    def stored(self) -> Manifest | None:
        """Return the manifest on disk; one that can't be read was never offered."""
        try:
            data = (self.folder / "offer.json").read_bytes()
            return Manifest.decode(data, self.digest, self._max_bytes)
        except (FileNotFoundError, InputError):
            return None

    def begin(self, offered: Manifest) -> None:
        """Remove what came under another manifest, and store this one."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if self._files.exists():
            shutil.rmtree(self._files)
        self._files.mkdir(mode=0o700)
        path = self.folder / "offer.json"
        write_atomically(path, offered.model_dump_json().encode())
        path.chmod(0o600)
        sync_folder(self.folder.parent)
        self.manifest, self._fits = offered, False
        self._sound.clear()

    def missing(self) -> dict[str, int]:
        """Return where to go on, by name: small files first, then headers, then the rest.

        Whole files are hashed; a wrong one is deleted, and missing.
        """
        offered = self._offered()
        found = {name: _size(self._files / name) or 0 for name in offered.files}
        for name in offered.files:
            if self._is_sound(name):
                del found[name]
            elif found[name] >= offered.files[name].bytes:
                found[name] = 0
        weights = offered.weights
        return dict(sorted(found.items(), key=lambda i: (i[0] in weights, i[1] > 0, i[0])))

    def take(self, name: str, offset: int, data: bytes) -> None:
        """Append, synced, what is new of this part.

        Raises:
            InputError: nothing such was offered, the part leaves a gap or goes beyond the stated
                size, or the weights' headers are not known to fit.
        """
        stated = self._offered().files.get(name)
        if stated is None:
            raise InputError(f"{name!r}: expected the name of a file that was offered")
        if offset < 0 or len(data) > MAX_PART or offset + len(data) > stated.bytes:
            raise InputError(
                f"{name}: expected at most {MAX_PART} bytes at a time and {stated.bytes} in all, "
                f"got {len(data)} from {offset} on"
            )
        size = _size(self._files / name)
        here = size or 0
        if offset > here:
            raise InputError(f"{name}: expected bytes from {here} on, got {offset}")
        new = memoryview(data)[here - offset :]
        if size is not None and not new:
            return
        self._expect_checks_before(name)
        _append(self._files / name, size, new)
        if bundle.is_weights(name) and not self._fits:
            self._examine()

    def finish(self, place: Path) -> None:
        """Check the whole once more, then rename it to `place`."""
        from veilgraft.model import architecture

        try:
            bundle.verify(self._files, self.digest)
            with architecture.as_input_error(self._files):
                architecture.check(self._files, "mean", self._max_bytes)
        except InputError:
            # The digest pins these very bytes: no other try can end better.
            self._strike(*self._offered().files, count=MAX_STRIKES)
            raise
        sync_folder(self._files)
        self._files.rename(place)
        sync_folder(place.parent)

    def refuse_if_struck_out(self) -> None:
        """Raise `InputError` where too much came wrong already."""
        if (_size(self.folder / "strikes") or 0) >= MAX_STRIKES:
            raise InputError(
                f"backbone.digest: {self.digest} came wrong {MAX_STRIKES} times; purge it to "
                "try again"
            )

    def _offered(self) -> Manifest:
        if self.manifest is None:
            raise InputError(f"backbone.digest: {self.digest} was not offered")
        return self.manifest

    def _strike(self, *names: str, count: int = 1) -> None:
        """Delete these files, and remember that they came wrong."""
        for name in names:
            (self._files / name).unlink(missing_ok=True)
            self._sound.discard(name)
            self._fits = self._fits and not bundle.is_weights(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK
        with os.fdopen(os.open(self.folder / "strikes", flags, 0o600), "wb") as file:
            file.write(b"x" * count)

    def _is_sound(self, name: str) -> bool:
        """Return whether the whole file is here; what is whole and wrong is deleted."""
        stated, size = self._offered().files[name], _size(self._files / name)
        if size is None or size < stated.bytes:
            return False
        if name in self._sound:
            return True
        if size > stated.bytes or _sha256(self._files / name) != stated.sha256:
            self._strike(name)
            self.refuse_if_struck_out()
            return False
        self._sound.add(name)
        return True

    def _expect_checks_before(self, name: str) -> None:
        """Raise where a part of weights comes before what they are checked against."""
        if not bundle.is_weights(name) or self._fits:
            return
        lacks = [other for other in self._offered().small if not self._is_sound(other)]
        if lacks:
            raise InputError(f"{name}: expected {', '.join(lacks)} before the weights")
        self._examine()
        if not self._fits and self._header(name) is not None:
            raise InputError(f"{name}: expected the headers of all weights before the rest")

    def _examine(self) -> None:
        """Check the headers that are here; once all are, against the configuration."""
        outline = self.folder / "outline"
        if outline.exists():
            shutil.rmtree(outline)
        outline.mkdir(mode=0o700)
        try:
            self._examine_in(outline)
        except InputError:
            self._strike(*self._offered().weights)
            raise
        finally:
            shutil.rmtree(outline)

    def _examine_in(self, outline: Path) -> None:
        from veilgraft.model import architecture

        offered = self._offered()
        headers = {name: self._header(name) for name in offered.weights}
        for name, header in headers.items():
            if header is not None:
                _append(outline / name, None, header)
                os.truncate(outline / name, offered.files[name].bytes)
                _check_safetensors(outline / name)
        if None in headers.values():
            return
        for name in offered.small:
            (outline / name).symlink_to(Path("..", "files", name))
            if name == bundle.STATISTICS:
                _check_safetensors(outline / name)
        with architecture.as_input_error(outline):
            architecture.check(outline, "mean", self._max_bytes)
        self._fits = True

    def _header(self, name: str) -> bytes | None:
        """Return the length and header of a file of weights, or None before they are whole."""
        path, most = self._files / name, min(MAX_HEADER, self._offered().files[name].bytes - 8)
        if (_size(path) or 0) < 8:
            return None
        with _opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > most:
                raise InputError(f"{name}: expected a header of at most {most} bytes, got {length}")
            file.seek(0)
            head = file.read(8 + length)
        return head if len(head) == 8 + length else None


def _size(path: Path) -> int | None:
    """Return a plain file's size, or None where there is nothing."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise InputError(f"{path}: expected a plain file; links are refused")
    return found.st_size


def _append(path: Path, size: int | None, data: bytes | memoryview) -> None:
    """Write synced bytes at the end, or a new file (None); where that fails, none of them stay."""
    flags = os.O_WRONLY | _NO_LINK | (os.O_CREAT | os.O_EXCL if size is None else 0)
    with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        try:
            file.seek(size or 0)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size or 0)
            raise
    if size is None:
        sync_folder(path.parent)


def _opened(path: Path) -> io.BufferedReader:
    return os.fdopen(os.open(path, os.O_RDONLY | _NO_LINK), "rb")


def _sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_safetensors(path: Path) -> None:
    """Raise where names, types, shapes and offsets don't agree with the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: can't be read as safetensors: {error}") from None
