"""The interval of a mean over few repetitions."""

from __future__ import annotations

import numpy as np
from scipy import stats


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of independent values ``[2 or more]``, by Student's t."""
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * float(stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half
