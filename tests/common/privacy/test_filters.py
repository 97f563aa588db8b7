import doctest
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilgraft.privacy import filters
from veilgraft.privacy.accounting import ORDERS, Event, epsilon, noise_multiplier, rdp_epsilon
from veilgraft.privacy.filters import (
    LifeFilter,
    filter_epsilon,
    filter_order,
    gaussian_filter_epsilon,
    renyi,
)

DELTA = 1e-5
LIFE = LifeFilter(delta=2e-5, orders=(3, 6))

SETS: dict[str, tuple[Event, ...]] = {
    "full batch": (Event(5.0, steps=100), Event(12.0)),
    "rare, little noise": (Event(0.6, 0.02, 1000),),
    "a fifth of all": (Event(1.0, 0.2, 50),),
    "one sampled step": (Event(1.0, 0.2),),
    "many weak steps": (Event(2.0, 0.001, 10_000),),
    "mixed": (Event(1.0, 0.2, 50), Event(20.0, 1.0, 10), Event(0.8, 0.01, 200), Event(5.0, 0.5)),
}
every_set = pytest.mark.parametrize("events", SETS.values(), ids=SETS.keys())
steps = st.integers(1, 1000)
full_batch = st.builds(Event, st.floats(0.5, 500), st.just(1.0), steps)
sampled = st.builds(Event, st.floats(0.5, 50), st.floats(1e-4, 0.99), steps)
full_batches = st.lists(full_batch, max_size=4)
mixtures = st.lists(full_batch | sampled, max_size=4)
few = settings(max_examples=30, deadline=None)
unhurried = settings(deadline=None)


# Numbers known beforehand.


def test_the_divergence_at_full_batch_is_known_by_hand() -> None:
    # 8 / (2 · 10²) · 50 steps, and log(7/8) - log(8e-5) / 7 for the conversion.
    assert renyi([Event(10.0, steps=50)], order=8) == pytest.approx(2.0, rel=1e-12)
    expected = 2.0 + math.log(7 / 8) - math.log(8e-5) / 7
    assert filter_epsilon([Event(10.0, steps=50)], DELTA, 8) == pytest.approx(expected, rel=1e-12)


def test_the_divergence_of_order_two_of_a_sampled_step_is_known_by_hand() -> None:
    # E[(1 - q + q e^loss)²] = 1 + q² (e^(1/σ²) - 1).
    expected = 30 * math.log1p(0.2**2 * math.expm1(1 / 1.5**2))
    assert renyi([Event(1.5, 0.2, 30)], order=2) == pytest.approx(expected, rel=1e-12)


def test_the_divergence_of_order_three_of_a_sampled_step_is_known_by_hand() -> None:
    # E[(1 - q + q e^loss)³] with E e^(k loss) = 1, e^(1/σ²), e^(3/σ²) for k = 1, 2, 3.
    q, x = 0.3, math.exp(1 / 0.8**2)
    moment = (1 - q) ** 3 + 3 * (1 - q) ** 2 * q + 3 * (1 - q) * q**2 * x + q**3 * x**3
    assert renyi([Event(0.8, 0.3)], order=3) == pytest.approx(math.log(moment) / 2, rel=1e-12)


def test_a_tiny_divergence_keeps_its_digits() -> None:
    # To first order α / 2 · q² / σ².
    assert renyi([Event(1e5, 1e-5)], order=8) == pytest.approx(4e-20, rel=1e-6)


def test_the_ends_of_the_noise_scale_diverge_by_nothing_and_infinitely() -> None:
    for rate in (0.3, 1.0):
        assert renyi([Event(1e300, rate)], order=8) == 0.0
        assert renyi([Event(1e-300, rate)], order=8) == math.inf


def test_nothing_released_costs_nothing() -> None:
    assert filter_epsilon([], DELTA, order=8) == 0.0
    assert gaussian_filter_epsilon([], DELTA) == 0.0
    assert LIFE.epsilon([], []) == 0.0


def test_a_study_chosen_late_costs_the_best_renyi_order_at_its_share() -> None:
    # An eighth of δ for each of two orders: 2.5e-6.
    late = [Event(2.0, 0.05, 200)]
    assert LIFE.epsilon([], late) == min(filter_epsilon(late, 2.5e-6, o) for o in (3, 6))
    assert LIFE.epsilon([], late) == filter_epsilon(late, 2.5e-6, 6)
    assert LIFE.epsilon([], late * 20) == filter_epsilon(late * 20, 2.5e-6, 3)


def test_a_study_after_a_release_takes_the_fixed_plan_s_price_away() -> None:
    study = [Event(2.0, 0.05, 200)]
    assert LIFE.epsilon(study, []) == epsilon(study, DELTA)
    assert LIFE.epsilon(study * 2, []) == epsilon(study * 2, DELTA)
    assert LIFE.epsilon(study, study) == LIFE.epsilon([], study * 2) > LIFE.epsilon(study * 2, [])


