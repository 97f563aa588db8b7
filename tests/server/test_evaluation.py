"""What a coordinator makes of noised sums."""

import numpy as np
import pytest

from veilgraft_server.evaluation import estimate, interval


def test_without_noise_it_is_the_accuracy_and_wilsons_interval() -> None:
    found = estimate([np.array([45.0, 10.0, 60.0]), np.array([45.0, 10.0, 40.0])], 0.0, 4.0)
    assert found is not None
    assert found.accuracy == 0.9
    assert found.loss == pytest.approx(0.8)
    assert found.count == 100
    # Newcombe 1998 prints Wilson intervals; these are R's prop.test(90, 100, correct = FALSE).
    assert found.interval == pytest.approx((0.8256343, 0.9447709), abs=1e-6)


@pytest.mark.parametrize(
    ("accuracy", "count", "noise"), [(0.9, 100, 5.0), (0.5, 200, 10.0), (0.8, 1000, 20.0)]
)
def test_the_interval_holds_the_accuracy_19_times_in_20(
    accuracy: float, count: int, noise: float
) -> None:
    generator, runs, hits = np.random.default_rng(5), 4000, 0
    for _ in range(runs):
        correct = generator.binomial(count, accuracy) + noise * generator.normal()
        low, high = interval(correct, count + noise * generator.normal(), noise)
        hits += low <= accuracy <= high
    # Four standard errors of 95% over 4,000 runs are .014.
    assert hits / runs == pytest.approx(0.95, abs=0.014)


def test_more_noise_makes_a_wider_interval() -> None:
    widths = []
    for noise in (0.0, 5.0, 20.0, 60.0):
        low, high = interval(80.0, 100.0, noise)
        assert 0.0 <= low <= 0.8 <= high <= 1.0
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[-1] == 1.0


def test_where_noise_hides_everything_nothing_is_said() -> None:
    assert estimate([np.array([3.0, 1.0, 4.0])], 10.0, 4.0) is None
    assert estimate([np.array([-3.0, 1.0, -4.0])], 1.0, 4.0) is None
    assert estimate([], 1.0, 4.0) is None


@pytest.mark.parametrize("correct", [-30.0, 130.0])
def test_an_accuracy_is_one_whatever_the_noise_did(correct: float) -> None:
    found = estimate([np.array([correct, -50.0, 100.0])], 10.0, 4.0)
    assert found is not None
    assert found.interval is not None
    assert 0.0 <= found.interval[0] <= found.accuracy <= found.interval[1] <= 1.0
    assert found.loss == 0.0
