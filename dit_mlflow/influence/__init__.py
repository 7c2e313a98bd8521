"""Windows, queries, the sweep, and the result."""

from dit_mlflow.influence.draws import expected_influence
from dit_mlflow.influence.kind import Kind, check_kind
from dit_mlflow.influence.query import (
    Query,
    logits,
    margins,
    mean_validation_loss,
    parameter_value,
    probabilities,
    sample_losses,
)
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.row_queries import row_losses
from dit_mlflow.influence.stored_result import SIGN_CONVENTION
from dit_mlflow.influence.sweep import self_influence, track
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
    "expected_influence",
    "logits",
    "margins",
    "mean_validation_loss",
    "parameter_value",
    "parse_windows",
    "probabilities",
    "row_losses",
    "sample_losses",
    "self_influence",
    "track",
]
