"""Linear datamodeling score: do summed scores foretell what training on a part of the data does?"""

from __future__ import annotations

import numpy as np
from scipy import stats

from dit_mlflow.evaluation.figures import HIGH, LDS, LOW
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Window
from dit_mlflow.retraining.subsets import Subsets


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
        return Metrics(undefined={LDS.leaf: reason})
    drawn = np.random.default_rng(seed).integers(len(seen), size=(resamples, len(seen)))
    ranks = stats.rankdata(foretold[drawn], axis=1), stats.rankdata(seen[drawn], axis=1)
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True) if np.ptp(a) and np.ptp(b)]
    low, high = np.quantile(found, [0.025, 0.975])
    value = float(stats.spearmanr(foretold, seen).statistic)
    return Metrics({LDS.leaf: value, LDS.leaf + LOW: low, LDS.leaf + HIGH: high})
