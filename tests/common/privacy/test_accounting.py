import doctest
import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import (
    Adjacency,
    Event,
    epsilon,
    epsilons,
    noise_multiplier,
    rdp_epsilon,
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


def test_sites_that_spend_alike_are_priced_once() -> None:
    spent = [Event(1.234, 0.2, 5), Event(2.345, 0.1), Event(1.234, 0.2, 5)]
    first, before = epsilon(spent, DELTA), accounting._sampled.cache_info()
    assert epsilon(spent[::-1], DELTA) == first
    after = accounting._sampled.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


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
    assert epsilons([[], []], DELTA) == [0.0, 0.0]


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("adjacency", Adjacency)
def test_the_ends_of_the_noise_scale_cost_nothing_and_infinity(
    sample_rate: float, adjacency: Adjacency
) -> None:
    assert epsilon([Event(1e300, sample_rate, 50)], DELTA, adjacency) == 0.0
    assert epsilon([Event(1e7, sample_rate, 50)], DELTA, adjacency) == 0.0
    assert epsilon([Event(1e-300, sample_rate)], DELTA, adjacency) == math.inf
    assert 1e5 < epsilon([Event(0.002, sample_rate)], DELTA, adjacency) < 1e6


def test_a_price_near_seven_hundred_is_finite_though_its_exponential_is_no_float() -> None:
    below, at, above = (epsilon([Event(0.3, 0.33, count)], 1e-8) for count in (296, 308, 316))
    assert 690 < below < 700 < 710 < at < 720 < above < 740


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


@st.composite
def _ordinary(draw: st.DrawFn) -> Event:
    """Draw an event of the region in which `rdp_epsilon` promises to be close."""
    rate = draw(st.just(1.0) | st.floats(0.02, 0.99))
    count = math.ceil(5 / rate * draw(st.floats(1, 40)))
    return Event(draw(st.floats(0.9, 200)), rate, count)


@settings(max_examples=40, deadline=None)
@given(st.lists(_ordinary(), min_size=1, max_size=4), st.floats(1e-8, 1e-5))
def test_renyi_accounting_is_at_most_a_quarter_above_in_ordinary_mixtures(
    events: list[Event], delta: float
) -> None:
    cost, checked = epsilon(events, delta), rdp_epsilon(events, delta)
    assert cost <= checked
    if 0.05 <= cost <= 10:
        assert checked <= 1.25 * cost


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.builds(Event, st.floats(0.3, 100), st.floats(1e-4, 1), steps), max_size=6),
    st.floats(1e-8, 0.01),
)
def test_renyi_accounting_of_any_mixture_is_never_below(events: list[Event], delta: float) -> None:
    assert epsilon(events, delta) <= rdp_epsilon(events, delta)


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 6.0, 1e3])
@pytest.mark.parametrize("sample_rate", [1e-4, 0.02, 0.4, 0.99, 1.0])
def test_one_step_leaks_what_the_library_finds_point_by_point(
    sigma: float, sample_rate: float, adjacency: Adjacency
) -> None:
    relation = {
        Adjacency.ADD_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
        Adjacency.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
    }[adjacency]
    expected = from_gaussian_mechanism(
        sigma,
        value_discretization_interval=0.01 / sigma,
        sampling_prob=sample_rate,
        neighboring_relation=relation,
    )
    found = accounting._one_step_loss(Event(sigma, sample_rate), 0.01 / sigma, adjacency)
    # Below 0 it is the unit added that leaks more.
    for loss in (-0.5 / sigma, -0.003 / sigma, 0.0, 0.03 / sigma, 0.5 / sigma, 2 / sigma):
        assert found.get_delta_for_epsilon(loss) == pytest.approx(
            expected.get_delta_for_epsilon(loss), rel=1e-9, abs=1e-14
        )


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


@pytest.mark.parametrize("adjacency", Adjacency)
def test_sampled_events_cost_the_same_in_any_order(adjacency: Adjacency) -> None:
    assert epsilon(MIXED[::-1], DELTA, adjacency) == epsilon(MIXED, DELTA, adjacency)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_merged_events_cost_what_they_cost_apart(sample_rate: float) -> None:
    apart = [Event(2.0, sample_rate, 3), Event(9.0), Event(2.0, sample_rate, 5)]
    merged = [Event(2.0, sample_rate, 8), Event(9.0)]
    assert epsilon(apart, DELTA) == epsilon(merged, DELTA)


