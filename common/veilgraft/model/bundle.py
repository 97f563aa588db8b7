"""A backbone's folder, pinned: the SHA-256 of every file, and of them all together."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veilgraft.config import sha256_of
from veilgraft.errors import InputError

MANIFEST = "manifest.json"


def manifest(folder: Path) -> dict[str, str]:
    """Return each file's hex SHA-256 by its relative name, sorted; `manifest.json` is left out.

    Raises:
        InputError: there are no files, or there is a link, a device or a socket.
    """
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: expected a plain file or folder; links are refused")
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    if not found:
        raise InputError(f"{folder}: expected a folder with a backbone's files")
    return dict(sorted(found.items()))


def digest(folder: Path) -> str:
    """Return `sha256:` and the hex SHA-256 of the manifest's canonical JSON."""
    return _digest(manifest(folder))


def write_manifest(folder: Path) -> str:
    """Write `manifest.json` from the files as they are, and return the digest."""
    files = manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    return _digest(files)


def verify(folder: Path, expected: str | None) -> dict[str, str]:
    """Hash every file and return the manifest that this gives.

    Raises:
        InputError: a file differs from what `manifest.json`, if there is one, says; or the
            digest is not `expected`, if that is given.
    """
    files = manifest(folder)
    if (folder / MANIFEST).exists():
        stated = read_json(folder / MANIFEST)
        names = sorted(stated.keys() | files.keys())
        wrong = [name for name in names if stated.get(name) != files.get(name)]
        if wrong:
            raise InputError(*(_difference(folder, name, stated, files) for name in wrong))
    if expected not in (None, _digest(files)):
        raise InputError(f"backbone.digest: expected {expected}, {folder} has {_digest(files)}")
    return files


def _digest(files: Mapping[str, str]) -> str:
    return "sha256:" + sha256_of(files)


def _difference(
    folder: Path, name: str, stated: Mapping[str, Any], files: Mapping[str, str]
) -> str:
    if name not in files:
        return f"{folder / name}: missing, though {MANIFEST} lists it"
    if name not in stated:
        return f"{folder / name}: extra; {MANIFEST} does not list it"
    return f"{folder / name}: expected SHA-256 {stated[name]}, got {files[name]}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a mapping of keys to values")
    return settings
