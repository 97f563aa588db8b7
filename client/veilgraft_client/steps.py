"""What every engine starts from: which units count, and the randomness of a release's steps."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veilgraft.model import head as heads
from veilgraft.model.features import Features
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client.policy import LARGEST

log = logging.getLogger(__name__)

DRAWN = 2**20
"""Random numbers that are drawn ahead at a time, about; speed, not privacy."""


class Steps:
    """How one site's units take part in a study's steps.

    Args:
        sigma: noise multiplier of every step; zero where the study is not private.
        units: how many the site declared to train on; never a measured number.

    Attributes:
        used: which units count, bool `(units,)`.
        there: which instances are trained on: those of such units, bool `(units, instances)`.

    Raises:
        ValueError: settings that the mechanism can't keep its promise for. They stop here, before a
            round is paid.
    """

    def __init__(self, study: Study, features: Features, *, sigma: float, units: float) -> None:
        self.study = study
        self.features = features
        self.sigma = sigma
        self.normaliser = units * (study.training.sample_rate or 1.0)
        self.shapes = heads.shapes(study.head, self.dim, len(study.task.labels))
        self.dimension = sum(math.prod(shape) for shape in self.shapes.values())
        if study.private:
            mechanism.grid(study.privacy.clip_norm, sigma, self.dimension)
            if len(features) > mechanism.MAX_UNITS:
                raise ValueError(f"expected at most {mechanism.MAX_UNITS} units")
        self.used = _usable(features, len(study.task.labels))
        if spoilt := int((~self.used).sum()):
            log.warning("%d units count for nothing: not finite, too large or no label", spoilt)
        self.there = features.mask & self.used.unsqueeze(1)
        self.features = replace(features, targets=_cleaned(features.targets, self.there))

    @property
    def dim(self) -> int:
        """Features per instance."""
        return self.features.values.shape[-1]

    @property
    def blocks(self) -> list[int]:
        """How many steps' randomness is drawn at a time, until the round is over."""
        count = self.study.training.local_steps
        size = max(1, DRAWN // max(self.dimension, len(self.features)))
        return [min(size, count - start) for start in range(0, count, size)]

    def taken(self, source: NoiseSource, steps: int) -> Tensor:
        """Draw which units so many steps take, bool `(steps, units)`; all where none are sampled.

        Args:
            source: of this release alone; a block's samples come before its noise.
        """
        units, rate = len(self.features), self.study.training.sample_rate
        if rate is None:
            return self.used.expand(steps, units)
        return source.bernoulli(steps * units, rate).view(steps, units).logical_and_(self.used)

    def noise(self, sources: Sequence[NoiseSource], steps: int) -> npt.NDArray[np.float64] | None:
        """Draw the noise of so many steps' sums for each source, `(sources, steps, dimension)`.

        None where the study is not private.
        """
        if not self.study.private:
            return None
        clip = self.study.privacy.clip_norm
        return mechanism.noise(sources, steps, self.dimension, clip, self.sigma)


def _usable(features: Features, labels: int) -> Tensor:
    """Tell which units hold nothing but what can be computed with, bool `(units,)`.

    Numbers of a size for it, and targets that are labels, or shares of them.
    """
    targets = features.targets
    # Written so that NaN fails; what a masked instance holds makes no difference.
    fine = features.values.abs().amax(dim=2) <= LARGEST
    if targets.ndim == 3:
        fine &= ((targets >= 0) & (targets <= 1)).all(dim=2)
    else:
        fine &= (targets >= 0) & (targets < labels)
    return (fine | ~features.mask).all(dim=1)


def _cleaned(targets: Tensor, there: Tensor) -> Tensor:
    """Return targets, zero where they are not trained on: what is there may be no label."""
    if bool(there.all()):
        return targets
    return torch.where(there.unsqueeze(2) if targets.ndim == 3 else there, targets, 0)
