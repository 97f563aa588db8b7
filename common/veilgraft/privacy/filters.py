"""What releases cost when their settings may depend on earlier results: filters under a cap.

A ledger's cap (ε = c, δ) covers the life of its data: many studies, each asked for after results
of earlier ones were seen. `accounting.epsilon` bounds none of that; it prices what was fixed in
advance, and to go on composing PLDs as settings come along is invalid (*f-Differential Privacy
Filters*, arXiv 2602.06756). What holds is a *filter* (Rogers, Roth, Ullman & Vadhan 2016;
Whitehouse, Ramdas, Rogers & Wu 2023): a figure f of all grants so far is valid at (c, δ) if every
process whose grants never take f above c is (c, δ)-differentially private.

No filter suits every mixture of events, so `LifeFilter` runs these side by side and shares δ out:

| filter | its δ | infinite once | valid by |
|---|---|---|---|
| planned | δ/2 | a study is granted after the first release | the next paragraph |
| Gaussian | δ/4 | anything is sampled | Smith & Thakurta 2022; Koskela, Tobaben & Honkela 2023 |
| Rényi, a few orders | δ/4, shared | never | Feldman & Zrnic 2021; Lécuyer 2021 |

The last two say that μ², or the Rényi parameter of one order, may be chosen from results for each
release, as long as the sum stays within a bound fixed before: as good as a plan.

*Planned*: as long as nothing was released, the transcript says nothing about the data, so the set
of granted events is as good as fixed, and its PLD prices it. Which of them runs next, if any, may
depend on results: by induction on the number left, whatever runs first, the rest composes to the
same product (Zhu, Dong & Wang 2022, *Optimal Accounting*, adaptive composition of dominating
pairs).

**Guarantee.** If every grant leaves at least one filter f_i at or below c, all that is ever
released is (c, Σδ_i)-differentially private.

*Proof.* Let P and Q be the distributions of the transcript, up to any moment, on two neighbouring
data sets: all that was asked, granted, refused and released. Let M_i do as the ledger does, but
refuse the first grant that would take f_i above c, and all later ones; f_i is valid, so
P_i(A) ≤ e^c Q_i(A) + δ_i. Let E_i hold the transcripts at whose end f_i is the first filter at or
below c: each transcript is in exactly one. No f_i falls with a further grant, so on E_i it was at
or below c all along, and M_i did as the ledger did. Both read the transcript alone, so this is so
on either data set: on E_i, P is P_i and Q is Q_i. Then for any set A of transcripts

    P(A) = Σ P_i(A ∩ E_i) ≤ Σ (e^c Q_i(A ∩ E_i) + δ_i) = e^c Q(A) + Σ δ_i.

Only the exact f_i need be non-decreasing; that computed ones are not below them is enough. Which
of the permitted studies are granted makes no difference.

**Assumed.**
- c, δ and the orders are fixed before the first grant, or changed later for no reason that results
  gave. To lower c is harmless for whatever reason; to raise it in the light of results is not
  covered, unless the guarantee is read at the largest c that was allowed for beforehand.
- What is asked, granted, refused, repeated or left undone follows from the transcript and from
  chance, not otherwise from a record. A refusal that depends on records is a release.
- A study's events are granted all at once, before its first release, and for good; granted studies
  may run side by side, and need not end.
- An event bounds its release whatever earlier results chose: contributions of norm at most 1,
  fresh noise.
- The first release is the ledger's first reservation, of any study. What left by another way than
  the ledger adds to it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import ORDERS, Event

_FULL_BATCH = Event(1.0)


@dataclass(frozen=True)
class LifeFilter:
    """The filters of one ledger, side by side; fixed when the ledger is made.

    Guarantee: if a study is granted only while `epsilon`, with the study's own events, is at most
    a cap, then all that is ever released is (cap, `delta`)-differentially private for
    add-or-remove-one neighbours, under the assumptions in the module's docstring.

    Attributes:
        delta: of the cap; at least 2e-10 where anything is to be sampled.
        orders: whole Rényi orders, one filter each.

    Raises:
        ValueError: `delta` outside (0, 1), no order, or one that is no whole number above 1.
    """

    delta: float
    orders: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_delta(self.delta)
        if not self.orders:
            raise ValueError("orders: expected at least one, got none")
        for order in self.orders:
            _check_order(order)

    @classmethod
    @lru_cache(maxsize=256)
    def fixed(cls, max_epsilon: float, delta: float) -> "LifeFilter":
        """Return the filters for a cap, chosen from the cap and `delta` alone.

        One order is that under which the cap admits most at full batch, which many weak sampled
        steps resemble. High orders price rare steps under little noise a hundred times too high,
        so the other is the lowest that still admits half as much at full batch. Under a cap too
        small for any order to admit anything, the orders are of no use and do no harm.

        Raises:
            ValueError: a negative cap, or a `delta` outside (0, 1).

        >>> LifeFilter.fixed(max_epsilon=8.0, delta=2e-5).orders
        (3, 4)
        >>> LifeFilter.fixed(max_epsilon=1.0, delta=2e-5).orders
        (13, 21)
        """
        if not max_epsilon >= 0:
            raise ValueError(f"max_epsilon: expected a number from 0, got {max_epsilon!r}")
        _check_delta(delta)
        admitted = {order: _admitted(max_epsilon, delta / 8, order) for order in ORDERS}
        most = max(admitted.values())
        low = next(order for order, many in admitted.items() if many >= min(most / 2, most))
        best = next(order for order, many in admitted.items() if many == most)
        return cls(delta, (low, best) if low < best else (best,))

    def epsilon(self, planned: Iterable[Event], chosen: Iterable[Event] = ()) -> float:
        """Return the least figure of the filters that apply, to hold against the cap.

        It is not an ε that has been spent: read at a moment that results helped to choose, the
        figure guarantees nothing; that every grant kept it under the cap does. It is never below
        `accounting.epsilon` of all events at `delta`.

        Args:
            planned: the events of all studies granted before this ledger's first release.
            chosen: those of all studies granted since.

        Raises:
            ValueError: `delta` is below 2e-10 and something is sampled.

        >>> life = LifeFilter.fixed(max_epsilon=8.0, delta=2e-5)
        >>> study = [Event(2.0, 0.05, 200)]
        >>> round(life.epsilon(planned=study), 3) == round(accounting.epsilon(study, 1e-5), 3)
        True
        >>> round(life.epsilon(planned=study, chosen=study), 1)
        4.1
        """
        return _figure(self, tuple(planned), tuple(chosen))


# A thousand simulated sites ask the same.
@lru_cache(maxsize=256)
def _figure(life: LifeFilter, before: tuple[Event, ...], since: tuple[Event, ...]) -> float:
    share = life.delta / 4 / len(life.orders)
    figures = [filter_epsilon(before + since, share, order) for order in life.orders]
    if all(event.sample_rate == 1 for event in before + since):
        figures.append(gaussian_filter_epsilon(before + since, life.delta / 4))
    if not since:
        figures.append(accounting.epsilon(before, life.delta / 2))
    return min(figures)


def renyi(events: Iterable[Event], order: int) -> float:
    """Return the Rényi divergence of whole `order`, 2 or more, that bounds all `events` together.

    At full batch it is `order` / 2σ² a step (Mironov 2017, Proposition 7), else that of the
    sampled Gaussian, a finite sum for whole orders (Mironov, Talwar & Zhang 2019, section 3.3).

    >>> round(renyi([Event(10.0, steps=50)], order=8), 3)
    2.0
    """
    _check_order(order)
    return math.fsum(
        event.steps * _step_renyi(event.noise_multiplier, event.sample_rate, order)
        for event in events
    )


def filter_epsilon(events: Iterable[Event], delta: float, order: int) -> float:
    """Return the ε of `events` at one fixed Rényi `order`, to hold against a cap.

    A filter that is valid at (cap, `delta`), in the sense of the module's docstring: the sum of
    the divergences, converted (Canonne, Kamath & Steinke 2020, Proposition 12). It is never below
    `accounting.epsilon` of the same events.

    >>> round(filter_epsilon([Event(10.0, steps=50)], delta=1e-5, order=8), 2)
    3.21
    """
    price, divergence = _price(delta, order), renyi(events, order)
    return max(0.0, divergence + price) if divergence else 0.0


def filter_order(epsilon_cap: float, delta: float, planned: Event = _FULL_BATCH) -> int:
    """Return the one order for `filter_epsilon` under which a cap admits most of `planned`.

    Of some fifty whole orders from 2 to 512 it has the largest (cap - price of conversion) /
    (divergence of `planned`). At full batch noise cancels out, so any such event stands for all.
    Sampling makes it matter: an order that suits full batch can price steps that sample few under
    little noise a hundred times too high.

    Raises:
        ValueError: under so small a cap no order admits anything.

    >>> filter_order(epsilon_cap=8.0, delta=1e-5)
    4
    """
    best = max(ORDERS, key=lambda order: _admitted(epsilon_cap, delta, order, planned))
    if not _admitted(epsilon_cap, delta, best, planned) > 0:
        raise ValueError(f"epsilon_cap: expected enough for one release, got {epsilon_cap!r}")
    return best


def gaussian_filter_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return the exact ε of full-batch `events`, to hold against a cap.

    A filter that is valid at (cap, `delta`), in the sense of the module's docstring, at no loss:
    it costs what a fixed plan costs.

    Raises:
        ValueError: an event is sampled, which this class of mechanisms does not hold.

    >>> round(gaussian_filter_epsilon([Event(10.0, steps=50)], delta=1e-5), 3)
    2.943
    """
    full = tuple(events)
    for event in full:
        if event.sample_rate < 1:
            raise ValueError(f"events: expected sample_rate 1, got {event}")
    return accounting.epsilon(full, delta)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta!r}")


