"""Trainings on random subsets of the data: ground truth of group effects, and the data of three methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Kind, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import Removal, Reweighted, is_absent
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload


@dataclass(frozen=True, eq=False)
class Subsets:
    """Results of trainings on random subsets of the data, to compare any number of methods with.

    Attributes:
        kept: which samples each subset contains, bool ``[subsets, samples]``.
        changes: of each query from its value in the recorded training, ``[windows, queries, subsets]``.
        windows: of the changes.
    """

    kept: np.ndarray
    changes: np.ndarray
    windows: tuple[Window, ...]


def train_on_subsets(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    subsets: int = 32,
    share: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    effort: Effort | None = None,
    removal: Removal = "weight",
    known: Subsets | None = None,
) -> Subsets:
    """Train again as recorded, with weight 0 on the samples outside of a random subset.

    As with leave-one-out, batches, their denominators and random draws are as recorded, and the kind says in which
    steps the samples are absent.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        subsets: their number.
        share: fraction of the samples in each subset, drawn by ``seed`` without replacement.
        dtype, effort, removal: as for :func:`dit_mlflow.leave_one_out`; the recorded dtype is enough, since changes are
            large.
        known: the result of the same call for fewer subsets, of these windows and perhaps others; only the rest are
            trained.

    Raises:
        InputError: fewer than 3 subsets, a share that makes subsets empty or complete, or ``known`` of other windows or
            subsets.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.

    Cost: one training for each subset (``local``: for each set of disjoint windows; ``final``: for each window).
    """
    n = workload.num_samples
    size = round(share * n)
    if subsets < 3 or not 0 < size < n:
        raise InputError(
            f"{subsets} subsets with {size} of {n} samples; expected 3 or more, each of some samples but not all"
        )
    generator = np.random.default_rng(seed)
    kept = np.zeros((subsets, n), dtype=bool)
    for row in kept:
        row[generator.choice(n, size=size, replace=False)] = True
    question = Question.of(trajectory, workload, windows, kind, queries)
    if known is not None:
        _check_known(known, kept, question.windows)
    rest = kept if known is None else kept[len(known.kept) :]
    changes, _ = retrain(question, Reweighted(rest.astype(np.float64), is_absent(removal)), dtype, effort)
    if known is not None:
        of_known = known.changes[[known.windows.index(window) for window in question.windows]]
        changes = np.concatenate([of_known, changes], axis=2)
    return Subsets(kept, changes, tuple(windows))


def _check_known(known: Subsets, kept: np.ndarray, windows: Sequence[Window]) -> None:
    missing = [window for window in windows if window not in known.windows]
    if missing or len(known.kept) >= len(kept) or not np.array_equal(known.kept, kept[: len(known.kept)]):
        raise InputError(
            f"known has {len(known.kept)} subsets in windows {', '.join(map(str, known.windows))}; expected fewer than "
            f"{len(kept)}, of the same share and seed, in windows {', '.join(map(str, windows))} and perhaps others"
        )


def random_subsets(samples: int, subsets: int, share: float, seed: int) -> np.ndarray:
    """Which samples each subset keeps, bool ``[subsets, samples]``: each with probability ``share``, independently.

    Subsets of one size, as in the papers, cannot distinguish an effect that all samples share from a constant: scores
    from them sum to about 0, so that half of the samples always seem harmful. With varying sizes, signs are right.

    Raises:
        InputError: ``subsets``, ``share`` or ``seed`` cannot be used, or a sample is in all subsets or in none.
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
        # So many that with probability 0.99 each sample is in some subset and outside of another.
        enough = math.ceil(math.log(0.01 / samples) / math.log(max(share, 1 - share)))
        raise InputError(
            f"{len(mute)} of {samples} samples ({mute[:5].tolist()}{'…' if len(mute) > 5 else ''}) are in all of the "
            f"{subsets} subsets or in none, so nothing is known about them; take {enough} subsets or more, or a share "
            f"closer to 0.5 than {share}"
        )
    return kept


def outcomes(
    question: Question, kept: np.ndarray, dtype: torch.dtype | None, effort: Effort
) -> tuple[np.ndarray, float]:
    """Exact changes of the queries when some samples are kept and the others have weight 0.

    Args:
        question: windows, kind and queries.
        kept: bool ``[R, samples]``; equal rows are trained once, and a row that keeps all samples is not trained.
        dtype, effort: as for :func:`dit_mlflow.leave_one_out`.

    Returns:
        Changes ``[windows, queries, R]`` from the recorded training; and the largest drift of the replay.

    Raises:
        UnsupportedError: a query is not finite after some of these trainings.
    """
    rows, which = np.unique(kept, axis=0, return_inverse=True)
    found, drift = retrain(question, Reweighted(rows.astype(np.float64)), dtype, effort)
    broken = ~np.isfinite(found).all(axis=(0, 1))
    if broken.any():
        largest = int(rows[broken].sum(axis=1).max())
        raise UnsupportedError(
            f"after {int(broken.sum())} of {len(rows)} trainings on subsets of the data, a query is not finite (the "
            f"largest such subset has {largest} of {rows.shape[1]} samples); leave_one_out stays closer to the "
            "recorded run"
        )
    return found[:, :, which.reshape(-1)], drift


def met(question: Question) -> np.ndarray:
    """Samples in steps from which the kind removes them, bool ``[windows, samples]``; all others have the effect 0.

    Random subsets would show that 0 only up to noise.
    """
    first = [0 if question.kind == "cumulative" else window.start for window in question.windows]
    found = np.zeros((len(question.windows), question.workload.num_samples), dtype=bool)
    for row, start, window in zip(found, first, question.windows, strict=True):
        for t in range(start, window.end):
            row[question.trajectory.step(t).samples] = True
    return found
