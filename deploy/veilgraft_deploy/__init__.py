"""The composition root: command line and simulation.

>>> import veilgraft_deploy
>>> callable(veilgraft_deploy.simulate)
True
"""

from typing import Any

import veilgraft  # noqa: F401 - its switches must be set before Flower is imported

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        from veilgraft_deploy.simulation import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