def _check_order(order: int) -> None:
    if not isinstance(order, int) or order < 2:
        raise ValueError(f"order: expected a whole number above 1, got {order!r}")


def _price(delta: float, order: int) -> float:
    """Return ε less the divergence: Canonne, Kamath & Steinke 2020, Proposition 12."""
    _check_delta(delta)
    _check_order(order)
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def _admitted(cap: float, delta: float, order: int, planned: Event = _FULL_BATCH) -> float:
    """Return how many repetitions of `planned` the filter of one order would admit."""
    return (cap - _price(delta, order)) / renyi([planned], order)


@lru_cache(maxsize=4096)
def _step_renyi(sigma: float, sample_rate: float, order: int) -> float:
    """Return log E[(1 - q + q e^loss)^α] / (α - 1), where E e^(k loss) = exp(k (k - 1) / 2σ²)."""
    if sample_rate == 1:
        return order / 2 * (1 / sigma) * (1 / sigma)
    import numpy as np
    from scipy.special import gammaln, logsumexp

    k = np.arange(2, order + 1)
    chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    log_binomial = chosen + k * math.log(sample_rate) + (order - k) * math.log1p(-sample_rate)
    with np.errstate(divide="ignore", over="ignore"):
        exponent = k * (k - 1) / 2 * (1 / sigma) * (1 / sigma)
        # The binomial's terms add up to 1: less 1 each, nothing of a small divergence cancels.
        excess = log_binomial + exponent + np.log(-np.expm1(-exponent))
        return float(np.logaddexp(0.0, logsumexp(excess))) / (order - 1)
