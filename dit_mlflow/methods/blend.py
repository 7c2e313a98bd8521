"""Scores of removals, chosen by retrainings without random shares of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, optimize, special, stats
from sklearn.linear_model import RidgeCV

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence import Influence

FOLDS = 4
"""Parts of the bank, each foretold by the blend that the others choose."""

RESAMPLES = 200
"""Of the bank, for intervals."""

FEWEST = 8
"""Retrainings from which a blend can be fitted and judged."""

ORDER = 0.9
"""LDS from which retrainings that did not choose a blend are foretold well."""

LARGE = 64
"""Retrainings from which they may say more of single samples than the parts do."""

PENALTIES = np.logspace(-4, 6, 41)
"""Of single samples' corrections, in units of what a retraining has of samples that others have not."""


@dataclass(frozen=True, eq=False)
class Blend:
    """Scores chosen by a bank, for one window and query.

    Attributes:
        scores, errors: ``[samples]``.
        freedom: degrees of freedom of the errors.
        judged: JSON values: ``order``, ``size``, their intervals, ``coefficients``, ``constant``, ``retrainings``.
    """

    scores: np.ndarray
    errors: np.ndarray
    freedom: float
    judged: dict[str, Any]

    @classmethod
    def fitted(
        cls,
        parts: dict[str, np.ndarray],
        pooled: dict[str, tuple[np.ndarray, float]],
        gone: np.ndarray,
        changes: np.ndarray,
        seed: int,
    ) -> Blend:
        """The blend of ``parts [samples]`` that foretells ``changes [bank]`` where ``gone [bank, samples]`` are absent.

        Args:
            pooled: standard errors ``[samples]`` of the parts, and their degrees of freedom.
            gone: of the samples in steps of the window.

        Raises:
            UnsupportedError: fewer than :data:`FEWEST` rows have absent samples and a finite change.
        """
        any_gone, finite = gone.any(axis=1), np.isfinite(changes)
        if any_gone.sum() < FEWEST:
            raise UnsupportedError(
                f"{int(any_gone.sum())} of {len(gone)} random shares of the samples have one that is in a step of the "
                "window, too few to say what removals change; take a larger share (removed) or more trainings, ask for "
                "a longer window, or use track"
            )
        if (any_gone & finite).sum() < FEWEST:
            raise UnsupportedError(
                f"{int((~finite).sum())} of {len(changes)} trainings without a share of the samples gave a query that "
                "is not a finite number; take a smaller share (removed), or use track"
            )
        gone, changes = gone[finite], changes[finite]
        stacked = np.stack(list(parts.values()))
        fit = _Fit.of(gone, changes, stacked, large := len(changes) >= LARGE)
        sums = gone @ stacked.T
        random = np.random.default_rng(seed)
        drawn = random.integers(len(changes), size=(RESAMPLES, len(changes)))
        fits = np.array([_nonnegative(sums[rows], changes[rows]) for rows in drawn])
        of_fit = (fits @ stacked).std(axis=0)
        drawn_parts = [(c, *pooled[name]) for c, name in zip(fit.coefficients, parts, strict=True) if c > 0]
        return cls(
            fit.scores,
            np.sqrt(of_fit**2 + fit.variance + sum(np.square(c * error) for c, error, _ in drawn_parts)),
            min([len(changes) - len(parts) - 1.0, *(freedom for _, _, freedom in drawn_parts)]),
            {
                "coefficients": dict(zip(parts, fit.coefficients.tolist(), strict=True)),
                "constant": fit.constant,
                "retrainings": len(changes),
                **_judged(_foretold(gone, changes, stacked, large), changes, drawn),
            },
        )

    @property
    def foretells(self) -> bool:
        """Whether the order of retrainings that did not choose it is foretold well, or there is none."""
        order = self.judged["order"]
        return order is None or order >= ORDER


@dataclass(frozen=True, eq=False)
class _Fit:
    """Scores ``[samples]`` whose sums, and the constant, are nearest to the changes.

    Attributes:
        coefficients: of the parts.
        variance: of what single samples do beyond the parts, ``[samples]``.
    """

    scores: np.ndarray
    coefficients: np.ndarray
    constant: float
    variance: np.ndarray

    @classmethod
    def of(cls, gone: np.ndarray, changes: np.ndarray, stacked: np.ndarray, large: bool) -> _Fit:
        sums = gone @ stacked.T
        coefficients = _nonnegative(sums, changes)
        scores, variance = coefficients @ stacked, np.zeros(stacked.shape[1])
        left = changes - sums @ coefficients
        # A sample that is in no step of a window has the effect 0, in all parts.
        gone_there = gone & stacked.any(axis=0)
        if large and np.ptp(left) > 0:
            more, variance = _corrections(gone_there, left)
            scores = scores + more
        elif not large:
            variance = _of_single_samples(gone_there, left, len(coefficients))
        return cls(scores, coefficients, float((changes - gone @ scores).mean()), variance)


def _of_single_samples(gone: np.ndarray, left: np.ndarray, parts: int) -> np.ndarray:
    """Variance of single samples' own effects, ``[samples]``, if all that is ``left [bank]`` is the sum of such.

    A few retrainings cannot tell them from what samples do together, so this is the most that it can be.
    """
    common = float(np.square(gone - gone.mean(axis=0)).sum(axis=1).mean())
    found = np.square(left - left.mean()).sum() / max(len(left) - parts - 1, 1)
    return np.where(gone.any(axis=0), found / common if common else 0, 0)


