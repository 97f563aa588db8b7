"""What noised releases cost: events in, ε out.

An `Event` says what happened; the functions here price it. A unit's contribution has norm at most
1, the noise has standard deviation `noise_multiplier`, and ε is for *add-or-remove-one*
neighbours unless it says otherwise. It is always an upper bound: exact to rounding where nothing
is sampled, else from a privacy loss distribution (PLD) rounded against us, which comes out about
0.1% high.

All events' settings are fixed in advance here; `filters.py` prices those that may depend on
earlier results. `rdp_epsilon` cross-checks.

| events | ε |
|---|---|
| none, or noise so strong that δ alone covers them | 0 |
| noise so weak that ε would be beyond ten million (sampled) or a float (full batch) | infinity |
| a release without noise, or noise that is NaN or infinite | no `Event`: `ValueError` |
"""

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Adjacency(enum.Enum):
    """Which two data sets an ε keeps apart: one unit more or less, or one unit exchanged."""

    ADD_REMOVE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


@dataclass(frozen=True, order=True)
class Event:
    """So many steps of the Gaussian mechanism, each on a Poisson sample.

    Attributes:
        noise_multiplier: the noise's standard deviation over the clip norm.
        sample_rate: the probability with which each unit takes part in a step; 1 is full batch.
        steps: how often.

    Raises:
        ValueError: where a value is out of range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier: expected a finite number above 0, got {self.noise_multiplier!r}"
            )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(
                f"sample_rate: expected a number above 0 and at most 1, got {self.sample_rate!r}"
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected a whole number above 0, got {self.steps!r}")


# The library squares it; noise beyond is priced as if it were this.
_MOST_NOISE = 1e9
# e to the power of the grid's interval must stay a float.
_WIDEST = 512.0
# Above any loss on such a grid.
_BEYOND = 1e9
# Whole orders, for which the sampled Gaussian's divergence is a finite sum; about 9% apart.
ORDERS = tuple(sorted({round(2 ** (k / 8)) for k in range(8, 73)}))


def epsilon(
    events: Iterable[Event], delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE
) -> float:
    """Return an ε such that all `events` together are (ε, `delta`)-differentially private.

    The events' settings must have been fixed before the first of them; their order makes no
    difference, to the last bit. Where nothing is sampled the value is exact, and replace-one
    doubles μ. Else it is a PLD, put on a grid (Doroshenko et al. 2022, *Connect the Dots*) and
    composed by dp-accounting, with all full-batch events as one Gaussian; replace-one is then the
    library's relation of that name.

    Raises:
        ValueError: `delta` outside (0, 1), or below 1e-10 where something is sampled: there the
            rounding of the Fourier transform would show.

    >>> round(epsilon([Event(10.0, steps=50)], delta=1e-5), 3)
    2.943
    >>> round(epsilon([Event(1.0, 0.2, 50)], delta=1e-5), 2)
    10.13
    >>> round(epsilon([Event(1.0, 0.2, 50)], delta=1e-5, adjacency=Adjacency.REPLACE_ONE), 2)
    15.41
    """
    mu, sampled = _merged(events)
    _check_delta(delta, sampled)
    return _sampled(mu, sampled, delta, adjacency) if sampled else _exact(mu, delta, adjacency)


# The sites of a simulation spend alike, and each is priced.
@lru_cache(maxsize=256)
def _sampled(mu: float, sampled: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float:
    interval = _interval(mu, sampled)
    if interval > _WIDEST:
        return math.inf
    loss = _composed([_event_loss(event, interval, adjacency) for event in sampled])
    return _with_gaussian(loss, mu, delta, interval, adjacency)


def epsilons(
    rounds: Sequence[Sequence[Event]], delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE
) -> list[float]:
    """Return the running ε after each of `rounds`, which hold each round's events.

    Entry k is the `epsilon` of all events of the first k rounds: to the last bit where nothing is
    sampled, else, on the same grid, to a relative 1e-5 for up to a thousand rounds and a `delta`
    of 1e-8 or more. A round without events costs nothing more. As sampled ε are high by an amount
    that depends on all events, a round that costs next to nothing can lower the value, by less
    than that 0.1%.

    Raises:
        ValueError: as `epsilon`.

    >>> [round(e, 2) for e in epsilons([[Event(10.0)]] * 3, delta=1e-5)]
    [0.34, 0.5, 0.62]
    >>> plan = [[Event(20.0), Event(1.0, 0.1, 5)], [], [Event(1.0, 0.1, 5), Event(30.0)]]
    >>> [round(e, 2) for e in epsilons(plan, delta=1e-5)]
    [2.36, 2.36, 2.86]
    """
    totals = [_merged(chain.from_iterable(rounds[: k + 1])) for k in range(len(rounds))]
    _check_delta(delta, [event for _, sampled in totals for event in sampled])
    running = [math.inf if sampled else _exact(mu, delta, adjacency) for mu, sampled in totals]
    intervals = [_interval(*total) if total[1] else math.inf for total in totals]
    for interval in set(intervals):
        if interval <= _WIDEST:
            losses = _running_losses(rounds, interval, adjacency)
            for k, loss in enumerate(islice(losses, _last(intervals, interval))):
                if intervals[k] == interval:
                    running[k] = _with_gaussian(loss, totals[k][0], delta, interval, adjacency)
    return running


def noise_multiplier(
    target_epsilon: float,
    delta: float,
    *,
    steps: int,
    sample_rate: float = 1.0,
    fixed: Sequence[Event] = (),
) -> float:
    """Return the smallest noise with which `steps` steps and `fixed` cost at most the target.

    It is never too small: `epsilon` of the plan is at most `target_epsilon`. It is too large by
    less than 0.1%, and by rounding alone where nothing is sampled. Where `delta` covers even
    steps with next to no noise, it is about 0.01.

    Args:
        target_epsilon: the ε of the whole plan, above 0.
        delta: the δ of the whole plan.
        steps: how many steps there will be in all.
        sample_rate: the probability with which each unit takes part in a step.
        fixed: what else the plan holds, with its noise already chosen.

    Raises:
        ValueError: a value is out of range, or `fixed` leaves nothing of the target.

    >>> round(noise_multiplier(3.0, 1e-5, steps=50), 3)
    9.833
    >>> round(noise_multiplier(3.0, 1e-5, steps=50, fixed=[Event(20.0, steps=10)]), 3)
    10.08
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon: expected a number above 0, got {target_epsilon!r}")

    def excess(sigma: float) -> float:
        return epsilon([*fixed, Event(sigma, sample_rate, steps)], delta) - target_epsilon

    spent = epsilon(fixed, delta)
    left = _gaussian_mu(target_epsilon, delta) ** 2 - _gaussian_mu(spent, delta) ** 2
    if spent >= target_epsilon or left <= 0:
        raise ValueError(f"fixed: expected to cost less than {target_epsilon}, costs {spent}")
    if sample_rate == 1 and all(event.sample_rate == 1 for event in fixed):
        return _smallest(lambda sigma: excess(sigma) <= 0, 1.001 * math.sqrt(steps / left))
    # The central limit of many sampled steps (Bu, Dong, Long & Su 2020) is a good first guess.
    return _crossing(excess, 1 / math.sqrt(math.log1p(left / steps / sample_rate**2)))


