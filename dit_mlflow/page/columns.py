"""The columns of the page: the whole run first, then its windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_mlflow.explanation.ranking import takes_exact
from dit_mlflow.influence import Influence, Window

WINDOWS = 500
"""Most windows on a page; of more, every n-th."""


@dataclass(frozen=True)
class Columns:
    """Scores in the columns of the page: first the whole run, then every window.

    Attributes:
        estimate: ``[1 + windows, queries, samples]``; if the whole run is the only window, just that.
        exact: likewise, NaN where not known; ``None``: no exact score is known.
        ranked: what the page ranks, flags and draws by: exact scores where they are known and answer the same question
            (see :func:`dit_mlflow.explanation.ranking.takes_exact`), estimates elsewhere.
        unclear: bool, likewise: the 95 % interval of the ranked score contains 0.
        windows: of the columns after the first.
        whole: the window of the first column.
        averaged: the first column is the mean over the windows, since there are no scores of the whole run.
        left_out: windows that were asked for and have no column.
    """

    estimate: np.ndarray
    exact: np.ndarray | None
    ranked: np.ndarray
    unclear: np.ndarray
    windows: tuple[Window, ...]
    whole: Window
    averaged: bool
    left_out: int

    @classmethod
    def of(cls, estimate: Influence, truth: Influence | None, windows: Sequence[Window]) -> Columns:
        whole = Window(min(window.start for window in windows), max(window.end for window in windows))
        whole = max([whole, *estimate.windows], key=lambda window: window.end - window.start)
        averaged = whole not in estimate.windows
        shown = () if list(windows) == [whole] else tuple(windows[:: -(-len(windows) // WINDOWS)])

        def stacked(found: Influence) -> np.ndarray:
            kept = [_scores(found, window, estimate) for window in (() if averaged else (whole,)) + shown]
            return np.stack(kept or [_scores(found, whole, estimate)])

        scores = stacked(estimate)
        exact = None if truth is None else stacked(truth)
        if exact is not None and np.isnan(exact).all():
            exact = None
        replaced = exact if exact is not None and takes_exact(estimate) else np.full(scores.shape, np.nan)
        unclear = (stacked(_as_scores(estimate)) > 0) & np.isnan(replaced)
        ranked = np.where(np.isnan(replaced), scores, replaced)
        if averaged:
            scores, ranked = (np.concatenate([_mean(found)[None], found]) for found in (scores, ranked))
            exact = None if exact is None else np.concatenate([exact.mean(axis=0)[None], exact])
            unclear = np.concatenate([np.zeros_like(unclear[:1]), unclear])
        return cls(scores, exact, ranked, unclear, shown, whole, averaged, len(windows) - len(shown or (whole,)))

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        windows = [f"{window.start}–{window.end}" for window in self.windows]
        if not windows:
            return [f"steps {self.whole.start}–{self.whole.end}"]
        return ["mean of windows" if self.averaged else "whole run", *windows]

    def clear(self, query: int) -> np.ndarray:
        """Ranked scores ``[samples]`` of the first column, 0 where they are unclear or not known."""
        scores = np.nan_to_num(self.ranked[0, query])
        return np.where(self.unclear[0, query], 0, scores)


def _as_scores(found: Influence) -> Influence:
    """Where the result is unclear, as numbers."""
    return replace(found, scores=found.unclear.astype(float), standard_error=None, degrees_of_freedom=None)


def _mean(scores: np.ndarray) -> np.ndarray:
    """Over the windows in which a sample has a score, as sentences and plots rank; NaN where it has none."""
    return np.ma.masked_invalid(scores).mean(axis=0).filled(np.nan)


def _scores(found: Influence, window: Window, like: Influence) -> np.ndarray:
    """``[queries, samples]`` of ``window``, NaN for queries and windows that ``found`` does not have."""
    scores = np.full((len(like.queries), len(like.samples)), np.nan)
    if window in found.windows:
        _, here, there = np.intersect1d(like.samples, found.samples, return_indices=True)
        place_of = {query: place for place, query in enumerate(found.queries)}
        shared = [(row, place_of[query]) for row, query in enumerate(like.queries) if query in place_of]
        rows, places = np.array(shared, dtype=np.int64).reshape(-1, 2).T
        scores[rows[:, None], here] = found.scores[found.windows.index(window)][places[:, None], there]
    return scores
