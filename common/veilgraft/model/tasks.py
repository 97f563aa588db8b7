"""What a head learns: losses per unit, and what is counted when it is evaluated.

`outputs` are `(units, instances, labels)`, `mask` is `(units, instances)`, `targets` are
`(units, instances)` integers or, for `multilabel`, `(units, instances, labels)` of 0 and 1.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name by which torch's users know it

from veilgraft.model.score import Score

TaskType: TypeAlias = Literal["classification", "multilabel"]


def instance_losses(task: TaskType, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each instance, `(units, instances)`, in nats.

    Cross-entropy for one label, the sum of the labels' binary cross-entropies for several.
    """
    if task == "multilabel":
        losses = F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="none"
        )
        return losses.sum(-1)
    flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def unit_losses(task: TaskType, outputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return each unit's loss, `(units,)`: the sum over its instances."""
    return torch.where(mask, instance_losses(task, outputs, targets), 0.0).sum(-1)


def probabilities(task: TaskType, outputs: Tensor) -> Tensor:
    """Return label probabilities of the same shape as `outputs`."""
    return outputs.sigmoid() if task == "multilabel" else outputs.softmax(-1)


def correct(task: TaskType, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how right each instance is, from 0 to 1, float64 `(units, instances)`.

    For several labels: the share of right label decisions at probability 1/2.
    """
    if task == "multilabel":
        return ((outputs > 0) == (targets > 0)).to(torch.float64).mean(-1)
    return (outputs.argmax(-1) == targets).to(torch.float64)


def score(task: TaskType, outputs: Tensor, targets: Tensor, mask: Tensor) -> Score:
    """Return accuracy and loss over the instances that `mask` keeps."""
    right = correct(task, outputs, targets)
    losses = instance_losses(task, outputs, targets)
    count = int(mask.sum())
    return Score(float(right[mask].sum()) / count, float(losses[mask].sum()) / count, count)
