"""How well an estimate agrees with ground truth, sample by sample and summed over groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from dit_mlflow.evaluation.detection import shares_of_lowest
from dit_mlflow.evaluation.figures import HIGH, JACCARD_30, JACCARD_BOTTOM_30, KENDALL, LDS, LOW, PEARSON, SPEARMAN
from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence import Window
from dit_mlflow.retraining.subsets import Subsets

TOP_SHARE = 0.3
"""Share of samples whose Jaccard index is taken (the paper's 30 %)."""

RESAMPLES = 200
"""Bootstrap samples behind an interval."""

FEWEST = 10
"""Fewest samples, or subsets, of a correlation that is logged or told: of fewer, chance alone makes large ones."""


def correlations(estimate: np.ndarray, truth: np.ndarray, fewest: int = 2) -> Metrics:
    """``pearson``, ``spearman``, ``kendall`` (tau-b), ``jaccard_30`` and ``jaccard_bottom_30`` between score vectors.

    Args:
        estimate, truth: ``[samples]``; samples where either is NaN are left out.
        fewest: samples that must be left; what is logged or told has :data:`FEWEST`.

    Returns:
        Each in [-1, 1], Jaccard in [0, 1]: the overlap of the two sets of the 30 % highest (lowest) scores. Equal
        scores at a set's bound belong to it at random, independently in the two vectors: with the expected number
        :math:`m` of shared samples among :math:`k` each, the index is :math:`m / (2 k - m)`. So it does not depend on
        the order of the samples, and scores that tie there agree with themselves by less than 1. Undefined, with the
        reason, for fewer than ``fewest`` samples, and for scores that are constant but for rounding.
    """
    known = np.isfinite(estimate) & np.isfinite(truth)
    estimate, truth = estimate[known], truth[known]
    reason = _why_undefined(estimate, truth, fewest)
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
        confidence: of the interval.
        resamples, seed: of the bootstrap.
        names: of the correlations to give; default: all.

    Returns:
        ``(low, high)`` by name; nothing for fewer than :data:`FEWEST` samples, and where undefined. Resamples
        without variation are left out.
    """
    known = np.flatnonzero(np.isfinite(estimate) & np.isfinite(truth))
    if _why_undefined(estimate[known], truth[known], FEWEST) is not None:
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

    Undefined, with the reason, for fewer than :data:`FEWEST` samples.

    Args:
        estimate, truth, resamples, confidence: as there.
        names: of the correlations to give; default: all.
    """
    found = correlations(estimate, truth, FEWEST).only(*(MEASURES if names is None else names))
    intervals = correlation_intervals(estimate, truth, confidence, resamples, names=names)
    bounds = {
        name + end: bound
        for name, interval in intervals.items()
        for end, bound in zip((LOW, HIGH), interval, strict=True)
    }
    return Metrics({**found.values, **bounds}, found.undefined)


def _why_undefined(estimate: np.ndarray, truth: np.ndarray, fewest: int) -> str | None:
    if len(estimate) < fewest:
        return f"both an estimate and ground truth: {len(estimate)} samples; at least {fewest} are needed"
    for name, values in (("estimated", estimate), ("ground truth", truth)):
        if (values == values[0]).all():
            return f"all {len(values)} {name} scores are equal"
        if _constant(values):
            return f"all {len(values)} {name} scores are equal but for rounding (from {values.min()} to {values.max()})"
    return None


def _constant(values: np.ndarray) -> np.ndarray:
    """Whether each row of ``[…, samples]`` varies by no more than rounding, by the measure of SciPy's warning."""
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


def datamodeling_score(
    scores: np.ndarray,
    subsets: Subsets,
    window: Window | int = 0,
    query: int = 0,
    resamples: int = 1000,
    seed: int = 0,
    fewest: int = 2,
) -> Metrics:
    """LDS of Park et al. 2023 (arXiv 2303.14186, definition 2.3): Spearman correlation over subsets.

    It compares the predicted change of the query, the sum of the scores of the samples left out, with the change that
    training on the subset made.

    Args:
        scores: ``[samples]``; NaN counts as 0.
        subsets: from :func:`train_on_subsets`.
        window, query: which of the changes.
        resamples, seed: of the bootstrap over subsets.
        fewest: subsets that there must be; what is logged or told has :data:`FEWEST`.

    Returns:
        ``lds``, and ``lds_low``, ``lds_high``: a percentile interval of 95 %. Undefined, with the reason, for fewer
        than ``fewest`` subsets, and if all predicted or all true changes are equal.
    """
    position = subsets.windows.index(window) if isinstance(window, Window) else window
    predicted, seen = ~subsets.kept @ np.nan_to_num(scores), subsets.changes[position, query]
    if len(seen) < fewest:
        reason = f"{len(seen)} trainings on random subsets; at least {fewest} are needed"
        return Metrics(undefined={LDS.leaf: reason})
    if np.ptp(predicted) == 0 or np.ptp(seen) == 0:
        reason = f"all {len(seen)} {'predicted' if np.ptp(predicted) == 0 else 'true'} changes are equal"
        return Metrics(undefined={LDS.leaf: reason})
    drawn = np.random.default_rng(seed).integers(len(seen), size=(resamples, len(seen)))
    ranks = stats.rankdata(predicted[drawn], axis=1), stats.rankdata(seen[drawn], axis=1)
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True) if np.ptp(a) and np.ptp(b)]
    low, high = np.quantile(found, [0.025, 0.975])
    value = float(stats.spearmanr(predicted, seen).statistic)
    return Metrics({LDS.leaf: value, LDS.leaf + LOW: low, LDS.leaf + HIGH: high})
