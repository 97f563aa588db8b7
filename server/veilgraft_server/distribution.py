"""What a coordinator sends of its backbone: a manifest, then the parts that a site lacks."""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from veilgraft.errors import InputError, MessageError
from veilgraft.model import bundle

PART = 8 << 20
"""Bytes of a part; a site takes no more at once."""


def manifest(folder: Path, expected: str | None = None) -> bytes:
    """Return as JSON each file's SHA-256 and size, `{"files": {name: {"sha256", "bytes"}}}`.

    Raises:
        InputError: the folder has not the digest `expected`, differs from its `manifest.json`, or
            holds a file that no site would take.
    """
    files = _contents(folder, expected)
    for name in files:
        if not bundle.allowed(name):
            raise InputError(f"{folder / name}: no file of this name belongs to a backbone")
    return json.dumps({"files": files}).encode()


def parts(
    folder: Path, missing: Mapping[str, int], size: int = PART, expected: str | None = None
) -> Iterator[tuple[str, int, bytes]]:
    """Yield name, offset and bytes of what a site lacks; one part is in memory at a time.

    Small files come first, then the beginning of each file of weights, then the rest: a site
    takes no more of weights before all their headers fit the configuration. Where weights lie in
    several files, `size` has to be that of a header or more.

    Args:
        missing: offsets by name, as a site's answer gives them.
        size: of a part, in bytes.
        expected: the digest that the study pins.

    Raises:
        InputError: the folder has another digest, or a file shrank meanwhile.
        MessageError: the site lacks what the folder has not.
    """
    sizes = {name: file["bytes"] for name, file in _contents(folder, expected).items()}
    for name, offset in missing.items():
        if name not in sizes or not 0 <= offset <= sizes[name]:
            raise MessageError("missing: expected names and offsets of files that were offered")

    def order(part: tuple[str, int]) -> tuple[int, int, str, int]:
        name, offset = part
        turn = 0 if not bundle.is_weights(name) else 1 if offset == missing[name] else 2
        return turn, sizes[name], name, offset

    # An empty file is one empty part.
    ends = {name: max(sizes[name], 1) for name in missing}
    starts = [(name, at) for name in missing for at in range(missing[name], ends[name], size)]
    for name, offset in sorted(starts, key=order):
        length = min(size, sizes[name] - offset)
        yield name, offset, bundle.read_part(folder / name, offset, length)


def _contents(folder: Path, expected: str | None) -> dict[str, dict[str, Any]]:
    """Return what the folder holds; it is hashed unless it was, and nothing changed since."""
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    state = tuple((p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found)
    return _hashed(folder, expected, state)


# Parts go out in many calls, to many sites; hashing at each would read the whole each time.
@functools.lru_cache(maxsize=4)
def _hashed(
    folder: Path, expected: str | None, state: tuple[object, ...]
) -> dict[str, dict[str, Any]]:
    return bundle.contents(folder, expected)
