"""The noise floor of the ground truth: how well exact leave-one-out agrees with itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_mlflow.evaluation.correlation import correlations
from dit_mlflow.evaluation.figures import ATTAINABLE
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Influence, Query, check_kind
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort, leave_one_out
from dit_mlflow.workload import Workload

FLOOR_SAMPLES = 32
"""Random samples that are left out once more."""


def attainable(
    truth: Influence,
    trajectory: Trajectory,
    workload: Workload,
    samples: int = FLOOR_SAMPLES,
    seed: int = 0,
    effort: Effort | None = None,
    queries: Sequence[Query] | None = None,
) -> tuple[Metrics, ...]:
    """Leave-one-out in the recorded precision against the truth in float64, window by window.

    An estimate cannot be said to agree better with the truth than the truth with itself: read correlations against
    these figures.

    Args:
        truth: exact leave-one-out in float64, of all samples or some; the first query is judged.
        trajectory, workload: that it was computed from.
        samples: how many of its samples are left out again, drawn by ``seed``; all, if there are fewer.
        effort, queries: of the retrainings, see :func:`dit_mlflow.leave_one_out`.

    Returns:
        For each window of the truth what :func:`correlations` gives, its names with ``attainable_`` before. A run that
        was recorded in float64 attains 1 by definition.

    Cost: as many trainings as samples, in the recorded precision.
    """
    known = np.flatnonzero(np.isfinite(truth.scores).all(axis=(0, 1)))
    chosen = sorted(np.random.default_rng(seed).permutation(known)[:samples].tolist())
    kind = check_kind(truth.kind)
    again = leave_one_out(trajectory, workload, truth.windows, kind, queries, chosen, dtype=None, effort=effort)
    return tuple(correlations(again.of(k), truth.of(k)).prefixed(ATTAINABLE) for k in range(len(truth.windows)))
