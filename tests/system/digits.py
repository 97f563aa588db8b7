"""scikit-learn's digits, dealt out to sites as files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = npt.NDArray[np.int64]
UNITS = 150
PUBLIC_ROWS = 200


def rows_of(sites: Sequence[str]) -> dict[str, Rows]:
    """Return which of the digits each site has, and which are `public`."""
    order = np.random.default_rng(0).permutation(1797)
    names = ("public", *sites)
    sizes = [PUBLIC_ROWS, *(UNITS for _ in sites)]
    parts = np.split(order, np.cumsum(sizes))[: len(names)]
    return {name: part.astype(np.int64) for name, part in zip(names, parts, strict=True)}


def write_digits(path: Path, rows: Rows) -> None:
    """Write some of scikit-learn's digits to a file that its owner alone may read."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [_png(digits.images[row]) for row in rows]
    labels = [str(digits.target[row]) for row in rows]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    path.chmod(0o600)


def _png(image: npt.NDArray[np.float64]) -> bytes:
    data = io.BytesIO()
    Image.fromarray((image * 15.9).astype("uint8")).save(data, "PNG")
    return data.getvalue()
