import doctest
import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import (
    Adjacency,
    Event,
    epsilon,
    epsilons,
    filter_epsilon,
    filter_order,
    gaussian_filter_epsilon,
    noise_multiplier,
    rdp_epsilon,
    renyi,
)

DELTA = 1e-5
PRICER = Path(__file__).with_name("independent_pricer.py")

MIXED = (
    Event(1.0, 0.2, 50),
    Event(20.0, 1.0, 10),
    Event(0.8, 0.01, 200),
    Event(5.0, 0.5, 20),
    Event(12.0),
)
FIFTY = tuple(
    Event(0.8 + 0.3 * k, 1.0 if k % 3 == 0 else round(0.01 + 0.009 * k, 3), 1 + 7 * k % 90)
    for k in range(50)
)
SETS: dict[str, tuple[Event, ...]] = {
    "full batch": (Event(5.0, steps=100),),
    "rare, many steps": (Event(0.6, 0.02, 1000),),
    "rare, more noise": (Event(1.0, 0.02, 1000),),
    "half of all": (Event(5.0, 0.5, 200),),
    "a fifth of all": (Event(1.0, 0.2, 50),),
    "one sampled step": (Event(1.0, 0.2),),
    "many weak steps": (Event(2.0, 0.001, 10_000),),
    "mixed": MIXED,
    "fifty": FIFTY,
}
every_set = pytest.mark.parametrize("events", SETS.values(), ids=SETS.keys())
noises = st.floats(0.05, 500)
steps = st.integers(1, 2000)
deltas = st.floats(1e-12, 0.1)
# The first example imports SciPy, which takes longer than hypothesis allows one.
unhurried = settings(deadline=None)


def _pricer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("independent_pricer", PRICER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _price_independently(events: Sequence[Event], delta: float = DELTA) -> float:
    plan = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    return float(_pricer().epsilon(plan, delta))


# Numbers known beforehand.


@pytest.mark.parametrize(
    ("event", "expected"),
    [(Event(5.0, steps=100), 9.997), (Event(10.0, steps=50), 2.943)],
)
def test_full_batch_steps_cost_the_exact_value(event: Event, expected: float) -> None:
    assert epsilon([event], DELTA) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event(0.6, 0.02, 1000), 14.04),
        (Event(1.0, 0.02, 1000), 3.90),
        (Event(5.0, 0.5, 200), 6.70),
        (Event(1.0, 0.2, 50), 10.13),
    ],
)
def test_sampled_steps_cost_the_known_value(event: Event, expected: float) -> None:
    assert epsilon([event], DELTA) == pytest.approx(expected, abs=6e-3)


def test_replacing_a_sampled_unit_is_priced_by_its_own_relation() -> None:
    cost = epsilon([Event(1.0, 0.2, 50)], DELTA, Adjacency.REPLACE_ONE)
    assert cost == pytest.approx(15.41, abs=6e-3)


