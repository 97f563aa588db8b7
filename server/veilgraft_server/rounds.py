"""A study's rounds as plain data: `state = init(…)`, `state = apply(study, state, mean)`.

Where sites take local steps (`dp-sgd`), the mean of their head changes is added (FedAvg). Where
they send one gradient (`dp-gd`), the coordinator steps along the mean gradient with heavy-ball
momentum (Polyak 1964), and the model is the mean of the last half of the iterates (Polyak and
Juditsky 1992): all of it post-processing of what was released.
"""

from dataclasses import dataclass, replace

import numpy as np

from veilgraft.model import head as heads
from veilgraft.model.head import Arrays
from veilgraft.study import Study


@dataclass(frozen=True)
class State:
    """Where a study stands after `round` rounds.

    Attributes:
        head: the head that the next round starts from.
        velocity: momentum's running sum.
        mean: of the iterates so far of the last half, and `count` of them.
        factor: what `plateau` has made of the learning rate; `best` accuracy so far, and
            `stale` rounds since.
    """

    round: int
    head: Arrays
    velocity: Arrays
    mean: Arrays
    count: int = 0
    factor: float = 1.0
    best: float = -1.0
    stale: int = 0


def init(study: Study, dim: int, generator: np.random.Generator) -> State:
    """Return the state before the first round for features of `dim` dimensions."""
    head = heads.initial(study.head, dim, len(study.task.labels), generator)
    zero = {name: np.zeros_like(array) for name, array in head.items()}
    return State(0, head, zero, zero)


def rate(study: Study, state: State) -> float:
    """Return the learning rate of the next round."""
    return study.learning_rate(state.round + 1) * state.factor


def apply(study: Study, state: State, mean: Arrays) -> State:
    """Return the state after one more round, given the mean of the sites' validated updates."""
    velocity = state.velocity
    if study.training.sampled:
        head = {name: value + mean[name] for name, value in state.head.items()}
    else:
        momentum, step = study.training.momentum, rate(study, state)
        velocity = {k: momentum * v + mean[k] for k, v in state.velocity.items()}
        head = {name: value - step * velocity[name] for name, value in state.head.items()}
    after = replace(state, round=state.round + 1, head=head, velocity=velocity)
    return _averaged(study, after)


def observe(study: Study, state: State, accuracy: float | None) -> State:
    """Return the state once the round's public or noised accuracy is known: `plateau` uses it."""
    if study.training.schedule != "plateau" or accuracy is None:
        return state
    if accuracy > state.best:
        return replace(state, best=accuracy, stale=0)
    if state.stale + 1 < study.training.patience:
        return replace(state, stale=state.stale + 1)
    return replace(state, factor=state.factor / 2, stale=0)


def model(state: State) -> Arrays:
    """Return the head that would be exported now."""
    return state.mean if state.count else state.head


def _averaged(study: Study, state: State) -> State:
    if study.training.sampled or state.round <= study.training.rounds // 2:
        return state
    count = state.count + 1
    mean = {k: m + (state.head[k] - m) / count for k, m in state.mean.items()}
    return replace(state, mean=mean, count=count)