def rdp_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return the ε that dp-accounting's Rényi accountant gives at its best whole order.

    A cross-check on `epsilon` by another road, never below it. It is at most 25% above where
    `delta` is at most 1e-5, ε from 0.05 to 10, and each event has noise of at least 0.9, a sample
    rate of at least 0.02 and five steps or more, on average, for each unit; where few are sampled
    under little noise, up to 80% has been seen.

    >>> round(rdp_epsilon([Event(10.0, steps=50)], delta=1e-5), 2)
    3.19
    """
    _check_delta(delta)
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS)
    for event in events:
        accountant.compose(_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def _check_delta(delta: float, sampled: Sequence[Event] = ()) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta!r}")
    if sampled and delta < 1e-10:
        raise ValueError(f"delta: expected at least 1e-10 for sampled steps, got {delta!r}")


def _merged(events: Iterable[Event]) -> tuple[float, tuple[Event, ...]]:
    """Return μ of all full-batch events and, sorted, one event for each sampled mechanism."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    merged = sorted(Event(sigma, rate, count) for (sigma, rate), count in steps.items())
    mus = [math.sqrt(e.steps) / e.noise_multiplier for e in merged if e.sample_rate == 1]
    return math.hypot(*mus), tuple(event for event in merged if event.sample_rate < 1)


# --- Gaussian differential privacy: Balle & Wang 2018, Theorem 8; Dong, Roth & Su 2022.


def _log_delta(mu: float, eps: float) -> float:
    """Return log(Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ))."""
    from scipy.special import erfcx, log_ndtr

    a, b = mu / 2 - eps / mu, mu / 2 + eps / mu
    first = float(log_ndtr(a))
    # e^ε Φ(-b) = exp(-a²/2) erfcx(b/√2) / 2, without the large terms that would cancel.
    second = -a * a / 2 + math.log(float(erfcx(b / math.sqrt(2))) / 2)
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


