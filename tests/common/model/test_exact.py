"""Products that round nothing: each row's is its own, and close to the true one."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.model import exact

Array = npt.NDArray[np.float64]


def numbers(seed: int, *shape: int, decades: float = 0.0) -> Array:
    draw = np.random.default_rng(seed)
    scales: Array = 10.0 ** draw.uniform(-decades, decades, size=(*shape[:-1], 1))
    return draw.normal(size=shape) * scales


def true(row: Array, other: Array) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(row, other, strict=True)), Fraction(0))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 64, 384, 1030, 2100]), st.floats(0, 6))
def test_a_product_is_the_true_one_to_a_share_of_the_weights_largest(
    seed: int, inputs: int, decades: float
) -> None:
    rows = exact.rounded(numbers(seed, 3, inputs, decades=decades))
    weight = numbers(seed + 1, 2, inputs, decades=decades)
    found = exact.product(rows, weight)
    for i, j in np.ndindex(3, 2):
        away = abs(Fraction(found[i, j].item()) - true(rows[i], weight[j]))
        allowed = 2.0**-36 * np.abs(weight).max() * np.abs(rows[i]).sum()
        assert away <= allowed + 2.0**-52 * abs(found[i, j])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0, 12))
def test_a_row_is_its_own_to_the_last_bit_wherever_it_stands(
    seed: int, count: int, decades: float
) -> None:
    rows = exact.rounded(numbers(seed, count, 384, decades=decades))
    weight = numbers(seed + 1, 10, 384)
    together = exact.product(rows, weight)
    order = np.random.default_rng(seed).permutation(count)
    assert np.array_equal(exact.product(rows[order], weight), together[order])
    for at in range(0, count, 7):
        assert np.array_equal(exact.product(rows[at : at + 1], weight), together[at : at + 1])


def test_a_plain_product_is_not_a_rows_own() -> None:
    """Else the module would be there for nothing."""
    rows, weight = numbers(0, 64, 384), numbers(1, 10, 384)
    alone = np.concatenate([rows[at : at + 1] @ weight.T for at in range(64)])
    assert not np.array_equal(rows @ weight.T, alone)


@pytest.mark.parametrize("inputs", [1, 3, 384, 1030])
def test_products_of_rows_with_each_other_are_good_however_their_sizes_differ(inputs: int) -> None:
    rows = exact.rounded(numbers(3, 4, inputs, decades=30.0))
    found = exact.gram(rows)
    for i, j in np.ndindex(4, 4):
        length = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
        assert abs(Fraction(found[i, j].item()) - true(rows[i], rows[j])) <= 2.0**-50 * length


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(bad: float) -> None:
    rows, weight = numbers(0, 5, 16), numbers(1, 3, 16)
    spoilt = rows.copy()
    spoilt[2, 3] = bad
    with np.errstate(all="ignore"):
        found = exact.product(exact.rounded(spoilt), weight)
    whole = exact.product(exact.rounded(rows), weight)
    assert not np.isfinite(found[2]).any()
    assert np.array_equal(np.delete(found, 2, 0), np.delete(whole, 2, 0))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([np.float32, np.float64]))
def test_rounded_rows_stay_as_they_are_and_near_what_they_were(
    seed: int, kind: type[np.floating]
) -> None:
    rows = numbers(seed, 6, 50, decades=3.0).astype(kind)
    once = exact.rounded(rows)
    assert once.dtype == kind
    # A float64 may be rounded up to the next power of two, whose spacing is wider.
    assert kind is np.float64 or np.array_equal(exact.rounded(once), once)
    assert (np.abs(once - rows) <= 2.0**-24 * np.abs(rows).max(1, keepdims=True)).all()
