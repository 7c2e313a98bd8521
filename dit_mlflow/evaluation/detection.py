"""How well scores find deliberately damaged samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.figures import AUROC, AVERAGE_PRECISION, CHANCE, DETECTION_ACCURACY, RECALL_AT_K
from dit_mlflow.evaluation.metrics import Metrics

NAMES = (DETECTION_ACCURACY.leaf, RECALL_AT_K.leaf, AUROC.leaf, AVERAGE_PRECISION.leaf)


def detection(scores: np.ndarray, corrupted: Sequence[int]) -> Metrics:
    """Detection of corrupted samples by low (harmful) scores, each figure beside its value by chance.

    The ``k`` lowest scores are flagged, ``k`` = number of corrupted samples with a score. If several scores equal the
    ``k``-th lowest, accuracy and recall are the expectations over random order among them, as on :func:`recall_curve`;
    recall times ``k`` need not be a whole number then.

    Args:
        scores: ``[samples]``; samples with NaN are left out.
        corrupted: their indices.

    Returns:
        ``accuracy`` over all samples, ``recall_at_k``, ``auroc`` and ``average_precision``, each in [0, 1], and
        ``accuracy_chance`` and so on: the exact expectations for random order, see :func:`chance`. Undefined, with the
        reason, if no sample or every sample is corrupted, or all scores are equal.
    """
    scores, damaged = _known(scores, corrupted)
    k = int(damaged.sum())
    if k in (0, len(scores)) or (scores == scores[0]).all():
        reason = f"{k} of {len(scores)} samples are corrupted" if k in (0, len(scores)) else "all scores are equal"
        return Metrics(undefined=dict.fromkeys(NAMES, reason))
    hits = float(shares_of_lowest(scores, k)[damaged].sum())
    values = {
        DETECTION_ACCURACY.leaf: 1 - 2 * (k - hits) / len(scores),
        RECALL_AT_K.leaf: hits / k,
        AUROC.leaf: float(roc_auc_score(damaged, -scores)),
        AVERAGE_PRECISION.leaf: float(average_precision_score(damaged, -scores)),
    }
    return Metrics(values | {name + CHANCE: value for name, value in chance(k, len(scores)).items()})


def chance(k: int, n: int) -> dict[str, float]:
    """Expectation of each figure of :func:`detection` if all orders of the scores are equally likely.

    With ``s = k / n`` and ``H = 1 + 1/2 + ... + 1/n``: accuracy ``1 - 2 s (1 - s)``, recall ``s``, AUROC 0.5, average
    precision ``(H + (n - H) (k - 1) / (n - 1)) / n``, which exceeds ``s`` and tends to it as ``n`` grows.

    Args:
        k, n: corrupted samples, and all, ``0 < k < n``.
    """
    share, harmonic = k / n, float((1 / np.arange(1, n + 1)).sum())
    precision = (harmonic + (n - harmonic) * (k - 1) / (n - 1)) / n
    return {
        DETECTION_ACCURACY.leaf: 1 - 2 * share * (1 - share),
        RECALL_AT_K.leaf: share,
        AUROC.leaf: 0.5,
        AVERAGE_PRECISION.leaf: precision,
    }


def recall_curve(scores: np.ndarray, corrupted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Share of the corrupted samples found, against the share of all samples inspected, lowest scores first.

    Args:
        scores, corrupted: as for :func:`detection`.

    Returns:
        ``(share inspected, recall)``, each ``[samples with a score + 1]``, from (0, 0) to (1, 1). Within equal scores
        the recall is that of random order, a straight line; the diagonal is chance.

    Raises:
        InputError: no sample with a score is corrupted.
    """
    scores, damaged = _known(scores, corrupted)
    if not damaged.any():
        raise InputError(f"none of the {len(scores)} samples with a score is corrupted; there is nothing to recall")
    _, group = np.unique(scores, return_inverse=True)
    inspected = np.r_[0, np.bincount(group).cumsum()]
    found = np.r_[0, np.bincount(group, weights=damaged).cumsum()]
    counts = np.arange(len(scores) + 1)
    return counts / len(scores), np.interp(counts, inspected, found) / damaged.sum()


def _known(scores: np.ndarray, corrupted: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Samples with a score: their scores, and whether each is corrupted."""
    outside = [int(index) for index in corrupted if not 0 <= index < len(scores)]
    if outside:
        raise InputError(f"corrupted names samples {outside[:5]}; there are scores of 0 … {len(scores) - 1}")
    known = np.isfinite(scores)
    damaged = np.zeros(len(scores), dtype=bool)
    damaged[list(corrupted)] = True
    return scores[known], damaged[known]


def shares_of_lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """Probability that each sample is among the ``k`` lowest scores of its row, with equal scores in random order.

    Args:
        scores: ``[…, samples]``, finite.
        k: at least 1, at most as many as there are samples.

    Returns:
        ``[…, samples]`` in [0, 1], ``k`` in sum: 1 below the ``k``-th lowest score and 0 above it; at it, the places
        that are left, over the samples that share them.
    """
    cut = np.partition(scores, k - 1, axis=-1)[..., k - 1 : k]
    below, tied = scores < cut, scores == cut
    left = k - below.sum(axis=-1, keepdims=True)
    return np.asarray(below + tied * (left / tied.sum(axis=-1, keepdims=True)))
