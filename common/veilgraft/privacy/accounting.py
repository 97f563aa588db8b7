"""What noised releases cost: events in, ε out.

An `Event` says what happened; the functions here price it. A unit's contribution has norm at most
1, the noise has standard deviation `noise_multiplier`, and ε is for *add-or-remove-one*
neighbours unless it says otherwise. It is always an upper bound: exact to rounding where nothing
is sampled, else from a privacy loss distribution (PLD) rounded against us, which comes out about
0.1% high.

- Settings fixed in advance: `epsilon`, `epsilons`, `noise_multiplier`; `rdp_epsilon` cross-checks.
- Settings that may depend on earlier results: `filter_epsilon` at an order fixed beforehand, or
  `gaussian_filter_epsilon` where nothing is sampled.

| events | ε |
|---|---|
| none, or noise so strong that δ alone covers them | 0 |
| noise so weak that ε would be beyond ten million (sampled) or a float (full batch) | infinity |
| a release without noise, or noise that is NaN or infinite | no `Event`: `ValueError` |
"""

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any


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


_FULL_BATCH = Event(1.0)
# The library squares it; noise beyond is priced as if it were this.
_MOST_NOISE = 1e9
# Whole orders, for which the sampled Gaussian's divergence is a finite sum; about 9% apart.
_ORDERS = tuple(sorted({round(2 ** (k / 8)) for k in range(8, 73)}))


