"""The head as a module: one function, whether computed together or row by row."""

import itertools
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from veilgraft.model import head as heads
from veilgraft.study import Head

DIM, OUTPUTS = 11, 3
ACTIVATIONS: tuple[Literal["relu", "gelu", "tanh"], ...] = ("relu", "gelu", "tanh")
SPECS = [
    Head(),
    *(
        Head(type="mlp", hidden=hidden, activation=activation, dropout=0.5)
        for activation, hidden in itertools.product(ACTIVATIONS, [(5,), (7, 5)])
    ),
]


def outputs(spec: Head, values: Tensor, *, rowwise: bool) -> Tensor:
    """What a head of normal numbers gives, with a dropout mask of every other number."""

    def keep(count: int, probability: float) -> Tensor:
        return torch.arange(count) % 2 == 0

    generator = np.random.default_rng(1)
    shapes = heads.shapes(spec, DIM, OUTPUTS)
    module = heads.module(spec, DIM, OUTPUTS, keep, rowwise=rowwise)
    heads.load(module, {name: generator.normal(size=shape) for name, shape in shapes.items()})
    found: Tensor = module(values).detach()
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_head_computed_row_by_row_is_the_same_function(spec: Head) -> None:
    values = torch.randn(20, 3, DIM, dtype=torch.float64, generator=torch.Generator())
    together, alone = (outputs(spec, values, rowwise=rowwise) for rowwise in (False, True))
    assert together.std() > 0.1
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-13)


def test_a_head_computed_row_by_row_forms_a_gradient_by_its_hidden_layers_alone() -> None:
    module = heads.module(Head(type="mlp", hidden=(7, 5)), DIM, OUTPUTS, rowwise=True)
    assert [layer.first for name, layer in module.named_children() if "linear" in name] == [
        True,
        False,
        False,
    ]


def test_a_head_computed_together_gives_its_parameters_their_gradient() -> None:
    module = heads.module(Head(), DIM, OUTPUTS)
    heads.load(module, {"linear0.weight": np.ones((3, DIM)), "linear0.bias": np.zeros(3)})
    module(torch.ones(2, DIM, dtype=torch.float64)).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 2).all()
