"""What a study will spend, worked out before anything is spent.

The same pure function of the contract at every party: a coordinator shows it, a site grants it,
a ledger holds releases to it.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

from veilgraft.errors import InputError
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Adjacency, Event
from veilgraft.study import Kind, Measurement, Study

NOISE_MULTIPLIERS = (1e-3, 1e5)


@dataclass(frozen=True)
class Plan:
    """The releases that a study needs from each site.

    Attributes:
        rounds: head updates, one a round.
        update: the event of one update, or None where the study is not private.
        delta: at which ε is stated.
        evaluated: the rounds after which held-out units are evaluated, each an `evaluation` event.
        counted: whether labels are counted once, a `label_counts` event, before the first round.
    """

    rounds: int
    update: Event | None
    delta: float
    evaluated: tuple[int, ...] = ()
    evaluation: Event | None = None
    counted: bool = False
    label_counts: Event | None = None

    @property
    def sigma(self) -> float:
        """Noise multiplier of an update; zero where the study is not private."""
        return self.noise_multiplier("update")

    def noise_multiplier(self, kind: Kind) -> float:
        """Return the noise multiplier of a kind of release; zero where there is no noise."""
        _, event = self.releases.get(kind, (0, None))
        return event.noise_multiplier if event else 0.0

    @property
    def releases(self) -> dict[Kind, tuple[int, Event | None]]:
        """How often each kind of release is planned, and what one costs."""
        planned: dict[Kind, tuple[int, Event | None]] = {
            "update": (self.rounds, self.update),
            "evaluation": (len(self.evaluated), self.evaluation),
            "label-counts": (int(self.counted), self.label_counts),
        }
        return {kind: (count, event) for kind, (count, event) in planned.items() if count}

    def without_bound(self) -> Self:
        """Return the same releases, priced as what they are if their noise can be drawn again."""
        return replace(self, update=None, evaluation=None, label_counts=None)

    def epsilon(self, rounds: int | None = None, *, replace_one: bool = False) -> float | None:
        """Return ε after so many rounds (all by default), or None where there is no bound.

        Replace-one is told of all rounds together.
        """
        if self.update is None:
            return None
        if rounds is None or rounds >= self.rounds:
            return _total(self.events, self.delta, _adjacency(replace_one))
        return self._running[rounds]

    def rdp_epsilon(self) -> float | None:
        """Return the ε that a Rényi accountant gives: a cross-check, never below `epsilon`."""
        return None if self.update is None else accounting.rdp_epsilon(self.events, self.delta)

    @cached_property
    def _running(self) -> tuple[float, ...]:
        return _running(self._by_round, self.delta)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of all releases, in order."""
        return tuple(event for events in self._by_round for event in events)

    @cached_property
    def _by_round(self) -> tuple[tuple[Event, ...], ...]:
        """What is released before the first round, and in each."""
        planned = [[self.label_counts if self.counted else None]]
        for round_ in range(1, self.rounds + 1):
            evaluation = self.evaluation if round_ in self.evaluated else None
            planned.append([self.update, evaluation])
        return tuple(tuple(event for event in events if event) for events in planned)


@lru_cache(maxsize=256)
def plan(study: Study) -> Plan:
    """Return the plan of a study; σ is solved for its ε where it names one.

    Measurements first: what all releases of one kind would cost alone is the share of ε that the
    study gives them. The updates then get what is left, which by composition is more than the
    rest of the shares.

    Raises:
        InputError: no noise multiplier from 0.001 to 100,000 gives that ε.
    """
    training, asked = study.training, study.evaluation
    evaluated, counted = study.evaluated, asked.label_counts is not None
    unbound = Plan(training.rounds, None, study.privacy.delta, evaluated, None, counted)
    if not study.private:
        return unbound
    evaluation = _measured(study, "evaluation.private", asked.private, len(evaluated))
    label_counts = _measured(study, "evaluation.label_counts", asked.label_counts, 1)
    measured = replace(unbound, evaluation=evaluation, label_counts=label_counts)
    sigma = study.privacy.noise_multiplier
    if sigma is None:
        sigma = _noise_multiplier(
            "privacy.epsilon",
            study.privacy.epsilon,
            study.privacy.delta,
            training.rounds * training.local_steps,
            training.sample_rate or 1.0,
            measured.events,
        )
    update = Event(sigma, training.sample_rate or 1.0, training.local_steps)
    return replace(measured, update=update)


def _measured(study: Study, key: str, asked: Measurement | None, count: int) -> Event | None:
    if asked is None:
        return None
    if asked.noise_multiplier is not None:
        return Event(asked.noise_multiplier)
    assert asked.share is not None
    assert study.privacy.epsilon is not None
    epsilon = asked.share * study.privacy.epsilon
    return Event(_noise_multiplier(f"{key}.share", epsilon, study.privacy.delta, count))


@lru_cache(maxsize=256)
def _noise_multiplier(
    key: str,
    epsilon: float | None,
    delta: float,
    steps: int,
    rate: float = 1.0,
    fixed: tuple[Event, ...] = (),
) -> float:
    assert epsilon is not None
    sigma = accounting.noise_multiplier(epsilon, delta, steps=steps, sample_rate=rate, fixed=fixed)
    if not NOISE_MULTIPLIERS[0] <= sigma <= NOISE_MULTIPLIERS[1]:
        raise InputError(
            f"{key}: an ε of {epsilon:g} over {steps} steps needs a noise multiplier of "
            f"{sigma:.3g}; expected one from 0.001 to 100000"
        )
    return sigma


def _adjacency(replace_one: bool) -> Adjacency:
    return Adjacency.REPLACE_ONE if replace_one else Adjacency.ADD_REMOVE


@lru_cache(maxsize=256)
def _total(events: tuple[Event, ...], delta: float, adjacency: Adjacency) -> float:
    return accounting.epsilon(events, delta, adjacency)


@lru_cache(maxsize=256)
def _running(rounds: tuple[tuple[Event, ...], ...], delta: float) -> tuple[float, ...]:
    return tuple(accounting.epsilons(rounds, delta))
