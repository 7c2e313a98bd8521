"""Equal scores at a cut: what is chosen must not depend on the order in which samples happen to be numbered."""

from __future__ import annotations

import numpy as np


def shares_of_lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """How likely each sample is among the ``k`` lowest scores of its row, if equal scores are in random order.

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
