"""Matrix products without a rounding error, so that each row's is its own to the last bit.

A matrix product adds up a row in an order that depends on where the row stands and on how many
stand beside it. What no order can change is a sum that is exact. So numbers are cut to whole
multiples of a spacing, few enough bits wide that every sum of every product fits into float64's 53
(Ozaki, Ogita, Oishi & Rump 2012, Error-free transformations of matrix multiplication, §3): a
row's result is then a function of that row and the matrix alone, on any device and with any number
of threads, by the fastest product that there is.

Rows are cut once, to `ROW_BITS` bits below their largest number: 6e-8 of it. The weight is cut into
slices, whose products are added in a fixed order, and is good to 2^-36 of an output's largest.
"""

import functools
import math

import torch
from torch import Tensor

ROW_BITS = 24
"""Bits of a row's numbers, below its largest: as many as a float32 has, so that it holds them."""

MATRIX_BITS = 36
"""Bits of a weight that are used at least."""

# Below, numbers are taken for zero: products of two such would underflow, and so be inexact.
_TINY = 2.0**-300
_EXPONENT = 0x7FF << 52


def rounded(rows: Tensor) -> Tensor:
    """Return rows `(..., n)`, float32 or float64, cut to `ROW_BITS` bits below each row's largest.

    What is not finite spoils its own row alone.

    >>> rounded(torch.tensor([[1.0, 2.0**-30]])).tolist()
    [[1.0, 0.0]]
    """
    wide = rows.double()
    return _cut(wide, _above(wide) * 2.0**-ROW_BITS).to(rows.dtype)


def slices(weight: Tensor) -> list[Tensor]:
    """Cut a weight `(..., m, n)` so that any of the parts times `rounded` rows of n is exact."""
    bits = 53 - ROW_BITS - max(1, math.ceil(math.log2(weight.shape[-1])))
    scale = _above(weight) * 2.0**-bits
    found, left = [_cut(weight, scale)], weight
    for _ in range(1, math.ceil(MATRIX_BITS / bits)):
        left, scale = left - found[-1], scale * 2.0**-bits
        found.append(_cut(left, scale))
    return found


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return `rounded` rows `(..., r, n)` times the transposed weight `(..., m, n)`.

    Both are float64, as is the result, `(..., r, m)`; n is at most 2^20.

    >>> product(torch.ones(1, 3).double(), torch.tensor([[1.0, 10.0, 100.0]]).double())
    tensor([[111.]], dtype=torch.float64)
    """
    parts = slices(weight)
    found = torch.split(rows @ torch.cat(parts, -2).mT, weight.shape[-2], -1)
    # In this order for every row: here, at last, something is rounded.
    total: Tensor = functools.reduce(torch.add, found)
    return total


def _above(rows: Tensor) -> Tensor:
    """Return a power of two above each row's largest number, and at most twice as large."""
    largest = rows.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
    power: Tensor = (largest.view(torch.int64) & _EXPONENT).view(torch.float64)
    return power * 2.0


def _cut(values: Tensor, spacing: Tensor) -> Tensor:
    """Round to multiples of a power of two, which are below 2^51 of them."""
    shift = spacing * (1.5 * 2.0**52)
    return (values + shift).sub_(shift)
