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
    from dit_mlflow.retraining import Effort, leave_one_out
    from dit_mlflow.workload import Workload, load_workload

__version__ = "0.1.0"

_HOMES = {
    "dit_mlflow.errors": (
        "DitError",
        "InputError",
        "TrainingError",
        "TrajectoryError",
        "UnsupportedError",
        "WorkloadError",
    ),
    "dit_mlflow.workload": ("Workload", "load_workload"),
    "dit_mlflow.recording": ("TrajectoryRecorder", "train"),
    "dit_mlflow.replay": ("Trajectory",),
    "dit_mlflow.influence": (
        "Influence",
        "Query",
        "Window",
        "expected_influence",
        "logits",
        "margins",
        "mean_validation_loss",
        "parameter_value",
        "parse_windows",
        "probabilities",
        "sample_losses",
        "self_influence",
        "track",
    ),
    "dit_mlflow.retraining": ("Effort", "leave_one_out"),
    "dit_mlflow.methods.removal": ("removal_influence",),
    "dit_mlflow.explanation": ("Checks", "Explanation", "explain"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

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
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
