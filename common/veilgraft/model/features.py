"""Features: the one shape that all training takes, and the store that computes them once.

A *unit* is what privacy protects, an *instance* one labelled thing within it. Values are
`(units, instances, dim)`; a plain record is a unit of one instance.
"""

import contextlib
import fcntl
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from veilgraft import study
from veilgraft.config import sha256_of
from veilgraft.durable import sync_folder
from veilgraft.model import exact
from veilgraft.model.backbone import FrozenBackbone, Records, Shape, identity, slot

Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """Units ready for training.

    Attributes:
        values: `(units, instances, dim)`, float32.
        mask: `(units, instances)`, bool; false where a unit has fewer instances than the widest.
        targets: `(units, instances)`, int64, a label's index; or `(units, instances, labels)`,
            float32, for `multilabel`.

    Raises:
        ValueError: a shape or type is another.
    """

    values: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        units = self.values.shape[:2]
        _expect("values", self.values, torch.float32, self.values.ndim == 3)
        _expect("mask", self.mask, torch.bool, self.mask.shape == units)
        multilabel = self.targets.ndim == 3
        kind = torch.float32 if multilabel else torch.int64
        _expect("targets", self.targets, kind, self.targets.shape[:2] == units)

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.values)

    def select(self, units: torch.Tensor | slice) -> "Features":
        """Return these units: views for a slice, copies for indices or a mask."""
        return Features(self.values[units], self.mask[units], self.targets[units])


@dataclass(frozen=True)
class Cohort:
    """One site's units, in two parts that never mix.

    Attributes:
        training: what heads are trained on.
        held_out: what they are evaluated on, for the life of the data; may be empty.
    """

    training: Features
    held_out: Features

    @property
    def dim(self) -> int:
        """Features per instance."""
        return self.training.values.shape[-1]

    @property
    def whole(self) -> Features:
        """All units, held out or not."""
        parts = (self.training, self.held_out)
        return Features(
            *(torch.cat([getattr(p, f) for p in parts]) for f in ("values", "mask", "targets"))
        )


def _expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, fits: bool) -> None:
    if tensor.dtype != dtype or not fits:
        raise ValueError(
            f"{name}: expected {dtype} of (units, instances, …), "
            f"got {tensor.dtype} of {tuple(tensor.shape)}"
        )


def units(values: Array, targets: torch.Tensor) -> Features:
    """Return one unit for each row; a store's memory map is not copied.

    Args:
        values: `(rows, dim)`, float32.
        targets: `(rows,)`, int64, or `(rows, labels)`, float32.
    """
    rows = _tensor(values)
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    return Features(rows.unsqueeze(1), mask, targets.unsqueeze(1))


def _tensor(values: Array) -> torch.Tensor:
    if isinstance(values, np.memmap) and values.mode == "c":
        # A private mapping: what is written to the tensor never reaches the file, and torch
        # warns of arrays that can't be written.
        values = values.view()
        values.flags.writeable = True
    return torch.from_numpy(np.require(values, requirements="W"))


class FeatureStore:
    """Features on disk, computed once for each backbone and data set.

    On one machine, a row is bit for bit a function of the backbone and of that row's record: no
    record more or less, no order of them and no number of cores changes another's.

    Rows are `exact.rounded`, so that engines which need them so share the one map with all others.

    A file's name is the SHA-256 of what shaped it: the backbone's identity and the data's
    fingerprint. Files have mode 0600 in a folder of mode 0700; features can be inverted to
    something like the record, so they are guarded as records are. A file appears whole or not
    at all, and any number of processes may extract at once: the last to finish wins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self,
        spec: study.Backbone,
        open_backbone: Callable[[], FrozenBackbone],
        inputs: Records,
        fingerprint: str,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Array:
        """Return the features of all rows, `(rows, dim)`, memory-mapped and read-only.

        The backbone is opened only where no whole file for these rows is there. Memory is
        bounded by one batch for each of torch's threads.

        Args:
            spec: what the study says of the backbone.
            open_backbone: opens the backbone that `spec` pins.
            fingerprint: of the data; the same for the same rows in the same order only.
            progress: called with rows done and rows in all after each batch.

        Raises:
            InputError: a record can't be read.
            OSError: the folder can't be written, or the disk is full.
        """
        key = sha256_of({"backbone": identity(spec), "data": fingerprint})
        path = self.folder / f"{key}.npy"
        if (stored := _mapped(path, len(inputs))) is not None:
            return stored
        backbone = open_backbone()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._remove_abandoned()
        with _replacing(path) as partial:
            values = _new_map(partial, (len(inputs), backbone.dim))
            with contextlib.closing(_extract(backbone, inputs, values)) as counts:
                for done in counts:
                    if progress is not None:
                        progress(done, len(inputs))
            values.flush()
        made = _mapped(path, len(inputs))
        if made is None:
            raise OSError(f"{path}: changed while it was written")
        return made

    def _remove_abandoned(self) -> None:
        """Remove what killed processes left; a living writer holds a lock on its file."""
        for partial in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError), partial.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)


def _extract(
    backbone: FrozenBackbone, inputs: Records, values: Array
) -> Generator[int, None, None]:
    """Fill the rows batch by batch; yield how many are done after each.

    On a CPU each thread takes a batch of its own: threads that share a batch wait for one another
    at every layer, which in small backbones costs more than it gains.
    """

    def fill(batch: tuple[Shape, dict[int, int]]) -> int:
        shape, rows = batch
        placed = {place: inputs[row] for place, row in rows.items()}
        values[list(rows.values())] = exact.rounded(backbone.in_slots(shape, placed).numpy())
        return len(rows)

    threads = torch.get_num_threads() if backbone.device.type == "cpu" else 1
    batches = _batches(backbone.shapes(inputs), inputs)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from accumulate(pool.map(fill, batches))
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(shapes: list[Shape], inputs: Records) -> Iterator[tuple[Shape, dict[int, int]]]:
    """Yield batches of one shape each, their rows by the slots that the records hash to.

    Which batch a row goes to follows the other rows; its shape and its slot don't.
    """
    queues: dict[Shape, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, shape in enumerate(shapes):
        queues[shape][slot(inputs[row], shape.slots)].append(row)
    for shape, waiting in queues.items():
        for rows in zip_longest(*waiting.values()):
            places = zip(waiting, rows, strict=True)
            yield shape, {place: row for place, row in places if row is not None}


def _mapped(path: Path, rows: int) -> Array | None:
    """Return the whole file with this many rows as a private, read-only map, or `None`."""
    try:
        values = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        return None
    whole = path.stat().st_size == values.offset + values.nbytes
    if not whole or values.dtype != np.float32 or values.ndim != 2 or len(values) != rows:
        return None
    values.flags.writeable = False
    return values


def _new_map(path: Path, shape: tuple[int, int]) -> "np.memmap[Any, np.dtype[np.float32]]":
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open("r+b") as file:
        # A full disk is an error here, and a fatal signal when a mapped page can't be backed.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a new, locked file that becomes `path` at the end, or is removed on an error."""
    handle, partial = _locked_partial(path)
    try:
        yield partial
        os.fsync(handle)
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def _locked_partial(path: Path) -> tuple[int, Path]:
    while True:
        handle, name = tempfile.mkstemp(".partial", f".{path.stem}.", path.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Another process may have taken it for abandoned before it was locked.
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)
