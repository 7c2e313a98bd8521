"""Ground truth, correlation and detection."""

from dit_mlflow.evaluation.leave_one_out import leave_one_out

__all__ = ["leave_one_out"]
