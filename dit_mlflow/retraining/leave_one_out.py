"""Ground truth: train again without each sample, exactly as recorded otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import LeftOut
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
) -> Influence:
    """Exact influence by retraining without each sample: ground truth for :func:`dit_mlflow.track`.

    Removing sample ``j`` sets its weight to 0 where the kind says so, and nothing else: other samples' coefficients,
    batch order, hyperparameters and random draws are as recorded; optimizer state and clipping follow.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        samples: which samples to remove: indices, a number of them (drawn by ``sample_seed``), or ``None`` for all.
        dtype: of the retraining, ``None`` = as recorded; in float32 rounding can hide the effect of one sample.
        sample_seed: seed of that draw.
        effort: processes or machines to spread over, memory, and a folder to go on from after a break.

    Returns:
        Scores ``[windows, queries, training samples]``, with the sign of :func:`dit_mlflow.track`; NaN for samples that
        were not asked for. A sample that a window never met scores exactly 0 (``local``, ``final``).

    Raises:
        InputError: a window, kind, query or sample that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.

    Cost: one training from the window's start per sample (``cumulative``: one for all windows). Retrainings run side by
    side under ``torch.func.vmap`` in chunks that fit the memory budget, or one after the other, whichever a timed
    step shows to be faster.
    """
    question = Question.of(trajectory, workload, windows, kind, queries)
    removed = choose_samples(samples, workload.num_samples, sample_seed)
    scores = np.full(question.shape, np.nan)
    scores[:, :, removed], drift = retrain(question, LeftOut(removed), dtype, effort)
    return question.answer(scores, "leave_one_out", str(dtype or "recorded"), num_removed=len(removed), max_drift=drift)


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
