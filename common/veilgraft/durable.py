"""Making a change of names on disk survive a loss of power."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Return once the folder's entries, a rename among them, have reached the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
