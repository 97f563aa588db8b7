"""Layers that compute each instance by itself: as right as torch's, and the same in any company."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from veilgraft.model import rowwise
from veilgraft.model.rowwise import Gelu, RowLinear, product


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads for torch."""
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(rows=st.integers(0, 9), inputs=st.integers(1, 40), outputs=st.integers(1, 9))
def test_a_product_is_the_matrix_product(rows: int, inputs: int, outputs: int) -> None:
    values, matrix = normal(rows, 2, inputs), normal(inputs, outputs)
    found = product(values, matrix)
    assert found.shape == (rows, 2, outputs)
    torch.testing.assert_close(found, values @ matrix, rtol=0, atol=1e-13)


def test_a_product_adds_the_last_half_to_the_first() -> None:
    # (1 + 1) + (2⁵³ + -2⁵³) is 2 in this order; in that of the terms the second 1 would be lost.
    terms = torch.tensor([[2.0**53, 1.0, -(2.0**53), 1.0]], dtype=torch.float64)
    assert product(terms, torch.ones(4, 1, dtype=torch.float64)).item() == 2.0


@pytest.mark.parametrize("block", [1, 10_000, 2**18])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 7), (384, 10), (5, 1), (1, 5)])
@pytest.mark.usefixtures("threads")
def test_a_rows_product_is_the_same_to_the_last_bit_whoever_else_is_there(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, block: int
) -> None:
    values, matrix = normal(300, inputs), normal(inputs, outputs)
    together = product(values, matrix)
    monkeypatch.setattr(rowwise, "BLOCK", block)
    for count in (*range(1, 71), 299):
        assert torch.equal(product(values[-count:], matrix), together[-count:])


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_is_linear_and_keeps_its_parameters_gradient_to_itself(first: bool) -> None:
    usual, layer = nn.Linear(6, 3, dtype=torch.float64), RowLinear(6, 3, dtype=torch.float64)
    layer.load_state_dict(usual.state_dict())
    layer.first = first
    values, expected = (normal(4, 2, 6).requires_grad_() for _ in range(2))
    weights = normal(4, 2, 3)
    (layer(values) * weights).sum().backward()
    (usual(expected) * weights).sum().backward()
    torch.testing.assert_close(layer(values), usual(values), rtol=0, atol=1e-14)
    assert layer.weight.grad is layer.bias.grad is None
    if first:
        assert values.grad is None
    else:
        torch.testing.assert_close(values.grad, expected.grad, rtol=0, atol=1e-14)


def _gelu_and_slope(values: Tensor) -> Tensor:
    values = values.clone().requires_grad_()
    found = Gelu()(values)
    found.sum().backward()
    assert values.grad is not None
    return torch.stack([found.detach(), values.grad])


def test_gelu_is_x_times_the_normal_distribution_function() -> None:
    values = torch.tensor([-40.0, -1.0, 0.0, 1.0, 40.0], dtype=torch.float64)
    below = (1 + math.erf(1 / math.sqrt(2))) / 2
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    found, slope = _gelu_and_slope(values)
    assert found.tolist() == pytest.approx([0, below - 1, 0, below, 40], abs=1e-15)
    expected = [0, 1 - below - density, 0.5, below + density, 1]
    assert slope.tolist() == pytest.approx(expected, abs=1e-15)
    wide = 3 * normal(1000)
    torch.testing.assert_close(Gelu()(wide), functional.gelu(wide), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("threads")
def test_gelu_of_a_number_is_the_same_to_the_last_bit_whoever_else_is_there() -> None:
    values = normal(2000) * torch.exp(2 * normal(2000))
    together = _gelu_and_slope(values)
    for count in (*range(1, 71), 1999):
        assert torch.equal(_gelu_and_slope(values[-count:]), together[:, -count:])
