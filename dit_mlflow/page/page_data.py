"""The data of an influence run's page, as small JSON that cannot break out of its HTML element."""

from __future__ import annotations

from collections.abc import Mapping
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
from dit_mlflow.explanation.markdown import LINE_CHARACTERS
from dit_mlflow.explanation.numbers import decimals
from dit_mlflow.explanation.ranking import extremes, takes_exact
from dit_mlflow.influence import Influence, Window
from dit_mlflow.page.columns import Columns
from dit_mlflow.page.embedding import base64_bytes, bits_of, floats_of
from dit_mlflow.page.page_samples import PICTURED, PageSamples, are_images, sample_labels, sample_lines
from dit_mlflow.told import encodable

SAMPLES = 10_000
"""Most samples on a page, those nearest to the ends of any column; the rest is counted in histograms."""

SCORE_BYTES = 2_500_000
"""Bytes of the scores, estimated and exact, and of what else each query has; the first query is always there."""

SAMPLE_BYTES = 25
"""Of a sample in a query, beside its scores: rank, flag, pattern."""

COLUMN_BYTES = 450
"""Of a column in a query: band and histogram."""

QUERY_BYTES = 1500
"""Of a query: its name, which may be markup."""

QUERIES = 100
"""Most queries on a page."""

BINS = 60
"""Of a histogram."""

LINES_DRAWN = 4
"""Samples on each side in the overview."""

FLAGGED_SHARE = 0.1
"""Share of the samples that is flagged if it is not known how many are damaged."""

PATTERN_NAMES = ("none", *PATTERNS)


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
    damaged = np.isin(estimate.samples, list(gallery.corrupted))
    k = flag_count(len(estimate.samples), int(damaged.sum()))
    kept, queries = _room(estimate, columns, gallery)
    known = None
    if columns.exact is not None:
        known = np.flatnonzero(np.isfinite(columns.exact[:, :, kept]).any(axis=(0, 1)))
    by_importance = _by_extremity(columns, queries, kept)
    shown = PageSamples.of(gallery, estimate.samples[kept][by_importance]).at(by_importance)
    labels, codes = sample_labels(gallery, estimate.samples[kept])
    notes = sample_lines(gallery.describe, estimate.samples[kept])
    return {
        "kind": estimate.kind,
        "method": encodable(estimate.method, LINE_CHARACTERS),
        "removed": estimate.removed,
        "total": len(estimate.samples),
        "damaged_total": int(damaged.sum()),
        "left_out": {"queries": len(estimate.queries) - queries, "windows": columns.left_out},
        "queries": [_query(estimate, columns, place, k, kept, known) for place in range(queries)],
        "agreement": SPEARMAN.heading,
        "columns": [
            {"name": name, **_trust(metrics.get(window))}
            for name, window in zip(columns.names, (columns.whole, *columns.windows), strict=True)
        ],
        "samples": estimate.samples[kept].tolist(),
        "known": None if known is None else known.tolist(),
        "exact_ranks": takes_exact(estimate),
        "labels": labels or None,
        "label": codes if labels else None,
        "notes": None if all(note is None for note in notes) else notes,
        "patterns": PATTERN_NAMES,
        "damaged": np.flatnonzero(damaged[kept]).tolist() if gallery.corrupted else None,
        "pictures": shown.pictures,
        "texts": shown.texts,
        "cut": shown.cut,
        "names": list(shown.names),
        "rows": shown.rows,
    }


def _room(estimate: Influence, columns: Columns, gallery: Gallery) -> tuple[np.ndarray, int]:
    """Positions of the samples that the page has room for, ascending, and the number of queries."""
    count, width = len(estimate.samples), len(columns.names)
    each = base64_bytes(4 * width * (1 if columns.exact is None else 2) + width / 8) + SAMPLE_BYTES
    fixed = COLUMN_BYTES * width + QUERY_BYTES
    most = max(2 * LINES_DRAWN, min(count, SAMPLES, int((SCORE_BYTES - fixed) / each)))
    if count > PICTURED and are_images(gallery, estimate.samples):
        most = min(most, PICTURED)
    queries = max(1, min(len(estimate.queries), QUERIES, int(SCORE_BYTES / (each * most + fixed))))
    return np.sort(_by_extremity(columns, queries, np.arange(count))[:most]), queries


def _by_extremity(columns: Columns, queries: int, kept: np.ndarray) -> np.ndarray:
    """Places among ``kept``: the samples that the overview draws first, then by their nearness to any column's end."""
    clear = [columns.clear(query)[kept] for query in range(queries)]
    drawn = [place for scores in clear for side in extremes(scores, LINES_DRAWN) for place in side]
    order = by_extremity(columns.ranked[:, :queries, kept].reshape(-1, len(kept)))
    return np.array(list(dict.fromkeys([*drawn, *order.tolist()])), dtype=np.int64)


def _query(
    estimate: Influence, columns: Columns, place: int, k: int, kept: np.ndarray, known: np.ndarray | None
) -> dict[str, Any]:
    ranked, name = columns.ranked[:, place], estimate.queries[place]
    place_of = {position: at for at, position in enumerate(kept.tolist())}
    harmful, helpful = extremes(columns.clear(place), LINES_DRAWN)
    pattern = None
    if len(columns.windows) > 1:
        found = patterns(estimate.select(list(columns.windows)), name)[kept]
        pattern = [PATTERN_NAMES.index(name) for name in found]
    exact = None if known is None or columns.exact is None else columns.exact[:, place, kept[known]]
    whole = len(kept) == len(estimate.samples)
    return {
        "name": encodable(readable(name), LINE_CHARACTERS),
        "scores": floats_of(columns.estimate[:, place, kept]),
        "exact": None if exact is None else floats_of(exact),
        "unclear": bits_of(columns.unclear[:, place, kept]) if columns.unclear[:, place].any() else None,
        "beyond": _beyond(ranked[0])[kept].tolist(),
        "flagged": [place_of[position] for position in extremes(ranked[0], k)[0] if position in place_of],
        "patterns": pattern,
        "harmful": [place_of[position] for position in harmful],
        "helpful": [place_of[position] for position in helpful],
        "band": [_quantiles(row) for row in ranked],
        "histogram": None if whole else [_histogram(row) for row in ranked],
    }


def _beyond(scores: np.ndarray) -> np.ndarray:
    """How many samples are more harmful than a harmful one, or more helpful than a helpful one, ``[samples]``."""
    known = np.sort(scores[np.isfinite(scores)])
    lower, higher = np.searchsorted(known, scores), len(known) - np.searchsorted(known, scores, "right")
    return np.where(scores < 0, lower, higher)


def _histogram(scores: np.ndarray) -> dict[str, Any] | None:
    """Counts in :data:`BINS` equal parts of the range, and its ends."""
    known = scores[np.isfinite(scores)]
    if not len(known) or known.min() == known.max():
        return None
    counts, edges = np.histogram(known, BINS)
    return {"counts": counts.tolist(), "from": float(edges[0]), "to": float(edges[-1])}


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
