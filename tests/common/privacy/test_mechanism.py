"""One unit moves a rounded sum by at most the clip norm, whatever its gradient holds."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor, nn

from veilgraft.privacy.mechanism import (
    MAX_DIMENSION,
    MAX_UNITS,
    SLACK,
    add_noise,
    clip_factors,
    clipped_sum,
    grid,
    noised,
)
from veilgraft.privacy.noise import NoiseSource

INF, NAN = math.inf, math.nan
CLIP_NORMS = [1e-30, 3e-7, 0.1, 1.0, 3.7, 2.0**20, 1e30]
AWKWARD = [INF, -INF, NAN, 1e300, -1.7e308, 1e200, 1e154, 1e150, -1e-160, 1e-200, 5e-324, -0.0, 0.0]
unhurried = settings(deadline=None)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded() -> NoiseSource:
    return NoiseSource.seeded(0, "mechanism")


def released(grads: list[Tensor], clip_norm: float, sigma: float) -> Tensor:
    """A release under noise that is the same every time, so that differences are of sums alone."""
    return noised(clipped_sum(grads, clip_norm), clip_norm, sigma, seeded())


def squared_norm(difference: Tensor, step: float) -> Fraction:
    """Of a vector on the grid, exactly."""
    steps = (difference / step).tolist()
    assert all(value.is_integer() for value in steps)
    return Fraction(step) ** 2 * sum(int(value) ** 2 for value in steps)


# Factors.


@pytest.mark.parametrize(
    ("norm", "factor"),
    [
        (0.0, 1.0),
        (5e-324, 1.0),
        (1.0, 1.0),
        (2.0 * (1 - SLACK), 1.0),
        (2.0, 1 - SLACK),
        (4.0, (1 - SLACK) / 2),
        (1e150, 2e-150 * (1 - SLACK)),
        (2e150, 0.0),
        (INF, 0.0),
        (NAN, 0.0),
    ],
)
def test_factors_are_those_of_the_table(norm: float, factor: float) -> None:
    assert clip_factors(vector(norm).numpy(), clip_norm=2.0).item() == pytest.approx(
        factor, rel=1e-15
    )


def test_norms_too_coarse_for_the_guarantee_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        clip_factors(np.ones(3, dtype=np.float32), clip_norm=1.0)


# Sums, by closed form.


def test_a_long_gradient_is_scaled_and_a_short_one_kept() -> None:
    grads = [torch.tensor([[3.0, 4.0], [0.3, 0.0]])]
    expected = [0.6 * (1 - SLACK) + 0.3, 0.8 * (1 - SLACK)]
    assert clipped_sum(grads, 1.0).tolist() == pytest.approx(expected, rel=1e-7)


def test_the_norm_is_over_all_parameters_and_the_sum_in_their_order() -> None:
    weight = torch.tensor([[[1.0, 2.0], [4.0, 10.0]]], dtype=torch.float64)
    bias, scale = vector(20.0).view(1, 1), vector(10.0)  # 1 + 4 + 16 + 100 + 400 + 100 = 621
    expected = np.array([1.0, 2.0, 4.0, 10.0, 20.0, 10.0]) * (1 - SLACK) / math.sqrt(621.0)
    assert clipped_sum([weight, bias, scale], 1.0).numpy() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_summed_in_double(dtype: torch.dtype) -> None:
    total = clipped_sum([torch.full((4096, 1), 1 / 3, dtype=dtype)], 1.0)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(4096 * torch.tensor(1 / 3, dtype=dtype).item(), rel=1e-12)


def test_no_units_sum_to_zeros() -> None:
    total = clipped_sum([torch.zeros(0, 3, 2), torch.zeros(0, 3), torch.zeros(0)], 1.0)
    assert total.tolist() == [0.0] * 10
    assert noised(total, 1.0, 1.0, NoiseSource.fresh()).isfinite().all()


def test_one_unit_is_no_special_case() -> None:
    assert clipped_sum([torch.tensor([[0.5]])], 1.0).tolist() == [0.5]


@pytest.mark.parametrize("bad", [INF, -INF, NAN, 1e200, -1.7e308, 2e150])
@pytest.mark.parametrize("width", [1, 7])
def test_a_gradient_that_cannot_be_measured_contributes_exactly_zero(
    bad: float, width: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, width, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    others = clipped_sum([weight[1:], bias[1:]], 1.0)
    for parameter in (weight, bias):
        held = parameter[0].clone()
        parameter[0] = bad
        assert clipped_sum([weight, bias], 1.0).tolist() == pytest.approx(
            others.tolist(), abs=1e-15
        )
        assert clipped_sum([weight[:1], bias[:1]], 1.0).tolist() == [0.0] * (width + 1)
        parameter[0] = held


def test_a_gradient_too_small_to_square_contributes_itself() -> None:
    assert clipped_sum([vector(1e-200, -5e-324).view(1, 2)], 1.0).tolist() == [1e-200, -5e-324]


def test_the_gradients_handed_in_are_left_as_they_were() -> None:
    grads = vector(INF, 9.0, -INF, 0.1).view(4, 1)
    before = grads.clone()
    clipped_sum([grads], 1.0)
    assert torch.equal(grads, before)


def test_blocks_of_units_add_up() -> None:
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = (0.7 * (1 - SLACK) / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
    expected = pytest.approx((rows * factors).sum(dim=0).tolist(), abs=1e-10)
    parts = [clipped_sum([rows[start : start + 1024]], 0.7) for start in range(0, 5000, 1024)]
    assert clipped_sum([rows], 0.7).tolist() == expected
    assert torch.stack(parts).sum(dim=0).tolist() == expected


@pytest.mark.parametrize(
    "grads", [[], [torch.zeros(3, 2), torch.zeros(2, 2)], [torch.zeros(1).expand(MAX_UNITS + 1)]]
)
def test_gradients_of_no_agreed_number_of_units_are_refused(grads: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="grads: expected"):
        clipped_sum(grads, 1.0)


# The grid.


def test_the_grid_of_one_coordinate_is_the_last_power_of_two_within_half_the_slack() -> None:
    assert grid(1.0, 1.0, 1) == 2.0**-21  # 2^-21 = 4.8e-7 < 5e-7 < 2^-20
    assert grid(1.0, 0.25, 1) == 2.0**-22  # where the noise asks for a finer one
    assert grid(1.0, 1.0, 2**20) == 2.0**-31
    assert grid(8.0, 1.0, 2**20) == 2.0**-28


@given(
    clip_norm=st.floats(1e-30, 1e30),
    sigma=st.floats(1e-3, 1e5),
    dimension=st.integers(1, MAX_DIMENSION),
)
def test_the_grid_is_the_coarsest_that_the_slack_and_the_noise_allow(
    clip_norm: float, sigma: float, dimension: int
) -> None:
    step = grid(clip_norm, sigma, dimension)
    slack = Fraction(clip_norm) * Fraction(SLACK) / 2
    noise = Fraction(sigma) * Fraction(clip_norm) / 2**20
    rounding = Fraction(1, 10**15)
    assert math.frexp(step)[0] == 0.5
    assert Fraction(step) ** 2 * dimension <= slack**2 * (1 + rounding)
    assert Fraction(step) <= noise * (1 + rounding)
    twice = 2 * Fraction(step) * (1 + rounding)
    assert twice**2 * dimension > slack**2 or twice > noise
    # The largest sum and the largest normal together stay exact.
    assert (MAX_UNITS * Fraction(clip_norm) + Fraction(9.4) * noise * 2**20) / Fraction(
        step
    ) < 2**53


@pytest.mark.parametrize("bad", [0.0, -1.0, INF, NAN, 1e-31, 1e31])
def test_settings_outside_of_what_is_proved_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        grid(bad, 1.0, 1)
    with pytest.raises(ValueError, match="clip_norm"):
        clip_factors(np.ones(1), bad)
    with pytest.raises(ValueError, match="noise_multiplier"):
        grid(1.0, bad, 1)


@pytest.mark.parametrize("dimension", [0, MAX_DIMENSION + 1])
def test_dimensions_outside_of_what_is_proved_are_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match="dimension"):
        grid(1.0, 1.0, dimension)


# The noised sum.


@given(
    sigma=st.floats(1e-3, 1e5),
    clip_norm=st.sampled_from(CLIP_NORMS),
    shares=st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=40),
)
@unhurried
def test_every_released_number_is_on_the_grid(
    sigma: float, clip_norm: float, shares: list[float]
) -> None:
    total = vector(*shares) * (MAX_UNITS * clip_norm)
    release = noised(total, clip_norm, sigma, NoiseSource.fresh())
    steps = [Fraction(x) / Fraction(grid(clip_norm, sigma, len(shares))) for x in release.tolist()]
    assert all(step.denominator == 1 and abs(step) < 2**53 for step in steps)


def test_the_noise_is_normal_with_the_multiplier_times_the_clip_norm() -> None:
    total = torch.linspace(-5.0, 5.0, 200_000, dtype=torch.float64)
    noise = noised(total, 0.5, 3.0, seeded()) - total
    assert stats.kstest(noise.numpy(), stats.norm(scale=1.5).cdf).pvalue > 1e-3


def test_the_same_noise_moves_with_the_sum_and_with_nothing_else() -> None:
    step = grid(1.0, 2.0, 3)
    total = vector(0.0, 1.0, -3.0)
    moved = total + vector(5 * step, -step, 0.4 * step)
    difference = noised(moved, 1.0, 2.0, seeded()) - noised(total, 1.0, 2.0, seeded())
    assert difference.tolist() == [5 * step, -step, 0.0]


@pytest.mark.parametrize("sigma", [0.0, -1.0, NAN, INF])
def test_a_sum_without_noise_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        noised(vector(1.0), 1.0, sigma, seeded())


@pytest.mark.parametrize(
    "total",
    [
        vector(0.0, NAN),
        vector(INF),
        vector(1.1 * MAX_UNITS),
        vector(1.0).float(),
        vector(1.0).view(1, 1),
        vector(),
    ],
)
def test_a_sum_that_no_units_can_make_is_refused_before_noise_is_drawn(total: Tensor) -> None:
    source = seeded()
    with pytest.raises(ValueError, match=r"total: expected|dimension: expected"):
        noised(total, 1.0, 1.0, source)
    assert torch.equal(source.normal(3), seeded().normal(3))


def test_a_refusal_keeps_the_sum_to_itself() -> None:
    with pytest.raises(ValueError, match="total") as refusal:
        noised(vector(1234567.0), 1.0, 1.0, seeded())
    assert "1234567" not in str(refusal.value)


def test_a_closed_source_makes_no_release() -> None:
    source = seeded()
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        noised(vector(1.0), 1.0, 1.0, source)


# Sensitivity, by property. Every norm is computed exactly, on integers.


numbers = st.one_of(
    st.sampled_from(AWKWARD),
    st.floats(-4.0, 4.0),
    st.floats(allow_nan=True, allow_infinity=True),
)
calm = st.floats(-4.0, 4.0)


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    """Per-unit gradients of three parameters; some units ordinary, some anything at all."""
    units = [
        draw(arrays(np.float64, 9, elements=draw(st.sampled_from([numbers, calm]))))
        for _ in range(draw(st.integers(1, 6)))
    ]
    rows = torch.from_numpy(np.stack(units))
    return [rows[:, :6].view(-1, 2, 3), rows[:, 6:8], rows[:, 8]]


@given(
    grads=gradients(),
    clip_norm=st.sampled_from(CLIP_NORMS),
    sigma=st.sampled_from([1e-3, 1.0, 50.0]),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_removing_a_unit_moves_a_release_by_at_most_the_clip_norm(
    grads: list[Tensor], clip_norm: float, sigma: float, data: st.DataObject
) -> None:
    units = len(grads[0])
    gone = data.draw(st.integers(0, units - 1))
    kept = torch.arange(units) != gone
    with_it, without = (
        released(grads, clip_norm, sigma),
        released([g[kept] for g in grads], clip_norm, sigma),
    )
    assert with_it.isfinite().all()
    assert squared_norm(with_it - without, grid(clip_norm, sigma, 9)) <= Fraction(clip_norm) ** 2


@given(grads=gradients(), replacement=gradients(), clip_norm=st.sampled_from(CLIP_NORMS))
@unhurried
def test_replacing_a_unit_moves_a_release_by_at_most_twice_the_clip_norm(
    grads: list[Tensor], replacement: list[Tensor], clip_norm: float
) -> None:
    changed = [torch.cat((new[:1], old[1:])) for new, old in zip(replacement, grads, strict=True)]
    difference = released(grads, clip_norm, 1.0) - released(changed, clip_norm, 1.0)
    bound = 4 * Fraction(clip_norm) ** 2
    assert squared_norm(difference, grid(clip_norm, 1.0, 9)) <= bound


@given(
    seed=st.integers(0, 2**32),
    units=st.integers(1, 40),
    dimension=st.sampled_from([1, 2, 65, 650, 3850, 20_000]),
    length=st.floats(-8.0, 8.0),
)
@settings(deadline=None, max_examples=60)
def test_many_coordinates_and_units_keep_the_bound(
    seed: int, units: int, dimension: int, length: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units, dimension, generator=generator, dtype=torch.float64)
    rows *= 10.0**length / math.sqrt(dimension)
    difference = released([rows], 1.0, 1.0) - released([rows[1:]], 1.0, 1.0)
    moved = squared_norm(difference, grid(1.0, 1.0, dimension))
    assert moved <= 1
    clip = min(1.0, rows[0].norm().item())
    assert math.sqrt(moved) >= clip * (1 - 2 * SLACK) - SLACK


@pytest.mark.parametrize("units", [1024, 5000, MAX_UNITS])
def test_the_longest_sums_keep_the_bound(units: int) -> None:
    # All along one direction, where sums are largest and every addition rounds.
    rows = (torch.rand(units, 2, generator=torch.Generator().manual_seed(1)) + 1e3).double()
    for gone in (0, units // 2, units - 1):
        kept = torch.arange(units) != gone
        difference = released([rows], 1.0, 1.0) - released([rows[kept]], 1.0, 1.0)
        assert 1 - 3 * SLACK <= squared_norm(difference, grid(1.0, 1.0, 2)) <= 1


# Opacus as an oracle: other code, the same sum.


def linear() -> nn.Module:
    return nn.Linear(16, 5)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))


@pytest.mark.parametrize(("quantile", "scale"), [(0.0, 0.5), (0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("head", [linear, perceptron])
def test_opacus_clips_and_sums_to_the_same_vector(
    head: Callable[[], nn.Module], quantile: float, scale: float
) -> None:
    torch.manual_seed(0)
    module = GradSampleModule(head().double(), batch_first=True, loss_reduction="sum")
    features = 10.0 * torch.randn(32, 6, 16, dtype=torch.float64).requires_grad_()
    scores, targets, mask = module(features), torch.randint(5, (32, 6)), torch.rand(32, 6) < 0.7
    losses = nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    torch.autograd.backward((losses * mask).sum())

    grads = [parameter.grad_sample for parameter in module.parameters()]
    norms = torch.cat([grad.flatten(start_dim=1) for grad in grads], dim=1).norm(dim=1)
    clip_norm = norms.quantile(quantile).item() * scale  # clips all units, half of them, none
    ours = clipped_sum(grads, clip_norm)

    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    optimizer.clip_and_accumulate()
    theirs = torch.cat([parameter.summed_grad.flatten() for parameter in optimizer.params])
    # Opacus divides by norm + 1e-6; the bound here is smaller by 1e-6 of itself.
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    clipped = torch.from_numpy(clip_factors(norms.numpy(), clip_norm) < 1.0)
    assert torch.equal(norms > clip_norm, clipped)
    assert (norms > clip_norm).double().mean() == 1.0 - quantile


def test_no_sign_of_a_zero_tells_which_way_a_sum_was_rounded() -> None:
    zeros = [
        add_noise(np.array([t]), 1.0, 1.0, np.array([n]))
        for t in (-1e-12, 0.0, -0.0, 1e-12)
        for n in (0.0, -0.0)
    ]
    assert {zero.tobytes() for zero in zeros} == {np.zeros(1).tobytes()}
