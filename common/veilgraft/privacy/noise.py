"""Where the randomness of a release comes from.

Noise protects a record only while nobody can predict it, repeat it or read the record through
the noise's own bits. What this module does about each:

- **Prediction.** Every private source is keyed with 256 bits from the operating system and
  expands them with ChaCha20 (RFC 8439). torch's CPU generator is a Mersenne Twister, whose state
  can be computed from its output and whose seed has 32 effective bits.
- **Repetition.** One source serves one release. The key is drawn by the process that uses it,
  lives in that process only, and cannot be copied, pickled or used on the far side of a fork.
- **A short tail.** float32 normals from torch end at 5.77σ, and an outcome that one data set can
  produce and its neighbour cannot is a breach outright. These reach 9.34σ; a true normal is
  beyond that with probability 1e-20.
- **Porous floating point.** The floats that a sampler can produce have holes, and the holes move
  with the secret that the noise is added to (Mironov 2012; for Gaussians and DP-SGD, Jin et al.
  2022). `mechanism.py` therefore adds noise on a fixed grid. The clipped sum S lies on the grid
  before noise N is added, so round(S + N) = S + round(N): what is released is a function of
  S + N, and costs no more than S + N would with N a real number. Sensitivity is bounded with
  rounding included, which is the lesson of Casacuberta et al. 2022.
- **Holes wider than the grid.** Rounding hides only holes narrower than the grid, and far out a
  53-bit uniform leaves wider ones (Haney et al. 2022): at 7σ neighbouring radii are 2^-20 apart
  where a grid may be 2^-30. So the radius takes 63 bits, and every normal has an independent
  uniform *dither* of width `DITHER` = 2^-10 added. A dither is independent of the data: it, too,
  only post-processes S + N. Radii stay closer than the dither is wide out to 8.7σ, beyond which
  a pair of true normals falls with probability 4e-17. The dither moves in steps of 2^-42, so
  this holds for grids no finer than about 2^-40 σ. It adds 4e-8 of σ to the deviation.

How far this goes. N is a float64 approximation of a Gaussian, good enough that the known attacks
find nothing to hold on to; no bound on its distance from the Gaussian is proved here. Summing
several normals (Holohan & Braghin 2021) would serve as the dither does, at twice the cost.
Canonne, Kamath & Steinke 2020 sample a *discrete* Gaussian exactly; their sampler works on one
integer at a time and takes longer for some values than for others. Here the number of keystream
words never depends on what they say, but the time of a logarithm or a cosine may: **timing side
channels are not defended**. Nor is memory: `close` lets go of the key, yet neither CPython nor
OpenSSL's caller can promise that the bytes are wiped.

Sources:
    Mironov, On Significance of the Least Significant Bits for Differential Privacy, CCS 2012.
    Holohan & Braghin, Secure Random Sampling in Differential Privacy, ESORICS 2021.
    Jin, McMurtry, Rubinstein & Ohrimenko, Are We There Yet? Timing and Floating-Point Attacks on
        Differential Privacy Systems, IEEE S&P 2022.
    Casacuberta, Shoemate, Vadhan & Wagaman, Widespread Underestimation of Sensitivity in
        Differentially Private Libraries and How to Fix It, CCS 2022.
    Haney, Desfontaines, Hartman, Shrestha & Hay, Precision-based Attacks and Interval Refining,
        arXiv:2207.13793, 2022.
    Canonne, Kamath & Steinke, The Discrete Gaussian for Differential Privacy, NeurIPS 2020.
    Box & Muller, A Note on the Generation of Random Normal Deviates, 1958.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

DITHER = 2.0**-10
"""Width, in standard deviations, of the uniform dither in every normal."""

KEYSTREAM_WORDS = 2**34
"""64-bit words that one source may draw: 128 GiB, half of ChaCha20's 32-bit block counter."""