def epsilon(
    events: Iterable[Event], delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE
) -> float:
    """Return an ε such that all `events` together are (ε, `delta`)-differentially private.

    The events' settings must have been fixed before the first of them; their order makes no
    difference, to the last bit. Where nothing is sampled the value is exact, and replace-one
    doubles μ. Else it is dp-accounting's PLD (Doroshenko et al. 2022, *Connect the Dots*) with
    all full-batch events as one Gaussian, and replace-one is the library's own relation.

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
    if sampled:
        return float(_loss(mu, sampled, adjacency).get_epsilon_for_delta(delta))
    return _gaussian_epsilon(2 * mu if adjacency is Adjacency.REPLACE_ONE else mu, delta)


def epsilons(
    per_round: Event, rounds: int, delta: float, adjacency: Adjacency = Adjacency.ADD_REMOVE
) -> list[float]:
    """Return the running ε after 1, 2, …, `rounds` rounds of one event each.

    Entry k is the `epsilon` of k rounds, to a relative 1e-6; a sampled round is added to the sum
    of those before.

    Raises:
        ValueError: as `epsilon`.

    >>> [round(e, 2) for e in epsilons(Event(10.0), rounds=3, delta=1e-5)]
    [0.34, 0.5, 0.62]
    """
    mu, sampled = _merged([per_round])
    if not sampled:
        sigma, steps = per_round.noise_multiplier, per_round.steps
        totals = (Event(sigma, steps=steps * k) for k in range(1, rounds + 1))
        return [epsilon([total], delta, adjacency) for total in totals]
    _check_delta(delta, sampled)
    one_round = total = _loss(mu, sampled, adjacency)
    running = []
    for _ in range(rounds):
        running.append(float(total.get_epsilon_for_delta(delta)))
        total = total.compose(one_round)
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

    A cross-check on `epsilon` by another road, never below it. It is at most 25% above where ε is
    at most 10, the noise at least 0.9, the sample rate at least 0.02 and a unit takes part in five
    steps or more on average; where few are sampled under little noise, up to 80% has been seen.

    >>> round(rdp_epsilon([Event(10.0, steps=50)], delta=1e-5), 2)
    3.19
    """
    _check_delta(delta)
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ORDERS)
    for event in events:
        accountant.compose(_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def renyi(events: Iterable[Event], order: int) -> float:
    """Return the Rényi divergence of whole `order`, 2 or more, that bounds all `events` together.

    At full batch it is `order` / 2σ² a step (Mironov 2017, Proposition 7), else that of the
    sampled Gaussian (Mironov, Talwar & Zhang 2019, section 3.3), from dp-accounting. Its series
    for fractional orders often fails to converge, so those are not taken.

    >>> round(renyi([Event(10.0, steps=50)], order=8), 3)
    2.0
    """
    if not isinstance(order, int) or order < 2:
        raise ValueError(f"order: expected a whole number above 1, got {order!r}")
    return math.fsum(
        event.steps * _step_renyi(event.noise_multiplier, event.sample_rate, order)
        for event in events
    )


def filter_epsilon(events: Iterable[Event], delta: float, order: int) -> float:
    """Return the ε of `events` at one fixed Rényi `order`, to hold against a cap.

    Guarantee: if a release is made only while this value, with the release's own event, is at
    most a cap, then all that is ever released is (cap, `delta`)-differentially private, even
    though each event's settings may be chosen from the results of earlier ones. Cap, `delta` and
    `order` are fixed first and never change. The value itself, read at a moment that results
    helped to choose, guarantees nothing; the cap does.

    That Rényi parameters of one order may be chosen adaptively under a fixed sum: Feldman & Zrnic
    2021, *Individual Privacy Accounting via a Rényi Filter*; Lécuyer 2021, *Practical Privacy
    Filters and Odometers with Rényi Differential Privacy*. The conversion: Canonne, Kamath &
    Steinke 2020, Proposition 12. The value is never below `epsilon` of the same events.

    >>> round(filter_epsilon([Event(10.0, steps=50)], delta=1e-5, order=8), 2)
    3.21
    """
    _check_delta(delta)
    divergence = renyi(events, order)
    return max(0.0, divergence + _price(delta, order)) if divergence else 0.0


def filter_order(epsilon_cap: float, delta: float, planned: Event = _FULL_BATCH) -> int:
    """Return the order to fix for `filter_epsilon` when a ledger is made.

    Of some fifty whole orders from 2 to 512 it is the one under which the cap admits the most
    repetitions of `planned`: the largest (cap - price of conversion) / (divergence of `planned`).
    At full batch noise cancels out, so any such event stands for all. Sampling makes it matter:
    an order that suits full batch can price steps that sample few under little noise a hundred
    times too high.

    Raises:
        ValueError: under so small a cap no order admits anything.

    >>> filter_order(epsilon_cap=8.0, delta=1e-5)
    4
    """
    _check_delta(delta)

    def admitted(order: int) -> float:
        return (epsilon_cap - _price(delta, order)) / renyi([planned], order)

    best = max(_ORDERS, key=admitted)
    if not admitted(best) > 0:
        raise ValueError(f"epsilon_cap: expected enough for one release, got {epsilon_cap!r}")
    return best


def gaussian_filter_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return the exact ε of full-batch `events`, to hold against a cap.

    Guarantee: that of `filter_epsilon`, at no loss. Gaussian differential privacy adds up Σμ² for
    adaptively chosen noise as for a fixed plan (Smith & Thakurta 2022, *Fully Adaptive Composition
    for Gaussian Differential Privacy*; Koskela, Tobaben & Honkela 2023, *Individual Privacy
    Accounting with Gaussian Differential Privacy*).

    Raises:
        ValueError: an event is sampled, which this class of mechanisms does not hold.

    >>> round(gaussian_filter_epsilon([Event(10.0, steps=50)], delta=1e-5), 3)
    2.943
    """
    _check_delta(delta)
    mu, sampled = _merged(events)
    if sampled:
        raise ValueError(f"events: expected sample_rate 1, got {sampled[0]}")
    return _gaussian_epsilon(mu, delta)


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


def _loss(mu: float, sampled: Sequence[Event], adjacency: Adjacency) -> Any:
    """Return the distribution of the privacy loss of all that `_merged` returned."""
    interval = _interval(mu, sampled)
    if interval > 512:  # e^interval must stay a float
        from dp_accounting.pld import common, privacy_loss_distribution

        certain = common.DifferentialPrivacyParameters(epsilon=0.0, delta=1.0)
        return privacy_loss_distribution.from_privacy_parameters(certain)
    events = [*sampled, Event(1 / mu)] if mu else sampled
    losses = [_event_loss(event, interval, adjacency) for event in events]
    return reduce(lambda total, loss: total.compose(loss), losses)


@lru_cache(maxsize=64)
def _event_loss(event: Event, interval: float, adjacency: Adjacency) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    match adjacency:
        case Adjacency.ADD_REMOVE:
            relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        case Adjacency.REPLACE_ONE:
            relation = NeighboringRelation.REPLACE_ONE
    one_step = from_gaussian_mechanism(
        min(event.noise_multiplier, _MOST_NOISE),
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        sampling_prob=event.sample_rate,
        neighboring_relation=relation,
    )
    return one_step.self_compose(event.steps)


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


@lru_cache(maxsize=4096)
def _step_renyi(sigma: float, sample_rate: float, order: int) -> float:
    if sample_rate == 1:
        return order / 2 * (1 / sigma) * (1 / sigma)
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order])
    accountant.compose(_dp_event(Event(sigma, sample_rate)))
    return max(0.0, float(accountant.rdp[0]))


def _dp_event(event: Event) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    gaussian = GaussianDpEvent(min(event.noise_multiplier, _MOST_NOISE))
    return PoissonSampledDpEvent(event.sample_rate, gaussian) if event.sample_rate < 1 else gaussian


def _price(delta: float, order: int) -> float:
    """Return ε less the divergence: Canonne, Kamath & Steinke 2020, Proposition 12."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