def _corrections(gone: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What single samples have to do with changes ``left [bank]`` by ridge regression, and its variance, ``[samples]``.

    The penalty is the largest whose error, in leave-one-out cross-validation, is within one standard error of the least
    (Breiman et al. 1984, section 3.4.3): where a bank says nothing of single samples, nothing is added. The variance is
    that of the posterior under the prior that ridge regression with the least error is, around what that would add: in
    it is what the shrinkage hides.
    """
    centred, scale = gone - gone.mean(axis=0), left.std()
    common = float(np.square(centred).sum(axis=1).mean())
    if common == 0:
        return np.zeros(gone.shape[1]), np.zeros(gone.shape[1])
    penalties = common * PENALTIES
    found = RidgeCV(penalties, store_cv_results=True).fit(centred, left / scale).cv_results_
    least = found.mean(axis=0).argmin()
    worse = found - found[:, [least]]
    allowed = worse.mean(axis=0) <= worse.std(axis=0) / np.sqrt(len(left))
    added, _ = _ridge(centred, left, penalties[np.flatnonzero(allowed)[-1]])
    nearest, variance = _ridge(centred, left, penalties[least])
    return added, np.where(centred.any(axis=0), variance + np.square(added - nearest), 0)


def _ridge(centred: np.ndarray, left: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and their variance in the posterior, ``[samples]``."""
    factor = linalg.cho_factor(centred @ centred.T + penalty * np.eye(len(left)))
    weights = linalg.cho_solve(factor, left - left.mean())
    inverse = linalg.cho_solve(factor, np.eye(len(left)))
    # The error of foretelling one change from the others, weights / inverse_ii, has the variance prior / inverse_ii.
    prior = np.mean(np.square(weights) / inverse.diagonal())
    return centred.T @ weights, prior * (1 - np.einsum("bn,bn->n", centred, inverse @ centred))


def _nonnegative(sums: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Nonnegative least squares with a free constant, of ``changes [bank]`` on ``sums [bank, parts]``."""
    centred = sums - sums.mean(axis=0)
    scale = centred.std(axis=0)
    scale[scale == 0] = np.inf
    found: np.ndarray = optimize.nnls(centred / scale, changes - changes.mean())[0] / scale
    return found


def _foretold(gone: np.ndarray, changes: np.ndarray, stacked: np.ndarray, large: bool) -> np.ndarray:
    """Each change by the fit to the other folds, ``[bank]``; 0 where no sample is gone, which no fit has to say."""
    fold = np.arange(len(changes)) % FOLDS
    found = np.empty(len(changes))
    for left in range(FOLDS):
        of, rest = fold == left, fold != left
        fit = _Fit.of(gone[rest], changes[rest], stacked, large)
        found[of] = np.where(gone[of].any(axis=1), fit.constant + gone[of] @ fit.scores, 0)
    return found


def _judged(foretold: np.ndarray, changes: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """LDS and slope with intervals over resamples ``drawn [resamples, bank]``; ``None`` where all changes are equal."""
    rows = np.vstack([np.arange(len(changes)), drawn])
    x, y = foretold[rows], changes[rows]
    known = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    if not known[0]:
        return dict.fromkeys(("order", "order_interval", "size", "size_interval"))
    figures = {"order": _slopes(_standardised(x[known]), _standardised(y[known])), "size": _slopes(x[known], y[known])}
    return {
        key: value
        for name, found in figures.items()
        for key, value in (
            (name, float(found[0])),
            (f"{name}_interval", np.quantile(found[1:], [0.025, 0.975]).tolist()),
        )
    }


def _standardised(values: np.ndarray) -> np.ndarray:
    """Ranks of each row, of which a slope is Spearman's correlation."""
    ranks = stats.rankdata(values, axis=1)
    scaled: np.ndarray = ranks / ranks.std(axis=1, keepdims=True)
    return scaled


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of ``y`` on ``x``, row by row."""
    centred = x - x.mean(axis=1, keepdims=True)
    found: np.ndarray = (centred * y).sum(axis=1) / np.square(centred).sum(axis=1)
    return found


def pooled(part: Influence, window: int, query: int) -> tuple[np.ndarray, float]:
    """Standard errors ``[samples]``, each drawn towards what all have in common, and their degrees of freedom.

    A variance of two or three pairs of draws says little; by the prior that all samples' variances suggest (Smyth 2004,
    equations 7 to 10) it says more. Without draws, as of the derivative, they are 0; NaN of a single pair.
    """
    if part.degrees_of_freedom is None:
        return np.zeros(part.scores.shape[2]), np.inf
    if part.standard_error is None:
        return np.full(part.scores.shape[2], np.nan), 1.0
    variance = np.square(part.standard_error[window, query])
    own = float(part.degrees_of_freedom[window, query])
    known = variance > 0
    if own < 1 or known.sum() < 2:
        return np.sqrt(variance), max(own, 1.0)
    centred = np.log(variance[known]) - special.digamma(own / 2) + np.log(own / 2)
    spread = centred.var(ddof=1) - special.polygamma(1, own / 2)
    prior = 2 * _inverse_trigamma(spread) if spread > 0 else np.inf
    if np.isinf(prior):
        return np.where(known, np.exp(centred.mean() / 2), 0.0), np.inf
    common = np.exp(centred.mean() + special.digamma(prior / 2) - np.log(prior / 2))
    moderated = (prior * common + own * variance) / (prior + own)
    return np.where(known, np.sqrt(moderated), 0.0), prior + own


def _inverse_trigamma(value: float) -> float:
    return float(optimize.brentq(lambda x: special.polygamma(1, x) - value, 1e-8, 1e8))
