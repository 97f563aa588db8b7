"""FedAvg over validated releases, with public weights (McMahan et al. 2017, Algorithm 1).

Weights are constants of the study. A measured count never is one: a count is private, and a
count that a site reports would let it take the average over.
"""

from collections.abc import Mapping

import numpy as np

from veilgraft import messages
from veilgraft.errors import MessageError
from veilgraft.model.head import Arrays
from veilgraft.study import Study


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
        raise MessageError(
            f"payload: expected an L2 norm of at most {max_norm:g} "
            f"(aggregation.max_update_norm), got {norm:.4g}"
        )
    return arrays


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
