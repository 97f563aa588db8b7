"""Layers that compute each instance by itself, to the last bit.

Guarantee: an instance's outputs, and the gradient by its inputs, are functions of that instance
and of the parameters alone: not of the other instances, their number, its place among them or the
number of threads.

Why: a matrix product adds up a row in an order that depends on where the row stands in the batch.
A row's last bits are then the others' too, and where a head's large weights cancel, last bits are
all that is left. Products and sums of IEEE 754 have one right answer each and only their order is
free; `product` fixes it by the matrix's size. `Gelu` is made of functions that torch computes
alike for every number, where torch's own has one formula for whole vectors and one for the rest.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 2**18
"""Terms in memory at once, about, so that they stay in the cache; speed, not privacy."""


def product(values: Tensor, matrix: Tensor) -> Tensor:
    """Return the matrix product of `(..., a)` and `(a, b)`, `(..., b)`, each row by itself.

    >>> product(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0], [100.0]]))
    tensor([[321.]])
    """
    rows = values.reshape(-1, len(matrix))
    columns = matrix.contiguous().unsqueeze(1)
    parts = torch.split(rows, max(1, BLOCK // matrix.numel()))
    found = torch.cat([_sum(part.T.unsqueeze(2) * columns) for part in parts])
    return found.view(*values.shape[:-1], matrix.shape[1])


def _sum(terms: Tensor) -> Tensor:
    """Return the sum over the first dimension, by adding its last half to its first; spoils it."""
    while (count := len(terms)) > 1:
        left = (count + 1) // 2
        terms[: count - left].add_(terms[left:])
        terms = terms[:left]
    # A view would keep every block's terms in memory.
    return terms[0].clone()


def unit_gradients(gradients: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's gradient for each unit, by its weight and by its bias.

    The sum over a unit's instances in their order: in another it would not be the unit's own.

    Args:
        gradients: by the layer's outputs, `(units, instances, outputs)`.
        values: the layer's inputs, `(units, instances, inputs)`.
    """
    column, row = gradients.unsqueeze(3), values.unsqueeze(2)
    weight, bias = column[:, 0] * row[:, 0], gradients[:, 0].clone()
    for instance in range(1, gradients.shape[1]):
        weight += column[:, instance] * row[:, instance]
        bias += gradients[:, instance]
    return weight, bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, first: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.first = first
        return product(values, weight.T) + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        return None if ctx.first else product(gradients[0], weight), None, None, None


class Linear(nn.Linear):
    """`nn.Linear` whose parameters are to be loaded: made of ones, not of random numbers.

    Its own would come from torch's global generator; and `skip_init` imports a second of sympy.
    """

    def reset_parameters(self) -> None:
        """Start from ones."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)


class RowLinear(Linear):
    """`nn.Linear` row by row, whose parameters get no gradient.

    The gradient by the parameters is a sum over instances. Whoever needs it by unit forms it from
    the layer's inputs and the gradient by its outputs, as Opacus' hooks do.

    Attributes:
        first: whether the layer is its module's first; the inputs then get no gradient either,
            which would cost as much as all the rest and which nobody reads.
    """

    first = False

    def forward(self, values: Tensor) -> Tensor:
        """Return `(..., outputs)` of `(..., inputs)`."""
        outputs: Tensor = _Product.apply(values, self.weight, self.bias, self.first)  # type: ignore[no-untyped-call]
        return outputs


class Gelu(nn.Module):
    """x Φ(x) (Hendrycks & Gimpel 2016, Gaussian Error Linear Units), like `nn.GELU`."""

    def forward(self, values: Tensor) -> Tensor:
        """Return `(...)` of `(...)`."""
        return values * (0.5 + 0.5 * torch.erf(values * math.sqrt(0.5)))
