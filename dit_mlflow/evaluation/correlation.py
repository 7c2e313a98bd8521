"""How well an estimate agrees with ground truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from dit_mlflow.evaluation.figures import HIGH, JACCARD_30, JACCARD_BOTTOM_30, KENDALL, LOW, PEARSON, SPEARMAN
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.evaluation.ties import shares_of_lowest

TOP_SHARE = 0.3
"""Share of samples that the Jaccard index compares (the paper's 30 %)."""

RESAMPLES = 200
"""Bootstrap samples behind an interval."""

FEWEST = 8
"""Samples without which there is no interval: of three points, resamples are mostly lines, and it would be [1, 1]."""


def correlations(estimate: np.ndarray, truth: np.ndarray) -> Metrics:
    """``pearson``, ``spearman``, ``kendall`` (tau-b), ``jaccard_30`` and ``jaccard_bottom_30`` between score vectors.

    Args:
        estimate, truth: ``[samples]``; samples where either is NaN are left out.

    Returns:
        Each in [-1, 1], Jaccard in [0, 1]: the overlap of the two sets of the 30 % highest (lowest) scores. Where the
        bound of a set falls among equal scores, which of them belong to it is left to chance, independently for the two
        vectors: of the expected number :math:`m` of shared samples among :math:`k` each, the index is
        :math:`m / (2 k - m)`. So it does not depend on the order of the samples, and scores that tie there agree with
        themselves by less than 1. Undefined, with the reason, for fewer than 2 samples, and for scores that
        are constant, or are so but for rounding.
    """
    known = np.isfinite(estimate) & np.isfinite(truth)
    estimate, truth = estimate[known], truth[known]
    reason = _why_undefined(estimate, truth)
    if reason is not None:
        return Metrics(undefined=dict.fromkeys(MEASURES, reason))
    return Metrics({name: float(_MEASURES[name](estimate[None], truth[None])[0]) for name in MEASURES})


def correlation_intervals(
    estimate: np.ndarray,
    truth: np.ndarray,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals over samples (Efron 1979) for what :func:`correlations` gives.

    Args:
        estimate, truth: as there.
        confidence: that the interval holds.
        resamples, seed: of the bootstrap.
        names: of the correlations to give; default: all.

    Returns:
        ``(low, high)`` by name; nothing where the correlation is undefined, nor for fewer than :data:`FEWEST` samples.
        Resamples without variation are left out.
    """
    known = np.flatnonzero(np.isfinite(estimate) & np.isfinite(truth))
    if len(known) < FEWEST or _why_undefined(estimate[known], truth[known]) is not None:
        return {}
    drawn = np.random.default_rng(seed).choice(known, size=(resamples, len(known)))
    estimates, truths = estimate[drawn], truth[drawn]
    varied = ~(_constant(estimates) | _constant(truths))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name in MEASURES if names is None else names:
        low, high = np.quantile(_MEASURES[name](estimates[varied], truths[varied]), tails)
        intervals[name] = (float(low), float(high))
    return intervals


def correlations_with_intervals(
    estimate: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Metrics:
    """What :func:`correlations` gives, each with ``_low`` and ``_high`` from :func:`correlation_intervals`.

    Args:
        estimate, truth, resamples, confidence: as there.
        names: of the correlations to give; default: all.
    """
    found = correlations(estimate, truth).only(*(MEASURES if names is None else names))
    intervals = correlation_intervals(estimate, truth, confidence, resamples, names=names)
    bounds = {
        name + end: bound
        for name, interval in intervals.items()
        for end, bound in zip((LOW, HIGH), interval, strict=True)
    }
    return Metrics({**found.values, **bounds}, found.undefined)


def _why_undefined(estimate: np.ndarray, truth: np.ndarray) -> str | None:
    if len(estimate) < 2:
        return f"{len(estimate)} samples have both an estimate and ground truth; at least 2 are needed"
    for name, values in (("estimated", estimate), ("ground truth", truth)):
        if (values == values[0]).all():
            return f"all {len(values)} {name} scores are equal"
        if _constant(values):
            return f"all {len(values)} {name} scores are equal but for rounding (from {values.min()} to {values.max()})"
    return None


def _constant(values: np.ndarray) -> np.ndarray:
    """Of each row of ``[…, samples]``, whether it varies by no more than rounding, in the measure that SciPy warns by.

    From there on the deviations from the mean, which a correlation is made of, are rounding themselves.
    """
    values = values.astype(np.result_type(values, np.float32), copy=False)
    mean = values.mean(axis=-1, keepdims=True)
    rounding = np.finfo(values.dtype).eps ** 0.75 * np.abs(mean[..., 0])
    return np.asarray((np.ptp(values, axis=-1) == 0) | (np.linalg.norm(values - mean, axis=-1) < rounding))


def _pearson(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.asarray(stats.pearsonr(estimate, truth, axis=1).statistic)


def _spearman(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return _pearson(stats.rankdata(estimate, axis=1), stats.rankdata(truth, axis=1))


def _kendall(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.array([stats.kendalltau(a, b).statistic for a, b in zip(estimate, truth, strict=True)])


def _jaccard_of_top(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return _jaccard_of_bottom(-estimate, -truth)


def _jaccard_of_bottom(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    count = max(1, round(TOP_SHARE * estimate.shape[1]))
    shared = (shares_of_lowest(estimate, count) * shares_of_lowest(truth, count)).sum(axis=1)
    return np.asarray(shared / (2 * count - shared))


_MEASURES = {
    PEARSON.leaf: _pearson,
    SPEARMAN.leaf: _spearman,
    KENDALL.leaf: _kendall,
    JACCARD_30.leaf: _jaccard_of_top,
    JACCARD_BOTTOM_30.leaf: _jaccard_of_bottom,
}
"""Each of ``[rows, samples]`` twice, to ``[rows]``."""

MEASURES = tuple(_MEASURES)