@pytest.mark.parametrize(("added", "replaced"), [(1.0, 2.15), (3.0, 6.71), (8.0, 19.1)])
def test_replacing_a_unit_at_full_batch_doubles_mu(added: float, replaced: float) -> None:
    event = Event(noise_multiplier(added, DELTA, steps=50), steps=50)
    cost = epsilon([event], DELTA, Adjacency.REPLACE_ONE)
    assert cost == pytest.approx(replaced, rel=3e-3)
    halved = Event(event.noise_multiplier / 2, steps=50)
    assert cost == pytest.approx(epsilon([halved], DELTA), rel=1e-12)


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_the_closed_form_satisfies_its_own_equation(mu: float, delta: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    eps = mpmath.mpf(epsilon([Event(1 / mu)], delta))
    with mpmath.workdps(60):
        mu = 1 / mpmath.mpf(1 / mu)
        below, above = mpmath.ncdf(mu / 2 - eps / mu), mpmath.ncdf(-mu / 2 - eps / mu)
        reached = float(below - mpmath.exp(eps) * above)
    if eps == 0:
        assert reached <= delta
    else:
        assert reached == pytest.approx(delta, rel=1e-6)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0.0
    assert rdp_epsilon([], DELTA) == 0.0
    assert filter_epsilon([], DELTA, order=8) == 0.0
    assert gaussian_filter_epsilon([], DELTA) == 0.0


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("adjacency", Adjacency)
def test_the_ends_of_the_noise_scale_cost_nothing_and_infinity(
    sample_rate: float, adjacency: Adjacency
) -> None:
    assert epsilon([Event(1e300, sample_rate, 50)], DELTA, adjacency) == 0.0
    assert epsilon([Event(1e7, sample_rate, 50)], DELTA, adjacency) == 0.0
    assert epsilon([Event(1e-300, sample_rate)], DELTA, adjacency) == math.inf
    assert 1e5 < epsilon([Event(0.002, sample_rate)], DELTA, adjacency) < 1e6


# The same prices by another road.


@every_set
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_an_independent_pricer_agrees(events: tuple[Event, ...], delta: float) -> None:
    expected = _price_independently(events, delta)
    assert expected > 0
    assert epsilon(events, delta) == pytest.approx(expected, rel=2e-3)


def test_the_independent_pricer_runs_as_a_script() -> None:
    lines = "".join(f"{e.noise_multiplier} {e.sample_rate} {e.steps}\n" for e in MIXED)
    run = subprocess.run(
        [sys.executable, str(PRICER), str(DELTA)],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) == pytest.approx(epsilon(MIXED, DELTA), rel=2e-3)


@every_set
def test_renyi_accounting_is_above_by_a_bounded_part(events: tuple[Event, ...]) -> None:
    assert epsilon(events, DELTA) <= rdp_epsilon(events, DELTA) <= 1.8 * epsilon(events, DELTA)


@pytest.mark.parametrize(
    "event",
    [
        Event(5.0, steps=100),
        Event(1.0, 0.2, 50),
        Event(5.0, 0.5, 200),
        Event(1.3, 0.05, 200),
        Event(1.0, 0.02, 250),
        Event(2.5, 0.02, 1000),
    ],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_renyi_accounting_is_at_most_a_quarter_above_in_ordinary_plans(
    event: Event, delta: float
) -> None:
    cost = epsilon([event], delta)
    assert cost <= rdp_epsilon([event], delta) <= 1.25 * cost


def test_the_grid_never_prices_below_the_exact_value() -> None:
    for sigma in (0.5, 2.0, 10.0, 60.0):
        full = Event(sigma, steps=20)
        exact = epsilon([full], DELTA)
        # The second event costs next to nothing and takes the first one off the closed form.
        on_grid = epsilon([full, Event(1e6, 0.5)], DELTA)
        assert exact <= on_grid <= 1.002 * exact


def test_steps_that_leak_next_to_nothing_are_not_priced_at_the_grid() -> None:
    # Any fixed grid of 1e-3 would come out 29% above here.
    events = [Event(2.0, 0.001, 10_000)]
    assert epsilon(events, DELTA) == pytest.approx(_price_independently(events), rel=2e-3)


# Properties.


@unhurried
@given(noises, steps, deltas)
def test_more_noise_costs_less(sigma: float, count: int, delta: float) -> None:
    cost = epsilon([Event(sigma, steps=count)], delta)
    assert epsilon([Event(1.01 * sigma, steps=count)], delta) <= cost
    if 0 < cost < math.inf:
        assert epsilon([Event(1.01 * sigma, steps=count)], delta) < cost


@unhurried
@given(noises, steps, deltas, noises)
def test_more_steps_and_more_events_cost_more(
    sigma: float, count: int, delta: float, other: float
) -> None:
    cost = epsilon([Event(sigma, steps=count)], delta)
    assert epsilon([Event(sigma, steps=count + 1)], delta) >= cost
    assert epsilon([Event(sigma, steps=count), Event(other)], delta) >= cost
    assert epsilon([Event(sigma, steps=count)], delta, Adjacency.REPLACE_ONE) >= cost


@unhurried
@given(noises, steps, deltas)
def test_a_larger_delta_costs_less_epsilon(sigma: float, count: int, delta: float) -> None:
    events = [Event(sigma, steps=count)]
    assert epsilon(events, 2 * delta) <= epsilon(events, delta)


@unhurried
@given(st.lists(st.builds(Event, noises, st.just(1.0), steps), max_size=8), st.randoms())
def test_full_batch_events_cost_the_same_in_any_order(events: list[Event], random: object) -> None:
    assert epsilon(sorted(events), DELTA) == epsilon(events, DELTA)
    assert renyi(sorted(events), 8) == renyi(events, 8)


@pytest.mark.parametrize("adjacency", Adjacency)
def test_sampled_events_cost_the_same_in_any_order(adjacency: Adjacency) -> None:
    assert epsilon(MIXED[::-1], DELTA, adjacency) == epsilon(MIXED, DELTA, adjacency)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_merged_events_cost_what_they_cost_apart(sample_rate: float) -> None:
    apart = [Event(2.0, sample_rate, 3), Event(9.0), Event(2.0, sample_rate, 5)]
    merged = [Event(2.0, sample_rate, 8), Event(9.0)]
    assert epsilon(apart, DELTA) == epsilon(merged, DELTA)
    assert filter_epsilon(apart, DELTA, 8) == pytest.approx(filter_epsilon(merged, DELTA, 8))


@pytest.mark.parametrize("sample_rate", [0.01, 0.2, 0.9])
def test_sampling_costs_less_than_taking_everyone(sample_rate: float) -> None:
    assert epsilon([Event(1.5, sample_rate, 40)], DELTA) < epsilon([Event(1.5, 1.0, 40)], DELTA)


# The running ε of a plan.


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize("event", [Event(1.0, 0.2, 5), Event(10.0, steps=2), Event(3.0, 0.01, 100)])
def test_running_values_are_those_of_the_rounds_so_far(event: Event, adjacency: Adjacency) -> None:
    running = epsilons(event, 10, DELTA, adjacency)
    expected = [
        epsilon(
            [Event(event.noise_multiplier, event.sample_rate, event.steps * k)], DELTA, adjacency
        )
        for k in range(1, 11)
    ]
    assert running == pytest.approx(expected, rel=1e-6)
    assert running == sorted(running)


def test_no_rounds_have_no_running_values() -> None:
    assert epsilons(Event(1.0, 0.2), 0, DELTA) == []


# Solving for noise.


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 100), st.floats(1e-10, 1e-2), steps)
def test_full_batch_noise_is_the_smallest_that_holds(
    target: float, delta: float, count: int
) -> None:
    sigma = noise_multiplier(target, delta, steps=count)
    assert epsilon([Event(sigma, steps=count)], delta) <= target
    assert epsilon([Event(sigma * (1 - 1e-9), steps=count)], delta) > target


