"""Would another seed give the same scores? Agreement between trainings, and the sources of their differences."""

from __future__ import annotations

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.correlation import correlations
from dit_mlflow.evaluation.figures import HIGH, LOW, SPEARMAN
from dit_mlflow.evaluation.metrics import Metrics

SHARES = ("share_init", "share_order", "share_rest")

RUN_RESAMPLES = 1000
"""Bootstrap samples of runs behind an interval."""


def stability(scores: np.ndarray, resamples: int = RUN_RESAMPLES, confidence: float = 0.95, seed: int = 0) -> Metrics:
    """Agreement between runs, and shares of the variance between them.

    Seeds of initialisation and of data order are separate, because both contribute comparably to the variance of
    results (Dodge et al. 2020, arXiv 2002.06305).

    Args:
        scores: ``[init seeds, order seeds, samples]``; samples with NaN in any run are left out.
        resamples, confidence, seed: of the bootstrap over runs.

    Returns:
        ``spearman``, the mean over all pairs of runs, with ``spearman_low`` and ``spearman_high``, a percentile
        interval over runs (pairs of a run with itself are left out; runs that share a seed are taken as independent);
        and ``share_init``, ``share_order``, ``share_rest`` from :func:`variance_components`, which add up to 1, with
        ``components_cut``: how many of the three were negative and cut to 0. Undefined, with the reason, for one run,
        a run with constant scores, or, the shares, for fewer than two seeds of either sort.

    Raises:
        InputError: scores without three axes.
    """
    if scores.ndim != 3:
        raise InputError(f"scores have shape {scores.shape}; expected [init seeds, order seeds, samples]")
    scores = scores[:, :, np.isfinite(scores).all(axis=(0, 1))]
    agreement, shares = _agreement(scores, resamples, confidence, seed), _shares(scores)
    return Metrics({**agreement.values, **shares.values}, {**agreement.undefined, **shares.undefined})


def variance_components(scores: np.ndarray) -> np.ndarray:
    """Two-way random-effects analysis of variance without replication, for each sample.

    The model is ``x_ab = mean + init_a + order_b + rest_ab``, ``rest`` being interaction and everything else that
    differs. With ``A`` by ``B`` runs and mean squares ``M``, the components are ``(M_init - M_rest) / B``,
    ``(M_order - M_rest) / A`` and ``M_rest`` (method of moments; Searle, Casella and McCulloch 1992). They are
    unbiased, so the first two may come out negative.

    Args:
        scores: ``[A, B, samples]``, ``A`` and ``B`` 2 or more.

    Returns:
        ``[3, samples]``: variance due to initialisation, data order, and the rest, in squared units of the scores.
    """
    a, b, _ = scores.shape
    mean = scores.mean(axis=(0, 1))
    init, order = scores.mean(axis=1) - mean, scores.mean(axis=0) - mean
    rest = scores - mean - init[:, None] - order[None]
    square = (rest**2).sum(axis=(0, 1)) / ((a - 1) * (b - 1))
    squares = b * (init**2).sum(axis=0) / (a - 1), a * (order**2).sum(axis=0) / (b - 1)
    return np.stack([(squares[0] - square) / b, (squares[1] - square) / a, square])


def _shares(scores: np.ndarray) -> Metrics:
    a, b, samples = scores.shape
    if min(a, b) < 2:
        reason = f"{a} seeds of initialisation and {b} of data order; at least 2 of each are needed"
        return Metrics(undefined=dict.fromkeys(SHARES, reason))
    # Cut after summing: cut sample by sample, noise alone would add up to a share.
    components = variance_components(scores).sum(axis=1)
    kept = np.maximum(components, 0)
    if kept.sum() == 0:
        reason = f"the scores of {samples} samples do not differ between runs"
        return Metrics(undefined=dict.fromkeys(SHARES, reason))
    shares = dict(zip(SHARES, (kept / kept.sum()).tolist(), strict=True))
    return Metrics(shares | {"components_cut": float((components < 0).sum())})


def _agreement(scores: np.ndarray, resamples: int, confidence: float, seed: int) -> Metrics:
    runs = scores.reshape(-1, scores.shape[2])
    count = len(runs)
    if count < 2:
        return Metrics(undefined={SPEARMAN.leaf: f"{count} run; at least 2 are needed"})
    matrix = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            found = correlations(runs[i], runs[j])
            if (reason := found.undefined.get(SPEARMAN.leaf)) is not None:
                return Metrics(undefined={SPEARMAN.leaf: f"runs {j} and {i}: {reason}"})
            matrix[i, j] = matrix[j, i] = found.values[SPEARMAN.leaf]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    # Row r of drawn: how often each run was drawn; all pairs but those of a run with itself.
    pairs = drawn.sum(axis=1) ** 2 - (drawn**2).sum(axis=1)
    means = np.einsum("ri,ij,rj->r", drawn, matrix, drawn)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    mean = float(matrix.sum() / (count * (count - 1)))
    return Metrics({SPEARMAN.leaf: mean, SPEARMAN.leaf + LOW: low, SPEARMAN.leaf + HIGH: high})