def test_one_sampled_step_takes_the_gaussian_price_away() -> None:
    full, step = [Event(10.0, steps=50)], [Event(20.0, 0.001)]
    assert LIFE.epsilon([], full) == gaussian_filter_epsilon(full, 5e-6)
    assert LIFE.epsilon(step, full) == filter_epsilon(step + full, 2.5e-6, 6)


# The filters of one kind.


@every_set
@pytest.mark.parametrize("order", [2, 4, 8, 32])
def test_a_filter_never_prices_below_the_plan(events: tuple[Event, ...], order: int) -> None:
    assert filter_epsilon(events, DELTA, order) >= epsilon(events, DELTA)


@every_set
def test_the_best_order_of_the_filter_is_the_renyi_accountant(events: tuple[Event, ...]) -> None:
    best = min(filter_epsilon(events, DELTA, order) for order in ORDERS)
    assert best == pytest.approx(rdp_epsilon(events, DELTA), rel=1e-10)


@unhurried
@given(mixtures, st.integers(2, 64))
def test_the_order_of_events_makes_no_difference_to_a_divergence(
    events: list[Event], order: int
) -> None:
    assert renyi(sorted(events), order) == renyi(events, order)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_merged_events_diverge_as_they_do_apart(sample_rate: float) -> None:
    apart = [Event(2.0, sample_rate, 3), Event(9.0), Event(2.0, sample_rate, 5)]
    merged = [Event(2.0, sample_rate, 8), Event(9.0)]
    assert renyi(apart, 8) == pytest.approx(renyi(merged, 8), rel=1e-12)


