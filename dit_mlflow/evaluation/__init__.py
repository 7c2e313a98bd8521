"""Correlation and detection."""

from dit_mlflow.evaluation.correlation import correlation_intervals, correlations
from dit_mlflow.evaluation.detection import detection
from dit_mlflow.evaluation.metrics import Metrics

__all__ = ["Metrics", "correlation_intervals", "correlations", "detection"]
