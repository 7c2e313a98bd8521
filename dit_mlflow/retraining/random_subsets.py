"""Trainings on random subsets of the samples: what downsampling, datamodels and Shapley values are read from."""

from __future__ import annotations

import math

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.retraining.counterfactuals import Reweighted
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain


def random_subsets(samples: int, subsets: int, share: float, seed: int) -> np.ndarray:
    """Which samples each subset keeps, bool ``[subsets, samples]``: each with probability ``share``, independently.

    Subsets that all have one size, as in the papers, cannot tell a harm or help that all samples have in common from
    a constant: scores from them sum to about 0, so that half of the samples always seem harmful. With sizes that vary
    the sign means what it says.

    Raises:
        InputError: a number or share that cannot be used, or a sample that is in all subsets or in none.
    """
    if subsets < 2 or not 0 < share < 1 or seed < 0:
        raise InputError(
            f"{subsets} subsets, share={share}, seed={seed}; expected 2 or more, a share between 0 and 1, and a "
            "seed of 0 or more"
        )
    kept = np.random.default_rng(seed).random((subsets, samples)) < share
    times = kept.sum(axis=0)
    mute = np.flatnonzero((times == 0) | (times == subsets))
    if len(mute):
        # Few enough that the least frequent of the two happens to every sample, in 99 of 100 draws.
        enough = math.ceil(math.log(0.01 / samples) / math.log(max(share, 1 - share)))
        raise InputError(
            f"{len(mute)} of {samples} samples ({mute[:5].tolist()}{'…' if len(mute) > 5 else ''}) are in all of the "
            f"{subsets} subsets or in none, which says nothing about them; take {enough} subsets or more, or a share "
            f"nearer to 0.5 than {share}"
        )
    return kept


def outcomes(
    question: Question, kept: np.ndarray, dtype: torch.dtype | None, effort: Effort
) -> tuple[np.ndarray, float]:
    """Exact changes of the queries when only some samples are kept, the others have weight 0.

    Args:
        question: windows, kind and queries.
        kept: bool ``[R, samples]``; equal rows are trained once, and a row that keeps all samples not at all.
        dtype, effort: as for :func:`dit_mlflow.leave_one_out`.

    Returns:
        Changes ``[windows, queries, R]`` against the recorded training; and the largest drift of the replay.

    Raises:
        UnsupportedError: some of these trainings lead to a query that is not a finite number.
    """
    rows, which = np.unique(kept, axis=0, return_inverse=True)
    found, drift = retrain(question, Reweighted(rows.astype(np.float64)), dtype, effort)
    broken = ~np.isfinite(found).all(axis=(0, 1))
    if broken.any():
        largest = int(rows[broken].sum(axis=1).max())
        raise UnsupportedError(
            f"{int(broken.sum())} of {len(rows)} trainings on parts of the data gave a query that is not a finite "
            f"number (the largest part: {largest} of {rows.shape[1]} samples); leave_one_out stays closer to the "
            "recorded run"
        )
    return found[:, :, which.reshape(-1)], drift


def met(question: Question) -> np.ndarray:
    """Which samples each window can be influenced by, bool ``[windows, samples]``: those met while they are removed.

    The removal of any other changes nothing, exactly; random subsets alone would only say so up to noise.
    """
    first = [0 if question.kind == "cumulative" else window.start for window in question.windows]
    found = np.zeros((len(question.windows), question.workload.num_samples), dtype=bool)
    for row, start, window in zip(found, first, question.windows, strict=True):
        for t in range(start, window.end):
            row[question.trajectory.step(t).samples] = True
    return found
