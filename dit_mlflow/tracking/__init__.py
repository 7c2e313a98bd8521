"""All that touches MLflow: artifacts, runs, jobs, and the plugin.

The names are loaded on first use: MLflow imports this package in every process, for the plugin.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_mlflow.tracking.artifacts import (
        load_influence,
        load_trajectory,
        log_influence,
        log_trajectory,
    )
    from dit_mlflow.tracking.influence import run_influence
    from dit_mlflow.tracking.influence_model import log_influence_model
    from dit_mlflow.tracking.recording import record_trajectory
    from dit_mlflow.tracking.registration import register_influence
    from dit_mlflow.tracking.training import run_training

_HOME_OF = {
    "load_influence": "artifacts",
    "load_trajectory": "artifacts",
    "log_influence": "artifacts",
    "log_influence_model": "influence_model",
    "log_trajectory": "artifacts",
    "record_trajectory": "recording",
    "register_influence": "registration",
    "run_influence": "influence",
    "run_training": "training",
}

__all__ = [
    "load_influence",
    "load_trajectory",
    "log_influence",
    "log_influence_model",
    "log_trajectory",
    "record_trajectory",
    "register_influence",
    "run_influence",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