@pytest.mark.parametrize("sample_rate", [0.01, 0.2, 0.9])
def test_sampling_costs_less_than_taking_everyone(sample_rate: float) -> None:
    assert epsilon([Event(1.5, sample_rate, 40)], DELTA) < epsilon([Event(1.5, 1.0, 40)], DELTA)


# The running ε of a plan.


UPDATE, EVALUATION, LABEL_COUNTS = Event(1.3, 0.05, 20), Event(60.0), Event(30.0)
PLANS: dict[str, list[list[Event]]] = {
    "sampled": [[Event(1.0, 0.2, 5)]] * 8,
    "full batch": [[Event(10.0, steps=2), LABEL_COUNTS], *[[Event(10.0, steps=2)]] * 7],
    "full batch, then sampled": [[EVALUATION]] * 2 + [[UPDATE]] * 2 + [[EVALUATION]],
    "sampled and evaluated": [[LABEL_COUNTS, UPDATE], [UPDATE], [UPDATE, EVALUATION]] * 3,
    "finer and coarser grids": [
        *[[Event(4.0, 0.01, 300)]] * 3,
        [Event(0.8, 0.3, 2)],
        *[[Event(4.0, 0.01, 300)]] * 2,
        [Event(0.05)],
    ],
}


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize("rounds", PLANS.values(), ids=PLANS.keys())
def test_running_values_are_those_of_the_rounds_so_far(
    rounds: list[list[Event]], adjacency: Adjacency
) -> None:
    running = epsilons(rounds, DELTA, adjacency)
    so_far = [chain.from_iterable(rounds[:k]) for k in range(1, 1 + len(rounds))]
    expected = [epsilon(events, DELTA, adjacency) for events in so_far]
    assert running == pytest.approx(expected, rel=1e-8)
    assert running == sorted(running)


def test_running_values_at_full_batch_are_exact() -> None:
    first, second = [LABEL_COUNTS, Event(10.0)], [Event(7.0), EVALUATION]
    expected = [epsilon(first, DELTA), epsilon(first + second, DELTA)]
    assert epsilons([first, second], DELTA) == expected


def test_the_plan_with_finer_and_coarser_grids_has_both() -> None:
    rounds = PLANS["finer and coarser grids"]
    totals = [accounting._merged(chain.from_iterable(rounds[:k])) for k in (1, 3, 4, 6, 7)]
    intervals = [accounting._interval(*total) for total in totals]
    assert intervals[0] == intervals[1] < intervals[2] == intervals[3] < intervals[4]


def test_a_hundred_mixed_rounds_run_up_to_the_price_of_the_plan() -> None:
    rounds = [
        [LABEL_COUNTS, UPDATE],
        *([UPDATE, EVALUATION] if k % 5 else [UPDATE] for k in range(99)),
    ]
    plan = chain.from_iterable(rounds)
    assert epsilons(rounds, 1e-8)[-1] == pytest.approx(epsilon(plan, 1e-8), rel=1e-6)


@pytest.mark.parametrize("event", [Event(10.0), UPDATE])
def test_a_round_without_events_costs_nothing_more(event: Event) -> None:
    before, first, idle, second = epsilons([[], [event], [], [event]], DELTA)
    assert before == 0.0
    assert idle == first == epsilon([event], DELTA)
    assert second > first


def test_a_round_beyond_any_bound_leaves_the_rest_unbounded() -> None:
    rounds = [[UPDATE], [Event(1e-5, 0.5)], [UPDATE], [Event(1e-300, 0.5)]]
    assert epsilons(rounds, DELTA) == [epsilon([UPDATE], DELTA), *[math.inf] * 3]


def test_no_rounds_have_no_running_values() -> None:
    assert epsilons([], DELTA) == []


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
    for price in (epsilon, rdp_epsilon):
        with pytest.raises(ValueError, match="delta: expected a number between 0 and 1"):
            price([Event(1.0)], delta)
    with pytest.raises(ValueError, match="delta: expected a number between 0 and 1"):
        epsilons([[Event(1.0)]], delta)


def test_a_delta_too_small_for_the_grid_is_refused_where_steps_are_sampled() -> None:
    assert epsilon([Event(1.0)], 1e-12) > 0
    with pytest.raises(ValueError, match="delta: expected at least 1e-10"):
        epsilon([Event(1.0, 0.5)], 1e-12)
    with pytest.raises(ValueError, match="delta: expected at least 1e-10"):
        epsilons([[Event(1.0)], [Event(1.0, 0.5)]], 1e-12)


def test_a_target_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="target_epsilon: expected a number above 0"):
        noise_multiplier(0.0, DELTA, steps=1)


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(accounting)
    assert result.attempted >= 9
    assert result.failed == 0
