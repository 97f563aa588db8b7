"""The Gaussian mechanism for sums of clipped gradients.

Guarantee. Write S for what `clipped_sum` returns, rounded to `grid`, and C for `clip_norm`. Adding
or removing one *unit* moves S by at most C in L2 norm, whatever the unit's gradient holds and
with every rounding counted; replacing one unit moves it by at most 2C. `noised` adds Gaussian
noise of standard deviation σC per coordinate, σ the `noise_multiplier`, so one release is μ-GDP
with μ = 1/σ for add-or-remove (2/σ for replace-one). This holds for noise that is exactly
Gaussian; `noise.py` says how close it comes. Summed over a Poisson sample of the units this is a
step of DP-SGD, which `accounting.py` prices.

A unit's gradient is everything that unit adds to the gradient, however many instances it has: one
row of each tensor handed in. Rows must not mix units.

| what comes in | what comes out |
|---|---|
| a gradient of norm 0 | contributes zero |
| a gradient of norm up to C(1 - `SLACK`) | contributes itself |
| a longer one, however many instances went into it | is scaled to C(1 - `SLACK`) |
| infinity or NaN anywhere in a unit's gradient, as from a non-finite feature | contributes zero |
| finite entries, but a norm above 1e150, near which squares overflow | contributes zero |
| entries below about 1e-162, whose squares underflow | contributes itself |
| one unit | the same; no unit is special |
| no units, as in an empty Poisson batch | zeros, which are then noised like any other sum |
| more than `MAX_UNITS` units or `MAX_DIMENSION` coordinates | `ValueError` |

Where the slack goes. Units are clipped to C(1 - `SLACK`), and 10^-6 C is left for arithmetic.

- *Half for the grid.* Rounding to a grid g moves each of d coordinates by at most g/2. Two sums
  are rounded, so their difference moves by at most g√d, and g√d ≤ C `SLACK` / 2.
- *Half for float64*, whose unit roundoff is u = 2^-53. A norm over d coordinates is right to
  (d + 6)u, relatively: 10^-10 at `MAX_DIMENSION`. Summing n terms so that each passes through at
  most h additions, in any order, is off by at most hu times the terms' summed norms (Higham 2002,
  §4.2): huCn, and twice that for two sums. Units are summed in blocks of 1,024 and then block by
  block, so h ≤ 2,050 at `MAX_UNITS` = 2^20, and 2hun = 4.8 · 10^-7.

On the grid every number here is an integer below 2^53, so adding and rescaling are exact: a sum
is at most 2^20 C, the noise at most 9.4σC, and g is above 2^-32 C for the σ and d allowed.

Sources:
    Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar & Zhang, Deep Learning with Differential
        Privacy, CCS 2016, Algorithm 1.
    Dong, Roth & Su, Gaussian Differential Privacy, JRSS-B 2022: the Gaussian mechanism is μ-GDP.
    Casacuberta, Shoemate, Vadhan & Wagaman, Widespread Underestimation of Sensitivity in
        Differentially Private Libraries and How to Fix It, CCS 2022.
    Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM 2002.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veilgraft.privacy.noise import NoiseSource, fill

SLACK = 1e-6
"""Share of the clip norm that is kept free for rounding."""

MAX_UNITS = 2**20
"""Units in one sum, for which the half of the slack that is float64's is proved to suffice."""

MAX_DIMENSION = 2**20
"""Coordinates of one sum: a head of a thousand classes on a thousand features."""

# The table's bounds and the proof above hold well inside these; settings beyond are mistakes.
_CLIP_NORMS = (1e-30, 1e30)
_NOISE_MULTIPLIERS = (1e-3, 1e5)
# Far enough below the root of the largest float64 that no way of adding squares overflows.
_LARGEST_NORM = 1e150
_BLOCK = 2**10
_DRAWN = 2**15


@lru_cache
def grid(clip_norm: float, noise_multiplier: float, dimension: int) -> float:
    """Return the spacing on which a sum of `dimension` coordinates and its noise are rounded.

    The largest power of two g with g√d ≤ C `SLACK` / 2, so that rounding two sums changes their
    distance by at most half of the slack, and g ≤ 2^-20 σC, so that the noise is not coarse. It
    depends on public constants alone. Call it before the first release to learn whether the
    settings can be used at all.

    Raises ValueError if a setting is outside of what the module's bounds are proved for:
    `clip_norm` 1e-30 to 1e30, `noise_multiplier` 0.001 to 100,000, dimension 1 to `MAX_DIMENSION`.

    >>> grid(clip_norm=1.0, noise_multiplier=1.0, dimension=1) == 2.0**-21
    True
    """
    _within("noise_multiplier", noise_multiplier, *_NOISE_MULTIPLIERS)
    _within("clip_norm", clip_norm, *_CLIP_NORMS)
    _within("dimension", dimension, 1, MAX_DIMENSION)
    widest = clip_norm * min(SLACK / 2 / math.sqrt(dimension), noise_multiplier * 2.0**-20)
    _, exponent = math.frexp(widest)
    return math.ldexp(1.0, exponent - 1)


