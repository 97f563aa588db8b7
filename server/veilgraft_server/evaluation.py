"""What noised sums say of a head: an accuracy with its interval, and a loss.

All of it is post-processing of what the sites released, and of public constants.
"""

import math
from collections.abc import Callable, Collection

import numpy as np
import torch

from veilgraft.model import head as heads
from veilgraft.model import tasks
from veilgraft.model.features import Features
from veilgraft.model.head import Arrays
from veilgraft.model.score import Score
from veilgraft.study import Study

Z = 1.959963984540054
"""97.5% of a standard normal lie below: an interval at 95%."""


def estimate(sums: Collection[np.ndarray], deviation: float, loss_bound: float) -> Score | None:
    """Return accuracy and loss over the held-out units of all sites that answered.

    Args:
        sums: of each site, its noised sums of (correct, loss, one) over units, `(3,)`.
        deviation: standard deviation of the noise in each coordinate of each site's.
        loss_bound: at which the study bounds a unit's loss.

    Returns:
        None where no site answered, or noise hides that there was any unit.
    """
    if not sums:
        return None
    correct, loss, count = np.sum(list(sums), axis=0).tolist()
    noise = deviation * math.sqrt(len(sums))
    if count <= Z * noise:
        return None
    low, high = interval(correct, count, noise)
    return Score(
        accuracy=min(max(correct / count, low), high),
        loss=min(max(loss / count, 0.0), 1.0) * loss_bound,
        count=count,
        interval=(low, high),
    )


def interval(correct: float, count: float, noise: float) -> tuple[float, float]:
    """Return an interval at 95% for the accuracy p on units like those held out.

    Those p for which correct - p · count is within `Z` standard deviations of zero (Fieller 1954,
    with the variance of Wilson 1927): p (1 - p) for each unit sampled, which is the most that a
    share between 0 and 1 with mean p can have, and noise² (1 + p²) for the noise in both sums.
    Without noise it is Wilson's interval.

    >>> [round(p, 3) for p in interval(90.0, 100.0, noise=0.0)]
    [0.826, 0.945]
    >>> [round(p, 3) for p in interval(90.0, 100.0, noise=5.0)]
    [0.751, 1.0]
    """
    square = count * count + Z * Z * (count - noise * noise)
    middle = correct * count + Z * Z * count / 2
    rest = correct * correct - Z * Z * noise * noise
    root = middle * middle - square * rest
    if square <= 0 or root < 0:
        return 0.0, 1.0
    low, high = ((middle + sign * math.sqrt(root)) / square for sign in (-1, 1))
    return min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)


def scorer(study: Study, test: Features | None) -> Callable[[Arrays], Score | None]:
    """Return what scores a head on public records; None where there are none."""
    if test is None:
        return lambda _: None
    dim = test.values.shape[-1]
    module = heads.module(study.head, dim, len(study.task.labels)).eval()
    values = test.values.double()

    def evaluate(head: Arrays) -> Score:
        heads.load(module, head)
        with torch.inference_mode():
            return tasks.score(study.task.type, module(values), test.targets, test.mask)

    return evaluate
