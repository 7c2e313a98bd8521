"""How far an estimate can be trusted, from a few exact retrainings; and how far the ground truth itself can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.correlation import FEWEST, correlations, correlations_with_intervals
from dit_mlflow.evaluation.figures import (
    ATTAINABLE,
    SLOPE_RATIO,
    SMOOTHNESS,
    SPREAD_RATIO,
    TRUST_PEARSON,
    TRUST_SAMPLES,
    TRUST_SPEARMAN,
)
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Influence, Kind, Query, check_kind
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort, leave_one_out
from dit_mlflow.retraining.counterfactuals import Reweighted
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload

RANDOM_SAMPLES = 24
"""Random samples that are left out exactly."""

TRUST_RESAMPLES = 1000


def trust(
    estimate: Influence,
    trajectory: Trajectory,
    workload: Workload,
    samples: int = RANDOM_SAMPLES,
    truth: Influence | None = None,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
    effort: Effort | None = None,
    queries: Sequence[Query] | None = None,
    kind: Kind | None = None,
) -> tuple[Metrics, ...]:
    r"""Fidelity from a random sample, and how linear training is in the weights of the samples, window by window.

    - ``spearman``, ``pearson`` with ``_low`` and ``_high``: agreement with exact leave-one-out over a random sample,
      and a percentile bootstrap interval (95 % nominal; ``benchmarks/trust.py`` says how often it holds).
    - ``spread_ratio``: standard deviation of the estimates over that of the truth, over the same samples; 1 is right,
      above 1 effects are exaggerated.
    - ``smoothness``, ``slope_ratio``: two retrainings with weights :math:`1 \pm d`, :math:`d = s / |s|` along the
      scores :math:`s`, as large as one removal. Of the changes :math:`c_\pm` of the query, a derivative can predict the
      odd part :math:`o = (c_+ - c_-) / 2`, and not the even part :math:`e = (c_+ + c_-) / 2`: smoothness is
      :math:`|o| / (|o| + |e|)`, 1 for a training that is linear in the weights. The slope ratio is :math:`o` over the
      predicted :math:`-s \cdot d = -|s|`: 1 if the derivative holds up to the size of a removal.

    Args:
        estimate: scores of one query.
        trajectory, workload: that it was computed from.
        samples: how many are drawn by ``seed``, 3 or more; all, if there are fewer.
        truth: exact leave-one-out for the estimate's windows, if it is known: its samples are used instead.
        dtype, effort, queries: of the retrainings, see :func:`dit_mlflow.leave_one_out`.
        kind: of the retrainings, for an estimate without one (``none``); otherwise its own.

    Returns:
        For each window of the estimate, the figures above and ``samples``, the number of them with both scores. Figures
        that are undefined (all scores equal, nothing changed) have a reason.

    Raises:
        InputError: too few samples, several queries, or no kind is known.

    Cost: ``samples + 2`` trainings from each window's start; ``cumulative``: ``samples``, and 2 for each window.
    """
    kind = check_kind(estimate.kind if estimate.kind != "none" or kind is None else kind)
    if samples < 3 or len(estimate.queries) != 1:
        raise InputError(f"samples={samples}, {len(estimate.queries)} queries; expected 3 samples or more and 1 query")
    if truth is None:
        count = min(samples, workload.num_samples)
        truth = leave_one_out(
            trajectory, workload, estimate.windows, kind, queries, count, dtype, sample_seed=seed, effort=effort
        )
    found = []
    for k, window in enumerate(estimate.windows):
        scores, exact = estimate.of(k), truth.of(window)
        question = Question.of(trajectory, workload, [window], kind, queries)
        figures = _agreement(scores, exact).and_(_linearity(question, scores, dtype, effort))
        found.append(figures if estimate.measures == "query" else _without_sizes(figures, estimate.method))
    return tuple(found)


def _without_sizes(figures: Metrics, method: str) -> Metrics:
    names = (SPREAD_RATIO.leaf, SLOPE_RATIO.leaf)
    values = {name: value for name, value in figures.values.items() if name not in names}
    reason = f"the scores of {method} are not in units of the query"
    return Metrics(values, {**figures.undefined, **dict.fromkeys(names, reason)})


def _agreement(estimate: np.ndarray, truth: np.ndarray) -> Metrics:
    known = np.isfinite(estimate) & np.isfinite(truth)
    count = Metrics({TRUST_SAMPLES.leaf: float(known.sum())})
    names = (TRUST_SPEARMAN.leaf, TRUST_PEARSON.leaf)
    agreement = correlations_with_intervals(estimate, truth, names, TRUST_RESAMPLES)
    if agreement.undefined:
        reason = agreement.undefined[TRUST_SPEARMAN.leaf]
        return count.and_(agreement).and_(Metrics(undefined={SPREAD_RATIO.leaf: reason}))
    ratio = float(np.std(estimate[known]) / np.std(truth[known]))
    return count.and_(agreement).and_(Metrics({SPREAD_RATIO.leaf: ratio}))


def _linearity(question: Question, scores: np.ndarray, dtype: torch.dtype | None, effort: Effort | None) -> Metrics:
    scores = np.nan_to_num(scores)
    size = float(np.linalg.norm(scores))
    names = (SMOOTHNESS.leaf, SLOPE_RATIO.leaf)
    if size == 0:
        return Metrics(undefined=dict.fromkeys(names, "all scores are 0: there is no direction to go along"))
    direction = scores / size
    changes, _ = retrain(question, Reweighted(np.stack([1 + direction, 1 - direction])), dtype, effort)
    up, down = changes[0, 0].tolist()
    odd, even = (up - down) / 2, (up + down) / 2
    if odd == even == 0:
        return Metrics(undefined=dict.fromkeys(names, "other weights on the samples changed nothing"))
    return Metrics({SMOOTHNESS.leaf: abs(odd) / (abs(odd) + abs(even)), SLOPE_RATIO.leaf: -odd / size})


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

    No estimate can agree better with the truth than the truth does with itself: read correlations against these.

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
    return tuple(correlations(again.of(k), truth.of(k), FEWEST).prefixed(ATTAINABLE) for k in range(len(truth.windows)))