@pytest.mark.parametrize(
    ("target", "delta", "sample_rate", "count"),
    [
        (1.0, 1e-5, 0.2, 50),
        (8.0, 1e-5, 0.2, 50),
        (3.0, 1e-6, 0.01, 1000),
        (0.5, 1e-5, 0.5, 20),
        (2.0, 1e-7, 0.05, 1),
    ],
)
def test_sampled_noise_is_the_smallest_that_holds(
    target: float, delta: float, sample_rate: float, count: int
) -> None:
    sigma = noise_multiplier(target, delta, steps=count, sample_rate=sample_rate)
    assert epsilon([Event(sigma, sample_rate, count)], delta) <= target
    assert epsilon([Event(sigma * 0.999, sample_rate, count)], delta) > target


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
@pytest.mark.parametrize("fixed", [(Event(40.0, steps=10),), (Event(40.0), Event(6.0, 0.1, 10))])
def test_noise_leaves_room_for_what_is_already_planned(
    sample_rate: float, fixed: tuple[Event, ...]
) -> None:
    alone = noise_multiplier(2.0, DELTA, steps=30, sample_rate=sample_rate)
    sigma = noise_multiplier(2.0, DELTA, steps=30, sample_rate=sample_rate, fixed=fixed)
    assert sigma > alone
    assert epsilon([*fixed, Event(sigma, sample_rate, 30)], DELTA) <= 2.0
    assert epsilon([*fixed, Event(sigma * 0.999, sample_rate, 30)], DELTA) > 2.0


def test_a_plan_that_leaves_nothing_of_the_target_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"fixed: expected to cost less than 1\.0, costs 10\.1"):
        noise_multiplier(1.0, DELTA, steps=5, fixed=[Event(1.0, 0.2, 50)])


def test_a_sample_rate_below_delta_needs_next_to_no_noise() -> None:
    sigma = noise_multiplier(1.0, DELTA, steps=1, sample_rate=1e-6)
    assert 0 < sigma <= 0.01
    assert epsilon([Event(sigma, 1e-6)], DELTA) <= 1.0


# Filters for adaptive choices.


@every_set
@pytest.mark.parametrize("order", [2, 4, 8, 32])
def test_a_filter_never_prices_below_the_plan(events: tuple[Event, ...], order: int) -> None:
    assert filter_epsilon(events, DELTA, order) >= epsilon(events, DELTA)


