"""A run folder: which run it holds, whose it is now, and what goes when it is used again.

`run.json` says what is run. It is written before all else and removed last, so that a folder
without it holds no part of a run.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veilgraft.durable import write_atomically
from veilgraft.errors import InputError

DESCRIPTION = "run.json"
_FOLDERS = ("model", "comparisons", "points")
_FILES = (
    "ledger.db*",
    "checkpoint.safetensors",
    "report.json",
    "rounds.csv",
    "sweep.csv",
    "sweep.png",
)


def described(out: Path) -> Path | None:
    """Return the file that says which run a folder holds; None where it holds none.

    Raises:
        InputError: there is a file in the folder's place.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, got a file")
    path = out / DESCRIPTION
    return path if path.exists() else None


def describe(out: Path, facts: bytes) -> None:
    """Say which run a folder holds from now on."""
    write_atomically(out / DESCRIPTION, facts)


def clear(out: Path) -> None:
    """Remove what a run left; its features stay. A folder that holds no run is left as it is."""
    if described(out) is None:
        return
    for folder in _FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    for pattern in _FILES:
        for path in out.glob(pattern):
            path.unlink()
    (out / DESCRIPTION).unlink()


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a run folder; raise `InputError` where another process does."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is running it") from None
        yield
    finally:
        os.close(folder)
        if made and not any(out.iterdir()):
            out.rmdir()
