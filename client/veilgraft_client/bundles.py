"""The site's store of backbones: content-addressed, each of them whole or not there.

A backbone lies in a folder named by its digest; what is under way lies in `<hex>.partial/`
beside it, as `arrival` says. The whole is verified before it is renamed into place, and at each
load. Memory is bounded by one part and one header.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from veilgraft.errors import InputError, VeilgraftError
from veilgraft.model import bundle
from veilgraft_client.arrival import MAX_PART, Arrival, Manifest

MAX_UNDER_WAY = 2
"""Backbones that may be under way at once."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Bundles:
    """Backbones by digest; each public call is atomic among threads and processes.

    What comes from a coordinator and can't be is refused with `InputError`. A disk that is full
    or fails gives a `VeilgraftError`, and leaves what was there before the call.

    Args:
        folder: made on first use, mode 0700.
        max_bytes: of one backbone, on disk and as float32 tensors.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._arrivals: dict[str, Arrival] = {}

    def offer(self, digest: str, manifest: bytes) -> bytes:
        """Take note of a backbone's files; return as JSON what is wanted, `{"missing": …}`.

        The mapping gives the offset to go on from by file name, in the order in which files are
        taken; it is empty where the backbone is here and sound. A manifest that differs from
        the one offered before begins anew.
        """
        offered = Manifest.decode(manifest, digest, self.max_bytes)
        with self._alone():
            if self._is_stored(digest):
                return _wanted({})
            arrival = self._arrival(digest)
            arrival.refuse_if_struck_out()
            if arrival.manifest != offered:
                self._expect_room(arrival, offered.total)
                arrival.begin(offered)
            return self._advance(arrival)

    def part(self, digest: str, name: str, offset: int, data: bytes) -> bytes:
        """Write a part, synced, where its file ends; return what is wanted then.

        What is here already is not written again. A file that came whole and wrong is deleted
        and wanted again.

        Raises:
            InputError: nothing such was offered; the part leaves a gap, goes beyond the stated
                size or comes before files that must be checked first; or the headers don't fit
                the configuration.
        """
        with self._alone():
            if self.has(digest):
                self._forget(digest)
                return _wanted({})
            arrival = self._arrival(digest)
            arrival.refuse_if_struck_out()
            arrival.take(name, offset, data)
            return self._advance(arrival)

    def has(self, digest: str) -> bool:
        """Return whether the whole backbone came; `path` says whether it is sound."""
        place = self._place(digest)
        return place.is_dir() and not place.is_symlink()

    def path(self, digest: str) -> Path:
        """Return the backbone's folder, every file of it hashed just now.

        Raises:
            InputError: it is not here, not whole, or not what came; what is rotten is removed, so
                that it is sent again.
        """
        with self._alone():
            return self._sound(digest)

    def add(self, source: Path, digest: str) -> Path:
        """Copy a folder that a person gave, through the very checks of one sent in parts.

        Raises:
            InputError: the folder has another digest, can't be read, or is refused as `offer`
                and `part` do.
        """
        try:
            files = bundle.contents(source, digest)
            answer = self.offer(digest, json.dumps({"files": files}).encode())
            while missing := json.loads(answer)["missing"]:
                name, offset = next(iter(missing.items()))
                length = min(MAX_PART, files[name]["bytes"] - offset)
                data = bundle.read_part(source / name, offset, length)
                answer = self.part(digest, name, offset, data)
        except OSError as error:
            raise InputError(f"{source}: can't be read: {error.strerror}") from None
        return self.path(digest)

    def purge(self, keep: Collection[str] = ()) -> int:
        """Remove all backbones but these, whole or under way; return how many went."""
        kept = {self._place(digest).name for digest in keep}
        with self._alone():
            gone = set()
            for path in list(self.folder.iterdir()):
                name = path.name.partition(".")[0]
                if name not in kept and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                    gone.add(name)
            self._arrivals.clear()
        return len(gone)

    def _place(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise InputError(f"backbone.digest: expected sha256: and 64 hex digits, got {digest!r}")
        return self.folder / match[1]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the store's lock; an error of the disk becomes one of ours."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            handle = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise VeilgraftError(f"{self.folder}: the disk is full") from error
            raise VeilgraftError(f"{self.folder}: can't be used: {error}") from error

    def _is_stored(self, digest: str) -> bool:
        try:
            self._sound(digest)
        except InputError:
            return False
        return True

    def _sound(self, digest: str) -> Path:
        """Return the folder; what is not sound is removed, to come again, with `InputError`."""
        place = self._place(digest)
        if place.is_symlink():
            place.unlink()
        if not self.has(digest):
            raise InputError(f"backbone.digest: {digest} is not in {self.folder}")
        self._forget(digest)
        try:
            bundle.verify(place, digest)
        except InputError:
            shutil.rmtree(place)
            raise
        return place

    def _arrival(self, digest: str) -> Arrival:
        arrival = self._arrivals.get(digest)
        # Another process may have begun anew, or purged.
        if arrival is None or arrival.manifest != arrival.stored():
            folder = self._place(digest).with_suffix(".partial")
            arrival = Arrival(folder, digest, self.max_bytes)
            self._arrivals[digest] = arrival
        return arrival

    def _forget(self, digest: str) -> None:
        """Remove what is under way of a backbone that is here."""
        folder = self._place(digest).with_suffix(".partial")
        if folder.exists():
            shutil.rmtree(folder)
        self._arrivals.pop(digest, None)

    def _expect_room(self, arrival: Arrival, needed: int) -> None:
        others = [p for p in self.folder.glob("*.partial") if p != arrival.folder]
        if len(others) >= MAX_UNDER_WAY:
            raise InputError(f"{self.folder}: {len(others)} backbones are under way; purge first")
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise VeilgraftError(
                f"{self.folder}: the disk is full: {needed} bytes are needed, {free} are free"
            )

    def _advance(self, arrival: Arrival) -> bytes:
        missing = arrival.missing()
        if not missing:
            arrival.finish(self._place(arrival.digest))
            self._forget(arrival.digest)
        return _wanted(missing)


def _wanted(missing: dict[str, int]) -> bytes:
    return json.dumps({"missing": missing}).encode()
