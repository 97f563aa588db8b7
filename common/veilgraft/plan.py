"""What a study will spend, worked out before anything is spent.

The same pure function of the contract at every party: a coordinator shows it, a site grants it,
a ledger holds releases to it.
"""

from dataclasses import dataclass
from functools import lru_cache

from veilgraft.errors import InputError
from veilgraft.privacy import accounting
from veilgraft.privacy.accounting import Adjacency, Event
from veilgraft.study import Study


@dataclass(frozen=True)
class Plan:
    """The releases that a study needs from each site.

    Attributes:
        rounds: head updates, one a round.
        update: the event of one update, or None where the study is not private.
        delta: at which ε is stated.
    """

    rounds: int
    update: Event | None
    delta: float

    @property
    def sigma(self) -> float:
        """Noise multiplier; zero where the study is not private."""
        return self.update.noise_multiplier if self.update else 0.0

    def epsilon(self, rounds: int | None = None, *, replace_one: bool = False) -> float | None:
        """Return ε after so many rounds (all by default), or None where there is no bound."""
        if rounds == 0:
            return 0.0
        return self.epsilons(replace_one=replace_one)[-1 if rounds is None else rounds - 1]

    def epsilons(self, *, replace_one: bool = False) -> tuple[float | None, ...]:
        """Return ε after 1, 2, … rounds."""
        if self.update is None:
            return (None,) * self.rounds
        adjacency = Adjacency.REPLACE_ONE if replace_one else Adjacency.ADD_REMOVE
        return _epsilons(self.update, self.rounds, self.delta, adjacency)


def plan(study: Study) -> Plan:
    """Return the plan of a study; σ is solved for its ε where it names one.

    Raises:
        InputError: no noise multiplier from 0.001 to 100,000 gives that ε.
    """
    training, privacy = study.training, study.privacy
    if not study.private:
        return Plan(training.rounds, None, privacy.delta)
    rate = training.sample_rate or 1.0
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.epsilon is not None
        steps = training.rounds * training.local_steps
        sigma = _noise_multiplier(privacy.epsilon, privacy.delta, steps, rate)
        if not 1e-3 <= sigma <= 1e5:
            raise InputError(
                f"privacy.epsilon: {privacy.epsilon:g} over {steps} steps needs a noise "
                f"multiplier of {sigma:.3g}; expected one from 0.001 to 100000"
            )
    return Plan(training.rounds, Event(sigma, rate, training.local_steps), privacy.delta)


@lru_cache(maxsize=256)
def _noise_multiplier(epsilon: float, delta: float, steps: int, rate: float) -> float:
    return accounting.noise_multiplier(epsilon, delta, steps=steps, sample_rate=rate)


@lru_cache(maxsize=256)
def _epsilons(
    event: Event, rounds: int, delta: float, adjacency: Adjacency
) -> tuple[float | None, ...]:
    return tuple(accounting.epsilons(event, rounds, delta, adjacency))
