"""Veilgraft: private federated transfer learning.

Importing this package imports no machine-learning library (PEP 562), so that a courier stays
small; `veilgraft.load` and `veilgraft.Study` arrive when they are first used.
"""

import os
from importlib.metadata import version
from typing import Any

# Read by the libraries when they are imported, so they are set before any of them can be.
os.environ.update(
    DO_NOT_TRACK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_TELEMETRY_ENABLED="0",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    TRANSFORMERS_OFFLINE="1",
)

# Threads that wait by spinning made features 25 times slower wherever a core was busy elsewhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("veilgraft")
__all__ = ["Study", "__version__", "load"]


def __getattr__(name: str) -> Any:
    match name:
        case "load":
            from veilgraft.model.export import load

            return load
        case "Study":
            from veilgraft.study import Study

            return Study
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