@pytest.mark.parametrize("cap", [0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("planned", [Event(20.0), Event(1.0, 0.2), Event(1.0, 0.02)])
def test_no_other_order_admits_noticeably_more_under_the_cap(cap: float, planned: Event) -> None:
    def admitted(order: int) -> float:
        price = filter_epsilon([Event(1.0)], DELTA, order) - renyi([Event(1.0)], order)
        return (cap - price) / renyi([planned], order)

    order = filter_order(cap, DELTA, planned)
    assert admitted(order) > 0
    assert admitted(order) >= 0.99 * max(admitted(other) for other in range(2, 200))


def test_a_full_batch_order_is_ruinous_for_rare_steps_with_little_noise() -> None:
    rare = Event(0.8137, 0.01, 1000)
    assert epsilon([rare], DELTA) == pytest.approx(3.0, rel=1e-2)
    assert filter_epsilon([rare], DELTA, filter_order(3.0, DELTA)) > 100
    assert filter_epsilon([rare], DELTA, filter_order(3.0, DELTA, rare)) < 4
    assert LifeFilter.fixed(3.0, 2 * DELTA).epsilon([], [rare]) < 6


def test_the_gaussian_filter_costs_what_the_fixed_plan_costs() -> None:
    events = [Event(10.0, steps=50), Event(7.0)]
    assert gaussian_filter_epsilon(events, DELTA) == epsilon(events, DELTA)


def test_the_gaussian_filter_takes_nothing_sampled() -> None:
    with pytest.raises(ValueError, match=r"expected sample_rate 1, got Event\(.*0\.5"):
        gaussian_filter_epsilon([Event(10.0), Event(10.0, 0.5)], DELTA)


# The filters of a ledger, side by side.


@few
@given(mixtures, mixtures)
def test_the_figure_is_never_below_the_plan_at_the_whole_delta(
    planned: list[Event], chosen: list[Event]
) -> None:
    assert LIFE.epsilon(planned, chosen) >= epsilon(planned + chosen, LIFE.delta)


@few
@given(full_batches, full_batches, full_batch)
def test_more_full_batch_events_cost_more(
    planned: list[Event], chosen: list[Event], more: Event
) -> None:
    cost = LIFE.epsilon(planned, chosen)
    assert LIFE.epsilon(planned, [*chosen, more]) >= cost
    if not chosen:
        assert LIFE.epsilon([*planned, more]) >= cost


@few
@given(mixtures, mixtures, full_batch | sampled)
def test_more_events_cost_more(planned: list[Event], chosen: list[Event], more: Event) -> None:
    cost = LIFE.epsilon(planned, chosen)
    # What the grid adds to a sampled plan depends on all events.
    allowance = 1.0 if chosen else 1 - 1e-3
    assert LIFE.epsilon(planned, [*chosen, more]) >= allowance * cost
    assert LIFE.epsilon([*planned, more], chosen) >= allowance * cost


@few
@given(mixtures, mixtures)
def test_to_be_planned_is_never_dearer_than_to_be_chosen(
    planned: list[Event], chosen: list[Event]
) -> None:
    both = LIFE.epsilon(planned + chosen)
    assert both <= LIFE.epsilon(planned, chosen)
    assert LIFE.epsilon(planned, chosen) <= LIFE.epsilon([], planned + chosen)


@few
@given(mixtures, mixtures, st.randoms())
def test_the_order_of_events_makes_no_difference(
    planned: list[Event], chosen: list[Event], shuffle: random.Random
) -> None:
    cost = LIFE.epsilon(planned, chosen)
    shuffle.shuffle(planned)
    shuffle.shuffle(chosen)
    assert LIFE.epsilon(iter(planned), iter(chosen)) == cost


@every_set
def test_a_lone_planned_study_costs_its_plan_at_half_of_delta(events: tuple[Event, ...]) -> None:
    assert LIFE.epsilon(events) == epsilon(events, LIFE.delta / 2)


@unhurried
@given(full_batches, full_batches.filter(bool))
def test_full_batch_studies_chosen_late_cost_the_closed_form_at_a_quarter_of_delta(
    planned: list[Event], chosen: list[Event]
) -> None:
    assert LIFE.epsilon(planned, chosen) == epsilon(planned + chosen, LIFE.delta / 4)


# The orders fixed for a ledger.


def _admitted(life: LifeFilter, cap: float, study: Sequence[Event]) -> int:
    count = 0
    while life.epsilon([], [e for e in study for _ in range(count + 1)]) <= cap:
        count += 1
    return count


@pytest.mark.parametrize("cap", [1.0, 3.0, 8.0, 20.0])
def test_fixed_orders_admit_most_of_what_one_chosen_in_hindsight_would(cap: float) -> None:
    # Each study costs a thirtieth of what the cap admits at its best order.
    for rate, count in ((0.02, 50), (0.1, 100)):
        sigma = noise_multiplier(cap, DELTA, steps=30 * count, sample_rate=rate)
        study = [Event(sigma, rate, count)]
        hindsight = LifeFilter(8e-5, (filter_order(cap, 2 * DELTA, study[0]),))
        assert _admitted(LifeFilter.fixed(cap, 2e-5), cap, study) >= 0.7 * _admitted(
            hindsight, cap, study
        )


@given(st.floats(0, 1e4) | st.just(math.inf), st.floats(1e-12, 0.5))
def test_orders_are_few_and_fixed_by_cap_and_delta(cap: float, delta: float) -> None:
    life = LifeFilter.fixed(cap, delta)
    assert life == LifeFilter.fixed(cap, delta)
    assert 1 <= len(life.orders) <= 2
    assert list(life.orders) == sorted(set(life.orders))


@pytest.mark.parametrize("cap", [0.0, 1e-9, 1e-3])
def test_a_tiny_cap_has_a_filter_that_admits_nothing(cap: float) -> None:
    life = LifeFilter.fixed(cap, 2e-5)
    for event in (Event(50.0), Event(5.0, 0.005, 50)):
        assert life.epsilon([event]) > cap
        assert life.epsilon([], [event]) > cap


# What is refused.


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_lies_between_zero_and_one(delta: float) -> None:
    message = "delta: expected a number between 0 and 1"
    with pytest.raises(ValueError, match=message):
        filter_epsilon([Event(1.0)], delta, 8)
    with pytest.raises(ValueError, match=message):
        gaussian_filter_epsilon([Event(1.0)], delta)
    with pytest.raises(ValueError, match=message):
        filter_order(1.0, delta)
    with pytest.raises(ValueError, match=message):
        LifeFilter(delta, (8,))
    with pytest.raises(ValueError, match=message):
        LifeFilter.fixed(1.0, delta)


@pytest.mark.parametrize("order", [1, 0, -2, 2.5])
def test_an_order_is_a_whole_number_above_one(order: int) -> None:
    with pytest.raises(ValueError, match="order: expected a whole number above 1"):
        renyi([Event(1.0)], order)
    with pytest.raises(ValueError, match="order: expected a whole number above 1"):
        LifeFilter(DELTA, (4, order))


def test_a_ledger_has_an_order() -> None:
    with pytest.raises(ValueError, match="orders: expected at least one"):
        LifeFilter(DELTA, ())


@pytest.mark.parametrize("cap", [-1.0, math.nan])
def test_a_cap_is_no_negative_number(cap: float) -> None:
    with pytest.raises(ValueError, match="max_epsilon: expected a number from 0"):
        LifeFilter.fixed(cap, DELTA)


def test_a_cap_below_any_conversion_has_no_best_order() -> None:
    with pytest.raises(ValueError, match="epsilon_cap: expected enough for one release"):
        filter_order(1e-4, DELTA)


def test_a_delta_too_small_for_the_grid_is_refused_where_steps_are_sampled() -> None:
    life = LifeFilter(1.9e-10, (8,))
    assert life.epsilon([Event(1.0)]) > 0
    with pytest.raises(ValueError, match="delta: expected at least 1e-10"):
        life.epsilon([Event(1.0, 0.5)])


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(filters)
    assert result.attempted >= 10
    assert result.failed == 0
