"""A comparison over several trainings: means with intervals, and how much the seeds change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dit_mlflow.evaluation import mean_interval, stability
from dit_mlflow.evaluation.figures import AUROC, HIGH, INFLUENCE_SECONDS, LDS, LOW, PEARSON, RECALL_AT_K, SPEARMAN
from dit_mlflow.evaluation.stability import SHARES

SECONDS = "seconds"
"""The column with the seconds of a method's estimate."""

JUDGED = {figure.leaf: figure for figure in (SPEARMAN, PEARSON, LDS, RECALL_AT_K, AUROC)}
"""Columns that get an interval over trainings and an analysis of variance, with the figure in each."""

COMPARED = {**JUDGED, SECONDS: INFLUENCE_SECONDS}
"""Columns by which methods are compared, with the figure in each."""


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method: means over trainings; with several, intervals of the mean (Student's t).

    ``trainings``: on how many the method worked; ``asked``: on how many it ran.
    """
    summary = []
    for name, group in rows.groupby("method", sort=False):
        worked = group[~group["failed"]]
        row: dict[str, object] = {"method": name, "measures": group["measures"].iloc[0], "trainings": len(worked)}
        if "question" in group:
            row["question"] = group["question"].iloc[0]
        row["asked"] = len(group)
        for column in map(str, worked.select_dtypes("number")):
            values = worked[column].dropna()
            row.setdefault(column, float(values.mean()) if len(values) else None)
            if len(values) > 1 and (column in JUDGED or column + LOW in worked):
                low, high = mean_interval(values.to_numpy())
                row |= {column + LOW: low, column + HIGH: high}
            elif len(group) > 1 and column + LOW in worked:
                # One training is left: its interval is over samples, not over trainings.
                row |= {column + LOW: np.nan, column + HIGH: np.nan}
        errors = group["error"].dropna() if "error" in group else pd.Series(dtype=object)
        row |= {"failed": worked.empty, "error": str(errors.iloc[0]) if len(errors) else ""}
        summary.append(row)
    return pd.DataFrame(summary)


def stability_table(
    rows: pd.DataFrame, scores: Mapping[str, np.ndarray], grid: Sequence[tuple[int, int]]
) -> pd.DataFrame:
    """How much the seeds change a method's result: a row per method and figure, for methods that never failed.

    Args:
        rows: one per training and method, trainings in the order of ``grid``.
        scores: whole-run scores ``[samples]`` by the run in a row's ``run_id``.
        grid: pairs of seeds (weights, batch order), each pair once.

    Returns:
        Columns ``method``, ``of``, ``mean``, ``low``, ``high``, ``share_init``, ``share_order``, ``share_rest``. For
        ``of=scores``: mean Spearman correlation between two trainings, its interval, and shares of the variance of the
        samples' scores, see :func:`dit_mlflow.evaluation.stability`. For a figure: its mean, the interval of the mean
        (Student's t), and shares of its variance. Shares need at least two seeds of each.
    """
    shape = (len({init for init, _ in grid}), len({order for _, order in grid}))
    table: list[dict[str, object]] = []
    for name, group in rows.groupby("method", sort=False):
        if group["failed"].any():
            continue
        found = np.stack([scores[run] for run in group["run_id"]])
        agreement = stability(found.reshape(*shape, -1)).values
        ends = {"mean": "", "low": LOW, "high": HIGH}
        told = {column: agreement.get(SPEARMAN.leaf + end) for column, end in ends.items()}
        table.append({"method": name, "of": "scores", **told, **{key: agreement.get(key) for key in SHARES}})
        for column in (column for column in JUDGED if column in group and group[column].notna().all()):
            values = group[column].to_numpy(dtype=np.float64)
            low, high = mean_interval(values)
            parts = stability(values.reshape(*shape, 1)).values
            row = {"method": name, "of": column, "mean": float(values.mean()), "low": low, "high": high}
            table.append({**row, **{key: parts.get(key) for key in SHARES}})
    return pd.DataFrame(table)
