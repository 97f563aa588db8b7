"""The coordinator's state on disk: one file, replaced atomically after every round."""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from veilgraft.durable import sync_folder
from veilgraft.errors import InputError
from veilgraft_server.rounds import State

_ARRAYS = ("head", "velocity", "mean")


@dataclass(frozen=True)
class Drop:
    """A site whose answer did not count in a round, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Round:
    """What is known of a round once it is over.

    Attributes:
        accuracy, loss: of the model after this round, on public records; None without any.
        epsilon: the study's composed ε up to here; None where there is no bound.
        sites: releases averaged; `dropped` answers that did not count.
    """

    round: int
    accuracy: float | None
    loss: float | None
    epsilon: float | None
    sites: int
    dropped: int
    seconds: float
    drops: tuple[Drop, ...] = ()


def save(path: Path, study: str, state: State, history: Iterable[Round]) -> None:
    """Replace the checkpoint at `path`; after a crash either the old or the new one is whole."""
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(array)
        for part in _ARRAYS
        for name, array in getattr(state, part).items()
    }
    scalars = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in _ARRAYS}
    rounds = [asdict(round_) for round_ in history]
    metadata = {"study": study, "state": json.dumps(scalars), "rounds": json.dumps(rounds)}
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def load(path: Path, study: str) -> tuple[State, tuple[Round, ...]]:
    """Return state and history from the checkpoint of a study.

    Raises:
        InputError: no readable checkpoint, or another study's.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: can't read the checkpoint: {error}") from None
    if metadata["study"] != study:
        raise InputError(f"{path}: expected study {study}, got {metadata['study']}")
    parts: dict[str, Any] = {
        part: {
            key.removeprefix(f"{part}/"): array
            for key, array in tensors.items()
            if key.startswith(f"{part}/")
        }
        for part in _ARRAYS
    }
    history = tuple(
        Round(**{**entry, "drops": tuple(Drop(**drop) for drop in entry["drops"])})
        for entry in json.loads(metadata["rounds"])
    )
    return State(**json.loads(metadata["state"]), **parts), history


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
