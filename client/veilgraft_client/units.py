"""Rows become units: which rows are one person's, which are used, and where a unit belongs.

Guarantee. What `gather` gives for one unit is a function of that unit's own rows, their number
included, and of public constants and the site's key. So are `is_held_out` and `shard`. Adding or
removing a unit, and with it all its rows, therefore adds or removes one row of the tensor and
leaves the others bit for bit as they were: the adjacency for which `veilgraft.privacy.mechanism`
clips. Adding, removing or changing some of a unit's rows replaces one row of the tensor.

All choices are by HMAC-SHA-256 (RFC 2104) under the site's own key, each with a domain of its own.
So nobody without the key can tell who is held out, or write rows that are sure to be chosen; and
the same data give the same choice for life.
"""

import contextlib
import hmac
import os
import re
import secrets
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from veilgraft.durable import sync_folder
from veilgraft.errors import InputError
from veilgraft.model.features import Array, Features
from veilgraft_client.dataset import Records

KEY_BYTES = 32
"""Of the site's key."""

_DOMAIN = b"veilgraft/units/1/"


def digests(records: Records) -> list[bytes]:
    """Return the SHA-256 of each row's input, as it is encoded; of nothing else in the row."""
    return [sha256(value.as_buffer()).digest() for value in records.table["input"]]


def keys(records: Records) -> list[bytes]:
    """Return what names each row's unit.

    The id in the column `unit`, in UTF-8, after `unit:`; or, where there is no such column and
    each record is a unit, the SHA-256 of its input after `record:`. Equal inputs have one key
    then, so a record and its copy are both held out or both not.
    """
    if "unit" not in records.table.column_names:
        return [b"record:" + digest for digest in digests(records)]
    return [b"unit:" + name.encode() for name in records.table["unit"].to_pylist()]


def is_held_out(key: bytes, unit: bytes, share: float) -> bool:
    """Tell whether a unit is kept apart for evaluation, for life.

    Its HMAC, read as a fraction of 1, is below `share`: no other unit matters, a share of 0 holds
    nobody out and of 1 everybody, and who is held out at one share is so at each larger one.

    Raises:
        ValueError: the key is not of 32 bytes, or the share not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share}")
    # Exact: scaling a float by a power of two rounds nothing, and Python compares without rounding.
    return _number(key, b"held-out", unit) < share * 2.0**256


def shard(key: bytes, unit: bytes, count: int) -> int:
    """Return the simulated site, from 0 to `count` - 1, to which all rows of a unit belong.

    Uniform to within 2^-200, and independent of who is held out.

    Raises:
        ValueError: the key is not of 32 bytes, or `count` not positive.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    return _number(key, b"shard", unit) % count


def gather(
    values: Array,
    targets: npt.NDArray[Any],
    unit_keys: Sequence[bytes],
    row_digests: Sequence[bytes],
    max_instances: int,
    key: bytes,
) -> tuple[Features, list[bytes]]:
    """Return one row of the tensor for each distinct unit key, and the keys in that order.

    Of a unit's rows, the `max_instances` with the smallest HMAC of (unit, input, number among the
    unit's equal inputs) are its instances, in the order of these. The tensor is `max_instances`
    wide, however many rows anybody has: an observed maximum would show through shapes and costs.
    Padding has values and targets of zero and a mask that is false, and takes as much memory.

    Units stand in the order of their keys' bytes. That order depends on nothing but who is there,
    so one unit more or less shifts the others and never reorders them; it needs no secret, for the
    order of a sum's terms leaves no site.

    Labels choose nothing, but for one case. Equal inputs of one unit that differ in their label
    must stand in some order that is not the file's; it is that of their targets' bytes (and then
    of their values', which rounding may tell apart). Which of these labels is used then depends on
    these labels. It changes that unit's row alone, which the guarantee leaves free in any case.

    Args:
        values: `(rows, dim)`, float32; a memory map is read once.
        targets: `(rows,)`, int64, or `(rows, labels)`, float32.
        unit_keys: of each row, as `keys` gives them.
        row_digests: of each row, as `digests` gives them.
        max_instances: of the study, a public constant.
        key: of the site, 32 bytes.

    Raises:
        ValueError: numbers of rows differ, or an argument is out of its range.
    """
    _check(len(values), len(targets), len(unit_keys), len(row_digests), max_instances)
    tagged = _tagged(values, targets, unit_keys, row_digests, key)
    order = sorted(tagged)
    # Tags are distinct, so that a row's number never decides.
    chosen = [[row for _, row in sorted(tagged[unit])[:max_instances]] for unit in order]
    counts = np.array([len(rows) for rows in chosen], np.int64)
    mask = np.arange(max_instances) < counts[:, None]
    rows = np.array([row for rows in chosen for row in rows], np.int64)
    padded = (torch.from_numpy(_padded(each, rows, mask)) for each in (values, targets))
    return Features(next(padded), torch.from_numpy(mask), next(padded)), order


