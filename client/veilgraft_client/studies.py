"""The studies that a site knows: those a coordinator proposed, and those a person approved.

Each is one file, named by its digest, that holds the study's canonical form. What is approved is
told by the folder that the file lies in; what was granted, by the ledger.
"""

import json
import threading
from pathlib import Path

from veilgraft.config import canonical
from veilgraft.durable import sync_folder, write_atomically
from veilgraft.errors import InputError, Refusal, RefusedError
from veilgraft.study import Study

MAX_BYTES = 256 << 10
MAX_PROPOSALS = 16
"""Kept at once; a coordinator that sends more is refused until a person has looked."""


class Studies:
    """See the module's docstring.

    Args:
        folder: the site's state folder; `studies` and `proposals` are made in it.
    """

    def __init__(self, folder: Path) -> None:
        self._approved = folder / "studies"
        self._proposed = folder / "proposals"
        self._lock = threading.Lock()
        for each in (folder, self._approved, self._proposed):
            each.mkdir(mode=0o700, exist_ok=True)

    def propose(self, payload: bytes) -> Study:
        """Keep a study until a person approves it; a known one is not kept twice.

        Raises:
            InputError: it is no study in canonical form.
            RefusedError: too many wait already.
        """
        study = _parsed(payload, "study")
        # Kept as it was understood: what a person reads is no other text of the same digest.
        text = canonical(study.canonical).encode()
        _parsed(text, "study")
        with self._lock:
            waiting = self.proposed()
            if study.digest in waiting or study.digest in self.approved():
                return study
            if len(waiting) >= MAX_PROPOSALS:
                raise RefusedError(
                    Refusal.UNAVAILABLE,
                    f"{MAX_PROPOSALS} proposed studies wait already: veilgraft site approve, or "
                    "veilgraft site reject",
                )
            write_atomically(_path(self._proposed, study.digest), text)
        return study

    def approve(self, digest: str) -> Study:
        """Move a proposed study among the approved; raises `InputError` where there is none."""
        approved = self.approved()
        if digest in approved:
            return approved[digest]
        study = self.find(digest)
        _path(self._proposed, digest).rename(_path(self._approved, digest))
        sync_folder(self._approved)
        sync_folder(self._proposed)
        return study

    def withdraw(self, digest: str) -> None:
        """Serve an approved study no longer; it may be approved again."""
        if digest not in self.approved():
            raise InputError(f"{digest}: no approved study has this digest")
        _path(self._approved, digest).rename(_path(self._proposed, digest))
        sync_folder(self._approved)

    def reject(self, digest: str) -> None:
        """Let go of a proposed study; raises `InputError` where none has this digest."""
        if digest not in self.proposed():
            raise InputError(f"{digest}: no proposed study has this digest")
        _path(self._proposed, digest).unlink()
        sync_folder(self._proposed)

    def find(self, digest: str) -> Study:
        """Return the study with this digest, approved or not; raises `InputError`."""
        known = self.proposed() | self.approved()
        if digest not in known:
            shown = ", ".join(sorted(known)) or "none"
            raise InputError(f"{digest}: no study has this digest; there are: {shown}")
        return known[digest]

    def file(self, digest: str) -> Path:
        """Return where a known study lies."""
        folder = self._approved if digest in self.approved() else self._proposed
        return _path(folder, digest)

    @staticmethod
    def read(path: Path) -> Study:
        """Read a study file: of this store, in canonical form, or one that a person wrote."""
        if path.suffix == ".json":
            return _parsed(path.read_bytes(), str(path))
        return Study.read(path)

    def approved(self) -> dict[str, Study]:
        """Return the approved studies by digest."""
        return _all(self._approved)

    def proposed(self) -> dict[str, Study]:
        """Return the studies that wait for a person, by digest."""
        return _all(self._proposed)


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest.removeprefix('sha256:')}.json"


def _all(folder: Path) -> dict[str, Study]:
    found = {}
    for path in sorted(folder.glob("[0-9a-f]*.json")):
        study = _parsed(path.read_bytes(), str(path))
        if path.name != _path(folder, study.digest).name:
            raise InputError(f"{path}: holds the study {study.digest}; it was changed")
        found[study.digest] = study
    return found


def _parsed(payload: bytes, name: str) -> Study:
    if len(payload) > MAX_BYTES:
        raise InputError(f"{name}: expected at most {MAX_BYTES} bytes, got {len(payload)}")
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError):
        raise InputError(f"{name}: expected a study as JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected a mapping of keys to values")
    return Study.from_canonical(values, name=name)
