"""How good a head is, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Accuracy and loss of one head: exact on public records, or from noised sums.

    Attributes:
        accuracy: share of instances whose label is right; for several labels, share of right
            label decisions at probability 1/2. From noised sums: the mean over units of that.
        loss: mean loss per instance, nats; from noised sums, of losses bounded by a constant.
        count: instances evaluated; from noised sums, about how many units.
        interval: of the accuracy at 95%, for sampling and noise; None for public records.
    """

    accuracy: float
    loss: float
    count: float
    interval: tuple[float, float] | None = None
