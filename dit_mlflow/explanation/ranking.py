"""Which samples harmed and helped most: one ranking for sentences, plots, cards and pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dit_mlflow.influence import Influence


def ranking_scores(influence: Influence, whole: Influence | None = None) -> np.ndarray:
    """Scores that rank the samples, ``[samples]``: first query, lowest = most harmful.

    Args:
        influence: scores per window.
        whole: scores of the whole run, one window; ``None`` = not known: the mean over windows is used.
    """
    if whole is not None:
        return np.asarray(whole.scores[0, 0])
    return np.ma.masked_invalid(influence.scores[:, 0]).mean(axis=0).filled(np.nan)


def takes_exact(estimate: Influence) -> bool:
    """Whether exact scores of single samples answer the question of ``estimate`` and so can stand in its place.

    Scores in a method's own units, and those of removals of many, stay as they are: exact ones of one sample cannot be
    ranked among them.
    """
    return estimate.measures == "query" and estimate.removed is None


def best_known(estimate: Influence, exact: Influence | None) -> Influence:
    """Scores that rank the samples: for the first query, exact ones where ``exact`` has them and :func:`takes_exact`.

    Most of the largest estimates are too large, since training is not linear that far.
    """
    if exact is None or not takes_exact(estimate):
        return estimate
    scores = estimate.scores.copy()
    error = None if estimate.standard_error is None else estimate.standard_error.copy()
    for place, window in enumerate(estimate.windows):
        if window in exact.windows:
            known = exact.of(window)
            scores[place, 0] = np.where(np.isfinite(known), known, scores[place, 0])
            if error is not None:
                error[place, 0] = np.where(np.isfinite(known), 0, error[place, 0])
    return replace(estimate, scores=scores, standard_error=error)


def extreme_samples(influence: Influence, k: int, whole: Influence | None = None) -> tuple[list[int], list[int]]:
    """Positions of the ``k`` most harmful and the ``k`` most helpful samples by :func:`ranking_scores`.

    Fewer, where fewer scores are negative (positive) with an interval, if they have one, that excludes 0.
    """
    scores = np.nan_to_num(ranking_scores(influence, whole))
    if whole is not None:
        scores[whole.unclear[0, 0]] = 0
    return extremes(scores, k)


def extremes(scores: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """Positions of the ``k`` lowest negative and the ``k`` highest positive ``scores`` (``[samples]``), extremes first.

    NaN is neither; of equal scores the lower position counts first.
    """
    known = np.nan_to_num(scores)
    lowest, highest = (np.argsort(signed, kind="stable")[:k] for signed in (known, -known))
    return lowest[known[lowest] < 0].tolist(), highest[known[highest] > 0].tolist()


def window_extremes(influence: Influence) -> list[tuple[int | None, int | None]]:
    """Indices of each window's most harmful and most helpful sample, for the first query; ``None``: it has none."""
    found = (extremes(scores, 1) for scores in np.where(influence.unclear, 0, influence.scores)[:, 0])
    first = ([int(influence.samples[side[0]]) if side else None for side in sides] for sides in found)
    return [(harmful, helpful) for harmful, helpful in first]
