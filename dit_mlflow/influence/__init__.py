"""Windows, queries, the sweep, and the result."""

from dit_mlflow.influence.kind import Kind, check_kind
from dit_mlflow.influence.query import Query, mean_validation_loss
from dit_mlflow.influence.result import SIGN_CONVENTION, Influence
from dit_mlflow.influence.sweep import track
from dit_mlflow.influence.window import Timeline, Window, check_windows, parse_windows

__all__ = [
    "SIGN_CONVENTION",
    "Influence",
    "Kind",
    "Query",
    "Timeline",
    "Window",
    "check_kind",
    "check_windows",
    "mean_validation_loss",
    "parse_windows",
    "track",
]
