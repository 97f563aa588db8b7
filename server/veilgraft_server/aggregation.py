"""FedAvg over validated releases, with public weights (McMahan et al. 2017, Algorithm 1).

Weights are constants of the study. A measured count never is one: a count is private, and a
count that a site reports would let it take the average over.
"""

import math
from collections.abc import Mapping

import numpy as np

from veilgraft import messages, releases
from veilgraft.errors import MessageError
from veilgraft.model.head import Arrays
from veilgraft.study import MAX_UNITS, Kind, Study


def validated(
    payload: bytes, shapes: Mapping[str, tuple[int, ...]], max_norm: float
) -> dict[str, np.ndarray]:
    """Return the arrays of one release.

    Raises:
        MessageError: other names, shapes or types, a value that is not finite, or an L2 norm
            over all arrays above `max_norm`.
    """
    arrays = messages.unpack(payload, shapes)
    norm = float(np.sqrt(sum(float(np.vdot(array, array)) for array in arrays.values())))
    if norm > max_norm:
        raise MessageError(f"payload: expected an L2 norm of at most {max_norm:g}, got {norm:.4g}")
    return arrays


def largest_norm(study: Study, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the L2 norm above which a release is dropped: what no honest site exceeds.

    A sum is at most C for each unit and σC(√d + 6) from the noise, the latter but for one release
    in a billion (Laurent and Massart 2000, Lemma 1). An update divides it by the declared units,
    so that one C is left however few they are, unless the study itself names a bound for updates;
    where nothing is clipped there is none.
    """
    clip_norm = releases.clip_norm(study, kind)
    dimension = sum(math.prod(shape) for shape in shapes.values())
    noise = releases.deviation(study, kind) * (math.sqrt(dimension) + 6.5)
    if kind != "update":
        return MAX_UNITS * clip_norm + noise
    if study.aggregation.max_update_norm is not None:
        return study.aggregation.max_update_norm
    if not study.private:
        return math.inf
    step, training = clip_norm + noise, study.training
    if not training.sampled:
        return step
    assert training.sample_rate is not None
    steps = training.local_steps * training.learning_rate / (1 - training.momentum)
    return step * steps / training.sample_rate


def fedavg(study: Study, updates: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """Return the weighted mean of the sites' updates, summed in the order of the sites' names.

    The weights of those that answered are scaled to sum to one.
    """
    named = study.aggregation.weights
    weights = {site: named[site] if named else 1.0 for site in sorted(updates)}
    total = sum(weights.values())
    first = next(iter(updates.values()))
    return {
        name: np.sum([updates[site][name] * (w / total) for site, w in weights.items()], axis=0)
        for name in first
    }
