"""Retrain exactly without the samples that an estimate says stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.influence.kind import check_kind
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import LeftOut
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload


def confirm(
    estimate: Influence,
    trajectory: Trajectory,
    workload: Workload,
    m: int,
    dtype: torch.dtype | None = torch.float64,
    effort: Effort | None = None,
    queries: Sequence[Query] | None = None,
    kind: Kind | None = None,
) -> Influence:
    """Exact leave-one-out for the ``m`` samples of largest absolute score in each window.

    Args:
        estimate: scores of one query.
        trajectory, workload: that it was computed from.
        m: samples to confirm in each window.
        dtype, effort: of the retraining, see :func:`dit_mlflow.leave_one_out`.
        queries: what the estimate was asked on, as it was given there; ``None`` = the mean validation loss.
        kind: of the exact scores, default: the estimate's. One without (``none``: ``tracin``, ``grad_dot``, …) needs
            it, unless its windows are all of training, where the kinds are the same.

    Returns:
        Scores like ``estimate``'s, exact where confirmed and NaN elsewhere.

    Raises:
        InputError: ``m`` is not between 1 and the number of samples, the estimate has several queries or another one
            than ``queries``, or ``kind`` is missing or another one than the estimate's.

    Cost: ``m`` trainings at most for disjoint ``local`` windows, and for each other window.
    """
    samples = estimate.scores.shape[2]
    if not 1 <= m <= samples or len(estimate.queries) != 1:
        raise InputError(
            f"m={m} samples to confirm and {len(estimate.queries)} queries; expected 1 … {samples} and one query"
        )
    asked_kind = _kind(estimate, kind, Window(0, trajectory.num_steps))
    asked = Question.of(trajectory, workload, estimate.windows, asked_kind, queries)
    names = [query.name for query in asked.queries]
    if names != list(estimate.queries):
        raise InputError(
            f"the scores to confirm are of the query {estimate.queries[0]!r}, the exact ones would be of "
            f"{', '.join(map(repr, names))}; give confirm(queries=...) those that the estimate was asked on"
        )
    exact = np.full(estimate.scores.shape, np.nan)
    drift = 0.0
    for k, window in enumerate(asked.windows):
        chosen, found, met = exact_scores(replace(asked, windows=(window,)), estimate.scores[k], m, dtype, effort)
        exact[k][:, chosen], drift = found, max(drift, met)
    return asked.answer(exact, "leave_one_out", str(dtype or "recorded"), num_removed=m, max_drift=drift)


def _kind(estimate: Influence, kind: Kind | None, whole: Window) -> Kind:
    """Of the exact scores."""
    if estimate.kind != "none":
        if kind not in (None, estimate.kind):
            raise InputError(f"kind={kind!r} to confirm scores of kind {estimate.kind!r}; expected the same, or None")
        return check_kind(estimate.kind)
    if kind is not None:
        return check_kind(kind)
    if any(window != whole for window in estimate.windows):
        raise InputError(
            f"{estimate.method} has no kind of window score, and within training the exact score of a window depends "
            "on it; give confirm(kind=...) 'local', 'final' or 'cumulative'"
        )
    return "local"


def exact_scores(
    question: Question, scores: np.ndarray, m: int, dtype: torch.dtype | None, effort: Effort | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Samples ``[R]`` that are among the ``m`` of largest absolute score ``[queries, n]`` for any query of one window.

    With them, their exact scores ``[queries, R]``, and the largest drift of the replay.
    """
    chosen = np.unique(np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :m])
    changes, drift = retrain(question, LeftOut(chosen), dtype, effort)
    return chosen, changes[0], drift
