"""Which engine trains a site's head: the fused one, or Opacus, the reference."""

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from threadpoolctl import threadpool_limits

from veilgraft.model.features import Features
from veilgraft.study import Study
from veilgraft_client.fused import Fused, fits

if TYPE_CHECKING:
    from veilgraft_client.training import Trainer

Engine: TypeAlias = Literal["auto", "opacus", "fused"]

# From glibc's malloc.h; other C libraries have no `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

AUTO = "VEILGRAFT_ENGINE"
"""Environment variable: what `auto` stands for, to run everything under one engine."""


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
    """Set this process up for very many small products.

    They are too small for threads of their own, which would take longer to meet than to work. And
    glibc is to keep what is freed, up to 256 MiB: a round frees megabytes, and the next takes as
    many. By default each went back to the kernel and came again as fresh, zeroed pages, a third of
    a run's time.
    """
    threadpool_limits(1, "blas")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**28)
