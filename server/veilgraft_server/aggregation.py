"""FedAvg over validated releases, with public weights (McMahan et al. 2017, Algorithm 1).

Weights are constants of the study. A measured count never is one: a count is private, and a
count that a site reports would let it take the average over.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping

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


class Average:
    """The weighted mean of the sites' updates, which are added as they come and then forgotten.

    They are summed in the order of the sites' names, so that the same updates give the same mean
    to the last bit: one that comes before its turn is held until then. The weights of those that
    came are scaled to sum to one.

    Args:
        sites: those that were asked.
    """

    def __init__(self, study: Study, sites: Iterable[str]) -> None:
        self._weights = study.aggregation.weights
        self._due = deque(sorted(sites))
        self._held: dict[str, Arrays] = {}
        self._sum: dict[str, np.ndarray] = {}
        self._total = 0.0

    def add(self, site: str, update: Arrays) -> None:
        """Add one site's validated update."""
        self._held[site] = update
        while self._due and self._due[0] in self._held:
            self._sum_up(self._due.popleft())

    def mean(self) -> dict[str, np.ndarray]:
        """Return the mean of all that came; nothing can be added after it."""
        for site in sorted(self._held):
            self._sum_up(site)
        return {name: total / self._total for name, total in self._sum.items()}

    def _sum_up(self, site: str) -> None:
        weight = self._weights[site] if self._weights else 1.0
        self._total += weight
        for name, array in self._held.pop(site).items():
            self._sum[name] = self._sum.get(name, 0.0) + weight * array
