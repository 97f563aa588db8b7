"""The form of each kind of release, as both sides know it: arrays, bound on a unit, noise.

| kind | arrays | of each unit |
|---|---|---|
| `update` | the head's own | its gradient, clipped to `privacy.clip_norm`, in each step |
| `evaluation` | `sums`, `(3,)` | (share of instances right, mean loss / `loss_bound`, 1) |
| `label-counts` | `sums`, `(labels,)` | for each label, the share of its instances that have it |
"""

import math

from veilgraft.model import head as heads
from veilgraft.plan import plan
from veilgraft.study import Kind, Study

SUMS = "sums"


def shapes(study: Study, kind: Kind, dim: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a release's arrays, for features of `dim` dimensions."""
    labels = len(study.task.labels)
    match kind:
        case "update":
            return heads.shapes(study.head, dim, labels)
        case "evaluation":
            return {SUMS: (3,)}
        case "label-counts":
            return {SUMS: (labels,)}


def clip_norm(study: Study, kind: Kind) -> float:
    """Return the L2 bound on what one unit adds to a sum.

    All but gradients are bounded by what they are, and clipping changes nothing: a share is at
    most 1, and shares of one label each add up to 1.
    """
    match kind:
        case "update":
            return study.privacy.clip_norm
        case "evaluation":
            return math.sqrt(3)
        case "label-counts":
            return math.sqrt(len(study.task.labels)) if study.task.type == "multilabel" else 1.0


def deviation(study: Study, kind: Kind) -> float:
    """Return the standard deviation of the noise in each coordinate of a sum."""
    return plan(study).noise_multiplier(kind) * clip_norm(study, kind)
