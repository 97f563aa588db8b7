"""A backbone's folder, pinned: the SHA-256 of every file, and of them all together."""

import hashlib
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from veilgraft.config import sha256_of
from veilgraft.errors import InputError

MANIFEST = "manifest.json"
STATISTICS = "feature_statistics.safetensors"

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
FILES = (
    "config.json",
    *_WEIGHTS,
    "tokenizer.json",
    "preprocessor_config.json",
    STATISTICS,
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of the files that a backbone is made of, beside the manifest."""

_PLAIN = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def allowed(name: str) -> bool:
    """Return whether a file of this name may travel: a plain name that `FILES` lists.

    >>> [allowed(name) for name in ("config.json", "LICENSE/../x", "modeling.py")]
    [True, False, False]
    """
    # A pattern's star would also stand for separators and control characters.
    return _PLAIN.fullmatch(name) is not None and any(fnmatchcase(name, p) for p in FILES)


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds the model's tensors."""
    return any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)


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
    return digest_of(manifest(folder))


def write_manifest(folder: Path) -> str:
    """Write `manifest.json` from the files as they are, and return the digest."""
    files = manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    return digest_of(files)


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
    if expected not in (None, digest_of(files)):
        raise InputError(f"backbone.digest: expected {expected}, {folder} has {digest_of(files)}")
    return files


def contents(folder: Path, expected: str | None = None) -> dict[str, dict[str, Any]]:
    """Return each file's `sha256` (hex) and `bytes` by name; raises as `verify` does."""
    files = verify(folder, expected)
    return {n: {"sha256": h, "bytes": (folder / n).stat().st_size} for n, h in files.items()}


def read_part(path: Path, offset: int, length: int) -> bytes:
    """Return exactly these bytes; raises `InputError` where the file has become shorter."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise InputError(f"{path}: became shorter while it was read")
    return data


def digest_of(files: Mapping[str, str]) -> str:
    """Return the digest that a folder of these files has: hex SHA-256 by name."""
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
