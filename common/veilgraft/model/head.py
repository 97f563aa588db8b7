"""The trainable head: per instance, in float64, with all randomness explicit.

`shapes` and `initial` need numpy alone, so that a coordinator can check and start a head without
torch; `Head` is the torch module that a site trains and the exported model runs.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from veilgraft import study as contract

if TYPE_CHECKING:
    from torch import Tensor, nn

    Draw: TypeAlias = Callable[[int, float], Tensor]

Arrays: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
"""A head, an update or a gradient: parameter name to array."""


def _layers(spec: contract.Head, dim: int, outputs: int) -> list[tuple[int, int]]:
    return list(pairwise((dim, *spec.hidden, outputs)))


def shapes(spec: contract.Head, dim: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Return each parameter's shape, in order.

    >>> shapes(contract.Head(), 64, 10)
    {'linear0.weight': (10, 64), 'linear0.bias': (10,)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for index, (inputs, units) in enumerate(_layers(spec, dim, outputs)):
        found[f"linear{index}.weight"] = (units, inputs)
        found[f"linear{index}.bias"] = (units,)
    return found


def initial(
    spec: contract.Head, dim: int, outputs: int, generator: np.random.Generator
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the head with which a study starts.

    The last layer is zero, so that training starts at the uniform prediction and a linear head
    is the same at every start; hidden layers are uniform within 1/√inputs (LeCun et al. 1998,
    Efficient BackProp, §4.6).
    """
    layers = _layers(spec, dim, outputs)
    head: dict[str, npt.NDArray[np.float64]] = {}
    for index, (inputs, units) in enumerate(layers):
        bound = 0.0 if index == len(layers) - 1 else inputs**-0.5
        head[f"linear{index}.weight"] = generator.uniform(-bound, bound, (units, inputs))
        head[f"linear{index}.bias"] = np.zeros(units)
    return head


def module(
    spec: contract.Head,
    dim: int,
    outputs: int,
    keep: "Draw | None" = None,
    *,
    rowwise: bool = False,
) -> "nn.Sequential":
    """Return the head as an uninitialised float64 module on `(..., dim)`, giving `(..., outputs)`.

    Args:
        keep: draws so many independent booleans, each true with the given probability, for
            dropout; without it there is no dropout. Where the head is trained privately they
            must be as unpredictable as the noise: with a mask that an observer could enumerate,
            one unit more or less would shift everybody's mask, and so move every gradient.
        rowwise: compute each instance by itself, to the last bit, forward and backward, as
            privacy needs it (`model.rowwise`). Neither the parameters nor what the head is given
            then get a gradient from autograd; Opacus forms the units'.
    """
    import torch
    from torch import nn

    from veilgraft.model.rowwise import Gelu, Linear, RowLinear

    activations = {"relu": nn.ReLU, "gelu": Gelu if rowwise else nn.GELU, "tanh": nn.Tanh}
    head = nn.Sequential()
    layers = _layers(spec, dim, outputs)
    for index, (inputs, units) in enumerate(layers):
        linear = (RowLinear if rowwise else Linear)(inputs, units, dtype=torch.float64)
        if rowwise:
            linear.first = index == 0  # type: ignore[assignment]
        head.add_module(f"linear{index}", linear)
        if index < len(layers) - 1:
            head.add_module(f"activation{index}", activations[spec.activation]())
            if spec.dropout and keep is not None:
                head.add_module(f"dropout{index}", _dropout(spec.dropout, keep))
    return head


def load(head: "nn.Module", arrays: Arrays) -> None:
    """Copy `arrays` into the head's parameters of the same names."""
    import torch

    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(np.asarray(arrays[name.removeprefix("_module.")])))


def _dropout(rate: float, draw: "Draw") -> "nn.Module":
    from torch import Tensor, nn

    class Dropout(nn.Module):
        """Inverted dropout from an explicit source; nn.Dropout has only the global generator."""

        def forward(self, values: Tensor) -> Tensor:
            if not self.training:
                return values
            keep = draw(values.numel(), 1 - rate).view(values.shape)
            return values * keep.to(values.device) / (1 - rate)

    return Dropout()
