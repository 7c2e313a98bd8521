"""The pattern of a sample's influence over training: early, late, stable or fluctuating."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy import stats

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.correlation import correlations_with_intervals
from dit_mlflow.evaluation.figures import EARLY, FLUCTUATING, LATE, PEARSON, SPEARMAN, STABLE
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Influence

PATTERNS = (EARLY.leaf, LATE.leaf, STABLE.leaf, FLUCTUATING.leaf)
"""Early influencer, late bloomer, stable, highly fluctuating (Xu and Wu 2025, arXiv 2502.10793, in words)."""


def patterns(
    influence: Influence, query: str | None = None, concentrated: float = 0.75, mixed: float = 0.25
) -> np.ndarray:
    r"""The pattern of every sample, ``[samples]`` of names from :data:`PATTERNS`, or ``none``: all scores 0 or NaN.

    Scores are first :func:`standardised_scores`; otherwise the first windows, in which the loss falls fastest, would
    make every sample early. Of the sum of :math:`|s_k|` over windows:

    - ``fluctuating``: scores of the minority's sign make up more than ``mixed``;
    - ``early``, ``late``: otherwise, the first (last) half of the windows makes up at least ``concentrated``; a window
      in the middle counts half to each;
    - ``stable``: otherwise.

    Args:
        influence: scores over two windows or more, in the order of training.
        query: default: the first.
        concentrated: in (0.5, 1].
        mixed: in [0, 0.5].

    Raises:
        InputError: there is one window only, or a parameter is outside of its range.
    """
    if len(influence.windows) < 2 or not (0.5 < concentrated <= 1 and 0 <= mixed <= 0.5):
        raise InputError(
            f"patterns of {len(influence.windows)} windows with concentrated={concentrated}, mixed={mixed}; expected "
            "2 windows or more, 0.5 < concentrated <= 1 and 0 <= mixed <= 0.5"
        )
    scores = standardised_scores(influence, query)
    total = np.abs(scores).sum(axis=0)
    count = len(scores)
    first = np.clip(count / 2 - np.arange(count), 0, 1) @ np.abs(scores)
    minority = np.minimum(scores.clip(min=0).sum(axis=0), -scores.clip(max=0).sum(axis=0))
    found = np.select(
        [total == 0, minority > mixed * total, first >= concentrated * total, total - first >= concentrated * total],
        ["none", FLUCTUATING.leaf, EARLY.leaf, LATE.leaf],
        default=STABLE.leaf,
    )
    return np.asarray(found)


def standardised_scores(influence: Influence, query: str | None = None) -> np.ndarray:
    """Scores ``[windows, samples]`` of one query, each window's divided by their root mean square over samples.

    Missing and infinite scores count as 0; a window whose scores are all 0 stays so.
    """
    position = 0 if query is None else influence.queries.index(query)
    scores = np.nan_to_num(influence.scores[:, position], posinf=0.0, neginf=0.0)
    size = np.sqrt((scores**2).mean(axis=1, keepdims=True))
    return np.divide(scores, size, out=np.zeros_like(scores), where=size > 0)


def pattern_counts(names: np.ndarray) -> Metrics:
    """Number of samples with each pattern, by name."""
    return Metrics({name: float((names == name).sum()) for name in PATTERNS})


def correlations_by_pattern(estimate: np.ndarray, truth: np.ndarray, names: np.ndarray) -> Metrics:
    """Agreement with ground truth among the samples of each pattern.

    Args:
        estimate, truth: ``[samples]``, as for :func:`dit_mlflow.evaluation.correlation.correlations`.
        names: of each sample's pattern, from :func:`patterns`.

    Returns:
        ``early/spearman``, ``early/pearson`` and so on with their intervals, for the patterns that occur.
    """
    found = Metrics()
    for name in PATTERNS:
        chosen = names == name
        if chosen.any():
            told = (SPEARMAN.leaf, PEARSON.leaf)
            agreement = correlations_with_intervals(estimate[chosen], truth[chosen], told)
            found = found.and_(agreement.prefixed(f"{name}/"))
    return found


def window_correlations(influence: Influence, query: str | None = None) -> np.ndarray:
    """Spearman correlation of scores between windows, ``[windows, windows]``; NaN where one of them is constant."""
    scores = np.stack([influence.of(k, query) for k in range(len(influence.windows))])
    matrix = np.full((len(scores), len(scores)), np.nan)
    # Windows in which the same samples have scores are ranked together: there may be hundreds.
    masks, mask_of = np.unique(np.isfinite(scores), axis=0, return_inverse=True)
    groups = [np.flatnonzero(mask_of == place) for place in range(len(masks))]
    for (mask, rows), (other_mask, columns) in product(zip(masks, groups, strict=True), repeat=2):
        known = mask & other_mask
        if known.sum() > 1:
            matrix[np.ix_(rows, columns)] = (
                _unit_ranks(scores[rows][:, known]) @ _unit_ranks(scores[columns][:, known]).T
            )
    return matrix.clip(-1.0, 1.0)


def _unit_ranks(scores: np.ndarray) -> np.ndarray:
    """Centred ranks of each row ``[rows, samples]``, of length 1; NaN where a row is constant."""
    ranks = stats.rankdata(scores, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    centred[np.ptp(scores, axis=1) == 0] = np.nan
    found: np.ndarray = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return found
