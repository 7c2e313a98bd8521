"""All that touches MLflow: artifacts, runs, jobs, and the plugin.

The names are loaded on first use, since MLflow imports this package in every process for the plugin.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_mlflow.tracking.jobs.influence import run_influence
    from dit_mlflow.tracking.jobs.influence_model import log_influence_model
    from dit_mlflow.tracking.jobs.register_influence import register_influence
    from dit_mlflow.tracking.jobs.train import run_training
    from dit_mlflow.tracking.recording.record_trajectory import record_trajectory
    from dit_mlflow.tracking.store.artifacts import load_influence, load_trajectory, log_influence, log_trajectory
    from dit_mlflow.tracking.store.explanations import log_explanation

_HOME_OF = {
    "load_influence": "store.artifacts",
    "load_trajectory": "store.artifacts",
    "log_explanation": "store.explanations",
    "log_influence": "store.artifacts",
    "log_influence_model": "jobs.influence_model",
    "log_trajectory": "store.artifacts",
    "record_trajectory": "recording.record_trajectory",
    "register_influence": "jobs.register_influence",
    "run_influence": "jobs.influence",
    "run_training": "jobs.train",
}

__all__ = [
    "load_influence",
    "load_trajectory",
    "log_explanation",
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
