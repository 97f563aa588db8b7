"""Un-noised results on public records, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Accuracy and loss of one head.

    Attributes:
        accuracy: share of instances whose label is right; for several labels, share of right
            label decisions at probability 1/2.
        loss: mean loss per instance, nats.
        count: instances evaluated.
    """

    accuracy: float
    loss: float
    count: int
