"""Tables of windows and samples, as they appear on a run and in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from dit_mlflow.evaluation import Metrics
from dit_mlflow.influence import Influence

TOP = 10
"""Samples listed per window and side."""


def windows_table(influence: Influence, metrics: Sequence[Metrics]) -> pd.DataFrame:
    """One row per window: bounds, its most harmful and most helpful sample, and the window's metrics.

    Args:
        influence: scores; the first query is described.
        metrics: for each window.
    """
    rows: list[dict[str, object]] = []
    extremes = influence.top(1)
    extremes = extremes[extremes["query"] == influence.queries[0]].set_index(["window_index", "side"])
    for index, (window, found) in enumerate(zip(influence.windows, metrics, strict=True)):
        # Where the UI compares tables, it begins with the column after the first.
        row: dict[str, object] = {"window": index}
        for side in ("harmful", "helpful"):
            known = (index, side) in extremes.index
            row[f"most_{side}"] = int(extremes.loc[(index, side), "sample_index"]) if known else None
        rows.append(row | {"start": window.start, "end": window.end} | dict(found.values))
    return pd.DataFrame(rows)


def top_samples_table(
    influence: Influence,
    truth: Influence | None,
    corrupted: Sequence[int],
    describe: Callable[[int], str] | None,
) -> pd.DataFrame:
    """The :data:`TOP` most harmful and helpful samples of each window and query, with what is known of them."""
    table = influence.top(TOP)
    if truth is not None:
        keys = ["sample_index", "window_index", "query"]
        exact = truth.to_frame()[[*keys, "score"]].rename(columns={"score": "leave_one_out"})
        table = table.merge(exact, on=keys, how="left")
    if corrupted:
        table["corrupted"] = table["sample_index"].isin(list(corrupted))
    if describe is not None:
        table["sample"] = table["sample_index"].map(lambda index: describe(int(index)))
    first = [
        "window_start",
        "window_end",
        "side",
        "rank",
        "sample_index",
        "sample",
        "corrupted",
        "score",
        "leave_one_out",
    ]
    known = [name for name in first if name in table]
    return table[[*known, *(name for name in table if name not in known)]]


def terminal_table(table: pd.DataFrame, names: Mapping[str, str]) -> str:
    """The columns of ``table`` that ``names`` maps to headings, as aligned text."""
    kept = table[[name for name in names if name in table]].rename(columns=dict(names))
    return kept.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.3f}")