def _exact(mu: float, delta: float, adjacency: Adjacency) -> float:
    return _gaussian_epsilon(2 * mu if adjacency is Adjacency.REPLACE_ONE else mu, delta)


def _gaussian_epsilon(mu: float, delta: float) -> float:
    log_delta = math.log(delta)
    # Φ(-t) ≤ exp(-t²/2) puts ε below this.
    above = mu * mu / 2 + mu * math.sqrt(-2 * log_delta)
    if mu == 0 or math.isinf(above):
        return above
    if _log_delta(mu, 0.0) <= log_delta:
        return 0.0
    return _smallest(lambda eps: _log_delta(mu, eps) <= log_delta, above)


def _gaussian_mu(eps: float, delta: float) -> float:
    """Return the largest μ that is (ε, δ)-differentially private; 0 for ε = 0."""
    if eps == 0:
        return 0.0
    log_delta = math.log(delta)
    tail = math.sqrt(-2 * log_delta)
    above = (math.sqrt(tail * tail + 2 * eps) + tail) / (2 * eps)
    return 1 / _smallest(lambda sigma: _log_delta(1 / sigma, eps) <= log_delta, above)


def _smallest(holds: Callable[[float], bool], high: float) -> float:
    """Return by bisection the least number from which on `holds` is true, likely below `high`."""
    while not holds(high):
        high *= 2
    low = 0.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# --- Privacy loss distributions, from dp-accounting.


def _crossing(excess: Callable[[float], float], near: float) -> float:
    """Return at most 0.03% beyond where the falling `excess` crosses zero, never before it."""
    from scipy.optimize import brentq

    low, high, stride = near, near, 1.05
    while excess(high) > 0:
        low, high, stride = high, high * stride, stride**2
    while excess(low) <= 0:
        low, high, stride = low / stride, low, stride**2
        if high < 0.01:
            return high
    root = brentq(lambda x: excess(math.exp(x)), math.log(low), math.log(high), xtol=1e-4)
    while excess(math.exp(root)) > 0:
        root += 1e-4
    return math.exp(root)


def _composed(losses: Iterable[Any]) -> Any:
    return reduce(lambda total, loss: total.compose(loss), losses)


def _with_gaussian(
    loss: Any, mu: float, delta: float, interval: float, adjacency: Adjacency
) -> float:
    """Return the ε of a loss distribution together with all full-batch events, as one Gaussian."""
    if mu:
        loss = loss.compose(_one_step_loss(Event(1 / mu), interval, adjacency))
    with np.errstate(over="ignore"):
        found = float(loss.get_epsilon_for_delta(delta))
    if math.isfinite(found) or loss.get_delta_for_epsilon(_BEYOND) > delta:
        return found
    # The library divides by e^-ε, which runs out of floats near 700.
    return _smallest(lambda eps: loss.get_delta_for_epsilon(eps) <= delta, 700.0)


def _running_losses(
    rounds: Iterable[Iterable[Event]], interval: float, adjacency: Adjacency
) -> Iterator[Any]:
    """Yield the loss distribution of the sampled events so far, after each round; at first None."""
    total = None
    for events in rounds:
        new = [_event_loss(event, interval, adjacency) for event in _merged(events)[1]]
        if new:
            total = _composed(new if total is None else [total, *new])
        yield total


def _last(values: Sequence[float], value: float) -> int:
    """Return how many of `values` there are up to the last that is `value`."""
    return len(values) - values[::-1].index(value)


@lru_cache(maxsize=64)
def _event_loss(event: Event, interval: float, adjacency: Adjacency) -> Any:
    return _one_step_loss(event, interval, adjacency).self_compose(event.steps)


