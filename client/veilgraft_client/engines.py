"""Which engine trains a site's head: the fused one, or Opacus, the reference."""

import os
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from threadpoolctl import threadpool_limits

from veilgraft.model.features import Features
from veilgraft.study import Study
from veilgraft_client.fused import Fused, fits
from veilgraft_client.policy import AUTO

if TYPE_CHECKING:
    from veilgraft_client.training import Trainer

Engine: TypeAlias = Literal["auto", "opacus", "fused"]


def trainer(
    study: Study, features: Features, *, sigma: float, units: float, engine: Engine
) -> "Fused | Trainer":
    """Return what trains one site's head; `auto` is the fused engine wherever its proof reaches.

    Args:
        sigma, units: see `steps.Steps`.

    Raises:
        ValueError: settings that can't be kept a promise for; nothing was paid.
    """
    if engine == "auto" and os.environ.get(AUTO) == "opacus":
        engine = "opacus"
    if engine == "fused" or (engine == "auto" and (fits(features) or not study.private)):
        _settle()
        return Fused(study, features, sigma=sigma, units=units)
    # Not at the top: Opacus takes two seconds, which nobody else need wait.
    from veilgraft_client.training import Trainer

    return Trainer(study, features, sigma=sigma, units=units)


@cache
def _settle() -> None:
    """Keep products on one thread: they are so small that several would take longer to meet."""
    threadpool_limits(1, "blas")
