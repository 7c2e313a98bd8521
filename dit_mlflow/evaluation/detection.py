"""How well scores find samples that were deliberately damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from dit_mlflow.evaluation.metrics import Metrics

NAMES = ("accuracy", "recall_at_k", "auroc", "average_precision")


def detection(scores: np.ndarray, corrupted: Sequence[int]) -> Metrics:
    """Detection of corrupted samples by low (harmful) scores.

    The ``k`` lowest scores are flagged, ``k`` = number of corrupted samples with a score.

    Args:
        scores: ``[samples]``; samples with NaN are left out.
        corrupted: their indices.

    Returns:
        ``accuracy`` over all samples, ``recall_at_k``, ``auroc`` and ``average_precision``, each in [0, 1]. By chance
        these are ``1 - 2 s (1 - s)``, ``s``, 0.5 and ``s`` for a corrupted share ``s``. Undefined, with the reason, if
        no sample or every sample is corrupted, or all scores are equal.
    """
    known = np.isfinite(scores)
    damaged = np.zeros(len(scores), dtype=bool)
    damaged[list(corrupted)] = True
    scores, damaged = scores[known], damaged[known]
    k = int(damaged.sum())
    if k in (0, len(scores)) or (scores == scores[0]).all():
        reason = f"{k} of {len(scores)} samples are corrupted" if k in (0, len(scores)) else "all scores are equal"
        return Metrics(undefined=dict.fromkeys(NAMES, reason))
    flagged = np.zeros(len(scores), dtype=bool)
    flagged[np.argsort(scores, kind="stable")[:k]] = True
    return Metrics(
        {
            "accuracy": float((flagged == damaged).mean()),
            "recall_at_k": float((flagged & damaged).sum() / k),
            "auroc": float(roc_auc_score(damaged, -scores)),
            "average_precision": float(average_precision_score(damaged, -scores)),
        }
    )