# Pairs of normals made at a time: three words each, 384 KiB, which stays in a core's own cache.
_PAIRS = 2**14
_ZEROS = memoryview(bytes(24 * _PAIRS))


class NoiseSource:
    """A stream of secret random numbers for one release; a context manager.

    The sequence is a function of the key and of the calls made, in order and with their sizes.
    Each call takes fresh keystream, so `normal(2)` then `normal(3)` is not `normal(5)`; nothing is
    drawn ahead. Equal seeds give equal bytes on one kind of CPU and one build of NumPy and
    torch.

    Not for use by two threads at once. Never touches the global generators of torch, NumPy or
    `random`.

    Every method raises RuntimeError after `close`, in a process other than the one that made the
    source, and when the keystream is spent (`KEYSTREAM_WORDS`).

    >>> with NoiseSource.seeded(7, "doctest") as source:
    ...     source.normal(3).shape, source.private
    (torch.Size([3]), False)
    """

    __slots__ = ("_keystream", "_left", "_pid", "_private")

    def __init__(self, key: bytes | None = None) -> None:
        # A key that somebody could hand in is a key that somebody knows.
        self._private = key is None
        secret = os.urandom(32) if key is None else key
        cipher = Cipher(algorithms.ChaCha20(secret, nonce=bytes(16)), mode=None)
        self._keystream: CipherContext | None = cipher.encryptor()
        self._left = KEYSTREAM_WORDS
        self._pid = os.getpid()

    @classmethod
    def fresh(cls) -> Self:
        """A private source, with a key that nobody has seen and nobody can have again."""
        return cls()

    @classmethod
    def seeded(cls, seed: int, *context: str | int) -> Self:
        """A repeatable source for runs that are *not private*.

        The key is SHA-256 over the JSON list of seed and context: lists that differ in any value,
        type or boundary give unrelated streams.
        """
        words = json.dumps([seed, *context]).encode()
        return cls(hashlib.sha256(b"veilgraft/noise/seeded/1\n" + words).digest())

    @property
    def private(self) -> bool:
        """Whether the key came from the operating system: False means anyone can replay it."""
        return self._private

    def normal(self, n: int) -> Tensor:
        """Draw n independent standard normals, float64 `(n,)`.

        Raises ValueError if n is negative.
        """
        self._expect(3 * ((_count(n) + 1) // 2))
        return torch.from_numpy(fill([self], np.empty((1, n)))[0])

    def bernoulli(self, n: int, p: float) -> Tensor:
        """Draw n independent coins, bool `(n,)`, each True with probability p.

        The probability is p rounded down to a multiple of 2^-53, exactly: a Poisson sample is
        never likelier to hold a unit than the accountant was told. p = 0 gives no True, p = 1
        no False.

        Raises ValueError if n is negative or p is outside [0, 1].
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self._claim(_count(n))
        # A signed word shifted by 11 is uniform on the 2^53 integers from -2^52.
        threshold = int(p * 2.0**53) - 2**52
        coins = np.empty(n, dtype=np.bool_)
        for start in range(0, n, 3 * _PAIRS):
            block = coins[start : start + 3 * _PAIRS]
            np.less(self._words(len(block)) >> 11, threshold, out=block)
        return torch.from_numpy(coins)

    def generator(self) -> torch.Generator:
        """Make a torch CPU generator for dropout and head initialisation, and for nothing else.

        torch keeps 32 bits of the seed and its state can be recovered from its output. That is
        enough where no guarantee rests on secrecy: a head is initialised before any data is seen,
        and a gradient is clipped to the same bound whatever its dropout mask. Noise and Poisson
        masks, whose secrecy *is* the guarantee, come from `normal` and `bernoulli`.
        """
        self._claim(1)
        return torch.Generator(device="cpu").manual_seed(int(self._words(1)[0]))

    def close(self) -> None:
        """Let go of the key; every later use raises. Closing twice is no error."""
        self._keystream = None

    def _claim(self, words: int) -> None:
        """Count so many words as used."""
        self._expect(words)
        self._left -= words

    def _expect(self, words: int) -> None:
        """Check that the source may be used, and for how much, before memory is taken."""
        if self._keystream is None:
            raise RuntimeError("NoiseSource: used after it was closed")
        if os.getpid() != self._pid:
            raise RuntimeError("NoiseSource: used in another process than the one that made it")
        if words > self._left:
            raise RuntimeError("NoiseSource: the keystream of one release is spent")

    def _words(self, n: int) -> npt.NDArray[np.int64]:
        """Take n words of keystream, int64 `(n,)`: encrypted zeros."""
        words = np.empty(n, dtype=np.int64)
        self._keystream_into(words)
        return words

    def _keystream_into(self, words: npt.NDArray[np.int64]) -> None:
        size, target = words.nbytes, words.view(np.uint8).data
        if self._keystream is None or self._keystream.update_into(_ZEROS[:size], target) != size:
            raise RuntimeError("NoiseSource: the cipher gave less than it was asked for")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a NoiseSource cannot be pickled or copied: noise used twice protects once")

    def __repr__(self) -> str:
        kind = "private" if self._private else "seeded, not private"
        state = "closed" if self._keystream is None else "open"
        return f"<NoiseSource: {kind}, {state}>"


def fill(
    sources: Sequence[NoiseSource], normals: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Fill each row of a matrix from its own source, as if by `normal`, all at once; return it.

    Args:
        normals: float64, `(sources, n)`.

    Raises ValueError if it is no such matrix, and RuntimeError if a source may not be used.
    """
    if normals.shape[:1] != (len(sources),) or normals.ndim != 2:
        raise ValueError("normals: expected a matrix with a row for each source")
    if normals.dtype != np.float64:
        raise ValueError(f"normals: expected float64, got {normals.dtype}")
    pairs = (normals.shape[1] + 1) // 2
    for source in sources:
        source._claim(3 * pairs)
    for start in range(0, pairs, _PAIRS):
        size = min(_PAIRS, pairs - start)
        words = np.empty((len(sources), 3, size), dtype=np.int64)
        for source, row in zip(sources, words, strict=True):
            source._keystream_into(row.reshape(-1))
        place = normals[:, 2 * start : 2 * (start + size)]
        place[...] = box_muller(words)[:, : place.shape[1]]
    return normals


def box_muller(words: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Turn uniform words, int64 `(…, 3, m)`, into independent standard normals, `(…, 2m)`.

    The rows are radius, angle and dither. With U = (k + 1) 2^-63 in (0, 1], k the lower 63 bits of
    a radius word, and V uniform on [-π, π], √(-2 ln U) (cos V, sin V) is a pair of independent
    standard normals (Box & Muller 1958, eq. 1). U is never zero, so the radius is at most
    √(126 ln 2) = 9.34. Each half of a dither word, scaled to `DITHER`, is added to one normal.
    """
    # Small U, which make the tail, keep all their bits in float64; large U are rounded.
    radius = (words[..., 0, :] & (2**63 - 1)).astype(np.float64)
    radius += 1.0
    radius *= 2.0**-63
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = words[..., 1, :].astype(np.float64)
    angle *= math.pi * 2.0**-63
    normals = np.ascontiguousarray(words[..., 2, :]).view(np.int32).astype(np.float64)
    normals *= DITHER * 2.0**-32
    m = words.shape[-1]
    # NumPy's own logarithm is three times as quick as torch's, and its cosine takes three times
    # as long.
    turned = torch.from_numpy(angle)
    for half, wave in ((normals[..., :m], turned.cos()), (normals[..., m:], turned.sin_())):
        half += np.multiply(wave.numpy(), radius)
    return normals


def _count(n: int) -> int:
    if n < 0:
        raise ValueError(f"n: expected a count of zero or more, got {n}")
    return n
