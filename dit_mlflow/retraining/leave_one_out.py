"""Ground truth: train again as recorded, but without one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence, Kind, Query, Window, check_kind
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import LeftOut, Removal, is_absent
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload


def leave_one_out(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    samples: Sequence[int] | int | None = None,
    dtype: torch.dtype | None = torch.float64,
    sample_seed: int = 0,
    effort: Effort | None = None,
    removal: Removal = "weight",
) -> Influence:
    """Exact influence by retraining without each sample: ground truth for :func:`dit_mlflow.track`.

    Removing sample ``j`` sets its weight to 0 in the steps in which the kind has it absent, and changes nothing else:
    other samples' coefficients, batch order, hyperparameters and random draws are as recorded; parameters, optimizer
    state, buffers and clipping follow the retraining.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        samples: which samples to remove: indices, a number of them (drawn by ``sample_seed``), or ``None`` for all.
        dtype: of the retraining; ``None`` = as recorded. In float32, rounding can hide the effect of one sample.
        sample_seed: seed of that draw.
        effort: processes or machines, memory, and a folder for finished parts.
        removal: ``"weight"`` = as above; ``"absent"`` = the sample is not in its batches either, which is another
            question where the loss couples samples (contrastive terms, mixup, batch statistics). The coefficients of
            the others stay. A micro-batch of that sample alone is left out; a step without any other is made with a
            gradient of 0. What the forward pass draws (dropout) is drawn for a smaller batch, so differs.

    Returns:
        Scores ``[windows, queries, training samples]``, with the sign of :func:`dit_mlflow.track`; NaN for samples that
        were not removed. A sample that is in no step of a window scores exactly 0 (``local``, ``final``).
        ``metadata["removal"]`` says which removal the scores are of.

    Raises:
        InputError: a window, kind, query or sample that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: ``removal="absent"``, and the model fails on the smaller batch (batch statistics of one).

    Cost: one training from the window's start for each sample (``cumulative``: one for all windows). Retrainings run
    side by side under ``torch.func.vmap``, in chunks that fit the memory budget, or one after the other, whichever is
    faster in a timed step; with ``removal="absent"`` one after the other.
    """
    absent = is_absent(removal)
    question = Question.of(trajectory, workload, windows, kind, queries)
    removed = choose_samples(samples, workload.num_samples, sample_seed)
    scores = np.full(question.shape, np.nan)
    scores[:, :, removed], drift = retrain(question, LeftOut(removed, absent), dtype, effort)
    return question.answer(
        scores,
        "leave_one_out",
        str(dtype or "recorded"),
        asked=removed,
        num_removed=len(removed),
        max_drift=drift,
        removal=removal,
    )


def choose_samples(samples: Sequence[int] | int | None, total: int, seed: int) -> np.ndarray:
    """Sorted indices: those given, a number of them drawn by ``seed``, or all; raises :class:`InputError`."""
    if samples is None:
        return np.arange(total)
    if isinstance(samples, Integral):
        count = int(samples)
        if not 1 <= count <= total:
            raise InputError(f"samples={count}; expected 1 … {total}, or None for all of them")
        return np.sort(np.random.default_rng(seed).choice(total, size=count, replace=False))
    given = np.atleast_1d(np.asarray(samples))
    indices = np.unique(given)
    if len(indices) == 0 or given.dtype.kind not in "iu" or indices[0] < 0 or indices[-1] >= total:
        raise InputError(f"samples={given[:5].tolist()}…: expected indices within 0 … {total - 1}")
    return indices


def confirm(
    estimate: Influence,
    trajectory: Trajectory,
    workload: Workload,
    m: int,
    dtype: torch.dtype | None = torch.float64,
    effort: Effort | None = None,
    queries: Sequence[Query] | None = None,
    kind: Kind | None = None,
    removal: Removal = "weight",
) -> Influence:
    """Exact leave-one-out for the ``m`` samples of largest absolute score in each window.

    Args:
        estimate: scores of one query.
        trajectory, workload: from which the estimate was computed.
        m: number of samples to confirm in each window.
        dtype, effort, removal: as for :func:`dit_mlflow.leave_one_out`.
        queries: the estimate's query, as it was given there; ``None`` = the mean validation loss.
        kind: of the exact scores; default: the estimate's. It must be given for an estimate without one (``none``:
            ``tracin``, ``grad_dot``, …), unless each window is all of training, where the kinds coincide.

    Returns:
        Scores of the shape of ``estimate``'s, exact where confirmed and NaN elsewhere.

    Raises:
        InputError: ``m`` is not between 1 and the number of samples, the estimate has several queries or one other than
            ``queries``, or ``kind`` is missing or differs from the estimate's.

    Cost: that of :func:`dit_mlflow.leave_one_out` for ``m`` samples, for each window.
    """
    absent, samples = is_absent(removal), estimate.scores.shape[2]
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
            f"{', '.join(map(repr, names))}; give the estimate's query in confirm(queries=...)"
        )
    exact = np.full(estimate.scores.shape, np.nan)
    drift = 0.0
    for k, window in enumerate(asked.windows):
        one = replace(asked, windows=(window,))
        chosen, found, met = exact_scores(one, estimate.scores[k], m, dtype, effort, absent)
        exact[k][:, chosen], drift = found, max(drift, met)
    name = str(dtype or "recorded")
    return asked.answer(exact, "leave_one_out", name, num_removed=m, max_drift=drift, removal=removal)


def _kind(estimate: Influence, kind: Kind | None, whole: Window) -> Kind:
    """The kind of the exact scores."""
    if estimate.kind != "none":
        if kind not in (None, estimate.kind):
            raise InputError(f"kind={kind!r} to confirm scores of kind {estimate.kind!r}; expected the same, or None")
        return check_kind(estimate.kind)
    if kind is not None:
        return check_kind(kind)
    if any(window != whole for window in estimate.windows):
        raise InputError(
            f"{estimate.method} has no kind of window score, and the exact score of a window within training depends "
            "on it; give confirm(kind=...) 'local', 'final' or 'cumulative'"
        )
    return "local"


def exact_scores(
    question: Question,
    scores: np.ndarray,
    m: int,
    dtype: torch.dtype | None,
    effort: Effort | None,
    absent: bool = False,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Exact scores of the samples that have one of the ``m`` largest absolute ``scores [queries, n]`` of any query.

    Args:
        question: of one window.

    Returns:
        The samples ``[R]``, their exact scores ``[queries, R]``, and the largest drift of the replay.
    """
    chosen = np.unique(np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :m])
    changes, drift = retrain(question, LeftOut(chosen, absent), dtype, effort)
    return chosen, changes[0], drift
