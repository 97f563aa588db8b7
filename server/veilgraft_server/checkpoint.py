"""The coordinator's state on disk: one file, replaced atomically after every round."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from veilgraft.durable import write_atomically
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
        accuracy, loss: of the model after this round; None where it was not evaluated.
        low, high: interval of the accuracy at 95%, where it was measured with noise.
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
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        labels: each site's noised number of units of each label, where the study asks for it.
    """

    state: State
    history: tuple[Round, ...] = ()
    labels: Mapping[str, list[float]] | None = None


def save(path: Path, study: str, progress: Progress) -> None:
    """Replace the checkpoint at `path`; after a crash either the old or the new one is whole."""
    state = progress.state
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(array)
        for part in _ARRAYS
        for name, array in getattr(state, part).items()
    }
    scalars = {f.name: getattr(state, f.name) for f in fields(state) if f.name not in _ARRAYS}
    rounds = [asdict(round_) for round_ in progress.history]
    metadata = {
        "study": study,
        "state": json.dumps(scalars),
        "rounds": json.dumps(rounds),
        "labels": json.dumps(progress.labels),
    }
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def load(path: Path, study: str) -> Progress:
    """Return what the checkpoint of a study holds.

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
    state = State(**json.loads(metadata["state"]), **parts)
    return Progress(state, history, json.loads(metadata["labels"]))