def clip_factors(norms: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.float64]:
    """Return what each unit's gradient is multiplied by, float64 like the norms, in [0, 1].

    min(1, C(1 - `SLACK`) / norm): 1 where the norm is zero; and 0 where it is NaN, infinite or
    above 1e150. A gradient whose factor is 0 may hold infinities, and 0 × infinity is NaN: replace
    what is not finite before multiplying.

    Args:
        norms: L2 norms of whole gradients, over all parameters, float64 of any shape.
        clip_norm: C.

    Raises ValueError if the norms are not float64, whose precision the guarantee needs.
    """
    _within("clip_norm", clip_norm, *_CLIP_NORMS)
    if norms.dtype != np.float64:
        raise ValueError(f"norms: expected float64, got {norms.dtype}")
    with np.errstate(all="ignore"):
        factors = np.minimum(clip_norm * (1.0 - SLACK) / norms, 1.0)
    return np.where(norms <= _LARGEST_NORM, factors, 0.0)


def clipped_sum(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Clip each unit once over all parameters and sum over units, float64 `(dimension,)`.

    Coordinates are the parameters' in the order given, each row by row. A large sum may be made
    of several calls and their results added: the guarantee holds for at most `MAX_UNITS` units in
    all, with 1,024 or more in every call but the last.

    Args:
        grads: per-unit gradients, for each parameter one tensor `(units, ...)` of any float type.
        clip_norm: C.

    Raises ValueError if there are no parameters, or the parameters disagree about the number of
    units, or there are more than `MAX_UNITS` units.
    """
    counts = {len(grad) for grad in grads}
    if len(counts) != 1:
        raise ValueError("grads: expected at least one tensor, all with the same number of units")
    units = counts.pop()
    if units > MAX_UNITS:
        raise ValueError(f"grads: expected at most {MAX_UNITS} units")
    rows = [grad.detach().reshape(units, math.prod(grad.shape[1:])) for grad in grads]
    total = _block_sum([row[:_BLOCK] for row in rows], clip_norm)
    for start in range(_BLOCK, units, _BLOCK):
        total += _block_sum([row[start : start + _BLOCK] for row in rows], clip_norm)
    return total


def noised(total: Tensor, clip_norm: float, noise_multiplier: float, source: NoiseSource) -> Tensor:
    """Round a clipped sum to the grid and add Gaussian noise of deviation σC, on the grid too.

    Returns float64 `(dimension,)` on the device of `total`; every coordinate is an exact multiple
    of `grid(clip_norm, noise_multiplier, dimension)`.

    Args:
        total: what `clipped_sum` returned, or several of its results added, `(dimension,)`.
        clip_norm: C.
        noise_multiplier: σ; above zero, for without noise there is no mechanism.
        source: randomness of this release alone.

    Raises ValueError, before any noise is drawn, if a setting is out of `grid`'s range or `total`
    is not a vector of float64 that clipped units can add up to: finite, and no coordinate beyond
    `MAX_UNITS` times C. RuntimeError if the source may not be used.
    """
    if total.dtype != torch.float64 or total.ndim != 1:
        raise ValueError(f"total: expected float64 (dimension,), got {total.dtype}, {total.ndim}-d")
    grid(clip_norm, noise_multiplier, len(total))
    # Written so that NaN fails; the message keeps the value to itself.
    if not bool((total.abs() <= MAX_UNITS * clip_norm).all()):
        raise ValueError("total: expected a finite sum of clipped gradients")
    drawn = noise([source], 1, len(total), clip_norm, noise_multiplier)[0, 0]
    found = add_noise(total.numpy(force=True), clip_norm, noise_multiplier, drawn)
    return torch.from_numpy(found).to(total.device)


def noise(
    sources: Sequence[NoiseSource],
    count: int,
    dimension: int,
    clip_norm: float,
    noise_multiplier: float,
) -> npt.NDArray[np.float64]:
    """Draw the noise of so many sums of each source's release, `(sources, count, dimension)`.

    It is rounded to the grid. Raises as `noised` does.
    """
    step = grid(clip_norm, noise_multiplier, dimension)
    place = np.empty((len(sources), count * dimension))
    # Few sources at a time: what was drawn is then rounded before it has left the cache.
    few = max(1, _DRAWN // (count * dimension))
    for first in range(0, len(sources), few):
        part = fill(sources[first : first + few], place[first : first + few])
        part *= noise_multiplier * clip_norm / step
        np.rint(part, out=part)
        part *= step
    return place.reshape(len(sources), count, dimension)


def add_noise(
    totals: npt.NDArray[np.float64],
    clip_norm: float,
    noise_multiplier: float,
    drawn: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Round clipped sums to the grid and add noise that was drawn in a block, as `noised` does.

    What is not finite stays so, and must not be released.

    Args:
        totals: float64 `(..., dimension)`, each what clipped units add up to.
        drawn: a row of what `noise` gave for each sum, used once.
    """
    step = grid(clip_norm, noise_multiplier, totals.shape[-1])
    # A power of two: to multiply by it, or by its inverse, rounds nothing.
    found = totals * (1 / step)
    np.rint(found, out=found)
    found *= step
    found += drawn
    # Two zeros that are both negative would stay so: a sign that only some sums can leave.
    found += 0.0
    return found


def _block_sum(rows: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Clip and sum a block of units, given as one `(units, size)` for each parameter."""
    rows = [row.double() for row in rows]
    by_parameter = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows])
    norms = torch.linalg.vector_norm(by_parameter, dim=0)
    factors = torch.from_numpy(clip_factors(norms.numpy(force=True), clip_norm)).to(norms.device)
    # A unit that is not finite has factor 0, and 0 × NaN would be NaN.
    return torch.cat([factors @ row.nan_to_num(0.0, 0.0, 0.0) for row in rows])


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value}")
