"""Correlation and detection."""

from dit_mlflow.evaluation.correlation import correlations
from dit_mlflow.evaluation.detection import detection
from dit_mlflow.evaluation.metrics import Metrics

__all__ = ["Metrics", "correlations", "detection"]
