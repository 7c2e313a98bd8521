"""Linear datamodeling score: do summed scores foretell what training on a part of the data does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Kind, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.methods import Effort
from dit_mlflow.methods.counterfactual import retrain
from dit_mlflow.methods.retraining import Reweighted
from dit_mlflow.trajectory import Trajectory, Workload


@dataclass(frozen=True, eq=False)
class Subsets:
    """Trainings on random parts of the data, made once and held against any number of methods.

    Attributes:
        kept: which samples each part holds, bool ``[subsets, samples]``.
        changes: of each query, against the recorded training, ``[windows, queries, subsets]``.
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
) -> Subsets:
    """Train again as recorded with weight 0 on the samples outside of random parts.

    As with leave-one-out, batches, their denominators and random draws stay; where the kind says a sample is
    absent, all samples outside the part are.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        subsets: how many parts.
        share: of the samples that each holds, drawn by ``seed`` without replacement.
        dtype, effort: as for :func:`dit_mlflow.leave_one_out`; the changes are large, the recorded dtype will do.

    Raises:
        InputError: fewer than 3 subsets, or a share that leaves a part empty or whole.

    Cost: one training for each subset (``local``: for each set of disjoint windows).
    """
    n = workload.num_samples
    size = round(share * n)
    if subsets < 3 or not 0 < size < n:
        raise InputError(
            f"{subsets} subsets with {size} of {n} samples; expected 3 or more, each a part of the samples"
        )
    generator = np.random.default_rng(seed)
    kept = np.zeros((subsets, n), dtype=bool)
    for row in kept:
        row[generator.choice(n, size=size, replace=False)] = True
    question = Question.of(trajectory, workload, windows, kind, queries)
    changes, _ = retrain(question, Reweighted(kept.astype(np.float64)), dtype, effort)
    return Subsets(kept, changes, tuple(windows))


def datamodeling_score(
    scores: np.ndarray, subsets: Subsets, window: Window | int = 0, query: int = 0, resamples: int = 1000, seed: int = 0
) -> Metrics:
    """LDS of Park et al. 2023 (arXiv 2303.14186, definition 2.3): Spearman correlation over subsets.

    Between the change of the query that the scores foretell, the sum of those of the samples left out, and the change
    that training on the subset made.

    Args:
        scores: ``[samples]``; NaN counts as 0.
        subsets: from :func:`train_on_subsets`.
        window, query: which of the changes.
        resamples, seed: of the bootstrap over subsets.

    Returns:
        ``lds``, and ``lds_low``, ``lds_high``: a percentile interval of 95 %. Undefined, with the reason, where all
        foretold changes are equal.
    """
    position = subsets.windows.index(window) if isinstance(window, Window) else window
    foretold, seen = ~subsets.kept @ np.nan_to_num(scores), subsets.changes[position, query]
    if np.ptp(foretold) == 0 or np.ptp(seen) == 0:
        reason = f"all {len(seen)} {'foretold' if np.ptp(foretold) == 0 else 'true'} changes are equal"
        return Metrics(undefined={"lds": reason})
    drawn = np.random.default_rng(seed).integers(len(seen), size=(resamples, len(seen)))
    ranks = stats.rankdata(foretold[drawn], axis=1), stats.rankdata(seen[drawn], axis=1)
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True) if np.ptp(a) and np.ptp(b)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Metrics({"lds": float(stats.spearmanr(foretold, seen).statistic), "lds_low": low, "lds_high": high})
