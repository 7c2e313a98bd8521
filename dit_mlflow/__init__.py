"""Dynamic Influence Tracker for MLflow: which training samples did this, and when?

Everything a user needs is importable from here; the names are loaded on first use, so that
``import dit_mlflow`` (which MLflow does in every process, through the plugin) imports neither
torch nor mlflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_mlflow.errors import DitError, InputError, TrainingError, TrajectoryError, UnsupportedError, WorkloadError
    from dit_mlflow.explanation import Checks, Explanation, explain
    from dit_mlflow.influence import (
        Influence,
        Query,
        Window,
        expected_influence,
        logits,
        margins,
        mean_validation_loss,
        parameter_value,
        parse_windows,
        probabilities,
        sample_losses,
        self_influence,
        track,
    )
    from dit_mlflow.methods.removal import removal_influence
    from dit_mlflow.recording import TrajectoryRecorder, train
    from dit_mlflow.replay import Trajectory
    from dit_mlflow.retraining import Effort, leave_groups_out, leave_one_out
    from dit_mlflow.workload import Workload, load_workload

__version__ = "0.1.0"

_HOMES = ("errors", "workload", "recording", "replay", "influence", "retraining", "methods.removal", "explanation")
"""Modules of the names, from the bottom up: none imports a later one."""

__all__ = [  # noqa: RUF022  (in the order a reader meets them)
    "Workload",
    "load_workload",
    "TrajectoryRecorder",
    "train",
    "Trajectory",
    "Window",
    "parse_windows",
    "Query",
    "mean_validation_loss",
    "sample_losses",
    "logits",
    "margins",
    "probabilities",
    "parameter_value",
    "removal_influence",
    "track",
    "expected_influence",
    "self_influence",
    "leave_one_out",
    "leave_groups_out",
    "Effort",
    "explain",
    "Checks",
    "Explanation",
    "Influence",
    "DitError",
    "InputError",
    "TrainingError",
    "TrajectoryError",
    "UnsupportedError",
    "WorkloadError",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
