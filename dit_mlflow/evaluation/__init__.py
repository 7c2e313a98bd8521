"""Figures: how well scores agree with ground truth, find damaged samples, and hold over seeds."""

from dit_mlflow.evaluation.correlation import (
    correlation_intervals,
    correlations,
    correlations_with_intervals,
    datamodeling_score,
)
from dit_mlflow.evaluation.detection import detection, recall_curve
from dit_mlflow.evaluation.metrics import Metrics, mean_scores, sample_scores
from dit_mlflow.evaluation.patterns import correlations_by_pattern, pattern_counts, patterns, window_correlations
from dit_mlflow.evaluation.stability import stability
from dit_mlflow.evaluation.trials import mean_interval
from dit_mlflow.evaluation.trust import attainable, trust

__all__ = [
    "Metrics",
    "attainable",
    "correlation_intervals",
    "correlations",
    "correlations_by_pattern",
    "correlations_with_intervals",
    "datamodeling_score",
    "detection",
    "mean_interval",
    "mean_scores",
    "pattern_counts",
    "patterns",
    "recall_curve",
    "sample_scores",
    "stability",
    "trust",
    "window_correlations",
]
