"""What a site measures, rather than trains: sums over units, noised like any other release.

Each unit gives one vector whose L2 norm a public constant bounds (`releases.clip_norm`). The
vectors are summed by the mechanism that sums gradients, which clips every unit once and lets one
that is not finite count for nothing, and only the noised sum leaves.

Guarantee: each release is one Gaussian mechanism of noise multiplier σ over the units that are
handed in; adjacency is adding or removing one unit. With σ = 0 there is none: for studies that
are not private.

A unit's outcome depends on that unit alone, to the last bit. Whether a label comes out right can
hang on that bit, and a coordinator may choose a head with which it does for everybody.
"""

import numpy as np
import torch
from torch import Tensor, nn

from veilgraft import releases
from veilgraft.model import head as heads
from veilgraft.model import tasks
from veilgraft.model.features import Features
from veilgraft.plan import plan
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Kind, Study

BLOCK = 2**22
"""Numbers in memory at once, about; speed, not privacy."""


def evaluate(
    study: Study, head: heads.Arrays, features: Features, source: NoiseSource
) -> dict[str, np.ndarray]:
    """Return the release of kind `evaluation` for a head, over held-out units."""
    dim, labels = features.values.shape[-1], len(study.task.labels)
    module = heads.module(study.head, dim, labels, rowwise=True).eval()
    heads.load(module, head)
    widest = max(parameter.numel() for parameter in module.parameters())
    size = max(1, BLOCK // (features.mask.shape[1] * widest))
    with torch.inference_mode():
        parts = [
            _outcomes(study, module, features.select(slice(start, start + size)))
            for start in range(0, max(len(features), 1), size)
        ]
    return _released(study, "evaluation", torch.cat(parts), source)


def count_labels(study: Study, features: Features, source: NoiseSource) -> dict[str, np.ndarray]:
    """Return the release of kind `label-counts`, over these units."""
    hot = features.targets
    if study.task.type != "multilabel":
        hot = torch.nn.functional.one_hot(hot, len(study.task.labels))
    return _released(study, "label-counts", _means(hot.double(), features.mask), source)


def _outcomes(study: Study, module: nn.Sequential, features: Features) -> Tensor:
    """Return each unit's vector, `(units, 3)`."""
    asked, task, mask = study.evaluation.private, study.task.type, features.mask
    assert asked is not None
    outputs = module(features.values.double())
    right = _means(tasks.correct(task, outputs, features.targets), mask)
    # A mean of losses that is not a number stays so, and the unit then counts for nothing.
    loss = _means(tasks.instance_losses(task, outputs, features.targets), mask)
    bounded = loss.clamp(max=asked.loss_bound) / asked.loss_bound
    return torch.stack([right, bounded, torch.ones_like(right)], dim=1)


def _means(values: Tensor, mask: Tensor) -> Tensor:
    """Return each unit's mean over its instances: `(units, instances, …)` to `(units, …)`."""
    wide = mask.view(*mask.shape, *[1] * (values.ndim - 2))
    # A masked instance may hold anything, and 0 × NaN would be NaN.
    total = torch.where(wide, values, 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1).view(-1, *[1] * (values.ndim - 2))


def _released(
    study: Study, kind: Kind, vectors: Tensor, source: NoiseSource
) -> dict[str, np.ndarray]:
    sigma, bound = plan(study).noise_multiplier(kind), releases.clip_norm(study, kind)
    if sigma == 0:
        total = vectors.sum(0)
    else:
        total = mechanism.clipped_sum([vectors], bound)
        total = mechanism.noised(total, bound, sigma, source)
    return {releases.SUMS: total.numpy()}