@every_set
def test_the_best_order_of_the_filter_is_the_renyi_accountant(events: tuple[Event, ...]) -> None:
    best = min(filter_epsilon(events, DELTA, order) for order in accounting._ORDERS)
    assert best == pytest.approx(rdp_epsilon(events, DELTA), rel=1e-12)


def test_the_divergence_at_full_batch_is_known_by_hand() -> None:
    # 8 / (2 · 10²) · 50 steps, and log(7/8) - log(8e-5) / 7 for the conversion.
    assert renyi([Event(10.0, steps=50)], order=8) == pytest.approx(2.0, rel=1e-12)
    expected = 2.0 + math.log(7 / 8) - math.log(8e-5) / 7
    assert filter_epsilon([Event(10.0, steps=50)], DELTA, 8) == pytest.approx(expected, rel=1e-12)


def test_the_divergence_of_order_two_of_a_sampled_step_is_known_by_hand() -> None:
    # E[(1 - q + q e^loss)²] = 1 + q² (e^(1/σ²) - 1).
    expected = 30 * math.log1p(0.2**2 * math.expm1(1 / 1.5**2))
    assert renyi([Event(1.5, 0.2, 30)], order=2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cap", [0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("planned", [Event(20.0), Event(1.0, 0.2), Event(1.0, 0.02)])
def test_no_other_order_admits_noticeably_more_under_the_cap(cap: float, planned: Event) -> None:
    def admitted(order: int) -> float:
        at_cap = cap - (filter_epsilon([Event(1.0)], DELTA, order) - renyi([Event(1.0)], order))
        return at_cap / renyi([planned], order)

    order = filter_order(cap, DELTA, planned)
    assert admitted(order) > 0
    assert admitted(order) >= 0.99 * max(admitted(other) for other in range(2, 200))


def test_a_full_batch_order_is_ruinous_for_rare_steps_with_little_noise() -> None:
    rare = Event(0.8137, 0.01, 1000)
    assert epsilon([rare], DELTA) == pytest.approx(3.0, rel=1e-2)
    assert filter_epsilon([rare], DELTA, filter_order(3.0, DELTA)) > 100
    assert filter_epsilon([rare], DELTA, filter_order(3.0, DELTA, rare)) < 4


def test_the_gaussian_filter_costs_what_the_fixed_plan_costs() -> None:
    events = [Event(10.0, steps=50), Event(7.0)]
    assert gaussian_filter_epsilon(events, DELTA) == epsilon(events, DELTA)


def test_the_gaussian_filter_takes_nothing_sampled() -> None:
    with pytest.raises(ValueError, match=r"expected sample_rate 1, got Event\(.*0\.5"):
        gaussian_filter_epsilon([Event(10.0), Event(10.0, 0.5)], DELTA)


# What is refused.


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_an_event_has_finite_noise_above_zero(sigma: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier: expected a finite number above 0"):
        Event(sigma)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_an_event_has_a_sample_rate_up_to_one(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate: expected a number above 0 and at most 1"):
        Event(1.0, rate)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_an_event_has_a_whole_number_of_steps(count: int) -> None:
    with pytest.raises(ValueError, match="steps: expected a whole number above 0"):
        Event(1.0, 0.5, count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_lies_between_zero_and_one(delta: float) -> None:
    for price in (epsilon, rdp_epsilon, gaussian_filter_epsilon):
        with pytest.raises(ValueError, match="delta: expected a number between 0 and 1"):
            price([Event(1.0)], delta)
    with pytest.raises(ValueError, match="delta: expected a number between 0 and 1"):
        filter_epsilon([Event(1.0)], delta, 8)


def test_a_delta_too_small_for_the_grid_is_refused_where_steps_are_sampled() -> None:
    assert epsilon([Event(1.0)], 1e-12) > 0
    with pytest.raises(ValueError, match="delta: expected at least 1e-10"):
        epsilon([Event(1.0, 0.5)], 1e-12)


@pytest.mark.parametrize("order", [1, 0, -2, 2.5])
def test_an_order_is_a_whole_number_above_one(order: int) -> None:
    with pytest.raises(ValueError, match="order: expected a whole number above 1"):
        renyi([Event(1.0)], order)


def test_a_target_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="target_epsilon: expected a number above 0"):
        noise_multiplier(0.0, DELTA, steps=1)


def test_a_cap_below_any_conversion_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon_cap: expected enough for one release"):
        filter_order(1e-4, DELTA)


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(accounting)
    assert result.attempted >= 11
    assert result.failed == 0
