"""Features without transfer: the input itself, for comparison with a backbone's.

Each record's features depend on that record alone, as a backbone's do.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from veilgraft.model import images

MAX_SIDE = 28
"""Pixels; a larger image is scaled down, so that a head on it stays small."""

WORDS = 1024
"""Dimensions into which words are hashed."""


def features(
    modality: Literal["image", "text"], inputs: Sequence[bytes] | Sequence[str]
) -> npt.NDArray[np.float32]:
    """Return `(records, dim)`: grey pixels in [-1, 1], or hashed word counts of length √dim.

    Both have about the scale of standardised features, so that one learning rate suits all.
    """
    if modality == "image":
        return _pixels([image for image in inputs if isinstance(image, bytes)])
    return _words([text for text in inputs if isinstance(text, str)])


def _pixels(encoded: Sequence[bytes]) -> npt.NDArray[np.float32]:
    pictures = [images.decode(data).convert("L") for data in encoded]
    side = min(MAX_SIDE, max(pictures[0].size))
    rows = [np.asarray(picture.resize((side, side))).ravel() for picture in pictures]
    return (np.stack(rows) / np.float32(127.5) - 1).astype(np.float32)


def _words(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(n_features=WORDS, alternate_sign=True).transform(texts)
    return np.asarray(hashed.toarray() * WORDS**0.5, dtype=np.float32)
