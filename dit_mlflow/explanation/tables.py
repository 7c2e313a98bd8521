"""Tables of windows and samples, for runs and the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import (
    AUROC,
    BESIDE,
    DETECTION,
    GAIN,
    PEARSON,
    RECALL_AT_K,
    REMOVAL_LDS,
    REMOVAL_SLOPE,
    SMOOTHNESS,
    SPEARMAN,
    TRUST_SPEARMAN,
)
from dit_mlflow.evaluation.patterns import window_correlations
from dit_mlflow.evaluation.trials import Cleansing
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import best_known, window_extremes
from dit_mlflow.influence import Influence
from dit_mlflow.told import told

TOP = 10
"""Samples listed per window and side."""

LINE = 110
"""Characters of a line in the terminal."""

DIGITS = 4
"""Significant digits of numbers in tables; stored scores and metrics have all digits."""

OF_WINDOWS = (REMOVAL_LDS, REMOVAL_SLOPE, SPEARMAN, PEARSON, TRUST_SPEARMAN, SMOOTHNESS, RECALL_AT_K, AUROC)
"""Figures of windows shown in the terminal, and, as means over windows, on a model."""

_FIRST = tuple(figure.name for figure in (REMOVAL_LDS, SPEARMAN, TRUST_SPEARMAN, RECALL_AT_K, AUROC, PEARSON))


def windows_table(influence: Influence, metrics: Sequence[Metrics]) -> pd.DataFrame:
    """One row per window: bounds, its most harmful and most helpful sample, and the window's metrics.

    The most important metrics come first; interval bounds and levels of chance come last.

    Args:
        influence: scores; the first query is described.
        metrics: for each window.
    """
    rows: list[dict[str, object]] = []
    known = dict.fromkeys(name for found in metrics for name in found.values)
    names = [
        *(name for name in _FIRST if name in known),
        *(name for name in known if name not in _FIRST and not name.endswith(BESIDE)),
        *(name for name in known if name not in _FIRST and name.endswith(BESIDE)),
    ]
    windows = zip(influence.windows, window_extremes(influence), metrics, strict=True)
    for index, (window, (harmful, helpful), found) in enumerate(windows):
        # Where the UI compares tables, it begins with the column after the first.
        row = {"window": index, "most_harmful": harmful, "most_helpful": helpful}
        bounds = {"start": window.start, "end": window.end}
        rows.append(row | bounds | {name: found.values.get(name) for name in names})
    # In some windows no sample harms, or none helps; the other indices stay whole numbers.
    return rounded(pd.DataFrame(rows).astype({"most_harmful": "Int64", "most_helpful": "Int64"}))


def top_samples_table(influence: Influence, truth: Influence | None, gallery: Gallery, k: int = TOP) -> pd.DataFrame:
    """The ``k`` most harmful and helpful samples of each window and query, with what is known of them.

    Window by window, the harmful ones first; the most important columns come first.
    """
    table = influence.top(k)
    if truth is not None:
        keys = ["sample_index", "window_index", "query"]
        exact = truth.to_frame()[[*keys, "score"]].rename(columns={"score": "leave_one_out"})
        table = table.merge(exact, on=keys, how="left")
    table["window"] = table["window_start"].astype(str) + "-" + table["window_end"].astype(str)
    if gallery.corrupted:
        table["corrupted"] = table["sample_index"].isin(gallery.corrupted)
    lines = table["sample_index"].map(lambda index: gallery.line(int(index)))
    if lines.astype(bool).any():
        table["sample"] = lines
    table = table.sort_values(["query", "window_index", "side", "rank"], kind="stable", ignore_index=True)
    first = ["window", "side", "sample_index", "score", "sample", "corrupted", "leave_one_out", "rank"]
    known = [name for name in first if name in table]
    return rounded(table[[*known, *(name for name in table if name not in known)]])


def whole_run_table(estimate: Influence, exact: Influence | None, gallery: Gallery, k: int = TOP) -> pd.DataFrame:
    """The ``k`` most harmful and helpful samples of the whole run, ranked by :func:`best_known`; both scores of each.

    Args:
        estimate: scores of one window.
        exact: scores by exact retraining, for some samples and windows.
    """
    (window,) = estimate.windows
    known = exact.select([window]) if exact is not None and window in exact.windows else None
    ranked = top_samples_table(best_known(estimate, exact), known, gallery, k)
    of_sample = dict(zip(estimate.samples.tolist(), estimate.scores[0, 0].tolist(), strict=True))
    ranked.insert(ranked.columns.get_loc("score"), "estimate", ranked["sample_index"].map(of_sample))  # type: ignore[arg-type]
    return rounded(ranked[ranked["query"] == estimate.queries[0]].drop(columns=["window_index", "score"]))


def window_correlations_table(influence: Influence) -> pd.DataFrame:
    """Spearman correlation of scores between windows: a row and a column per window, named by their steps."""
    names = [str(window) for window in influence.windows]
    table = pd.DataFrame(window_correlations(influence), columns=names)
    table.insert(0, "window", names)
    return table


def cleansing_table(cleansing: Cleansing) -> pd.DataFrame:
    """One row per trial: strategy, fraction, number of samples, figures with intervals, gains, detection."""
    rows = []
    for outcome in cleansing.outcomes:
        row: dict[str, object] = {
            "strategy": outcome.trial.strategy,
            "fraction": outcome.trial.fraction,
            "samples": outcome.trial.count,
            "chosen": outcome is cleansing.chosen,
            **outcome.summary().values,
            **outcome.gain(cleansing.before).prefixed(GAIN).values,
            **outcome.trial.found(cleansing.corrupted).prefixed(DETECTION).values,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def rounded(table: pd.DataFrame, digits: int = DIGITS) -> pd.DataFrame:
    """The table with its floating-point numbers at ``digits`` significant digits."""
    floats = [name for name in table if table[name].dtype.kind == "f"]
    return table.assign(**{str(name): table[name].map(lambda value: float(f"{value:.{digits}g}")) for name in floats})


CELL = 200
"""Most characters of a cell."""


def paragraph(text: str) -> str:
    """Plain text broken into lines of a terminal's width."""
    return textwrap.fill(text, LINE, break_on_hyphens=False)


def terminal_table(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    """The columns of ``table`` that ``names`` maps to headings, as aligned text; texts in cells are told."""
    kept = table[[name for name in names if name in table]].rename(columns=dict(names))
    texts = {
        str(name): [told(value, CELL) if isinstance(value, str) else value for value in kept[name]]
        for name in kept.select_dtypes(exclude="number")
    }
    # pandas writes missing whole numbers as <NA>, whatever na_rep says.
    whole = {
        name: ["-" if pd.isna(value) else value for value in kept[name]] for name in kept if kept[name].dtype == "Int64"
    }
    return kept.assign(**texts, **whole).to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.3f}")