def near_equal(ids: Iterable[str]) -> list[tuple[str, ...]]:
    """Return groups of distinct ids that may be one person's, sorted; for the site's console only.

    Ids fall together that are equal in Unicode's form NFKC, without regard to case, white space,
    invisible characters, punctuation, and zeros before a number.

    >>> near_equal(["P-7", "p007", "P8"])
    [('P-7', 'p007')]
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in ids:
        groups[_folded(name)].add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def site_key(folder: Path, seed: int | None = None) -> bytes:
    """Return the site's 32 secret bytes, made on the first call and the same ever after.

    With a seed nothing is private: the bytes follow from it, and no file is read or made.

    The file `site.key` has mode 0600 in a folder of mode 0700. It appears whole or not at all;
    processes that make it at once end with one key; and it is on the disk before it is returned.
    A file that is there is never replaced: another key would hold out other units, and those who
    had been evaluated on would be trained on.

    Raises:
        InputError: the file can't be read or is not a whole key.
        OSError: the folder can't be written.
    """
    if seed is not None:
        return sha256(f"veilgraft/site-key/seeded/1\n{seed}".encode()).digest()
    path = folder / "site.key"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not path.exists():
        _make_key(path)
    key = _read_key(path)
    # Also where another process made it: it may not have come to this yet.
    sync_folder(folder)
    return key


def _make_key(path: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=".site.key.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(handle)
        # A link, unlike a rename, leaves what another process was quicker to make.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    # Zeros are what some file systems leave of a file whose writing was cut short.
    if len(key) != KEY_BYTES or not any(key):
        raise InputError(
            f"{path}: expected a key of {KEY_BYTES} bytes, got one that is damaged or cut short; "
            "restore it from a copy, for a new one would hold out other units"
        )
    return key


def _tag(key: bytes, domain: bytes, *parts: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: expected {KEY_BYTES} bytes, got {len(key)}")
    # Each part after its length: two lists of parts never make one message.
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in (_DOMAIN + domain, *parts))
    return hmac.digest(key, framed, "sha256")


def _number(key: bytes, domain: bytes, unit: bytes) -> int:
    return int.from_bytes(_tag(key, domain, unit), "big")


def _check(rows: int, targets: int, units: int, inputs: int, max_instances: int) -> None:
    if {rows, targets, units, inputs} != {rows}:
        raise ValueError(
            f"expected as many values, targets, unit keys and digests, got {rows}, {targets}, "
            f"{units}, {inputs}"
        )
    if max_instances < 1:
        raise ValueError(f"max_instances: expected at least 1, got {max_instances}")


def _tagged(
    values: Array,
    targets: npt.NDArray[Any],
    unit_keys: Sequence[bytes],
    row_digests: Sequence[bytes],
    key: bytes,
) -> dict[bytes, list[tuple[bytes, int]]]:
    """Return each unit's rows, each with the HMAC by which it is chosen."""
    equal: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for row, pair in enumerate(zip(unit_keys, row_digests, strict=True)):
        equal[pair].append(row)
    tagged: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)
    for (unit, digest), rows in equal.items():
        if len(rows) > 1:
            rows.sort(key=lambda row: (targets[row].tobytes(), values[row].tobytes()))
        for number, row in enumerate(rows):
            tag = _tag(key, b"instance", unit, digest, number.to_bytes(8, "big"))
            tagged[unit].append((tag, row))
    return tagged


def _padded(
    cells: npt.NDArray[Any], rows: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """Return the rows in the places that the mask keeps, `(units, instances, ...)`, else zeros."""
    places = np.zeros((*mask.shape, *cells.shape[1:]), cells.dtype)
    places[mask] = cells[rows]
    return places


def _folded(name: str) -> str:
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    kept = "".join(each for each in plain if not _is_dressing(unicodedata.category(each)))
    return re.sub(r"(?<!\d)0+(?=\d)", "", kept)


def _is_dressing(category: str) -> bool:
    # Separators and punctuation; control and invisible characters; signs such as + and −.
    return category[0] in "PZ" or category in ("Cc", "Cf", "Sm")