def _one_step_loss(event: Event, interval: float, adjacency: Adjacency) -> Any:
    """Return the loss distribution of one step, both ways round where they differ."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    rate = event.sample_rate
    if adjacency is Adjacency.REPLACE_ONE:
        ways = [(rate, rate)]
    else:
        ways = [(rate, 0.0), (0.0, rate)][: 2 if rate < 1 else 1]
    sigma = min(event.noise_multiplier, _MOST_NOISE)
    return PrivacyLossDistribution(*(_rounded_loss(sigma, *way, interval) for way in ways))


def _rounded_loss(sigma: float, left: float, right: float, interval: float) -> Any:
    """Return the privacy loss of one mixture over another, on the grid, rounded against us.

    The mixtures are (1 - left) N(0, σ²) + left N(-1, σ²) and (1 - right) N(0, σ²) + right
    N(1, σ²): a unit to remove is on the left, one to add on the right. The loss falls in x, so the
    hockey-stick divergence at ℓ is the one's mass up to the x where the loss is ℓ, less e^ℓ times
    the other's. dp-accounting finds each x apart, which took three quarters of the time.
    """
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
    from scipy.special import log_ndtr, ndtr

    far = 10 * sigma + 1
    low = math.floor(_loss_at(far, sigma, left, right) / interval)
    high = math.ceil(_loss_at(-far, sigma, left, right) / interval)
    losses: Array = np.arange(low, high + 1, dtype=np.float64) * interval
    x = _point_of(losses, sigma, left, right) / sigma
    upper = (1 - left) * ndtr(x) + left * ndtr(x + 1 / sigma)
    lower = np.logaddexp(_log(1 - right) + log_ndtr(x), _log(right) + log_ndtr(x - 1 / sigma))
    deltas = np.clip(upper - np.exp(losses + lower), 0, 1)
    return create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)


def _loss_at(x: float, sigma: float, left: float, right: float) -> float:
    over, under = -(x + 0.5) / sigma**2, (x - 0.5) / sigma**2
    log_left = np.logaddexp(_log(1 - left), _log(left) + over)
    return float(log_left - np.logaddexp(_log(1 - right), _log(right) + under))


def _point_of(losses: Array, sigma: float, left: float, right: float) -> Array:
    """Return the x at which the loss is each of `losses`; infinite where it is above or below."""
    if left and right:
        # Both mixtures: sinh(x/σ² + ℓ/2) = -(1/q - 1) exp(1/2σ²) sinh(ℓ/2).
        half = np.abs(losses) / 2
        with np.errstate(divide="ignore"):
            log_sinh = half + np.log(-np.expm1(-2 * half)) - math.log(2)
        scaled = log_sinh + _log(1 - left) - _log(left) + 0.5 / sigma**2
        asinh = np.logaddexp(scaled, np.logaddexp(0, 2 * scaled) / 2)
        return sigma**2 * (-np.sign(losses) * asinh - losses / 2)
    rate, sign = (left, 1) if left else (right, -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # log((e^ℓ - (1 - q)) / q), the loss of a unit that is never left out.
        alone = sign * losses + np.log1p((rate - 1) * np.exp(-sign * losses)) - math.log(rate)
    return -sign * (sigma**2 * np.nan_to_num(alone, nan=-np.inf, neginf=-np.inf) + 0.5)


def _log(probability: float) -> float:
    return math.log(probability) if probability else -math.inf


def _interval(mu: float, sampled: Sequence[Event]) -> float:
    """Return the grid on which losses are rounded: 1e-3 times a power of two.

    Rounding adds in the order of interval² to a step's variance, so it must be fine against the
    root mean square spread of a step: at 1e-3, 10,000 steps at rate 0.001 and noise 2 look 29%
    dearer than they are. It is never finer than 2^-17 of the range, which bounds time and memory.
    As the grid depends on all events, one more weak event can lower ε, by less than its error.
    """
    spreads = [(event.steps, *_spread(event)) for event in sampled]
    spreads += [(1, mu, mu * mu / 2 + 10 * mu)] if mu else []
    variance = sum(steps * spread * spread for steps, spread, _ in spreads)
    widest = max(20 * math.sqrt(variance), *(largest for _, _, largest in spreads))
    if math.isinf(widest):
        return math.inf
    per_step = 1e-8 + math.sqrt(variance / sum(steps for steps, _, _ in spreads))
    fine = min(0, math.floor(math.log2(per_step / 10 / 1e-3)))
    coarse = math.ceil(math.log2(widest / 2**17 / 1e-3))
    return math.ldexp(1e-3, max(fine, coarse))


def _spread(event: Event) -> tuple[float, float]:
    """Return about the standard deviation of one step's privacy loss, and about its maximum."""
    shift, rate = 1 / event.noise_multiplier, event.sample_rate
    far = shift * shift / 2 + 10 * shift
    # log(1 - q + q e^far): ten standard deviations out.
    largest = math.log1p(rate * math.expm1(far)) if far < 700 else far + math.log(rate)
    return min(rate * math.sqrt(math.expm1(min(shift * shift, 700))), largest), largest


# --- Rényi divergence, from dp-accounting.


def _dp_event(event: Event) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    gaussian = GaussianDpEvent(min(event.noise_multiplier, _MOST_NOISE))
    return PoissonSampledDpEvent(event.sample_rate, gaussian) if event.sample_rate < 1 else gaussian
