"""The data of an influence run's page, as small JSON that cannot break out of its HTML element."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_mlflow.evaluation import Metrics, patterns
from dit_mlflow.evaluation.figures import (
    FIDELITY,
    RECALL_AT_K,
    REMOVAL_LDS,
    REMOVAL_SLOPE,
    SPEARMAN,
    TRUST_SAMPLES,
    TRUST_SPEARMAN,
)
from dit_mlflow.evaluation.patterns import PATTERNS
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.markdown import LINE_CHARACTERS, encodable
from dit_mlflow.explanation.numbers import decimals
from dit_mlflow.explanation.ranking import extremes
from dit_mlflow.influence import Influence, Window
from dit_mlflow.page.page_samples import PageSamples, sample_lines

SCORE_BYTES = 2_500_000
"""Most bytes of embedded scores, estimated and exact; the first query is embedded even if it takes more."""

LINES_DRAWN = 4
"""Samples on each side in the overview."""

FLAGGED_SHARE = 0.1
"""Share of the samples that is flagged if it is not known how many are damaged."""

PATTERN_NAMES = ("none", *PATTERNS)


@dataclass(frozen=True)
class Columns:
    """Scores in the columns of the page: first the whole run, then every window.

    Attributes:
        estimate: ``[1 + windows, queries, samples]``; if the whole run is the only window, just that.
        exact: likewise, NaN where not known; ``None``: no exact score is known.
        windows: of the columns after the first.
        whole: the window of the first column.
        averaged: the first column is the mean over the windows, since there are no scores of the whole run.
    """

    estimate: np.ndarray
    exact: np.ndarray | None
    windows: tuple[Window, ...]
    whole: Window
    averaged: bool

    @classmethod
    def of(cls, estimate: Influence, truth: Influence | None, windows: Sequence[Window]) -> Columns:
        whole = Window(min(window.start for window in windows), max(window.end for window in windows))
        whole = max([whole, *estimate.windows], key=lambda window: window.end - window.start)
        averaged = whole not in estimate.windows
        shown = () if list(windows) == [whole] else tuple(windows)

        def stacked(found: Influence) -> np.ndarray:
            kept = np.stack([_scores(found, window, estimate) for window in shown or (whole,)])
            first = kept.mean(axis=0) if averaged else _scores(found, whole, estimate)
            return np.concatenate([first[None], kept]) if shown else kept

        exact = None if truth is None else stacked(truth)
        if exact is not None and np.isnan(exact).all():
            exact = None
        return cls(stacked(estimate), exact, shown, whole, averaged)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        windows = [f"{window.start}–{window.end}" for window in self.windows]
        if not windows:
            return [f"steps {self.whole.start}–{self.whole.end}"]
        return ["mean of windows" if self.averaged else "whole run", *windows]


def _scores(found: Influence, window: Window, like: Influence) -> np.ndarray:
    """``[queries, samples]`` of ``window``, NaN for queries and windows that ``found`` does not have."""
    scores = np.full((len(like.queries), len(like.samples)), np.nan)
    if window in found.windows:
        _, here, there = np.intersect1d(like.samples, found.samples, return_indices=True)
        for row, query in enumerate(like.queries):
            if query in found.queries:
                scores[row, here] = found.of(window, query)[there]
    return scores


def cut_in_tie(scores: np.ndarray, k: int) -> bool:
    """Whether the ``k`` lowest negative ``scores`` ``[samples]`` are only some of several equal ones."""
    known = np.sort(scores[np.isfinite(scores)])
    return bool(k < len(known) and known[k - 1] == known[k] < 0)


def flag_count(samples: int, corrupted: int) -> int:
    """Most samples to flag: as many as are damaged; if that is not known, :data:`FLAGGED_SHARE` of all."""
    return corrupted or max(1, round(FLAGGED_SHARE * samples))


def by_extremity(scores: np.ndarray) -> np.ndarray:
    """Positions ``[samples]``, ordered by how near a sample comes to the end of any row of ``[rows, samples]``."""
    count = scores.shape[1]
    best = np.full(count, count)
    for row in scores:
        known = int(np.isfinite(row).sum())
        order = np.argsort(row, kind="stable")[:known]
        ranks = np.minimum(np.arange(known), np.arange(known)[::-1])
        best[order] = np.minimum(best[order], ranks)
    return np.argsort(best, kind="stable")


def page_data(
    estimate: Influence,
    columns: Columns,
    gallery: Gallery,
    metrics: Mapping[Window, Metrics],
) -> dict[str, Any]:
    """All that the page shows, sorts, filters and draws, as JSON values.

    Scores are base64 of little-endian float32, ``[columns, samples]`` for each query, so they are rounded to 24 binary
    digits; exact scores only of the samples that have one.
    """
    count = len(estimate.samples)
    damaged = np.flatnonzero(np.isin(estimate.samples, list(gallery.corrupted)))
    k = flag_count(count, len(damaged))
    per_query = 4 * columns.estimate[:, 0].size * (1 if columns.exact is None else 2)
    embedded = max(1, min(len(estimate.queries), SCORE_BYTES // max(1, per_query)))
    known = None if columns.exact is None else np.flatnonzero(np.isfinite(columns.exact).any(axis=(0, 1)))
    order = by_extremity(columns.estimate[:, :embedded].reshape(-1, count)).tolist()
    shown = PageSamples.of(gallery, estimate.samples, order)
    labels = sample_lines(gallery.label_of, estimate.samples)
    notes = sample_lines(gallery.describe, estimate.samples)
    distinct = sorted({label for label in labels if label is not None})
    code = {label: place for place, label in enumerate(distinct)}
    return {
        "kind": estimate.kind,
        "method": encodable(estimate.method, LINE_CHARACTERS),
        "left_out": len(estimate.queries) - embedded,
        "queries": [_query(estimate, columns, place, k, known) for place in range(embedded)],
        "agreement": SPEARMAN.heading,
        "columns": [
            {"name": name, **_trust(metrics.get(window))}
            for name, window in zip(columns.names, (columns.whole, *columns.windows), strict=True)
        ],
        "samples": estimate.samples.tolist(),
        "known": None if known is None else known.tolist(),
        "labels": distinct or None,
        "label": [-1 if label is None else code[label] for label in labels] if distinct else None,
        "notes": None if all(note is None for note in notes) else notes,
        "patterns": PATTERN_NAMES,
        "damaged": damaged.tolist() if gallery.corrupted else None,
        "pictures": shown.pictures,
        "texts": shown.texts,
        "cut": shown.cut,
        "names": list(shown.names),
        "rows": shown.rows,
    }


def _query(estimate: Influence, columns: Columns, place: int, k: int, known: np.ndarray | None) -> dict[str, Any]:
    scores, name = columns.estimate[:, place], estimate.queries[place]
    first = ranked = scores[0]
    if columns.exact is not None and not columns.averaged:
        ranked = np.where(np.isfinite(columns.exact[0, place]), columns.exact[0, place], first)
    harmful, helpful = extremes(ranked, LINES_DRAWN)
    pattern = None
    if len(columns.windows) > 1:
        found = patterns(estimate.select(list(columns.windows)), name)
        pattern = [PATTERN_NAMES.index(name) for name in found]
    return {
        "name": encodable(readable(name), LINE_CHARACTERS),
        "scores": base64_of(scores),
        "exact": None if known is None or columns.exact is None else base64_of(columns.exact[:, place, known]),
        "flagged": extremes(first, k)[0],
        "patterns": pattern,
        "harmful": harmful,
        "helpful": helpful,
        "band": [_quantiles(row) for row in scores],
    }


def _quantiles(scores: np.ndarray) -> list[float] | None:
    known = scores[np.isfinite(scores)]
    return np.quantile(known, (0.05, 0.95)).tolist() if len(known) else None


def _trust(metrics: Metrics | None) -> dict[str, Any]:
    """How far to trust a column: its rank correlation with exact retraining, and sentences."""
    values = {} if metrics is None else dict(metrics.values)
    known = next((figure for figure in FIDELITY if figure.name in values), None)
    agreement = None if known is None else values[known.name]
    sentences = []
    if known is REMOVAL_LDS and agreement is not None:
        interval = f"95 % interval {signed(values[REMOVAL_LDS.low])} to {signed(values[REMOVAL_LDS.high])}"
        sentences.append(
            f"Agreement with retraining without random shares of the samples: {SPEARMAN.heading} {signed(agreement)}, "
            f"{interval}; real changes are {signed(values[REMOVAL_SLOPE.name])} times the foretold ones."
        )
    elif agreement is not None:
        low, high = values.get(TRUST_SPEARMAN.low), values.get(TRUST_SPEARMAN.high)
        interval = "" if low is None or high is None else f", 95 % interval {signed(low)} to {signed(high)}"
        count = values.get(TRUST_SAMPLES.name)
        over = "" if count is None else f", over {count:.0f} samples"
        floor = values.get(SPEARMAN.attainable)
        most = "" if floor is None else f" (exact retraining with itself: {signed(floor)})"
        told = f"{SPEARMAN.heading} {signed(agreement)}{interval}{over}{most}"
        sentences.append(f"Agreement with exact leave-one-out: {told}.")
    if (recall := values.get(RECALL_AT_K.name)) is not None:
        by_chance = values.get(RECALL_AT_K.chance)
        beside = "" if by_chance is None else f" (chance: {_percent(by_chance)})"
        sentences.append(f"Of the damaged samples, {_percent(recall)} are among as many lowest scores{beside}.")
    return {"agreement": None if agreement is None else f"ρ {signed(agreement)}", "trust": sentences}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def signed(value: float) -> str:
    """Two decimals, with the typographic minus sign."""
    return decimals(value).replace("-", "−")


def readable(query: str) -> str:
    """The query's name in words, if it is an identifier."""
    return query.replace("_", " ") if query.isidentifier() else query


def base64_of(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def json_in_html(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: no character in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
